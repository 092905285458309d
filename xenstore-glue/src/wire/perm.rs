use std::fmt;

use super::number;

/// What a permission entry lets a domain do with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Nothing (`n`).
    None,
    /// Read it, list its children, be told of changes (`r`).
    Read,
    /// Write it, create and remove children (`w`).
    Write,
    /// Read and write (`b`).
    Both,
}

impl Access {
    /// Whether this includes reading.
    pub fn reads(self) -> bool {
        matches!(self, Self::Read | Self::Both)
    }

    /// Whether this includes writing.
    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Both)
    }
}

/// One entry of a node's permission list.
///
/// The **first** entry of a list is special: its domain owns the node and may do anything, and its
/// access applies to every domain that the list does not name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Perm {
    /// The domain it applies to.
    pub domid: u16,
    /// What it allows.
    pub access: Access,
}

impl Perm {
    /// An entry.
    pub const fn new(domid: u16, access: Access) -> Self {
        Self { domid, access }
    }

    /// Reads the protocol's form, such as `r5`.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (letter, domid) = bytes.split_first()?;
        let access = match letter {
            b'n' => Access::None,
            b'r' => Access::Read,
            b'w' => Access::Write,
            b'b' => Access::Both,
            _ => return None,
        };
        Some(Self { domid: number(domid)?, access })
    }
}

impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.access {
            Access::None => 'n',
            Access::Read => 'r',
            Access::Write => 'w',
            Access::Both => 'b',
        };
        write!(f, "{letter}{}", self.domid)
    }
}
