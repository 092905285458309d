//! What is in xenstore, and how to talk to it.
//!
//! - [`wire`]: the protocol, without I/O.
//! - [`client`]: a tokio client over a unix socket or the xenbus device file.
//! - [`store`]: an embedded xenstore that speaks the same protocol.
//! - [`xenbus`]: the states of the two ends of a split driver, as state machines without I/O.
//! - [`vbd`]: what each end of a virtual block device offers, and what they agree on.
//! - [`disk`]: the `xl` disk syntax, xl-disk-configuration(5).

pub mod client;
pub mod disk;
pub mod store;
pub mod vbd;
pub mod wire;
pub mod xenbus;
