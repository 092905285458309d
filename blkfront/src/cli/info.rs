//! `blkfront info`.

use super::units::show_bytes;
use super::{Host, Rings, say};
use blkfront::{Features, Info};
use std::process::ExitCode;

/// Options of `blkfront info`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The disk: a name such as xvda, or a number
    disk: String,
    /// vCPUs to map to rings
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// Write JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    rings: Rings,
}

pub(crate) fn run(host: &Host, args: &Args) -> anyhow::Result<ExitCode> {
    let disk = host.open(&args.disk, args.rings.config(args.vcpus))?;
    let info = disk.info();
    if args.json {
        say(&serde_json::to_string_pretty(&info)?);
    } else {
        say(&table(&info));
    }
    disk.close()?;
    Ok(ExitCode::SUCCESS)
}

fn table(info: &Info) -> String {
    let mut table = String::new();
    let mut row = |name: &str, value: &str| table += &format!("{name:<12}{value}\n");
    let geometry = &info.geometry;
    row("disk", &format!("{} ({}) of domain {}", info.device, info.devid, info.domain));
    row("frontend", &info.frontend);
    row("backend", &info.backend);
    if !info.trusted {
        let measures = "data is copied through pages that hold nothing else";
        row("trust", &format!("the backend is not to be trusted: {measures}"));
    }
    row("size", &format!("{} bytes ({})", geometry.size, show_bytes(geometry.size as f64)));
    let (logical, physical) = (geometry.sector_size, geometry.physical_sector_size);
    row("sectors", &format!("{logical} bytes logical, {physical} bytes physical"));
    row("access", if geometry.read_only { "read-only" } else { "read and write" });
    let kinds = [(geometry.cdrom, "CD-ROM"), (geometry.removable, "removable")];
    if let Some(kinds) = listed(&kinds) {
        row("kind", &kinds);
    }
    row("features", &features(&info.features));
    for ring in &info.rings {
        let vcpus: Vec<String> = ring.vcpus.iter().map(u32::to_string).collect();
        let users = if vcpus.is_empty() { "nobody".to_owned() } else { vcpus.join(", ") };
        let name = format!("ring {}", ring.ring);
        row(&name, &format!("{} slots, used by vCPU {users}", ring.slots));
    }
    table
}

fn listed(items: &[(bool, &str)]) -> Option<String> {
    let items: Vec<&str> = items.iter().filter(|item| item.0).map(|item| item.1).collect();
    (!items.is_empty()).then(|| items.join(", "))
}

/// The negotiated features, on one line.
pub(crate) fn features(features: &Features) -> String {
    let indirect = format!("indirect ({} segments)", features.max_indirect_segments);
    let items = [
        (features.flush && !features.barrier, "flush"),
        (features.barrier, "barrier"),
        (features.discard, "discard"),
        (features.secure_discard, "secure discard"),
        (features.persistent, "persistent grants"),
        (features.max_indirect_segments > 0, indirect.as_str()),
        (features.split_ring, "split ring"),
    ];
    listed(&items).unwrap_or_else(|| "none".to_owned())
}
