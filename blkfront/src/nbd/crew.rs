//! The threads of a disk's vCPUs, and how they share the connections.

use super::connection::MAX_REQUESTS;
use super::proto::Export;
use super::requests::Requests;
use super::worker::{Newcomer, Shared, Worker};
use super::{Error, Options, system};
use crate::Disk;
use nix::sys::eventfd::{EfdFlags, EventFd};
use ring_proto::abi::PAGE_SIZE;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

/// A thread for each vCPU, before it runs.
#[derive(Debug)]
pub(super) struct Crew<'a> {
    disk: &'a Disk,
    options: Options,
    workers: Vec<(Worker, Arc<Shared>, Sender<Newcomer>)>,
}

impl<'a> Crew<'a> {
    /// Takes all queues of `disk`.
    ///
    /// # Errors
    /// When an option is out of range, a queue is taken, or its pool is too small.
    pub(super) fn new(disk: &'a Disk, options: Options) -> Result<Self, Error> {
        options.check(disk.vcpus() as usize)?;
        let name: Arc<str> = options.export.as_str().into();
        let places = options.max_connections.div_ceil(disk.vcpus() as usize);
        let mut workers = Vec::new();
        for vcpu in 0..disk.vcpus() {
            let bell =
                EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(system("make an eventfd"))?;
            let connections = AtomicUsize::new(0);
            let shared = Arc::new(Shared { connections, bell, stop: AtomicBool::new(false) });
            let (sender, inbox) = channel();
            let depth = places * MAX_REQUESTS;
            let queue = disk.queue(vcpu)?;
            let requests = Requests::new(queue, depth, options.read_only);
            let requests = requests.ok_or(Error::Pool { vcpu })?;
            let worker = Worker {
                requests,
                inbox,
                shared: shared.clone(),
                name: name.clone(),
                max_pages: options.in_flight / PAGE_SIZE,
                connections: std::iter::repeat_with(|| None).take(places).collect(),
                depth,
            };
            workers.push((worker, shared, sender));
        }
        // Workers get connections in this order: each ring's first vCPU, then its others.
        let mut on_ring = vec![0; disk.rings() as usize];
        workers.sort_by_cached_key(|(worker, ..)| {
            let ring = worker.requests.ring();
            let before = &mut on_ring[ring as usize];
            *before += 1;
            (*before, ring)
        });
        Ok(Self { disk, options, workers })
    }

    pub(super) fn disk(&self) -> &'a Disk {
        self.disk
    }

    /// What clients are told of the disk now.
    pub(super) fn export(&self) -> Export {
        export(self.disk, &self.options)
    }

    pub(super) fn options(&self) -> &Options {
        &self.options
    }

    /// Runs the threads while `lead` lets connections in. After that, requests that have come in are
    /// answered and all connections are closed; a client has 5 seconds to take its answers.
    ///
    /// # Errors
    /// As `lead`; when threads cannot be made, or one of them fails.
    pub(super) fn run(
        self,
        lead: impl FnOnce(&mut Desks<'a>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Self { disk, options, workers } = self;
        let mut desks = Desks { disk, options, desks: Vec::new(), turn: 0 };
        let mut result = Ok(());
        for (n, (worker, shared, inbox)) in workers.into_iter().enumerate() {
            let builder = std::thread::Builder::new().name(format!("nbd-vcpu{n}"));
            match builder.spawn(move || worker.run()) {
                Ok(thread) => desks.desks.push(Desk { shared, inbox, thread }),
                Err(e) => result = Err(system("start a thread")(e)),
            }
        }
        if result.is_ok() {
            result = lead(&mut desks);
        }
        for desk in &desks.desks {
            desk.shared.stop.store(true, Ordering::Relaxed);
            let _ = desk.shared.bell.write(1);
        }
        for desk in desks.desks {
            let ended = desk.thread.join().unwrap_or_else(|_| Err(io::Error::other("panicked")));
            result = result.and(ended.map_err(system("serve a vCPU's connections")));
        }
        result
    }
}

/// A vCPU's thread at work.
#[derive(Debug)]
struct Desk {
    shared: Arc<Shared>,
    inbox: Sender<Newcomer>,
    thread: JoinHandle<io::Result<()>>,
}

/// The threads at work.
#[derive(Debug)]
pub(super) struct Desks<'a> {
    disk: &'a Disk,
    options: Options,
    desks: Vec<Desk>,
    turn: usize,
}

impl Desks<'_> {
    /// Gives a client to the vCPU that has the fewest, and among equals to the next in turn. A client that
    /// has `negotiated` sends requests at once.
    pub(super) fn let_in(&mut self, socket: UnixStream, negotiated: bool) {
        let load = |desk: &Desk| desk.shared.connections.load(Ordering::Acquire);
        let max_connections = self.options.max_connections;
        if self.desks.iter().map(load).sum::<usize>() >= max_connections {
            tracing::warn!(
                "an NBD client was turned away: all {max_connections} connections are in use"
            );
            return;
        }
        let export = export(self.disk, &self.options);
        let count = self.desks.len().max(1);
        let in_turn = (0..count).filter_map(|n| self.desks.get((self.turn + n) % count));
        if let Some(desk) = in_turn.min_by_key(|desk| load(desk)) {
            self.turn = (self.turn + 1) % count;
            desk.shared.connections.fetch_add(1, Ordering::Relaxed);
            // A worker that is gone is noticed by [`Desks::check`].
            let _ = desk.inbox.send(Newcomer { socket, export, negotiated });
            let _ = desk.shared.bell.write(1);
        }
    }

    /// Whether all threads are still at work.
    ///
    /// # Errors
    /// Which one is not; [`Crew::run`] returns why.
    pub(super) fn check(&self) -> Result<(), Error> {
        let Some(desk) = self.desks.iter().find(|desk| desk.thread.is_finished()) else {
            return Ok(());
        };
        let name = desk.thread.thread().name().unwrap_or_default().to_owned();
        Err(system("serve connections")(io::Error::other(format!("{name} ended"))))
    }
}

fn export(disk: &Disk, options: &Options) -> Export {
    let discard = disk.features().discard;
    Export::new(&disk.geometry(), discard, options.read_only, options.in_flight as u32)
}
