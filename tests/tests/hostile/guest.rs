//! A guest, played by the test: its memory, its event channels, its view of xenstore.

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ring_proto::{DomId, GrantRef, RingLayout, RingPages, SharedMemory, front};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use tokio::runtime::Runtime;
use xen_blk_tests::host::{DRIVER_DOMAIN, Host};
use xen_blk_tests::process::{HUNG, Patience, wait_until};
use xen_platform::embedded::{EmbeddedPlatform, control};
use xen_platform::{Access, EventChannel, GrantedPages, Platform};
use xenstore_glue::client::{Client, Endpoint};
use xenstore_glue::vbd::{FrontendRequest, QueueKeys};
use xenstore_glue::wire::Perm;

/// How long to wait for an event before looking at the ring again.
const LOOK_MS: u16 = 50;

/// `enum xenbus_state` of Xen's public/io/xenbus.h.
pub(crate) mod state {
    pub(crate) const INITIALISING: &str = "1";
    pub(crate) const INIT_WAIT: &str = "2";
    pub(crate) const INITIALISED: &str = "3";
    pub(crate) const CONNECTED: &str = "4";
    pub(crate) const CLOSING: &str = "5";
    pub(crate) const CLOSED: &str = "6";
}

/// Xenstore, through blocking calls.
pub(crate) struct Store {
    runtime: Runtime,
    client: Client,
}

impl Store {
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(Client::connect(Endpoint::Unix(socket.to_owned())))?;
        Ok(Self { runtime, client })
    }

    pub(crate) fn read(&self, path: &str) -> Result<Option<String>> {
        let value = self.runtime.block_on(self.client.read_optional(path));
        let value = value.with_context(|| format!("read {path}"))?;
        Ok(value.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    pub(crate) fn write(&self, path: &str, value: impl AsRef<[u8]>) -> Result<()> {
        self.runtime
            .block_on(self.client.write(path, value))
            .with_context(|| format!("write {path}"))
    }

    /// Writes nodes in one transaction.
    pub(crate) fn write_all(&self, dir: &str, nodes: &[(String, Vec<u8>)]) -> Result<()> {
        let written = self.runtime.block_on(self.client.transact(async |transaction| {
            for (key, value) in nodes {
                transaction.write(&format!("{dir}/{key}"), value).await?;
            }
            Ok(())
        }));
        written.with_context(|| format!("write below {dir}"))
    }

    pub(crate) fn rm(&self, path: &str) -> Result<()> {
        self.runtime.block_on(self.client.rm(path)).with_context(|| format!("remove {path}"))
    }

    pub(crate) fn set_perms(&self, path: &str, perms: &[Perm]) -> Result<()> {
        let set = self.runtime.block_on(self.client.set_perms(path, perms));
        set.with_context(|| format!("permissions of {path}"))
    }

    pub(crate) fn wait_for(&self, path: &str, values: &[&str]) -> Result<()> {
        let mut last = None;
        wait_until(&format!("{path} to be one of {values:?}"), || {
            last = self.read(path)?;
            Ok(last.as_deref().is_some_and(|value| values.contains(&value)))
        })
        .with_context(|| format!("it is {last:?}"))
    }
}

/// A guest domain that is this process.
pub(crate) struct Guest {
    pub(crate) name: String,
    pub(crate) domid: DomId,
    pub(crate) backend: DomId,
    pub(crate) platform: Arc<EmbeddedPlatform>,
    /// With the guest's own rights.
    pub(crate) store: Store,
}

impl Guest {
    pub(crate) fn create(host: &Host, name: &str) -> Result<Self> {
        let domid = DomId(host.create_domain(name, &[])?);
        let backend = control::find_domain(&host.platform_dir(), DRIVER_DOMAIN)?;
        let platform = EmbeddedPlatform::attach(&host.platform_dir(), name)?;
        let store = Store::connect(&platform.xenstore_socket())?;
        Ok(Self { name: name.to_owned(), domid, backend, platform, store })
    }

    /// Attaches a disk by the options of its xl line that matter: `vdev=...,target=...`.
    pub(crate) fn attach(&self, host: &Host, disk: &str) -> Result<Device> {
        let line = format!("backend={DRIVER_DOMAIN},format=raw,backendtype=tap,{disk}");
        let told = host.attach(&self.name, &line)?;
        let (devid, back) = told.trim().split_once(' ').context("number and directory")?;
        let front = format!("/local/domain/{}/device/vbd/{devid}", self.domid.0);
        Ok(Device { front, back: back.to_owned() })
    }

    /// The directories that a disk with this number has.
    pub(crate) fn device(&self, devid: u32) -> Device {
        let (guest, backend) = (self.domid.0, self.backend.0);
        Device {
            front: format!("/local/domain/{guest}/device/vbd/{devid}"),
            back: format!("/local/domain/{backend}/backend/vbd3/{guest}/{devid}"),
        }
    }

    pub(crate) fn grant(&self, pages: usize, access: Access) -> Result<Box<dyn GrantedPages>> {
        Ok(self.platform.grant(self.backend, pages, access)?)
    }
}

/// How a frontend wants its ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transport {
    pub(crate) layout: RingLayout,
    pub(crate) order: u8,
    pub(crate) persistent: bool,
}

