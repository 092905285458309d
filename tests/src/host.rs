//! A whole host on the embedded platform: broker, driver domain, guests, as processes in a directory.

use crate::process::{Process, run};
use crate::scratch::Scratch;
use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Name of the driver domain.
pub const DRIVER_DOMAIN: &str = "stor";

/// The programs under test.
#[derive(Clone, Debug)]
pub struct Programs(PathBuf);

impl Programs {
    /// Those that cargo has put next to the running program.
    ///
    /// # Errors
    /// When they are not there.
    pub fn beside_us() -> Result<Self> {
        let us = std::env::current_exe()?;
        // target/PROFILE/deps/TEST or target/PROFILE/PROGRAM
        let dir = us.ancestors().skip(1).find(|dir| dir.join("blkback").exists());
        let dir = dir.with_context(|| {
            format!("no blkback near {us:?}: run `cargo build --workspace` first")
        })?;
        Ok(Self(dir.to_owned()))
    }

    /// Those in a directory.
    pub fn in_dir(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// A command that runs one of them.
    pub fn command(&self, program: &str) -> Command {
        Command::new(self.0.join(program))
    }
}

/// A tmpfs, on most machines.
const SHM: &str = "/dev/shm";

/// A running broker with a driver domain.
#[derive(Debug)]
pub struct Host {
    broker: Process,
    programs: Programs,
    dir: Scratch,
    run: Scratch,
}

impl Host {
    /// Starts a broker and creates [`DRIVER_DOMAIN`].
    ///
    /// # Errors
    /// When the broker does not start.
    pub fn start(programs: Programs) -> Result<Self> {
        let dir = Scratch::new(&std::env::temp_dir())?;
        // As on a real host, where it is /run: a disk that hangs must not keep a daemon from its records.
        let shm = Path::new(SHM);
        let run = Scratch::new(if shm.is_dir() { shm } else { dir.path() })?;
        let mut command = programs.command("xen-embedded");
        command.arg("--dir").arg(run.path().join("host")).arg("serve");
        let mut broker = Process::start("xen-embedded", dir.path(), &command)?;
        broker.wait_for("is ready")?;
        let host = Self { broker, programs, dir, run };
        host.create_domain(DRIVER_DOMAIN, &["--driver-domain"])?;
        Ok(host)
    }

    /// A directory for the test's files, removed at the end.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The broker.
    pub fn broker(&mut self) -> &mut Process {
        &mut self.broker
    }

    /// The platform's directory.
    pub fn platform_dir(&self) -> PathBuf {
        self.run.path().join("host")
    }

    /// What programs are given as their platform.
    pub fn platform(&self) -> String {
        format!("embedded:{}", self.platform_dir().display())
    }

    /// A toolstack command.
    pub fn toolstack(&self) -> Command {
        let mut command = self.programs.command("xen-embedded");
        command.arg("--dir").arg(self.platform_dir());
        command
    }

    /// Creates a domain. Returns its number.
    ///
    /// # Errors
    /// As the toolstack says.
    pub fn create_domain(&self, name: &str, options: &[&str]) -> Result<u16> {
        let number = run(self.toolstack().args(["domain", "create", name]).args(options))?;
        number.trim().parse().with_context(|| format!("domain number {number:?}"))
    }

    /// Attaches a disk to a guest by an xl disk line.
    ///
    /// # Errors
    /// As the toolstack says.
    pub fn attach(&self, guest: &str, disk: &str) -> Result<String> {
        run(self.toolstack().args(["attach", guest, disk]))
    }

    /// Detaches a disk.
    ///
    /// # Errors
    /// As the toolstack says.
    pub fn detach(&self, guest: &str, vdev: &str) -> Result<String> {
        run(self.toolstack().args(["detach", guest, vdev]))
    }

    /// Starts the backend daemon in the driver domain, and waits until it serves.
    ///
    /// # Errors
    /// When it does not start.
    pub fn backend(&self, options: &[&str]) -> Result<Process> {
        self.start_backend(self.programs.command("blkback"), DRIVER_DOMAIN, options)
    }

