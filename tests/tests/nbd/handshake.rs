//! The handshake's other paths: those that good clients do not take.

use super::export::Export;
use super::raw::*;
use std::io::Read;

fn info(name: &[u8], infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name);
    data.extend((infos.len() as u16).to_be_bytes());
    data.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
    data
}

#[test]
fn every_option_is_answered_as_the_protocol_says() {
    let export = Export::new("memory:8M", &["--name", "disk", "--read-only"]);
    let mut raw = Raw::connect(&export.socket());
    raw.send(&1u32.to_be_bytes());
    // All at once: nothing says that a client has to wait.
    let long = vec![0; 100_000];
    for (option, data) in [
        (99, &b"what?"[..]),
        (LIST, b""),
        (LIST, b"x"),
        (INFO, b"\0\0\0\x09disk\0\0"),
        (INFO, &info(b"other", &[])),
        (GO, &info(b"disk", &[])[..9]),
        (77, &long),
        (INFO, &info(b"", &[1, 3])),
        (STRUCTURED_REPLY, b"x"),
    ] {
        raw.option(option, data);
    }
    assert_eq!(raw.option_reply(99), (ERR_UNSUP, vec![]));
    assert_eq!(raw.option_reply(LIST), (2, b"\0\0\0\x04disk".to_vec()));
    assert_eq!(raw.option_reply(LIST), (ACK, vec![]));
    assert_eq!(raw.option_reply(LIST).0, ERR_INVALID);
    assert_eq!(raw.option_reply(INFO).0, ERR_INVALID);
    assert_eq!(raw.option_reply(INFO).0, ERR_UNKNOWN);
    assert_eq!(raw.option_reply(GO).0, ERR_INVALID);
    assert_eq!(raw.option_reply(77).0, ERR_TOO_BIG);
    // Flags, read-only, flush, FUA, multi-conn: neither trim nor zeroes.
    let size = (8u64 << 20).to_be_bytes();
    assert_eq!(raw.option_reply(INFO), (3, [&[0, 0], &size[..], &[1, 0x0f]].concat()));
    let (_, blocks) = raw.option_reply(INFO);
    assert_eq!(blocks, [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 0, 0x20, 0, 0]);
    assert_eq!(raw.option_reply(INFO), (3, b"\0\x01disk".to_vec()));
    assert_eq!(raw.option_reply(INFO), (ACK, vec![]));
    assert_eq!(raw.option_reply(STRUCTURED_REPLY).0, ERR_INVALID);
    raw.option(ABORT, b"");
    assert_eq!(raw.option_reply(ABORT), (ACK, vec![]));
    assert!(raw.is_closed());

    // The old way in, with the zeroes that this client did not decline.
    let mut raw = Raw::connect(&export.socket());
    raw.send(&1u32.to_be_bytes());
    raw.option(EXPORT_NAME, b"disk");
    assert_eq!(raw.take(10 + 124).unwrap(), [&size[..], &[1, 0x0f], &[0; 124]].concat());
    raw.request(WRITE, 0, 1, 0, 512);
    raw.send(&[1; 512]);
    raw.request(WRITE_ZEROES, 0, 2, 0, 512);
    raw.request(TRIM, 0, 3, 0, 512);
    assert_eq!([raw.reply(), raw.reply(), raw.reply()], [(1, 1), (2, 1), (3, 1)], "EPERM");
}

#[test]
fn who_does_not_speak_the_protocol_is_dropped() {
    let export = Export::new("memory:8M", &[]);
    let wrong: [&[u8]; 5] = [
        // Client flags nobody knows.
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\x01IHAVENOT\0\0\0\x03\0\0\0\0",
        // An export we do not have, asked for by the option that cannot be refused.
        b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x05other",
        // A good start, then no request.
        b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0\x25\x60\x95\x14aaaaaaaaaaaaaaaaaaaaaaaa",
    ];
    for bytes in wrong {
        let mut raw = Raw::connect(&export.socket());
        raw.send(bytes);
        // The last one may or may not get its reply; all get the end of the stream.
        raw.0.read_to_end(&mut Vec::new()).unwrap();
    }
    // Clients that leave in the middle of anything leave nothing behind.
    let whole =
        [&b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0"[..], &request(WRITE, 0, 1, 0, 4096), &[7; 4096]]
            .concat();
    for n in (0..60).chain([4000]) {
        let mut raw = Raw::connect(&export.socket());
        raw.send(&whole[..n.min(whole.len())]);
    }
    Raw::ready(&export.socket());
}

#[test]
fn requests_that_make_no_sense_get_an_error_and_keep_the_stream_in_step() {
    let export = Export::new("memory:8M", &[]);
    let mut raw = Raw::ready(&export.socket());
    let end = 8 << 20;
    let (invalid, no_space) = (22, 28);
    for (command, flags, offset, len, error) in [
        (READ, 0, 1, 512, invalid),
        (READ, 0, 0, 511, invalid),
        (READ, 0, 0, 0, invalid),
        (READ, 0, end, 512, invalid),
        (READ, 0, u64::MAX - 511, 512, invalid),
        (READ, 0, 0, (2 << 20) + 512, invalid),
        (READ, 0x8000, 0, 512, invalid),
        (99, 0, 0, 512, invalid),
        (WRITE, 0, end - 512, 1024, no_space),
        (WRITE, 0, 1, 512, invalid),
        (WRITE, 0, 0, (2 << 20) + 512, invalid),
        (WRITE, 0x8000, 0, 1024, invalid),
        (WRITE, 0, 0, 0, invalid),
        (TRIM, 0, end, 512, no_space),
        (WRITE_ZEROES, 0, 512, 8 << 20, no_space),
        (WRITE_ZEROES, 0, 0, 0, invalid),
        (FLUSH, 0, 0, 0, 0),
    ] {
        raw.request(command, flags, offset ^ 5, offset, len);
        if command == WRITE {
            raw.send(&vec![9; len as usize]);
        }
        assert_eq!(raw.reply(), (offset ^ 5, error), "{command} {flags} {offset} {len}");
    }
    // None of it was written.
    raw.request(READ, 0, 1, 0, 1 << 20);
    assert_eq!(raw.reply(), (1, 0));
    assert_eq!(raw.take(1 << 20).unwrap(), vec![0; 1 << 20]);
    raw.request(DISC, 0, 2, 0, 0);
    assert!(raw.is_closed());
}
