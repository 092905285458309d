//! A queue for tasks of one tokio thread.

use crate::{Completed, Io, IoBuffer, Queue, Refusal, Refused};
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, oneshot};

/// A vCPU's queue, shared by the tasks of one thread (a `LocalSet`): each awaits its own I/O while one
/// of them runs [`AsyncQueue::drive`].
///
/// An I/O costs a small allocation here, and a wake-up of its task. Who needs neither uses [`Queue`].
///
/// ```no_run
/// # async fn f(queue: blkfront::Queue) -> Result<(), Box<dyn std::error::Error>> {
/// use blkfront::{AsyncQueue, Io};
///
/// let queue = AsyncQueue::new(queue)?;
/// let buffer = queue.alloc(4096).ok_or("no pages left")?;
/// let completed = tokio::select! {
///     completed = queue.run(Io::read(0, 0, buffer)) => completed?,
///     never = queue.drive() => return Err(never.into()),
/// };
/// completed.result?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct AsyncQueue {
    inner: RefCell<Inner>,
    /// The queue's descriptor, under a number of its own.
    events: AsyncFd<OwnedFd>,
    /// Something was submitted.
    submitted: Notify,
    /// Something has completed: there is room.
    completed: Notify,
}

#[derive(Debug)]
struct Inner {
    queue: Queue,
    done: Vec<Completed>,
    /// By cookie on the queue: whose it is, and the caller's cookie.
    waiting: Vec<Option<(oneshot::Sender<Completed>, u64)>>,
    free: Vec<usize>,
}

impl AsyncQueue {
    /// Takes over a queue with nothing in flight. Must be called in a tokio runtime with I/O enabled.
    ///
    /// # Errors
    /// When the runtime cannot wait for the queue's descriptor.
    pub fn new(queue: Queue) -> io::Result<Self> {
        let events = queue.as_fd().try_clone_to_owned()?;
        // SAFETY: an `OwnedFd` keeps its descriptor open, and the same one, until it is dropped; nobody
        // takes it out of the `AsyncFd` before that.
        let events = unsafe { AsyncFd::register(events) }?;
        let inner = Inner { queue, done: Vec::new(), waiting: Vec::new(), free: Vec::new() };
        Ok(Self {
            inner: RefCell::new(inner),
            events,
            submitted: Notify::new(),
            completed: Notify::new(),
        })
    }

    /// As [`Queue::alloc`].
    pub fn alloc(&self, len: usize) -> Option<IoBuffer> {
        self.inner.borrow_mut().queue.alloc(len)
    }

    /// Runs an I/O, first waiting for room in the queue if there is none. Dropping the future does not
    /// stop the I/O; its buffer goes back to the pool when it is over.
    ///
    /// # Errors
    /// As [`Queue::submit`], but for [`Refusal::WouldBlock`].
    pub async fn run(&self, mut io: Io) -> Result<Completed, Refused> {
        let answer = loop {
            let submitted = self.inner.borrow_mut().submit(io);
            match submitted {
                Ok(answer) => break answer,
                Err(refused) if refused.reason == Refusal::WouldBlock => {
                    io = refused.io;
                    // On one thread, nothing can complete before this waits.
                    self.completed.notified().await;
                }
                Err(refused) => return Err(refused),
            }
        };
        self.submitted.notify_one();
        match answer.await {
            Ok(completed) => Ok(completed),
            // The senders live as long as `self`.
            Err(_) => std::future::pending().await,
        }
    }

    /// Takes what completes to those who wait for it. Returns only an error, when it cannot go on.
    pub async fn drive(&self) -> io::Error {
        loop {
            let idle = {
                let mut inner = self.inner.borrow_mut();
                if inner.poll() > 0 {
                    self.completed.notify_waiters();
                }
                inner.queue.arm()
            };
            if !idle {
                // Lets the tasks run that were just woken.
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                ready = self.events.readable() => match ready {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(error) => return error,
                },
                () = self.submitted.notified() => {}
            }
        }
    }
}

impl Inner {
    fn submit(&mut self, io: Io) -> Result<oneshot::Receiver<Completed>, Refused> {
        let place = self.free.pop().unwrap_or_else(|| {
            self.waiting.push(None);
            self.waiting.len() - 1
        });
        let cookie = io.cookie;
        if let Err(mut refused) = self.queue.submit(Io { cookie: place as u64, ..io }) {
            refused.io.cookie = cookie;
            self.free.push(place);
            return Err(refused);
        }
        let (sender, receiver) = oneshot::channel();
        if let Some(waiting) = self.waiting.get_mut(place) {
            *waiting = Some((sender, cookie));
        }
        Ok(receiver)
    }

    fn poll(&mut self) -> usize {
        let Self { queue, done, waiting, free } = self;
        let count = queue.poll(done);
        for mut completed in done.drain(..) {
            let place = completed.cookie as usize;
            if let Some((sender, cookie)) = waiting.get_mut(place).and_then(Option::take) {
                completed.cookie = cookie;
                free.push(place);
                // Nobody waits any more: the buffer goes back to the pool here.
                let _ = sender.send(completed);
            }
        }
        count
    }
}
