//! A disk in memory, gone with the process.

use super::immediate::Immediate;
use super::{Discard, Geometry, Op, OpKind, Queue, QueueSetup, Storage};
use ring_proto::abi::{PAGE_SIZE, SECTOR_SIZE};
use std::io;
use std::sync::Arc;
use xen_platform::LocalRegion;

/// Sparse memory. Rings access it concurrently without a lock. As on any disk, a write that races with
/// another operation on the same sectors leaves a mixture of both.
pub(super) struct Memory {
    geometry: Geometry,
    region: Arc<LocalRegion>,
}

impl Memory {
    /// Reserves `sectors`; pages are allocated when they are first written.
    pub(super) fn new(sectors: u64, read_only: bool, discard: bool) -> io::Result<Self> {
        let pages = sectors.div_ceil((PAGE_SIZE / SECTOR_SIZE) as u64);
        let pages = usize::try_from(pages).map_err(io::Error::other)?;
        let region = LocalRegion::new(pages).map_err(io::Error::other)?;
        let limits = Discard { granularity: PAGE_SIZE as u32, alignment: 0, secure: true };
        let geometry = Geometry {
            sectors,
            sector_size: SECTOR_SIZE as u32,
            physical_sector_size: SECTOR_SIZE as u32,
            read_only,
            discard: (discard && !read_only).then_some(limits),
            flush: false,
            moves_data: true,
            buffer_alignment: 1,
            exclusive: true,
        };
        Ok(Self { geometry, region: Arc::new(region) })
    }
}

impl Storage for Memory {
    fn geometry(&self) -> Geometry {
        self.geometry.clone()
    }

    fn refresh(&self) -> io::Result<Geometry> {
        Ok(self.geometry())
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn Queue>> {
        let shared = Shared {
            region: self.region.clone(),
            bytes: self.geometry.sectors * SECTOR_SIZE as u64,
            read_only: self.geometry.read_only,
        };
        Ok(Box::new(Immediate::new(setup, move |op| shared.execute(op))))
    }
}

/// What a queue works on.
struct Shared {
    region: Arc<LocalRegion>,
    bytes: u64,
    read_only: bool,
}

impl Shared {
    fn execute(&self, op: &Op<'_>) -> Result<(), i32> {
        op.check(self.bytes, self.read_only)?;
        // It fits: the check bounds it by the region's length, a usize.
        let mut at = op.offset as usize;
        match op.kind {
            OpKind::Read => {
                for piece in op.buffers {
                    piece.fill_from(&*self.region, at);
                    at += piece.len();
                }
            }
            OpKind::Write => {
                for piece in op.buffers {
                    piece.copy_into(&*self.region, at);
                    at += piece.len();
                }
            }
            OpKind::Discard { bytes, .. } => {
                self.region.clear(at, bytes as usize).map_err(|_| libc::EIO)?;
            }
            OpKind::Flush => {}
        }
        Ok(())
    }
}
