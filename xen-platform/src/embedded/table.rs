//! The grant table, shared between a domain and those it grants to, and the active table, which only the
//! grantees and the broker see.
//!
//! The rules are those of Xen's common/grant_table.c and of Linux's drivers/xen/grant-table.c, v1.

use crate::{Access, Error, GrantStatus, Mapping, Result};
use ring_proto::abi::PAGE_SIZE;
use ring_proto::{DomId, GrantRef, SharedMemory, Words};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Frames of a grant table: Xen's default for `gnttab_max_frames`.
const TABLE_FRAMES: usize = 64;
/// Words of an entry of a grant table, and its bytes.
const ENTRY_WORDS: usize = 2;
const ENTRY_BYTES: usize = ENTRY_WORDS * size_of::<u32>();
/// Grant entries of a domain.
pub(super) const ENTRIES: u32 = (TABLE_FRAMES * PAGE_SIZE / ENTRY_BYTES) as u32;
/// `GNTTAB_NR_RESERVED_ENTRIES`: the first entries belong to the toolstack (console, xenstore).
pub(super) const RESERVED_ENTRIES: u32 = 8;

// grant_table.h, GTF_*
const TYPE_MASK: u32 = 3;
const PERMIT_ACCESS: u32 = 1;
const READONLY: u32 = 1 << 2;
const READING: u32 = 1 << 3;
const WRITING: u32 = 1 << 4;

/// `GNTST_general_error`: here, more pins than the active table can count.
const GENERAL_ERROR: i16 = -1;

/// `grant_entry_v1_t`.
struct Entry<'a> {
    /// flags in the low half, domid in the high half: one word, as both are compared and swapped at once.
    status: &'a AtomicU32,
    frame: &'a AtomicU32,
}
const _: () = assert!(cfg!(target_endian = "little"));

impl Entry<'_> {
    /// Whether `me` may use a grant with this status word.
    fn check(status: u32, me: DomId, access: Access) -> Result<(), GrantStatus> {
        if status & TYPE_MASK != PERMIT_ACCESS || status >> 16 != u32::from(me.0) {
            return Err(GrantStatus::BadRef);
        }
        if access == Access::ReadWrite && status & READONLY != 0 {
            return Err(GrantStatus::PermissionDenied);
        }
        Ok(())
    }

    /// Sets the in-use bits: Xen's `_set_status_v1`. The frame to use is read after that, when the
    /// granting domain can no longer take the grant back.
    fn start_use(&self, me: DomId, access: Access) -> Result<u32, GrantStatus> {
        let bits = in_use_bits(access);
        let mut seen = self.status.load(Ordering::Relaxed);
        // The owner may rewrite the word for ever: like Xen, give up after a few attempts.
        for _ in 0..START_USE_ATTEMPTS {
            Self::check(seen, me, access)?;
            match self.status.compare_exchange(
                seen,
                seen | bits,
                Ordering::SeqCst,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Ok(self.frame.load(Ordering::Relaxed)),
                Err(now) => seen = now,
            }
        }
        Err(GrantStatus::Other(GENERAL_ERROR))
    }
}

/// Xen retries `_set_status_v1` four times before it calls the guest unstable. Here threads of the
/// grantee race for the word as well.
const START_USE_ATTEMPTS: usize = 64;

fn in_use_bits(access: Access) -> u32 {
    match access {
        Access::ReadOnly => READING,
        Access::ReadWrite => READING | WRITING,
    }
}

/// A domain's grant table, mapped.
#[derive(Debug)]
pub struct GrantTable {
    memory: Arc<Mapping>,
    words: Words,
}

impl GrantTable {
    /// Size of its file, which is zeroed at first.
    pub const BYTES: usize = TABLE_FRAMES * PAGE_SIZE;

    /// Maps its file.
    ///
    /// # Errors
    /// As [`Mapping::whole`].
    pub fn map(file: BorrowedFd<'_>) -> Result<Self> {
        Mapping::whole(file).map(Self::of).map_err(|e| Error::io("map a grant table", e))
    }

