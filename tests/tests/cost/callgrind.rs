//! Instructions, as valgrind's callgrind counts them: the same on every machine, with any load on it.

use anyhow::{Context, Result, bail};
use std::process::Command;
use xen_blk_tests::process::output;

/// Runs a test of this program's under callgrind. Returns the instructions of the thread that runs some
/// `functions`, in these and what they call; their names have that in them.
pub(crate) fn thread(test: &str, environment: &[(&str, &str)], functions: &[&str]) -> Result<u64> {
    let dir = tempfile::tempdir()?;
    output(
        Command::new("valgrind")
            .args(["--tool=callgrind", "--separate-threads=yes"])
            .args(functions.iter().map(|function| format!("--toggle-collect=*{function}*")))
            .arg(format!("--callgrind-out-file={}", dir.path().join("out").display()))
            .arg(std::env::current_exe()?)
            .args(["--exact", test, "--ignored"])
            .envs(environment.iter().copied()),
    )
    .context("is valgrind installed?")?;
    // A file a thread.
    for file in std::fs::read_dir(dir.path())? {
        let profile = std::fs::read_to_string(file?.path())?;
        // A name stands where it is first met: at the function, or at a call of it.
        let runs = |line: &str| {
            line.contains("fn=(") && functions.iter().any(|function| line.contains(function))
        };
        if profile.lines().any(runs) {
            let total = profile.lines().find_map(|line| line.strip_prefix("totals: "));
            return Ok(total.context("no total")?.trim().parse()?);
        }
    }
    bail!("callgrind saw no {functions:?}")
}
