//! Processes of a test: started, watched, and ended by pid, whatever happens.

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Something that takes longer than this has hung.
pub const HUNG: Duration = Duration::from_secs(60);
/// How often to check conditions that nothing announces.
const LOOK: Duration = Duration::from_millis(5);
/// The most that counts as waiting between two looks: a machine that was stopped for a minute (as a virtual
/// one can be by its host) has not waited for anything meanwhile.
const MOST_BETWEEN_LOOKS: Duration = Duration::from_secs(1);

/// How much longer to wait for something that is checked again and again.
#[derive(Debug)]
pub struct Patience {
    left: Duration,
    looked: Instant,
}

impl Patience {
    /// For `limit` from now on.
    pub fn new(limit: Duration) -> Self {
        Self { left: limit, looked: Instant::now() }
    }

    /// Whether it is over, to be asked once per look.
    pub fn is_over(&mut self) -> bool {
        let now = Instant::now();
        let waited = (now - std::mem::replace(&mut self.looked, now)).min(MOST_BETWEEN_LOOKS);
        self.left = self.left.saturating_sub(waited);
        self.left.is_zero()
    }
}

/// The same command, but killed by the kernel when the thread that starts it is gone, however that ended:
/// nobody else would end what a killed harness has started. The pid is the command's own, but its standard
/// streams must be set again.
pub fn tied(command: &Command) -> Command {
    let mut setpriv = Command::new("setpriv");
    setpriv.args(["--pdeathsig", "KILL", "--"]);
    by(setpriv, command)
}

/// The same command, started by another that runs the program it is given, such as `taskset -c 1`. Its
/// standard streams must be set again.
pub fn by(mut runner: Command, command: &Command) -> Command {
    runner.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => runner.env(name, value),
            None => runner.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        runner.current_dir(dir);
    }
    runner
}

/// A child whose output goes to a file. It is killed when this is dropped, and with the thread that
/// started it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    /// Length of the log at the start: earlier processes of the same name may have written to it.
    begin: usize,
}

impl Process {
    /// Starts `command`, with its output in `DIR/NAME.log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &str, dir: &Path, command: &Command) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let begin = file.metadata()?.len() as usize;
        let child = tied(command)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        Ok(Self { name: name.to_owned(), child, log, begin })
    }

    /// Everything that it and earlier processes of its name have printed.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Everything it has printed, and where each of its threads is: what there is to know of a process that
    /// hangs.
    pub fn describe(&self) -> String {
        let mut text = format!("{} has printed:\n{}\nits threads:\n", self.name, self.log());
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid()));
        for thread in threads.into_iter().flatten().flatten() {
            // Some of these are for root only.
            for file in ["comm", "stat", "schedstat", "syscall", "stack"] {
                let path = thread.path().join(file);
                text += std::fs::read_to_string(path).unwrap_or_default().trim_end();
                text.push('\n');
            }
        }
        text
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How often its threads have gone to sleep, and so been woken. Threads that have ended do not count.
    ///
    /// # Errors
    /// When it has ended.
    pub fn sleeps(&self) -> Result<u64> {
        let mut sum = 0;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            // One may have ended meanwhile.
            let Ok(status) = std::fs::read_to_string(thread?.path().join("status")) else {
                continue;
            };
            let line =
                status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            sum += line.context("status")?.trim().parse::<u64>()?;
        }
        Ok(sum)
    }

    fn has_said(&self, text: &str) -> bool {
        self.log().get(self.begin..).is_some_and(|log| log.contains(text))
    }

    /// Waits until it has printed `text`.
    ///
    /// # Errors
    /// When it ends or hangs before.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        let mut patience = Patience::new(HUNG);
        while !self.has_said(text) {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended ({status}) before it said {text:?}:\n{}", self.name, self.log());
            }
            if patience.is_over() {
                bail!("{} does not say {text:?}:\n{}", self.name, self.log());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let mut patience = Patience::new(limit);
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if patience.is_over() {
                bail!("{} does not end:\n{}", self.name, self.log());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When the kernel does not know it.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("pid")?;
        Ok(kill(Pid::from_raw(pid), signal)?)
    }

    /// Asks it to end, and waits.
    ///
    /// # Errors
    /// When it does not.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(HUNG)
    }

    /// `kill -9`, and waits.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end and returns what it printed.
///
/// # Errors
/// When it fails; the message holds its output.
pub fn run(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&output(command)?).into_owned())
}

/// Fails a test that cannot run here, or skips it where the environment allows that. Writes to stderr
/// itself: libtest captures macros' output.
///
/// # Errors
/// If nothing may be skipped.
pub fn skip(why: &str) -> Result<()> {
    ensure!(std::env::var_os("XEN_BLK_MAY_SKIP").is_some(), "{why} (XEN_BLK_MAY_SKIP=1 skips it)");
    Ok(writeln!(std::io::stderr(), "skipped: {why}")?)
}

/// Waits until `condition` holds.
///
/// # Errors
/// When it does not within [`HUNG`], or cannot be checked.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let mut patience = Patience::new(HUNG);
    while !condition()? {
        if patience.is_over() {
            bail!("gave up waiting for: {what}");
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// The output of a command, as bytes.
///
/// # Errors
/// When it cannot be started or fails, with what it says.
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}\n{text}{errors}", output.status);
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::ManuallyDrop;

    #[test]
    fn what_another_of_its_name_has_said_is_not_its_own() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let start =
            |script| Process::start("sh", dir.path(), Command::new("sh").args(["-c", script]));
        start("echo ready; sleep 60")?.wait_for("ready")?;
        assert!(start("exit")?.wait_for("ready").is_err());
        Ok(())
    }

    #[test]
    fn what_a_killed_harness_has_started_ends_with_it() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let proc = |pid: u32, file: &str| {
            std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default()
        };
        let started = || -> Result<u32> {
            let sleep = Process::start("sleep", dir.path(), Command::new("sleep").arg("1000"))?;
            // When a harness is killed, nobody drops it.
            let sleep = ManuallyDrop::new(sleep);
            wait_until("sleep runs", || Ok(proc(sleep.pid(), "comm").trim() == "sleep"))?;
            Ok(sleep.pid())
        };
        let thread = std::thread::scope(|scope| scope.spawn(started).join());
        let pid = thread.map_err(|_| anyhow::anyhow!("it panicked"))??;
        // It is still our child, and a zombie until we wait for it.
        wait_until("sleep is killed", || Ok(proc(pid, "status").contains("State:\tZ")))
    }
}
