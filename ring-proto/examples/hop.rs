//! The bare ring hop: requests of 4 KiB from CPU 0 to CPU 1 and their responses back, polled, with
//! full validation and no I/O; and the same in C from Xen's ring.h, in turns, as the limit.
//!
//! `cargo run --release -p ring-proto --example hop [RUNS]` (needs gcc and libxen-dev)

use ring_proto::{
    Abi, Body, GrantRef, Limits, RawRequest, Request, Response, RingLayout, Segment, Segments,
    Status, Transfer, back, front,
};
use std::hint::spin_loop;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

#[path = "../tests/common/mod.rs"]
mod common;

const DEVICE_SECTORS: u64 = 1 << 30;
const LIMITS: Limits = Limits {
    sectors: DEVICE_SECTORS,
    granule: 1,
    max_indirect_segments: 256,
    read_only: false,
    discard: true,
};
const UNION: RingLayout = RingLayout::Union(Abi::X86_64);

fn pin(cpu: usize) {
    // SAFETY: an all-zero cpu_set_t is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is large enough for the two CPUs there are.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set outlives the call.
    unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
}

/// Nanoseconds for `count` requests, `depth` at a time.
fn hop(layout: RingLayout, order: u8, depth: u64, count: u64) -> Result<u64, BoxError> {
    let (pages, _first, _control) = common::ring_pages(layout, order);
    let (mut requests, mut responses) = front::create(pages.clone(), layout, order)?;
    let (mut taker, mut answerer) = back::attach(pages, layout, order)?;
    let backend = std::thread::spawn(move || -> Result<(), BoxError> {
        pin(1);
        let (mut done, mut raw) = (0, RawRequest::default());
        while done < count {
            if taker.poll()? == 0 {
                spin_loop();
                continue;
            }
            while taker.pop_into(&mut raw) {
                let request = raw.validate(&LIMITS)?;
                let operation = request.response_operation();
                answerer.push(&Response { id: request.id, operation, status: Status::Okay })?;
                done += 1;
            }
            let _polled = answerer.publish();
        }
        Ok(())
    });
    pin(0);
    let from = Instant::now();
    let (mut sent, mut done) = (0, 0);
    while done < count {
        while sent < count && sent - done < depth {
            let mut segments = Segments::EMPTY;
            segments.push(Segment::new(GrantRef(sent as u32), 0, 7));
            let sector = sent * 8 % DEVICE_SECTORS;
            let body = Body::Direct { transfer: Transfer::Read, sector, segments };
            requests.push(&Request { id: sent, body })?;
            sent += 1;
        }
        let _polled = requests.publish();
        while responses.poll()? == 0 {
            spin_loop();
        }
        while let Some(response) = responses.pop() {
            assert_eq!((response.id, response.status), (done, Status::Okay));
            done += 1;
        }
    }
    let taken = from.elapsed();
    backend.join().map_err(|_| "the backend's thread panicked")??;
    Ok(taken.as_nanos() as u64)
}

fn compile() -> Result<PathBuf, BoxError> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/hop.c");
    let program = std::env::temp_dir().join(format!("ring-hop-{}", std::process::id()));
    let status = Command::new("cc")
        .args(["-std=gnu11", "-O3", "-Wall", "-Werror", "-pthread", "-D__XEN_TOOLS__", "-o"])
        .args([&program, &source])
        .status()?;
    if status.success() { Ok(program) } else { Err("cc failed: apt-get install libxen-dev".into()) }
}

fn hop_in_c(program: &Path, order: u8, depth: u64, count: u64) -> Result<u64, BoxError> {
    let arguments = [depth, u64::from(order), count].map(|n| n.to_string());
    let output = Command::new(program).args(arguments).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

/// Median and, for a machine that others use meanwhile, best, in million requests a second.
fn rates(mut nanoseconds: Vec<u64>, count: u64) -> String {
    nanoseconds.sort_unstable();
    let rate = |n: usize| count as f64 * 1e3 / nanoseconds[n] as f64;
    format!("{:.2} ({:.2})", rate(nanoseconds.len() / 2), rate(0))
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), BoxError> {
    let runs = std::env::args().nth(1).map_or(Ok(3), |n| n.parse::<usize>())?.max(1);
    let program = compile()?;
    println!("million requests/s, median of {runs} (best)");
    println!("{:>6} {:>16} {:>16} {:>16}", "depth", "C ring.h", "union", "split");
    for (depth, union_order, split_order, count) in
        [(1, 0, 0, 100_000), (8, 0, 0, 500_000), (32, 0, 0, 1_000_000), (128, 2, 1, 2_000_000)]
    {
        let mut times: [Vec<u64>; 3] = Default::default();
        for _ in 0..runs {
            times[0].push(hop_in_c(&program, union_order, depth, count)?);
            times[1].push(hop(UNION, union_order, depth, count)?);
            times[2].push(hop(RingLayout::Split, split_order, depth, count)?);
        }
        let [c, union, split] = times.map(|times| rates(times, count));
        println!("{depth:>6} {c:>16} {union:>16} {split:>16}");
    }
    std::fs::remove_file(program)?;
    Ok(())
}
