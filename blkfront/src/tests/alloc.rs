//! An I/O allocates nothing.

use super::*;
use crate::Io;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: everything is left to the system allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's obligations are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[test]
fn an_io_allocates_nothing() {
    for vcpus in [1, 2] {
        let config = Config { waiting: Waiting::default(), ..small(vcpus) };
        let mut rig = Rig::new(config, 1);
        let limits = Rig::limits(UNION, 32, FlushMode::Cache);
        let _backend = rig.connect(UNION, limits, Conduct::Good);
        let mut queue = rig.queue(0);
        let mut done = Vec::with_capacity(64);
        let mut before = 0;
        for round in 0..200u64 {
            // The first rounds fill what is allocated lazily.
            if round == 10 {
                before = ALLOCATIONS.get();
            }
            queue.plug();
            for n in 0..40 {
                let len = if n % 8 == 0 { 100 << 10 } else { 4096 };
                let buffer = queue.alloc(len).unwrap();
                let offset = (n * 37 + round) % 500 * 4096;
                let io = match n % 4 {
                    0 => Io::write_fua(n, offset, buffer),
                    1 => Io::write(n, offset, buffer),
                    _ => Io::read(n, offset, buffer),
                };
                queue.submit(io).unwrap();
            }
            queue.unplug();
            while queue.in_flight() > 0 {
                queue.wait(&mut done, None);
            }
            done.clear();
        }
        assert_eq!(ALLOCATIONS.get() - before, 0, "with {vcpus} vCPUs to the ring");
    }
}
