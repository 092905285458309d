//! The mapping of vCPUs to rings, as in blk-mq, with no lock on the way.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host, Programs};
use xen_blk_tests::process::run;

/// vCPUs, rings asked for, and the vCPUs that each ring is to serve (`blk_mq_map_queues` in Linux).
const CASES: [(&str, &str, &[&[u64]]); 4] = [
    ("4", "4", &[&[0], &[1], &[2], &[3]]),
    ("4", "2", &[&[0, 1], &[2, 3]]),
    ("5", "2", &[&[0, 1, 2], &[3, 4]]),
    ("2", "4", &[&[0], &[1]]),
];

#[test]
fn every_ring_carries_its_vcpus_io_without_contention() -> Result<()> {
    let host = Host::start(Programs::beside_us()?)?;
    host.create_domain("guest", &["--vcpus", "5", "--on-crash", "preserve"])?;
    let _backend = host.backend(&["--max-queues", "4"])?;
    let line = format!("vdev=xvda,backendtype=tap,backend={DRIVER_DOMAIN},target=memory:64M");
    host.attach("guest", &line)?;
    for (vcpus, queues, expected) in CASES {
        let mut bench = host.frontend("guest", "bench");
        bench.args(["xvda", "--rw=randrw", "--bs=4k", "--iodepth=16", "--runtime=1"]);
        bench.args(["--time_based", "--json", "--numjobs", vcpus, "--queues", queues]);
        let report: Value = serde_json::from_str(&run(&mut bench)?)?;
        let case = format!("{vcpus} vCPUs, {queues} rings: {report:#}");
        ensure!(report["errors"] == 0, "{case}");
        let rings = report["rings"].as_array().with_context(|| case.clone())?;
        ensure!(rings.len() >= expected.len(), "{case}");
        for (ring, vcpus) in rings.iter().zip(expected) {
            let served: Option<Vec<u64>> =
                ring["vcpus"].as_array().map(|v| v.iter().filter_map(Value::as_u64).collect());
            ensure!(served.as_deref() == Some(*vcpus), "{case}");
            ensure!(ring["stats"]["ios"].as_u64() > Some(0), "a ring is idle: {case}");
            ensure!(ring["stats"]["contended"] == 0, "{case}");
        }
    }
    Ok(())
}
