//! What a host is made to do: a script in dom0, which creates guests that each have a job.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// An interactive host: a scenario that is not listed, since nobody waits for its end.
pub const SHELL: &str = "shell";

/// The scripts of dom0 and guests.
pub fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/xen/scripts")
}

/// The names of all scenarios and what each shows: the first line of its script.
///
/// # Errors
/// When the scripts cannot be read.
pub fn list() -> Result<Vec<(String, String)>> {
    let mut list = Vec::new();
    for entry in fs::read_dir(scripts().join("scenarios"))? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).context("a script's name")?;
        let text = fs::read_to_string(&path)?;
        let about = text.lines().next().unwrap_or_default().trim_start_matches("# ");
        if name != SHELL {
            list.push((name.to_owned(), about.to_owned()));
        }
    }
    list.sort();
    Ok(list)
}

/// Whether there is such a scenario.
///
/// # Errors
/// When there is none; it lists those there are.
pub fn check(name: &str) -> Result<()> {
    let names: Vec<_> = list()?.into_iter().map(|(name, _)| name).collect();
    if !names.iter().any(|known| known == name) {
        bail!("no scenario {name}; there are: {}", names.join(", "));
    }
    Ok(())
}

/// What only some scenarios need in their images: words of their scripts' line `# needs: ...`, of which
/// there are `hvm` and `profilers`.
///
/// # Errors
/// When its script cannot be read.
pub fn needs(name: &str) -> Result<Vec<String>> {
    let text = fs::read_to_string(scripts().join("scenarios").join(name).with_extension("sh"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("# needs: "));
    Ok(line.unwrap_or_default().split(' ').map(str::to_owned).collect())
}
