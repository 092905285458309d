//! Tests from the outside where possible: sockets, and the grammar of the exposition format.

use super::server::MAX_CONNECTIONS;
use super::*;
use crate::registry::{DeviceView, Registry};
use crate::stats::{Counts, Histogram, RingStats};
use ring_proto::Reason;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use xenstore_glue::vbd::DevicePaths;
use xenstore_glue::xenbus::XenbusState;

fn device(path: &str, name: &str, rings: usize) -> DeviceView {
    DeviceView {
        paths: DevicePaths::parse_backend(path).expect("a backend directory"),
        name: name.to_owned(),
        target: "/srv/disk.img".to_owned(),
        state: XenbusState::Connected,
        sectors: 1 << 21,
        read_only: false,
        strategy: Some("grant copy"),
        layout: Some("Split".to_owned()),
        rings: (0..rings).map(|ring| Arc::new(ring_stats(ring as u64 + 1))).collect(),
        error: Some("the last \"connection\" was lost".to_owned()),
    }
}

fn ring_stats(scale: u64) -> RingStats {
    let stats = RingStats::default();
    stats.rd_req.add(6 * scale);
    stats.rd_sect.add(48 * scale);
    stats.wr_req.add(2 * scale);
    stats.events.add(2 * scale);
    stats.kicks.add(scale);
    stats.sleeps.add(2 * scale);
    stats.system_calls.add(5 * scale);
    stats.persistent_held.set(7);
    stats.refused[Reason::Misaligned.kind()].add(scale);
    stats.batch.record(4, 2 * scale);
    stats.device.record(1_000, 4 * scale);
    stats.device.record(100_000, 3 * scale);
    stats.device.record(u64::MAX >> 2, scale);
    stats
}

const PATH: &str = "/local/domain/0/backend/vbd3/5/51712";
const STALE: &str = "/local/domain/0/backend/vbd/5/51712";
const HOSTILE_NAME: &str = "x\"v\\d\na} 1\r\u{7f}";

fn registry() -> Arc<Registry> {
    let registry = Registry::default();
    registry.insert(device(PATH, HOSTILE_NAME, 2));
    registry.insert(device(STALE, HOSTILE_NAME, 0));
    Arc::new(registry)
}

#[test]
fn only_addresses_of_this_host_are_accepted() {
    for text in ["unix:/run/x.sock", "127.0.0.1:9877", "[::1]:9877", "127.5.5.5:1"] {
        let address: Address = text.parse().expect(text);
        assert_eq!(address.to_string(), text);
    }
    assert_eq!("localhost:80".parse(), Ok(Address::Loopback(([127, 0, 0, 1], 80).into())));
    for text in ["0.0.0.0:9877", "[::]:9877", "192.168.1.1:80", "[::ffff:10.0.0.1]:80"] {
        let parsed = text.parse::<Address>();
        assert!(matches!(parsed, Err(AddressError::NotLoopback(_))), "{text}: {parsed:?}");
    }
    for text in ["", "unix:", "/run/x.sock", "example.com:80", "127.0.0.1", "localhost:99999"] {
        assert_eq!(text.parse::<Address>(), Err(AddressError::Form(text.to_owned())));
    }
}

#[test]
fn percentiles_bound_what_was_counted() {
    let histogram = Histogram::default();
    assert_eq!(Distribution::from(&histogram).percentile(50), None);
    let mut values: Vec<u64> = (0..500).map(|n| n * n * 7).collect();
    values.iter().for_each(|value| histogram.record(*value, 1));
    values.sort_unstable();
    let read = Distribution::from(&histogram);
    assert_eq!((read.count(), read.sum), (500, values.iter().sum()));
    for percent in [1, 50, 90, 99, 100] {
        let exact = values[percent * values.len() / 100 - 1];
        let bound = read.percentile(percent as u64).expect("a bound");
        assert!(exact <= bound && bound <= 2 * exact.max(1), "p{percent}: {exact} {bound}");
    }
    for bits in 0..40 {
        let exact = values.iter().filter(|value| **value < 1 << bits).count();
        assert_eq!(read.at_most(bits), exact as u64);
    }
    let open = Histogram::default();
    open.record(1 << 50, 1);
    assert_eq!(Distribution::from(&open).percentile(50), None, "the last bucket has no end");
}

