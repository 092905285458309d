//! What is asked of a contender: a disk, a job on it, and how both ends work.

use serde::Serialize;
use std::fmt;

/// What is behind the backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Disk {
    /// Nothing is read or written.
    Null,
    /// A file in the page cache.
    CachedFile,
    /// A file, past the page cache.
    DirectFile,
    /// A loop device on a file in the page cache, O_DIRECT: fast enough that the path to it counts.
    BlockDevice,
}

/// What the client does, in `fio`'s terms.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Job {
    /// 4 KiB random reads.
    RandomRead,
    /// 4 KiB random writes.
    RandomWrite,
    /// 128 KiB sequential reads.
    SequentialRead,
    /// The file server of Intel's IOmeter: 512 bytes to 64 KiB, 80 % reads.
    Iometer,
}

/// How an end waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Wait {
    /// Never sleeps.
    Poll,
    /// Spins while that pays, then sleeps.
    Adaptive,
    /// Sleeps at once.
    Event,
}

/// How requests and responses are laid out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Layout {
    /// The one ring of blkif.
    Union,
    /// A ring for requests and one for responses.
    Split,
}

/// How data passes between the domains.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Data {
    /// Grants stay mapped.
    Persistent,
    /// Grants stay mapped, and the backend copies between them and its buffers.
    Bounced,
    /// Grant copy.
    Copy,
    /// Mapped for each request.
    Map,
}

/// One row's conditions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Case {
    pub(super) disk: Disk,
    pub(super) job: Job,
    /// I/Os in flight on each ring.
    pub(super) depth: u32,
    /// Rings per device, each with a client thread of its own.
    pub(super) rings: u32,
    /// Devices at once, each with a client process of its own.
    pub(super) devices: u32,
    pub(super) client: Wait,
    pub(super) backend: Wait,
    pub(super) layout: Layout,
    pub(super) data: Data,
}

/// The case from which the others differ.
pub(super) const BASE: Case = Case {
    disk: Disk::Null,
    job: Job::RandomRead,
    depth: 32,
    rings: 1,
    devices: 1,
    client: Wait::Poll,
    backend: Wait::Poll,
    layout: Layout::Union,
    data: Data::Persistent,
};

impl Case {
    /// The same with both ends waiting so.
    pub(super) const fn waiting(self, wait: Wait) -> Self {
        Self { client: wait, backend: wait, ..self }
    }

    /// Whether what it costs is mostly in user space, and spent on one ring: more is nothing for callgrind.
    pub(super) fn is_countable(&self) -> bool {
        (self.disk, self.job) == (Disk::Null, Job::RandomRead)
            && (self.rings, self.devices) == (1, 1)
            && self.client == Wait::Poll
    }

    /// Whether it is one plain device, with nothing that only our rings have.
    pub(super) fn is_plain(&self) -> bool {
        self.devices == 1 && self.layout == Layout::Union && self.data == Data::Persistent
    }
}

impl Job {
    /// `fio`'s and `blkfront bench`'s options.
    pub(super) fn options(self) -> &'static [&'static str] {
        match self {
            Self::RandomRead => &["--rw=randread", "--bs=4k"],
            Self::RandomWrite => &["--rw=randwrite", "--bs=4k"],
            Self::SequentialRead => &["--rw=read", "--bs=128k"],
            Self::Iometer => &[
                "--rw=randrw",
                "--rwmixread=80",
                "--bssplit=512/10:1k/5:2k/5:4k/60:8k/2:16k/4:32k/4:64k/10",
            ],
        }
    }
}

impl Wait {
    /// The value of `--wait`.
    pub(super) fn option(self) -> &'static str {
        match self {
            Self::Poll => "poll",
            Self::Adaptive => "adaptive",
            Self::Event => "event",
        }
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "null",
            Self::CachedFile => "cached file",
            Self::DirectFile => "O_DIRECT file",
            Self::BlockDevice => "block device",
        })
    }
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RandomRead => "4 KiB random read",
            Self::RandomWrite => "4 KiB random write",
            Self::SequentialRead => "128 KiB sequential read",
            Self::Iometer => "IOmeter mix",
        })
    }
}

/// Depth and waits, and whatever else differs from [`BASE`], disk and job aside.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "depth {}, {}", self.depth, self.client.option())?;
        if self.client != self.backend {
            write!(f, " (backend {})", self.backend.option())?;
        }
        if self.rings != BASE.rings {
            write!(f, ", {} rings", self.rings)?;
        }
        if self.devices != BASE.devices {
            write!(f, ", {} devices", self.devices)?;
        }
        if self.layout == Layout::Split {
            write!(f, ", split")?;
        }
        match self.data {
            Data::Persistent => Ok(()),
            Data::Bounced => write!(f, ", bounced"),
            Data::Copy => write!(f, ", copy"),
            Data::Map => write!(f, ", map"),
        }
    }
}