/// The two directories of a disk.
#[derive(Clone)]
pub(crate) struct Device {
    pub(crate) front: String,
    pub(crate) back: String,
}

impl Device {
    pub(crate) fn set_state(&self, guest: &Guest, state: &str) -> Result<()> {
        guest.store.write(&format!("{}/state", self.front), state)
    }

    pub(crate) fn wait_backend(&self, guest: &Guest, states: &[&str]) -> Result<()> {
        guest.store.wait_for(&format!("{}/state", self.back), states)
    }

    /// A property that the backend has written.
    pub(crate) fn property(&self, guest: &Guest, key: &str) -> Result<Option<String>> {
        guest.store.read(&format!("{}/{key}", self.back))
    }

    /// Starts over, from whatever state.
    pub(crate) fn begin(&self, guest: &Guest) -> Result<()> {
        self.set_state(guest, state::INITIALISING)?;
        self.wait_backend(guest, &[state::INIT_WAIT])
    }

    /// Connects by the rules.
    pub(crate) fn connect(&self, guest: &Guest, transport: Transport) -> Result<Link> {
        self.begin(guest)?;
        let link = Link::new(guest, transport)?;
        self.offer(guest, &link.keys())?;
        self.wait_backend(guest, &[state::CONNECTED])?;
        self.set_state(guest, state::CONNECTED)?;
        Ok(link)
    }

    /// Writes keys and then `Initialised`.
    pub(crate) fn offer(&self, guest: &Guest, keys: &[(String, Vec<u8>)]) -> Result<()> {
        // Whatever an earlier connection left.
        for key in ["multi-queue-num-queues", "ring-page-order", "split-ring", "num-ring-pages"] {
            guest.store.rm(&format!("{}/{key}", self.front))?;
        }
        guest.store.write_all(&self.front, keys)?;
        self.set_state(guest, state::INITIALISED)
    }

    /// Disconnects by the rules, and takes every grant back: the backend must have let go of all.
    pub(crate) fn disconnect(&self, guest: &Guest, link: Link) -> Result<()> {
        self.set_state(guest, state::CLOSING)?;
        self.wait_backend(guest, &[state::CLOSING, state::CLOSED])?;
        self.set_state(guest, state::CLOSED)?;
        self.wait_backend(guest, &[state::CLOSED])?;
        link.revoke()
    }
}

/// A ring's pages and its event channel, shared with the backend.
pub(crate) struct Link {
    pub(crate) transport: Transport,
    pub(crate) requests: Box<dyn GrantedPages>,
    /// The other pages of a split ring.
    pub(crate) responses: Option<Box<dyn GrantedPages>>,
    pub(crate) channel: Box<dyn EventChannel>,
}

impl Link {
    /// Makes an empty ring.
    pub(crate) fn new(guest: &Guest, transport: Transport) -> Result<Self> {
        let (first, second) = transport.layout.pages(transport.order);
        let requests = guest.grant(first, Access::ReadWrite)?;
        let responses = match second {
            0 => None,
            pages => Some(guest.grant(pages, Access::ReadWrite)?),
        };
        let channel = guest.platform.alloc_unbound(guest.backend)?;
        let link = Self { transport, requests, responses, channel };
        front::create(link.pages(), transport.layout, transport.order)?;
        Ok(link)
    }

    pub(crate) fn pages(&self) -> RingPages {
        match &self.responses {
            None => RingPages::Union(self.requests.memory()),
            Some(responses) => RingPages::Split(self.requests.memory(), responses.memory()),
        }
    }

    /// The keys that the frontend writes for it.
    pub(crate) fn keys(&self) -> Vec<(String, Vec<u8>)> {
        let refs = |pages: &dyn GrantedPages| pages.refs().to_vec();
        let request = FrontendRequest {
            layout: self.transport.layout,
            order: self.transport.order,
            persistent: self.transport.persistent,
            large_sector_size: true,
            queues: vec![QueueKeys {
                request_refs: refs(&*self.requests),
                response_refs: self.responses.as_deref().map_or_else(Vec::new, refs),
                port: self.channel.port(),
            }],
        };
        request.to_keys().into_iter().map(|(key, value)| (key, value.into_bytes())).collect()
    }

    /// Sleeps until an event, but not forever.
    pub(crate) fn sleep(&mut self) -> Result<()> {
        wait_for_event(&mut *self.channel)
    }

    pub(crate) fn revoke(self) -> Result<()> {
        for pages in std::iter::once(self.requests).chain(self.responses) {
            revoke(pages)?;
        }
        Ok(())
    }
}

