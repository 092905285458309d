//! The ioctls of Linux's Xen devices: `xen/gntdev.h`, `xen/gntalloc.h` and `xen/evtchn.h` of its
//! user-space headers.

use nix::libc::c_ulong;

/// `_IOC(_IOC_NONE, kind, number, size)`: these devices put the size of the argument into the number
/// but no direction, which none of nix's usual macros does.
const fn request(kind: u8, number: u8, size: usize) -> c_ulong {
    (size as c_ulong) << 16 | (kind as c_ulong) << 8 | number as c_ulong
}

const GNTDEV: u8 = b'G';
const EVTCHN: u8 = b'E';

const MAP_GRANT_REF: c_ulong = request(GNTDEV, 0, size_of::<MapGrantRef>());
const UNMAP_GRANT_REF: c_ulong = request(GNTDEV, 1, size_of::<UnmapGrantRef>());
const GRANT_COPY: c_ulong = request(GNTDEV, 8, size_of::<GrantCopy>());
const ALLOC_GREF: c_ulong = request(GNTDEV, 5, size_of::<AllocGref>());
const DEALLOC_GREF: c_ulong = request(GNTDEV, 6, size_of::<DeallocGref>());
const BIND_INTERDOMAIN: c_ulong = request(EVTCHN, 1, size_of::<BindInterdomain>());
const BIND_UNBOUND_PORT: c_ulong = request(EVTCHN, 2, size_of::<BindUnboundPort>());
const UNBIND: c_ulong = request(EVTCHN, 3, size_of::<PortArgument>());
const NOTIFY: c_ulong = request(EVTCHN, 4, size_of::<PortArgument>());
const RESET: c_ulong = request(EVTCHN, 5, 0);
const RESTRICT_DOMID: c_ulong = request(EVTCHN, 6, size_of::<RestrictDomid>());

/// `struct ioctl_gntdev_grant_ref`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct MapRef {
    pub(super) domid: u32,
    pub(super) gref: u32,
}

/// `struct ioctl_gntdev_map_grant_ref`. The other `refs` follow it in memory.
#[repr(C)]
pub(super) struct MapGrantRef {
    pub(super) count: u32,
    pub(super) pad: u32,
    pub(super) index: u64,
    pub(super) refs: [MapRef; 1],
}

/// `struct ioctl_gntdev_unmap_grant_ref`.
#[repr(C)]
pub(super) struct UnmapGrantRef {
    pub(super) index: u64,
    pub(super) count: u32,
    pub(super) pad: u32,
}

/// The struct `foreign` of a [`CopySide`].
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Foreign {
    pub(super) gref: u32,
    pub(super) offset: u16,
    pub(super) domid: u16,
}

/// The union `source` or `dest` of `struct ioctl_gntdev_grant_copy_segment`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) union CopySide {
    /// An address, `void *` in C.
    pub(super) virt: usize,
    pub(super) foreign: Foreign,
}

/// `struct ioctl_gntdev_grant_copy_segment`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct GrantCopySegment {
    pub(super) source: CopySide,
    pub(super) dest: CopySide,
    pub(super) len: u16,
    pub(super) flags: u16,
    /// A `GNTST_*`; the kernel writes it.
    pub(super) status: i16,
}

/// `GNTCOPY_source_gref` of grant_table.h: `source` is foreign.
pub(super) const COPY_FROM_GRANT: u16 = 1 << 0;
/// `GNTCOPY_dest_gref` of grant_table.h: `dest` is foreign.
pub(super) const COPY_TO_GRANT: u16 = 1 << 1;

/// `struct ioctl_gntdev_grant_copy`.
#[repr(C)]
pub(super) struct GrantCopy {
    pub(super) count: u32,
    pub(super) segments: *mut GrantCopySegment,
}

