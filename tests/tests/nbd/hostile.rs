//! Clients that mean harm, beside one that does not.

use super::export::Export;
use super::raw::*;
use std::io::{Read, Write};
use xen_blk_tests::process::wait_until;

/// Writes and reads back.
fn works(raw: &mut Raw, byte: u8) {
    raw.request(WRITE, 1, 1, 4096, 65536);
    raw.send(&[byte; 65536]);
    assert_eq!(raw.reply(), (1, 0));
    raw.request(READ, 0, 2, 4096, 65536);
    assert_eq!(raw.reply(), (2, 0));
    assert_eq!(raw.take(65536).unwrap(), [byte; 65536]);
}

#[test]
fn clients_that_stall_hold_up_nobody_and_cost_no_more_than_their_share() {
    let export = Export::new("memory:64M", &["--max-connections", "8"]);
    let mut good = Raw::ready(&export.socket());
    works(&mut good, 1);
    let mut stalled: Vec<Raw> = (0..7).map(|_| Raw::ready(&export.socket())).collect();
    for (n, raw) in stalled.iter_mut().enumerate() {
        raw.0.set_nonblocking(true).unwrap();
        let flood = match n {
            // Reads without end, whose data nobody takes.
            0..3 => request(READ, 0, 7, 0, 65536).repeat(10_000),
            // Errors without end, which nobody takes.
            3 => request(99, 0, 7, 0, 0).repeat(100_000),
            // The longest writes, of which the end never comes.
            _ => [request(WRITE, 0, 7, 0, 2 << 20), vec![0; 1 << 20]].concat(),
        };
        // As much as it takes.
        let mut rest = &flood[..];
        while let Ok(sent) = raw.0.write(rest) {
            rest = &rest[sent..];
            if sent == 0 {
                break;
            }
        }
    }
    for byte in 0..100 {
        works(&mut good, byte);
    }
    // The shares of eight, and the program itself.
    assert!(export.resident() < 60_000, "{} kB", export.resident());

    // There is room for eight.
    let mut ninth = std::os::unix::net::UnixStream::connect(export.socket()).unwrap();
    assert_eq!(ninth.read(&mut [0]).unwrap(), 0);
    drop(stalled);
    wait_until("a place is free", || {
        let mut tenth = std::os::unix::net::UnixStream::connect(export.socket())?;
        Ok(tenth.read(&mut [0])? == 1)
    })
    .unwrap();
    works(&mut good, 99);
}

#[test]
fn nonsense_harms_only_who_sends_it() {
    let export = Export::new("memory:64M", &[]);
    let mut good = Raw::ready(&export.socket());
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut before = 0;
    for round in 0..300 {
        let mut raw = Raw::connect(&export.socket());
        raw.0.set_nonblocking(true).unwrap();
        let mut bytes = vec![0, 0, 0, 3];
        if round % 3 > 0 {
            bytes.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\0");
        }
        for _ in 0..200 {
            if round % 3 == 2 {
                // Requests that look right, but for one field.
                let (command, flags) = (random() % 9, random() & random() & 7);
                let offset = (random() % (80 << 20)) & !511;
                let len = random() as u32 % 20 * 512;
                bytes.extend(request(command as u16, flags as u16, random(), offset, len));
                bytes.extend(vec![0; if command == 1 { len as usize } else { 0 }]);
            } else {
                bytes.extend(b"IHAVEOPT".iter().take(random() as usize % 12));
                bytes.extend((random() as u32 % 12).to_be_bytes());
                bytes.extend((random() as u32 >> (random() % 33).min(31)).to_be_bytes());
                bytes.extend(random().to_be_bytes());
            }
        }
        // Dropped in the middle: neither what it is sent nor what it gets matters.
        let _ = raw.0.write(&bytes);
        let _ = raw.0.read(&mut [0; 4096]);
        drop(raw);
        if round % 30 == 29 {
            works(&mut good, round as u8);
        }
        if round == 100 {
            before = export.resident();
        }
    }
    assert!(export.resident() < before + 16_000, "{before} kB, then {} kB", export.resident());
}

#[test]
fn what_has_come_in_is_answered_when_the_server_is_told_to_end() {
    let mut export = Export::new("delay:300ms,memory:8M", &[]);
    let mut raw = Raw::ready(&export.socket());
    for n in 0..10 {
        raw.request(WRITE, 0, n, n * 4096, 4096);
        raw.send(&[1; 4096]);
    }
    // This one is answered at once, after those before it were taken.
    raw.request(99, 0, 99, 0, 0);
    assert_eq!(raw.reply(), (99, 22));
    export.server.signal(nix::sys::signal::Signal::SIGTERM).unwrap();
    let mut answered: Vec<u64> = (0..10)
        .map(|_| raw.reply())
        .map(|(n, error)| {
            assert_eq!(error, 0);
            n
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, (0..10).collect::<Vec<_>>());
    assert!(raw.is_closed());
    assert!(export.server.wait(xen_blk_tests::process::HUNG).unwrap().success());
    assert!(!export.socket().exists());
    assert!(export.backend.is_running().unwrap());
}
