//! A disk and its server.

use std::path::PathBuf;
use xen_blk_tests::host::{Host, Programs};
use xen_blk_tests::process::Process;

/// Fields are dropped in order: the server goes before its backend, and the backend before its host.
pub(crate) struct Export {
    pub(crate) server: Process,
    pub(crate) backend: Process,
    pub(crate) host: Host,
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
        let socket = host.dir().join("nbd.sock");
        let mut command = host.frontend("guest", "nbd");
        command.arg("xvda").arg("--socket").arg(&socket).args(options);
        let mut server = Process::start("nbd", host.dir(), &command).unwrap();
        server.wait_for("nbd+unix:").unwrap();
        Self { server, backend, host }
    }

    /// Serves a file of so many MiB, `disk.img` in the host's directory.
    pub(crate) fn file(mib: u64, options: &[&str]) -> Self {
        let host = Host::start(Programs::beside_us().unwrap()).unwrap();
        let file = std::fs::File::create(host.dir().join("disk.img")).unwrap();
        file.set_len(mib << 20).unwrap();
        Self::on(host, "DIR/disk.img", options)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.host.dir().join("nbd.sock")
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    /// Kilobytes of memory that the server has resident.
    pub(crate) fn resident(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.server.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}
