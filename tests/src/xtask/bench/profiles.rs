//! What can be measured, by name. Every contender that takes a case is measured on it.

use super::case::{BASE, Case, Data, Disk, Job, Layout, Wait};

/// A set of cases.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(super) enum Profile {
    /// What the pair has to reach, beside limits and peers
    Goals,
    /// Null disk and cached file at depth 1, 8, 32 and 128, reads and writes
    Depths,
    /// How both ends wait, at depth 1 and 32
    Waits,
    /// 1, 2, 4 and 8 rings
    Rings,
    /// 1 to 8 devices at once
    Devices,
    /// Union and split rings at every depth
    Layouts,
    /// Persistent grants, grant copy, mapping a request; a cached file's reads and writes
    Data,
    /// O_DIRECT file and block device
    File,
    /// 128 KiB sequential reads
    Sequential,
    /// The IOmeter file-server mix
    Iometer,
    /// Memory and wake-ups of idle devices
    Idle,
    /// All of these
    All,
}

const DEPTHS: [u32; 4] = [1, 8, 32, 128];
const COUNTS: [u32; 4] = [1, 2, 4, 8];
const WAITS: [Wait; 3] = [Wait::Poll, Wait::Adaptive, Wait::Event];
/// Depth of the IOmeter job: its "moderate" load.
const IOMETER_DEPTH: u32 = 64;
/// Depth of the sequential job: a megabyte in flight.
const SEQUENTIAL_DEPTH: u32 = 8;

const CACHED: Case = Case { disk: Disk::CachedFile, ..BASE };
/// Null, depth 32, each end as it would be on a machine that has other work to do.
pub(super) const SHARED: Case = BASE.waiting(Wait::Adaptive);
/// The client sleeps, the backend need not.
pub(super) const SLEEPING_CLIENT: Case =
    Case { client: Wait::Event, backend: Wait::Adaptive, ..BASE };
pub(super) const COPIED: Case = Case { data: Data::Copy, ..CACHED };

pub(super) const fn at_depth(case: Case, depth: u32) -> Case {
    Case { depth, ..case }
}

pub(super) const fn on(disk: Disk) -> Case {
    Case { disk, ..BASE }
}

pub(super) const fn iometer(wait: Wait) -> Case {
    Case { job: Job::Iometer, depth: IOMETER_DEPTH, ..CACHED }.waiting(wait)
}

pub(super) const fn rings(rings: u32) -> Case {
    Case { rings, ..SHARED }
}

pub(super) const fn devices(devices: u32) -> Case {
    Case { devices, ..SHARED }
}

impl Profile {
    /// Its cases, each once.
    pub(super) fn cases(self) -> Vec<Case> {
        let mut cases = Vec::new();
        self.collect(&mut |case| {
            if !cases.contains(&case) {
                cases.push(case);
            }
        });
        cases
    }

    fn collect(self, add: &mut dyn FnMut(Case)) {
        match self {
            Self::Goals => {
                for depth in [32, 1] {
                    WAITS.iter().for_each(|&wait| add(at_depth(BASE, depth).waiting(wait)));
                }
                add(SLEEPING_CLIENT);
                add(at_depth(SLEEPING_CLIENT, 1));
                for disk in [Disk::CachedFile, Disk::DirectFile, Disk::BlockDevice] {
                    add(on(disk));
                    add(on(disk).waiting(Wait::Adaptive));
                }
                add(iometer(Wait::Poll));
                add(iometer(Wait::Adaptive));
                add(COPIED);
                for count in COUNTS {
                    add(rings(count));
                    add(devices(count));
                }
            }
            Self::Depths => {
                for disk in [Disk::Null, Disk::CachedFile] {
                    for job in [Job::RandomRead, Job::RandomWrite] {
                        for depth in DEPTHS {
                            add(Case { job, depth, ..on(disk) });
                        }
                    }
                }
            }
            Self::Waits => {
                for depth in [1, 32] {
                    for client in WAITS {
                        for backend in WAITS {
                            add(Case { depth, client, backend, ..BASE });
                        }
                    }
                }
                for wait in WAITS {
                    add(CACHED.waiting(wait));
                }
            }
            Self::Rings => COUNTS.iter().for_each(|&count| add(rings(count))),
            Self::Devices => COUNTS.iter().for_each(|&count| add(devices(count))),
            Self::Layouts => {
                for layout in [Layout::Union, Layout::Split] {
                    for depth in DEPTHS {
                        add(Case { layout, depth, ..BASE });
                    }
                }
            }
            Self::Data => {
                for job in [Job::RandomRead, Job::RandomWrite] {
                    for data in [Data::Persistent, Data::Copy, Data::Map] {
                        add(Case { job, data, ..CACHED });
                    }
                    for disk in [Disk::DirectFile, Disk::BlockDevice] {
                        for data in [Data::Persistent, Data::Bounced] {
                            add(Case { job, data, ..on(disk) });
                        }
                    }
                    // A file's writes may need the CPU that a backend polls on.
                    for wait in [Wait::Adaptive, Wait::Event] {
                        add(Case { job, ..CACHED }.waiting(wait));
                    }
                }
            }
            Self::File => {
                for disk in [Disk::DirectFile, Disk::BlockDevice] {
                    for job in [Job::RandomRead, Job::RandomWrite] {
                        for depth in DEPTHS {
                            add(Case { job, depth, ..on(disk) }.waiting(Wait::Adaptive));
                        }
                    }
                }
            }
            Self::Sequential => {
                for disk in [Disk::Null, Disk::CachedFile, Disk::DirectFile, Disk::BlockDevice] {
                    let job = Job::SequentialRead;
                    for wait in [Wait::Poll, Wait::Adaptive] {
                        add(Case { job, depth: SEQUENTIAL_DEPTH, ..on(disk) }.waiting(wait));
                    }
                }
            }
            Self::Iometer => {
                for wait in WAITS {
                    add(Case { disk: Disk::Null, ..iometer(wait) });
                    add(iometer(wait));
                    add(Case { disk: Disk::DirectFile, ..iometer(wait) });
                }
            }
            Self::Idle => {}
            Self::All => {
                for profile in [
                    Self::Goals,
                    Self::Depths,
                    Self::Waits,
                    Self::Rings,
                    Self::Devices,
                    Self::Layouts,
                    Self::Data,
                    Self::File,
                    Self::Sequential,
                    Self::Iometer,
                ] {
                    profile.collect(add);
                }
            }
        }
    }
}