    fn of(memory: Mapping) -> Self {
        let memory = Arc::new(memory);
        Self { words: Words::new(memory.clone()), memory }
    }

    pub(super) fn memory(&self) -> Arc<dyn SharedMemory> {
        self.memory.clone()
    }

    fn entry(&self, gref: GrantRef) -> Option<Entry<'_>> {
        let index = usize::try_from(gref.0).ok()?;
        let (entries, _) = self.words.as_chunks::<ENTRY_WORDS>();
        let [status, frame] = entries.get(index)?;
        Some(Entry { status, frame })
    }

    /// The owner's side: lets `peer` use `frame`.
    pub(super) fn permit(&self, gref: GrantRef, peer: DomId, frame: u32, access: Access) {
        if let Some(entry) = self.entry(gref) {
            let readonly = if access == Access::ReadOnly { READONLY } else { 0 };
            entry.frame.store(frame, Ordering::Relaxed);
            // Last, as grant_table.h asks: the flags make the entry valid.
            let status = u32::from(peer.0) << 16 | readonly | PERMIT_ACCESS;
            entry.status.store(status, Ordering::Release);
        }
    }

    /// The owner's side: takes the grant back, unless it is in use. This is Linux's
    /// `gnttab_end_foreign_access_ref_v1`.
    pub(super) fn revoke(&self, gref: GrantRef) -> bool {
        let Some(entry) = self.entry(gref) else { return true };
        entry
            .status
            .fetch_update(Ordering::SeqCst, Ordering::Relaxed, |s| {
                (s & (READING | WRITING) == 0).then_some(0)
            })
            .is_ok()
    }

    /// The broker's side, when the owner is dead: takes back all grants that are not in use.
    pub fn revoke_all(&self) {
        for gref in 0..ENTRIES {
            self.revoke(GrantRef(gref));
        }
    }
}

/// Which of a domain's grants are in use, and by whom: Xen's `struct active_grant_entry`.
///
/// One word per entry: readers in bits 0 to 15, writers in 16 to 31, the domain in 32 to 47, a lock in 63.
/// The domain lets the broker find what a dead process held. The granting domain never sees the table. The
/// first page is a header.
#[derive(Debug)]
pub struct ActiveTable(Mapping);

const READER: u64 = 1;
const WRITER: u64 = 1 << 16;
const COUNT_MASK: u64 = 0xffff;
const COUNTS_MASK: u64 = 0xffff_ffff;
const DOMID_SHIFT: u32 = 32;
const LOCK: u64 = 1 << 63;

/// The owner of a lock is between two atomic operations, unless it was preempted there.
const SPINS_BEFORE_YIELD: usize = 100;

impl ActiveTable {
    /// Size of its file, which is zeroed at first.
    pub const BYTES: usize = PAGE_SIZE + ENTRIES as usize * size_of::<AtomicU64>();

    /// Maps its file.
    ///
    /// # Errors
    /// As [`Mapping::whole`].
    pub fn map(file: BorrowedFd<'_>) -> Result<Self> {
        Mapping::whole(file).map(Self).map_err(|e| Error::io("map an active table", e))
    }

    fn word(&self, offset: usize) -> Option<&AtomicU64> {
        if offset.checked_add(size_of::<AtomicU64>())? > self.0.len() {
            return None;
        }
        let at = self.0.base().as_ptr().wrapping_add(offset).cast::<AtomicU64>();
        // SAFETY: within the mapping, which is page-aligned and lives as long as `self`; every
        // caller's offset is a multiple of 8.
        Some(unsafe { &*at })
    }

    fn entry(&self, gref: GrantRef) -> Option<&AtomicU64> {
        let index = usize::try_from(gref.0).ok()?;
        self.word(index.checked_mul(size_of::<AtomicU64>())?.checked_add(PAGE_SIZE)?)
    }

    /// Whether the granting domain is gone: no new use of its grants.
    pub(super) fn is_closed(&self) -> bool {
        self.word(0).is_none_or(|w| w.load(Ordering::Relaxed) != 0)
    }

    /// The broker's side, when the granting domain is gone: no new use of its grants.
    pub fn close(&self) {
        if let Some(word) = self.word(0) {
            word.store(1, Ordering::SeqCst);
        }
    }

