//! A queue on a disk, with memory to read into and write from.

use blkback::storage::{Completion, IoVec, Op, OpKind, Options, Queue, QueueSetup, Storage, open};
use nix::poll::{PollFd, PollFlags, ppoll};
use ring_proto::SharedMemory;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use xen_platform::{EventFile, LocalRegion};
use xenstore_glue::disk::Target;

pub(crate) const SECTOR: usize = 512;
pub(crate) const DEPTH: usize = 8;
/// Memory of each tag.
pub(crate) const AREA: usize = 1 << 20;

/// Longer than anything here takes: a wait that lasts this long has hung.
pub(crate) const HUNG: Duration = Duration::from_secs(20);

pub(crate) struct Rig {
    // First, so that it is dropped before the memory that it may still be reading into.
    queue: Box<dyn Queue>,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) region: Arc<LocalRegion>,
    pub(crate) done: Vec<Completion>,
}

impl Rig {
    pub(crate) fn new(target: &Target, options: Options) -> Self {
        Self::on(open(target, options).expect("open"), true)
    }

    pub(crate) fn on(storage: Arc<dyn Storage>, register: bool) -> Self {
        Self::woken_by(storage, register, None, None)
    }

    pub(crate) fn woken_by(
        storage: Arc<dyn Storage>,
        register: bool,
        bell: Option<OwnedFd>,
        events: Option<EventFile>,
    ) -> Self {
        let region = Arc::new(LocalRegion::new(DEPTH * AREA / 4096).expect("reserve"));
        let registered = register.then(|| (region.clone(), region.len()));
        let setup = QueueSetup { depth: DEPTH, region: registered, bell, events };
        let queue = storage.open_queue(setup).expect("open a queue");
        Self { queue, storage, region, done: Vec::new() }
    }

    /// `len` bytes at `at` in the memory of `tag`.
    pub(crate) fn piece(&self, tag: u16, at: usize, len: usize) -> IoVec {
        assert!(at + len <= AREA);
        let base = self.region.base().as_ptr().wrapping_add(usize::from(tag) * AREA + at);
        // SAFETY: checked to lie in the region, which outlives the queue and is reached by address only.
        unsafe { IoVec::new(base, len) }
    }

    pub(crate) fn bytes(&self, tag: u16, len: usize) -> Vec<u8> {
        self.bytes_at(tag, 0, len)
    }

    pub(crate) fn bytes_at(&self, tag: u16, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.piece(tag, at, len).copy_to(&mut bytes);
        bytes
    }

    pub(crate) fn queue(&mut self) -> &mut dyn Queue {
        &mut *self.queue
    }

    pub(crate) fn submit(&mut self, tag: u16, kind: OpKind, offset: u64, buffers: Vec<IoVec>) {
        self.queue.submit(Op { tag, kind, offset, buffers: &buffers }, &mut self.done);
    }

    /// Runs everything in flight to its end.
    pub(crate) fn finish(&mut self) -> Vec<Completion> {
        let start = Instant::now();
        loop {
            self.queue.poll(&mut self.done).expect("poll");
            if self.queue.in_flight() == 0 {
                return std::mem::take(&mut self.done);
            }
            self.queue.wait(Some(HUNG)).expect("wait");
            assert!(start.elapsed() < HUNG, "{} operations hang", self.queue.in_flight());
        }
    }

    /// As [`Rig::finish`], on a thread that sleeps for other queues as well. Also returns how often the queue
    /// was due without being signalled.
    pub(crate) fn finish_among_others(&mut self) -> (Vec<Completion>, u32) {
        let mut dues = 0;
        let signals = self.queue.share(true).expect("share").expect("an eventfd");
        let signals = signals.try_clone_to_owned().expect("a descriptor");
        loop {
            self.queue.poll(&mut self.done).expect("poll");
            if self.queue.in_flight() == 0 {
                self.queue.share(false).expect("share no more");
                return (std::mem::take(&mut self.done), dues);
            }
            let due = self.queue.due();
            dues += u32::from(due.is_some());
            let left = due.map_or(HUNG, |due| due.saturating_duration_since(Instant::now()));
            let mut polled = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            let woken = ppoll(&mut polled, Some(left.into()), None).expect("wait");
            assert!(woken > 0 || due.is_some(), "{} operations hang", self.queue.in_flight());
            // Nothing can be read if the queue was only due.
            let _ = nix::unistd::read(&signals, &mut [0; 8]);
        }
    }

    pub(crate) fn run(&mut self, kind: OpKind, offset: u64, buffers: Vec<IoVec>) -> io::Result<()> {
        self.submit(0, kind, offset, buffers);
        let mut done = self.finish();
        assert_eq!(done.len(), 1);
        done.remove(0).result.map_err(io::Error::from_raw_os_error)
    }

    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) -> io::Result<()> {
        let piece = self.piece(0, 0, data.len());
        piece.fill(data);
        self.run(OpKind::Write, offset as u64, vec![piece])
    }

    pub(crate) fn read(&mut self, offset: usize, len: usize) -> io::Result<Vec<u8>> {
        let piece = self.piece(0, 0, len);
        self.run(OpKind::Read, offset as u64, vec![piece])?;
        Ok(self.bytes(0, len))
    }
}

/// Fails a test that cannot run here, or skips it where the environment allows that. Writes to stderr itself:
/// libtest captures macros' output.
pub(crate) fn skip(why: &str) {
    assert!(std::env::var_os("XEN_BLK_MAY_SKIP").is_some(), "{why} (XEN_BLK_MAY_SKIP=1 skips it)");
    writeln!(io::stderr(), "skipped: {why}").expect("write");
}

pub(crate) fn parse(target: &str) -> Target {
    target.parse().expect("a target")
}

/// A file that is removed with the value.
pub(crate) struct TestFile(pub(crate) PathBuf);

impl TestFile {
    pub(crate) fn new(directory: impl AsRef<Path>, bytes: u64) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("blkback-storage-{}-{count}", std::process::id());
        let path = directory.as_ref().join(name);
        std::fs::File::create(&path).and_then(|file| file.set_len(bytes)).expect("create");
        Self(path)
    }

    /// On a real disk, where O_DIRECT means something.
    pub(crate) fn on_disk(bytes: u64) -> Self {
        Self::new(env!("CARGO_TARGET_TMPDIR"), bytes)
    }

    pub(crate) fn target(&self) -> Target {
        parse(&self.0.display().to_string())
    }
}

impl Drop for TestFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}
