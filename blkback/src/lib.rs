//! A Xen block backend in user space.

pub mod ring;
pub mod stats;
pub mod storage;
