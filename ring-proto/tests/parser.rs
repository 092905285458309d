//! Parses arbitrary bytes in a slot, against the rules of blkif.h restated independently.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{LAYOUTS, Pages, ring_pages};
use proptest::array::uniform32;
use proptest::collection::vec;
use proptest::prelude::*;
use ring_proto::{
    Abi, Body, GrantRef, Limits, RawRequest, Request, RingLayout, Segment, Segments, Transfer,
    back, decode_segments, encode_segment, front, indirect_pages,
};
use std::sync::Arc;

/// Byte offsets of a slot's fields, as given by the header's comments and an i386 compiler; for the
/// split layout, by docs/protocol.md.
struct Offsets {
    id: usize,
    id_len: usize,
    sector: usize,
    body: usize,
    grefs: usize,
    room: u8,
    stride: usize,
}

fn offsets(layout: RingLayout) -> Offsets {
    let [id, id_len, sector, body, grefs, stride] = match layout {
        RingLayout::Union(Abi::X86_64) => [8, 8, 16, 24, 28, 112],
        RingLayout::Union(Abi::X86_32) => [4, 8, 12, 20, 24, 108],
        RingLayout::Split => [4, 4, 8, 16, 20, 64],
    };
    let room = if layout == RingLayout::Split { 6 } else { 11 };
    Offsets { id, id_len, sector, body, grefs, room, stride }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte))
}

/// The request that these bytes encode, if they keep every rule.
fn oracle(bytes: &[u8], layout: RingLayout, limits: &Limits) -> Option<Request> {
    let at = offsets(layout);
    let inside = |sector: u64, sectors: u64| {
        u128::from(sector) + u128::from(sectors) <= u128::from(limits.sectors)
    };
    let aligned = |n: u64| n.is_multiple_of(u64::from(limits.granule));
    let id = number(&bytes[at.id..][..at.id_len]);
    let sector = number(&bytes[at.sector..][..8]);
    let gref = |offset: usize| GrantRef(number(&bytes[offset..][..4]) as u32);
    let direct = |transfer: Transfer| {
        let count = bytes[1];
        if count == 0 || count > at.room || (limits.read_only && transfer != Transfer::Read) {
            return None;
        }
        let (mut segments, mut total) = (Segments::EMPTY, 0);
        for i in 0..usize::from(count) {
            let place = at.body + 8 * i;
            let (first, last) = (bytes[place + 4], bytes[place + 5]);
            if first > last || last > 7 || !aligned(u64::from(last - first) + 1) {
                return None;
            }
            total += u64::from(last - first) + 1;
            assert!(segments.push(Segment::new(gref(place), first, last)));
        }
        (inside(sector, total) && aligned(sector)).then_some(Body::Direct {
            transfer,
            sector,
            segments,
        })
    };
    let body = match (bytes[0], bytes[1]) {
        (0, _) => direct(Transfer::Read)?,
        (1, _) => direct(Transfer::Write)?,
        (2, 0) => Body::Flush { barrier: true },
        (2, _) => direct(Transfer::Barrier)?,
        (3, 0) => Body::Flush { barrier: false },
        (3, _) => direct(Transfer::FlushWrite)?,
        (5, flag) => {
            let sectors = number(&bytes[at.body..][..8]);
            let allowed = limits.discard && !limits.read_only;
            if !allowed || !inside(sector, sectors) || !aligned(sector) || !aligned(sectors) {
                return None;
            }
            Body::Discard { sector, sectors, secure: flag % 2 == 1 }
        }
        (6, inner @ (0 | 1)) => {
            let nr_segments = number(&bytes[2..4]) as u16;
            let transfer = if inner == 0 { Transfer::Read } else { Transfer::Write };
            if nr_segments == 0
                || nr_segments > limits.max_indirect_segments
                || (limits.read_only && inner == 1)
                || !inside(sector, u64::from(nr_segments))
            {
                return None;
            }
            let mut pages = [GrantRef(0); 8];
            for (i, page) in pages.iter_mut().enumerate().take(indirect_pages(nr_segments)) {
                *page = gref(at.grefs + 4 * i);
            }
            Body::Indirect { transfer, sector, nr_segments, pages }
        }
        _ => return None,
    };
    Some(Request { id, body })
}

