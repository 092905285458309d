use super::*;
use crate::vbd::VirtualDevice;
use proptest::prelude::*;

fn spec(text: &str) -> DiskSpec {
    text.parse().unwrap_or_else(|error: ParseError| panic!("{error}\n{}", error.caret()))
}

fn problem(text: &str) -> (Problem, String) {
    let error = text.parse::<DiskSpec>().unwrap_err();
    (error.problem, text[error.span].to_owned())
}

/// The examples of xl-disk-configuration(5), which it says are equivalent.
#[test]
fn the_man_pages_examples_are_equivalent() {
    let disk = spec("format=raw, vdev=hda, access=rw, target=/dev/vg/guest-volume");
    assert_eq!(disk.target, "/dev/vg/guest-volume");
    assert_eq!((disk.format, disk.read_only, disk.cdrom), (Format::Raw, false, false));
    assert_eq!(disk.vdev.number(), 768);
    for same in [
        "/dev/vg/guest-volume,,hda",
        "/dev/vg/guest-volume,raw,hda,rw",
        "raw:/dev/vg/guest-volume,hda,w",
        "tap:aio:/dev/vg/guest-volume,hda,w",
        " vdev=hda,\t/dev/vg/guest-volume",
        "format=raw,/dev/vg/guest-volume,hda,rw",
        ",,hda,target=/dev/vg/guest-volume",
    ] {
        assert_eq!(spec(same), disk, "{same}");
    }

    assert_eq!(spec("vdev=xvda,target=/dev/x,"), spec("vdev=xvda,target=/dev/x"));
    let cdrom = spec("format=raw, vdev=hdc, access=ro, devtype=cdrom, target=/root/image.iso");
    assert!(cdrom.cdrom && cdrom.read_only);
    for same in [
        "/root/image.iso,,hdc,cdrom",
        "/root/image.iso,,hdc,,cdrom",
        "/root/image.iso,raw,hdc,devtype=cdrom",
        "raw:/root/image.iso,hdc:cdrom,ro",
    ] {
        assert_eq!(spec(same), cdrom, "{same}");
    }

    let empty = spec(",hdc:cdrom,r");
    assert_eq!((empty.target.as_str(), empty.format), ("", Format::Empty));
    assert_eq!(spec("vdev=hdc,devtype=cdrom"), empty);
    assert_eq!(spec("iscsi:/x,xvda,w").script.as_deref(), Some("block-iscsi"));
}

#[test]
fn of_flags_the_last_one_counts() {
    let disk = spec("vdev=xvda,discard,no-discard,untrusted,trusted,cdrom,devtype=disk,/x");
    assert_eq!((disk.discard, disk.trusted, disk.cdrom), (Some(false), true, false));
    assert!(!spec("access=ro,access=rw,/x,,xvda").read_only);
    assert!(spec("access=rw,/x,,xvda,ro").read_only);
    assert!(!spec("access=ro,access=,/x,,xvda").read_only);
}

#[test]
fn a_named_target_takes_the_rest() {
    let disk = spec(
        "vdev=xvda,backendtype=tap,backend=stor,script=/etc/xen/scripts/block-x,no-discard,untrusted,\
         direct-io-safe,target=delay:200us,limit:5000iops,null:64G ",
    );
    assert_eq!(disk.target, "delay:200us,limit:5000iops,null:64G ");
    assert_eq!(disk.backend.as_deref(), Some("stor"));
    assert_eq!(disk.backend_type, Some(BackendType::Tap));
    assert_eq!((disk.discard, disk.trusted, disk.direct_io_safe), (Some(false), false, true));
    // Positional as well, if there is no comma in it.
    assert_eq!(spec("null:64G,,xvda").target, "null:64G");
}

#[test]
fn mistakes_are_pointed_at() {
    let no = |problem: Problem, part: &str| (problem, part.to_owned());
    assert_eq!(problem("/x,,xvda,foo=1"), no(Problem::Unknown("foo".into()), "foo=1"));
    assert_eq!(problem("/x,,xvda,rw,more"), no(Problem::TooMany, "more"));
    assert_eq!(problem("/x,,xvda,vdev=xvdb"), no(Problem::Again("vdev"), "vdev=xvdb"));
    assert_eq!(problem("/x,,xvda,target=/y"), no(Problem::Again("target"), "target=/y"));
    assert_eq!(problem("foo:/x,,xvda"), no(Problem::Prefix, "foo:"));
    assert_eq!(problem("/x"), no(Problem::NoVdev, ""));
    assert_eq!(problem("vdev=xvda"), no(Problem::NoTarget, ""));
    assert_eq!(problem("/x,,xvda,colo"), no(Problem::Unsupported("colo".into()), "colo"));
    assert!(matches!(problem("/x,,disk0"), (Problem::Vdev(_), part) if part == "disk0"));
    assert!(matches!(problem("/x,zip,xvda"), (Problem::Value("format", _), _)));
    assert!(matches!(problem("/x,,xvda,maybe"), (Problem::Value("access", _), _)));

    let error = "/ö,zip,xvda".parse::<DiskSpec>().unwrap_err();
    assert_eq!(error.caret(), "/ö,zip,xvda\n   ^^^");
}

