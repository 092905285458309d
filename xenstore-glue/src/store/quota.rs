//! What an unprivileged domain may use. The numbers are xenstored's defaults (`quotas[]` in
//! `tools/xenstored/domain.c`); dom0 has no quotas.

/// Nodes that a domain owns; a request that would create more fails with `ENOSPC`.
pub const NODES: usize = 1000;
/// Watches of a domain, over all its connections; more fail with `ENOSPC`.
pub const WATCHES: usize = 128;
/// Open transactions of a domain, over all its connections; more fail with `ENOSPC`.
pub const TRANSACTIONS: usize = 10;
/// Nodes that one transaction may touch; more fail with `ENOSPC`, and the commit with `ENOMEM`.
pub const TRANSACTION_NODES: usize = 1024;
/// Bytes of a node: value, names of children, and [`PERM_BYTES`] a permission entry; a request
/// that would make it larger fails with `ENOSPC`.
pub const NODE_BYTES: usize = 2048;
/// What a permission entry counts for in [`NODE_BYTES`]: `struct xs_permissions`.
pub const PERM_BYTES: usize = 8;
/// Permission entries of a node; more fail with `ENOSPC`.
pub const PERMS: usize = 5;
/// Requests of a connection whose replies are not yet taken; beyond that, no more are read. This
/// quota applies to dom0 too: it is back pressure, not a refusal.
pub const OUTSTANDING: usize = 20;
/// Connections of a domain. Under Xen a domain has one; here each of its programs has one.
pub const CONNECTIONS: usize = 64;
/// Bytes of events queued for one connection, also dom0's. Beyond that, all are replaced by one for
/// each of its watches; the connection is closed only if even these are too many. Equal events queued
/// at the same time count once.
pub const OUTBOX_BYTES: usize = 1 << 20;
