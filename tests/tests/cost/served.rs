//! A ring that a thread of this process serves.

use anyhow::Result;
use blkback::ring::{Exit, RingControl, RingSetup, Tenant, Threads};
use std::convert::Infallible;
use std::sync::mpsc::{self, Receiver};
use xen_platform::Waiting;

/// A ring on a thread of its own.
pub(crate) struct Served {
    control: RingControl,
    ended: Receiver<Exit>,
    gone: Receiver<Infallible>,
}

impl Served {
    pub(crate) fn start(setup: RingSetup, waiting: Waiting) -> Result<Self> {
        let (why, ended) = mpsc::channel();
        let (alive, gone) = mpsc::channel();
        let tenant = Tenant {
            name: "ring".to_owned(),
            ended: Box::new(move |exit| drop(why.send(exit))),
            alive: std::sync::Arc::new(alive),
        };
        let control = Threads::new(1, waiting).serve(setup, tenant)?;
        Ok(Self { control, ended, gone })
    }

    /// Fails if the ring has ended.
    pub(crate) fn check(&self) -> Result<()> {
        self.ended.try_recv().map_or(Ok(()), |exit| Err(exit.into()))
    }

    /// Stops the ring. Nothing of the guest's is held any more when this returns.
    pub(crate) fn stop(self) -> Result<()> {
        self.control.stop();
        // Nothing is ever sent: the sender goes with the ring.
        let _ = self.gone.recv();
        self.check()
    }
}
