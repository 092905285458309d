//! Runs clients on a backend and counts, in a window while all of them are at work, what both ends use.

use super::callgrind;
use super::contender::BACKEND_CPU;
use super::sample::{End, Sample};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use xen_blk_tests::process::{by, tied};

/// How long clients work before anything is counted.
const RAMP: Duration = Duration::from_millis(300);
/// From starting a client to where it has connected.
const CONNECTED: Duration = Duration::from_millis(150);
/// The same under callgrind.
const CONNECTED_SLOWLY: Duration = Duration::from_secs(2);
/// How long clients work while callgrind counts, from connecting to closing the disk: a million I/Os, beside
/// which the rest does not show.
const COUNTED: Duration = Duration::from_secs(4);
/// The same while perf counts. It slows down what it counts, and IOPS are of the whole time: the window should be
/// most of it.
const PERF: Duration = Duration::from_secs(3);
/// The window closes at least this long before clients that connected at once end.
const MARGIN: Duration = Duration::from_millis(100);
/// The shortest [`Meter::time`].
pub(super) const SHORTEST: Duration = Duration::from_millis(400);
/// A client that overruns its time by this much has hung.
const GRACE: Duration = Duration::from_secs(20);
/// perf's names: the tracepoint of every system call...
pub(super) const CALLS: &str = "raw_syscalls:sys_enter";
/// ...and what CPUs count where the machine shows it.
pub(super) const INSTRUCTIONS: &str = "instructions";

/// What to find out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Aim {
    /// Rates and times.
    Times,
    /// System calls and instructions, with perf, which slows down what is counted.
    Calls,
    /// Instructions of one end, with callgrind, under which it is some fifty times as slow. The other end has
    /// always done its part meanwhile, so none are spent on waiting for it.
    Instructions(Which),
}

impl Aim {
    fn is_slow(self) -> bool {
        matches!(self, Self::Instructions(_))
    }
}

/// An end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Which {
    Client,
    Backend,
}

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Meter {
    /// How long clients are counted.
    pub(super) time: Duration,
    aim: Aim,
}

/// Processes of one end.
pub(super) type Pids<'a> = &'a [u32];

/// What clients reported, and what was used in the window.
pub(super) struct Observed<T> {
    /// JSON of each client, in their order.
    pub(super) reports: Vec<Value>,
    pub(super) window: Duration,
    /// What `look` saw when the window opened and when it closed.
    pub(super) looks: (T, T),
    client: Used,
    backend: Used,
}

#[derive(Clone, Copy, Default)]
struct Used {
    cpu: Duration,
    sleeps: u64,
    calls: Option<u64>,
    instructions: Option<f64>,
}

impl Meter {
    /// For measurements of `time`, if the time counts.
    pub(super) fn new(aim: Aim, time: Duration) -> Self {
        let time = match aim {
            Aim::Times => time,
            Aim::Calls => time.max(PERF),
            Aim::Instructions(_) => COUNTED,
        };
        Self { time, aim }
    }

    /// The same, for a longer time if this is shorter.
    pub(super) fn at_least(self, time: Duration) -> Self {
        Self { time: self.time.max(time), ..self }
    }

    /// A command that runs the program it is given as a backend, on the backends' CPU.
    pub(super) fn backend(&self) -> Command {
        let mut taskset = Command::new("taskset");
        taskset.args(["-c", &BACKEND_CPU.to_string()]);
        if self.aim == Aim::Instructions(Which::Backend) {
            return by(taskset, &callgrind::counting());
        }
        taskset
    }

    /// How long clients are to work before they count. Callgrind counts from the start.
    pub(super) fn ramp(&self) -> Duration {
        if self.aim.is_slow() { Duration::ZERO } else { RAMP }
    }

    /// Runs `clients` to their end.
    pub(super) fn observe<T>(
        &self,
        clients: Vec<Command>,
        backend: Pids<'_>,
        mut look: impl FnMut() -> Result<T>,
    ) -> Result<Observed<T>> {
        let counted = backend.first().filter(|_| self.aim == Aim::Instructions(Which::Backend));
        counted.map_or(Ok(()), |pid| callgrind::restart(*pid))?;
        let clients = clients.into_iter().map(|command| Client::start(&self.client(command)));
        let clients: Vec<Client> = clients.collect::<Result<_>>()?;
        let pids: Vec<u32> = clients.iter().map(|client| client.child.id()).collect();
        let connected = if self.aim.is_slow() { CONNECTED_SLOWLY } else { CONNECTED };
        std::thread::sleep(connected + self.ramp());
        let width = self.time.saturating_sub(connected + MARGIN);
        let perf = if self.aim == Aim::Calls {
            Some((Perf::start(&pids, width)?, Perf::start(backend, width)?))
        } else {
            None
        };
        let (from, before) = (Instant::now(), (used(&pids), used(backend)));
        let first = look()?;
        std::thread::sleep(width);
        let second = look()?;
        let (window, after) = (from.elapsed(), (used(&pids), used(backend)));
        let mut client = after.0?.since(before.0?);
        let mut backend = after.1?.since(before.1?);
        if let Some((ours, theirs)) = perf {
            // perf's own window is as long, and opens a little later.
            ours.read(&mut client)?;
            theirs.read(&mut backend)?;
        }
        let limit = self.time + GRACE;
        let reports = clients.into_iter().map(|client| client.finish(limit));
        let reports = reports.collect::<Result<_>>()?;
        if let Aim::Instructions(which) = self.aim {
            counted.map_or(Ok(()), |pid| callgrind::end(*pid))?;
            let end = if which == Which::Client { &mut client } else { &mut backend };
            // Of the whole time, of which the window is a part.
            let share = window.as_secs_f64() / self.time.as_secs_f64();
            end.instructions = Some(callgrind::counted()? * share);
        }
        Ok(Observed { reports, window, looks: (first, second), client, backend })
    }

