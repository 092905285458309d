//! A real Xen host under QEMU: images made of Debian packages, a machine that boots them, and the
//! scenarios it runs. `docs/real-xen.md` tells how to use it.
//!
//! PV needs no virtualisation hardware, so an emulator is enough for hypervisor, dom0 and guests.

pub mod cpio;
pub mod debian;
pub mod image;
mod initramfs;
pub mod machine;
mod modules;
pub mod packages;
pub mod scenario;

/// A Debian release whose Xen and Linux make the host and its guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Debian 12: Xen 4.17, Linux 6.1.
    Bookworm,
    /// Debian 13: Xen 4.20, Linux 6.12.
    Trixie,
}

impl Suite {
    /// Debian's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }

    /// The version of Xen in its packages' names.
    pub fn xen(self) -> &'static str {
        match self {
            Self::Bookworm => "4.17",
            Self::Trixie => "4.20",
        }
    }
}
