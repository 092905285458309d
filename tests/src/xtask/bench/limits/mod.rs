//! The limits of the machine.

pub(super) mod eventfd;
pub(super) mod fio;
pub(super) mod hop;
pub(super) mod memcpy;
pub(super) mod uring;

use super::contender::CLIENT_CPU;
use anyhow::{Result, anyhow};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Pins the calling thread.
fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Runs `work` on the clients' CPU, in a thread whose pinning ends with it.
fn on_client_cpu<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            pin(CLIENT_CPU)?;
            work()
        });
        thread.join().map_err(|_| anyhow!("a thread panicked"))?
    })
}
