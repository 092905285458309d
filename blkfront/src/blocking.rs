//! Blocking I/O on a queue, copied through its buffers.

use crate::{Completed, Io, IoBuffer, Queue, Refusal};
use ring_proto::abi::PAGE_SIZE;
use std::io;

/// Bytes per I/O of a blocking call: enough to make the cost of a call negligible.
const CHUNK: usize = 1 << 20;

impl Queue {
    /// Fills `to`, whose length must be a multiple of the sector size. Blocks. Nothing else may be in
    /// flight on this queue.
    ///
    /// # Errors
    /// As [`Queue::submit`] and [`Completed::result`]; `ResourceBusy` while something is in flight,
    /// `OutOfMemory` when every page of the pool is in a buffer.
    pub fn read_at(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        while let Some(rest) = to.get_mut(at..).filter(|rest| !rest.is_empty()) {
            let buffer = self.chunk(rest.len())?;
            let len = buffer.len();
            let buffer = self.run(Io::read(0, position(offset, at)?, buffer))?;
            if let (Some(buffer), Some(part)) = (buffer, rest.get_mut(..len)) {
                buffer.read(0, part);
            }
            at += len;
        }
        Ok(())
    }

    /// Writes `from`. As [`Queue::read_at`].
    ///
    /// # Errors
    /// As [`Queue::read_at`].
    pub fn write_at(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        let mut at = 0;
        while let Some(rest) = from.get(at..).filter(|rest| !rest.is_empty()) {
            let mut buffer = self.chunk(rest.len())?;
            let len = buffer.write(0, rest.get(..buffer.len()).unwrap_or(rest));
            self.run(Io::write(0, position(offset, at)?, buffer))?;
            at += len;
        }
        Ok(())
    }

    /// Makes completed writes durable. As [`Queue::read_at`].
    ///
    /// # Errors
    /// As [`Queue::read_at`].
    pub fn flush(&mut self) -> io::Result<()> {
        self.run(Io::flush(0)).map(drop)
    }

    /// Discards `len` bytes from `offset`. As [`Queue::read_at`].
    ///
    /// # Errors
    /// As [`Queue::read_at`].
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.run(Io::discard(0, offset, len)).map(drop)
    }

    /// A buffer for up to `len` bytes, as many as there are pages for.
    fn chunk(&mut self, len: usize) -> io::Result<IoBuffer> {
        let mut len = len.min(CHUNK);
        loop {
            if let Some(buffer) = self.alloc(len) {
                return Ok(buffer);
            }
            if self.is_gone() {
                return Err(Refusal::Gone.into());
            }
            if len <= PAGE_SIZE {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            len = (len / 2).next_multiple_of(PAGE_SIZE).min(len - 1);
        }
    }

    fn run(&mut self, io: Io) -> io::Result<Option<IoBuffer>> {
        if self.in_flight() > 0 {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        self.unplug();
        self.submit(io).map_err(|refused| io::Error::from(refused.reason))?;
        let mut done = Vec::with_capacity(1);
        while self.wait(&mut done, None) == 0 {}
        let Some(Completed { result, buffer, .. }) = done.pop() else { return Ok(None) };
        result?;
        Ok(buffer)
    }
}

fn position(offset: u64, at: usize) -> io::Result<u64> {
    offset.checked_add(at as u64).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
