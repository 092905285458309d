//! The data plane: one thread a ring, from the event to the response.

mod bounce;
mod data;
mod persistent;
mod spin;
mod worker;

pub use data::Strategy;
pub use spin::Wait;
pub use worker::{Exit, RingControl, RingSetup, run};
