use super::*;
use crate::disk::DiskSpec;
use proptest::prelude::*;
use ring_proto::{Abi, DomId, GrantRef, Port, RingLayout};
use std::collections::HashMap;

const OFFER: BackendOffer = BackendOffer {
    max_queues: 4,
    max_ring_page_order: 2,
    max_indirect_segments: 256,
    persistent: true,
    split_ring: true,
};

fn source(nodes: &[(String, String)]) -> impl Fn(&str) -> Option<Vec<u8>> + use<> {
    let nodes: HashMap<_, _> = nodes.iter().cloned().collect();
    move |key| nodes.get(key).map(|value| value.clone().into_bytes())
}

/// Keys from `"key value"` words.
fn keys(text: &[&str]) -> impl Fn(&str) -> Option<Vec<u8>> + use<> {
    let nodes: Vec<_> = text
        .iter()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    source(&nodes)
}

fn agree(text: &[&str]) -> Result<Agreement, Refusal> {
    Agreement::new(&OFFER, FrontendRequest::from_keys(&OFFER, &keys(text))?)
}

fn request(layout: RingLayout, order: u8, queues: usize) -> FrontendRequest {
    let (requests, responses) = layout.pages(order);
    let mut next = 8;
    let mut grants = |count| {
        let first = next;
        next += count as u32;
        (first..next).map(GrantRef).collect::<Vec<_>>()
    };
    let queues = (0..queues)
        .map(|queue| QueueKeys {
            request_refs: grants(requests),
            response_refs: grants(responses),
            port: Port(queue as u32 + 1),
        })
        .collect();
    FrontendRequest { layout, order, persistent: true, large_sector_size: true, queues }
}

/// What Linux's `talk_to_blkback` writes: with its defaults, and with several queues of several pages.
#[test]
fn linux_is_understood() {
    let one =
        agree(&["ring-ref 8", "event-channel 5", "protocol x86_64-abi", "feature-persistent 1"])
            .unwrap();
    assert_eq!(one.layout, RingLayout::Union(Abi::X86_64));
    assert_eq!((one.order, one.slots(), one.persistent), (0, 32, true));
    assert_eq!(one.queues[0].request_refs, [GrantRef(8)]);
    assert_eq!(one.queues[0].port, Port(5));

    let two = agree(&[
        "multi-queue-num-queues 2",
        "ring-page-order 1",
        "protocol x86_32-abi",
        "queue-0/ring-ref0 8",
        "queue-0/ring-ref1 9",
        "queue-0/event-channel 5",
        "queue-1/ring-ref0 10",
        "queue-1/ring-ref1 11",
        "queue-1/event-channel 6",
    ])
    .unwrap();
    assert_eq!(two.layout, RingLayout::Union(Abi::X86_32));
    assert_eq!((two.order, two.queues.len(), two.persistent), (1, 2, false));
    assert_eq!(two.queues[1].request_refs, [GrantRef(10), GrantRef(11)]);
}

#[test]
fn pages_are_found_under_every_name_they_had() {
    // Numbered as soon as there is an order, even 0; the older key counts pages.
    assert!(agree(&["ring-page-order 0", "ring-ref0 8", "event-channel 5"]).is_ok());
    let old = ["num-ring-pages 2", "ring-ref0 8", "ring-ref1 9", "event-channel 5"];
    assert_eq!(agree(&old).unwrap().order, 1);
    assert!(agree(&["num-ring-pages 1", "ring-ref 8", "event-channel 5"]).is_ok());
    // Old frontends that name no ABI.
    let silent = agree(&["ring-ref 8", "event-channel 5"]).unwrap();
    assert_eq!(silent.layout, RingLayout::Union(PROTOCOL_DEFAULT));
    let offer = BackendOffer::from_keys(&keys(&["max-ring-pages 9"])).unwrap();
    assert_eq!((offer.max_ring_page_order, offer.max_queues), (3, 1));
}

