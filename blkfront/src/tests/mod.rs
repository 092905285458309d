//! The data path against a backend on a thread of this process.

mod alloc;
mod backend;
mod host;
mod hostile;
mod model;
mod reconnect;

use crate::fabric::Fabric;
use crate::hw::Ring;
use crate::limits::{FlushMode, Limits};
use crate::link::Command;
use crate::{Config, Queue, Waiting, rings};
use backend::{Backend, Conduct, Storage};
use host::Host;
use ring_proto::{Abi, DomId, RingLayout};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use tokio::sync::mpsc::UnboundedReceiver;

const UNION: RingLayout = RingLayout::Union(Abi::NATIVE);
/// 4 MiB.
const DISK: usize = 4 << 20;

/// A disk without a control thread.
struct Rig {
    host: Host,
    config: Config,
    fabric: Arc<Fabric>,
    commands: UnboundedReceiver<Command>,
    storage: Arc<Mutex<Storage>>,
    connection: u32,
}

impl Rig {
    fn new(config: Config, rings: u32) -> Self {
        let (control, commands) = tokio::sync::mpsc::unbounded_channel();
        let fabric = Fabric::new(&config, rings, control).unwrap();
        fabric.link.sectors.store(DISK as u64 / 512, Ordering::Relaxed);
        let storage = Storage { data: vec![0; DISK], log: Vec::new() };
        let storage = Arc::new(Mutex::new(storage));
        Self { host: Host::default(), config, fabric, commands, storage, connection: 0 }
    }

    fn limits(layout: RingLayout, indirect: u16, flush: FlushMode) -> Limits {
        Limits {
            direct: layout.max_direct_segments() as u16,
            indirect,
            flush,
            discard: true,
            secure_discard: false,
            read_only: false,
            sector_size: 512,
        }
    }

    /// Does what the control thread does when a backend comes.
    fn connect(&mut self, layout: RingLayout, limits: Limits, conduct: Conduct) -> Backend {
        let order = self.config.ring_order;
        let make = |n| rings::make(&self.host, DomId(0), n, layout, order).unwrap();
        let (rings, keys): (Vec<Ring>, Vec<_>) = (0..self.fabric.rings()).map(make).unzip();
        let (host, storage) = (&self.host, &self.storage);
        let indirect = limits.indirect;
        let backend = Backend::start(host, &keys, layout, order, indirect, conduct, storage);
        self.connection += 1;
        self.fabric.connect(self.connection, limits, rings);
        backend
    }

    fn queue(&self, vcpu: u32) -> Queue {
        let limits = Self::limits(UNION, 0, FlushMode::None);
        self.fabric.queue(vcpu, &self.host, DomId(0), &self.config, limits).unwrap().unwrap()
    }

    fn storage(&self) -> std::sync::MutexGuard<'_, Storage> {
        self.storage.lock().unwrap()
    }
}

/// Small enough that rings and pools run out.
fn small(vcpus: u32) -> Config {
    Config { vcpus, depth: 64, pool_bytes: 2 << 20, waiting: Waiting::Event, ..Config::default() }
}

/// xorshift64: the same numbers each time.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(256) as u8).collect()
    }
}
