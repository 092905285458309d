//! The requests that were taken from a ring and have not been answered.
//!
//! This is the ring thread's table of them, and a record for its successor: if its memory is a
//! file's ([`Mapping`](xen_platform::Mapping)), it outlives the process, and a frontend that cannot
//! reissue its requests is served on as if nothing had happened. The ring alone does not tell which
//! requests are open: responses overwrite requests, and requests are answered in any order.
//! vhost-user keeps the same for split virtqueues (its inflight region).
//!
//! A request is copied from the ring straight into its entry, so the record costs a few plain stores.
//! The stores, in order:
//!
//! - taken: the copy and its number, `Taken`, then the header's count of requests taken;
//! - answered: `Answered` with the number of its response; the response; after some of those
//!   `rsp_prod` on the shared page, **which is the commit**; `Free`.
//!
//! A successor takes an entry as done if it is `Free` or its response lies before the shared
//! `rsp_prod`. Any other entry is outstanding, in the frontend's eyes too, so it may be carried out
//! once more: nothing that the frontend may rely on has happened yet.
//!
//! A killed thread stops between two instructions: all stores before that point are in memory, and
//! none after it. Other threads cannot see another order, because none looks before this one has
//! ended. So no CPU fence is needed; a compiler fence (`compiler_fence`, as against a signal handler
//! of the same thread) suffices.

use ring_proto::abi::PAGE_SIZE;
use ring_proto::{RawRequest, RequestConsumer, RingError, RingLayout, SharedMemory, Words};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, compiler_fence};
use xen_platform::LocalRegion;

const WORD: usize = size_of::<AtomicU32>();
/// "blkR" in the file. Written last, when the rest is complete.
const MAGIC: u32 = u32::from_le_bytes(*b"blkR");
/// Of the format below. Records of other versions are not used.
const VERSION: u32 = 1;

/// Words of the header, which takes a page.
mod header {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 1;
    /// Length in bytes of the string at [`IDENTITY`].
    pub(super) const IDENTITY_LEN: usize = 2;
    /// Number of the next request to be taken. On a cache line of its own.
    pub(super) const REQ_CONS: usize = 16;
    /// Which ring of which connection.
    pub(super) const IDENTITY: usize = 32;
    pub(super) const WORDS: usize = super::PAGE_SIZE / super::WORD;
}

/// Words of an entry: two cache lines, of which a request of up to four segments takes one.
mod entry {
    pub(super) const STATE: usize = 0;
    /// The request's number on the ring.
    pub(super) const INDEX: usize = 1;
    /// The request's words.
    pub(super) const REQUEST: usize = 2;
    pub(super) const WORDS: usize = 32;
}

/// The state of an entry's request, in one word so that it changes atomically.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Free,
    Taken,
    /// The number of its response, modulo [`State::NUMBERS`].
    Answered(u32),
}

impl State {
    const TAKEN: u32 = 1 << 30;
    const ANSWERED: u32 = 2 << 30;
    /// Response numbers are kept modulo this; no two entries are further apart than the ring's length.
    const NUMBERS: u32 = 1 << 30;

    const fn encode(self) -> u32 {
        match self {
            Self::Free => 0,
            Self::Taken => Self::TAKEN,
            Self::Answered(number) => Self::ANSWERED | (number % Self::NUMBERS),
        }
    }

    const fn decode(word: u32) -> Option<Self> {
        match word {
            0 => Some(Self::Free),
            Self::TAKEN => Some(Self::Taken),
            _ if word & !(Self::NUMBERS - 1) == Self::ANSWERED => {
                Some(Self::Answered(word % Self::NUMBERS))
            }
            _ => None,
        }
    }
}

/// Why a record does not match a ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Misfit {
    /// Not a record, an unfinished one, or one of another format.
    #[error("it is none of this version")]
    Format,
    /// A record of another ring or another connection.
    #[error("it is of another connection")]
    Identity,
    /// An impossible entry.
    #[error("entry {0} is damaged")]
    Entry(u16),
    /// The ring was meanwhile served without this record.
    #[error("{open} requests are open, but {taken} were taken and {answered} answered")]
    Count {
        /// Entries of requests that are not answered.
        open: usize,
        /// Requests taken.
        taken: u32,
        /// Responses published.
        answered: u32,
    },
    /// The frontend has withdrawn requests that were already taken.
    #[error("more requests were taken than there are")]
    Unpublished,
    /// The frontend broke the ring.
    #[error(transparent)]
    Ring(#[from] RingError),
}

