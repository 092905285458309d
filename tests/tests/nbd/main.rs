//! `blkfront nbd` as it is deployed: broker, blkback and blkfront as processes, and clients that
//! others wrote, or that obey no rule.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod clients;
mod export;
mod handshake;
mod hostile;
mod raw;
