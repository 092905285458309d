//! The data plane: one thread a ring, from the event to the response.

mod bounce;
mod clock;
mod data;
mod inflight;
mod persistent;
mod setup;
mod worker;

pub use clock::TIMED_ROUNDS;
pub use data::Strategy;
pub use inflight::{Inflight, Misfit};
pub use setup::{Exit, RingControl, RingSetup};
pub use worker::run;
