//! qemu-storage-daemon: its vhost-user-blk export with an I/O thread. The export has the thread wait for a
//! descriptor that it cannot poll, and then the thread never polls, whatever its `poll-max-ns`.

use super::{build, drive, serve, vhost_takes};
use crate::xtask::bench::case::{Case, Disk, Wait};
use crate::xtask::bench::contender::Contender;
use crate::xtask::bench::meter::Meter;
use crate::xtask::bench::place::Place;
use crate::xtask::bench::sample::Sample;
use crate::xtask::packages::Need;
use anyhow::Result;

/// QEMU's block layer behind virtio.
pub(crate) struct StorageDaemon;

impl Contender for StorageDaemon {
    fn name(&self) -> &'static str {
        "qemu-storage-daemon"
    }

    fn needs(&self) -> &'static [Need] {
        &[("/usr/bin/qemu-storage-daemon", "qemu-system-common")]
    }

    fn prepare(&self) -> Result<()> {
        build()
    }

    fn takes(&self, case: &Case) -> Option<Case> {
        vhost_takes(case).then_some(Case { backend: Wait::Event, ..*case })
    }

    fn measure(&self, case: &Case, meter: &Meter, place: &Place) -> Result<Sample> {
        let socket = place.dir().join("qemu.sock");
        let file = || -> Result<String> {
            Ok(place.path(case.disk)?.map(|path| path.display().to_string()).unwrap_or_default())
        };
        let storage = match case.disk {
            Disk::Null => "driver=null-co,size=4294967296,read-zeroes=off".to_owned(),
            Disk::CachedFile => format!("driver=file,aio=io_uring,filename={}", file()?),
            Disk::DirectFile => {
                format!("driver=file,aio=io_uring,cache.direct=on,filename={}", file()?)
            }
            Disk::BlockDevice => {
                format!("driver=host_device,aio=io_uring,cache.direct=on,filename={}", file()?)
            }
        };
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,\
             num-queues=1,iothread=io",
            socket.display()
        );
        let mut command = meter.backend();
        command.arg("qemu-storage-daemon");
        command.args(["--object", "iothread,id=io"]);
        command.arg("--blockdev").arg(format!("{storage},node-name=disk"));
        command.arg("--export").arg(export);
        let server = serve("qemu-storage-daemon", place, &socket, &mut command)?;
        drive(case, meter, &socket, &server)
    }
}
