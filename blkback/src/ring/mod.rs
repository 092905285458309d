//! The data plane: rings and the threads that serve them, from the event to the response.

mod bounce;
mod budget;
mod clock;
mod data;
mod inflight;
mod persistent;
mod setup;
mod sleep;
mod thread;
mod threads;
mod worker;

pub use clock::TIMED_ROUNDS;
pub use data::Strategy;
pub use inflight::{Inflight, Misfit};
pub use setup::{Exit, RingSetup, Tenant};
pub use threads::{RingControl, Threads};
