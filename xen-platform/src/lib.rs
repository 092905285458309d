//! What a hypervisor gives to the two ends of a split driver: granted pages and event channels.
//!
//! [`Platform`] is the whole interface. [`xen`] implements it on Xen, [`embedded`] on any Linux
//! machine, with a broker process (of the crate `xen-embedded`) in the place of Xen.

mod choice;
mod claim;
pub mod embedded;
mod error;
mod mapping;
mod region;
mod waiting;
pub mod xen;

use ring_proto::{DomId, GrantRef, Port, SharedMemory};
use std::fmt::Debug;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

pub use choice::{Choice, ChoiceError, End};
pub use error::{Error, in_one_line};
pub use mapping::Mapping;
pub use region::LocalRegion;
pub use waiting::{DEFAULT_SPIN, STORM_EVENTS, STORM_PAUSE, Spin, Waiting};

/// What this crate's operations return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whether a grant lets the peer write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// The peer may read the page (`GTF_readonly`).
    ReadOnly,
    /// The peer may read and write the page.
    ReadWrite,
}

/// One domain's view of its hypervisor.
pub trait Platform: Send + Sync + Debug {
    /// The domain this process runs in.
    fn domid(&self) -> DomId;

    /// Claims one of this domain's virtual devices until the descriptor is closed; `None` if somebody else
    /// in the domain has it. Xenstore cannot tell: there, a live frontend looks like one that was killed.
    ///
    /// # Errors
    /// When the lock file cannot be made, or the hypervisor's broker does not answer.
    fn claim(&self, device: u32) -> Result<Option<OwnedFd>>;

    /// Maps pages that `peer` granted to us, contiguously in our address space.
    ///
    /// # Errors
    /// All pages or none: the error names the first grant that was refused and why.
    fn map(&self, peer: DomId, refs: &[GrantRef], access: Access) -> Result<Arc<dyn MappedGrants>>;

    /// Whether mapped pages may be used for I/O that pins them (O_DIRECT).
    ///
    /// Not in a PV domain. If a process is killed there while pages are pinned, the kernel's counts of them
    /// are left wrong, and the I/O of whoever maps others in their place fails: the process's memory is
    /// torn down while gntdev, since Linux 5.19, defers the unmap until the last pin is gone.
    fn may_pin(&self) -> bool;

    /// A handle for grant copies from and to `peer`. Each thread that copies takes its own.
    ///
    /// # Errors
    /// When the device for it cannot be opened.
    fn copier(&self, peer: DomId) -> Result<Box<dyn GrantCopier>>;

    /// Allocates `pages` zeroed pages and grants each to `peer` (XSA-396: never grant what was somebody
    /// else's).
    ///
    /// # Errors
    /// When the domain has no more memory or grant references to give.
    fn grant(&self, peer: DomId, pages: usize, access: Access) -> Result<Box<dyn GrantedPages>>;

    /// An event channel that waits for `peer` to bind the other end.
    ///
    /// # Errors
    /// When there are no more ports or descriptors.
    fn alloc_unbound(&self, peer: DomId) -> Result<Box<dyn EventChannel>>;

    /// Binds our end of the channel whose other end is `peer`'s `port`.
    ///
    /// # Errors
    /// When `peer` has no such port that waits for us, or there are no more ports or descriptors.
    fn bind_interdomain(&self, peer: DomId, port: Port) -> Result<Box<dyn EventChannel>>;
}

/// Pages of a peer, mapped. They are unmapped when the value is dropped.
pub trait MappedGrants: SharedMemory + Debug {}

/// Pages of our own that a peer may map or copy.
pub trait GrantedPages: Send + Sync + Debug {
    /// The pages, to be shared with the ring or with I/O.
    fn memory(&self) -> Arc<dyn SharedMemory>;

    /// One grant reference per page, in the order of the pages.
    fn refs(&self) -> &[GrantRef];

