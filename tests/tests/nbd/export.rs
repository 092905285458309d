//! A disk and its server.

use std::path::PathBuf;
use xen_blk_tests::host::{Host, Programs};
use xen_blk_tests::process::Process;

/// Fields are dropped in order: the server goes before its backend, and the backend before its host.
pub(crate) struct Export {
    pub(crate) server: Process,
    pub(crate) backend: Process,
    pub(crate) host: Host,
    pub(crate) uri: String,
}

impl Export {
    /// Serves a disk with this target (`DIR` is the test's directory) with these options.
    pub(crate) fn new(target: &str, options: &[&str]) -> Self {
        Self::on(Host::start(Programs::beside_us().unwrap()).unwrap(), target, options)
    }

    fn on(host: Host, target: &str, options: &[&str]) -> Self {
        let backend = host.backend(&[]).unwrap();
        host.create_domain("guest", &[]).unwrap();
        let target = target.replace("DIR", host.dir().to_str().unwrap());
        host.attach("guest", &format!("backend=stor,vdev=xvda,target={target}")).unwrap();
        let (server, uri) = host.export("guest", options).unwrap();
        Self { server, backend, host, uri }
    }

    /// Serves a file of `mib` MiB, `disk.img` in the host's directory.
    pub(crate) fn file(mib: u64, options: &[&str]) -> Self {
        let host = Host::start(Programs::beside_us().unwrap()).unwrap();
        let file = std::fs::File::create(host.dir().join("disk.img")).unwrap();
        file.set_len(mib << 20).unwrap();
        Self::on(host, "DIR/disk.img", options)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.host.dir().join("guest.sock")
    }

    /// Kilobytes of memory that the server has resident.
    pub(crate) fn resident(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.server.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}