/// Takes back pages that the backend must not hold any more.
pub(crate) fn revoke(pages: Box<dyn GrantedPages>) -> Result<()> {
    pages.revoke().map_err(|(_, error)| error).context("the backend still holds a page")
}

/// Sleeps until an event, but not forever.
pub(crate) fn wait_for_event(channel: &mut dyn EventChannel) -> Result<()> {
    channel.unmask()?;
    let mut fds = [PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(LOOK_MS))?;
    channel.take()?;
    Ok(())
}

/// Reads and writes by the rules, one request at a time.
pub(crate) struct WellBehaved {
    link: Link,
    requests: ring_proto::RequestProducer,
    responses: ring_proto::ResponseConsumer,
    data: Box<dyn GrantedPages>,
    next: u64,
}

/// The answer to a request that obeys the rules.
pub(crate) use ring_proto::Status;

impl WellBehaved {
    pub(crate) fn connect(guest: &Guest, device: &Device, transport: Transport) -> Result<Self> {
        let link = device.connect(guest, transport)?;
        Self::on(guest, link)
    }

    /// On a ring that is connected and has carried nothing.
    pub(crate) fn on(guest: &Guest, link: Link) -> Result<Self> {
        let Transport { layout, order, .. } = link.transport;
        let (requests, responses) = front::create(link.pages(), layout, order)?;
        let data = guest.grant(1, Access::ReadWrite)?;
        Ok(Self { link, requests, responses, data, next: 0 })
    }

    /// The page that data goes through.
    pub(crate) fn data(&self) -> (GrantRef, Arc<dyn SharedMemory>) {
        (self.data.refs()[0], self.data.memory())
    }

    pub(crate) fn disconnect(self, guest: &Guest, device: &Device) -> Result<()> {
        drop((self.requests, self.responses));
        device.disconnect(guest, self.link)?;
        revoke(self.data)
    }

    /// Carries out one request.
    pub(crate) fn request(&mut self, body: ring_proto::Body) -> Result<Status> {
        let id = self.next;
        self.next = (self.next + 1) % u64::from(u32::MAX);
        self.requests.push(&ring_proto::Request { id, body })?;
        if self.requests.publish() {
            self.link.channel.notify()?;
        }
        let mut patience = Patience::new(HUNG);
        while !self.responses.final_check()? {
            if patience.is_over() {
                bail!("a request is not answered");
            }
            self.link.sleep()?;
        }
        let response = self.responses.pop().context("a response")?;
        ensure!(response.id == id, "response {} to request {id}", response.id);
        Ok(response.status)
    }

    fn transfer(&mut self, transfer: ring_proto::Transfer, sector: u64) -> Result<Status> {
        let mut segments = ring_proto::Segments::EMPTY;
        segments.push(ring_proto::Segment::new(self.data.refs()[0], 0, 7));
        self.request(ring_proto::Body::Direct { transfer, sector, segments })
    }

    /// Writes 4096 bytes.
    pub(crate) fn write(&mut self, sector: u64, bytes: &[u8; 4096]) -> Result<Status> {
        self.write_by(ring_proto::Transfer::Write, sector, bytes)
    }

    /// Writes 4096 bytes, with flushes around them.
    pub(crate) fn write_by(
        &mut self,
        transfer: ring_proto::Transfer,
        sector: u64,
        bytes: &[u8; 4096],
    ) -> Result<Status> {
        window(&self.data.memory(), 0, 4096)?.write(bytes);
        self.transfer(transfer, sector)
    }

    /// Reads 4096 bytes.
    pub(crate) fn read(&mut self, sector: u64) -> Result<(Status, [u8; 4096])> {
        let mut bytes = [0; 4096];
        window(&self.data.memory(), 0, 4096)?.write(&[0xa5; 4096]);
        let status = self.transfer(ring_proto::Transfer::Read, sector)?;
        window(&self.data.memory(), 0, 4096)?.read(&mut bytes);
        Ok((status, bytes))
    }

    /// Writes something and reads it back.
    pub(crate) fn round_trip(&mut self, sector: u64) -> Result<()> {
        let mut bytes = [0; 4096];
        for (k, chunk) in bytes.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&(self.next << 32 | sector << 9 | k as u64).to_le_bytes());
        }
        ensure!(self.write(sector, &bytes)? == Status::Okay, "write of sector {sector}");
        let (status, found) = self.read(sector)?;
        ensure!(status == Status::Okay, "read of sector {sector}");
        ensure!(found == bytes, "sector {sector} does not read back");
        Ok(())
    }
}

pub(crate) fn window(
    memory: &Arc<dyn SharedMemory>,
    offset: usize,
    len: usize,
) -> Result<ring_proto::Window> {
    ring_proto::Window::new(memory.clone(), offset, len).context("within the pages")
}
