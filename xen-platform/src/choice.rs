//! The user's choice of a hypervisor.

use crate::embedded::EmbeddedPlatform;
use crate::xen::{self, XenPlatform};
use crate::{Error, Platform};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use xenstore_glue::client::Endpoint;

/// A hypervisor, and which of its domains this is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Xen itself, in whichever domain this process runs.
    Xen,
    /// The embedded platform in a directory, and a domain of it.
    Embedded {
        /// The directory that `xen-embedded serve` was given.
        dir: PathBuf,
        /// Name or number.
        domain: String,
    },
}

/// Which end of a split driver a program is: each needs other devices of Xen's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Grants.
    Frontend,
    /// Uses what others grant.
    Backend,
}

/// What the user asked for is incomplete or contradictory.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChoiceError {
    /// No platform was named, and this is not Xen.
    #[error("which hypervisor? This machine does not run on Xen: say --platform embedded:DIR")]
    NotXen,
    /// There is no such platform.
    #[error("platform {0:?} is not known: say xen or embedded:DIR")]
    Unknown(String),
    /// On Xen, a domain was named.
    #[error("domain {0:?} cannot be chosen on Xen: it is the one that this runs in")]
    DomainOnXen(String),
    /// On the embedded platform, no domain was named.
    #[error("which domain of {0:?}? Say --domain NAME")]
    NoDomain(PathBuf),
}

impl Choice {
    /// Understands `xen` or `embedded:DIR`, and a domain's name or number. Without a platform, a machine
    /// that runs on Xen uses that.
    ///
    /// # Errors
    /// What to say instead.
    pub fn new(platform: Option<&str>, domain: Option<&str>) -> Result<Self, ChoiceError> {
        let platform = match platform {
            Some(platform) => platform,
            None if xen::is_xen() => "xen",
            None => return Err(ChoiceError::NotXen),
        };
        if platform == "xen" {
            return match domain {
                Some(domain) => Err(ChoiceError::DomainOnXen(domain.to_owned())),
                None => Ok(Self::Xen),
            };
        }
        let Some(dir) = platform.strip_prefix("embedded:") else {
            return Err(ChoiceError::Unknown(platform.to_owned()));
        };
        let dir = PathBuf::from(dir);
        match domain {
            Some(domain) => Ok(Self::Embedded { dir, domain: domain.to_owned() }),
            None => Err(ChoiceError::NoDomain(dir)),
        }
    }

    /// Becomes the domain, and returns its xenstore's endpoint. Blocks.
    ///
    /// # Errors
    /// As [`XenPlatform::for_frontend`] or [`XenPlatform::for_backend`], or
    /// [`EmbeddedPlatform::attach`].
    pub fn open(&self, end: End) -> Result<(Arc<dyn Platform>, Endpoint), Error> {
        match self {
            Self::Xen => {
                let endpoint = Endpoint::from_env();
                let platform = match end {
                    End::Frontend => XenPlatform::for_frontend(&endpoint)?,
                    End::Backend => XenPlatform::for_backend(&endpoint)?,
                };
                Ok((platform, endpoint))
            }
            Self::Embedded { dir, domain } => {
                let platform = EmbeddedPlatform::attach(dir, domain)?;
                let endpoint = Endpoint::Unix(platform.xenstore_socket());
                Ok((platform, endpoint))
            }
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xen => f.write_str("this domain of Xen"),
            Self::Embedded { dir, domain } => {
                write!(f, "domain {domain} of the platform in {}", dir.display())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_users_say() {
        let say = Choice::new;
        assert_eq!(say(Some("xen"), None), Ok(Choice::Xen));
        assert_eq!(say(Some("xen"), Some("a")), Err(ChoiceError::DomainOnXen("a".into())));
        let (dir, domain) = (PathBuf::from("/run/x"), "7".to_owned());
        assert_eq!(say(Some("embedded:/run/x"), None), Err(ChoiceError::NoDomain(dir.clone())));
        assert_eq!(say(Some("embedded:/run/x"), Some("7")), Ok(Choice::Embedded { dir, domain }));
        assert_eq!(say(Some("kvm"), None), Err(ChoiceError::Unknown("kvm".into())));
    }
}
