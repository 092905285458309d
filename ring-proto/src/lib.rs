//! The blkif shared ring.
#![no_std]
extern crate alloc;
#[cfg(any(test, loom))]
extern crate std;

pub mod abi;
mod ids;
mod layout;
mod memory;

pub use ids::{DomId, GrantRef, Port};
pub use layout::{Abi, RingLayout};
pub use memory::{SharedMemory, Window, copy_volatile};