/// `struct ioctl_gntalloc_alloc_gref`. The other `gref_ids` follow it in memory.
#[repr(C)]
pub(super) struct AllocGref {
    pub(super) domid: u16,
    pub(super) flags: u16,
    pub(super) count: u32,
    pub(super) index: u64,
    pub(super) gref_ids: [u32; 1],
}

/// `GNTALLOC_FLAG_WRITABLE`: the peer may write.
pub(super) const ALLOC_WRITABLE: u16 = 1;

/// `struct ioctl_gntalloc_dealloc_gref`.
#[repr(C)]
pub(super) struct DeallocGref {
    pub(super) index: u64,
    pub(super) count: u32,
}

/// `struct ioctl_evtchn_bind_interdomain`.
#[repr(C)]
pub(super) struct BindInterdomain {
    pub(super) remote_domain: u32,
    pub(super) remote_port: u32,
}

/// `struct ioctl_evtchn_bind_unbound_port`.
#[repr(C)]
pub(super) struct BindUnboundPort {
    pub(super) remote_domain: u32,
}

/// `struct ioctl_evtchn_unbind` and `struct ioctl_evtchn_notify`.
#[repr(C)]
pub(super) struct PortArgument {
    pub(super) port: u32,
}

/// `struct ioctl_evtchn_restrict_domid`.
#[repr(C)]
pub(super) struct RestrictDomid {
    pub(super) domid: u16,
}

