//! The blkif ring: what is on the shared pages, and who may touch it.
//!
//! One ring has four owned handles, each for one thread:
//!
//! ```text
//!   frontend                                                        backend
//!   RequestProducer  ── req_prod ──▶  requests   ──▶  RequestConsumer
//!        ▲ freed slots                                     │ taken requests
//!   ResponseConsumer ◀──  responses  ◀── rsp_prod ── ResponseProducer
//! ```
//!
//! Each handle keeps its private index to itself. The two halves of one side tell each other only
//! which slots are free and which requests were taken. Each of these is an index with a single
//! writer, so no lock is needed.
//!
//! The peer is not trusted. A request is copied out of the ring once ([`RequestConsumer::pop`]),
//! the copy is checked ([`RawRequest::validate`]), and only a copy that passes becomes a [`Request`].
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
