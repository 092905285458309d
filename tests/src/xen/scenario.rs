//! What a host is made to do: a script in dom0 and one in its guests.

/// A scenario.
#[derive(Debug)]
pub struct Script {
    /// What it is asked for by.
    pub name: &'static str,
    /// What it shows, in a line.
    pub about: &'static str,
    /// Run by dom0 when Xen's daemons are up; that it ends with 0 is success.
    pub dom0: &'static str,
    /// Run by every guest.
    pub guest: &'static str,
}

const DISK: &str = include_str!("scripts/guest-disk.sh");

/// All scenarios.
pub const SCENARIOS: &[Script] = &[
    Script {
        name: "kernel",
        about: "Linux's xen-blkback in dom0, a PV guest: shows that the machine works",
        dom0: include_str!("scripts/kernel.sh"),
        guest: DISK,
    },
    Script {
        name: "dom0-phy",
        about: "blkback in dom0 by backendtype=phy, a PV guest with Linux's xen-blkfront",
        dom0: include_str!("scripts/dom0-phy.sh"),
        guest: DISK,
    },
    Script {
        name: "dom0-tap",
        about: "the same by backendtype=tap: Xen 4.19 or later, so --suite trixie",
        dom0: include_str!("scripts/dom0-tap.sh"),
        guest: DISK,
    },
];

/// A shell on dom0's console; its guests wait at a shell of their own.
pub const SHELL: Script = Script {
    name: "shell",
    about: "an interactive host",
    dom0: include_str!("scripts/shell.sh"),
    guest: include_str!("scripts/guest-shell.sh"),
};

/// The scenario of a name.
pub fn find(name: &str) -> Option<&'static Script> {
    SCENARIOS.iter().find(|scenario| scenario.name == name)
}
