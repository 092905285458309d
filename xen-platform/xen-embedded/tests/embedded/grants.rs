//! What a grant allows, and for how long.

use super::*;
use xen_platform::{Access, CopyDirection, CopySegment, Error, GrantStatus, LocalRegion, Platform};

/// Why a single grant cannot be mapped.
fn refusal(domain: &EmbeddedPlatform, peer: DomId, gref: GrantRef, access: Access) -> GrantStatus {
    match domain.map(peer, &[gref], access) {
        Err(Error::Grant { peer: p, gref: g, status }) if p == peer && g == gref => status,
        other => unreachable!("{other:?}"),
    }
}

fn segment(gref: GrantRef, direction: CopyDirection) -> CopySegment {
    let status = Err(GrantStatus::NotAttempted);
    CopySegment { gref, offset: 0, len: 4096, local: 0, direction, status }
}

#[test]
fn pages_are_shared_with_whom_they_were_granted_to_and_nobody_else() {
    let host = TestHost::start();
    let (a, b, c) = (host.guest("a"), host.guest("b"), host.guest("c"));
    let pages = a.grant(b.domid(), 3, Access::ReadWrite).unwrap();
    let ours = pages.memory();
    // Shuffled, so that the frames are not consecutive.
    let refs = [pages.refs()[2], pages.refs()[0], pages.refs()[1]];

    let mapped: Arc<dyn SharedMemory> = b.map(a.domid(), &refs, Access::ReadWrite).unwrap();
    fill_page(&ours, 2, 7);
    fill_page(&mapped, 1, 9);
    assert_eq!(read_page(&mapped, 0), [7; PAGE_SIZE]);
    assert_eq!(read_page(&ours, 0), [9; PAGE_SIZE]);
    assert_eq!(read_page(&ours, 1), [0; PAGE_SIZE]);

    assert_eq!(refusal(&c, a.domid(), refs[0], Access::ReadOnly), GrantStatus::BadRef);
    for nothing in [GrantRef(0), GrantRef(100), GrantRef(32768), GrantRef(u32::MAX)] {
        assert_eq!(refusal(&b, a.domid(), nothing, Access::ReadOnly), GrantStatus::BadRef);
    }
    assert_eq!(refusal(&b, DomId(99), refs[0], Access::ReadOnly), GrantStatus::BadDomain);

    let readonly = a.grant(b.domid(), 1, Access::ReadOnly).unwrap();
    let gref = readonly.refs()[0];
    assert_eq!(refusal(&b, a.domid(), gref, Access::ReadWrite), GrantStatus::PermissionDenied);
    b.map(a.domid(), &[gref], Access::ReadOnly).unwrap();
}

/// Whoever uses a grant has a descriptor of all of the granting domain's memory: only driver domains may have
/// one, and none of their own.
#[test]
fn only_driver_domains_use_what_others_grant() {
    let host = TestHost::start();
    let a = host.guest("a");
    host.create("plain", OnCrash::Destroy);
    let plain = EmbeddedPlatform::attach(&host.dir, "plain").unwrap();
    for (from, to) in [(&a, &plain), (&a, &a)] {
        let pages = from.grant(to.domid(), 1, Access::ReadWrite).unwrap();
        assert_eq!(
            refusal(to, from.domid(), pages.refs()[0], Access::ReadWrite),
            GrantStatus::BadDomain
        );
    }
}

#[test]
fn a_grant_in_use_cannot_be_taken_back() {
    let host = TestHost::start();
    let (a, b) = (host.guest("a"), host.guest("b"));
    let pages = a.grant(b.domid(), 2, Access::ReadWrite).unwrap();
    let refs = pages.refs().to_vec();
    fill_page(&pages.memory(), 1, 5);

    let reader = b.map(a.domid(), &refs[1..], Access::ReadOnly).unwrap();
    let flags = |gref| entry(&a, gref).flags;
    assert_eq!(flags(refs[1]), GTF_PERMIT_ACCESS | GTF_READING);
    let writer = b.map(a.domid(), &refs[1..], Access::ReadWrite).unwrap();
    assert_eq!(flags(refs[1]), GTF_PERMIT_ACCESS | GTF_READING | GTF_WRITING);
    drop(writer);
    assert_eq!(flags(refs[1]), GTF_PERMIT_ACCESS | GTF_READING);

    let (pages, error) = pages.revoke().unwrap_err();
    assert!(matches!(error, Error::StillMapped { gref } if gref == refs[1]));
    // Given back unchanged: the other page can still be mapped.
    drop(b.map(a.domid(), &refs[..1], Access::ReadWrite).unwrap());
    drop(reader);
    assert_eq!(flags(refs[1]), GTF_PERMIT_ACCESS);
    pages.revoke().map_err(|(_, e)| e).unwrap();
    assert_eq!(flags(refs[1]), 0);
    assert_eq!(refusal(&b, a.domid(), refs[1], Access::ReadOnly), GrantStatus::BadRef);

    // Whoever gets the pages next sees nothing of their contents.
    let pages = a.grant(b.domid(), 256, Access::ReadOnly).unwrap();
    for n in 0..256 {
        assert_eq!(read_page(&pages.memory(), n), [0; PAGE_SIZE]);
    }
}

