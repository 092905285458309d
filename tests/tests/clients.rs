//! The whole path under programs that we did not write, which speak NBD to `blkfront nbd` and so go
//! through two rings to `blkback` and to a file.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};
use xen_blk_tests::process::{Process, run, wait_until};

const MIB: u64 = 1 << 20;
/// Block sizes of fio's iometer-file-access-server job.
const IOMETER_SIZES: [&str; 8] = ["512", "1k", "2k", "4k", "8k", "16k", "32k", "64k"];

/// A guest of four vCPUs with a file for a disk, exported over NBD.
struct Exported {
    nbd: Process,
    _backend: Process,
    host: Host,
    file: PathBuf,
    uri: String,
}

impl Exported {
    fn new(bytes: u64, disk_options: &str, nbd_options: &[&str]) -> Result<Self> {
        let host = Host::start(Programs::beside_us()?)?;
        host.create_domain("guest", &["--vcpus", "4"])?;
        let backend = host.backend(&["--max-queues", "2", "--resize-interval-s", "1"])?;
        let file = host.dir().join("disk.raw");
        File::create(&file)?.set_len(bytes)?;
        host.attach(
            "guest",
            &format!(
                "vdev=xvda,format=raw,{disk_options},backendtype=tap,backend={DRIVER_DOMAIN},target={}",
                file.display()
            ),
        )?;
        let (nbd, uri) = host.export("guest", &[&["--vcpus", "4"], nbd_options].concat())?;
        Ok(Self { nbd, _backend: backend, host, file, uri })
    }

    /// Runs fio with verification. Two jobs, each on a half of the disk.
    fn fio(&self, options: &[&str]) -> Result<String> {
        run(Command::new("fio")
            .args(["--name=verify", "--ioengine=nbd", "--uri", &self.uri])
            .args([
                "--thread",
                "--iodepth=64",
                "--numjobs=2",
                "--offset_increment=50%",
                "--group_reporting",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_state_save=0",
            ])
            .args(options))
    }

    fn allocated(&self) -> Result<u64> {
        Ok(std::fs::metadata(&self.file)?.blocks() * 512)
    }
}

/// 32-bit frontends, and old ones that do not say what they are, which backends take for 32-bit ones.
#[test]
fn fio_verifies_other_abis() -> Result<()> {
    for (option, key) in [("x86_32-abi", Some("x86_32-abi")), ("none", None)] {
        let disk = Exported::new(16 * MIB, "access=rw", &["--protocol", option])?;
        let store = run(disk.host.xenstore("ls").args(["-f", "/local/domain"]))?;
        let said = store.lines().find_map(|line| line.split_once("/protocol = "));
        ensure!(said.map(|(_, name)| name.trim_matches('"')) == key, "{store}");
        disk.fio(&["--rw=randwrite", "--bsrange=512-256k", "--blockalign=512", "--size=8m"])
            .with_context(|| format!("protocol {option}"))?;
    }
    Ok(())
}

/// fio writes patterns in every block size of the IOmeter mix and reads them back, on every ring.
#[test]
fn fio_verifies_every_block_size() -> Result<()> {
    let disk = Exported::new(64 * MIB, "access=rw", &[])?;
    for size in IOMETER_SIZES {
        // Small blocks take their time; each size covers the rings many times over all the same.
        let bytes = if size.len() == 3 { "4m" } else { "16m" };
        disk.fio(&["--rw=randwrite", "--bs", size, "--size", bytes])
            .with_context(|| format!("block size {size}"))?;
    }
    let stats = disk.host.stats()?;
    let rings = stats["devices"][0]["rings"].as_array().context("rings")?;
    ensure!(rings.len() == 2, "two rings were asked for: {stats:#}");
    for ring in rings {
        let (reads, writes) = (ring["rd_req"].as_u64(), ring["wr_req"].as_u64());
        ensure!(reads > Some(0) && writes > Some(0), "a ring carried nothing: {stats:#}");
    }
    Ok(())
}

/// A file that grows is a disk that grows, for whoever looks next.
#[test]
fn resize_reaches_the_client() -> Result<()> {
    let disk = Exported::new(32 * MIB, "access=rw", &[])?;
    File::options().write(true).open(&disk.file)?.set_len(48 * MIB)?;
    wait_until("the client sees 48 MiB", || {
        let size = run(Command::new("nbdinfo").args(["--size", &disk.uri]))?;
        Ok(size.trim() == (48 * MIB).to_string())
    })?;
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 7 47M 1M", &disk.uri]))?;
    Ok(())
}

/// A read-only disk says so and refuses writes.
#[test]
fn read_only_disk_refuses_writes() -> Result<()> {
    let mut disk = Exported::new(32 * MIB, "access=ro", &[])?;
    let info = run(Command::new("nbdinfo").args(["--json", &disk.uri]))?;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    ensure!(info["exports"][0]["is_read_only"] == true, "{info:#}");
    let write = run(Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 4k", &disk.uri]));
    ensure!(write.is_err(), "a read-only disk was written: {write:?}");
    ensure!(disk.allocated()? == 0);
    ensure!(disk.nbd.terminate()?.success(), "{}", disk.nbd.log());
    Ok(())
}
