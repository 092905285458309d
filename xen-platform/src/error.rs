//! Errors of grants and event channels.

use crate::GrantStatus;
use ring_proto::{DomId, GrantRef, Port};
use std::io;

/// Why a grant or event channel operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A grant was refused.
    #[error("{peer}: {gref}: {status}")]
    Grant {
        /// The granting domain.
        peer: DomId,
        /// The grant.
        gref: GrantRef,
        /// Why.
        #[source]
        status: GrantStatus,
    },
    /// The peer still maps a page that was to be taken back.
    #[error("{gref} is still mapped by its peer")]
    StillMapped {
        /// The first such grant.
        gref: GrantRef,
    },
    /// The domain has no more of something.
    #[error("out of {what} (limit {limit})")]
    Exhausted {
        /// Pages, grant entries, ports.
        what: &'static str,
        /// How many there are.
        limit: usize,
    },
    /// An event channel could not be bound.
    #[error("{peer}: {port}: {reason}")]
    Port {
        /// The domain that holds the other end.
        peer: DomId,
        /// Its port.
        port: Port,
        /// Why.
        reason: &'static str,
    },
    /// The embedded platform's broker refused, or another process of the domain is in the way.
    #[error("{doing}: {reason}")]
    Refused {
        /// What was asked of it.
        doing: String,
        /// Why it was refused, and what to do.
        reason: String,
    },
    /// The embedded platform's broker no longer answers: it ended, or it destroyed our domain.
    #[error(
        "{doing}: the broker closed the connection: domain {domid} was destroyed, or \
         `xen-embedded serve` has ended; start it, create the domain and attach again"
    )]
    BrokerGone {
        /// What was asked of it.
        doing: String,
        /// The domain that this process was.
        domid: DomId,
    },
    /// One of Xen's device files cannot be opened.
    #[error("{path}: {source}: {remedy}")]
    Device {
        /// The file.
        path: &'static str,
        /// Why not.
        source: io::Error,
        /// What to do about it.
        remedy: String,
    },
    /// The system call behind an operation failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done, on what.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// Wraps a failed system call.
    pub fn io(doing: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { doing: doing.into(), source: source.into() }
    }
}

/// An error and its causes, for people to read, without those that were mentioned already.
pub fn in_one_line(error: &dyn std::error::Error) -> String {
    let mut line = String::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        let told = cause.to_string();
        if !line.contains(&told) {
            let colon = if line.is_empty() { "" } else { ": " };
            line = line + colon + &told;
        }
        next = cause.source();
    }
    line
}
