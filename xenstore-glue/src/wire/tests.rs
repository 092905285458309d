use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn path() -> impl Strategy<Value = Path> {
    "[/@]?[a-zA-Z0-9_-]{1,8}(/[a-z0-9@_-]{1,8}){0,3}"
        .prop_map(|text| Path::new(&text).expect("made by the rules"))
}

fn token() -> impl Strategy<Value = Vec<u8>> {
    vec(1..=255u8, 0..20)
}

fn perms() -> impl Strategy<Value = Vec<Perm>> {
    let access = prop_oneof![
        Just(Access::None),
        Just(Access::Read),
        Just(Access::Write),
        Just(Access::Both)
    ];
    vec((any::<u16>(), access).prop_map(|(domid, access)| Perm { domid, access }), 1..6)
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        vec(any::<u8>(), 0..50).prop_map(Request::Control),
        path().prop_map(Request::Directory),
        (path(), any::<u32>()).prop_map(|(path, offset)| Request::DirectoryPart { path, offset }),
        path().prop_map(Request::Read),
        (path(), vec(any::<u8>(), 0..1000))
            .prop_map(|(path, value)| Request::Write { path, value }),
        path().prop_map(Request::Mkdir),
        path().prop_map(Request::Rm),
        path().prop_map(Request::GetPerms),
        (path(), perms()).prop_map(|(path, perms)| Request::SetPerms { path, perms }),
        (path(), token()).prop_map(|(path, token)| Request::Watch { path, token }),
        (path(), token()).prop_map(|(path, token)| Request::Unwatch { path, token }),
        Just(Request::TransactionStart),
        any::<bool>().prop_map(|commit| Request::TransactionEnd { commit }),
        (any::<u16>(), any::<u64>(), any::<u32>())
            .prop_map(|(domid, gfn, port)| Request::Introduce { domid, gfn, port }),
        any::<u16>().prop_map(Request::Release),
        any::<u16>().prop_map(Request::GetDomainPath),
        any::<u16>().prop_map(Request::IsDomainIntroduced),
        Just(Request::ResetWatches),
        any::<u16>().prop_map(Request::Resume),
        (any::<u16>(), any::<u16>())
            .prop_map(|(domid, target)| Request::SetTarget { domid, target }),
    ]
}

fn reply() -> impl Strategy<Value = Reply> {
    let names = || vec("[a-z0-9]{1,10}", 0..20);
    prop_oneof![
        Just(Reply::Ok(MessageType::Write)),
        Just(Reply::Error(Errno::Eagain)),
        vec(any::<u8>(), 0..50).prop_map(Reply::Control),
        names().prop_map(Reply::Directory),
        (any::<u64>(), names(), any::<bool>()).prop_map(|(generation, names, last)| {
            Reply::DirectoryPart { generation, names, last }
        }),
        vec(any::<u8>(), 0..1000).prop_map(Reply::Read),
        perms().prop_map(Reply::GetPerms),
        any::<u32>().prop_map(Reply::TransactionStart),
        path().prop_map(Reply::GetDomainPath),
        any::<bool>().prop_map(Reply::IsDomainIntroduced),
        (path(), token()).prop_map(|(path, token)| Reply::WatchEvent { path, token }),
    ]
}

/// Feeds `bytes` in pieces of the given sizes, the last one taking the rest.
fn decode(bytes: &[u8], pieces: &[usize]) -> (Vec<Packet>, Option<WireError>) {
    let (mut decoder, mut packets, mut rest) = (Decoder::default(), Vec::new(), bytes);
    let mut sizes = pieces.iter().copied();
    while !rest.is_empty() {
        let (mut piece, after) = rest.split_at(sizes.next().unwrap_or(usize::MAX).min(rest.len()));
        rest = after;
        loop {
            match decoder.feed(&mut piece) {
                Ok(Some(packet)) => packets.push(packet),
                Ok(None) => break,
                Err(error) => return (packets, Some(error)),
            }
        }
    }
    (packets, None)
}

