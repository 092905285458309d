//! Takes a channel's events with the io_uring that waits for the device. With system calls of their own to
//! read them and write them back, a request at depth 1 costs five in all instead of three.

use super::push;
use crate::storage::Woken;
use io_uring::squeue::{self, Flags};
use io_uring::types::Fixed;
use io_uring::{SubmissionQueue, opcode};
use ring_proto::SharedMemory;
use std::io;
use xen_platform::{EventFile, LocalRegion};

/// User data of all entries for the channel. Of a chain, one posts a completion: the last, or the first to
/// fail.
pub(super) const EVENT: u64 = 2 << 32;

/// Entries of one chain.
pub(super) const ENTRIES: usize = 3;

/// An event channel among the files of an io_uring.
pub(super) struct Events {
    file: EventFile,
    /// Its place among the registered files.
    place: Fixed,
    /// Where an event is read to and written back from. Kept until nothing is in flight.
    memory: LocalRegion,
    /// Events are read here rather than by whoever is woken, until that fails.
    reads: bool,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing is under way.
    Idle {
        /// The last event has not been written back.
        masked: bool,
    },
    /// The kernel waits for an event.
    Armed,
    /// An event was taken.
    Taken,
    /// There is something to read, or something is wrong.
    Readable,
}

impl Events {
    /// For a channel that is at `place` among the registered files.
    pub(super) fn new(file: EventFile, place: u32) -> io::Result<Self> {
        let memory = LocalRegion::new(1).map_err(io::Error::other)?;
        let state = State::Idle { masked: false };
        Ok(Self { file, place: Fixed(place), memory, reads: true, state })
    }

    /// Has the kernel wait for the next event, unless it already does.
    pub(super) fn arm(&mut self, submission: &mut SubmissionQueue<'_>) {
        let State::Idle { masked } = self.state else { return };
        let chained = Flags::IO_LINK | Flags::SKIP_SUCCESS;
        let memory = self.memory.base().as_ptr();
        let length = self.file.event_bytes;
        let mut push = |entry: squeue::Entry| push(submission, &entry.user_data(EVENT));
        let poll = opcode::PollAdd::new(self.place, libc::POLLIN as u32).build();
        // The ring has room for a chain, so none of these fails.
        let pushed = if self.reads {
            let write = opcode::Write::new(self.place, memory, length).build().flags(chained);
            // Without the poll, some kernels fail a read while there is no event: the file is non-blocking.
            let read = opcode::Read::new(self.place, memory, length).build();
            (!(masked && self.file.unmask) || push(write))
                && push(poll.flags(chained))
                && push(read)
        } else {
            push(poll)
        };
        if pushed {
            self.state = State::Armed;
        }
    }

    /// Handles the one completion of what was armed.
    pub(super) fn complete(&mut self, result: i32) {
        self.state = if !self.reads {
            State::Readable
        } else if u32::try_from(result) == Ok(self.file.event_bytes) {
            State::Taken
        } else if result == -libc::ECANCELED {
            State::Idle { masked: false }
        } else {
            // Whoever is woken reads it, and finds out what is wrong.
            self.reads = false;
            State::Readable
        };
    }

    /// Starts afresh as the channel changes hands: whoever has it unmasks it.
    pub(super) fn reset(&mut self) {
        self.state = State::Idle { masked: false };
    }

    /// Whether the kernel may still write to our memory.
    pub(super) fn armed(&self) -> bool {
        self.state == State::Armed
    }

    /// Whether there is something to report.
    pub(super) fn pending(&self) -> bool {
        matches!(self.state, State::Taken | State::Readable)
    }

    /// Reports it, once.
    pub(super) fn woken(&mut self) -> Option<Woken> {
        let (woken, masked) = match self.state {
            State::Taken => (Woken::Event, true),
            State::Readable => (Woken::Descriptor, false),
            State::Idle { .. } | State::Armed => return None,
        };
        self.state = State::Idle { masked };
        Some(woken)
    }
}
