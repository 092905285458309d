//! Where statistics are served.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// Where `blkback stats` looks if neither a flag nor the configuration says.
pub const DEFAULT_ADDRESS: &str = "unix:/run/blkback/stats.sock";

/// `unix:PATH`, or `HOST:PORT` with a loopback host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket, for its owner only.
    Unix(PathBuf),
    /// A TCP port that only this host can reach; any of its users may read.
    Loopback(SocketAddr),
}

/// Why a text is not an [`Address`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither of the two forms.
    #[error("address {0:?} is neither unix:PATH nor HOST:PORT with localhost or an IP address")]
    Form(String),
    /// Statistics show what guests do, and there is no authentication.
    #[error("address {0} is not a loopback address: statistics are served to this host only")]
    NotLoopback(SocketAddr),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let form = || AddressError::Form(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(form()) } else { Ok(Self::Unix(path.into())) };
        }
        let address = match text.strip_prefix("localhost:") {
            // No resolver is asked, which might return anything.
            Some(port) => {
                SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port.parse().map_err(|_| form())?)
            }
            None => text.parse().map_err(|_| form())?,
        };
        if address.ip().is_loopback() {
            Ok(Self::Loopback(address))
        } else {
            Err(AddressError::NotLoopback(address))
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Loopback(address) => address.fmt(f),
        }
    }
}
