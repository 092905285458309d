//! A disk that does nothing: what is left is the cost of the ring.

use super::immediate::Immediate;
use super::{Discard, Geometry, Queue, QueueSetup, Storage};
use ring_proto::abi::SECTOR_SIZE;
use std::io;

/// A disk of any size that completes everything as it is submitted and moves no data.
pub(super) struct Null {
    geometry: Geometry,
}

impl Null {
    pub(super) fn new(sectors: u64, read_only: bool, discard: bool) -> Self {
        let sector = SECTOR_SIZE as u32;
        let limits = Discard { granularity: sector, alignment: 0, secure: true };
        Self {
            geometry: Geometry {
                sectors,
                sector_size: sector,
                physical_sector_size: sector,
                read_only,
                discard: (discard && !read_only).then_some(limits),
                flush: false,
                moves_data: false,
                buffer_alignment: 1,
                exclusive: true,
            },
        }
    }
}

impl Storage for Null {
    fn geometry(&self) -> Geometry {
        self.geometry.clone()
    }

    fn refresh(&self) -> io::Result<Geometry> {
        Ok(self.geometry())
    }

    fn open_queue(&self, setup: QueueSetup) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(Immediate::new(setup, |_| Ok(()))))
    }
}
