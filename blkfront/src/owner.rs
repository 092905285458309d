//! A ring that several vCPUs share, and the thread that owns it.
//!
//! Each vCPU has a queue to the owner and one back, with one producer and one consumer each. There is no
//! lock for vCPUs to contend for; sharing costs a hop, and a wake-up when the other side sleeps.

use crate::hw::{HwQueue, Owner};
use crate::link::{Bell, Link, Mailbox, Notice};
use crate::stats::Counters;
use crate::wait::sleep;
use ring_proto::{Body, Status};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use xen_platform::Spin;

/// A request on its way to the ring.
#[derive(Debug)]
pub(crate) struct Staged {
    /// The number of the connection whose limits it was made for.
    pub(crate) connection: u32,
    pub(crate) request: u32,
    pub(crate) body: Body,
}

/// What became of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) request: u32,
    /// `None` when it was not answered and is to be issued again.
    pub(crate) status: Option<Status>,
}

/// The vCPU's end.
#[derive(Debug)]
pub(crate) struct Staging {
    pub(crate) requests: rtrb::Producer<Staged>,
    pub(crate) outcomes: rtrb::Consumer<Outcome>,
    /// The owner's mailbox.
    pub(crate) owner: Arc<Mailbox>,
}

/// The owner's end.
#[derive(Debug)]
pub(crate) struct User {
    requests: rtrb::Consumer<Staged>,
    outcomes: rtrb::Producer<Outcome>,
    mailbox: Arc<Mailbox>,
    /// Has outcomes that it was not woken for yet.
    news: bool,
}

/// Joins a vCPU to the owner of its ring. At most `requests` are on their way at a time.
pub(crate) fn join(requests: usize, vcpu: Arc<Mailbox>, owner: Arc<Mailbox>) -> (Staging, User) {
    let (to_owner, from_vcpu) = rtrb::RingBuffer::new(requests);
    let (to_vcpu, from_owner) = rtrb::RingBuffer::new(requests);
    let staging = Staging { requests: to_owner, outcomes: from_owner, owner };
    let user = User { requests: from_vcpu, outcomes: to_vcpu, mailbox: vcpu, news: false };
    (staging, user)
}

/// Owns a shared ring.
#[derive(Debug)]
pub(crate) struct RingOwner {
    pub(crate) ring: u32,
    pub(crate) users: Vec<User>,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) link: Arc<Link>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) spin: Spin,
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) state: OwnerState,
}

/// What the owner's loop keeps.
#[derive(Debug, Default)]
pub(crate) struct OwnerState {
    hw: Option<HwQueue>,
    /// The connection that `hw` is, or was, of.
    connection: u32,
    taken: u32,
    /// The user to serve first, so that nobody starves while the ring is full.
    turn: usize,
    /// The next request was already counted as waiting for a slot.
    blocked: bool,
}

impl RingOwner {
    /// Runs until `stop` is set and the mailbox's bell rung.
    pub(crate) fn run(mut self) {
        let mut slept = false;
        while !self.stop.load(Ordering::Relaxed) {
            self.read_mail();
            if self.turn() {
                if std::mem::take(&mut slept) { self.spin.woken() } else { self.spin.found() }
            } else if self.spin.again(|| false) {
                self.counters.spins.add(1);
            } else {
                slept = true;
                self.sleep();
            }
        }
    }

    fn read_mail(&mut self) {
        while let Some(notice) = self.mailbox.take(&mut self.state.taken, &self.counters) {
            // The vCPUs hold back new requests; those on the ring are still to be answered.
            if matches!(notice, Notice::Hold) {
                continue;
            }
            // There is no ring any more, or a new one: what was on the old one will not be answered.
            self.disconnect();
            if let Notice::Up { connection, ring: Some(ring), .. } = notice {
                self.state.hw = Some(HwQueue::new(*ring, self.counters.clone()));
                self.state.connection = connection;
            }
        }
    }