nix::ioctl_readwrite_bad!(gntdev_map, MAP_GRANT_REF, MapGrantRef);
nix::ioctl_readwrite_bad!(gntdev_unmap, UNMAP_GRANT_REF, UnmapGrantRef);
nix::ioctl_readwrite_bad!(gntdev_copy, GRANT_COPY, GrantCopy);
nix::ioctl_readwrite_bad!(gntalloc_alloc, ALLOC_GREF, AllocGref);
nix::ioctl_readwrite_bad!(gntalloc_dealloc, DEALLOC_GREF, DeallocGref);
nix::ioctl_readwrite_bad!(evtchn_bind_interdomain, BIND_INTERDOMAIN, BindInterdomain);
nix::ioctl_readwrite_bad!(evtchn_bind_unbound, BIND_UNBOUND_PORT, BindUnboundPort);
nix::ioctl_readwrite_bad!(evtchn_unbind, UNBIND, PortArgument);
nix::ioctl_readwrite_bad!(evtchn_notify, NOTIFY, PortArgument);
nix::ioctl_readwrite_bad!(evtchn_restrict, RESTRICT_DOMID, RestrictDomid);
nix::ioctl_none_bad!(evtchn_reset, RESET);

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;
    use std::mem::offset_of;
    use std::process::Command;

    /// The headers' values, as a C program prints them, one `name value` a line, must be ours.
    #[test]
    fn numbers_and_layouts_are_those_of_the_headers() {
        let mut c = String::from(concat!(
            "#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n",
            "#include <linux/ioctl.h>\n#include <xen/xen.h>\n#include <xen/grant_table.h>\n",
            "#include <xen/sys/gntdev.h>\n#include <xen/sys/gntalloc.h>\n",
            "#include <xen/sys/evtchn.h>\n",
            "int main(void) {\n",
        ));
        let mut ours = String::new();
        let mut same = |expression: &str, value: u64| {
            writeln!(
                c,
                "printf(\"%s %llu\\n\", \"{expression}\", (unsigned long long)({expression}));"
            )
            .unwrap();
            writeln!(ours, "{expression} {value}").unwrap();
        };
        macro_rules! numbers {
            ($($c:literal = $ours:expr),* $(,)?) => { $(same($c, u64::from($ours));)* };
        }
        macro_rules! layouts {
            ($($c:literal = $ours:ty { $($field:literal = $($ours_field:ident).+),* $(,)? })*) => { $(
                same(concat!("sizeof(struct ", $c, ")"), size_of::<$ours>() as u64);
                $(same(
                    concat!("offsetof(struct ", $c, ", ", $field, ")"),
                    offset_of!($ours, $($ours_field).+) as u64,
                );)*
            )* };
        }
        numbers! {
            "IOCTL_GNTDEV_MAP_GRANT_REF" = MAP_GRANT_REF,
            "IOCTL_GNTDEV_UNMAP_GRANT_REF" = UNMAP_GRANT_REF,
            "IOCTL_GNTDEV_GRANT_COPY" = GRANT_COPY,
            "IOCTL_GNTALLOC_ALLOC_GREF" = ALLOC_GREF,
            "IOCTL_GNTALLOC_DEALLOC_GREF" = DEALLOC_GREF,
            "IOCTL_EVTCHN_BIND_INTERDOMAIN" = BIND_INTERDOMAIN,
            "IOCTL_EVTCHN_BIND_UNBOUND_PORT" = BIND_UNBOUND_PORT,
            "IOCTL_EVTCHN_UNBIND" = UNBIND,
            "IOCTL_EVTCHN_NOTIFY" = NOTIFY,
            "IOCTL_EVTCHN_RESET" = RESET,
            "IOCTL_EVTCHN_RESTRICT_DOMID" = RESTRICT_DOMID,
            "GNTCOPY_source_gref" = COPY_FROM_GRANT,
            "GNTCOPY_dest_gref" = COPY_TO_GRANT,
            "GNTALLOC_FLAG_WRITABLE" = ALLOC_WRITABLE,
        }
        layouts! {
            "ioctl_gntdev_grant_ref" = MapRef { "domid" = domid, "ref" = gref }
            "ioctl_gntdev_map_grant_ref" = MapGrantRef {
                "count" = count, "index" = index, "refs" = refs,
            }
            "ioctl_gntdev_unmap_grant_ref" = UnmapGrantRef { "index" = index, "count" = count }
            "ioctl_gntdev_grant_copy_segment" = GrantCopySegment {
                "source.virt" = source.virt,
                "source.foreign.ref" = source.foreign.gref,
                "source.foreign.offset" = source.foreign.offset,
                "source.foreign.domid" = source.foreign.domid,
                "dest.virt" = dest.virt,
                "dest.foreign.ref" = dest.foreign.gref,
                "dest.foreign.offset" = dest.foreign.offset,
                "dest.foreign.domid" = dest.foreign.domid,
                "len" = len, "flags" = flags, "status" = status,
            }
            "ioctl_gntdev_grant_copy" = GrantCopy { "count" = count, "segments" = segments }
            "ioctl_gntalloc_alloc_gref" = AllocGref {
                "domid" = domid, "flags" = flags, "count" = count, "index" = index,
                "gref_ids" = gref_ids,
            }
            "ioctl_gntalloc_dealloc_gref" = DeallocGref { "index" = index, "count" = count }
            "ioctl_evtchn_bind_interdomain" = BindInterdomain {
                "remote_domain" = remote_domain, "remote_port" = remote_port,
            }
            "ioctl_evtchn_bind_unbound_port" = BindUnboundPort { "remote_domain" = remote_domain }
            "ioctl_evtchn_unbind" = PortArgument { "port" = port }
            "ioctl_evtchn_notify" = PortArgument { "port" = port }
            "ioctl_evtchn_restrict_domid" = RestrictDomid { "domid" = domid }
        }
        c.push_str("}\n");

        let directory = std::env::temp_dir().join(format!("xen-abi-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (source, program) = (directory.join("abi.c"), directory.join("abi"));
        std::fs::write(&source, c).unwrap();
        let built = Command::new("cc").arg("-o").arg(&program).arg(&source).output().unwrap();
        let hint = "this test needs a C compiler and Xen's headers (gcc, libc6-dev, libxen-dev)";
        assert!(built.status.success(), "{hint}: {}", String::from_utf8_lossy(&built.stderr));
        let theirs = Command::new(&program).output().unwrap().stdout;
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!(String::from_utf8(theirs).unwrap(), ours);
    }
}
