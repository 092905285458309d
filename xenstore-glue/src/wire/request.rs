use super::{MessageType, Packet, Path, Perm, WireError, number, strings, terminated};

/// What a client asks for. The transaction it belongs to is in the [`Packet`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// A command to the daemon itself; each implementation has its own.
    Control(Vec<u8>),
    /// List the names of a node's children.
    Directory(Path),
    /// List a part of the names of a node's children.
    DirectoryPart {
        /// The node.
        path: Path,
        /// Bytes of the complete list to skip.
        offset: u32,
    },
    /// Read a value.
    Read(Path),
    /// Write a value, creating the node and its parents.
    Write {
        /// The node.
        path: Path,
        /// Any bytes.
        value: Vec<u8>,
    },
    /// Create a node, and its parents, if it is missing.
    Mkdir(Path),
    /// Remove a node and all below it.
    Rm(Path),
    /// Read a permission list.
    GetPerms(Path),
    /// Replace a permission list.
    SetPerms {
        /// The node, or a special watch.
        path: Path,
        /// Not empty; the first entry names the owner.
        perms: Vec<Perm>,
    },
    /// Ask for an event on every change of the node or below it.
    Watch {
        /// The node, which need not exist, or a special watch.
        path: Path,
        /// Sent back in events; free of nul bytes.
        token: Vec<u8>,
    },
    /// End the watch with this path and token.
    Unwatch {
        /// As given to `Watch`.
        path: Path,
        /// As given to `Watch`.
        token: Vec<u8>,
    },
    /// Start a transaction.
    TransactionStart,
    /// End the transaction of the packet: commit it, or drop it.
    TransactionEnd {
        /// Whether to commit.
        commit: bool,
    },
    /// Make a domain known to xenstore.
    Introduce {
        /// The domain.
        domid: u16,
        /// The frame of its xenstore ring page.
        gfn: u64,
        /// Its xenstore event channel.
        port: u32,
    },
    /// Make xenstore forget a domain.
    Release(u16),
    /// Ask for a domain's directory.
    GetDomainPath(u16),
    /// Ask whether a domain is known to xenstore.
    IsDomainIntroduced(u16),
    /// Drop all watches and transactions of the sender.
    ResetWatches,
    /// Arm `@releaseDomain` again for a domain that was shut down and resumed.
    Resume(u16),
    /// Let a domain act as another one.
    SetTarget {
        /// Who may act.
        domid: u16,
        /// As whom.
        target: u16,
    },
}

impl Request {
    /// The message's type.
    pub fn kind(&self) -> MessageType {
        match self {
            Self::Control(_) => MessageType::Control,
            Self::Directory(_) => MessageType::Directory,
            Self::DirectoryPart { .. } => MessageType::DirectoryPart,
            Self::Read(_) => MessageType::Read,
            Self::Write { .. } => MessageType::Write,
            Self::Mkdir(_) => MessageType::Mkdir,
            Self::Rm(_) => MessageType::Rm,
            Self::GetPerms(_) => MessageType::GetPerms,
            Self::SetPerms { .. } => MessageType::SetPerms,
            Self::Watch { .. } => MessageType::Watch,
            Self::Unwatch { .. } => MessageType::Unwatch,
            Self::TransactionStart => MessageType::TransactionStart,
            Self::TransactionEnd { .. } => MessageType::TransactionEnd,
            Self::Introduce { .. } => MessageType::Introduce,
            Self::Release(_) => MessageType::Release,
            Self::GetDomainPath(_) => MessageType::GetDomainPath,
            Self::IsDomainIntroduced(_) => MessageType::IsDomainIntroduced,
            Self::ResetWatches => MessageType::ResetWatches,
            Self::Resume(_) => MessageType::Resume,
            Self::SetTarget { .. } => MessageType::SetTarget,
        }
    }

    /// What the request is about, for messages to people: a path, or a domain's number.
    pub fn subject(&self) -> String {
        match self {
            Self::Directory(path)
            | Self::Read(path)
            | Self::Mkdir(path)
            | Self::Rm(path)
            | Self::GetPerms(path)
            | Self::DirectoryPart { path, .. }
            | Self::Write { path, .. }
            | Self::SetPerms { path, .. }
            | Self::Watch { path, .. }
            | Self::Unwatch { path, .. } => path.to_string(),
            Self::Introduce { domid, .. }
            | Self::Release(domid)
            | Self::GetDomainPath(domid)
            | Self::IsDomainIntroduced(domid)
            | Self::Resume(domid)
            | Self::SetTarget { domid, .. } => format!("domain {domid}"),
            Self::Control(_)
            | Self::TransactionStart
            | Self::TransactionEnd { .. }
            | Self::ResetWatches => "this connection".into(),
        }
    }

