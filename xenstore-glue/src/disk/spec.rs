//! Disks in a guest's configuration.
//!
//! Follows libxl's own scanner (libxlu_disk_l.l) where the man page leaves something open. The COLO
//! parameters, and `grant_usage`, which is for virtio only, are refused as unsupported.

use crate::vbd::{VdevError, VirtualDevice};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// Defines an enum of words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$item:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        pub enum $name { $($(#[$item])* $variant,)* }

        impl $name {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The word in the syntax.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }

            fn from_word(word: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|item| item.as_str() == word)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words!(
    /// The format of an image.
    Format {
        /// No format: the bytes of the target are those of the disk.
        Raw = "raw",
        /// The first QEMU format.
        Qcow = "qcow",
        /// The second QEMU format.
        Qcow2 = "qcow2",
        /// Microsoft's.
        Vhd = "vhd",
        /// QEMU's retired one.
        Qed = "qed",
        /// A CD-ROM drive without a medium.
        Empty = "empty",
    }
);

words!(
    /// Which implementation serves the disk.
    BackendType {
        /// Linux's kernel backend.
        Phy = "phy",
        /// QEMU.
        Qdisk = "qdisk",
        /// A virtio backend outside QEMU.
        Standalone = "standalone",
        /// tapback, or us.
        Tap = "tap",
    }
);

words!(
    /// The protocol that guest and backend speak.
    Specification {
        /// Xen PV.
        Xen = "xen",
        /// virtio-blk.
        Virtio = "virtio",
    }
);

/// A disk of a guest. Displays as a string that parses to the same.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskSpec {
    /// What the backend serves; empty for a CD-ROM drive without a medium. Taken verbatim: the man
    /// page's "/dev is prepended" is left to [`Target`](super::Target).
    pub target: String,
    /// The format of the target.
    pub format: Format,
    /// What the guest sees.
    pub vdev: VirtualDevice,
    /// The guest cannot write. Always true for a CD-ROM.
    pub read_only: bool,
    /// A CD-ROM drive.
    pub cdrom: bool,
    /// The domain that serves it, by name or number; `None` for domain 0.
    pub backend: Option<String>,
    /// Who serves it; `None` lets the toolstack choose.
    pub backend_type: Option<BackendType>,
    /// What prepares the target, by path or by name in the script directory.
    pub script: Option<String>,
    /// The storage is not a network file system, so that O_DIRECT is safe on old kernels.
    pub direct_io_safe: bool,
    /// Whether to offer discard; `None` means yes unless read-only.
    pub discard: Option<bool>,
    /// Whether the frontend should trust the backend with its memory.
    pub trusted: bool,
    /// The protocol.
    pub specification: Specification,
}

/// Why a string is not a disk, and where.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{problem}, in the disk {input:?} at {span:?}")]
pub struct ParseError {
    /// The whole string.
    pub input: String,
    /// The part of it that is wrong, in bytes, on character boundaries; empty if something is missing.
    pub span: Range<usize>,
    /// What is wrong with it.
    pub problem: Problem,
}

impl ParseError {
    /// The string, and a line of carets below the part that is wrong.
    pub fn caret(&self) -> String {
        let before = self.input.get(..self.span.start).map_or(0, |text| text.chars().count());
        let below = self.input.get(self.span.clone()).map_or(0, |text| text.chars().count());
        // Characters that would break the line or move the carets are shown as spaces.
        let line: String =
            self.input.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        format!("{line}\n{}{}", " ".repeat(before), "^".repeat(below.max(1)))
    }
}

