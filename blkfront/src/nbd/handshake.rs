//! The fixed newstyle handshake, as a state machine that takes bytes and produces bytes.

use super::proto::{self, Export, Reader};

/// The longest option we read: a name of 4096 bytes, the longest the protocol allows, and room for
/// the rest of an `OPT_GO`.
const MAX_OPTION_BYTES: usize = 4096 + 512;
/// Magic, number and length.
const OPTION_HEAD_BYTES: usize = 16;
/// What has to fit into a connection's input buffer.
pub(super) const MAX_INPUT_BYTES: usize = OPTION_HEAD_BYTES + MAX_OPTION_BYTES;

/// What to do after a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Next {
    /// Come again with more bytes.
    More,
    /// This many bytes are processed.
    Consumed(usize),
    /// This many bytes are to be skipped, some of which may not have come yet.
    Skip(u64),
    /// The handshake is over: requests follow these bytes.
    Transmit(usize),
    /// Send what is to be sent, then close: for this reason, or because the client asked to.
    Close(Option<&'static str>),
}

/// The server's side of it.
#[derive(Debug)]
pub(super) struct Handshake {
    export: Export,
    greeted: bool,
    no_zeroes: bool,
    structured: bool,
}

impl Handshake {
    /// Starts with the greeting.
    pub(super) fn new(export: Export, out: &mut Vec<u8>) -> Self {
        out.extend(proto::MAGIC.to_be_bytes());
        out.extend(proto::OPTION_MAGIC.to_be_bytes());
        out.extend((proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES).to_be_bytes());
        Self { export, greeted: false, no_zeroes: false, structured: false }
    }

    /// Whether the client asked for structured replies.
    pub(super) fn structured(&self) -> bool {
        self.structured
    }

    pub(super) fn max_payload(&self) -> u32 {
        self.export.max_payload
    }

    /// Processes the client's flags or one option, once `input` has all of it. `name` is the export's.
    pub(super) fn step(&mut self, name: &str, input: &[u8], out: &mut Vec<u8>) -> Next {
        let mut reader = Reader(input);
        if !self.greeted {
            let Some(flags) = reader.u32() else { return Next::More };
            if flags & !u32::from(proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES) != 0 {
                return Next::Close(Some("it has flags we do not know"));
            }
            self.no_zeroes = flags & u32::from(proto::FLAG_NO_ZEROES) != 0;
            self.greeted = true;
            return Next::Consumed(4);
        }
        match reader.u64() {
            None => return Next::More,
            Some(proto::OPTION_MAGIC) => {}
            Some(_) => return Next::Close(Some("an option has the wrong magic")),
        }
        let (Some(option), Some(len)) = (reader.u32(), reader.u32()) else { return Next::More };
        let whole = OPTION_HEAD_BYTES as u64 + u64::from(len);
        if len as usize > MAX_OPTION_BYTES {
            reply(out, option, proto::REP_ERR_TOO_BIG, &[]);
            return Next::Skip(whole);
        }
        let Some(data) = reader.bytes(len as usize) else { return Next::More };
        let consumed = Next::Consumed(OPTION_HEAD_BYTES + data.len());
        let answer = match option {
            proto::OPT_EXPORT_NAME => return self.export_name(name, data, out),
            proto::OPT_ABORT => {
                reply(out, option, proto::REP_ACK, &[]);
                return Next::Close(None);
            }
            proto::OPT_LIST if data.is_empty() => {
                let mut server = (name.len() as u32).to_be_bytes().to_vec();
                server.extend(name.as_bytes());
                reply(out, option, proto::REP_SERVER, &server);
                proto::REP_ACK
            }
            proto::OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                proto::REP_ACK
            }
            proto::OPT_LIST | proto::OPT_STRUCTURED_REPLY => proto::REP_ERR_INVALID,
            proto::OPT_INFO | proto::OPT_GO => match self.info(name, option, data, out) {
                Ok(()) if option == proto::OPT_GO => {
                    reply(out, option, proto::REP_ACK, &[]);
                    return Next::Transmit(OPTION_HEAD_BYTES + data.len());
                }
                Ok(()) => proto::REP_ACK,
                Err(error) => error,
            },
            // Including STARTTLS, which we do not have, and meta contexts: blkif cannot tell what is
            // allocated.
            _ => proto::REP_ERR_UNSUP,
        };
        reply(out, option, answer, &[]);
        consumed
    }

    /// The one option without a reply to refuse it with.
    fn export_name(&self, name: &str, data: &[u8], out: &mut Vec<u8>) -> Next {
        /// Bytes that follow unless the client asked to be spared them.
        const ZEROES: usize = 124;
        if !names(data, name) {
            return Next::Close(Some("it asked for an export we do not have"));
        }
        out.extend(self.export.size.to_be_bytes());
        out.extend(self.export.flags(self.structured).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; ZEROES]);
        }
        Next::Transmit(OPTION_HEAD_BYTES + data.len())
    }

    /// `OPT_INFO` and `OPT_GO`: writes the information, or returns the error to reply with.
    fn info(&self, name: &str, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<(), u32> {
        let (asked, infos) = parse_info(data).ok_or(proto::REP_ERR_INVALID)?;
        if !names(asked, name) {
            return Err(proto::REP_ERR_UNKNOWN);
        }
        let mut info = |kind: u16, parts: &[&[u8]]| {
            let data = [&[&kind.to_be_bytes()[..]], parts].concat().concat();
            reply(out, option, proto::REP_INFO, &data);
        };
        let Export { size, min_block, preferred_block, max_payload, .. } = self.export;
        let flags = self.export.flags(self.structured);
        info(proto::INFO_EXPORT, &[&size.to_be_bytes(), &flags.to_be_bytes()]);
        // Also to clients that did not ask: it does no harm, and the limits hold for them, too.
        let blocks = [min_block, preferred_block, max_payload].map(u32::to_be_bytes);
        info(proto::INFO_BLOCK_SIZE, &[blocks.as_flattened()]);
        if infos.as_chunks().0.contains(&proto::INFO_NAME.to_be_bytes()) {
            info(proto::INFO_NAME, &[name.as_bytes()]);
        }
        Ok(())
    }
}

/// The name and the list of 16-bit numbers in an `OPT_INFO` or `OPT_GO`, if they fill it.
fn parse_info(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut reader = Reader(data);
    let len = reader.u32()? as usize;
    let name = reader.bytes(len)?;
    let infos = usize::from(reader.u16()?);
    (reader.0.len() == infos * 2).then_some((name, reader.0))
}

/// Whether a client means our export: by its name, or as the default one.
fn names(asked: &[u8], name: &str) -> bool {
    asked.is_empty() || asked == name.as_bytes()
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend(proto::OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
}
