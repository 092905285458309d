//! Encodes and decodes requests and responses in the words of a slot.

use crate::abi::{Segment, op};
use crate::layout::{Abi, Fields, SPLIT, SPLIT_RESPONSE_WORDS, X86_32, X86_64};
use crate::request::{Body, RawRequest, Request, Response, Status};
use crate::shared::Word;
use crate::{GrantRef, RingLayout, indirect_pages};
use core::ops::Deref;
#[cfg(not(loom))]
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Compiles `$code` once per layout, so that field offsets are constants.
macro_rules! each_layout {
    ($layout:expr, $words:ident, $fields:ident => $code:expr) => {
        match $layout {
            RingLayout::Union(Abi::X86_64) => {
                each_layout!(UNION_64, &X86_64, $words, $fields, $code)
            }
            RingLayout::Union(Abi::X86_32) => {
                each_layout!(UNION_32, &X86_32, $words, $fields, $code)
            }
            RingLayout::Split => each_layout!(RingLayout::Split, &SPLIT, $words, $fields, $code),
        }
    };
    ($layout:expr, $its_fields:expr, $words:ident, $fields:ident, $code:expr) => {{
        const $words: usize = $layout.request_words();
        let $fields = $its_fields;
        $code
    }};
}

/// Words of a response, which is as long in both ABIs.
const UNION_RESPONSE_WORDS: usize = 3;
const UNION_64: RingLayout = RingLayout::Union(Abi::X86_64);
const UNION_32: RingLayout = RingLayout::Union(Abi::X86_32);

/// A slot as an array of its layout's length, which every slot has. With the length known at compile
/// time there is no bounds check per word.
#[inline]
fn whole<T, const WORDS: usize>(slot: &[T]) -> &[T; WORDS] {
    slot.first_chunk().unwrap_or_else(|| unreachable!("a slot of {WORDS} words"))
}

/// Never reads beyond the slot: a layout's fields lie within its stride.
#[inline]
fn load(slot: &[Word], word: usize) -> u32 {
    slot.get(word).map_or(0, Word::get)
}

#[inline]
fn store(slot: &[Word], word: usize, value: u32) {
    if let Some(w) = slot.get(word) {
        w.set(value);
    }
}

#[inline]
fn load_wide(slot: &[Word], word: usize) -> u64 {
    u64::from(load(slot, word)) | u64::from(load(slot, word + 1)) << 32
}

#[inline]
fn store_wide(slot: &[Word], word: usize, value: u64) {
    store(slot, word, value as u32);
    store(slot, word + 1, (value >> 32) as u32);
}

#[inline]
fn store_head(slot: &[Word], operation: u8, detail: u8, half: u16) {
    let [low, high] = half.to_le_bytes();
    store(slot, 0, u32::from_le_bytes([operation, detail, low, high]));
}

#[inline]
fn store_id(slot: &[Word], fields: &Fields, id: u64) {
    if fields.wide_id {
        store_wide(slot, fields.id, id);
    } else {
        store(slot, fields.id, id as u32);
    }
}

/// Copies a request out of its slot. Each word is read once, and the copy decides how many (XSA-155).
#[inline]
pub(crate) fn decode_request(slot: &[Word], layout: RingLayout, raw: &mut RawRequest) {
    each_layout!(layout, WORDS, fields => {
        let slot: &[_; WORDS] = whole(slot);
        decode_fields(|word| load(slot, word), fields, raw);
    });
}

/// As [`decode_request`], and writes each word that it reads to the same place in `copy`.
#[cfg(not(loom))]
#[inline]
pub(crate) fn decode_request_to(
    slot: &[Word],
    layout: RingLayout,
    copy: &[AtomicU32],
    raw: &mut RawRequest,
) {
    each_layout!(layout, WORDS, fields => {
        let (slot, copy): (&[_; WORDS], &[_; WORDS]) = (whole(slot), whole(copy));
        let tee = |word| {
            let value = load(slot, word);
            if let Some(to) = copy.get(word) {
                to.store(value, Relaxed);
            }
            value
        };
        decode_fields(tee, fields, raw);
    });
}

/// Decodes what [`decode_request_to`] wrote: which words are read depends only on words read before.
#[cfg(not(loom))]
pub(crate) fn decode_copy(copy: &[AtomicU32], layout: RingLayout, raw: &mut RawRequest) {
    decode_fields(|word| copy.get(word).map_or(0, |from| from.load(Relaxed)), layout.fields(), raw);
}