#[test]
fn refusals_name_key_value_and_rule() {
    let says = |text: &[&str], refusal: &str| {
        assert_eq!(agree(text).unwrap_err().to_string(), refusal);
    };
    says(&["event-channel 5"], "ring-ref: missing");
    says(&["ring-ref 8"], "event-channel: missing");
    says(&["ring-ref 8", "event-channel 0"], "event-channel = \"0\": below 1");
    says(&["ring-ref -8", "event-channel 5"], "ring-ref = \"-8\": not a decimal number");
    says(
        &["ring-ref 4294967296", "event-channel 5"],
        "ring-ref = \"4294967296\": above 4294967295",
    );
    says(
        &["ring-ref 99999999999999999999", "event-channel 5"],
        "ring-ref = \"99999999999999999999\": above 4294967295",
    );
    says(&["multi-queue-num-queues 5"], "multi-queue-num-queues = \"5\": above 4");
    says(&["multi-queue-num-queues 0"], "multi-queue-num-queues = \"0\": below 1");
    says(
        &["multi-queue-num-queues 4000000000"],
        "multi-queue-num-queues = \"4000000000\": above 4",
    );
    says(
        &["multi-queue-num-queues 2", "queue-0/ring-ref 8", "queue-0/event-channel 5"],
        "queue-1/ring-ref: missing",
    );
    says(&["ring-page-order 3"], "ring-page-order = \"3\": above 2");
    says(&["ring-page-order 260"], "ring-page-order = \"260\": above 2");
    says(&["num-ring-pages 3"], "num-ring-pages = \"3\": not a power of two");
    says(&["num-ring-pages 8"], "num-ring-pages = \"8\": above 4");
    says(
        &["ring-page-order 1", "ring-ref0 8", "ring-ref1 8", "event-channel 5"],
        "ring-ref1 = \"8\": same as ring-ref0",
    );
    says(
        &["protocol x86_128-abi\n"],
        "protocol = \"x86_128-abi\\n\": unknown ABI, known are x86_64-abi, x86_32-abi and this machine's own",
    );
    says(&["split-ring 1", "ring-ref0 8", "event-channel 5"], "response-ring-ref0: missing");
    let plain = BackendOffer { split_ring: false, ..OFFER };
    let refused = FrontendRequest::from_keys(&plain, &keys(&["split-ring 1"])).unwrap_err();
    assert_eq!(refused.to_string(), "split-ring = \"1\": not offered by the backend");
    // A value that would fill the log.
    let long = agree(&["ring-ref 8", &format!("event-channel {}", "\x07".repeat(4000))]);
    assert_eq!(long.unwrap_err().value.unwrap().len(), Refusal::MAX_VALUE);

    let mut twice = request(RingLayout::Split, 0, 2);
    twice.queues[1].port = twice.queues[0].port;
    let refused = Agreement::new(&OFFER, twice).unwrap_err();
    assert_eq!(refused.key, "queue-1/event-channel");
}

#[test]
fn what_one_end_writes_the_other_reads() {
    for layout in
        [RingLayout::Split, RingLayout::Union(Abi::X86_32), RingLayout::Union(Abi::NATIVE)]
    {
        for (order, queues) in [(0, 1), (0, 3), (2, 1), (2, 4)] {
            let request = request(layout, order, queues);
            let nodes = request.to_keys();
            let read = source(&nodes);
            assert_eq!(FrontendRequest::from_keys(&OFFER, &read).as_ref(), Ok(&request));
            // The keys to fetch are the ones written, and nothing else is looked up.
            let mut fetch = FrontendRequest::ring_keys(&OFFER, &read).unwrap();
            fetch.extend(FrontendRequest::KEYS.iter().map(|key| (*key).to_owned()));
            assert!(nodes.iter().all(|(key, _)| fetch.contains(key)));
            let strict = |key: &str| {
                assert!(fetch.iter().any(|name| name == key), "{key}");
                read(key)
            };
            assert!(FrontendRequest::from_keys(&OFFER, &strict).is_ok());
            let agreed = Agreement::new(&OFFER, request).unwrap();
            assert_eq!(agreed.max_indirect_segments, 256);
        }
    }
    for offer in [OFFER, BackendOffer { split_ring: false, persistent: false, ..OFFER }] {
        assert_eq!(BackendOffer::from_keys(&source(&offer.to_keys())), Ok(offer));
    }
    let mut device = DeviceProperties {
        sectors: 1 << 40,
        sector_size: 4096,
        physical_sector_size: 8192,
        read_only: true,
        cdrom: false,
        removable: true,
        flush: true,
        barrier: false,
        discard: Some(Discard { granularity: 65536, alignment: 512, secure: true }),
    };
    assert_eq!(DeviceProperties::from_keys(&source(&device.to_keys())), Ok(device));
    device.discard = None;
    assert_eq!(DeviceProperties::from_keys(&source(&device.to_keys())), Ok(device));
}