    /// As [`Host::backend`], by a command that runs the program it is given, such as `taskset -c 1`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn backend_by(&self, mut command: Command, options: &[&str]) -> Result<Process> {
        command.arg(self.programs.command("blkback").get_program());
        self.start_backend(command, DRIVER_DOMAIN, options)
    }

    /// As [`Host::backend`], on one CPU.
    ///
    /// # Errors
    /// When it does not start.
    pub fn backend_on(&self, cpu: &str, options: &[&str]) -> Result<Process> {
        let mut taskset = Command::new("taskset");
        taskset.args(["-c", cpu]);
        self.backend_by(taskset, options)
    }

    /// As [`Host::backend`], with no more than `most` files open.
    ///
    /// # Errors
    /// When it does not start.
    pub fn backend_with_files(&self, most: usize, options: &[&str]) -> Result<Process> {
        let mut prlimit = Command::new("prlimit");
        prlimit.arg(format!("--nofile={most}"));
        self.backend_by(prlimit, options)
    }

    /// As [`Host::backend`], but in dom0, to which xenstore's quotas do not apply.
    ///
    /// # Errors
    /// When it does not start.
    pub fn backend_in_dom0(&self, options: &[&str]) -> Result<Process> {
        self.start_backend(self.programs.command("blkback"), "0", options)
    }

    fn start_backend(
        &self,
        mut command: Command,
        domain: &str,
        options: &[&str],
    ) -> Result<Process> {
        // Ignore the configuration of this machine's own daemon.
        command.args(["serve", "--config", "/dev/null"]);
        command.args(["--domain", domain, "--platform", &self.platform()]);
        command.arg("--listen").arg(self.stats_address()).args(options);
        let mut process = Process::start("blkback", self.dir.path(), &command)?;
        process.wait_for("serving")?;
        Ok(process)
    }

    /// Where the backend offers its statistics.
    pub fn stats_address(&self) -> String {
        format!("unix:{}", self.dir.path().join("stats.sock").display())
    }

    /// The backend's statistics.
    ///
    /// # Errors
    /// When they cannot be had.
    pub fn stats(&self) -> Result<serde_json::Value> {
        let mut command = self.programs.command("blkback");
        let text = run(command.args(["stats", "--json", "--from", &self.stats_address()]))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// The backend's statistics as [`Host::stats`], but read by this process: another one would take a CPU
    /// from what is measured.
    ///
    /// # Errors
    /// When they cannot be had.
    pub fn snapshot(&self) -> Result<serde_json::Value> {
        let mut stream = UnixStream::connect(self.dir.path().join("stats.sock"))?;
        stream.write_all(b"GET /stats HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").context("an answer of HTTP")?;
        Ok(serde_json::from_str(body)?)
    }

    /// A frontend command in a guest: `blkfront ACTION ...`.
    pub fn frontend(&self, guest: &str, action: &str) -> Command {
        let mut command = self.programs.command("blkfront");
        command.arg(action).args(["--platform", &self.platform(), "--domain", guest]);
        command
    }

    /// Serves a guest's `xvda` as NBD. Returns the frontend and where it serves, which is `GUEST.sock` in
    /// [`Host::dir`].
    ///
    /// # Errors
    /// When it does not start.
    pub fn export(&self, guest: &str, options: &[&str]) -> Result<(Process, String)> {
        let socket = self.dir().join(format!("{guest}.sock"));
        let mut command = self.frontend(guest, "nbd");
        command.args(["xvda", "--socket"]).arg(&socket).args(options);
        let mut process = Process::start(guest, self.dir(), &command)?;
        process.wait_for("nbd+unix:")?;
        Ok((process, format!("nbd+unix:///?socket={}", socket.display())))
    }

    /// A command of Debian's xenstore tools, as dom0.
    pub fn xenstore(&self, tool: &str) -> Command {
        let mut command = Command::new(format!("xenstore-{tool}"));
        command.env("XENSTORED_PATH", self.platform_dir().join("xenstored.sock"));
        command
    }
}
