//! `/dev/ublk-control`: devices are added and removed by commands to it.

use super::Error;
use super::abi::{self, ControlCommand, DeviceInfo, Parameters};
use io_uring::{IoUring, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const PATH: &str = "/dev/ublk-control";

/// A device in the kernel. Dropping this removes it: by then nobody may have `/dev/ublkcN` open or mapped.
#[derive(Debug)]
pub(super) struct Registered {
    control: Control,
    info: DeviceInfo,
}

impl Registered {
    /// Makes the device of `info`. A device of the same number whose server has died is removed first.
    ///
    /// # Errors
    /// When the kernel has no ublk, or the number is taken.
    pub(super) fn add(info: DeviceInfo, parameters: Parameters) -> Result<Self, Error> {
        let mut control = Control::open()?;
        let mut wanted = info;
        let mut added = control.ask(abi::ADD_DEV, info.id, Some(&mut wanted), 0);
        if added.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::AlreadyExists) {
            let mut before = DeviceInfo::default();
            let known = control.ask(abi::GET_DEV_INFO, info.id, Some(&mut before), 0);
            if known.is_ok() && before.state == abi::STATE_DEAD {
                let deleted = control.ask(abi::DEL_DEV, info.id, None::<&mut ()>, 0);
                deleted.map_err(failed("remove what a server that died has left", ""))?;
                wanted = info;
                added = control.ask(abi::ADD_DEV, info.id, Some(&mut wanted), 0);
            }
        }
        added.map_err(|e| {
            let taken = e.kind() == io::ErrorKind::AlreadyExists;
            failed("add a device", if taken { ": take another number" } else { "" })(e)
        })?;
        // Removed again if this fails.
        let mut device = Self { control, info: wanted };
        let mut parameters = parameters;
        device.command(abi::SET_PARAMS, "set its size and features", Some(&mut parameters), 0)?;
        Ok(device)
    }

    /// The device as the kernel has made it.
    pub(super) fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Makes the block device, after all its queues have been fetched from.
    pub(super) fn start(&mut self) -> Result<(), Error> {
        let pid = std::process::id().into();
        self.command(abi::START_DEV, "start the device", None::<&mut ()>, pid)
    }

    /// Removes the block device: the kernel writes back what it has cached, waits for all requests, and
    /// then aborts every tag.
    pub(super) fn stop(&mut self) -> Result<(), Error> {
        self.command(abi::STOP_DEV, "stop the device", None::<&mut ()>, 0)
    }

    fn command<T>(
        &mut self,
        operation: u32,
        doing: &'static str,
        argument: Option<&mut T>,
        data: u64,
    ) -> Result<(), Error> {
        self.control.ask(operation, self.info.id, argument, data).map_err(failed(doing, ""))
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Err(error) = self.command(abi::DEL_DEV, "remove the device", None::<&mut ()>, 0) {
            tracing::warn!("ublk device {}: {error}", self.info.id);
        }
    }
}

fn failed(doing: &'static str, remedy: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Kernel { doing, source, remedy }
}

struct Control {
    file: File,
    ring: IoUring<squeue::Entry128>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

impl Control {
    fn open() -> Result<Self, Error> {
        let file = File::options().read(true).write(true).open(PATH).map_err(|e| {
            let remedy = match e.kind() {
                io::ErrorKind::NotFound => {
                    ": load the kernel module, which Linux has from 6.4 on as it is needed here: modprobe ublk_drv"
                }
                io::ErrorKind::PermissionDenied => ": only root may add a block device",
                _ => "",
            };
            failed("open /dev/ublk-control", remedy)(e)
        })?;
        let ring = IoUring::builder().build(1).map_err(failed("make an io_uring", ""))?;
        Ok(Self { file, ring })
    }

    /// Runs a command about a device, with what it reads or writes, and waits for it.
    fn ask<T>(
        &mut self,
        operation: u32,
        device: u32,
        argument: Option<&mut T>,
        data: u64,
    ) -> io::Result<()> {
        let (addr, len) = match argument {
            Some(argument) => ((&raw mut *argument) as u64, size_of::<T>() as u16),
            None => (0, 0),
        };
        let queue = abi::NO_QUEUE;
        let command = ControlCommand { device, queue, len, addr, data, reserved: [0; 4] };
        let command = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), operation)
            .cmd(command.bytes())
            .build();
        // SAFETY: the file is open and the argument borrowed until the command is over, which is
        // waited for below.
        let pushed = unsafe { self.ring.submission().push(&command) };
        pushed.map_err(|_| io::ErrorKind::ResourceBusy)?;
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e)
                    if [libc::EINTR, libc::EAGAIN, libc::EBUSY]
                        .map(Some)
                        .contains(&e.raw_os_error()) => {}
                // The command may run, and still use its argument: there is no way back.
                Err(e) => {
                    tracing::error!("ublk: io_uring: {e}");
                    std::process::abort()
                }
            }
            if let Some(done) = self.ring.completion().next() {
                let result = done.result();
                return if result < 0 {
                    Err(io::Error::from_raw_os_error(-result))
                } else {
                    Ok(())
                };
            }
        }
    }
}
