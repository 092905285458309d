//! The rings and vCPUs of a disk, and the threads between them. They stay the same for the life of the
//! disk, while backends come and go.

use crate::flight::Flight;
use crate::hw::Ring;
use crate::limits::Limits;
use crate::link::{Command, Link, Mailbox, Notice, locked};
use crate::owner::{OwnerState, RingOwner, User, join};
use crate::pool::{Pages, Pool};
use crate::queue::{Parts, Path, Queue};
use crate::stats::{Counters, Stats};
use crate::{Cause, Config, map_vcpus};
use ring_proto::DomId;
use ring_proto::abi::PAGE_SIZE;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use tokio::sync::mpsc::UnboundedSender;
use xen_platform::{Access, Platform, Spin};

/// Who owns a ring.
#[derive(Debug)]
enum Holder {
    Vcpu(usize),
    Thread(Arc<Mailbox>),
    /// With more rings than vCPUs: kept, but unused.
    Nobody,
}

#[derive(Debug)]
pub(crate) struct Fabric {
    pub(crate) map: Vec<u32>,
    pub(crate) link: Arc<Link>,
    vcpus: Vec<Arc<Mailbox>>,
    holders: Vec<Holder>,
    ring_counters: Vec<Arc<Counters>>,
    vcpu_counters: Vec<Arc<Counters>>,
    /// Each vCPU's path to its ring, until its queue is taken.
    seats: Mutex<Vec<Option<Path>>>,
    idle: Mutex<Vec<Ring>>,
    /// Of all queues ever taken. A backend may still copy to the pages of a queue that was dropped with I/O
    /// in flight, so their grant references must not be reused before the disk is closed.
    pages: Mutex<Vec<Arc<Pages>>>,
    stop: Arc<AtomicBool>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Fabric {
    pub(crate) fn new(
        config: &Config,
        rings: u32,
        control: UnboundedSender<Command>,
    ) -> Result<Arc<Self>, Cause> {
        let failed = |doing| move |source| Cause::System { doing, source };
        let mailbox = || Mailbox::new().map(Arc::new).map_err(failed("make an eventfd"));
        let map = map_vcpus(config.vcpus, rings);
        let vcpus = map.iter().map(|_| mailbox()).collect::<Result<Vec<_>, _>>()?;
        let holders = (0..rings)
            .map(|ring| {
                let mut users = (0..map.len()).filter(|&v| map.get(v) == Some(&ring));
                Ok(match (users.next(), users.next()) {
                    (None, _) => Holder::Nobody,
                    (Some(vcpu), None) => Holder::Vcpu(vcpu),
                    _ => Holder::Thread(mailbox()?),
                })
            })
            .collect::<Result<Vec<_>, Cause>>()?;
        let owners = holders.iter().filter_map(|holder| match holder {
            Holder::Thread(mailbox) => Some(mailbox.clone()),
            _ => None,
        });
        let mailboxes = vcpus.iter().cloned().chain(owners).collect();
        let (sectors, connection) = (AtomicU64::new(0), AtomicU32::new(0));
        let link = Arc::new(Link { sectors, connection, mailboxes, control });
        let counters = |n| (0..n).map(|_| Arc::<Counters>::default()).collect::<Vec<_>>();
        let fabric = Self {
            ring_counters: counters(holders.len()),
            vcpu_counters: counters(vcpus.len()),
            seats: Mutex::default(),
            idle: Mutex::default(),
            pages: Mutex::default(),
            stop: Arc::default(),
            threads: Mutex::default(),
            map,
            link,
            vcpus,
            holders,
        };
        // From here on, dropping the fabric stops the threads that were started.
        fabric.start(config)?;
        Ok(Arc::new(fabric))
    }

    fn start(&self, config: &Config) -> Result<(), Cause> {
        let requests = Flight::max_requests(config.depth, pool_pages(config));
        let mut seats: Vec<Option<Path>> = Vec::new();
        seats.resize_with(self.vcpus.len(), || Some(Path::Own(None)));
        for (ring, holder) in (0u32..).zip(&self.holders) {
            let Holder::Thread(mailbox) = holder else { continue };
            let mut users: Vec<User> = Vec::new();
            for ((seat, vcpu), _) in
                seats.iter_mut().zip(&self.vcpus).zip(&self.map).filter(|(_, r)| **r == ring)
            {
                let (staging, user) = join(requests, vcpu.clone(), mailbox.clone());
                *seat = Some(Path::Shared(staging));
                users.push(user);
            }
            let owner = RingOwner {
                ring,
                users,
                mailbox: mailbox.clone(),
                link: self.link.clone(),
                counters: self.ring_counters.get(ring as usize).cloned().unwrap_or_default(),
                spin: Spin::new(config.waiting),
                stop: self.stop.clone(),
                state: OwnerState::default(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("blkfront-ring{ring}"))
                .spawn(move || owner.run())
                .map_err(|source| Cause::System { doing: "start the thread of a ring", source })?;
            locked(&self.threads).push(thread);
        }
        *locked(&self.seats) = seats;
        Ok(())
    }

    pub(crate) fn rings(&self) -> u32 {
        self.holders.len() as u32
    }

    /// Hands the rings of a new connection to their owners.
    pub(crate) fn connect(&self, connection: u32, limits: Limits, rings: Vec<Ring>) {
        self.link.connection.store(connection, Ordering::Relaxed);
        let mut own: Vec<Option<Box<Ring>>> = Vec::new();
        own.resize_with(self.vcpus.len(), || None);
        let mut idle = Vec::new();
        for (ring, holder) in rings.into_iter().zip(&self.holders) {
            match holder {
                Holder::Vcpu(vcpu) => {
                    if let Some(place) = own.get_mut(*vcpu) {
                        *place = Some(Box::new(ring));
                    }
                }
                Holder::Thread(mailbox) => {
                    let ring = Some(Box::new(ring));
                    mailbox.post(Notice::Up { connection, limits, ring });
                }
                Holder::Nobody => idle.push(ring),
            }
        }
        *locked(&self.idle) = idle;
        for (vcpu, ring) in self.vcpus.iter().zip(own) {
            vcpu.post(Notice::Up { connection, limits, ring });
        }
    }

    pub(crate) fn post(&self, notice: impl Fn() -> Notice) {
        for mailbox in &self.link.mailboxes {
            mailbox.post(notice());
        }
        if matches!(notice(), Notice::Down | Notice::Gone) {
            locked(&self.idle).clear();
        }
    }

    /// Unanswered requests on the rings.
    pub(crate) fn on_rings(&self) -> u64 {
        let open = |s: Stats| s.requests.wrapping_sub(s.responses).wrapping_sub(s.lost);
        self.ring_counters.iter().map(|c| open(c.snapshot())).fold(0, u64::wrapping_add)
    }

    /// The counters of a ring and of the vCPUs that are mapped to it.
    pub(crate) fn stats(&self, ring: u32) -> Stats {
        let mut stats =
            self.ring_counters.get(ring as usize).map_or_else(Stats::default, |c| c.snapshot());
        for (counters, _) in self.vcpu_counters.iter().zip(&self.map).filter(|(_, r)| **r == ring) {
            stats += counters.snapshot();
        }
        stats
    }

    /// Takes a vCPU's queue; `None` if there is none, or it was taken.
    pub(crate) fn queue(
        &self,
        vcpu: u32,
        platform: &dyn Platform,
        peer: DomId,
        config: &Config,
        limits: Limits,
    ) -> Result<Option<Queue>, Cause> {
        let n = vcpu as usize;
        let (Some(mailbox), Some(counters)) = (self.vcpus.get(n), self.vcpu_counters.get(n)) else {
            return Ok(None);
        };
        let ring = self.map.get(n).copied().unwrap_or_default();
        let pool_pages = pool_pages(config);
        let grant = |pages| {
            let grants = platform.grant(peer, pages, Access::ReadWrite);
            grants.map(Pool::new).map_err(|source| Cause::Platform { ring, source })
        };
        let (pool, lists) = (grant(pool_pages)?, grant(list_pages(config))?);
        let waker = Queue::waker(mailbox);
        let waker = waker.map_err(|source| Cause::System { doing: "make an epoll", source })?;
        // Last, so that this can be retried after a failure.
        let Some(path) = locked(&self.seats).get_mut(n).and_then(Option::take) else {
            return Ok(None);
        };
        locked(&self.pages).extend([pool.pages(), lists.pages()]);
        let parts = Parts {
            vcpu,
            ring,
            pool,
            lists,
            depth: config.depth,
            pool_pages,
            merge: config.merge,
            limits,
            waiting: config.waiting,
            path,
            link: self.link.clone(),
            mailbox: mailbox.clone(),
            waker,
            counters: counters.clone(),
            ring_counters: self.ring_counters.get(ring as usize).cloned().unwrap_or_default(),
        };
        Ok(Some(Queue::new(parts)))
    }

    /// Ends the threads of shared rings.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        for holder in &self.holders {
            if let Holder::Thread(mailbox) = holder {
                mailbox.bell.ring();
            }
        }
        for thread in locked(&self.threads).drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Fabric {
    fn drop(&mut self) {
        self.stop();
    }
}

fn pool_pages(config: &Config) -> usize {
    config.pool_bytes.div_ceil(PAGE_SIZE)
}

/// Pages for the segments of a pool's worth of indirect requests: each has more segments than a direct one
/// could have, and each segment takes a page of the pool. With fewer, requests would wait for each other.
fn list_pages(config: &Config) -> usize {
    let direct = ring_proto::RingLayout::Split.max_direct_segments();
    if config.max_indirect_segments == 0 { 1 } else { pool_pages(config) / direct + 1 }
}
