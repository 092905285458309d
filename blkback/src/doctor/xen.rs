//! Requirements on Xen and its toolstack.

use super::Finding;
use ring_proto::abi::MAX_INDIRECT_SEGMENTS;
use std::collections::HashSet;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;
use xen_platform::xen::{self, Device};
use xenstore_glue::client::Endpoint;

/// How long xenstore may take to answer.
const XENSTORE_TIMEOUT: Duration = Duration::from_secs(5);
/// The most pages that one map call must support.
const LARGEST_MAP: u64 = MAX_INDIRECT_SEGMENTS as u64;

pub(super) fn findings() -> Vec<Finding> {
    let mut findings = vec![hypervisor()];
    let endpoint = Endpoint::from_env();
    for device in Device::ALL {
        findings.push(device_file(device, &endpoint));
    }
    findings.push(xenstore(endpoint));
    findings.push(kernel_backend());
    findings.extend(gntdev_limit());
    findings.extend(gntalloc_limit());
    findings
}

fn hypervisor() -> Finding {
    if xen::is_xen() {
        return Finding::ok("hypervisor", "Xen");
    }
    Finding::fail(
        "hypervisor",
        "this machine does not run on Xen, or its kernel does not know",
        "boot Xen (apt-get install xen-system-amd64 makes a boot entry), or try the pair without \
         it: --platform embedded:DIR",
    )
}

fn device_file(device: Device, endpoint: &Endpoint) -> Finding {
    let path = device.path();
    let (needed, instead) = match device {
        Device::Gntdev | Device::Evtchn => (true, ""),
        Device::Gntalloc => (false, "; only frontends in this domain need it"),
        Device::Xenbus => match endpoint {
            Endpoint::Device(_) => (true, ""),
            Endpoint::Unix(_) => (false, "; xenstored is reached by its socket here"),
        },
    };
    match device.open() {
        Ok(_) => Finding::ok(path, "can be opened"),
        Err(xen_platform::Error::Device { source, remedy, .. }) => {
            let told = if needed { Finding::fail } else { Finding::warn };
            told(path, format!("{source}{instead}"), remedy)
        }
        Err(error) => Finding::fail(path, error.to_string(), "see the kernel's log"),
    }
}

fn xenstore(endpoint: Endpoint) -> Finding {
    let (told, answer) = mpsc::channel();
    let place = endpoint.to_string();
    // On a thread, because the xenbus device blocks readers for ever if there is no xenstored.
    std::thread::spawn(move || told.send(xen::own_domid(&endpoint)));
    let remedy = "in dom0: systemctl start xenstored xen-init-dom0; anywhere else the toolstack \
                  answers for it";
    match answer.recv_timeout(XENSTORE_TIMEOUT) {
        Ok(Ok(domid)) => Finding::ok("xenstore", format!("{place}: this is {domid}")),
        Ok(Err(error)) => Finding::fail("xenstore", error.to_string(), remedy),
        Err(_) => Finding::fail("xenstore", format!("{place} does not answer"), remedy),
    }
}

/// Linux's own backend, which takes every disk below `backend/vbd` that it sees.
fn kernel_backend() -> Finding {
    const ABOUT: &str = "kernel's xen-blkback";
    const REMEDY: &str = "put `install xen-blkback /bin/false` into \
                          /etc/modprobe.d/xen-blkback.conf; not for backendtype=tap (Xen 4.19 and \
                          later), which it leaves alone";
    if Path::new("/sys/module/xen_blkback").exists() {
        let found = "loaded: it takes the disks of backendtype=phy away from blkback";
        return Finding::warn(ABOUT, found, format!("rmmod xen-blkback, and {REMEDY}"));
    }
    if is_kept_away() {
        return Finding::ok(ABOUT, "not loaded, and kept from being so");
    }
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let known = std::fs::read_to_string(format!("/lib/modules/{release}/modules.dep"));
    if known.is_ok_and(|modules| modules.replace('-', "_").contains("xen_blkback.ko")) {
        let found = "will be loaded when a disk of backendtype=phy is attached";
        return Finding::warn(ABOUT, found, REMEDY);
    }
    Finding::ok(ABOUT, "this kernel has none")
}

/// Where modprobe looks for its configuration: of files with the same name, the first counts
/// (modprobe.d(5)).
const MODPROBE: [&str; 5] = [
    "/etc/modprobe.d",
    "/run/modprobe.d",
    "/usr/local/lib/modprobe.d",
    "/usr/lib/modprobe.d",
    "/lib/modprobe.d",
];

/// Whether modprobe's configuration prevents loading it.
fn is_kept_away() -> bool {
    let files = MODPROBE.iter().filter_map(|path| std::fs::read_dir(path).ok()).flatten().flatten();
    let mut seen = HashSet::new();
    let counts = files.filter(|file| {
        let name = file.file_name();
        name.as_encoded_bytes().ends_with(b".conf") && seen.insert(name)
    });
    counts.filter_map(|file| std::fs::read_to_string(file.path()).ok()).any(|text| {
        text.lines().any(|line| {
            let mut words = line.split_whitespace();
            matches!(words.next(), Some("blacklist" | "install"))
                && words.next().is_some_and(|name| name.replace('-', "_") == "xen_blkback")
        })
    })
}

fn parameter(module: &str, name: &str) -> Option<u64> {
    let path = format!("/sys/module/{module}/parameters/{name}");
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn gntdev_limit() -> Option<Finding> {
    let limit = parameter("xen_gntdev", "limit")?;
    let found = format!("{limit} pages a map");
    Some(if limit < LARGEST_MAP {
        let remedy = format!("echo {LARGEST_MAP} > /sys/module/xen_gntdev/parameters/limit");
        Finding::warn("xen-gntdev limit", found, remedy)
    } else {
        Finding::ok("xen-gntdev limit", found)
    })
}

fn gntalloc_limit() -> Option<Finding> {
    let limit = parameter("xen_gntalloc", "limit")?;
    Some(Finding::ok("xen-gntalloc limit", format!("{limit} pages for all frontends here")))
}