/// Puts bytes where a frontend would, and takes them out as a backend does.
fn through_ring(bytes: &[u8], layout: RingLayout) -> RawRequest {
    let (pages, first, second) = ring_pages(layout, 0);
    let (start, indices): (usize, &Arc<Pages>) = match &second {
        None => (16, &first),
        Some(control) => (0, control),
    };
    let stride = offsets(layout).stride;
    // Requests that leave as much as possible where ours is copied to: none of it may show through.
    let full = |operation, detail| [&[operation, detail, 0xff, 0xff], &[0xff; 124][..]].concat();
    let before = [full(0, 0xff), full(6, 0), full(5, 1)];
    for (n, slot) in before.iter().map(|slot| &slot[..]).chain([bytes]).enumerate() {
        for (k, word) in slot[..stride].chunks_exact(4).enumerate() {
            first.set(start + n * stride / 4 + k, number(word) as u32);
        }
    }
    let (mut requests, _responses) = back::attach(pages, layout, 0).unwrap();
    indices.set(0, 4);
    assert_eq!(requests.poll(), Ok(4));
    let mut raw = RawRequest::default();
    for _ in 0..4 {
        assert!(requests.pop_into(&mut raw));
    }
    raw
}

fn limits() -> impl Strategy<Value = Limits> {
    let size = prop_oneof![0..5000u64, any::<u64>()];
    let indirect = prop_oneof![Just(0), 1..=4096u16];
    (size, prop_oneof![Just(1u32), Just(8)], indirect, any::<bool>(), any::<bool>()).prop_map(
        |(sectors, granule, max_indirect_segments, read_only, discard)| Limits {
            sectors,
            granule,
            max_indirect_segments,
            read_only,
            discard,
        },
    )
}

/// Limits that the request in a slot just meets, or misses by one.
fn limits_near(bytes: &[u8], layout: RingLayout, limits: Limits, by: i8) -> Limits {
    let at = offsets(layout);
    let half = number(&bytes[2..4]) as u16;
    let length = match bytes[0] {
        5 => number(&bytes[at.body..][..8]),
        6 => u64::from(half),
        _ => (0..usize::from(bytes[1].min(at.room)))
            .map(|i| &bytes[at.body + 8 * i..])
            .map(|segment| u64::from(segment[5]).saturating_sub(segment[4].into()) + 1)
            .sum(),
    };
    let end = number(&bytes[at.sector..][..8]).wrapping_add(length);
    let sectors = end.wrapping_add_signed(by.into());
    let max_indirect_segments = half.wrapping_add_signed(by.into());
    // Only one of the two limits at a time, so that neither hides the other.
    if bytes[0] == 6 && limits.discard {
        Limits { max_indirect_segments, sectors: u64::MAX, ..limits }
    } else {
        Limits { sectors, max_indirect_segments: u16::MAX, ..limits }
    }
}

/// The bytes of a slot in which every field is likely to be near its limits.
fn slot() -> impl Strategy<Value = [u8; 112]> {
    let body =
        (any::<[u8; 32]>(), uniform32(any::<u8>()), uniform32(any::<u8>()), any::<[u8; 16]>());
    let near = (0..8u8, 0..14u8, prop_oneof![1 => Just(0), 5 => 0..300u16], 0..4096u64);
    let segments = vec(prop_oneof![9 => Just((0u8, 7u8)), 1 => (0..9u8, 0..9u8)], 11);
    (
        body,
        near,
        segments,
        [(); 5].map(|()| proptest::bool::weighted(0.9)),
        0..3usize,
        any::<bool>(),
    )
        .prop_map(
            |((a, b, c, d), (op, detail, half, sector), segments, tame, layout, whole)| {
                let mut bytes = [0; 112];
                bytes.copy_from_slice(&[&a[..], &b, &c, &d].concat());
                let at = offsets(LAYOUTS[layout]);
                if tame[0] {
                    bytes[0] = op;
                }
                if tame[1] {
                    bytes[1] = detail;
                }
                if tame[2] {
                    bytes[2..4].copy_from_slice(&half.to_le_bytes());
                }
                if tame[3] {
                    let sector = if whole { sector & !7 } else { sector };
                    bytes[at.sector..][..8].copy_from_slice(&sector.to_le_bytes());
                    if op == 5 {
                        bytes[at.body..][..8].copy_from_slice(&((sector / 2) & !7).to_le_bytes());
                    }
                }
                if tame[4] && op < 4 {
                    for (i, (first, last)) in segments.into_iter().enumerate().take(at.room.into())
                    {
                        let (first, last) = if whole { (0, 7) } else { (first, last) };
                        bytes[at.body + 8 * i + 4] = first;
                        bytes[at.body + 8 * i + 5] = last;
                    }
                }
                bytes
            },
        )
}

