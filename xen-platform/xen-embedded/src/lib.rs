//! A stand-in for a Xen host on any Linux machine, for development, tests and user-space guests.
//!
//! The [`broker`] owns domains and hosts their xenstore; the [`toolstack`] gives them disks. Processes become
//! domains through [`xen_platform::embedded`], which describes what a domain is made of. In its directory the
//! broker keeps:
//!
//! - `xenstored.sock`: xenstore with dom0's rights, for `XENSTORED_PATH` and the toolstack
//! - `control.sock`: [`control`](xen_platform::embedded::control), what the toolstack asks of the broker
//! - `dom<N>/hypervisor.sock`: attaching to domain N, by [`protocol`](xen_platform::embedded::protocol)
//! - `dom<N>/xenstore.sock`: xenstore with the rights of domain N

pub mod broker;
pub mod toolstack;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// In the broker's directory: xenstore with dom0's rights.
pub const XENSTORED_SOCKET: &str = "xenstored.sock";

/// Locks, even after a panic under the lock: no invariant here spans a call that could panic.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
