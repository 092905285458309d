//! Clients that others wrote.

use super::export::Export;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use xen_blk_tests::process::run;

fn tool(program: &str, arguments: &[&str]) -> String {
    run(Command::new(program).args(arguments)).unwrap()
}

/// An ext4 file system of `mib` MiB with something in it.
fn ext4(path: &Path, mib: u64) {
    std::fs::File::create(path).unwrap().set_len(mib << 20).unwrap();
    let path = path.to_str().unwrap();
    tool("mkfs.ext4", &["-q", "-F", "-d", concat!(env!("CARGO_MANIFEST_DIR"), "/src"), path]);
}

#[test]
fn nbdcopy_and_qemu_img_copy_a_file_system_in_and_out() {
    let export = Export::file(64, &["--vcpus", "2"]);
    let at = |name: &str| export.host.dir().join(name).to_str().unwrap().to_owned();
    let uri = &export.uri;
    ext4(Path::new(&at("in.img")), 64);
    tool("nbdcopy", &["--flush", &at("in.img"), uri]);
    tool("nbdcopy", &[uri, &at("out.img")]);
    tool("cmp", &[&at("in.img"), &at("out.img")]);
    tool("cmp", &[&at("in.img"), &at("disk.img")]);
    tool("e2fsck", &["-fn", &at("out.img")]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", &at("in.img"), uri]);
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", uri, &at("out.qcow2")]);
    tool("qemu-img", &["convert", "-n", "-O", "raw", &at("out.qcow2"), uri]);
    tool("nbdcopy", &[uri, &at("again.img")]);
    tool("cmp", &[&at("in.img"), &at("again.img")]);
}

#[test]
fn qemu_io_zeroes_discards_and_makes_durable() {
    let export = Export::file(64, &[]);
    let uri = &export.uri;
    let disk = export.host.dir().join("disk.img");
    let io = |commands: &[&str]| {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let arguments: Vec<&str> =
            ["-f", "raw"].into_iter().chain(commands).chain([uri.as_str()]).collect();
        let text = tool("qemu-io", &arguments);
        assert!(!text.contains("fail") && !text.contains("error"), "{text}");
    };
    let kept = || std::fs::metadata(&disk).unwrap().blocks() / 2048;
    io(&["write -P 0x5a 0 48M", "flush"]);
    assert!(kept() >= 48);
    // Not a multiple of what is zeroed at once, and with a flush after it.
    io(&["write -z -f 1M 5555200", "read -P 0 1M 5555200"]);
    io(&["read -P 0x5a 0 1M", "read -P 0x5a 6603776 1M"]);
    io(&["discard 16M 32M", "read -P 0x5a 15M 1M", "write -f -P 7 512 512", "read -P 7 512 512"]);
    assert!(kept() <= 16, "{} MiB", kept());
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let export = Export::new("memory:8M", &["--read-only", "--name", "a disk"]);
    let uri = format!("nbd+unix:///a%20disk?socket={}", export.socket().display());
    assert!(export.server.log().contains(&uri), "{}", export.server.log());
    let info: serde_json::Value =
        serde_json::from_str(&tool("nbdinfo", &["--json", &uri])).unwrap();
    let info = &info["exports"][0];
    assert_eq!(info["export-name"], "a disk");
    assert_eq!(info["is_read_only"], true);
    assert_eq!(info["can_multi_conn"], true);
    assert_eq!(info["can_trim"], false);
    assert_eq!(info["block_size_minimum"], 512);
    let image = export.host.dir().join("in.img");
    std::fs::write(&image, [1; 65536]).unwrap();
    let copied = Command::new("nbdcopy").arg(image).arg(&uri).output().unwrap();
    assert!(!copied.status.success());
}