    /// Starts a use of `gref` by `me`: counts it, sets the in-use bits in the grant table and
    /// returns the frame, which must lie below `frames`.
    pub(super) fn pin(
        &self,
        grants: &GrantTable,
        gref: GrantRef,
        me: DomId,
        access: Access,
        frames: u32,
    ) -> Result<u32, GrantStatus> {
        let (Some(entry), Some(active)) = (grants.entry(gref), self.entry(gref)) else {
            return Err(GrantStatus::BadRef);
        };
        // Before it is counted: an attempt on somebody else's grant must not get in that domain's way.
        Entry::check(entry.status.load(Ordering::Relaxed), me, access)?;
        count_up(active, me, access)?;
        let frame = entry.start_use(me, access);
        match frame {
            Ok(frame) if frame < frames => Ok(frame),
            refused => {
                count_down(active, &entry, access);
                refused.and(Err(GrantStatus::Other(GNTST_BAD_PAGE)))
            }
        }
    }

    /// Ends a use that [`ActiveTable::pin`] began. The in-use bits go with the last one.
    pub(super) fn unpin(&self, grants: &GrantTable, gref: GrantRef, access: Access) {
        if let (Some(entry), Some(active)) = (grants.entry(gref), self.entry(gref)) {
            count_down(active, &entry, access);
        }
    }

    /// The broker's side, when the process of `dead` is gone: ends all its uses.
    pub fn unpin_all(&self, grants: &GrantTable, dead: DomId) {
        for gref in (0..ENTRIES).map(GrantRef) {
            let (Some(entry), Some(active)) = (grants.entry(gref), self.entry(gref)) else {
                continue;
            };
            let word = active.load(Ordering::Acquire);
            if word != 0 && domain_of(word) == u64::from(dead.0) {
                entry.status.fetch_and(!(READING | WRITING), Ordering::SeqCst);
                active.store(0, Ordering::Release);
            }
        }
    }
}

/// `GNTST_bad_page`: the frame is not the granting domain's.
const GNTST_BAD_PAGE: i16 = -9;

fn domain_of(word: u64) -> u64 {
    (word & !LOCK) >> DOMID_SHIFT
}

fn one(access: Access) -> (u64, u32) {
    match access {
        Access::ReadOnly => (READER, READER.trailing_zeros()),
        Access::ReadWrite => (WRITER, WRITER.trailing_zeros()),
    }
}

