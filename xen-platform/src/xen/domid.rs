//! Which domain this is.

use crate::{Error, Result};
use ring_proto::DomId;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use xenstore_glue::client::Endpoint;
use xenstore_glue::wire::{Decoder, Path, Reply, Request};

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// Reads the number of the domain that this process runs in from xenstore. Blocks.
///
/// # Errors
/// When xenstore cannot be reached or does not know.
pub fn own_domid(endpoint: &Endpoint) -> Result<DomId> {
    let doing = || format!("ask xenstore at {endpoint} which domain this is");
    read(endpoint).map_err(|source| Error::io(doing(), source))
}

fn read(endpoint: &Endpoint) -> io::Result<DomId> {
    let mut stream: Box<dyn Stream> = match endpoint {
        Endpoint::Unix(path) => Box::new(UnixStream::connect(path)?),
        Endpoint::Device(path) => Box::new(OpenOptions::new().read(true).write(true).open(path)?),
    };
    // Relative to the directory of the domain that asks.
    let path = Path::new("domid").map_err(io::Error::other)?;
    let packet = Request::Read(path).to_packet(1, 0).map_err(io::Error::other)?;
    let mut message = Vec::new();
    packet.encode(&mut message);
    stream.write_all(&message)?;
    let mut decoder = Decoder::default();
    let mut bytes = [0; 256];
    loop {
        let read = stream.read(&mut bytes)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut input = &bytes[..read];
        if let Some(packet) = decoder.feed(&mut input).map_err(io::Error::other)? {
            return parse(&Reply::from_packet(&packet).map_err(io::Error::other)?);
        }
    }
}

fn parse(reply: &Reply) -> io::Result<DomId> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    match reply {
        Reply::Read(value) => {
            let text = String::from_utf8_lossy(value);
            text.parse().map(DomId).map_err(|_| invalid(format!("domid is {text:?}")))
        }
        Reply::Error(errno) => Err(invalid(format!(
            "the node domid: {errno}; in dom0 xen-init-dom0 writes it (systemctl start xen-init-dom0)"
        ))),
        other => Err(invalid(format!("an answer to another question: {:?}", other.kind()))),
    }
}
