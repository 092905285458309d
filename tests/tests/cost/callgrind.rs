//! Instructions, as valgrind's callgrind counts them: the same on every machine, with any load on it.

use anyhow::{Context, Result, bail};
use std::process::Command;
use xen_blk_tests::process::output;

/// Runs a test of this program under callgrind. Returns the instructions of the thread that runs
/// `functions` (parts of their names): those of the functions and of what they call.
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
    // One file per thread.
    for file in std::fs::read_dir(dir.path())? {
        let profile = std::fs::read_to_string(file?.path())?;
        // A name is written out where it first occurs: at the function, or at a call to it.
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
