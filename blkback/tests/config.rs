//! The configuration files that we show people.

use anyhow::{Context, Result, ensure};
use blkback::config::{Config, Flags};
use clap::Parser;

#[derive(Parser)]
struct Serve {
    #[command(flatten)]
    flags: Flags,
}

fn check(text: &str) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), text)?;
    let path = file.path().to_str().context("UTF-8")?;
    let line = ["blkback", "--config", path, "--platform", "embedded:/nowhere", "--domain", "stor"];
    Config::load(Serve::parse_from(line).flags).with_context(|| text.to_owned())?;
    Ok(())
}

#[test]
fn the_packaged_file_is_read_and_so_is_what_is_commented_out_there() -> Result<()> {
    let packaged = include_str!("../dist/blkback.toml");
    check(packaged)?;
    let setting = |line: &str| line.starts_with("# ") && line.contains(" = ");
    ensure!(packaged.lines().any(setting), "nothing is commented out");
    let lines = packaged.lines().map(|line| if setting(line) { &line[2..] } else { line });
    check(&lines.collect::<Vec<_>>().join("\n"))
}

#[test]
fn the_file_that_the_documentation_shows_is_read() -> Result<()> {
    let (_, rest) =
        include_str!("../../docs/deployment.md").split_once("```toml\n").context("it")?;
    check(rest.split_once("```").context("its end")?.0)
}
