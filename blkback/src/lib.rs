//! A Xen block backend in user space.

pub mod storage;
