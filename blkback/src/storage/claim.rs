//! Which block devices the disks of this process use.
//!
//! O_EXCL makes the kernel refuse a device that is mounted, or that somebody else has opened so. It does not
//! keep a reader from a device that another disk writes to, whose content would change under its guest. A
//! file's lock does; a lock on a device would stop udev, which takes it whenever the device changes.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How disks use a device.
#[derive(Clone, Copy)]
enum Users {
    Readers(usize),
    Writer,
}

/// By device number.
static USERS: Mutex<BTreeMap<u64, Users>> = Mutex::new(BTreeMap::new());

/// A device for one disk that writes, or for several that only read.
pub(super) struct Claim(u64);

impl Claim {
    /// `None` while another disk has the device otherwise.
    pub(super) fn new(device: u64, read_only: bool) -> Option<Self> {
        match (users().entry(device), read_only) {
            (Entry::Vacant(free), true) => drop(free.insert(Users::Readers(1))),
            (Entry::Vacant(free), false) => drop(free.insert(Users::Writer)),
            (Entry::Occupied(mut taken), true) => match taken.get_mut() {
                Users::Readers(count) => *count += 1,
                Users::Writer => return None,
            },
            (Entry::Occupied(_), false) => return None,
        }
        Some(Self(device))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut users = users();
        match users.get_mut(&self.0) {
            Some(Users::Readers(count)) if *count > 1 => *count -= 1,
            _ => drop(users.remove(&self.0)),
        }
    }
}

fn users() -> MutexGuard<'static, BTreeMap<u64, Users>> {
    USERS.lock().unwrap_or_else(PoisonError::into_inner)
}
