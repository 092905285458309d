//! Finds a device's xenstore directories by its name, and claims the device.

use super::overdue::no_answer;
use super::{Control, Start, xenstore};
use crate::Cause;
use crate::disk::State;
use crate::link::Command;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep, timeout};
use xenstore_glue::client::Client;
use xenstore_glue::vbd::{DevicePaths, VirtualDevice};
use xenstore_glue::xenbus::{FrontendMachine, XenbusState};

/// How long a killed frontend may take to disappear: its successor may be started before that.
const LET_GO: Duration = Duration::from_secs(1);
/// How often to check.
const CLAIM_LOOK: Duration = Duration::from_millis(10);

impl Start {
    pub(super) async fn run(self) -> Result<(), Cause> {
        let limit = self.config.connect_timeout;
        let found = timeout(limit, self.prepare()).await;
        let (control, commands) = found.unwrap_or_else(|_| Err(no_answer(limit)))?;
        control.run(commands).await
    }

    async fn prepare(self) -> Result<(Control, UnboundedReceiver<Command>), Cause> {
        let client = Client::connect(self.endpoint.clone()).await;
        let client = client.map_err(xenstore(format!("connect to {}", self.endpoint)))?;
        let (devid, frontend) = self.find(&client).await?;
        let claim = self.claim(devid, &frontend).await?;
        let text = async |key: &str| {
            let path = format!("{frontend}/{key}");
            client.read_string(&path).await.map_err(xenstore(format!("read {path}")))
        };
        let backend = text("backend").await?;
        let backend_id = text("backend-id").await?;
        let paths = DevicePaths::parse_backend(&backend)
            .ok()
            .filter(|paths| paths.frontend_domain == self.platform.domid())
            .filter(|paths| paths.backend_domain.0.to_string() == backend_id);
        let Some(paths) = paths else {
            let reason = format!("{frontend}/backend and backend-id ({backend_id}) do not agree");
            return Err(Cause::Negotiation { backend, reason });
        };
        let optional = async |key: &str| {
            let path = format!("{frontend}/{key}");
            client.read_optional(&path).await.map_err(xenstore(format!("read {path}")))
        };
        let own = optional("state").await?.and_then(|value| XenbusState::parse(&value));
        // Toolstacks before Xen 4.17 do not write it.
        let trusted = optional("trusted").await?.is_none_or(|value| value != b"0");
        let state = State::new(devid, frontend.clone(), backend.clone(), trusted);
        let control = Control {
            machine: FrontendMachine::new(own),
            client,
            platform: self.platform,
            config: self.config,
            ready: Some(self.ready),
            control: self.control,
            news: self.news,
            frontend,
            backend,
            backend_domain: paths.backend_domain,
            backend_state: None,
            fabric: None,
            offered: None,
            asked: false,
            changed_at: None,
            complaint: String::new(),
            connection: 0,
            state: Arc::new(Mutex::new(state)),
            cause: None,
            deadline: None,
            _claim: claim,
        };
        Ok((control, self.commands))
    }

    /// Claims the device, before touching anything that a live frontend may be using.
    async fn claim(&self, devid: u32, frontend: &str) -> Result<OwnedFd, Cause> {
        let end = Instant::now() + LET_GO;
        loop {
            match self.platform.claim(devid) {
                Ok(Some(claim)) => return Ok(claim),
                Ok(None) if Instant::now() < end => sleep(CLAIM_LOOK).await,
                Ok(None) => return Err(Cause::InUse { frontend: frontend.to_owned() }),
                Err(error) => return Err(Cause::Claim(error)),
            }
        }
    }

    /// The device's number and its frontend directory.
    async fn find(&self, client: &Client) -> Result<(u32, String), Cause> {
        let directory = format!("/local/domain/{}/device/vbd", self.platform.domid().0);
        let present = match client.directory(&directory).await {
            Ok(present) => present,
            Err(e) if e.is_not_found() => Vec::new(),
            Err(e) => return Err(xenstore(format!("list {directory}"))(e)),
        };
        if let Ok(device) = self.device.parse::<VirtualDevice>() {
            let number = device.number().to_string();
            if present.contains(&number) {
                return Ok((device.number(), format!("{directory}/{number}")));
            }
        }
        let name = |number: &String| {
            let device = number.parse().ok().and_then(VirtualDevice::from_number);
            device.map_or_else(|| number.clone(), |device| format!("{device}"))
        };
        let present: Vec<String> = present.iter().map(name).collect();
        let present = if present.is_empty() { "none".to_owned() } else { present.join(", ") };
        Err(Cause::NoDevice { directory, present })
    }
}
