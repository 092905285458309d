//! The blkif ring: what is on the shared pages, and who may touch it.
//!
//! One ring, four owned handles, a thread each at the most:
//!
//! ```text
//!   frontend                                                        backend
//!   RequestProducer  ── req_prod ──▶  requests   ──▶  RequestConsumer
//!        ▲ freed slots                                     │ taken requests
//!   ResponseConsumer ◀──  responses  ◀── rsp_prod ── ResponseProducer
//! ```
//!
//! Each handle keeps its index to itself. What the two halves of one side must know of each other
//! (which slots are free, which requests were taken) is an index with one writer: there is no lock,
//! and no place for one.
//!
//! The peer is not trusted. A request is copied out of the ring once ([`RequestConsumer::pop`]),
//! the copy is checked ([`RawRequest::validate`]), and only what came of that is a [`Request`].
//!
//! No system call, no thread, and no allocation once a ring is set up.

#![no_std]
#![cfg_attr(loom, allow(dead_code, unused_imports, reason = "the model has no pages to set up"))]
extern crate alloc;
#[cfg(any(test, loom))]
extern crate std;

pub mod abi;
pub mod back;
mod codec;
mod error;
pub mod front;
mod ids;
mod layout;
mod memory;
mod request;
mod shared;
mod sync;

#[cfg(loom)]
#[cfg(test)]
mod loom_tests;

pub use abi::Segment;
pub use back::{RequestConsumer, ResponseProducer};
pub use error::{RingError, RingFull};
pub use front::{RequestProducer, ResponseConsumer};
pub use ids::{DomId, GrantRef, Port};
pub use layout::{Abi, RingLayout};
pub use memory::{SharedMemory, Window, Words, copy_volatile};
pub use request::{
    Body, Limits, RawRequest, Reason, Refused, Request, Response, Segments, Status, Transfer,
    decode_segments, encode_segment, indirect_pages,
};
pub use shared::{RingPages, SetupError};