#[test]
fn readings_add_up_and_differ() {
    let take = |registry| Snapshot::take(registry, &Clock::start());
    let registry = registry();
    let before = take(&registry);
    let [_, Device { rings, total, .. }] = &before.devices[..] else { panic!("two devices") };
    assert_eq!(total.counts.rd_req, 18);
    assert_eq!(total.persistent_held, 14);
    assert_eq!(total.refused["misaligned"], 3);
    assert_eq!(total.derived.requests, 24);
    assert_eq!(total.derived.system_calls_per_request, Some(0.75), "(15 + 3) / 24");
    assert_eq!(total.derived.mean_batch, Some(4.0));
    assert_eq!(total.derived.device_ns.p50, Some(1023));
    assert_eq!(total.derived.device_ns.p99, None);

    let view = registry.devices().remove(1);
    view.rings[1].rd_req.add(3);
    view.rings[1].batch.record(3, 1);
    let since = take(&registry).devices[1].rings[1].since(&rings[1]);
    assert_eq!((since.counts.rd_req, since.derived.requests), (3, 3));
    assert_eq!(since.device_ns, Distribution::default());
    // Ring 0 has counted less, so it counts as a ring of another connection.
    assert_eq!(rings[0].since(&rings[1]), rings[0]);
}

/// What a reader of the format sees: types of families, and samples by name and labels.
#[derive(Default)]
struct Exposition {
    types: BTreeMap<String, String>,
    samples: BTreeMap<(String, BTreeMap<String, String>), f64>,
}

/// Every line must follow the format's grammar, and every family must be in one piece.
fn parse(text: &str) -> Exposition {
    let mut read = Exposition::default();
    let mut family = String::new();
    let mut helped = BTreeSet::new();
    assert!(text.ends_with('\n'));
    for line in text.split_terminator('\n') {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, _) = help.split_once(' ').expect("a description");
            assert!(helped.insert(name.to_owned()), "{name} twice");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a type");
            assert!(helped.contains(name), "{name} has no HELP");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(read.types.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} twice");
            family = name.to_owned();
        } else {
            let end = line.find(['{', ' ']).expect("labels or a value");
            let (name, mut rest) = line.split_at(end);
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{line}");
            let suffixes: &[&str] = match read.types[&family].as_str() {
                "histogram" => &["_bucket", "_sum", "_count"],
                _ => &[""],
            };
            assert!(suffixes.iter().any(|s| name == format!("{family}{s}")), "{line}: {family}");
            let mut labels = BTreeMap::new();
            if let Some(inside) = rest.strip_prefix('{') {
                rest = parse_labels(inside, &mut labels);
            }
            let value = rest.strip_prefix(' ').expect("a space").parse().expect("a number");
            let twice = read.samples.insert((name.to_owned(), labels), value);
            assert!(twice.is_none(), "{line} twice");
        }
    }
    read
}

fn parse_labels<'a>(mut text: &'a str, labels: &mut BTreeMap<String, String>) -> &'a str {
    loop {
        let (name, rest) = text.split_once("=\"").expect("a label");
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{name}");
        let mut value = String::new();
        let mut chars = rest.chars();
        loop {
            match chars.next().expect("a closing quote") {
                '"' => break,
                '\\' => value.push(match chars.next() {
                    Some('n') => '\n',
                    Some(c @ ('\\' | '"')) => c,
                    other => panic!("escape {other:?}"),
                }),
                c => value.push(c),
            }
        }
        assert!(labels.insert(name.to_owned(), value).is_none(), "label {name} twice");
        match chars.next() {
            Some(',') => text = chars.as_str(),
            Some('}') => return chars.as_str(),
            other => panic!("{other:?} after a label"),
        }
    }
}

#[test]
fn the_exposition_parses_back_to_what_was_counted() {
    let snapshot = Snapshot::take(&registry(), &Clock::start());
    let read = parse(&prometheus::render(&snapshot));
    let labels = |more: &[(&str, &str)]| {
        let device =
            [("domain", "5"), ("kind", "vbd3"), ("device", "51712"), ("name", HOSTILE_NAME)];
        let all = device.iter().chain(more).map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        all.collect::<BTreeMap<_, _>>()
    };
    let sample = |name: &str, more: &[(&str, &str)]| read.samples[&(name.to_owned(), labels(more))];
    assert_eq!(sample("blkback_rd_req_total", &[("ring", "1")]), 12.0);
    assert_eq!(sample("blkback_refused_total", &[("ring", "1"), ("reason", "misaligned")]), 2.0);
    assert_eq!(sample("blkback_device_state", &[]), 4.0);
    assert_eq!(sample("blkback_device_size_bytes", &[]), 1_073_741_824.0);
    assert_eq!(sample("blkback_batch_requests_sum", &[("ring", "0")]), 8.0);
    assert!(read.samples[&("process_resident_memory_bytes".to_owned(), BTreeMap::new())] > 4096.0);
    assert!(read.samples[&("process_open_fds".to_owned(), BTreeMap::new())] > 2.0);

    let family = "blkback_device_seconds";
    assert_eq!(read.types[family], "histogram");
    let bucket = |le: &str| sample(&format!("{family}_bucket"), &[("ring", "0"), ("le", le)]);
    assert_eq!(bucket("0.000001023"), 4.0);
    assert_eq!(bucket("0.000065535"), 4.0);
    assert_eq!(bucket("0.000262143"), 7.0);
    assert_eq!(bucket("17.179869183"), 7.0);
    assert_eq!(bucket("+Inf"), 8.0);
    assert_eq!(sample(&format!("{family}_count"), &[("ring", "0")]), 8.0);
    for name in Counts::FIELDS.map(|(name, _)| format!("blkback_{name}_total")) {
        assert_eq!(read.types[&name], "counter");
    }
}

