//! What a ring's thread does while its disk is busy.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};
use xen_blk_tests::process::{HUNG, Process, run, wait_until};

/// A small ext4 of its own, which can be frozen: the kernel's threads that write to it wait.
struct FileSystem(PathBuf);

impl FileSystem {
    /// `None`, and says so, where nothing can be mounted.
    fn new(dir: &Path) -> Result<Option<Self>> {
        let (image, mountpoint) = (dir.join("ext4.img"), dir.join("ext4"));
        File::create(&image)?.set_len(64 << 20)?;
        std::fs::create_dir(&mountpoint)?;
        run(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
        let mut mount = Command::new("mount");
        match run(mount.args(["-o", "loop"]).args([&image, &mountpoint])) {
            Ok(_) => Ok(Some(Self(mountpoint))),
            Err(error) => {
                eprintln!("skipped: {error:#}");
                Ok(None)
            }
        }
    }

    fn freeze(&self) -> Result<Frozen<'_>> {
        run(Command::new("fsfreeze").arg("--freeze").arg(&self.0))?;
        Ok(Frozen(self))
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Until this is dropped. Before the processes that use it: they cannot even be killed.
struct Frozen<'a>(&'a FileSystem);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.0.0).status();
    }
}

/// Hundredths of a second that a process has had of the CPUs.
fn cpu_time(process: &Process) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid()))?;
    let behind_name = stat.rsplit(')').next().context("a name")?;
    // utime and stime, fields 14 and 15.
    behind_name.split_whitespace().skip(11).take(2).map(|field| Ok(field.parse::<u64>()?)).sum()
}

/// A write to the page cache is done by a thread of the kernel, which may want the CPU that ours spins on.
#[test]
fn nobody_spins_while_a_thread_of_the_kernel_writes() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    let Some(files) = FileSystem::new(host.dir())? else { return Ok(()) };
    let image = files.0.join("disk.img");
    File::create(&image)?.set_len(16 << 20)?;
    // For longer than is looked at, if it spins.
    let spin = ["--wait", "adaptive", "--spin-us", "20000000", "--direct", "off"];
    let mut backend = host.backend(&spin)?;
    host.create_domain("guest", &[])?;
    let image = image.display();
    host.attach(
        "guest",
        &format!("vdev=xvda,format=raw,backendtype=tap,backend={DRIVER_DOMAIN},target={image}"),
    )?;
    let mut writes = host.frontend("guest", "bench");
    writes.args(["xvda", "--rw=randwrite", "--bs=4k", "--size=16m", "--iodepth=4"]);
    // Ends later than the frost, whatever happens.
    let mut load;
    let frozen = files.freeze()?;
    load = Process::start("load", host.dir(), &writes)?;
    wait_until("writes are in flight", || {
        let stats = host.stats()?;
        Ok(stats["devices"][0]["total"]["wr_req"].as_u64().unwrap_or(0) == 4)
    })?;
    let before = cpu_time(&backend)?;
    std::thread::sleep(Duration::from_secs(1));
    let used = cpu_time(&backend)? - before;
    ensure!(used < 50, "{used} hundredths of a second's CPU in one second of waiting");
    drop(frozen);
    let status = load.wait(HUNG)?;
    ensure!(status.success(), "{}", load.describe());
    ensure!(backend.terminate()?.success(), "{}", backend.log());
    Ok(())
}
