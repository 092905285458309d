//! A Xen block backend in user space.
//!
//! - [`config`], [`tuning`]: what an operator can set.
//! - [`daemon`]: finds devices in xenstore and gives each a task (tokio, the control plane).
//! - [`ring`]: rings and their threads, from the event to the response (the data plane).
//! - [`records`]: what a successor needs to know to take over a ring.
//! - [`storage`]: what backs a disk.
//! - [`stats`], [`registry`], [`metrics`]: statistics of all that.

pub mod config;
pub mod daemon;
mod device;
pub mod metrics;
pub mod records;
pub mod registry;
pub mod ring;
mod sizes;
pub mod stats;
pub mod storage;
pub mod tuning;