/// What is wrong with a part of a disk.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Problem {
    /// A key or flag that xl does not know either.
    #[error("unknown parameter {0:?}")]
    Unknown(String),
    /// A key that xl knows but this program does not act on.
    #[error("parameter {0:?} is not supported here")]
    Unsupported(String),
    /// A parameter was given before, with another value.
    #[error("{0} was given before")]
    Again(&'static str),
    /// A value that is not among its key's words.
    #[error("{0} must be one of {1}")]
    Value(&'static str, &'static str),
    /// More than target, format, vdev and access.
    #[error("more than the four positional parameters target, format, vdev and access")]
    TooMany,
    /// `word:` in front of the target, with a word that xl does not know either.
    #[error("unknown prefix; if it is part of the target, write target= and put it last")]
    Prefix,
    /// There must be a `vdev`.
    #[error("no vdev: say what the guest sees, such as vdev=xvda")]
    NoVdev,
    /// There must be a target, except for a CD-ROM drive.
    #[error("no target: say what to serve, such as target=/dev/vg/disk")]
    NoTarget,
    /// The `vdev` is invalid.
    #[error(transparent)]
    Vdev(#[from] VdevError),
}

/// A parameter that may be given once; after an empty value it may be given again.
struct Slot<T> {
    name: &'static str,
    /// `None` if not given; an empty value is a default that takes up the position.
    value: Option<Option<T>>,
}

impl<T: PartialEq> Slot<T> {
    const fn new(name: &'static str) -> Self {
        Self { name, value: None }
    }

    fn is_given(&self) -> bool {
        self.value.is_some()
    }

    fn set(&mut self, value: Option<T>) -> Result<(), Problem> {
        match &self.value {
            Some(Some(before)) if value.as_ref().is_some_and(|value| value != before) => {
                Err(Problem::Again(self.name))
            }
            Some(Some(_)) => Ok(()),
            _ => {
                self.value = Some(value);
                Ok(())
            }
        }
    }

    fn get(self) -> Option<T> {
        self.value.flatten()
    }
}

struct Parser {
    target: Slot<String>,
    format: Slot<Format>,
    vdev: Slot<VirtualDevice>,
    backend: Slot<String>,
    backend_type: Slot<BackendType>,
    script: Slot<String>,
    specification: Slot<Specification>,
    // For these the last one counts.
    read_only: bool,
    cdrom: bool,
    discard: Option<bool>,
    trusted: bool,
    direct_io_safe: bool,
    /// The positional access was given.
    accessed: bool,
    /// A deprecated prefix was given: no positional format follows.
    prefixed: bool,
}

impl FromStr for DiskSpec {
    type Err = ParseError;

    fn from_str(input: &str) -> Result<Self, ParseError> {
        let error = |span, problem| ParseError { input: input.to_owned(), span, problem };
        let mut parser = Parser::new();
        let mut at = 0;
        while at < input.len() {
            let rest = &input[at..];
            let skipped = rest.len() - rest.trim_start_matches([' ', '\t', '\n']).len();
            at += skipped;
            let rest = &input[at..];
            if rest.is_empty() {
                break;
            }
            if let Some(target) = rest.strip_prefix("target=") {
                // As xl's scanner does it.
                let set = parser.target.set(text(target.strip_suffix(',').unwrap_or(target)));
                set.map_err(|problem| error(at..input.len(), problem))?;
                break;
            }
            match parser.prefix(rest) {
                Ok(0) => {}
                Ok(length) => {
                    at += length;
                    continue;
                }
                Err((length, problem)) => return Err(error(at..at + length, problem)),
            }
            let length = rest.find(',').unwrap_or(rest.len());
            parser.parameter(&rest[..length]).map_err(|p| error(at..at + length, p))?;
            at += length + 1;
        }
        parser.finish().map_err(|problem| error(input.len()..input.len(), problem))
    }
}

fn text(value: &str) -> Option<String> {
    (!value.is_empty()).then(|| value.to_owned())
}

/// Reads one of an enum's words; an empty value is the default.
fn word<T>(
    value: &str,
    key: &'static str,
    words: &'static str,
    parse: fn(&str) -> Option<T>,
) -> Result<Option<T>, Problem> {
    match value {
        "" => Ok(None),
        _ => parse(value).map(Some).ok_or(Problem::Value(key, words)),
    }
}

fn format(value: &str) -> Result<Option<Format>, Problem> {
    word(value, "format", "raw, qcow, qcow2, vhd, qed, empty", Format::from_word)
}

fn is_read_only(value: &str) -> Result<bool, Problem> {
    match value {
        "ro" | "r" => Ok(true),
        "rw" | "w" | "" => Ok(false),
        _ => Err(Problem::Value("access", "ro, r, rw, w")),
    }
}

fn is_cdrom(value: &str) -> Result<bool, Problem> {
    match value {
        "cdrom" => Ok(true),
        "disk" | "" => Ok(false),
        _ => Err(Problem::Value("devtype", "cdrom, disk")),
    }
}

fn vdev(value: &str) -> Result<Option<VirtualDevice>, Problem> {
    if value.is_empty() { Ok(None) } else { Ok(Some(value.parse()?)) }
}

impl Parser {
    const fn new() -> Self {
        Self {
            target: Slot::new("target"),
            format: Slot::new("format"),
            vdev: Slot::new("vdev"),
            backend: Slot::new("backend"),
            backend_type: Slot::new("backendtype"),
            script: Slot::new("script"),
            specification: Slot::new("specification"),
            read_only: false,
            cdrom: false,
            discard: None,
            trusted: true,
            direct_io_safe: false,
            accessed: false,
            prefixed: false,
        }
    }

    /// Strips a deprecated prefix from a positional target and returns its length.
    fn prefix(&mut self, rest: &str) -> Result<usize, (usize, Problem)> {
        let Some(colon) = rest.find(':') else { return Ok(0) };
        let (word, behind) = (&rest[..colon], &rest[colon + 1..]);
        let is_word = word.starts_with(|c: char| c.is_ascii_lowercase())
            && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if self.target.is_given() || !is_word {
            return Ok(0);
        }
        let length = colon + 1;
        let set = match word {
            "raw" | "qcow" | "qcow2" | "vhd" => self.format.set(Format::from_word(word)),
            "iscsi" | "nbd" | "enbd" | "drbd" => self.script.set(Some(format!("block-{word}"))),
            "tapdisk" | "tap" | "tap2" | "aio" | "ioemu" | "file" | "phy" => Ok(()),
            // As in the scanner, so that `null:1G` is a target and `foo:/bar` is a mistake.
            _ if behind.starts_with(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit()) => {
                Err(Problem::Prefix)
            }
            _ => return Ok(0),
        };
        self.prefixed = true;
        set.map(|()| length).map_err(|problem| (length, problem))
    }

    fn parameter(&mut self, parameter: &str) -> Result<(), Problem> {
        if let Some((key, value)) = parameter.split_once('=') {
            return self.keyword(key, value);
        }
        match parameter {
            "cdrom" => self.cdrom = true,
            "discard" => self.discard = Some(true),
            "no-discard" => self.discard = Some(false),
            "trusted" => self.trusted = true,
            "untrusted" => self.trusted = false,
            "direct-io-safe" => self.direct_io_safe = true,
            "colo" | "no-colo" => return Err(Problem::Unsupported(parameter.to_owned())),
            _ => return self.positional(parameter),
        }
        Ok(())
    }

    fn keyword(&mut self, key: &str, value: &str) -> Result<(), Problem> {
        match key {
            "format" => self.format.set(Some(format(value)?.unwrap_or(Format::Raw))),
            "vdev" => self.vdev.set(vdev(value)?),
            "access" => {
                self.read_only = is_read_only(value)?;
                Ok(())
            }
            "devtype" => {
                self.cdrom = is_cdrom(value)?;
                Ok(())
            }
            "backend" => self.backend.set(text(value)),
            "backendtype" => {
                let words = "phy, qdisk, standalone, tap";
                self.backend_type.set(word(value, "backendtype", words, BackendType::from_word)?)
            }
            "script" => self.script.set(text(value)),
            "specification" => {
                let parse = Specification::from_word;
                self.specification.set(word(value, "specification", "xen, virtio", parse)?)
            }
            "grant_usage" | "colo-host" | "colo-port" | "colo-export" | "active-disk"
            | "hidden-disk" => Err(Problem::Unsupported(key.to_owned())),
            _ => Err(Problem::Unknown(key.to_owned())),
        }
    }

    fn positional(&mut self, value: &str) -> Result<(), Problem> {
        if !self.target.is_given() {
            return self.target.set(text(value));
        }
        if !self.prefixed && !self.format.is_given() {
            // xend's empty CD-ROM drive, `,hdc:cdrom,r`.
            if self.target.value == Some(None) && value.contains(':') {
                self.format.set(Some(Format::Empty))?;
                return self.vdev_and_devtype(value);
            }
            return self.format.set(Some(format(value)?.unwrap_or(Format::Raw)));
        }
        if !self.vdev.is_given() {
            return self.vdev_and_devtype(value);
        }
        if self.accessed {
            return Err(Problem::TooMany);
        }
        self.accessed = true;
        self.read_only = is_read_only(value)?;
        Ok(())
    }

    fn vdev_and_devtype(&mut self, value: &str) -> Result<(), Problem> {
        let (name, kind) = value.rsplit_once(':').unwrap_or((value, ""));
        if !kind.is_empty() {
            self.cdrom = is_cdrom(kind)?;
        }
        self.vdev.set(vdev(name)?)
    }

    fn finish(self) -> Result<DiskSpec, Problem> {
        let cdrom = self.cdrom;
        let target = self.target.get().unwrap_or_default();
        let vdev = self.vdev.get().ok_or(Problem::NoVdev)?;
        if target.is_empty() && !cdrom {
            return Err(Problem::NoTarget);
        }
        let format = if target.is_empty() { Some(Format::Empty) } else { self.format.get() };
        Ok(DiskSpec {
            target,
            format: format.unwrap_or(Format::Raw),
            vdev,
            read_only: cdrom || self.read_only,
            cdrom,
            backend: self.backend.get(),
            backend_type: self.backend_type.get(),
            script: self.script.get(),
            direct_io_safe: self.direct_io_safe,
            discard: self.discard,
            trusted: self.trusted,
            specification: self.specification.get().unwrap_or(Specification::Xen),
        })
    }
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = if self.read_only { "ro" } else { "rw" };
        write!(f, "format={}, vdev={}, access={access}", self.format, self.vdev)?;
        if self.cdrom {
            f.write_str(", devtype=cdrom")?;
        }
        if let Some(backend) = &self.backend {
            write!(f, ", backend={backend}")?;
        }
        if let Some(kind) = self.backend_type {
            write!(f, ", backendtype={kind}")?;
        }
        if let Some(script) = &self.script {
            write!(f, ", script={script}")?;
        }
        if self.direct_io_safe {
            f.write_str(", direct-io-safe")?;
        }
        match self.discard {
            Some(true) => f.write_str(", discard")?,
            Some(false) => f.write_str(", no-discard")?,
            None => {}
        }
        if !self.trusted {
            f.write_str(", untrusted")?;
        }
        if self.specification != Specification::Xen {
            write!(f, ", specification={}", self.specification)?;
        }
        if !self.target.is_empty() {
            write!(f, ", target={}", self.target)?;
            // The parser strips one trailing comma.
            if self.target.ends_with(',') {
                f.write_str(",")?;
            }
        }
        Ok(())
    }
}
