//! Directories that are removed with the harness, however that ends.

use anyhow::Result;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Waits for the end of its input, and removes a directory. What the harness has started ends at the same
/// time, and may still make files meanwhile.
const KEEPER: &str = r#"read -r _; for again in 1 2 3; do rm -rf "$1" && exit; sleep 1; done"#;

/// A directory that is removed when this is dropped, or when the harness is killed.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    /// Its input is a pipe whose other end only we hold.
    keeper: Child,
}

impl Scratch {
    /// A new directory in `parent`.
    ///
    /// # Errors
    /// When it cannot be made, or there is no shell.
    pub fn new(parent: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("xen-blk.").tempdir_in(parent)?;
        let keeper = Command::new("sh")
            .args(["-c", KEEPER, "sh"])
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Signals by which a terminal or a shell ends the harness must not reach it.
            .process_group(0)
            .spawn()?;
        Ok(Self { path: dir.keep(), keeper })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // This closes the pipe first.
        let _ = self.keeper.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::wait_until;

    #[test]
    fn it_is_gone_when_it_was_dropped() -> Result<()> {
        let scratch = Scratch::new(&std::env::temp_dir())?;
        let path = scratch.path().to_owned();
        std::fs::write(path.join("file"), "")?;
        drop(scratch);
        assert!(!path.exists());
        Ok(())
    }

    #[test]
    fn it_goes_when_the_harness_is_killed() -> Result<()> {
        let mut scratch = Scratch::new(&std::env::temp_dir())?;
        std::fs::write(scratch.path().join("file"), "")?;
        // As the kernel does then.
        drop(scratch.keeper.stdin.take());
        wait_until("it is removed", || Ok(!scratch.path().exists()))
    }
}
