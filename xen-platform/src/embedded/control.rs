//! The toolstack's commands to the broker, on `control.sock`: a JSON command and a JSON answer, one line
//! each.

use crate::{Error, Result};
use ring_proto::DomId;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// In the broker's directory.
pub const CONTROL_SOCKET: &str = "control.sock";

/// Longest name of a domain, in bytes. It becomes a line of a table and a xenstore value.
pub const MAX_NAME: usize = 64;

/// Longest command or answer, in bytes: a list of all domains fits.
pub const MAX_LINE: u64 = 16 << 20;

/// Smallest memory of a domain in bytes: a few rings of the highest order with their data.
pub const MIN_MEMORY: u64 = 1 << 20;
/// Largest memory of a domain in bytes: the frame numbers of v1 grants have 32 bits.
pub const MAX_MEMORY: u64 = 1 << 44;

/// What happens to a domain when its process ends, like `on_crash` in xl.cfg(5).
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub enum OnCrash {
    /// It is destroyed, and its devices with it.
    Destroy,
    /// It stays, without memory or event channels, until a process attaches again.
    Preserve,
}

/// A domain to create.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct NewDomain {
    /// Unique; not a number.
    pub name: String,
    /// Its number, or `None` for the next free one.
    pub domid: Option<u16>,
    /// Memory in bytes.
    pub memory: u64,
    /// Number of vCPUs, on which the frontend's number of queues depends.
    pub vcpus: u32,
    /// Whether it may serve devices to other domains.
    pub driver_domain: bool,
    /// What to do when its process ends.
    pub on_crash: OnCrash,
}

/// A domain that exists.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct DomainInfo {
    /// Its number.
    pub domid: u16,
    /// Its name.
    pub name: String,
    /// Memory in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Whether it may serve devices to other domains.
    pub driver_domain: bool,
    /// What to do when its process ends.
    pub on_crash: OnCrash,
    /// The process attached to it.
    pub process: Option<i32>,
    /// Open event channel ports.
    pub ports: usize,
}

/// A command.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Answered by [`Answer::Domain`].
    CreateDomain(NewDomain),
    /// Kills the domain's process and removes the domain. Answered by [`Answer::Done`].
    DestroyDomain {
        /// Its number.
        domid: u16,
    },
    /// Answered by [`Answer::Domains`].
    ListDomains,
    /// Does what a restart of xenstored does: closes all connections, with their watches and transactions,
    /// and listens again; the contents of the store stay. Answered by [`Answer::Done`].
    RestartXenstore,
}

/// The answer to a command.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is done.
    Done,
    /// The domain asked for.
    Domain(DomainInfo),
    /// All domains, by number.
    Domains(Vec<DomainInfo>),
    /// It was not done, for this reason.
    Refused(String),
}

/// Asks the broker in `dir`.
///
/// # Errors
/// When there is no broker, or it refuses.
pub fn ask(dir: &Path, command: &Command) -> Result<Answer> {
    let path = dir.join(CONTROL_SOCKET);
    let doing = || format!("ask the broker at {}", path.display());
    let failed = |e| Error::io(doing(), e);
    let mut stream = UnixStream::connect(&path).map_err(|e| {
        Error::io(format!("{} (is `xen-embedded serve` running there?)", doing()), e)
    })?;
    let mut line = serde_json::to_string(command).map_err(|e| failed(e.into()))?;
    line.push('\n');
    stream.write_all(line.as_bytes()).map_err(failed)?;
    line.clear();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut line).map_err(failed)?;
    match serde_json::from_str(&line).map_err(|e| failed(e.into()))? {
        Answer::Refused(reason) => Err(Error::Refused { doing: format!("{command}"), reason }),
        answer => Ok(answer),
    }
}

/// All domains of the broker in `dir`, by number.
///
/// # Errors
/// As [`ask`].
pub fn list_domains(dir: &Path) -> Result<Vec<DomainInfo>> {
    match ask(dir, &Command::ListDomains)? {
        Answer::Domains(domains) => Ok(domains),
        other => Err(Error::Refused {
            doing: "list domains".to_owned(),
            reason: format!("unexpected answer {other:?}"),
        }),
    }
}

/// The number of the domain with this name or number.
///
/// # Errors
/// As [`ask`], and when there is no such domain.
pub fn find_domain(dir: &Path, name: &str) -> Result<DomId> {
    let domains = list_domains(dir)?;
    let number = name.parse::<u16>().ok();
    let found = domains.iter().find(|d| d.name == name || Some(d.domid) == number);
    found.map(|d| DomId(d.domid)).ok_or_else(|| Error::Refused {
        doing: format!("find domain {name}"),
        reason: format!(
            "no such domain; there are: {}",
            domains.iter().map(|d| d.name.as_str()).collect::<Vec<_>>().join(", ")
        ),
    })
}

impl std::fmt::Display for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::CreateDomain(new) => write!(f, "create domain {}", new.name),
            Self::DestroyDomain { domid } => write!(f, "destroy domain {domid}"),
            Self::ListDomains => write!(f, "list domains"),
            Self::RestartXenstore => write!(f, "restart xenstore"),
        }
    }
}
