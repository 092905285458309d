//! Keeps records of requests in flight for this process's successor: one file per ring.

use crate::ring::Inflight;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use ring_proto::{RequestConsumer, SharedMemory};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tracing::{info, warn};
use xen_platform::Mapping;

/// Write permission for others, who could then make us repeat writes of their choice.
const OTHERS_WRITE: u32 = 0o022;
/// The start of the path of every backend directory.
const ROOT: &str = "/local/domain/";

/// A directory of records. It should be on a tmpfs, because each request is written there.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
}

/// A ring, as far as records are concerned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingName<'a> {
    /// The device's backend directory.
    pub(crate) backend: &'a str,
    /// Its number.
    pub(crate) ring: usize,
    /// Distinguishes this ring from all others, including those of other connections of the same device.
    pub(crate) identity: &'a str,
}

impl Records {
    /// Uses `dir`, and creates it if need be.
    ///
    /// # Errors
    /// If that fails, or others could write there.
    pub fn open(dir: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let found = std::fs::metadata(dir)?;
        let ours = found.uid() == nix::unistd::geteuid().as_raw();
        if !ours || found.mode() & OTHERS_WRITE != 0 {
            let reason = "others may write there: it must be ours, and of mode 0755 at the most";
            return Err(io::Error::other(reason));
        }
        Ok(Self { dir: dir.to_owned() })
    }

    /// The requests in flight on a ring that a predecessor served, according to its record.
    pub(crate) fn take_up(
        &self,
        name: RingName<'_>,
        requests: &mut RequestConsumer,
    ) -> Option<Inflight> {
        let ring = name.ring;
        let found = open(OpenOptions::new().read(true).write(true), &self.file(name))
            .and_then(|file| map(&file));
        match found {
            Ok(memory) => match Inflight::recover(memory, requests, name.identity) {
                Ok(inflight) => {
                    info!(
                        ring,
                        open = inflight.waiting(),
                        "going on where the last backend stopped"
                    );
                    return Some(inflight);
                }
                Err(misfit) => warn!(ring, %misfit, "the record of what is in flight does not fit"),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => warn!(ring, %error, "cannot read the record of what is in flight"),
        }
        None
    }

    /// A new record, which replaces any other of this ring.
    pub(crate) fn begin(&self, name: RingName<'_>, requests: &RequestConsumer) -> Option<Inflight> {
        let bytes = Inflight::bytes(requests.slots());
        match self.create(&self.file(name), bytes) {
            Ok(memory) => Some(Inflight::create(memory, requests, name.identity)),
            Err(error) => {
                let ring = name.ring;
                warn!(ring, dir = ?self.dir, %error, "cannot keep a record of what is in flight");
                None
            }
        }
    }

    fn create(&self, path: &Path, bytes: usize) -> io::Result<Arc<dyn SharedMemory>> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = OpenOptions::new();
        let file = open(options.read(true).write(true).create_new(true).mode(0o600), path)?;
        // Reserve the space, not only the length: a full file system would kill us later by SIGBUS.
        let length = i64::try_from(bytes).map_err(io::Error::other)?;
        fallocate(&file, FallocateFlags::empty(), 0, length)?;
        map(&file)
    }

    /// Removes the records of a device that has no requests in flight.
    pub(crate) fn forget(&self, backend: &str) {
        let prefix = file_name(backend, "");
        for name in self.names().filter(|name| name.starts_with(&prefix)) {
            if let Err(error) = std::fs::remove_file(self.dir.join(&name)) {
                warn!(name, %error, "cannot remove a record");
            }
        }
    }

    /// Backend directories of devices that have records.
    pub(crate) fn devices(&self) -> impl Iterator<Item = String> + '_ {
        self.names().filter_map(|name| {
            let (device, _ring) = name.rsplit_once('.')?;
            Some(format!("{ROOT}{}", device.replace('-', "/")))
        })
    }

    fn names(&self) -> impl Iterator<Item = String> + '_ {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok())
    }

    fn file(&self, name: RingName<'_>) -> PathBuf {
        self.dir.join(file_name(name.backend, &name.ring.to_string()))
    }
}

fn file_name(backend: &str, ring: &str) -> String {
    let device = backend.strip_prefix(ROOT).unwrap_or(backend);
    format!("{}.{ring}", device.replace('/', "-"))
}

fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    options.custom_flags(OFlag::O_NOFOLLOW.bits()).open(path)
}

fn map(file: &File) -> io::Result<Arc<dyn SharedMemory>> {
    Ok(Arc::new(Mapping::whole(file.as_fd())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring_proto::abi::PAGE_SIZE;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let records = dir.path().join("a/b");
        let mode = |mode| std::fs::set_permissions(&records, PermissionsExt::from_mode(mode));
        Records::open(&records).expect("created");
        assert_eq!(records.metadata().expect("there").mode() & 0o777, 0o700);
        for (bits, accepted) in [(0o755, true), (0o775, false), (0o757, false), (0o700, true)] {
            mode(bits).expect("ours");
            assert_eq!(Records::open(&records).is_ok(), accepted, "{bits:o}");
        }
    }

    #[test]
    fn a_file_tells_its_device() {
        let dir = tempfile::tempdir().expect("a directory");
        let records = Records::open(dir.path()).expect("ours");
        let backend = "/local/domain/0/backend/vbd3/12/51712";
        let other = "/local/domain/0/backend/vbd3/1/51712";
        for (backend, ring) in [(backend, 0), (backend, 10), (other, 0)] {
            let name = RingName { backend, ring, identity: "" };
            records.create(&records.file(name), PAGE_SIZE).expect("created");
        }
        records.forget(other);
        assert_eq!(records.devices().collect::<Vec<_>>(), [backend; 2]);
        records.forget(backend);
        assert_eq!(records.devices().count(), 0);
    }
}
