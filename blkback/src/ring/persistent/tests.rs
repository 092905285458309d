//! The pool on a platform that only records what is mapped.

use super::*;
use crate::ring::budget::Budget;
use ring_proto::SharedMemory;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use xen_platform::{Error, EventChannel, GrantCopier, GrantedPages, LocalRegion, Result};

/// Not granted.
const BAD: u32 = 666_666;

#[derive(Debug, Default)]
struct Host {
    /// How many pages each call has mapped.
    calls: Mutex<Vec<usize>>,
    mapped: Arc<AtomicUsize>,
}

impl Host {
    fn calls(&self) -> Vec<usize> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

#[derive(Debug)]
struct Pages {
    memory: LocalRegion,
    mapped: Arc<AtomicUsize>,
}

impl MappedGrants for Pages {}

// SAFETY: the region's own.
unsafe impl SharedMemory for Pages {
    fn base(&self) -> NonNull<u8> {
        self.memory.base()
    }
    fn len(&self) -> usize {
        self.memory.len()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.mapped.fetch_sub(self.len() / PAGE_SIZE, Ordering::Relaxed);
    }
}

impl Platform for Host {
    fn domid(&self) -> DomId {
        DomId(1)
    }
    fn claim(&self, _: u32) -> Result<Option<OwnedFd>> {
        Err(Error::io("claim", std::io::ErrorKind::Unsupported))
    }
    fn map(&self, _: DomId, refs: &[GrantRef], _: Access) -> Result<Arc<dyn MappedGrants>> {
        self.calls.lock().unwrap().push(refs.len());
        if refs.contains(&GrantRef(BAD)) {
            return Err(Error::io("map", std::io::ErrorKind::NotFound));
        }
        self.mapped.fetch_add(refs.len(), Ordering::Relaxed);
        let memory = LocalRegion::new(refs.len())?;
        Ok(Arc::new(Pages { memory, mapped: self.mapped.clone() }))
    }
    fn may_pin(&self) -> bool {
        true
    }

    fn copier(&self, _: DomId) -> Result<Box<dyn GrantCopier>> {
        Err(Error::io("copy", std::io::ErrorKind::Unsupported))
    }
    fn grant(&self, _: DomId, _: usize, _: Access) -> Result<Box<dyn GrantedPages>> {
        Err(Error::io("grant", std::io::ErrorKind::Unsupported))
    }
    fn alloc_unbound(&self, _: DomId) -> Result<Box<dyn EventChannel>> {
        Err(Error::io("allocate", std::io::ErrorKind::Unsupported))
    }
    fn bind_interdomain(&self, _: DomId, _: ring_proto::Port) -> Result<Box<dyn EventChannel>> {
        Err(Error::io("bind", std::io::ErrorKind::Unsupported))
    }
}

struct Rig {
    host: Arc<Host>,
    pool: PersistentGrants,
    stats: Arc<RingStats>,
    pins: Vec<Pin>,
}

impl Rig {
    fn new() -> Self {
        let (host, stats) = (Arc::new(Host::default()), Arc::<RingStats>::default());
        let pool = PersistentGrants::new(host.clone(), DomId(2), stats.clone());
        Self { host, pool, stats, pins: Vec::new() }
    }

    /// Starts a request for these pages: how many were found at a time, if all were.
    fn begin(&mut self, grefs: impl IntoIterator<Item = u32>) -> Result<Vec<usize>> {
        let segments: Vec<_> =
            grefs.into_iter().map(|gref| Segment::new(GrantRef(gref), 0, 7)).collect();
        let (mut rest, mut counts) = (&segments[..], Vec::new());
        while !rest.is_empty() {
            let (Found { count, .. }, hold) = self.pool.find(rest, &mut Budget::new(true))?;
            if let Hold::Pin(pin) = hold {
                self.pins.push(pin);
            }
            counts.push(count);
            rest = &rest[count..];
        }
        Ok(counts)
    }

    /// Ends all requests.
    fn end(&mut self) {
        self.pins.drain(..).for_each(|pin| self.pool.unpin(pin));
        self.pool.tick();
    }