#[test]
fn an_absurd_device_is_refused() {
    let read =
        |text: &[&str]| DeviceProperties::from_keys(&keys(text)).map(|device| device.bytes());
    assert_eq!(read(&["sectors 2"]), Ok(1024));
    for absurd in [
        &["info 0"][..],
        &["sectors 18014398509481984"],
        &["sectors 8", "sector-size 0"],
        &["sectors 8", "sector-size 513"],
        &["sectors 8", "sector-size 1048576"],
        &["sectors 8", "info read-only"],
        &["sectors 0x8"],
    ] {
        assert!(read(absurd).is_err(), "{absurd:?}");
    }
    let offer = BackendOffer::from_keys(&keys(&[
        "multi-queue-max-queues 4294967295",
        "max-ring-page-order 4294967295",
        "feature-max-indirect-segments 4294967295",
    ]))
    .unwrap();
    assert_eq!(
        (offer.max_queues, offer.max_ring_page_order, offer.max_indirect_segments),
        (MAX_QUEUES, 4, 256)
    );
}

/// The table of xen-vbd-interface(7).
#[test]
fn device_numbers_are_the_man_pages() {
    for (name, number) in [
        ("xvda", 51712),
        ("xvdb2", 51730),
        ("xvdp15", 51967),
        ("xvdq", 1 << 28 | 16 << 8),
        ("xvda16", 1 << 28 | 16),
        ("xvdtq37", 1 << 28 | 536 << 8 | 37),
        ("sdb3", 2067),
        ("hda", 768),
        ("hdb63", 895),
        ("hdc2", 5634),
        ("hdd", 5696),
        ("xvdbgqcv255", 1 << 28 | 0xfffff << 8 | 255),
    ] {
        let device: VirtualDevice = name.parse().unwrap();
        assert_eq!((device.number(), device.to_string().as_str()), (number, name));
    }
    for (same, name) in [
        ("d0", "xvda"),
        ("d0p0", "xvda"),
        ("d1p2", "xvdb2"),
        ("d536p37", "xvdtq37"),
        ("51712", "xvda"),
        ("0xca00", "xvda"),
        ("0145000", "xvda"),
    ] {
        assert_eq!(same.parse::<VirtualDevice>().unwrap().to_string(), name, "{same}");
    }
    for no in [
        "",
        "xvd",
        "xvda0",
        "xvda01",
        "xvda256",
        "xvdA",
        "sdq",
        "sda16",
        "hde",
        "hda64",
        "d",
        "dp1",
        "d1p",
        "+1",
        "d+1",
        "xvda+1",
        "xvda-1",
        "536870912",
        "09",
        "xvdbgqcw",
        "xvdzzzzzzzzzzzzzz",
    ] {
        assert!(no.parse::<VirtualDevice>().is_err(), "{no}");
    }
}

#[test]
fn paths_have_one_spelling() {
    let paths = DevicePaths {
        backend_domain: DomId(3),
        kind: BackendKind::Vbd3,
        frontend_domain: DomId(7),
        device: 51712,
    };
    assert_eq!(paths.backend(), "/local/domain/3/backend/vbd3/7/51712");
    assert_eq!(paths.frontend(), "/local/domain/7/device/vbd/51712");
    assert_eq!(DevicePaths::parse_backend(&paths.backend()), Ok(paths));
    assert_eq!(DevicePaths::parse_frontend(&paths.frontend()), Ok((DomId(7), 51712)));
    let below = format!("{}/queue-0/state", paths.backend());
    assert_eq!(DevicePaths::parse_below(&below), Some((paths, "queue-0/state")));
    for no in [
        "/local/domain/3/backend/vbd3/7",
        "/local/domain/3/backend/vbd3/07/51712",
        "/local/domain/3/backend/vbd3/7/+51712",
        "/local/domain/3/backend/vif/7/0",
        "/local/domain/65535/backend/vbd/7/0",
        "/local/domain/3/device/vbd3/7/0",
        "@releaseDomain",
        "/local/domain/3/backend/vbd3/7/51712/state",
        "local/domain/3/backend/vbd/7/0",
    ] {
        assert!(DevicePaths::parse_backend(no).is_err(), "{no}");
    }
}

