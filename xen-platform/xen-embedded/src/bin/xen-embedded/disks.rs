//! Disks, as `xl block-attach`, `block-detach` and `block-list` treat them.

use anyhow::{Context, Result, bail};
use ring_proto::DomId;
use std::path::Path;
use xen_embedded::{XENSTORED_SOCKET, toolstack};
use xen_platform::embedded::control;
use xenstore_glue::client::{Client, Endpoint};
use xenstore_glue::disk::DiskSpec;
use xenstore_glue::vbd::VirtualDevice;

async fn xenstore(dir: &Path) -> Result<Client> {
    let client = Client::connect(Endpoint::Unix(dir.join(XENSTORED_SOCKET))).await;
    client.with_context(|| format!("is `xen-embedded serve` running in {}?", dir.display()))
}

pub(crate) async fn attach(dir: &Path, guest: &str, disk: &str, wait: bool) -> Result<()> {
    let spec: DiskSpec = match disk.parse() {
        Ok(spec) => spec,
        Err(error) => bail!("{}\n{}", error.problem, error.caret()),
    };
    let domains = control::list_domains(dir)?;
    let guest = control::find_domain(dir, guest)?;
    let backend = match &spec.backend {
        Some(name) => control::find_domain(dir, name)?,
        None => DomId(0),
    };
    if !domains.iter().any(|d| d.domid == backend.0 && d.driver_domain) {
        bail!(
            "{backend} is no driver domain: create it with --driver-domain to let it serve disks"
        );
    }
    let xenstore = xenstore(dir).await?;
    let attached = toolstack::attach_disk(&xenstore, guest, backend, &spec).await?;
    if wait {
        toolstack::wait_for_backend(&xenstore, &attached.backend).await?;
    }
    println!("{} {}", attached.devid, attached.backend);
    Ok(())
}

pub(crate) async fn detach(dir: &Path, guest: &str, vdev: &str, force: bool) -> Result<()> {
    let vdev: VirtualDevice = vdev.parse()?;
    let guest = control::find_domain(dir, guest)?;
    toolstack::detach_disk(&xenstore(dir).await?, guest, vdev.number(), force).await?;
    Ok(())
}

pub(crate) async fn list(dir: &Path, guests: &[String]) -> Result<()> {
    let guests: Vec<DomId> = if guests.is_empty() {
        control::list_domains(dir)?.iter().map(|d| DomId(d.domid)).collect()
    } else {
        guests.iter().map(|g| control::find_domain(dir, g)).collect::<Result<_, _>>()?
    };
    let xenstore = xenstore(dir).await?;
    let mut rows =
        vec![["Vdev", "BE", "handle", "state", "evt-ch", "ring-ref", "BE-path"].map(str::to_owned)];
    let mut errors = Vec::new();
    for guest in guests {
        for disk in toolstack::list_disks(&xenstore, guest).await? {
            let or_none = |text: String| if text.is_empty() { "-".to_owned() } else { text };
            rows.push([
                disk.devid.to_string(),
                disk.backend_domid.map_or_else(|| "-".to_owned(), |id| id.to_string()),
                guest.0.to_string(),
                or_none(disk.state),
                or_none(disk.event_channels.join(",")),
                or_none(disk.ring_refs.join(",")),
                disk.backend.clone(),
            ]);
            errors.extend(disk.error.map(|e| format!("{}: {e}", disk.backend)));
        }
    }
    print_table(&rows);
    for error in errors {
        eprintln!("{error}");
    }
    Ok(())
}

/// Prints a table, each column as wide as its widest value.
fn print_table<const N: usize>(rows: &[[String; N]]) {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    for row in rows {
        let cells: Vec<_> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("{}", cells.join("  ").trim_end());
    }
}
