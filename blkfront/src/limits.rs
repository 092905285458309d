//! What a connection to a backend allows.

use crate::{Config, Op, Refusal};
use ring_proto::abi::SECTOR_SIZE;
use xenstore_glue::vbd::{Agreement, DeviceProperties};

/// How the backend makes writes durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FlushMode {
    /// Not at all: there is no volatile cache, or none it tells us of. As in Linux, flushes succeed.
    None,
    /// `FLUSH_DISKCACHE`.
    Cache,
    /// `WRITE_BARRIER`, which Linux also uses only where there is no `FLUSH_DISKCACHE`.
    Barrier,
}

/// What one connection to a backend allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Limits {
    /// Segments of a direct request.
    pub(crate) direct: u16,
    /// Segments of an indirect request; 0 for none.
    pub(crate) indirect: u16,
    pub(crate) flush: FlushMode,
    pub(crate) discard: bool,
    pub(crate) secure_discard: bool,
    pub(crate) read_only: bool,
    /// Bytes.
    pub(crate) sector_size: u32,
}

impl Default for Limits {
    /// Before the first connection.
    fn default() -> Self {
        Self {
            direct: 1,
            indirect: 0,
            flush: FlushMode::None,
            discard: false,
            secure_discard: false,
            read_only: false,
            sector_size: SECTOR_SIZE as u32,
        }
    }
}

impl Limits {
    pub(crate) fn new(config: &Config, agreed: &Agreement, device: &DeviceProperties) -> Self {
        Self {
            direct: agreed.layout.max_direct_segments() as u16,
            indirect: config.max_indirect_segments.min(agreed.max_indirect_segments),
            flush: match (device.flush, device.barrier) {
                (true, _) => FlushMode::Cache,
                (false, true) => FlushMode::Barrier,
                (false, false) => FlushMode::None,
            },
            discard: device.discard.is_some(),
            secure_discard: device.discard.is_some_and(|discard| discard.secure),
            read_only: device.read_only,
            sector_size: device.sector_size,
        }
    }

    pub(crate) fn segments(&self) -> u32 {
        u32::from(self.direct.max(self.indirect)).max(1)
    }

    pub(crate) fn may_discard(&self, secure: bool) -> bool {
        self.discard && (!secure || self.secure_discard)
    }

    /// Whether `op`, not a flush, on `len` bytes from `offset` may go to a device of `size` bytes.
    pub(crate) fn check(&self, op: Op, offset: u64, len: u64, size: u64) -> Result<(), Refusal> {
        if let Op::Discard { secure, .. } = op
            && !self.may_discard(secure)
        {
            return Err(Refusal::NotSupported);
        }
        if self.read_only && op != Op::Read {
            return Err(Refusal::ReadOnly);
        }
        let sector_size = self.sector_size;
        if len == 0 || (offset | len) & (u64::from(sector_size) - 1) != 0 {
            return Err(Refusal::Misaligned { offset, len, sector_size });
        }
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Refusal::PastEnd { offset, len, size });
        }
        Ok(())
    }
}