/// The entry's word while nobody holds its lock.
fn unlocked(active: &AtomicU64) -> u64 {
    let mut spins = 0_usize;
    loop {
        let word = active.load(Ordering::Acquire);
        if word & LOCK == 0 {
            return word;
        }
        spins = spins.wrapping_add(1);
        if spins.is_multiple_of(SPINS_BEFORE_YIELD) {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}

fn count_up(active: &AtomicU64, me: DomId, access: Access) -> Result<(), GrantStatus> {
    let (step, shift) = one(access);
    let mine = u64::from(me.0) << DOMID_SHIFT;
    loop {
        let seen = active.load(Ordering::Acquire);
        if seen != 0 && domain_of(seen) != u64::from(me.0) {
            return Err(GrantStatus::BadRef);
        }
        if seen & LOCK != 0 {
            unlocked(active);
            continue;
        }
        if seen >> shift & COUNT_MASK == COUNT_MASK {
            return Err(GrantStatus::Other(GENERAL_ERROR));
        }
        let next = (seen | mine) + step;
        if active.compare_exchange(seen, next, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            return Ok(());
        }
    }
}

/// Counts one use less, and clears in-use bits that nobody needs any more. Meanwhile the entry is locked: a
/// use that began between the two would find its bits cleared.
fn count_down(active: &AtomicU64, entry: &Entry<'_>, access: Access) {
    let (step, shift) = one(access);
    loop {
        let seen = unlocked(active);
        if seen >> shift & COUNT_MASK == 0 {
            return; // the broker has already ended all our uses
        }
        let less = seen - step;
        let mut unused = 0;
        if less >> WRITER.trailing_zeros() & COUNT_MASK == 0 {
            unused |= WRITING;
        }
        if less & COUNTS_MASK == 0 {
            unused |= READING;
        }
        let next = if less & COUNTS_MASK == 0 { 0 } else { less };
        if unused & in_use_bits(access) == 0 {
            if active.compare_exchange(seen, next, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return;
            }
        } else if active
            .compare_exchange(seen, seen | LOCK, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
        {
            entry.status.fetch_and(!unused, Ordering::SeqCst);
            active.store(next, Ordering::Release);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER_FRAMES: u32 = 4;
    const B: DomId = DomId(2);
    const C: DomId = DomId(3);

    fn tables() -> (GrantTable, ActiveTable) {
        let zeroed = |bytes| Mapping::anonymous(bytes / PAGE_SIZE).expect("memory");
        (GrantTable::of(zeroed(GrantTable::BYTES)), ActiveTable(zeroed(ActiveTable::BYTES)))
    }

    #[test]
    fn a_process_that_dies_at_any_point_of_a_use_leaves_nothing() {
        let (grants, active) = tables();
        let gref = GrantRef(RESERVED_ENTRIES);
        let pin = |domid| active.pin(&grants, gref, domid, Access::ReadWrite, OWNER_FRAMES);
        grants.permit(gref, B, 1, Access::ReadWrite);
        let word = active.entry(gref).expect("in range");
        let status = &grants.entry(gref).expect("in range").status;
        let permitted = status.load(Ordering::Relaxed);

        // Counted, but the grant entry not yet marked; marked; about to be unmarked, and locked.
        let of_b = u64::from(B.0) << DOMID_SHIFT | WRITER;
        for (left, marks) in [(of_b, 0), (of_b, READING | WRITING), (of_b | LOCK, WRITING)] {
            word.store(left, Ordering::Relaxed);
            status.store(permitted | marks, Ordering::Relaxed);
            active.unpin_all(&grants, C);
            assert_eq!(word.load(Ordering::Relaxed), left, "it was not C's");
            active.unpin_all(&grants, B);
            assert_eq!(status.load(Ordering::Relaxed), permitted);
            assert_eq!(pin(B), Ok(1));
            active.unpin(&grants, gref, Access::ReadWrite);
            assert_eq!(word.load(Ordering::Relaxed), 0);
        }
        assert!(grants.revoke(gref));
    }

    #[test]
    fn a_grant_redirected_while_in_use_is_refused_to_its_new_domain() {
        let (grants, active) = tables();
        let gref = GrantRef(RESERVED_ENTRIES);
        let pin = |domid| active.pin(&grants, gref, domid, Access::ReadOnly, OWNER_FRAMES);
        grants.permit(gref, B, 1, Access::ReadWrite);
        assert_eq!(pin(B), Ok(1));
        grants.permit(gref, C, 2, Access::ReadWrite);
        assert_eq!(pin(C), Err(GrantStatus::BadRef));
        active.unpin(&grants, gref, Access::ReadOnly);
        assert_eq!(pin(C), Ok(2));
    }

    #[test]
    fn uses_are_counted_up_to_the_limit_and_not_beyond() {
        let (grants, active) = tables();
        let gref = GrantRef(RESERVED_ENTRIES);
        let pin = |access| active.pin(&grants, gref, B, access, OWNER_FRAMES);
        grants.permit(gref, B, 1, Access::ReadWrite);
        for _ in 0..COUNT_MASK {
            assert_eq!(pin(Access::ReadOnly), Ok(1));
        }
        assert_eq!(pin(Access::ReadOnly), Err(GrantStatus::Other(GENERAL_ERROR)));
        assert_eq!(pin(Access::ReadWrite), Ok(1));
        active.unpin(&grants, gref, Access::ReadWrite);
        for _ in 0..COUNT_MASK {
            assert!(!grants.revoke(gref));
            active.unpin(&grants, gref, Access::ReadOnly);
        }
        // One more than there were: the count stays at zero.
        active.unpin(&grants, gref, Access::ReadOnly);
        assert!(grants.revoke(gref));
    }
}