#[inline(always)]
fn decode_fields(load: impl Fn(usize) -> u32, fields: &Fields, raw: &mut RawRequest) {
    let load_wide = |word| u64::from(load(word)) | u64::from(load(word + 1)) << 32;
    let [operation, detail, low, high] = load(0).to_le_bytes();
    raw.operation = operation;
    raw.detail = detail;
    raw.half = u16::from_le_bytes([low, high]);
    raw.id = if fields.wide_id { load_wide(fields.id) } else { u64::from(load(fields.id)) };
    raw.sector = load_wide(fields.sector);
    raw.room = fields.segments as u8;
    match operation {
        op::INDIRECT => {
            for (k, gref) in raw.pages.iter_mut().take(indirect_pages(raw.half)).enumerate() {
                *gref = GrantRef(load(fields.indirect_grefs + k));
            }
        }
        op::DISCARD => raw.sectors = load_wide(fields.body),
        _ => {
            let count = usize::from(detail).min(fields.segments);
            raw.set_segments(count, |k| {
                let gref = GrantRef(load(fields.body + 2 * k));
                let [first, last, _, _] = load(fields.body + 2 * k + 1).to_le_bytes();
                Segment::new(gref, first, last)
            });
        }
    }
}

/// Writes a request into its slot.
#[inline(always)]
pub(crate) fn encode_request<S: Deref<Target = [Segment]>>(
    slot: &[Word],
    layout: RingLayout,
    request: &Request<S>,
) {
    each_layout!(layout, WORDS, fields => {
        encode_fields(whole::<_, WORDS>(slot), fields, request);
    });
}

#[inline(always)]
fn encode_fields<S: Deref<Target = [Segment]>>(
    slot: &[Word],
    fields: &Fields,
    request: &Request<S>,
) {
    let body = fields.body;
    let sector = match &request.body {
        Body::Direct { transfer, sector, segments } => {
            store_head(slot, transfer.operation(), segments.len() as u8, 0);
            for (k, segment) in segments.iter().take(fields.segments).enumerate() {
                store(slot, body + 2 * k, segment.gref.0);
                let sects = [segment.first_sect, segment.last_sect, 0, 0];
                store(slot, body + 2 * k + 1, u32::from_le_bytes(sects));
            }
            *sector
        }
        Body::Indirect { transfer, sector, nr_segments, pages } => {
            store_head(slot, op::INDIRECT, transfer.operation(), *nr_segments);
            // `handle`, which is here and not in the first word.
            store(slot, body, 0);
            for (k, gref) in pages.iter().take(indirect_pages(*nr_segments)).enumerate() {
                store(slot, fields.indirect_grefs + k, gref.0);
            }
            *sector
        }
        Body::Flush { .. } => {
            store_head(slot, request.response_operation(), 0, 0);
            0
        }
        Body::Discard { sector, sectors, secure } => {
            store_head(slot, op::DISCARD, u8::from(*secure), 0);
            store_wide(slot, body, *sectors);
            *sector
        }
    };
    store_id(slot, fields, request.id);
    store_wide(slot, fields.sector, sector);
}

/// Writes a response into its slot field by field: the rest of the slot is left alone, and none of our
/// padding leaks to the peer (XSA-216).
#[inline]
pub(crate) fn encode_response(slot: &[Word], layout: RingLayout, response: &Response) {
    let [low, high] = (response.status as i16).to_le_bytes();
    let tail = u32::from_le_bytes([response.operation, 0, low, high]);
    match layout {
        RingLayout::Union(_) => {
            let slot: &[_; UNION_RESPONSE_WORDS] = whole(slot);
            store_wide(slot, 0, response.id);
            store(slot, 2, tail);
        }
        RingLayout::Split => {
            let slot: &[_; SPLIT_RESPONSE_WORDS] = whole(slot);
            store(slot, 0, response.id as u32);
            store(slot, 1, tail);
        }
    }
}

/// Copies a response out of its slot.
#[inline]
pub(crate) fn decode_response(slot: &[Word], layout: RingLayout) -> Response {
    let (id, tail) = match layout {
        RingLayout::Union(_) => {
            let slot: &[_; UNION_RESPONSE_WORDS] = whole(slot);
            (load_wide(slot, 0), load(slot, 2))
        }
        RingLayout::Split => {
            let slot: &[_; SPLIT_RESPONSE_WORDS] = whole(slot);
            (u64::from(load(slot, 0)), load(slot, 1))
        }
    };
    let [operation, _, low, high] = tail.to_le_bytes();
    Response { id, operation, status: Status::from_wire(i16::from_le_bytes([low, high])) }
}