/// A ring's requests, by tag, from when they are taken until their responses are published.
pub struct Inflight {
    words: Words,
    layout: RingLayout,
    free: Vec<u16>,
    /// Taken but not started, the oldest last: requests that were open when this process took over
    /// the ring, or one that cannot start yet.
    waiting: Vec<u16>,
    /// Answered, but the response is not yet published.
    answered: Vec<u16>,
}

impl Inflight {
    /// Bytes of memory for a ring of so many slots: a page, and 128 bytes per slot.
    pub const fn bytes(slots: u32) -> usize {
        ((header::WORDS + slots as usize * entry::WORDS) * WORD).next_multiple_of(PAGE_SIZE)
    }

    /// The longest identity that fits in a record, in bytes.
    pub const MAX_IDENTITY: usize = (header::WORDS - header::IDENTITY) * WORD;

    /// A table in memory of this process, for a frontend that reissues its requests by itself.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn private(requests: &RequestConsumer) -> xen_platform::Result<Self> {
        let memory = LocalRegion::new(Self::bytes(requests.slots()) / PAGE_SIZE)?;
        Ok(Self::create(Arc::new(memory), requests, ""))
    }

    /// A new record in `memory`, which must be zeroed and [`Self::bytes`] long, for a ring on which
    /// every request taken has been answered.
    ///
    /// # Panics
    /// If the memory is too short, or `identity` too long.
    pub fn create(
        memory: Arc<dyn SharedMemory>,
        requests: &RequestConsumer,
        identity: &str,
    ) -> Self {
        let words = Words::new(memory);
        assert!(identity.len() <= Self::MAX_IDENTITY, "the identity fits");
        for (word, bytes) in words[header::IDENTITY..].iter().zip(identity.as_bytes().chunks(WORD))
        {
            word.store(pack(bytes), Relaxed);
        }
        words[header::IDENTITY_LEN].store(identity.len() as u32, Relaxed);
        words[header::REQ_CONS].store(requests.index(), Relaxed);
        words[header::VERSION].store(VERSION, Relaxed);
        commit(&words[header::MAGIC], MAGIC);
        Self::over(words, requests, (0..requests.slots() as u16).rev().collect(), Vec::new())
    }

    /// Takes over the record in `memory`. `requests` must be as attached, at the shared `rsp_prod`; it
    /// is moved past the requests that were taken.
    ///
    /// # Errors
    /// Why the record is not used; `requests` is then as before.
    pub fn recover(
        memory: Arc<dyn SharedMemory>,
        requests: &mut RequestConsumer,
        identity: &str,
    ) -> Result<Self, Misfit> {
        let slots = requests.slots();
        if memory.len() != Self::bytes(slots) {
            return Err(Misfit::Format);
        }
        let words = Words::new(memory);
        let at = |word: usize| words[word].load(Relaxed);
        if at(header::MAGIC) != MAGIC || at(header::VERSION) != VERSION {
            return Err(Misfit::Format);
        }
        let same_length = at(header::IDENTITY_LEN) as usize == identity.len();
        let mut found =
            words[header::IDENTITY..header::WORDS].iter().map(|word| word.load(Relaxed));
        if !same_length || !identity.as_bytes().chunks(WORD).all(|b| found.next() == Some(pack(b)))
        {
            return Err(Misfit::Identity);
        }

        let answered = requests.index();
        let (mut open, mut free) = (Vec::new(), Vec::with_capacity(slots as usize));
        for tag in (0..slots as u16).rev() {
            let entry = entry(&words, tag);
            let state = State::decode(entry[entry::STATE].load(Relaxed));
            if is_open(state, answered, slots).ok_or(Misfit::Entry(tag))? {
                open.push((entry[entry::INDEX].load(Relaxed), tag));
            } else {
                free.push(tag);
            }
        }
        let mut taken = at(header::REQ_CONS);
        // It ended between storing the entry and the count.
        if open.iter().any(|&(index, _)| index == taken) {
            taken = taken.wrapping_add(1);
        }
        if taken.wrapping_sub(answered) as usize != open.len() {
            return Err(Misfit::Count { open: open.len(), taken, answered });
        }
        open.sort_unstable_by_key(|&(index, _)| taken.wrapping_sub(index));
        if let Some(twice) = open.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(Misfit::Entry(twice[1].1));
        }
        requests.poll()?;
        if !requests.skip(open.len() as u32) {
            return Err(Misfit::Unpublished);
        }

        // A process that ends here leaves a record with the same meaning.
        commit(&words[header::REQ_CONS], taken);
        for &(_, tag) in &open {
            commit(&entry(&words, tag)[entry::STATE], State::Taken.encode());
        }
        for &tag in &free {
            commit(&entry(&words, tag)[entry::STATE], State::Free.encode());
        }
        let waiting = open.into_iter().map(|(_, tag)| tag).collect();
        Ok(Self::over(words, requests, free, waiting))
    }

    fn over(
        words: Words,
        requests: &RequestConsumer,
        free: Vec<u16>,
        mut waiting: Vec<u16>,
    ) -> Self {
        let slots = requests.slots() as usize;
        let answered = Vec::with_capacity(slots);
        waiting.reserve(slots - waiting.len());
        Self { words, layout: requests.layout(), free, waiting, answered }
    }

    /// Takes the next of the requests that `requests` has seen into `raw`, and returns its tag. The
    /// request is recorded when this returns.
    pub(super) fn take(
        &mut self,
        requests: &mut RequestConsumer,
        raw: &mut RawRequest,
    ) -> Option<u16> {
        // Requests taken whose responses are not published number at most as many as there are slots,
        // so for every request there is a free tag.
        let &tag = self.free.last()?;
        let entry = entry(&self.words, tag);
        let index = requests.index();
        if !requests.pop_to(raw, &entry[entry::REQUEST..]) {
            return None;
        }
        self.free.pop();
        entry[entry::INDEX].store(index, Relaxed);
        commit(&entry[entry::STATE], State::Taken.encode());
        commit(&self.words[header::REQ_CONS], index.wrapping_add(1));
        Some(tag)
    }

    /// Number of requests taken but not started.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The oldest of them, as [`Self::take`] returned it.
    pub(super) fn resume(&mut self, raw: &mut RawRequest) -> Option<u16> {
        let tag = self.waiting.pop()?;
        let copy = &entry(&self.words, tag)[entry::REQUEST..];
        *raw = RawRequest::from_copy(copy, self.layout);
        Some(tag)
    }

    /// Postpones a request; it becomes the oldest of those not started.
    pub(super) fn put_off(&mut self, tag: u16) {
        self.waiting.push(tag);
    }

    /// Records that the response to request `tag` will be number `response`, about to be pushed.
    pub(super) fn answer(&mut self, tag: u16, response: u32) {
        let state = State::Answered(response).encode();
        commit(&entry(&self.words, tag)[entry::STATE], state);
        self.answered.push(tag);
    }

    /// The responses so far are published: frees their tags.
    pub(super) fn published(&mut self) {
        for tag in self.answered.drain(..) {
            commit(&entry(&self.words, tag)[entry::STATE], State::Free.encode());
            self.free.push(tag);
        }
    }
}

