//! What the backend writes before `Connected`.

use super::{Keys, Nodes, Refusal, Rule, bit, flag, node, number, number32};

/// The largest logical or physical sector size we accept, in bytes: no device sold has more than 4096,
/// and Linux's frontend takes no logical sector above a page.
pub const MAX_SECTOR_SIZE: u32 = 1 << 16;

/// The most 512-byte sectors whose size in bytes fits in an `off_t`.
const MAX_SECTORS: u64 = (i64::MAX / 512) as u64;

/// `VDISK_CDROM`, `VDISK_REMOVABLE` and `VDISK_READONLY` of blkif.h.
const INFO_CDROM: u32 = 1;
const INFO_REMOVABLE: u32 = 2;
const INFO_READ_ONLY: u32 = 4;

/// A device's discard properties.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Discard {
    /// Unit in which the device frees space, in bytes.
    pub granularity: u32,
    /// Offset of the first such unit, in bytes.
    pub alignment: u32,
    /// Whether the secure flag works.
    pub secure: bool,
}

/// The device as the backend describes it before `Connected`, and again when it is resized.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceProperties {
    /// Size in 512-byte sectors, whatever `sector_size` says (Linux, and blkif.h since 2024-09).
    pub sectors: u64,
    /// Smallest unit and alignment of I/O, in bytes. Only frontends that set
    /// `feature-large-sector-size` may get a value other than 512.
    pub sector_size: u32,
    /// Unit that the device can write without reading first, in bytes.
    pub physical_sector_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// A CD-ROM.
    pub cdrom: bool,
    /// Removable media.
    pub removable: bool,
    /// `FLUSH_DISKCACHE` works.
    pub flush: bool,
    /// `WRITE_BARRIER` works.
    pub barrier: bool,
    /// `DISCARD` works.
    pub discard: Option<Discard>,
}

impl DeviceProperties {
    /// The keys that [`Self::from_keys`] looks up.
    pub const KEYS: &'static [&'static str] = &[
        "feature-flush-cache",
        "feature-barrier",
        "feature-discard",
        "discard-granularity",
        "discard-alignment",
        "discard-secure",
        "sectors",
        "info",
        "sector-size",
        "physical-sector-size",
    ];

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.sectors.saturating_mul(512)
    }

    /// The node to rewrite when the size has changed, before writing the same `state` again.
    pub fn resize_keys(&self) -> Nodes {
        vec![node("sectors", self.sectors)]
    }

    /// What the backend writes before `Connected`, in one transaction, in Linux's order (`connect` in
    /// xen-blkback/xenbus.c).
    pub fn to_keys(&self) -> Nodes {
        let mut nodes = vec![node("feature-flush-cache", bit(self.flush))];
        if let Some(discard) = self.discard {
            nodes.push(node("discard-granularity", discard.granularity));
            nodes.push(node("discard-alignment", discard.alignment));
            nodes.push(node("discard-secure", bit(discard.secure)));
        }
        let info = if self.cdrom { INFO_CDROM } else { 0 }
            | if self.removable { INFO_REMOVABLE } else { 0 }
            | if self.read_only { INFO_READ_ONLY } else { 0 };
        nodes.extend([
            node("feature-discard", bit(self.discard.is_some())),
            node("feature-barrier", bit(self.barrier)),
            node("sectors", self.sectors),
            node("info", info),
            node("sector-size", self.sector_size),
            node("physical-sector-size", self.physical_sector_size),
        ]);
        nodes
    }

    /// Reads what a backend says about its device. Only `sectors` is required; the rest has blkif.h's
    /// defaults.
    ///
    /// # Errors
    /// Malformed numbers, sizes beyond `off_t`, sector sizes that are not powers of two from 512 to
    /// [`MAX_SECTOR_SIZE`].
    pub fn from_keys(keys: &Keys<'_>) -> Result<Self, Refusal> {
        let sectors = number(keys, "sectors", MAX_SECTORS)?
            .ok_or_else(|| Refusal::new("sectors", None, Rule::Missing))?;
        let info = number32(keys, "info")?.unwrap_or(0);
        let sector_size = sector_size(keys, "sector-size", 512)?;
        let discard = if flag(keys, "feature-discard")? {
            Some(Discard {
                granularity: number32(keys, "discard-granularity")?
                    .filter(|granularity| *granularity != 0)
                    .unwrap_or(sector_size),
                alignment: number32(keys, "discard-alignment")?.unwrap_or(0),
                secure: flag(keys, "discard-secure")?,
            })
        } else {
            None
        };
        Ok(Self {
            sectors,
            sector_size,
            physical_sector_size: self::sector_size(keys, "physical-sector-size", sector_size)?
                .max(sector_size),
            read_only: info & INFO_READ_ONLY != 0,
            cdrom: info & INFO_CDROM != 0,
            removable: info & INFO_REMOVABLE != 0,
            flush: flag(keys, "feature-flush-cache")?,
            barrier: flag(keys, "feature-barrier")?,
            discard,
        })
    }
}

fn sector_size(keys: &Keys<'_>, key: &str, default: u32) -> Result<u32, Refusal> {
    let Some(size) = number32(keys, key)? else { return Ok(default) };
    let refuse = |rule| Err(Refusal::new(key, Some(size.to_string().as_bytes()), rule));
    match size {
        ..512 => refuse(Rule::Below(512)),
        _ if size > MAX_SECTOR_SIZE => refuse(Rule::Above(MAX_SECTOR_SIZE.into())),
        _ if !size.is_power_of_two() => refuse(Rule::NotPowerOfTwo),
        _ => Ok(size),
    }
}