/// A directory for the test, and the path of a socket in one below it that does not exist yet.
fn socket() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("blkback/stats.sock");
    (dir, path)
}

async fn bound(path: &std::path::Path) -> Result<Server, ListenError> {
    Server::bind(&Address::Unix(path.to_owned()), registry(), Clock::start()).await
}

/// The server's answer to `request`, up to the end of the connection.
async fn raw(path: &std::path::Path, request: &str) -> String {
    let mut stream = UnixStream::connect(path).await.expect("a listener");
    stream.write_all(request.as_bytes()).await.expect("taken");
    let mut answer = Vec::new();
    // If the server has not read all of the request, a reset follows the answer.
    if let Err(error) = stream.read_to_end(&mut answer).await {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    String::from_utf8(answer).expect("text")
}

#[tokio::test]
async fn the_socket_is_the_owners_and_goes_with_the_server() {
    let (_dir, path) = socket();
    let server = bound(&path).await.expect("bound");
    let mode = std::fs::metadata(&path).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(matches!(bound(&path).await, Err(ListenError::InUse(_))));
    drop(server);
    assert!(!path.exists());

    // A daemon that was killed leaves its file.
    drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
    drop(bound(&path).await.expect("bound in its place"));
    std::fs::write(&path, "precious").expect("written");
    assert!(matches!(bound(&path).await, Err(ListenError::NotASocket(_))));
}

#[tokio::test]
async fn http_is_answered_as_it_should_be() {
    let (_dir, path) = socket();
    let server = tokio::spawn(bound(&path).await.expect("bound").run());
    let metrics = raw(&path, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let (head, body) = metrics.split_once("\r\n\r\n").expect("a body");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    parse(body);
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("GET /metrics/x HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("POST /stats HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", "405"),
        ("GET /metrics\r\n\r\n", "400"),
        (&format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(10_000)), "431"),
        (&format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(100)), "431"),
    ] {
        let answer = raw(&path, request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:.40}: {answer:.40}");
    }
    server.abort();
}

#[tokio::test]
async fn the_json_is_read_back_over_either_socket() {
    let registry = registry();
    let here = Snapshot::take(&registry, &Clock::start());
    let (_dir, path) = socket();
    let any_port = Address::Loopback(([127, 0, 0, 1], 0).into());
    for address in [Address::Unix(path), any_port] {
        let server = Server::bind(&address, registry.clone(), Clock::start()).await.expect("bound");
        let address = match server.port() {
            Some(port) => Address::Loopback(([127, 0, 0, 1], port).into()),
            None => address,
        };
        let server = tokio::spawn(server.run());
        let there = fetch(&address).await.expect("an answer");
        assert_eq!(there.devices, here.devices);
        server.abort();
    }
}

/// The clock is paused unless only a timer can make progress.
#[tokio::test(start_paused = true)]
async fn slow_clients_lock_nobody_out_and_are_hung_up_on() {
    let (_dir, path) = socket();
    let server = tokio::spawn(bound(&path).await.expect("bound").run());
    let mut slow = Vec::new();
    for _ in 0..2 * MAX_CONNECTIONS {
        let mut stream = UnixStream::connect(&path).await.expect("a listener");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nX").await.expect("taken");
        slow.push(stream);
    }
    let begun = tokio::time::Instant::now();
    let answer = raw(&path, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer:.40}");
    assert_eq!(begun.elapsed(), std::time::Duration::ZERO, "nobody was waited for");
    for mut stream in slow {
        let mut answer = String::new();
        assert_eq!(stream.read_to_string(&mut answer).await.expect("an end"), 0, "{answer}");
    }
    server.abort();
}
