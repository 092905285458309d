//! Talks to a C peer built from Xen's own headers (`tests/c`): each end must read what the other
//! writes, on every ring size and ABI.

#![cfg(not(loom))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::Pages;
use ring_proto::abi::{self, MAX_RING_PAGE_ORDER, PAGE_SIZE, op};
use ring_proto::{
    Abi, Body, GrantRef, Limits, Request, Response, RingLayout, RingPages, Segment, Segments,
    Status, Transfer, back, front, indirect_pages,
};
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::mem::{offset_of, size_of};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Requests sent through each ring; the indices wrap at 2^32 half way. A pipe holds more events than
/// this, so an end that never sleeps cannot block the other.
const COUNT: u32 = 50_000;
const START: u32 = (COUNT / 2).wrapping_neg();

/// Nothing that the C peer asks for is beyond these.
const LIMITS: Limits = Limits {
    sectors: 1 << 63,
    granule: 1,
    max_indirect_segments: 4096,
    read_only: false,
    discard: true,
};

/// The compiler flags that give blkif.h an ABI's layout on this machine.
fn flags(abi: Abi) -> &'static [&'static str] {
    match abi {
        Abi::X86_64 => &[],
        Abi::X86_32 => &["-DPACK4"],
    }
}

fn cc(arguments: &[&str], source: &Path) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c");
    let output = Command::new("cc")
        .args(["-std=gnu11", "-O2", "-Wall", "-Werror", "-D__XEN_TOOLS__", "-I"])
        .arg(directory)
        .args(arguments)
        .arg(source)
        .output();
    let hint =
        "this test needs a C compiler and Xen's headers: apt-get install gcc libc6-dev libxen-dev";
    let output = output.unwrap_or_else(|e| panic!("cannot run cc ({e}); {hint}"));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cc {arguments:?} {source:?} failed; {hint}\n{message}");
}

fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Pairs of a C expression and the value of our types for it.
macro_rules! offsets {
    ($abi:ident, $($c:literal is $ours:ident { $($field:ident)+ })+) => {
        vec![$($((
            format!("offsetof({}, {})", $c, stringify!($field)),
            offset_of!(abi::$abi::$ours, $field),
        )),+),+]
    };
}

macro_rules! structures {
    ($abi:ident) => {{
        let mut same = offsets!($abi,
            "struct blkif_request" is Request {
                operation nr_segments handle id sector_number seg
            }
            "struct blkif_request_discard" is Discard {
                operation flag handle id sector_number nr_sectors
            }
            "struct blkif_request_indirect" is Indirect {
                operation indirect_op nr_segments id sector_number handle indirect_grefs
            }
            "struct blkif_response" is Response { id operation status }
        );
        for (c, ours) in [
            ("sizeof(union blkif_sring_entry)", size_of::<abi::$abi::Request>()),
            ("sizeof(struct blkif_response)", size_of::<abi::$abi::Response>()),
            ("sizeof(struct blkif_request_segment)", size_of::<Segment>()),
            ("offsetof(struct blkif_request_segment, first_sect)", 4),
            ("offsetof(struct blkif_request_segment, last_sect)", 5),
            ("BLKIF_MAX_SEGMENTS_PER_REQUEST", abi::MAX_DIRECT_SEGMENTS),
            ("BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST", abi::MAX_INDIRECT_PAGES),
            ("BLKIF_OP_DISCARD", usize::from(op::DISCARD)),
            ("BLKIF_OP_INDIRECT", usize::from(op::INDIRECT)),
            ("BLKIF_DISCARD_SECURE", usize::from(abi::DISCARD_SECURE)),
        ] {
            same.push((c.to_owned(), ours));
        }
        same
    }};
}

/// Has the C compiler compare our sizes, offsets and ring sizes with those of Xen's headers: for its
/// own ABI, for that of a real i386 compiler, and for the packed one that stands in for i386 elsewhere.
#[test]
fn layouts_are_those_of_the_headers() {
    for (abi, flags, mut same) in [
        (Abi::X86_64, &[][..], structures!(x86_64)),
        (Abi::X86_32, flags(Abi::X86_32), structures!(x86_32)),
        #[cfg(target_arch = "x86_64")]
        (Abi::X86_32, &["-m32", "-ffreestanding"], structures!(x86_32)),
    ] {
        for order in 0..=MAX_RING_PAGE_ORDER {
            let c = format!("(int)__CONST_RING_SIZE(blkif, {})", PAGE_SIZE << order);
            same.push((c, RingLayout::Union(abi).slots(order) as usize));
        }
        let mut source = String::from("#include \"xen.h\"\n");
        for (c, ours) in same {
            writeln!(source, "_Static_assert({c} == {ours}, \"ours is {ours}\");").unwrap();
        }
        let path = scratch("layout.c");
        std::fs::write(&path, source).unwrap();
        cc(&[flags, &["-fsyntax-only"]].concat(), &path);
    }
}

fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn draw(k: u32, n: u64) -> u64 {
    mix(u64::from(k) << 16 | n)
}

