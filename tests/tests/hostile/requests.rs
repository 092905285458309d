//! Requests that each break a rule, and what must become of them.

use crate::random::Random;
use crate::ring::Fields;
use ring_proto::GrantRef;

/// What a request must be answered with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Expect {
    /// `BLKIF_RSP_ERROR`
    Error,
    /// `BLKIF_RSP_EOPNOTSUPP`
    Unsupported,
    /// One of the two.
    Refused,
    /// It may be valid, by chance.
    Any,
}

impl Expect {
    pub(crate) fn allows(self, status: i16) -> bool {
        match self {
            Self::Error => status == -1,
            Self::Unsupported => status == -2,
            Self::Refused => status == -1 || status == -2,
            Self::Any => (-2..=0).contains(&status),
        }
    }
}

/// Grants to build requests from.
#[derive(Clone, Default)]
pub(crate) struct Grants {
    /// Pages the backend may write.
    pub(crate) good: Vec<GrantRef>,
    /// Pages it may only read.
    pub(crate) readonly: Vec<GrantRef>,
    /// Granted to somebody else, revoked, never granted, reserved, out of the table.
    pub(crate) bad: Vec<GrantRef>,
    /// Indirect pages whose first segment is the wrong way round.
    pub(crate) crossed: Vec<GrantRef>,
    /// Indirect pages whose segments are well-formed and name bad grants.
    pub(crate) dangling: Vec<GrantRef>,
}

/// Makes malformed requests for one ring.
pub(crate) struct Attack {
    pub(crate) random: Random,
    pub(crate) grants: Grants,
    /// Of the disk, in 512-byte units.
    pub(crate) sectors: u64,
    /// Segments a request has room for.
    pub(crate) room: usize,
    pub(crate) max_indirect: u16,
}

/// How many kinds [`Attack::request`] knows.
pub(crate) const KINDS: usize = 13;

impl Attack {
    fn base(&mut self) -> Fields {
        let r = &mut self.random;
        let mut fields = Fields {
            operation: 0,
            detail: 0,
            half: r.next() as u16,
            id: r.next(),
            sector: r.next(),
            body: [0; 88],
        };
        r.fill(&mut fields.body);
        fields
    }

    /// A valid read or write (now and then a barrier or a flush with data).
    fn right(&mut self) -> Fields {
        let mut fields = self.base();
        let r = &mut self.random;
        // Barriers wait for the ring to be idle.
        fields.operation = if r.below(256) == 0 { 2 + r.below(2) as u8 } else { r.below(2) as u8 };
        let segments = 1 + r.below(self.room as u64) as usize;
        fields.detail = segments as u8;
        fields.sector = r.below(self.sectors - 8 * segments as u64);
        for n in 0..segments {
            let (a, b) = (r.below(8) as u8, r.below(8) as u8);
            let gref = r.pick(&self.grants.good).0;
            fields.set_segment(n, gref, a.min(b), a.max(b));
        }
        fields
    }

    fn indirect(&mut self) -> Fields {
        let mut fields = self.base();
        let r = &mut self.random;
        fields.operation = 6;
        fields.detail = r.below(2) as u8;
        fields.half = 2 + r.below(u64::from(self.max_indirect) - 2) as u16;
        fields.sector = r.below(self.sectors - 8 * u64::from(self.max_indirect));
        fields.set_indirect_page(0, r.pick(&self.grants.crossed).0);
        fields
    }

    /// A malformed request of one kind.
    pub(crate) fn request(&mut self, kind: usize) -> (Fields, Expect) {
        match kind {
            0 => {
                let mut fields = self.base();
                fields.operation = self.random.next() as u8;
                fields.detail = self.random.next() as u8;
                let flush = matches!(fields.operation, 2 | 3) && fields.detail == 0;
                let chance = flush || fields.sector <= self.sectors;
                (fields, if chance { Expect::Any } else { Expect::Refused })
            }
            1 => {
                // nr_segments: none, or more than there is room for.
                let mut fields = self.right();
                let many = self.room as u64 + 1;
                fields.detail = (many + self.random.below(256 - many)) as u8;
                if fields.operation < 2 && self.random.below(4) == 0 {
                    fields.detail = 0;
                }
                (fields, Expect::Error)
            }
            2 => {
                let mut fields = self.right();
                let n = self.random.below(u64::from(fields.detail)) as usize;
                let first = self.random.next() as u8;
                let last = match first {
                    0..8 if self.random.below(2) == 0 => first.wrapping_sub(1),
                    _ => 8 + self.random.below(248) as u8,
                };
                fields.set_segment(n, self.grants.good[0].0, first, last);
                (fields, Expect::Error)
            }
            3 => {
                let mut fields = self.right();
                let near = self.random.below(8);
                fields.sector = match self.random.below(6) {
                    0 => u64::MAX - near,
                    1 => self.sectors + near,
                    2 => 1 << 63,
                    3 => u64::MAX / 512 + near,
                    4 => (1 << 55) - near,
                    _ => self.sectors + self.random.below(u64::MAX >> 32),
                };
                (fields, Expect::Error)
            }
            4 => {
                let mut fields = self.right();
                fields.operation = match self.random.below(250) as u8 {
                    0 => 4,
                    n => n + 6,
                };
                (fields, Expect::Unsupported)
            }
            5 => {
                let mut fields = self.right();
                let n = self.random.below(u64::from(fields.detail)) as usize;
                fields.set_segment(n, self.random.pick(&self.grants.bad).0, 0, 7);
                (fields, Expect::Error)
            }
            6 => {
                // A read into a page that the backend may not write.
                let mut fields = self.right();
                fields.operation = 0;
                let n = self.random.below(u64::from(fields.detail)) as usize;
                fields.set_segment(n, self.random.pick(&self.grants.readonly).0, 0, 7);
                (fields, Expect::Error)
            }
            7 => {
                // Indirect of indirect, of discard, of anything but reads and writes.
                let mut fields = self.indirect();
                fields.detail = match self.random.below(4) {
                    0 => 6,
                    _ => 2 + self.random.below(254) as u8,
                };
                (fields, Expect::Error)
            }
            8 => {
                let mut fields = self.indirect();
                let above = u64::from(self.max_indirect) + 1;
                fields.half = match self.random.below(8) {
                    0 => 0,
                    1 => u16::MAX,
                    _ => (above + self.random.below(65536 - above)) as u16,
                };
                (fields, Expect::Error)
            }
            9 => {
                let mut fields = self.indirect();
                fields.set_indirect_page(0, self.random.pick(&self.grants.bad).0);
                (fields, Expect::Error)
            }
            10 => (self.indirect(), Expect::Error),
            11 => {
                let mut fields = self.indirect();
                fields.set_indirect_page(0, self.random.pick(&self.grants.dangling).0);
                (fields, Expect::Error)
            }
            _ => {
                let mut fields = self.base();
                fields.operation = 5;
                fields.detail = self.random.below(2) as u8;
                let beyond = self.sectors + 1 + self.random.below(1 << 20);
                let (sector, count) = match self.random.below(4) {
                    0 => (self.random.below(self.sectors), beyond),
                    1 => (beyond, self.random.below(8)),
                    2 => (u64::MAX, u64::MAX),
                    _ => (self.sectors / 2, u64::MAX - self.sectors / 2 + 1),
                };
                fields.sector = sector;
                fields.set_nr_sectors(count);
                (fields, Expect::Refused)
            }
        }
    }
}
