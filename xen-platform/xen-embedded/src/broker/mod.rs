//! The broker: a process that stands in for Xen, xenstored and the toolstack's daemon.

mod control;
mod host;
mod memory;
mod pidfd;
mod ports;
mod processes;

use crate::{XENSTORED_SOCKET, locked, toolstack};
use host::Host;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::geteuid;
use ring_proto::DomId;
use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet, LocalSet};
use tracing::{info, warn};
use xen_platform::embedded::control::{CONTROL_SOCKET, DomainInfo, NewDomain, OnCrash};
use xen_platform::embedded::protocol::{HYPERVISOR_SOCKET, XENSTORE_SOCKET, domain_dir};
use xen_platform::{Error, Result};
use xenstore_glue::client::{Client, Endpoint};
use xenstore_glue::store::Server;

/// dom0's memory in bytes, for the rings and data of its own frontends, if it has any.
const DOM0_MEMORY: u64 = 256 << 20;

/// In a directory's mode: group and others may write.
const OTHERS_WRITE: u32 = 0o022;

/// The pause after a connection could not be accepted: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A process that survives SIGKILL this long hangs in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Broker {
    dir: PathBuf,
    host: Mutex<Host>,
    store: Server,
    /// With dom0's rights, over our own socket: the toolstack's part is done as any toolstack would.
    xenstore: Client,
    /// Domains are created and removed one at a time.
    changing: tokio::sync::Mutex<()>,
    /// The tasks that listen for processes, by domain.
    listeners: Mutex<HashMap<u16, JoinHandle<()>>>,
}

/// Runs the broker in `dir`, which is created if need be, until `shutdown` is ready. Calls `ready`
/// when everything can be used. Must run in a tokio runtime; all of the broker runs on the thread
/// that polls this.
///
/// # Errors
/// When another broker runs there, or the directory cannot be used.
pub async fn serve(
    dir: &Path,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    LocalSet::new().run_until(serve_here(dir, ready, shutdown)).await
}

async fn serve_here(
    dir: &Path,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let failed = |e: io::Error| Error::io(format!("use the directory {}", dir.display()), e);
    create_dir(dir).map_err(failed)?;
    let _lock = lock(dir)?;
    remove_sockets(dir).map_err(failed)?;
    raise_file_limit();

    let store = Server::new();
    let xenstored = dir.join(XENSTORED_SOCKET);
    listen_store(&store, &xenstored, DomId(0))?;
    let xenstore = Client::connect(Endpoint::Unix(xenstored))
        .await
        .map_err(|e| Error::io("start xenstore", io::Error::other(e)))?;
    let broker = Arc::new(Broker {
        dir: dir.to_owned(),
        host: Mutex::new(Host::new()),
        store,
        xenstore,
        changing: tokio::sync::Mutex::default(),
        listeners: Mutex::default(),
    });
    let dom0 = NewDomain {
        name: "Domain-0".to_owned(),
        domid: Some(0),
        memory: DOM0_MEMORY,
        vcpus: std::thread::available_parallelism()
            .map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
            .min(host::MAX_VCPUS),
        driver_domain: true,
        on_crash: OnCrash::Preserve,
    };
    broker
        .create(dom0)
        .await
        .map_err(|reason| Error::Refused { doing: "create dom0".to_owned(), reason })?;
    let control = control::listen(Arc::clone(&broker), &dir.join(CONTROL_SOCKET))?;
    info!(dir = %dir.display(), "ready");
    ready();
    shutdown.await;
    control.abort();
    broker.store.shutdown();
    for (_, task) in locked(&broker.listeners).drain() {
        task.abort();
    }
    remove_sockets(dir).map_err(failed)
}

/// Creates a directory for sockets unless it exists. Nobody else may write there, lest they replace our
/// sockets.
fn create_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let found = fs::metadata(dir)?;
    if found.uid() != geteuid().as_raw() || found.mode() & OTHERS_WRITE != 0 {
        let reason = "others may write there: it must be ours, and of mode 0755 at the most";
        return Err(io::Error::other(reason));
    }
    Ok(())
}

/// Makes this the directory's only broker, for as long as the lock lives.
fn lock(dir: &Path) -> Result<Flock<File>> {
    let path = dir.join("broker.lock");
    let failed = |e: io::Error| Error::io(format!("lock {}", path.display()), e);
    let file =
        File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| {
        if e == nix::Error::EWOULDBLOCK {
            Error::Refused {
                doing: format!("lock {}", path.display()),
                reason: "another broker runs there: stop it or use another --dir".to_owned(),
            }
        } else {
            failed(e.into())
        }
    })
}

/// Removes the sockets that a previous broker left, or our own.
fn remove_sockets(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name == CONTROL_SOCKET || name == XENSTORED_SOCKET {
            fs::remove_file(&path)?;
        } else if name.strip_prefix("dom").is_some_and(|n| n.parse::<u16>().is_ok()) {
            remove_domain_dir(&path);
        }
    }
    Ok(())
}

fn remove_domain_dir(dir: &Path) {
    for socket in [HYPERVISOR_SOCKET, XENSTORE_SOCKET] {
        let _ = fs::remove_file(dir.join(socket));
    }
    // Fails if somebody keeps other things there.
    let _ = fs::remove_dir(dir);
}

