//! `blkback doctor`: what is missing on this host, and how to fix it.

mod host;
mod xen;

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `blkback doctor`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Files and block devices that are to be disks: whether O_DIRECT works on them
    #[arg(value_name = "PATH")]
    targets: Vec<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    Ok,
    /// It works, or will in most cases.
    Warn,
    /// The daemon cannot work like this.
    Fail,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "OK",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        })
    }
}

/// The result of one check.
struct Finding {
    about: String,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do about it.
    remedy: Option<String>,
}

impl Finding {
    fn ok(about: impl Into<String>, found: impl Into<String>) -> Self {
        Self { about: about.into(), verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn warn(about: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        let remedy = Some(remedy.into());
        Self { about: about.into(), verdict: Verdict::Warn, found: found.into(), remedy }
    }

    fn fail(about: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, ..Self::warn(about, found, remedy) }
    }
}

/// Runs all checks and prints the results.
///
/// # Errors
/// If the output cannot be written. Problems of the host show in the exit status.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut findings = xen::findings();
    findings.extend(host::findings());
    findings.extend(args.targets.iter().map(|path| host::direct_io(path)));
    let mut out = io::stdout().lock();
    let width = findings.iter().map(|finding| finding.about.len()).max().unwrap_or(0);
    for Finding { about, verdict, found, remedy } in &findings {
        writeln!(out, "{verdict:<4}  {about:<width$}  {found}")?;
        if let Some(remedy) = remedy {
            writeln!(out, "{:>6}{:width$}  -> {remedy}", "", "")?;
        }
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let failures = count(Verdict::Fail);
    writeln!(out, "\n{failures} failed, {} warnings", count(Verdict::Warn))?;
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