#[test]
fn pages_dropped_while_mapped_are_not_used_again_before_they_are_unmapped() {
    let host = TestHost::start();
    let (a, b) = (host.guest("a"), host.guest("b"));
    let pages = a.grant(b.domid(), 200, Access::ReadWrite).unwrap();
    let mapped = b.map(a.domid(), pages.refs(), Access::ReadWrite).unwrap();
    drop(pages);
    let full = a.grant(b.domid(), 200, Access::ReadWrite);
    assert!(matches!(full, Err(Error::Exhausted { what: "pages", limit: 256 })), "{full:?}");
    drop(mapped);
    assert_eq!(a.grant(b.domid(), 200, Access::ReadWrite).unwrap().refs().len(), 200);
}

#[test]
fn copies_obey_the_rules_of_maps() {
    let host = TestHost::start();
    let (a, b, c) = (host.guest("a"), host.guest("b"), host.guest("c"));
    let writable = a.grant(b.domid(), 1, Access::ReadWrite).unwrap();
    let readable = a.grant(b.domid(), 1, Access::ReadOnly).unwrap();
    let foreign = a.grant(c.domid(), 1, Access::ReadWrite).unwrap();
    fill_page(&readable.memory(), 0, 3);
    let (w, r, f) = (writable.refs()[0], readable.refs()[0], foreign.refs()[0]);
    let local = Arc::new(LocalRegion::new(2).unwrap());
    let (to, from) = (CopyDirection::ToPeer, CopyDirection::FromPeer);

    let mut segments = [
        segment(r, from),
        CopySegment { offset: 4000, len: 96, ..segment(w, to) },
        segment(r, to),
        segment(f, from),
        CopySegment { offset: 1, ..segment(w, from) },
        CopySegment { local: 4097, ..segment(w, from) },
        CopySegment { local: usize::MAX, ..segment(w, from) },
        CopySegment { offset: u16::MAX, len: u16::MAX, ..segment(w, from) },
        CopySegment { local: 8192, len: 0, ..segment(w, from) },
    ];
    let mut copier = b.copier(a.domid()).unwrap();
    copier.copy(&local, &mut segments).unwrap();
    let bad_range = Err(GrantStatus::BadRange);
    assert_eq!(
        segments.map(|s| s.status),
        [
            Ok(()),
            Ok(()),
            Err(GrantStatus::PermissionDenied),
            Err(GrantStatus::BadRef),
            bad_range,
            bad_range,
            bad_range,
            bad_range,
            Ok(()),
        ]
    );
    let local: Arc<dyn SharedMemory> = local;
    assert_eq!(read_page(&local, 0), [3; PAGE_SIZE]);
    let written = read_page(&writable.memory(), 0);
    assert_eq!((&written[..4000], &written[4000..]), (&[0; 4000][..], &[3; 96][..]));
    // Nothing stays in use.
    for pages in [writable, readable, foreign] {
        pages.revoke().map_err(|(_, e)| e).unwrap();
    }
}

#[test]
fn a_guest_that_writes_nonsense_into_its_grant_table_harms_only_itself() {
    let host = TestHost::start();
    let (a, b) = (host.guest("a"), host.guest("b"));
    let pages = a.grant(b.domid(), 1, Access::ReadWrite).unwrap();
    let gref = pages.refs()[0];
    let good = entry(&a, gref);
    assert_eq!((good.flags, good.domid), (GTF_PERMIT_ACCESS, b.domid().0));

    for frame in [256, u32::MAX] {
        write_entry(&a, gref, Entry { frame, ..good });
        assert_eq!(refusal(&b, a.domid(), gref, Access::ReadOnly), GrantStatus::Other(-9));
        assert_eq!(entry(&a, gref), Entry { frame, ..good }, "no in-use bit may stay");
    }
    for flags in [0, 2, 3, u16::MAX] {
        write_entry(&a, gref, Entry { flags, ..good });
        assert_eq!(refusal(&b, a.domid(), gref, Access::ReadOnly), GrantStatus::BadRef);
    }
    // Changed while it is mapped: the mapping stays, and unmapping works.
    write_entry(&a, gref, good);
    let mapped: Arc<dyn SharedMemory> = b.map(a.domid(), &[gref], Access::ReadWrite).unwrap();
    write_entry(&a, gref, Entry { flags: 0, domid: 0, frame: u32::MAX });
    fill_page(&mapped, 0, 1);
    assert_eq!(read_page(&pages.memory(), 0), [1; PAGE_SIZE]);
    drop(mapped);
}

#[test]
fn threads_that_use_one_grant_at_once_leave_it_unused() {
    let host = TestHost::start();
    let (a, b) = (host.guest("a"), host.guest("b"));
    let pages = a.grant(b.domid(), 1, Access::ReadWrite).unwrap();
    let gref = pages.refs()[0];
    std::thread::scope(|scope| {
        for direction in [CopyDirection::FromPeer, CopyDirection::ToPeer, CopyDirection::FromPeer] {
            let (b, a) = (&b, &a);
            scope.spawn(move || {
                let local = LocalRegion::new(1).unwrap();
                let mut copier = b.copier(a.domid()).unwrap();
                for _ in 0..20_000 {
                    let mut segments = [CopySegment { len: 64, ..segment(gref, direction) }];
                    copier.copy(&local, &mut segments).unwrap();
                    assert_eq!(segments[0].status, Ok(()));
                }
            });
        }
    });
    assert_eq!(entry(&a, gref).flags, GTF_PERMIT_ACCESS);
    pages.revoke().map_err(|(_, e)| e).unwrap();
}
