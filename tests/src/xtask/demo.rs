//! `cargo xtask demo`.

use anyhow::Result;

/// Options of `cargo xtask demo`.
#[derive(clap::Args)]
pub(crate) struct Options {}

/// Runs the demonstration.
///
/// # Errors
/// What failed.
pub(crate) fn run(_: &Options) -> Result<()> {
    Ok(())
}
