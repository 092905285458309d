//! Linux's own backend, which serves disks of kind `vbd` wherever it is loaded.

use std::path::Path;
use std::time::Duration;
use tracing::{info, warn};
use xenstore_glue::client::{self, Client};

/// Exists while Linux's backend is loaded.
const DRIVER: &str = "/sys/bus/xen-backend/drivers/vbd";
/// How often to check whether it is gone, which nothing announces.
const LOOK: Duration = Duration::from_secs(1);

/// Waits until Linux's backend is not loaded, as it would serve the same rings as we. `false` if the
/// device goes first.
pub(super) async fn wait_until_gone(client: &Client, dir: &str) -> Result<bool, client::Error> {
    if !Path::new(DRIVER).exists() {
        return Ok(true);
    }
    warn!(
        "left to the kernel's xen-blkback until that is gone: rmmod xen-blkback, or attach with backendtype=tap"
    );
    while Path::new(DRIVER).exists() {
        tokio::time::sleep(LOOK).await;
        if !client.exists(dir).await? {
            return Ok(false);
        }
    }
    info!("the kernel's xen-blkback is gone");
    Ok(true)
}
