use std::fmt;
use std::ops::Deref;

use super::{ABS_PATH_MAX, REL_PATH_MAX};

/// A path of a node, absolute (`/local/domain/1`), relative to the sender's own directory
/// (`device/vbd`), or the name of a special watch (`@releaseDomain`).
///
/// Made of ASCII letters, digits and `-/_@`, without doubled or trailing slashes, not empty, at
/// most [`ABS_PATH_MAX`] bytes, or [`REL_PATH_MAX`] when relative.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Path(Box<str>);

/// A path that breaks a rule of the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad xenstore path {path:?}: {rule}")]
pub struct BadPath {
    path: String,
    rule: &'static str,
}

impl Path {
    /// Checks a path.
    ///
    /// # Errors
    /// [`BadPath`] with the rule that it breaks.
    pub fn new(path: &str) -> Result<Self, BadPath> {
        match broken_rule(path) {
            None => Ok(Self(path.into())),
            Some(rule) => Err(BadPath { path: path.into(), rule }),
        }
    }

    /// A path out of a payload.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, BadPath> {
        Self::new(&String::from_utf8_lossy(bytes))
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this names a special watch, such as `@introduceDomain`.
    pub fn is_special(&self) -> bool {
        self.0.starts_with('@')
    }

    /// Whether this is relative to the sender's own directory.
    pub fn is_relative(&self) -> bool {
        !self.0.starts_with('/') && !self.is_special()
    }

    /// The same path, absolute: what a relative path means when domain `domid` sends it.
    ///
    /// # Errors
    /// [`BadPath`] if the absolute path would be too long.
    pub fn resolve(&self, domid: u16) -> Result<Self, BadPath> {
        if !self.is_relative() {
            return Ok(self.clone());
        }
        Self::new(&format!("/local/domain/{domid}/{self}"))
    }
}

fn broken_rule(path: &str) -> Option<&'static str> {
    let max = if path.starts_with(['/', '@']) { ABS_PATH_MAX } else { REL_PATH_MAX };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte);
    if path.is_empty() {
        Some("it is empty")
    } else if path.len() > max {
        Some("it is too long")
    } else if !path.bytes().all(allowed) {
        Some("only ASCII letters, digits and -/_@ are allowed")
    } else if path.contains("//") || (path.len() > 1 && path.ends_with('/')) {
        Some("doubled and trailing slashes are forbidden")
    } else {
        None
    }
}

impl Deref for Path {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl TryFrom<&str> for Path {
    type Error = BadPath;

    fn try_from(path: &str) -> Result<Self, BadPath> {
        Self::new(path)
    }
}
