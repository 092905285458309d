//! Numbers and structures of `linux/ublk_cmd.h`, as of Linux 6.4 on: commands are numbered like
//! ioctls.

/// A command for `/dev/ublk-control`. What it reads or writes is at `addr`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct ControlCommand {
    pub(super) device: u32,
    /// [`NO_QUEUE`]; only commands about one queue name one.
    pub(super) queue: u16,
    pub(super) len: u16,
    pub(super) addr: u64,
    pub(super) data: u64,
    pub(super) reserved: [u16; 4],
}

/// `struct ublksrv_ctrl_dev_info`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct DeviceInfo {
    pub(super) queues: u16,
    pub(super) depth: u16,
    pub(super) state: u16,
    pub(super) pad0: u16,
    pub(super) max_io_bytes: u32,
    pub(super) id: u32,
    pub(super) pid: i32,
    pub(super) pad1: u32,
    pub(super) flags: u64,
    pub(super) server_flags: u64,
    pub(super) owner: [u32; 2],
    pub(super) reserved: [u64; 2],
}

/// `struct ublk_params`, as far as we use it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Parameters {
    pub(super) len: u32,
    pub(super) kinds: u32,
    pub(super) attributes: u32,
    pub(super) logical_shift: u8,
    pub(super) physical_shift: u8,
    pub(super) optimal_shift: u8,
    pub(super) minimal_shift: u8,
    pub(super) max_sectors: u32,
    pub(super) chunk_sectors: u32,
    pub(super) sectors: u64,
    pub(super) virtual_boundary: u64,
    pub(super) discard_alignment: u32,
    pub(super) discard_granularity: u32,
    pub(super) max_discard_sectors: u32,
    pub(super) max_zero_sectors: u32,
    pub(super) max_discard_segments: u16,
    pub(super) reserved: [u16; 3],
}

/// `struct ublksrv_io_desc`: a request, where the kernel has put it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Descriptor {
    pub(super) op_flags: u32,
    pub(super) sectors: u32,
    pub(super) start: u64,
    pub(super) addr: u64,
}

/// `struct ublksrv_io_cmd`: the answer to a request, and where the data of the next one is to be.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct IoCommand {
    pub(super) queue: u16,
    pub(super) tag: u16,
    pub(super) result: i32,
    pub(super) addr: u64,
}

const _: () = {
    assert!(size_of::<ControlCommand>() == 32);
    assert!(size_of::<DeviceInfo>() == 64);
    assert!(size_of::<Parameters>() == 64);
    assert!(size_of::<Descriptor>() == 24);
    assert!(size_of::<IoCommand>() == 16);
};

impl IoCommand {
    pub(super) fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&self.queue.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.result.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.addr.to_ne_bytes());
        bytes
    }
}

impl ControlCommand {
    /// The command as in a submission, which has more room.
    pub(super) fn bytes(self) -> [u8; 80] {
        let mut bytes = [0; 80];
        bytes[..4].copy_from_slice(&self.device.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.queue.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.len.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.data.to_ne_bytes());
        bytes
    }
}

/// `_IOC(direction, 'u', number, size)`.
const fn command(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | number
}

const READ: u32 = 2;
const READ_WRITE: u32 = 3;

const fn control(direction: u32, number: u32) -> u32 {
    command(direction, number, size_of::<ControlCommand>())
}

pub(super) const GET_DEV_INFO: u32 = control(READ, 0x02);
pub(super) const ADD_DEV: u32 = control(READ_WRITE, 0x04);
pub(super) const DEL_DEV: u32 = control(READ_WRITE, 0x05);
pub(super) const START_DEV: u32 = control(READ_WRITE, 0x06);
pub(super) const STOP_DEV: u32 = control(READ_WRITE, 0x07);
pub(super) const SET_PARAMS: u32 = control(READ_WRITE, 0x08);

pub(super) const FETCH_REQ: u32 = command(READ_WRITE, 0x20, size_of::<IoCommand>());
pub(super) const COMMIT_AND_FETCH_REQ: u32 = command(READ_WRITE, 0x21, size_of::<IoCommand>());

pub(super) const NO_QUEUE: u16 = u16::MAX;
/// Let the kernel choose.
pub(super) const ANY_DEVICE: u32 = u32::MAX;
/// `UBLK_F_CMD_IOCTL_ENCODE`.
pub(super) const F_IOCTL_NUMBERS: u64 = 1 << 6;
/// `UBLK_S_DEV_DEAD`.
pub(super) const STATE_DEAD: u16 = 0;

/// The result when a request was fetched; any other ends its tag.
pub(super) const IO_OK: i32 = 0;
pub(super) const OP_READ: u8 = 0;
pub(super) const OP_WRITE: u8 = 1;
pub(super) const OP_FLUSH: u8 = 2;
pub(super) const OP_DISCARD: u8 = 3;
pub(super) const IO_FUA: u32 = 1 << 13;

pub(super) const KIND_BASIC: u32 = 1;
pub(super) const KIND_DISCARD: u32 = 1 << 1;
pub(super) const ATTR_READ_ONLY: u32 = 1;
pub(super) const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
pub(super) const ATTR_FUA: u32 = 1 << 3;

/// Where the descriptors of a queue are: each queue has room for the largest queue's, in whole pages.
pub(super) const fn descriptors_offset(queue: u16) -> u64 {
    /// `UBLK_MAX_QUEUE_DEPTH`.
    const MAX_DEPTH: usize = 4096;
    queue as u64 * (MAX_DEPTH * size_of::<Descriptor>()).next_multiple_of(4096) as u64
}