    fn mapped(&self) -> usize {
        self.host.mapped.load(Ordering::Relaxed)
    }
}

#[test]
fn what_is_used_together_first_is_mapped_by_one_call() {
    let mut rig = Rig::new();
    assert_eq!(rig.begin(10..42).unwrap(), [32]);
    assert_eq!(rig.begin([5, 6, 20, 21, 7]).unwrap(), [2, 2, 1]);
    assert_eq!(rig.host.calls(), [32, 2, 1]);
    // Already mapped: forwards in one piece, backwards each by itself.
    assert_eq!(rig.begin(12..30).unwrap(), [18]);
    assert_eq!(rig.begin([12, 11, 10]).unwrap(), [1, 1, 1]);
    // Twice in a request.
    assert_eq!(rig.begin([50, 51, 50, 51]).unwrap(), [2, 2]);
    assert_eq!(rig.host.calls(), [2]);
    assert_eq!(rig.stats.grant_maps.get(), 37);
    assert_eq!(rig.stats.persistent_hits.get(), 2 + 18 + 3 + 2);
    assert_eq!((rig.stats.persistent_held.get(), rig.mapped()), (37, 37));
}

#[test]
fn a_bad_grant_leaves_nothing() {
    let mut rig = Rig::new();
    rig.begin(1..=900).unwrap();
    rig.end();
    assert!(rig.begin([1, 2, 1001, BAD, 1002]).is_err());
    rig.end();
    assert_eq!((rig.mapped(), rig.pool.places.len()), (900, 900));
    // A failed map of perhaps too many pages does not count as crowding.
    assert!(rig.begin((2000..2200).chain([BAD])).is_err());
    rig.end();
    assert!(!rig.pool.crowded && rig.mapped() <= 900);
    assert_eq!(rig.begin(3000..3010).unwrap(), [10]);
}

#[test]
fn a_crowded_pool_keeps_pages_one_by_one_until_it_was_quiet() {
    let mut rig = Rig::new();
    for first in (0..MAX_PERSISTENT_GRANTS as u32).step_by(32) {
        rig.begin(10_000 + first..10_032 + first).unwrap();
        rig.end();
    }
    rig.host.calls();
    // Of the least recently used, as many as necessary and a share.
    rig.begin(20_000..20_016).unwrap();
    rig.end();
    assert_eq!(rig.host.calls(), [16]);
    assert!(
        rig.stats.persistent_evictions.get() >= 16 && rig.begin(10_960..10_992).unwrap() == [32]
    );
    rig.end();
    rig.begin(30_000..30_004).unwrap();
    assert_eq!(rig.host.calls(), [1; 4]);
    rig.end();
    for n in 0..10 {
        rig.begin(40_000 + n * 200..40_200 + n * 200).unwrap();
        rig.end();
        assert!(rig.mapped() <= MAX_PERSISTENT_GRANTS, "{} pages", rig.mapped());
        assert_eq!(rig.mapped() as u64, rig.stats.persistent_held.get());
    }
    rig.host.calls();
    assert!(!rig.pool.purge().is_empty());
    assert_eq!((rig.mapped(), rig.stats.persistent_held.get()), (0, 0));
    assert_eq!(rig.begin(10_000..10_032).unwrap(), [32]);
}

#[test]
fn what_does_not_fit_is_mapped_for_its_request() {
    let mut rig = Rig::new();
    for first in (0..1024).step_by(256) {
        assert_eq!(rig.begin(10_000 + first..10_256 + first).unwrap(), [256]);
    }
    // All are in use: room for only 32 more.
    assert_eq!(rig.begin([10_000].into_iter().chain(20_000..20_200)).unwrap(), [1, 200]);
    assert_eq!(rig.host.calls(), [256, 256, 256, 256, 200]);
    assert_eq!((rig.mapped(), rig.pool.places.len()), (1024, 1024));
    assert_eq!(rig.begin(30_000..30_032).unwrap(), [1; 32]);
    assert_eq!(rig.begin([40_000]).unwrap(), [1]);
    assert_eq!((rig.mapped(), rig.stats.persistent_evictions.get()), (1056, 0));
    assert_eq!(rig.stats.persistent_held.get(), 1056);
}
