use tokio::sync::{mpsc, oneshot};

use super::connection::{Command, TransactionId};
use super::{Endpoint, Error, Result};
use crate::wire::{Errno, HEADER_LEN, PAYLOAD_MAX, Path, Perm, Reply, Request, WireError};

/// How often [`Nodes::directory`] starts over when the children change while it reads them in parts.
const DIRECTORY_ATTEMPTS: u32 = 16;

/// Reading and writing nodes: what a [`Client`](super::Client) and a
/// [`Transaction`](super::Transaction) have in common.
///
/// Paths are absolute, or relative to the caller's own domain directory. They are checked
/// before anything is sent ([`Error::Path`]). Every method may also fail with
/// [`Error::Refused`] for the reasons named, and in a transaction with
/// [`Error::ConnectionLost`].
#[derive(Clone, Debug)]
pub struct Nodes {
    commands: mpsc::UnboundedSender<Command>,
    transaction: Option<TransactionId>,
    max_payload: usize,
}

impl Nodes {
    pub(super) fn new(commands: mpsc::UnboundedSender<Command>, endpoint: &Endpoint) -> Self {
        // The kernel copies a whole message, header included, into a buffer of PAYLOAD_MAX bytes
        // (xenbus_dev_frontend.c).
        let is_device = matches!(endpoint, Endpoint::Device(_));
        let max_payload = if is_device { PAYLOAD_MAX - HEADER_LEN } else { PAYLOAD_MAX };
        Self { commands, transaction: None, max_payload }
    }

    pub(super) fn within(&self, transaction: TransactionId) -> Self {
        Self { transaction: Some(transaction), ..self.clone() }
    }

    /// Reads a value.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`.
    pub async fn read(&self, path: &str) -> Result<Vec<u8>> {
        match self.call(Request::Read(Path::new(path)?)).await? {
            Reply::Read(value) => Ok(value),
            other => Err(unexpected(&other)),
        }
    }

    /// Reads a value that is text.
    ///
    /// # Errors
    /// As [`read`](Self::read); [`Error::NotText`].
    pub async fn read_string(&self, path: &str) -> Result<String> {
        let value = self.read(path).await?;
        String::from_utf8(value).map_err(|_| Error::NotText { path: path.into() })
    }

    /// Reads a value, `None` if there is no such node.
    ///
    /// # Errors
    /// `EACCES`.
    pub async fn read_optional(&self, path: &str) -> Result<Option<Vec<u8>>> {
        found(self.read(path).await)
    }

    /// Whether there is such a node.
    ///
    /// # Errors
    /// `EACCES`.
    pub async fn exists(&self, path: &str) -> Result<bool> {
        Ok(self.read_optional(path).await?.is_some())
    }

    /// Writes a value, creating the node and its parents.
    ///
    /// # Errors
    /// `EACCES`; `ENOSPC`, a quota is exceeded.
    pub async fn write(&self, path: &str, value: impl AsRef<[u8]>) -> Result<()> {
        let value = value.as_ref().to_vec();
        self.acknowledged(Request::Write { path: Path::new(path)?, value }).await
    }

    /// Creates a node, and its parents, without a value; one that exists is left as it is.
    ///
    /// # Errors
    /// `EACCES`; `ENOSPC`, a quota is exceeded.
    pub async fn mkdir(&self, path: &str) -> Result<()> {
        self.acknowledged(Request::Mkdir(Path::new(path)?)).await
    }

    /// Removes a node and all below it. A missing node is no error.
    ///
    /// # Errors
    /// `EACCES`; `EINVAL` for the root.
    pub async fn rm(&self, path: &str) -> Result<()> {
        // Xenstore reports `ENOENT` only if the parent is missing too. Gone is gone.
        found(self.acknowledged(Request::Rm(Path::new(path)?)).await).map(|_| ())
    }

    /// The names of a node's children, however many.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`; `EAGAIN` if the children kept changing while they were read in parts.
    pub async fn directory(&self, path: &str) -> Result<Vec<String>> {
        let path = Path::new(path)?;
        match self.call(Request::Directory(path.clone())).await {
            Ok(Reply::Directory(names)) => Ok(names),
            Ok(other) => Err(unexpected(&other)),
            Err(error) if error.errno() == Some(Errno::E2big) => self.long_directory(path).await,
            Err(error) => Err(error),
        }
    }

