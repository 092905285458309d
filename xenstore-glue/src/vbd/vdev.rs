//! Device numbers and names, xen-vbd-interface(7).

use std::fmt;
use std::str::FromStr;

/// A virtual device's number, as in `virtual-device` and the directory's name.
///
/// Displays as its name (`xvda1`), or in decimal if it has none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct VirtualDevice(u32);

/// A string does not name a virtual device.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{0:?} is no virtual device: use a name such as xvda, xvdb1, hda, sda or d0p1, or a number"
)]
pub struct VdevError(pub String);

/// Linux's block majors; the low 8 bits hold disk and partition.
const IDE0_MAJOR: u32 = 3;
const SCSI_MAJOR: u32 = 8;
const IDE1_MAJOR: u32 = 22;
const XVD_MAJOR: u32 = 202;
/// Marks numbers with 20 bits for the disk and 8 for the partition.
const EXTENDED: u32 = 1 << 28;
const MAX_EXTENDED_DISK: u32 = (1 << 20) - 1;
const MAX_EXTENDED_PARTITION: u32 = 255;
/// Numbers from here on are reserved.
const RESERVED: u32 = 2 << 28;

impl VirtualDevice {
    /// The number.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The device with this number, unless it is reserved.
    pub const fn from_number(number: u32) -> Option<Self> {
        if number < RESERVED { Some(Self(number)) } else { None }
    }

    /// Partition `partition` (0: the whole disk) of Xen virtual disk `disk`.
    pub const fn xvd(disk: u32, partition: u32) -> Option<Self> {
        if disk < 16 && partition < 16 {
            Some(Self(XVD_MAJOR << 8 | disk << 4 | partition))
        } else if disk <= MAX_EXTENDED_DISK && partition <= MAX_EXTENDED_PARTITION {
            Some(Self(EXTENDED | disk << 8 | partition))
        } else {
            None
        }
    }

    const fn sd(disk: u32, partition: u32) -> Option<Self> {
        if disk < 16 && partition < 16 {
            Some(Self(SCSI_MAJOR << 8 | disk << 4 | partition))
        } else {
            None
        }
    }

    const fn hd(disk: u32, partition: u32) -> Option<Self> {
        match disk {
            _ if partition > 63 => None,
            0 | 1 => Some(Self(IDE0_MAJOR << 8 | disk << 6 | partition)),
            2 | 3 => Some(Self(IDE1_MAJOR << 8 | (disk - 2) << 6 | partition)),
            _ => None,
        }
    }

    /// The name, if it parses back to the same number.
    fn name(self) -> Option<String> {
        let (low, disk) = (self.0 & 0xff, (self.0 & 0xff) >> 4);
        let (prefix, disk, partition) = match self.0 >> 8 {
            XVD_MAJOR => ("xvd", disk, low & 15),
            SCSI_MAJOR => ("sd", disk, low & 15),
            IDE0_MAJOR => ("hd", low >> 6, low & 63),
            IDE1_MAJOR => ("hd", (low >> 6) + 2, low & 63),
            _ if self.0 & EXTENDED != 0 => ("xvd", (self.0 & !EXTENDED) >> 8, low),
            _ => return None,
        };
        let mut name = format!("{prefix}{}", letters(disk));
        if partition != 0 {
            name.push_str(&partition.to_string());
        }
        (name.parse() == Ok(self)).then_some(name)
    }

    fn parse(text: &str) -> Option<Self> {
        if let Some(rest) = text.strip_prefix("xvd") {
            let (disk, partition) = lettered(rest)?;
            return Self::xvd(disk, partition);
        }
        if let Some(rest) = text.strip_prefix("sd") {
            let (disk, partition) = lettered(rest)?;
            return Self::sd(disk, partition);
        }
        if let Some(rest) = text.strip_prefix("hd") {
            let (disk, partition) = lettered(rest)?;
            return Self::hd(disk, partition);
        }
        if let Some(rest) = text.strip_prefix('d') {
            let (disk, partition) = rest.split_once('p').unwrap_or((rest, "0"));
            return Self::xvd(digits(disk, 10)?, digits(partition, 10)?);
        }
        // As strtoul does with base 0.
        let number = match text.strip_prefix("0x") {
            Some(hex) => digits(hex, 16)?,
            None if text.len() > 1 && text.starts_with('0') => digits(text, 8)?,
            None => digits(text, 10)?,
        };
        Self::from_number(number)
    }
}

impl FromStr for VirtualDevice {
    type Err = VdevError;

    fn from_str(text: &str) -> Result<Self, VdevError> {
        Self::parse(text).ok_or_else(|| VdevError(text.to_owned()))
    }
}

impl fmt::Display for VirtualDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(&name),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Only digits: `u32::from_str_radix` would take a sign.
fn digits(text: &str, radix: u32) -> Option<u32> {
    let plain = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain.then(|| u32::from_str_radix(text, radix).ok()).flatten()
}

/// Disk letters count a to z, aa, ab, …; the partition has no leading zero.
fn lettered(text: &str) -> Option<(u32, u32)> {
    let end = text.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(text.len());
    let (name, partition) = text.split_at(end);
    let count = name.bytes().try_fold(0u32, |count, letter| {
        count.checked_mul(26)?.checked_add(u32::from(letter - b'a') + 1)
    })?;
    let disk = count.checked_sub(1)?;
    match partition {
        "" => Some((disk, 0)),
        _ if partition.starts_with('0') => None,
        _ => Some((disk, digits(partition, 10)?)),
    }
}

fn letters(disk: u32) -> String {
    let mut name = Vec::new();
    let mut left = disk + 1;
    while left > 0 {
        left -= 1;
        name.push(char::from(b'a' + (left % 26) as u8));
        left /= 26;
    }
    name.iter().rev().collect()
}
