//! What the daemon holds, as the kernel counts it.

use anyhow::{Context, Result, ensure};
use xen_blk_tests::process::wait_until;

/// What a process holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Usage {
    pub(crate) descriptors: usize,
    pub(crate) mappings: usize,
    pub(crate) threads: usize,
    /// `RssAnon`, in KiB.
    pub(crate) memory: usize,
}

/// The memory that an allocator may keep of what it was given back, in KiB: some MiB for each of
/// its arenas. Ten million requests that leaked a byte each would exceed it.
const SLACK_KIB: usize = 8 << 10;
/// Mappings that come and go with the allocator's arenas and with idle threads' stacks.
const SLACK_MAPPINGS: usize = 24;

impl Usage {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let count = |what: &str| -> Result<usize> {
            Ok(std::fs::read_dir(format!("/proc/{pid}/{what}"))?.count())
        };
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let memory = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB"))
            .context("RssAnon")?;
        Ok(Self {
            descriptors: count("fd")?,
            mappings: std::fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().count(),
            threads: count("task")?,
            memory: memory.parse()?,
        })
    }

    /// Waits until a process is back at what it held, as far as that can be told from outside.
    pub(crate) fn wait_for_baseline(self, pid: u32) -> Result<Self> {
        let mut now = self;
        wait_until("descriptors to be closed and threads to end", || {
            now = Self::of(pid)?;
            Ok(now.descriptors <= self.descriptors && now.threads <= self.threads)
        })
        .with_context(|| format!("{now:?}, it had {self:?}"))?;
        ensure!(now.mappings <= self.mappings + SLACK_MAPPINGS, "{now:?}, it had {self:?}");
        ensure!(now.memory <= self.memory + SLACK_KIB, "{now:?}, it had {self:?}");
        Ok(now)
    }
}