#[test]
fn targets_are_what_params_may_hold() {
    let target = |text: &str| text.parse::<Target>();
    let store = |text: &str| target(text).map(|target| target.store);
    assert_eq!(store("null:64G"), Ok(Store::Null(64 << 30)));
    assert_eq!(store("aio:memory:1g"), Ok(Store::Memory(1 << 30)));
    for path in ["/dev/x", "aio:/dev/x", "phy:/dev/x", "file:/dev/x", "aio:file:/dev/x"] {
        assert_eq!(store(path), Ok(Store::Path("/dev/x".into())), "{path}");
    }
    assert_eq!(store("/a,b:c"), Ok(Store::Path("/a,b:c".into())));
    assert_eq!(store("vg/guest"), Ok(Store::Path("/dev/vg/guest".into())));
    assert_eq!(store("file:aio:x"), Ok(Store::Path("aio:x".into())));
    let wrapped = target("aio:delay:200us,limit:5000iops,limit:1M/s,error:write@0.5%,/x").unwrap();
    assert_eq!(
        wrapped.wrappers,
        [
            Wrapper::Delay(std::time::Duration::from_micros(200)),
            Wrapper::Iops(5000),
            Wrapper::Bandwidth(1 << 20),
            Wrapper::Error { operation: Some(Faulty::Write), parts_per_million: 5000 },
        ]
    );
    assert_eq!(wrapped.to_string(), "delay:200us,limit:5000iops,limit:1M/s,error:write@0.5%,/x");

    assert_eq!(store("qcow2:/x"), Err(TargetError::Format("qcow2".into())));
    assert_eq!(store("nul:64G"), Err(TargetError::Unknown("nul".into())));
    assert_eq!(store(""), Err(TargetError::Empty));
    assert!(matches!(store("null:0"), Err(TargetError::Sectors(_))));
    assert!(matches!(store("null:1000"), Err(TargetError::Sectors(_))));
    assert!(matches!(store("null:-1G"), Err(TargetError::Size(_))));
    assert!(matches!(store("null:16777216T"), Err(TargetError::Size(_))));
    for bare in ["delay:200us", "limit:5000iops", "delay:200us,error:1%,"] {
        assert!(matches!(store(bare), Err(TargetError::Bare(_))), "{bare}");
    }
    for wrapper in [
        "delay:us,/x",
        "delay:2h,/x",
        "delay:2000000s,/x",
        "limit:0iops,/x",
        "limit:5000,/x",
        "error:101%,/x",
        "error:1,/x",
        "error:eat@1%,/x",
        "error:1.00001%,/x",
    ] {
        assert!(matches!(store(wrapper), Err(TargetError::Wrapper(_))), "{wrapper}");
    }
    assert_eq!(store(&("delay:1us,".repeat(9) + "/x")), Err(TargetError::TooMany));
}

/// Strings that look enough like disks to get past the parser.
fn disklike() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        Just(""),
        Just("raw"),
        Just("hda"),
        Just("xvdb1"),
        Just("cdrom"),
        Just("rw"),
        Just("ro"),
        Just("format="),
        Just("vdev="),
        Just("access="),
        Just("backend="),
        Just("script="),
        Just("target="),
        Just("devtype="),
        Just("specification="),
        Just("discard"),
        Just(","),
        Just(" "),
        Just("phy:"),
        Just("qcow2:"),
        Just("/dev/x"),
        Just(":"),
        Just("="),
        Just("é"),
        Just("null:1G"),
        Just("delay:1ms,"),
        Just("error:read@3.25%,"),
        Just("file:"),
        Just(","),
    ];
    prop::collection::vec(part, 0..14).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn disks_and_targets_survive_their_own_display(text in prop_oneof![disklike(), any::<String>()]) {
        match text.parse::<DiskSpec>() {
            Ok(disk) => prop_assert_eq!(disk.to_string().parse(), Ok(disk)),
            Err(error) => {
                prop_assert!(text.get(error.span.clone()).is_some());
                error.caret();
            }
        }
        if let Ok(target) = text.parse::<Target>() {
            prop_assert_eq!(target.to_string().parse(), Ok(target));
        }
    }

    #[test]
    fn sizes_survive_their_own_display(bytes in 0..=i64::MAX as u64, shift in 0..63u32) {
        let bytes = bytes >> shift << shift.min(40);
        if i64::try_from(bytes).is_ok() {
            prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }
    }

    #[test]
    fn specs_survive_their_own_display(
        number in 0..1u32 << 29,
        format in prop::sample::select(Format::ALL.to_vec()),
        backend_type in prop::option::of(prop::sample::select(BackendType::ALL.to_vec())),
        discard in any::<Option<bool>>(),
        read_only in any::<bool>(),
        trusted in any::<bool>(),
        target in "[ -~]{1,20}",
        script in prop::option::of("[ -+--~]{1,20}"),
    ) {
        let disk = DiskSpec {
            target,
            format,
            vdev: VirtualDevice::from_number(number).unwrap(),
            read_only,
            cdrom: false,
            backend: None,
            backend_type,
            script,
            direct_io_safe: trusted,
            discard,
            trusted,
            specification: Specification::Xen,
        };
        prop_assert_eq!(disk.to_string().parse(), Ok(disk));
    }
}