fn request(layout: RingLayout) -> impl Strategy<Value = Request> {
    let segment = (any::<u32>(), 0..8u8, 0..8u8)
        .prop_map(|(gref, a, b)| Segment::new(GrantRef(gref), a.min(b), a.max(b)));
    let transfer = prop_oneof![
        Just(Transfer::Read),
        Just(Transfer::Write),
        Just(Transfer::Barrier),
        Just(Transfer::FlushWrite)
    ];
    let sector = 0..1u64 << 62;
    let direct = (transfer, sector.clone(), vec(segment, 1..=layout.max_direct_segments()))
        .prop_map(|(transfer, sector, list)| {
            let mut segments = Segments::EMPTY;
            assert!(list.into_iter().all(|segment| segments.push(segment)));
            Body::Direct { transfer, sector, segments }
        });
    let indirect = (any::<bool>(), sector.clone(), 1..=4096u16, any::<[u32; 8]>()).prop_map(
        |(write, sector, nr_segments, grefs)| {
            let mut pages = [GrantRef(0); 8];
            for (page, gref) in pages.iter_mut().zip(grefs).take(indirect_pages(nr_segments)) {
                *page = GrantRef(gref);
            }
            let transfer = if write { Transfer::Write } else { Transfer::Read };
            Body::Indirect { transfer, sector, nr_segments, pages }
        },
    );
    let body = prop_oneof![
        direct,
        indirect,
        any::<bool>().prop_map(|barrier| Body::Flush { barrier }),
        (sector.clone(), sector, any::<bool>())
            .prop_map(|(sector, sectors, secure)| Body::Discard { sector, sectors, secure }),
    ];
    let ids = if layout == RingLayout::Split { u64::from(u32::MAX) } else { u64::MAX };
    (any::<u64>(), body).prop_map(move |(id, body)| Request { id: id & ids, body })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_slot_is_refused_or_obeys_the_rules(
        bytes in slot(), limits in limits(), edge in proptest::option::of(-1..=1i8),
    ) {
        for layout in LAYOUTS {
            let limits = edge.map_or(limits, |by| limits_near(&bytes, layout, limits, by));
            let raw = through_ring(&bytes, layout);
            let at = offsets(layout);
            match raw.validate(&limits) {
                Ok(request) => prop_assert_eq!(Some(request.to_owned()), oracle(&bytes, layout, &limits)),
                Err(refused) => {
                    prop_assert_eq!(None, oracle(&bytes, layout, &limits), "{}", refused);
                    prop_assert_eq!(refused.id, number(&bytes[at.id..][..at.id_len]));
                    let operation = if bytes[0] == 6 { bytes[1] } else { bytes[0] };
                    prop_assert_eq!(refused.operation, operation);
                }
            }
        }
    }

    #[test]
    fn a_valid_request_arrives_as_it_was_sent(
        (layout, request) in (0..3usize).prop_flat_map(|l| (Just(LAYOUTS[l]), request(LAYOUTS[l])))
    ) {
        let limits = Limits {
            sectors: u64::MAX,
            granule: 1,
            max_indirect_segments: 4096,
            read_only: false,
            discard: true,
        };
        let (pages, first, _control) = ring_pages(layout, 0);
        let (mut requests, _) = front::create(pages.clone(), layout, 0).unwrap();
        // Nothing that the slot held before may show through.
        for word in 16..64 {
            first.set(word, 0xdead_beef);
        }
        let (mut taker, _answers) = back::attach(pages, layout, 0).unwrap();
        requests.push(&request).unwrap();
        prop_assert!(requests.publish());
        prop_assert_eq!(taker.poll(), Ok(1));
        let raw = taker.pop().unwrap();
        prop_assert_eq!(raw.validate(&limits).map(|request| request.to_owned()), Ok(request));
    }

    #[test]
    fn indirect_segments_are_read_checked_and_written(
        pages in vec(any::<[u8; 6]>(), 0..600), tame in any::<bool>(),
        sector in 0..10_000u64, limits in limits(),
    ) {
        let mut bytes = Vec::new();
        for [a, b, c, d, first, last] in &pages {
            let (first, last) = if tame { (first % 4, 4 + last % 4) } else { (*first, *last) };
            bytes.extend([*a, *b, *c, *d, first, last, 0, 0]);
        }
        // A partial segment at the end is ignored.
        let segments: Vec<Segment> =
            decode_segments(&[&bytes[..], &[1, 2, 3]].concat()).collect();
        let again: Vec<u8> = segments.iter().flat_map(encode_segment).collect();
        prop_assert_eq!(&again, &bytes);
        let lengths: Option<Vec<u64>> = bytes
            .chunks(8)
            .map(|s| (s[4] <= s[5] && s[5] <= 7).then(|| u64::from(s[5] - s[4]) + 1))
            .collect();
        let granule = u64::from(limits.granule);
        let expected = lengths.and_then(|lengths| {
            let total: u64 = lengths.iter().sum();
            let aligned = lengths.iter().chain([&sector]).all(|n| n % granule == 0);
            (aligned && sector + total <= limits.sectors).then_some(total)
        });
        prop_assert_eq!(limits.check_segments(sector, &segments).ok(), expected);
    }
}