    /// Moves requests and responses; returns whether there were any.
    fn turn(&mut self) -> bool {
        let mut moved = self.take_requests();
        if let Some(hw) = &mut self.state.hw {
            let users = &mut self.users;
            let end = |owner: Owner, status| give(users, owner, Some(status));
            match hw.publish().and_then(|()| hw.poll(end)) {
                Ok(responses) => moved |= responses > 0,
                Err(failure) => {
                    self.link.fail(self.ring, failure);
                    self.disconnect();
                }
            }
        }
        self.wake_users();
        moved
    }

    fn take_requests(&mut self) -> bool {
        let (mut moved, count) = (false, self.users.len());
        self.state.turn = (self.state.turn + 1) % count.max(1);
        for n in 0..count {
            let k = (self.state.turn + n) % count;
            while let Some(user) = self.users.get_mut(k) {
                let Ok(staged) = user.requests.peek() else { break };
                let owner = Owner { user: k as u32, request: staged.request };
                let stale = match &mut self.state.hw {
                    _ if staged.connection > self.state.connection => break,
                    Some(hw) if staged.connection == self.state.connection => {
                        if !hw.push(owner, staged.body.borrowed()) {
                            if !std::mem::replace(&mut self.state.blocked, true) {
                                self.counters.requeues.add(1);
                            }
                            return moved;
                        }
                        self.state.blocked = false;
                        false
                    }
                    _ => true,
                };
                let _ = user.requests.pop();
                moved = true;
                if stale {
                    give(&mut self.users, owner, None);
                }
            }
        }
        moved
    }

    fn wake_users(&mut self) {
        for user in self.users.iter_mut().filter(|user| user.news) {
            user.news = false;
            if user.mailbox.bell.ring_if_asleep() {
                self.counters.wakeups.add(1);
                self.counters.syscalls.add(1);
            }
        }
    }

    /// Gives up the ring; what was on it is to be issued again.
    fn disconnect(&mut self) {
        if let Some(mut hw) = self.state.hw.take() {
            // As in [`crate::Queue`]: what was answered is not to be issued again.
            let users = &mut self.users;
            let _ = hw.poll(|owner, status| give(users, owner, Some(status)));
            for owner in hw.unanswered() {
                give(&mut self.users, owner, None);
            }
        }
    }

    fn sleep(&mut self) {
        let bell: &Bell = &self.mailbox.bell;
        bell.about_to_sleep();
        let full = self.state.hw.as_ref().is_some_and(HwQueue::is_full);
        let known = self.state.connection;
        let staged = |user: &User| user.requests.peek().is_ok_and(|s| s.connection <= known);
        let staged = self.users.iter().any(staged);
        let news = self.mailbox.has_news(self.state.taken) || self.stop.load(Ordering::Relaxed);
        let armed = match &mut self.state.hw {
            Some(hw) => hw.arm(),
            None => Ok(true),
        };
        match armed {
            // Requests that find no slot wait for responses; those of a connection not known here yet wait
            // for its notice.
            Ok(true) if !news && (!staged || full) => {
                let channel = self.state.hw.as_ref().map_or(bell.as_fd(), HwQueue::event_fd);
                sleep(&[bell.as_fd(), channel], None, &self.counters);
                bell.silence();
                self.counters.syscalls.add(1);
                if let Some(Err(failure)) = self.state.hw.as_mut().map(HwQueue::take_event) {
                    self.link.fail(self.ring, failure);
                }
            }
            Ok(_) => {}
            Err(failure) => self.link.fail(self.ring, failure),
        }
        self.mailbox.bell.awake();
    }
}

/// Tells a vCPU what became of its request. There is room for all that can be on their way.
fn give(users: &mut [User], owner: Owner, status: Option<Status>) {
    if let Some(user) = users.get_mut(owner.user as usize) {
        let _ = user.outcomes.push(Outcome { request: owner.request, status });
        user.news = true;
    }
}
