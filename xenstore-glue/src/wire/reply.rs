use super::{Errno, MessageType, Packet, Path, Perm, WireError, number, strings, terminated, text};

/// What a server sends: the answer to a request, or a watch event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A request of this type was carried out, and has no result.
    Ok(MessageType),
    /// The request was refused.
    Error(Errno),
    /// The answer to a control command.
    Control(Vec<u8>),
    /// The names of a node's children.
    Directory(Vec<String>),
    /// Some of the names of a node's children.
    DirectoryPart {
        /// Changes whenever the node does, so that parts of two lists are not mixed.
        generation: u64,
        /// The names from the offset asked for.
        names: Vec<String>,
        /// Whether the list ends here.
        last: bool,
    },
    /// A value.
    Read(Vec<u8>),
    /// A permission list.
    GetPerms(Vec<Perm>),
    /// The transaction's id, for the headers of its requests.
    TransactionStart(u32),
    /// A domain's directory.
    GetDomainPath(Path),
    /// Whether the domain is known.
    IsDomainIntroduced(bool),
    /// Something changed below a watched path. Not an answer: request and transaction id are 0.
    WatchEvent {
        /// What changed: the watched path or one below it.
        path: Path,
        /// The token of the watch.
        token: Vec<u8>,
    },
}

impl Reply {
    /// The message's type.
    pub fn kind(&self) -> MessageType {
        match self {
            Self::Ok(kind) => *kind,
            Self::Error(_) => MessageType::Error,
            Self::Control(_) => MessageType::Control,
            Self::Directory(_) => MessageType::Directory,
            Self::DirectoryPart { .. } => MessageType::DirectoryPart,
            Self::Read(_) => MessageType::Read,
            Self::GetPerms(_) => MessageType::GetPerms,
            Self::TransactionStart(_) => MessageType::TransactionStart,
            Self::GetDomainPath(_) => MessageType::GetDomainPath,
            Self::IsDomainIntroduced(_) => MessageType::IsDomainIntroduced,
            Self::WatchEvent { .. } => MessageType::WatchEvent,
        }
    }

    /// The reply as a message.
    ///
    /// # Errors
    /// [`WireError::TooLong`], which a server answers with `E2BIG`.
    pub fn to_packet(&self, req_id: u32, tx_id: u32) -> Result<Packet, WireError> {
        let payload = match self {
            Self::Ok(_) => terminated([&b"OK"[..]]),
            Self::Error(errno) => terminated([errno.name().as_bytes()]),
            Self::Control(payload) | Self::Read(payload) => payload.clone(),
            Self::Directory(names) => terminated(names.iter().map(String::as_bytes)),
            Self::DirectoryPart { generation, names, last } => {
                let mut payload = terminated([generation.to_string().as_bytes()]);
                payload.extend(terminated(names.iter().map(String::as_bytes)));
                if *last {
                    payload.push(0);
                }
                payload
            }
            Self::GetPerms(perms) => {
                let perms: Vec<_> = perms.iter().map(Perm::to_string).collect();
                terminated(perms.iter().map(String::as_bytes))
            }
            Self::TransactionStart(id) => terminated([id.to_string().as_bytes()]),
            Self::GetDomainPath(path) => terminated([path.as_bytes()]),
            Self::IsDomainIntroduced(known) => terminated([if *known { &b"T"[..] } else { b"F" }]),
            Self::WatchEvent { path, token } => terminated([path.as_bytes(), token]),
        };
        Packet::new(self.kind(), req_id, tx_id, payload)
    }

    /// Decodes a message that a server sent.
    ///
    /// # Errors
    /// [`WireError::UnexpectedType`], [`WireError::Malformed`] or [`WireError::Path`].
    pub fn from_packet(packet: &Packet) -> Result<Self, WireError> {
        let kind =
            MessageType::from_raw(packet.kind).ok_or(WireError::UnexpectedType(packet.kind))?;
        Self::parse(kind, &packet.payload)?.ok_or(WireError::Malformed(kind))
    }

    fn parse(kind: MessageType, payload: &[u8]) -> Result<Option<Self>, WireError> {
        // These two do not consist of strings.
        match kind {
            MessageType::Control => return Ok(Some(Self::Control(payload.to_vec()))),
            MessageType::Read => return Ok(Some(Self::Read(payload.to_vec()))),
            _ => {}
        }
        let Some(strings) = strings(payload) else { return Ok(None) };
        Ok(match (kind, &strings[..]) {
            (MessageType::Error, [name]) => Some(Self::Error(Errno::from_name(name))),
            (MessageType::Directory, names) => {
                names.iter().map(|name| text(name)).collect::<Option<_>>().map(Self::Directory)
            }
            (MessageType::DirectoryPart, [generation, names @ ..]) => {
                // An empty name ends the complete list.
                let (names, last) = match names {
                    [names @ .., b""] => (names, true),
                    names => (names, false),
                };
                let names = names.iter().map(|name| text(name)).collect::<Option<_>>();
                number(generation).zip(names).map(|(generation, names)| Self::DirectoryPart {
                    generation,
                    names,
                    last,
                })
            }
            (MessageType::GetPerms, perms @ [_, ..]) => perms
                .iter()
                .map(|perm| Perm::parse(perm))
                .collect::<Option<_>>()
                .map(Self::GetPerms),
            (MessageType::TransactionStart, [id]) => number(id).map(Self::TransactionStart),
            (MessageType::GetDomainPath, [path]) => {
                Some(Self::GetDomainPath(Path::from_bytes(path)?))
            }
            (MessageType::IsDomainIntroduced, [b"T"]) => Some(Self::IsDomainIntroduced(true)),
            (MessageType::IsDomainIntroduced, [b"F"]) => Some(Self::IsDomainIntroduced(false)),
            (MessageType::WatchEvent, [path, token]) => {
                Some(Self::WatchEvent { path: Path::from_bytes(path)?, token: token.to_vec() })
            }
            (kind, [b"OK"]) if is_acknowledged(kind) => Some(Self::Ok(kind)),
            _ => None,
        })
    }
}

/// Whether success is answered with a bare `OK`.
fn is_acknowledged(kind: MessageType) -> bool {
    matches!(
        kind,
        MessageType::Write
            | MessageType::Mkdir
            | MessageType::Rm
            | MessageType::SetPerms
            | MessageType::Watch
            | MessageType::Unwatch
            | MessageType::TransactionEnd
            | MessageType::Introduce
            | MessageType::Release
            | MessageType::ResetWatches
            | MessageType::Resume
            | MessageType::SetTarget
    )
}