#[test]
fn attaching_writes_what_libxl_writes() {
    let disk: DiskSpec = "vdev=xvda,backendtype=tap,discard,target=/dev/x".parse().unwrap();
    let (back, front) = attach_nodes(&disk, BackendKind::Vbd, DomId(0), DomId(7)).unwrap();
    assert_eq!(back.path, "/local/domain/0/backend/vbd3/7/51712");
    assert_eq!((back.owner, back.reader), (DomId(0), DomId(7)));
    assert_eq!((front.owner, front.reader), (DomId(7), DomId(0)));
    let (read, seen) = (source(&back.nodes), source(&front.nodes));
    for (key, value) in [
        ("frontend", "/local/domain/7/device/vbd/51712"),
        ("params", "aio:/dev/x"),
        ("frontend-id", "7"),
        ("online", "1"),
        ("state", "1"),
        ("dev", "xvda"),
        ("mode", "w"),
        ("device-type", "disk"),
        ("discard-enable", "1"),
    ] {
        assert_eq!(read(key), Some(value.as_bytes().to_vec()), "{key}");
    }
    for (key, value) in [
        ("backend", back.path.as_str()),
        ("backend-id", "0"),
        ("state", "1"),
        ("virtual-device", "51712"),
        ("device-type", "disk"),
        ("trusted", "1"),
    ] {
        assert_eq!(seen(key), Some(value.as_bytes().to_vec()), "{key}");
    }

    let phy: DiskSpec = "null:1G,,xvdb,ro".parse().unwrap();
    let (back, _) = attach_nodes(&phy, BackendKind::Vbd, DomId(0), DomId(7)).unwrap();
    let read = source(&back.nodes);
    assert_eq!(read("params"), Some(b"null:1G".to_vec()));
    assert_eq!((read("mode"), read("discard-enable")), (Some(b"r".to_vec()), Some(b"0".to_vec())));
    let virtio: DiskSpec = "/x,,xvda,specification=virtio".parse().unwrap();
    assert!(attach_nodes(&virtio, BackendKind::Vbd3, DomId(0), DomId(7)).is_err());
}

fn value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => (0..20u32).prop_map(|number| number.to_string().into_bytes()),
        2 => any::<u64>().prop_map(|number| number.to_string().into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..30),
    ]
}

proptest! {
    /// Whatever is in the peer's directory is refused or stays within the offer.
    #[test]
    fn a_hostile_directory_is_refused_or_bounded(
        top in prop::collection::hash_map(
            prop::sample::select(
                [FrontendRequest::KEYS, BackendOffer::KEYS, DeviceProperties::KEYS].concat(),
            ),
            value(),
            0..10,
        ),
        rest in prop::collection::vec(value(), 200),
    ) {
        let grants = std::cell::Cell::new(0);
        let read = |key: &str| {
            if let Some(value) = top.get(key) {
                return Some(value.clone());
            }
            let below = key.contains("ring-ref") || key.ends_with("event-channel");
            below.then(|| {
                grants.set(grants.get() + 1);
                rest.get(grants.get()).cloned().unwrap_or_else(|| grants.get().to_string().into())
            })
        };
        let _ = BackendOffer::from_keys(&read);
        let _ = DeviceProperties::from_keys(&read);
        let request = FrontendRequest::from_keys(&OFFER, &read);
        if let Ok(agreement) = request.and_then(|request| Agreement::new(&OFFER, request)) {
            prop_assert!(agreement.queues.len() <= 4 && agreement.order <= 2);
        }
        prop_assert!(grants.get() <= 4 * (4 + 4 + 1));
    }

    #[test]
    fn every_device_number_survives_its_name(number in 0..RESERVED_FROM) {
        let device = VirtualDevice::from_number(number).unwrap();
        prop_assert_eq!(device.to_string().parse(), Ok(device));
    }
}

const RESERVED_FROM: u32 = 2 << 28;
