//! The device files, and what to do if one is missing.

use crate::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

/// A device that Linux offers to user space on Xen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Device {
    /// Maps and copies what others granted.
    Gntdev,
    /// Grants memory to others.
    Gntalloc,
    /// Event channels.
    Evtchn,
    /// Xenstore, in a domain where xenstored does not run.
    Xenbus,
}

impl Device {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Gntdev, Self::Gntalloc, Self::Evtchn, Self::Xenbus];

    /// Its file.
    pub fn path(self) -> &'static str {
        match self {
            Self::Gntdev => "/dev/xen/gntdev",
            Self::Gntalloc => "/dev/xen/gntalloc",
            Self::Evtchn => "/dev/xen/evtchn",
            Self::Xenbus => "/dev/xen/xenbus",
        }
    }

    /// The kernel module that makes it, unless every kernel that runs on Xen has it built in.
    pub fn module(self) -> Option<&'static str> {
        match self {
            Self::Gntdev => Some("xen-gntdev"),
            Self::Gntalloc => Some("xen-gntalloc"),
            Self::Evtchn => Some("xen-evtchn"),
            Self::Xenbus => None,
        }
    }

    /// Opens it for reading and writing, without blocking.
    ///
    /// # Errors
    /// [`Error::Device`], which says what to do.
    pub fn open(self) -> Result<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(self.path())
            .map_err(|source| Error::Device {
                path: self.path(),
                remedy: self.remedy(&source),
                source,
            })
    }

    fn remedy(self, error: &io::Error) -> String {
        let path = self.path();
        if error.kind() == io::ErrorKind::PermissionDenied {
            return format!("run as root, or let this user read and write {path} by a udev rule");
        }
        if !super::is_xen() {
            return "this machine does not run on Xen, or its kernel does not know".to_owned();
        }
        match self.module() {
            Some(module) => format!("load the kernel module: modprobe {module}"),
            None => "it belongs to CONFIG_XEN_XENBUS_FRONTEND of the kernel".to_owned(),
        }
    }
}