    /// The request as a message.
    ///
    /// # Errors
    /// [`WireError::TooLong`].
    pub fn to_packet(&self, req_id: u32, tx_id: u32) -> Result<Packet, WireError> {
        let decimal = |number: u64| number.to_string().into_bytes();
        let payload = match self {
            Self::Control(payload) => payload.clone(),
            Self::Directory(path)
            | Self::Read(path)
            | Self::Mkdir(path)
            | Self::Rm(path)
            | Self::GetPerms(path) => terminated([path.as_bytes()]),
            Self::DirectoryPart { path, offset } => {
                terminated([path.as_bytes(), &decimal(u64::from(*offset))])
            }
            Self::Write { path, value } => {
                let mut payload = terminated([path.as_bytes()]);
                payload.extend_from_slice(value);
                payload
            }
            Self::SetPerms { path, perms } => {
                let mut payload = terminated([path.as_bytes()]);
                for perm in perms {
                    payload.extend(terminated([perm.to_string().as_bytes()]));
                }
                payload
            }
            Self::Watch { path, token } | Self::Unwatch { path, token } => {
                terminated([path.as_bytes(), token])
            }
            Self::TransactionStart | Self::ResetWatches => vec![0],
            Self::TransactionEnd { commit } => terminated([if *commit { &b"T"[..] } else { b"F" }]),
            Self::Introduce { domid, gfn, port } => terminated([
                &*decimal(u64::from(*domid)),
                &decimal(*gfn),
                &decimal(u64::from(*port)),
            ]),
            Self::Release(domid)
            | Self::GetDomainPath(domid)
            | Self::IsDomainIntroduced(domid)
            | Self::Resume(domid) => terminated([&*decimal(u64::from(*domid))]),
            Self::SetTarget { domid, target } => {
                terminated([&*decimal(u64::from(*domid)), &decimal(u64::from(*target))])
            }
        };
        Packet::new(self.kind(), req_id, tx_id, payload)
    }

    /// Decodes a message that a client sent.
    ///
    /// # Errors
    /// [`WireError::UnexpectedType`], [`WireError::Malformed`] or [`WireError::Path`];
    /// [`WireError::errno`] is the answer to send.
    pub fn from_packet(packet: &Packet) -> Result<Self, WireError> {
        let unexpected = WireError::UnexpectedType(packet.kind);
        let Some(kind) = MessageType::from_raw(packet.kind) else { return Err(unexpected) };
        let args = Args { kind, payload: &packet.payload };
        Ok(match kind {
            MessageType::Control => Self::Control(packet.payload.clone()),
            MessageType::Directory => Self::Directory(args.path()?),
            MessageType::Read => Self::Read(args.path()?),
            MessageType::Mkdir => Self::Mkdir(args.path()?),
            MessageType::Rm => Self::Rm(args.path()?),
            MessageType::GetPerms => Self::GetPerms(args.path()?),
            MessageType::DirectoryPart => {
                let [path, offset] = args.exactly()?;
                Self::DirectoryPart { path: Path::from_bytes(path)?, offset: args.number(offset)? }
            }
            MessageType::Write => {
                let nul = packet.payload.iter().position(|byte| *byte == 0);
                let (path, value) = packet.payload.split_at(nul.ok_or_else(|| args.malformed())?);
                Self::Write { path: Path::from_bytes(path)?, value: value[1..].to_vec() }
            }
            MessageType::SetPerms => {
                let all = strings(&packet.payload).ok_or_else(|| args.malformed())?;
                let (path, perms) = all.split_first().ok_or_else(|| args.malformed())?;
                let perms: Option<Vec<_>> = perms.iter().map(|perm| Perm::parse(perm)).collect();
                let perms = perms.filter(|list| !list.is_empty());
                let perms = perms.ok_or_else(|| args.malformed())?;
                Self::SetPerms { path: Path::from_bytes(path)?, perms }
            }
            MessageType::Watch => {
                let [path, token] = args.exactly()?;
                Self::Watch { path: Path::from_bytes(path)?, token: token.to_vec() }
            }
            MessageType::Unwatch => {
                let [path, token] = args.exactly()?;
                Self::Unwatch { path: Path::from_bytes(path)?, token: token.to_vec() }
            }
            MessageType::TransactionStart => Self::TransactionStart,
            MessageType::TransactionEnd => match args.exactly()? {
                [b"T"] => Self::TransactionEnd { commit: true },
                [b"F"] => Self::TransactionEnd { commit: false },
                _ => return Err(args.malformed()),
            },
            MessageType::Introduce => {
                let [domid, gfn, port] = args.exactly()?;
                Self::Introduce {
                    domid: args.number(domid)?,
                    gfn: args.number(gfn)?,
                    port: args.number(port)?,
                }
            }
            MessageType::Release => Self::Release(args.domid()?),
            MessageType::GetDomainPath => Self::GetDomainPath(args.domid()?),
            MessageType::IsDomainIntroduced => Self::IsDomainIntroduced(args.domid()?),
            MessageType::ResetWatches => Self::ResetWatches,
            MessageType::Resume => Self::Resume(args.domid()?),
            MessageType::SetTarget => {
                let [domid, target] = args.exactly()?;
                Self::SetTarget { domid: args.number(domid)?, target: args.number(target)? }
            }
            MessageType::WatchEvent | MessageType::Error => return Err(unexpected),
        })
    }
}

/// A request's payload as nul-terminated strings.
struct Args<'a> {
    kind: MessageType,
    payload: &'a [u8],
}

impl<'a> Args<'a> {
    fn malformed(&self) -> WireError {
        WireError::Malformed(self.kind)
    }

    fn exactly<const N: usize>(&self) -> Result<[&'a [u8]; N], WireError> {
        let all = strings(self.payload).ok_or_else(|| self.malformed())?;
        all.try_into().map_err(|_| self.malformed())
    }

    fn path(&self) -> Result<Path, WireError> {
        let [path] = self.exactly()?;
        Ok(Path::from_bytes(path)?)
    }

    fn number<T: std::str::FromStr>(&self, bytes: &[u8]) -> Result<T, WireError> {
        number(bytes).ok_or_else(|| self.malformed())
    }

    fn domid(&self) -> Result<u16, WireError> {
        let [domid] = self.exactly()?;
        self.number(domid)
    }
}