proptest! {
    #[test]
    fn requests_survive_the_wire(requests in vec(request(), 1..5), pieces in vec(0..40usize, 0..50)) {
        let mut bytes = Vec::new();
        for (req_id, request) in (1..).zip(&requests) {
            request.to_packet(req_id, 7).unwrap().encode(&mut bytes);
        }
        let (packets, error) = decode(&bytes, &pieces);
        prop_assert_eq!(error, None);
        let decoded: Vec<_> = packets.iter().map(|p| Request::from_packet(p).unwrap()).collect();
        prop_assert_eq!(decoded, requests);
    }

    #[test]
    fn replies_survive_the_wire(reply in reply(), pieces in vec(0..40usize, 0..50)) {
        let mut bytes = Vec::new();
        reply.to_packet(9, 0).unwrap().encode(&mut bytes);
        let (packets, error) = decode(&bytes, &pieces);
        prop_assert_eq!(error, None);
        prop_assert_eq!(Reply::from_packet(&packets[0]).unwrap(), reply);
    }

    /// Any input, however it is cut up: no panic, the same packets, bounded memory.
    #[test]
    fn any_bytes_are_survived(
        headers in vec((0..30u32, any::<u32>(), any::<u32>(), 0..4200u32, vec(any::<u8>(), 0..60)), 0..6),
        pieces in vec(0..40usize, 0..50),
    ) {
        let mut bytes = Vec::new();
        for (kind, req_id, tx_id, len, payload) in headers {
            // Mostly honest lengths, so that payloads are reached.
            let len = if len % 3 == 0 { len } else { payload.len() as u32 };
            for field in [kind, req_id, tx_id, len] {
                bytes.extend_from_slice(&field.to_ne_bytes());
            }
            bytes.extend_from_slice(&payload);
        }
        let (packets, error) = decode(&bytes, &pieces);
        prop_assert_eq!(&(packets.clone(), error), &decode(&bytes, &[]));
        for packet in &packets {
            prop_assert!(packet.payload.len() <= PAYLOAD_MAX);
            let _ = Request::from_packet(packet);
            let _ = Reply::from_packet(packet);
        }
    }
}

/// The header's layout, byte for byte, as a C client sends `xenstore-read /a`.
#[test]
fn layout_is_xs_wire_h() {
    let mut bytes = Vec::new();
    Request::Read(Path::new("/a").unwrap()).to_packet(5, 6).unwrap().encode(&mut bytes);
    let mut expected = Vec::new();
    for field in [2u32, 5, 6, 3] {
        expected.extend_from_slice(&field.to_ne_bytes());
    }
    expected.extend_from_slice(b"/a\0");
    assert_eq!(bytes, expected);
}

#[test]
fn paths_follow_the_rules() {
    for good in ["/", "/a", "a/b", "@releaseDomain", "/local/domain/0/backend/vbd/1/51712"] {
        assert!(Path::new(good).is_ok(), "{good}");
    }
    for bad in ["", "//", "/a/", "a//b", "/a b", "/a\0", "/ä", "/a.b"] {
        assert!(Path::new(bad).is_err(), "{bad:?}");
    }
    assert!(Path::new(&format!("/{}", "a".repeat(ABS_PATH_MAX - 1))).is_ok());
    assert!(Path::new(&format!("/{}", "a".repeat(ABS_PATH_MAX))).is_err());
    assert!(Path::new(&"a".repeat(REL_PATH_MAX + 1)).is_err());
}

#[test]
fn a_header_that_promises_too_much_is_refused_for_good() {
    let mut decoder = Decoder::default();
    let mut header = [2u32, 1, 0, 4097].map(u32::to_ne_bytes).concat();
    header.extend_from_slice(&[0; 100]);
    let error = WireError::TooLong { len: 4097, max: PAYLOAD_MAX };
    assert_eq!(decoder.feed(&mut &header[..]), Err(error.clone()));
    assert_eq!(decoder.feed(&mut &header[..]), Err(error));
}