    /// A client's command, under callgrind if that is to count.
    fn client(&self, command: Command) -> Command {
        if self.aim == Aim::Instructions(Which::Client) {
            return by(callgrind::counting(), &command);
        }
        command
    }
}

impl<T> Observed<T> {
    /// The ends' shares of an I/O.
    pub(super) fn share(&self, sample: &mut Sample) {
        let ios = sample.iops * self.window.as_secs_f64();
        sample.client = self.client.of(ios);
        sample.backend = self.backend.of(ios);
    }
}

impl Used {
    fn since(self, before: Self) -> Self {
        let cpu = self.cpu.saturating_sub(before.cpu);
        Self { cpu, sleeps: self.sleeps.saturating_sub(before.sleeps), ..self }
    }

    fn of(&self, ios: f64) -> End {
        End {
            cpu_us: Some(self.cpu.as_secs_f64() * 1e6 / ios),
            calls: self.calls.map(|calls| calls as f64 / ios),
            kicks: None,
            sleeps: Some(self.sleeps as f64 / ios),
            instructions: self.instructions.map(|count| count / ios),
        }
    }
}

/// CPU time and sleeps of processes: of the threads that they have now.
fn used(pids: Pids<'_>) -> Result<Used> {
    let mut used = Used::default();
    for pid in pids {
        for task in
            std::fs::read_dir(format!("/proc/{pid}/task")).context("a process ended early")?
        {
            let task = task?.path();
            // A thread that has just ended has no files.
            let Ok(schedstat) = std::fs::read_to_string(task.join("schedstat")) else { continue };
            let nanos = schedstat.split_whitespace().next().context("schedstat")?.parse()?;
            used.cpu += Duration::from_nanos(nanos);
            let Ok(status) = std::fs::read_to_string(task.join("status")) else { continue };
            let line =
                status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            used.sleeps += line.context("status")?.trim().parse::<u64>()?;
        }
    }
    Ok(used)
}

/// A client whose standard output is its report. It is killed if it is not waited for.
struct Client {
    child: Child,
    since: Instant,
}

impl Client {
    fn start(command: &Command) -> Result<Self> {
        let child = tied(command)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        Ok(Self { child, since: Instant::now() })
    }

    fn finish(mut self, limit: Duration) -> Result<Value> {
        // A report fits into the pipe.
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(self.since.elapsed() < limit, "a client does not end");
            std::thread::sleep(Duration::from_millis(2));
        };
        let (mut text, mut errors) = (String::new(), String::new());
        self.child.stdout.take().context("stdout")?.read_to_string(&mut text)?;
        self.child.stderr.take().context("stderr")?.read_to_string(&mut errors)?;
        if !status.success() {
            bail!("a client failed ({status}):\n{text}{errors}");
        }
        // fio may warn before it reports.
        let json = text.find('{').and_then(|at| text.get(at..)).unwrap_or_default();
        serde_json::from_str(json).with_context(|| format!("a client's report: {text}"))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// perf, counting in other processes.
struct Perf(Child);

impl Perf {
    fn start(pids: Pids<'_>, width: Duration) -> Result<Self> {
        let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
        let mut command = Command::new("perf");
        command.args(["stat", "-x", ",", "-e", CALLS, "-e", INSTRUCTIONS, "-p", &pids.join(",")]);
        command.args(["--", "sleep", &width.as_secs_f64().to_string()]);
        let child = tied(&command)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start perf")?;
        Ok(Self(child))
    }

    fn read(mut self, into: &mut Used) -> Result<()> {
        let mut text = String::new();
        self.0.stderr.take().context("stderr")?.read_to_string(&mut text)?;
        self.0.wait()?;
        // COUNT,UNIT,EVENT,...: words stand for a missing count.
        let count = |event: &str| -> Option<u64> {
            let line = text.lines().find(|line| line.contains(event))?;
            line.split(',').next()?.parse().ok()
        };
        into.calls = count(CALLS);
        into.instructions = count(INSTRUCTIONS).map(|count| count as f64);
        Ok(())
    }
}

impl Drop for Perf {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