/// Event channels take two descriptors each, so the usual soft limit of 1024 is soon too few.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "cannot raise the limit of open files; there can be few event channels");
    }
}

/// Serves each connection in a task of its own. Aborting the returned task aborts these as well.
fn accept<F: Future<Output = ()> + 'static>(
    listener: UnixListener,
    of: String,
    serve: impl Fn(UnixStream) -> F + 'static,
) -> JoinHandle<()> {
    tokio::task::spawn_local(async move {
        let mut served = JoinSet::new();
        loop {
            match listener.accept().await {
                Ok((stream, _)) => drop(served.spawn_local(serve(stream))),
                Err(error) => {
                    warn!(of, %error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
            while served.try_join_next().is_some() {}
        }
    })
}

fn listen_store(store: &Server, path: &Path, domid: DomId) -> Result<()> {
    store.listen(path, domid.0).map_err(|e| Error::io(format!("listen on {}", path.display()), e))
}

impl Broker {
    async fn create(self: &Arc<Self>, new: NewDomain) -> Result<DomainInfo, String> {
        let _changing = self.changing.lock().await;
        let info = locked(&self.host).create(new)?;
        let done = match toolstack::create_domain(&self.xenstore, &info).await {
            Ok(()) => self.listen(DomId(info.domid)).map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        };
        if let Err(reason) = done {
            self.forget(info.domid).await;
            return Err(reason);
        }
        info!(domid = info.domid, name = info.name, "domain created");
        Ok(info)
    }

    fn listen(self: &Arc<Self>, domid: DomId) -> Result<()> {
        let dir = domain_dir(&self.dir, domid);
        create_dir(&dir).map_err(|e| Error::io(format!("use {}", dir.display()), e))?;
        listen_store(&self.store, &dir.join(XENSTORE_SOCKET), domid)?;
        let task = processes::listen(Arc::clone(self), &dir.join(HYPERVISOR_SOCKET), domid)?;
        locked(&self.listeners).insert(domid.0, task);
        Ok(())
    }

    /// Drops every connection to xenstore, and listens again.
    async fn restart_xenstore(&self) -> Result<(), String> {
        // No domain's socket comes or goes meanwhile.
        let _changing = self.changing.lock().await;
        self.store.shutdown();
        let listen = |path: PathBuf, domid| listen_store(&self.store, &path, domid);
        listen(self.dir.join(XENSTORED_SOCKET), DomId(0)).map_err(|e| e.to_string())?;
        for info in locked(&self.host).list() {
            let domid = DomId(info.domid);
            let path = domain_dir(&self.dir, domid).join(XENSTORE_SOCKET);
            listen(path, domid).map_err(|e| e.to_string())?;
        }
        info!("xenstore restarted");
        Ok(())
    }

    /// Kills the domain's process and removes the domain.
    async fn destroy(self: &Arc<Self>, domid: u16, asker: Option<i32>) -> Result<(), String> {
        if domid == 0 {
            return Err("dom0 cannot be destroyed: stop the broker instead".to_owned());
        }
        // Its number goes to nobody else meanwhile.
        let _changing = self.changing.lock().await;
        let process = {
            let host = locked(&self.host);
            host.get(domid).ok_or("no such domain")?;
            host.process(domid)
        };
        if let Some((pid, process)) = process {
            let own = i32::try_from(std::process::id()).ok();
            if pid <= 1 || Some(pid) == own || Some(pid) == asker {
                return Err(format!("process {pid} is attached to it: let it detach first"));
            }
            // Its connection may outlive it: another process may hold that, too.
            tokio::time::timeout(KILL_TIMEOUT, pidfd::kill(process))
                .await
                .map_err(|_| format!("its process {pid} does not end"))?
                .map_err(|e| format!("cannot kill its process {pid}: {e}"))?;
        }
        self.forget(domid).await;
        Ok(())
    }

    /// The process that was the domain is gone.
    async fn process_ended(self: &Arc<Self>, domid: u16, pid: i32) {
        let info = {
            let mut host = locked(&self.host);
            host.ended(domid);
            host.get(domid)
        };
        let Some(info) = info else { return };
        info!(domid, pid, on_crash = ?info.on_crash, "the domain's process ended");
        if info.on_crash == OnCrash::Destroy {
            let _changing = self.changing.lock().await;
            self.forget(domid).await;
        }
    }

    /// Removes the domain and aborts the tasks that serve its processes. This may run in one of those, so
    /// that is done last. Only to be called with `changing` held.
    async fn forget(&self, domid: u16) {
        if locked(&self.host).remove(domid).is_none() {
            return;
        }
        let dir = domain_dir(&self.dir, DomId(domid));
        self.store.unlisten(dir.join(XENSTORE_SOCKET));
        remove_domain_dir(&dir);
        match toolstack::destroy_domain(&self.xenstore, domid).await {
            Ok(backends) => {
                info!(domid, "domain destroyed");
                let xenstore = self.xenstore.clone();
                tokio::task::spawn_local(async move {
                    toolstack::bury_backends(&xenstore, backends).await;
                });
            }
            Err(error) => warn!(domid, %error, "cannot remove the domain from xenstore"),
        }
        let listener = locked(&self.listeners).remove(&domid);
        if let Some(task) = listener {
            task.abort();
            let _ = task.await;
        }
    }
}