/// Whether an entry's request has no published response, given the shared `rsp_prod`, `published`.
fn is_open(state: Option<State>, published: u32, slots: u32) -> Option<bool> {
    match state? {
        State::Free => Some(false),
        State::Taken => Some(true),
        State::Answered(number) => {
            let ahead = number.wrapping_sub(published) % State::NUMBERS;
            let behind = published.wrapping_sub(number) % State::NUMBERS;
            if ahead < slots { Some(true) } else { (behind <= slots).then_some(false) }
        }
    }
}

fn entry(words: &[AtomicU32], tag: u16) -> &[AtomicU32; entry::WORDS] {
    &words[header::WORDS..].as_chunks().0[usize::from(tag)]
}

/// Packs up to four bytes into a word.
fn pack(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte))
}

/// Stores a word after all earlier stores and before all later ones, as seen by a process that looks
/// after this thread has ended.
fn commit(word: &AtomicU32, value: u32) {
    compiler_fence(SeqCst);
    word.store(value, Relaxed);
    compiler_fence(SeqCst);
    #[cfg(test)]
    tests::may_end_here();
}

const _: () = {
    use ring_proto::Abi;
    let room = entry::WORDS - entry::REQUEST;
    assert!(RingLayout::Union(Abi::X86_64).request_words() <= room);
    assert!(RingLayout::Union(Abi::X86_32).request_words() <= room);
    assert!(RingLayout::Split.request_words() <= room);
};

#[cfg(test)]
mod tests;
