//! `blkback doctor`, on whatever machine this is.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::Command;

#[test]
fn whatever_is_wrong_shows_in_the_exit_status_and_has_a_remedy() {
    let output = Command::new(env!("CARGO_BIN_EXE_blkback"))
        .args(["doctor", "/nonexistent/disk", env!("CARGO_BIN_EXE_blkback")])
        .env("XENSTORED_PATH", "/nonexistent/socket")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let lines: Vec<&str> = text.lines().collect();
    for (line, next) in lines.iter().zip(&lines[1..]) {
        if line.starts_with("FAIL") || line.starts_with("WARN") {
            assert!(next.contains(" -> "), "{line}: no remedy:\n{text}");
        }
    }
    let verdict = |about: &str| {
        let mut rows = lines.iter().map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.find(|row| row.get(1) == Some(&about)).unwrap()[0].to_owned()
    };
    assert_eq!(verdict("/nonexistent/disk"), "FAIL", "{text}");
    assert_eq!(verdict("xenstore"), "FAIL", "{text}");
    let xen = xen_platform::xen::is_xen();
    assert_eq!(verdict("hypervisor"), if xen { "OK" } else { "FAIL" }, "{text}");
}