/// Request `k`; peer.c generates the same.
fn request(k: u32) -> Request {
    let sector = draw(k, 4) >> 2;
    let direct = |transfer| {
        let mut segments = Segments::EMPTY;
        for i in 0..=draw(k, 6) % 11 {
            let first = (draw(k, 32 + i) % 8) as u8;
            let last = first + (draw(k, 48 + i) % (8 - u64::from(first))) as u8;
            segments.push(Segment::new(GrantRef(draw(k, 16 + i) as u32), first, last));
        }
        Body::Direct { transfer, sector, segments }
    };
    let odd = draw(k, 3) % 2 == 1;
    let body = match draw(k, 2) % 8 {
        0 => direct(Transfer::Read),
        1 => direct(Transfer::Write),
        2 => direct(Transfer::Barrier),
        3 => direct(Transfer::FlushWrite),
        4 => Body::Flush { barrier: false },
        5 => Body::Discard { sector, sectors: draw(k, 6) >> 2, secure: odd },
        6 => {
            let nr_segments = 1 + (draw(k, 6) % 4096) as u16;
            let mut pages = [GrantRef(0); abi::MAX_INDIRECT_PAGES];
            for (i, page) in (0..).zip(&mut pages[..indirect_pages(nr_segments)]) {
                *page = GrantRef(draw(k, 16 + i) as u32);
            }
            let transfer = if odd { Transfer::Write } else { Transfer::Read };
            Body::Indirect { transfer, sector, nr_segments, pages }
        }
        _ => Body::Flush { barrier: true },
    };
    Request { id: draw(k, 0) << 32 | u64::from(k), body }
}

fn response(k: u32) -> Response {
    let status = match draw(k, 1) % 3 {
        0 => Status::Okay,
        1 => Status::Error,
        _ => Status::NotSupported,
    };
    let Request { id, .. } = request(k);
    Response { id, operation: request(k).response_operation(), status }
}

/// The C process; its pipes carry the events.
struct Peer(Child);

impl Peer {
    fn notify(&mut self) {
        self.0.stdin.as_mut().unwrap().write_all(b"!").unwrap();
    }

    /// Waits for an event. Fails if the peer is gone; it has given its reason on standard error.
    fn wait(&mut self) {
        let events = self.0.stdout.as_mut().unwrap().read(&mut [0; 4096]).unwrap();
        assert_ne!(events, 0, "the C peer gave up");
    }

    fn finish(mut self) {
        assert!(self.0.wait().unwrap().success(), "the C peer found a fault");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Only a test that fails gets here before the peer has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Compiles the peer once for an ABI, then runs `test` on every ring size, from 0 and across 2^32.
fn with_peer(abi: Abi, role: &str, test: impl Fn(&mut Peer, RingPages, RingLayout, u8, u32)) {
    let program = scratch(&format!("peer-{role}-{abi:?}"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c/peer.c");
    cc(&[flags(abi), &["-o", program.to_str().unwrap()]].concat(), &source);
    let layout = RingLayout::Union(abi);
    for order in 0..=MAX_RING_PAGE_ORDER {
        for start in [0, START] {
            let pages = Pages::new(1 << order);
            // As a frontend leaves them: nothing may rely on what it does not initialize.
            for word in 16..pages.words().len() {
                pages.set(word, 0xa5a5_a5a5);
            }
            for (word, event) in [0, 1, 0, 1].into_iter().enumerate() {
                pages.set(word, start.wrapping_add(event));
            }
            let mut peer = Peer(
                Command::new(&program)
                    .args([role, &pages.path(), &order.to_string(), &start.to_string()])
                    .arg(COUNT.to_string())
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()
                    .unwrap(),
            );
            test(&mut peer, RingPages::Union(pages.clone()), layout, order, start);
            peer.finish();
        }
    }
}

fn back(peer: &mut Peer, pages: RingPages, layout: RingLayout, order: u8) {
    let (mut requests, mut responses) = back::attach(pages, layout, order).unwrap();
    let mut done = 0;
    while done < COUNT {
        let first = done;
        requests.poll().unwrap();
        while let Some(raw) = requests.pop() {
            assert_eq!(raw.validate(&LIMITS).map(|r| r.to_owned()), Ok(request(done)));
            done += 1;
        }
        // Last one first: a backend may answer in any order.
        for k in (first..done).rev() {
            responses.push(&response(k)).unwrap();
        }
        if responses.publish() {
            peer.notify();
        }
        if done < COUNT && !requests.final_check().unwrap() {
            peer.wait();
            // As if something else had woken it.
            requests.withdraw();
        }
    }
}

fn front(peer: &mut Peer, pages: RingPages, layout: RingLayout, order: u8, start: u32) {
    let (mut requests, mut responses) = front::create_at(pages, layout, order, start).unwrap();
    let mut answered = vec![false; COUNT as usize];
    let (mut sent, mut done) = (0, 0);
    while done < COUNT {
        let batch = 1 + draw(sent, u64::from(done)) % (2 * u64::from(requests.slots()));
        for _ in 0..batch {
            if sent == COUNT || requests.push(&request(sent)).is_err() {
                break;
            }
            sent += 1;
        }
        if requests.publish() {
            peer.notify();
        }
        loop {
            responses.poll().unwrap();
            while let Some(got) = responses.pop() {
                let k = got.id as u32;
                assert_eq!(got, response(k));
                assert!(!std::mem::replace(&mut answered[k as usize], true), "{k} twice");
                done += 1;
            }
            if done == COUNT || (sent < COUNT && requests.free() > 0) {
                break;
            }
            if !responses.final_check().unwrap() {
                peer.wait();
            }
        }
    }
}

#[test]
fn c_front_x86_64() {
    with_peer(Abi::X86_64, "front", |peer, pages, layout, order, _| {
        back(peer, pages, layout, order);
    });
}

#[test]
fn c_front_x86_32() {
    with_peer(Abi::X86_32, "front", |peer, pages, layout, order, _| {
        back(peer, pages, layout, order);
    });
}

#[test]
fn c_back_x86_64() {
    with_peer(Abi::X86_64, "back", front);
}

#[test]
fn c_back_x86_32() {
    with_peer(Abi::X86_32, "back", front);
}
