//! Where the disk is.

use anyhow::Context;
use blkfront::{Config, Disk};
use std::sync::Arc;
use xen_platform::{Choice, End, Platform};
use xenstore_glue::client::Endpoint;

/// Which hypervisor, and which of its domains.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Host")]
pub(crate) struct Host {
    /// The hypervisor: `xen`, or `embedded:DIR`, where DIR is what `xen-embedded serve` was given
    /// [default: xen, on a machine that runs on it]
    #[arg(long, global = true, value_name = "PLATFORM")]
    platform: Option<String>,
    /// The domain to be, on the embedded platform: name or number
    #[arg(long, global = true, value_name = "DOMAIN")]
    domain: Option<String>,
}

impl Host {
    /// Attaches as the domain.
    fn attach(&self) -> anyhow::Result<(Arc<dyn Platform>, Endpoint)> {
        let choice = Choice::new(self.platform.as_deref(), self.domain.as_deref())?;
        choice.open(End::Frontend).with_context(|| format!("become {choice}"))
    }

    /// Opens a disk.
    pub(crate) fn open(&self, device: &str, config: Config) -> anyhow::Result<Disk> {
        let (platform, endpoint) = self.attach()?;
        Ok(Disk::open(platform, endpoint, device, config)?)
    }
}
