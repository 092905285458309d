//! Block devices, where loop devices can be made.

use crate::model;
use crate::rig::{DEPTH, Rig, SECTOR, TestFile, parse, skip};
use blkback::storage::{Completion, Direct, OpKind, OpenError, Options, Storage, open};
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;
use xenstore_glue::disk::Target;

/// A loop device on a file.
struct Loop {
    device: PathBuf,
    _file: TestFile,
}

impl Loop {
    /// `None` where that is impossible and may be skipped.
    fn new(bytes: u64, sector_size: &str) -> Option<Self> {
        Self::on(TestFile::on_disk(bytes), sector_size)
    }

    fn on(file: TestFile, sector_size: &str) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", sector_size])
            .arg(&file.0)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let device = String::from_utf8_lossy(&output.stdout).trim().into();
                Some(Self { device, _file: file })
            }
            other => {
                skip(&format!("no loop device: {other:?}"));
                None
            }
        }
    }

    fn target(&self) -> Target {
        parse(&self.device.display().to_string())
    }

    /// The path of one of its attributes.
    fn attribute(&self, name: &str) -> PathBuf {
        Path::new("/sys/block").join(self.device.file_name().expect("a name")).join(name)
    }

    /// Flushes that reached the device: field 16 of its statistics.
    fn flushes(&self) -> u64 {
        let stat = std::fs::read_to_string(self.attribute("stat")).expect("statistics");
        stat.split_whitespace().nth(15).and_then(|field| field.parse().ok()).expect("field 16")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

/// Removes what an earlier run left on a disk.
fn clear(storage: &Arc<dyn Storage>) {
    let bytes = model::DISK as u64;
    let discard = OpKind::Discard { bytes, secure: false };
    Rig::on(storage.clone(), true).run(discard, 0, Vec::new()).expect("discard");
}

#[test]
fn model_on_a_device() {
    let Some(device) = Loop::new(model::DISK as u64, "512") else { return };
    for (direct, seed) in [(Direct::On, 10), (Direct::Off, 11)] {
        let options = Options { direct, ..Options::default() };
        let storage = open(&device.target(), options).expect("open");
        clear(&storage);
        model::check(storage, true, seed);
    }
}

#[test]
fn sectors_of_4096_bytes() {
    let Some(device) = Loop::new(model::DISK as u64, "4096") else { return };
    // Most frontends can do nothing with such sectors: they get the page cache, unless O_DIRECT is demanded.
    for (direct, expected, seed) in [(Direct::Auto, (512, 1), 12), (Direct::On, (4096, 4096), 13)] {
        let storage = open(&device.target(), Options { direct, ..Options::default() });
        let storage = storage.expect("open");
        let geometry = storage.geometry();
        assert_eq!((geometry.sector_size, geometry.buffer_alignment), expected);
        assert_eq!(geometry.physical_sector_size, 4096);
        assert_eq!(geometry.sectors as usize * SECTOR, model::DISK);
        clear(&storage);
        model::check_above(4096, storage, true, seed);
    }
    // Another host would not see what is in our page cache.
    let shared = open(&device.target(), Options { shared: true, ..Options::default() });
    assert_eq!(shared.expect("open").geometry().sector_size, 4096);
}

/// A mounted file system, unmounted when this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    /// Mounts with these arguments of `mount`, followed by the directory. `None` where that is impossible and
    /// may be skipped.
    fn new(arguments: &[&str]) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("mounted-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir(&directory).expect("a directory");
        let mounted = Command::new("mount").args(arguments).arg(&directory).status();
        let mounted = mounted.is_ok_and(|status| status.success());
        let this = Self(directory);
        if !mounted {
            skip("nothing can be mounted");
        }
        mounted.then_some(this)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy", "--quiet"]).arg(&self.0).status();
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// O_DIRECT needs the sectors of the device below the file system, whatever can be read of a hole.
#[test]
fn a_sparse_file_on_sectors_of_4096_bytes() {
    let Some(device) = Loop::new(64 << 20, "4096") else { return };
    let made = Command::new("mkfs.ext4").arg("-q").arg(&device.device).status().expect("mkfs");
    assert!(made.success());
    let Some(mounted) = Mounted::new(&[&device.device.display().to_string()]) else { return };
    let file = TestFile::new(&mounted.0, 1 << 20);
    let check = || {
        [Direct::Auto, Direct::On].map(|direct| {
            let storage = open(&file.target(), Options { direct, ..Options::default() });
            let geometry = storage.expect("open").geometry();
            (geometry.sector_size, geometry.buffer_alignment)
        })
    };
    // Through the page cache, or in larger sectors.
    assert_eq!(check(), [(512, 1), (4096, 4096)]);
    let end = File::options().write(true).open(&file.0).expect("open");
    end.write_all_at(&[1; SECTOR], 1 << 19).expect("write");
    assert_eq!(check(), [(512, 1), (4096, 4096)]);
}

#[test]
fn a_device_is_shared_by_those_who_say_so() {
    let Some(device) = Loop::new(1 << 20, "512") else { return };
    let options = Options { shared: true, ..Options::default() };
    let mut rigs = [0, 1].map(|_| Rig::new(&device.target(), options));
    rigs[0].write(0, &[7; SECTOR]).expect("write");
    assert_eq!(rigs[1].read(0, SECTOR).expect("read"), [7; SECTOR]);
}

/// The kernel reports once to each open file that it could not write back, and the report may still be on its
/// way to the queue that asked first.
#[test]
fn every_queue_hears_of_data_that_was_lost() {
    // Too small for what is written.
    let Some(small) = Mounted::new(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"]) else { return };
    let Some(device) = Loop::on(TestFile::new(&small.0, 16 << 20), "512") else { return };
    let options = Options { direct: Direct::Off, ..Options::default() };
    let storage = open(&device.target(), options).expect("open");
    let (mut first, mut second) = (Rig::on(storage.clone(), true), Rig::on(storage, true));
    second.run(OpKind::Flush, 0, Vec::new()).expect("nothing is lost yet");
    for piece in 0..8 {
        first.write(piece << 20, &vec![1; 1 << 20]).expect("there is room in the page cache");
    }
    for tag in 0..DEPTH as u16 {
        first.submit(tag, OpKind::Flush, 0, Vec::new());
    }
    first.queue().wait(Some(Duration::ZERO)).expect("begin it");
    // By now it has failed, and nobody has looked.
    std::thread::sleep(Duration::from_millis(500));
    assert!(second.run(OpKind::Flush, 0, Vec::new()).is_err(), "flushed what is lost");
    let flushes = first.finish();
    assert!(flushes.len() == DEPTH && flushes.iter().all(|flush| flush.result.is_err()));
    // Linux's frontend does not tell its guest of a failed flush.
    assert!(second.write(0, &[1; SECTOR]).is_err(), "wrote to a disk that has lost data");
    second.read(0, SECTOR).expect("what is left can be read");
}

#[test]
fn a_flush_reaches_the_device() {
    let Some(device) = Loop::new(1 << 20, "512") else { return };
    let mut rig = Rig::new(&device.target(), Options::default());
    rig.write(0, &[1; SECTOR]).expect("write");
    let before = device.flushes();
    rig.run(OpKind::Flush, 0, Vec::new()).expect("flush");
    assert!(device.flushes() > before, "a flush is passed on");
}

/// Of two concurrent flushes, the kernel tells only one that data was lost.
#[test]
fn flushes_of_a_queue_are_not_under_way_at_once() {
    let Some(device) = Loop::new(1 << 20, "512") else { return };
    let mut rig = Rig::new(&device.target(), Options::default());
    let before = device.flushes();
    for tag in 0..DEPTH as u16 {
        rig.submit(tag, OpKind::Flush, 0, Vec::new());
    }
    let done = rig.finish();
    assert!(done.len() == DEPTH && done.iter().all(|flush| flush.result.is_ok()), "{done:?}");
    assert_eq!(device.flushes() - before, 2, "one, and one for all that came meanwhile");
}

/// A transfer longer than the device takes as one request is not left to the kernel to split: that takes a
/// worker thread.
#[test]
fn long_requests_are_split_without_the_help_of_worker_threads() {
    const BYTES: usize = 200 << 10;
    let Some(device) = Loop::new(1 << 20, "512") else { return };
    std::fs::write(device.attribute("queue/max_sectors_kb"), "60").expect("lower the limit");
    let data: Vec<u8> = (0..BYTES).map(|n| (n / 251) as u8).collect();
    for register in [false, true] {
        let storage = open(&device.target(), Options::default()).expect("open");
        let mut rig = Rig::on(storage, register);
        rig.write(512, &data).expect("write");
        let pieces = (0..BYTES / 4096).map(|n| rig.piece(1, 2 * n * 4096, 4096)).collect();
        rig.run(OpKind::Read, 512, pieces).expect("read");
        let read = (0..BYTES / 4096).flat_map(|n| rig.bytes_at(1, 2 * n * 4096, 4096));
        assert!(read.eq(data.iter().copied()), "what was written is not what was read");
        assert!(rig.read(512, BYTES).expect("read") == data);
        let whole = rig.piece(2, 0, BYTES);
        rig.submit(2, OpKind::Read, 512, vec![whole]);
        let (done, dues) = rig.finish_among_others();
        assert!(
            matches!(done[..], [Completion { result: Ok(()), .. }]) && rig.bytes(2, BYTES) == data
        );
        assert!(dues > 0, "nobody signals that another part is to be sent");
        let helper = format!("iou-wrk-{}", nix::unistd::gettid());
        for task in std::fs::read_dir("/proc/self/task").expect("threads") {
            let name = task.and_then(|task| std::fs::read_to_string(task.path().join("comm")));
            assert_ne!(name.unwrap_or_default().trim_end(), helper, "registered: {register}");
        }
    }
}

/// A daemon that was killed holds its devices until its last request has landed.
#[test]
fn a_device_that_is_about_to_be_free_is_waited_for() {
    let Some(device) = Loop::new(1 << 20, "512") else { return };
    let mut exclusive = File::options();
    exclusive.read(true).write(true).custom_flags(libc::O_EXCL);
    let held = exclusive.open(&device.device).expect("open");
    let storage = std::thread::scope(|scope| {
        let waits = scope.spawn(|| open(&device.target(), Options::default()));
        std::thread::sleep(Duration::from_millis(200));
        assert!(!waits.is_finished(), "it does not wait");
        drop(held);
        waits.join().expect("no panic")
    });
    assert!(storage.is_ok());
}

#[test]
fn a_device_is_one_writers_or_many_readers() {
    let Some(device) = Loop::new(1 << 20, "512") else { return };
    let mut first = Rig::new(&device.target(), Options::default());
    first.write(0, &[7; SECTOR]).expect("write");
    let refused = |options| {
        let outcome = open(&device.target(), options);
        matches!(outcome, Err(OpenError::Busy { path, .. }) if path == device.device)
    };
    let read_only = Options { read_only: true, ..Options::default() };
    assert!(refused(Options::default()), "written by two");
    assert!(refused(read_only), "read while it is written");
    let shared = Options { shared: true, ..read_only };
    drop(open(&device.target(), shared).expect("shared on purpose"));
    // With the last user gone it is free at once.
    drop(first);
    let mut reader = Rig::new(&device.target(), read_only);
    assert_eq!(reader.read(0, SECTOR).expect("read"), [7; SECTOR]);
    let error = reader.write(0, &[8; SECTOR]).expect_err("it is read-only");
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    drop(open(&device.target(), read_only).expect("read twice"));
    assert!(refused(Options::default()), "written while it is read");
    drop(reader);
    open(&device.target(), Options::default()).expect("open again");
}