    /// Takes the grants back and frees the pages.
    ///
    /// Dropping the value does the same, but leaves pages that the peer still holds to be freed when it
    /// lets go of them: such a page is never handed out again before that (XSA-396, XSA-403).
    ///
    /// # Errors
    /// [`Error::StillMapped`] gives the value back unchanged when the peer holds any page, where the platform can
    /// tell. On Xen it cannot: there this is as dropping.
    fn revoke(self: Box<Self>) -> std::result::Result<(), (Box<dyn GrantedPages>, Error)>;
}

/// Which way a grant copy goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CopyDirection {
    /// Out of the peer's page.
    FromPeer,
    /// Into the peer's page.
    ToPeer,
}

/// One page's part of a grant copy.
#[derive(Clone, Debug)]
pub struct CopySegment {
    /// The peer's page.
    pub gref: GrantRef,
    /// Where in that page, in bytes; with `len` it must stay within the page.
    pub offset: u16,
    /// Bytes.
    pub len: u16,
    /// Where in the local region, in bytes.
    pub local: usize,
    /// Which way.
    pub direction: CopyDirection,
    /// The outcome: `Ok` only once it was copied. That the call succeeds says nothing (XSA-361).
    pub status: std::result::Result<(), GrantStatus>,
}

/// Why the hypervisor refused a grant (`GNTST_*` of grant_table.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GrantStatus {
    /// Not tried yet.
    #[error("not attempted")]
    NotAttempted,
    /// `GNTST_bad_gntref`: no such grant, or not for us.
    #[error("bad grant reference")]
    BadRef,
    /// `GNTST_permission_denied`: we may not write it.
    #[error("permission denied")]
    PermissionDenied,
    /// `GNTST_bad_domain`: the peer is gone.
    #[error("no such domain")]
    BadDomain,
    /// `GNTST_bad_copy_arg`: offset and length leave the page or the local region.
    #[error("range outside the page")]
    BadRange,
    /// Any other `GNTST_*` value.
    #[error("grant status {0}")]
    Other(i16),
}

/// Copies between a peer's granted pages and a local region, without mapping them.
pub trait GrantCopier: Send + Debug {
    /// Tries every segment and sets its `status`.
    ///
    /// # Errors
    /// Only if the operation failed as a whole; then no status is valid.
    fn copy(&mut self, local: &LocalRegion, segments: &mut [CopySegment]) -> Result<()>;
}

/// One end of an event channel, owned by the thread that waits on it. Closed when dropped.
///
/// The descriptor is readable while an event is pending and the channel is unmasked. Wait for it
/// level-triggered, unless each event is taken before the channel is unmasked: otherwise two may be
/// pending, and the kernel does not signal a further one before both are taken.
pub trait EventChannel: Send + AsFd + Debug {
    /// Our port, which the peer learns through xenstore.
    fn port(&self) -> Port;

    /// Raises an event at the other end. Nothing happens if nobody is bound there.
    ///
    /// # Errors
    /// When the channel as a whole is broken.
    fn notify(&self) -> Result<()>;

    /// Takes a pending event, without blocking; returns whether there was one. The channel is then masked
    /// until [`EventChannel::unmask`].
    ///
    /// # Errors
    /// As [`EventChannel::notify`].
    fn take(&mut self) -> Result<bool>;

    /// The file behind the channel, for a thread that takes events by reading that itself, as it can do
    /// along with other work through io_uring.
    ///
    /// # Errors
    /// When no descriptor is left.
    fn file(&self) -> Result<EventFile>;

    /// Lets the next event through. To be called when the work that the last one asked for is done, so that
    /// a peer cannot make us run faster than we work (XSA-332, XSA-391). Returns whether that took a
    /// system call, for statistics.
    ///
    /// # Errors
    /// As [`EventChannel::notify`].
    fn unmask(&mut self) -> Result<bool>;
}

/// The file of an event channel.
#[derive(Debug)]
pub struct EventFile {
    /// Another descriptor of the channel, non-blocking, and readable while an event is pending and the
    /// channel is unmasked. It must not be waited for once the channel is closed.
    pub descriptor: OwnedFd,
    /// Bytes of one event. Reading them is [`EventChannel::take`].
    pub event_bytes: u32,
    /// Whether reading masks the channel, and writing the same bytes is [`EventChannel::unmask`].
    pub unmask: bool,
}