    /// Reads a permission list; the first entry is the owner's.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`.
    pub async fn get_perms(&self, path: &str) -> Result<Vec<Perm>> {
        match self.call(Request::GetPerms(Path::new(path)?)).await? {
            Reply::GetPerms(perms) => Ok(perms),
            other => Err(unexpected(&other)),
        }
    }

    /// Replaces a permission list; the first entry is the owner's.
    ///
    /// # Errors
    /// `ENOENT`; `EACCES`, not the owner; `EPERM`, only dom0 may give a node away; `ENOSPC`, too
    /// many entries; `EINVAL`, none.
    pub async fn set_perms(&self, path: &str, perms: &[Perm]) -> Result<()> {
        let perms = perms.to_vec();
        self.acknowledged(Request::SetPerms { path: Path::new(path)?, perms }).await
    }

    async fn long_directory(&self, path: Path) -> Result<Vec<String>> {
        'start: for _ in 0..DIRECTORY_ATTEMPTS {
            let (mut all, mut offset, mut first) = (Vec::new(), 0, None);
            loop {
                let request = Request::DirectoryPart { path: path.clone(), offset };
                let Reply::DirectoryPart { generation, names, last } = self.call(request).await?
                else {
                    return Err(
                        WireError::Malformed(crate::wire::MessageType::DirectoryPart).into()
                    );
                };
                if *first.get_or_insert(generation) != generation {
                    continue 'start;
                }
                if names.is_empty() && !last {
                    break 'start;
                }
                let bytes: usize = names.iter().map(|name| name.len() + 1).sum();
                offset = offset.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
                all.extend(names);
                if last {
                    return Ok(all);
                }
            }
        }
        Err(refused(&Request::Directory(path), Errno::Eagain))
    }

    pub(super) fn commands(&self) -> &mpsc::UnboundedSender<Command> {
        &self.commands
    }

    /// Whether the connection's task is gone. Only the end of its runtime ends it before its last handle.
    pub(super) fn is_orphan(&self) -> bool {
        self.commands.is_closed()
    }

    /// Has the connection's task carry out a command, again on the next connection whenever one is
    /// lost before the answer. Without a connection, the task takes no commands.
    pub(super) async fn ask<T>(
        &self,
        command: impl Fn(oneshot::Sender<T>) -> Command,
    ) -> Result<T> {
        loop {
            let (reply, answer) = oneshot::channel();
            self.commands.send(command(reply)).map_err(|_| Error::ConnectionLost)?;
            match answer.await {
                Ok(answer) => return Ok(answer),
                Err(_) if self.transaction.is_some() => return Err(Error::ConnectionLost),
                Err(_) => {}
            }
        }
    }

    pub(super) async fn acknowledged(&self, request: Request) -> Result<()> {
        match self.call(request).await? {
            Reply::Ok(_) => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn call(&self, request: Request) -> Result<Reply> {
        let packet = request.to_packet(0, self.transaction.map_or(0, |id| id.number))?;
        let len = packet.payload.len();
        if len > self.max_payload {
            return Err(WireError::TooLong { len, max: self.max_payload }.into());
        }
        let epoch = self.transaction.map(|id| id.epoch);
        let send = |reply| Command::Request { packet: packet.clone(), epoch, reply };
        match self.ask(send).await? {
            Ok(Reply::Error(errno)) => Err(refused(&request, errno)),
            Ok(reply) if reply.kind() == request.kind() => Ok(reply),
            Ok(reply) => Err(unexpected(&reply)),
            Err(Failure::Wire(error)) => Err(error.into()),
            Err(Failure::Device(source)) => {
                let (request, subject) = (request.kind(), request.subject());
                Err(Error::Device { request, subject, source })
            }
        }
    }
}

/// Why the connection's task has no reply to a request.
#[derive(Debug)]
pub(super) enum Failure {
    Wire(WireError),
    Device(std::io::Error),
}

pub(super) fn refused(request: &Request, errno: Errno) -> Error {
    Error::Refused { request: request.kind(), subject: request.subject(), errno }
}

pub(super) fn unexpected(reply: &Reply) -> Error {
    WireError::UnexpectedType(reply.kind() as u32).into()
}

fn found<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(error) if error.is_not_found() => Ok(None),
        other => other.map(Some),
    }
}
