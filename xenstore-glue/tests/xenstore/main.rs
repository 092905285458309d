//! The embedded store against clients that are not ours, its rules against xenstored's, and our
//! client against servers that restart.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy.toml allows them in tests, but does not see helpers as such"
)]

mod client;
mod rules;
mod tools;
mod xenstore_rs_crate;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use xenstore_glue::store::Server;

/// A server with a directory of its own for sockets.
struct Host {
    server: Server,
    dir: PathBuf,
}

impl Host {
    /// Listens for dom0.
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("xenstore-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let host = Self { server: Server::new(), dir };
        host.server.listen(host.socket(0), 0).unwrap();
        host
    }

    /// Introduces a domain with a directory that it may write, and listens for it.
    fn domain(&self, domid: u16) {
        use xenstore_glue::wire::{Access, Perm};
        self.server.with_store(|store| {
            let home = format!("/local/domain/{domid}");
            store.introduce(domid).unwrap();
            store.mkdir(&home).unwrap();
            store.set_perms(&home, &[Perm::new(domid, Access::None)]).unwrap();
        });
        self.server.listen(self.socket(domid), domid).unwrap();
    }

    fn socket(&self, domid: u16) -> PathBuf {
        self.dir.join(format!("domain-{domid}"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.server.shutdown();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Fails the test instead of hanging it.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it takes too long")
}

/// A program that finds the store at `socket`.
fn program(name: impl AsRef<std::ffi::OsStr>, socket: &Path) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(name);
    command.env("XENSTORED_PATH", socket).kill_on_drop(true);
    command
}
