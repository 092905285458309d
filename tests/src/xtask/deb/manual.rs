//! Manual pages, made from what the programs' `--help` says.

use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;
use xen_blk_tests::process::run as output;

/// The page of `program` in a section: a heading for each command, and under it its `--help`.
pub(super) fn page(program: &Path, section: u8) -> Result<String> {
    let name = program.file_name().and_then(|name| name.to_str()).context("a program's name")?;
    let version = output(Command::new(program).arg("--version"))?;
    let help = output(Command::new(program).arg("--help"))?;
    let (about, _) = help.split_once('\n').context("--help")?;
    let mut page = format!(
        ".TH {} {section} \"\" \"{}\"\n.SH NAME\n{name} \\- {}\n.SH SYNOPSIS\n.B {name}\n\
         .I COMMAND\n[options]\n",
        name.to_uppercase(),
        version.trim(),
        escaped(about),
    );
    for command in commands(&help) {
        let help = output(Command::new(program).args([command, "--help"]))?;
        let (about, rest) = help.split_once("\nUsage:").context("--help of a command")?;
        page.push_str(&format!(".SH \"{} {}\"\n", name.to_uppercase(), command.to_uppercase()));
        page.push_str(&format!("{}\n.PP\n.nf\nUsage:{}.fi\n", escaped(about), escaped(rest)));
    }
    page.push_str(".SH \"SEE ALSO\"\n.BR xl (1),\n.BR xl-disk-configuration (5),\n");
    page.push_str(".I /usr/share/doc/xen\\-blk/docs/deployment.md\n");
    Ok(page)
}

/// The names of the commands that `--help` lists.
fn commands(help: &str) -> impl Iterator<Item = &str> {
    let list = help.split_once("Commands:\n").map_or("", |(_, list)| list);
    let entries = list.lines().take_while(|line| !line.is_empty());
    // Descriptions may continue on lines that are indented further.
    let names = entries.filter_map(|line| line.strip_prefix("  ").filter(|l| !l.starts_with(' ')));
    names.filter_map(|line| line.split_whitespace().next()).filter(|&name| name != "help")
}

/// Escaped, as plain text for troff.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    // A line that begins with either would be a request.
    let lines = text.trim_end().lines().map(|line| match line.chars().next() {
        Some('.' | '\'') => format!("\\&{line}"),
        _ => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n") + "\n"
}
