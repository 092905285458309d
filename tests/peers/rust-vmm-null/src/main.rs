//! A null virtio-blk device over vhost-user, made of the crates that rust-vmm's own devices are made of:
//! what these can do with no storage behind them.
//!
//! `rust-vmm-null SOCKET spin|epoll`: `spin` looks at the queue for a while before it sleeps.

use std::io::Result;
use std::sync::{Arc, RwLock};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// Size of the device in 512-byte sectors: 4 GiB.
const SECTORS: u64 = 8 << 20;
const QUEUE_SIZE: usize = 512;
/// Fruitless looks before `spin` sleeps.
const PATIENCE: u32 = 20_000;

struct Null {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    spin: bool,
    /// Chains that were taken, with the bytes "written" to each.
    done: Vec<(u16, u32)>,
}

impl Null {
    /// Answers what is in the queue; returns whether there was anything.
    fn drain(&mut self, vring: &VringRwLock) -> bool {
        let memory = self.memory.memory();
        let mut vring = vring.get_mut();
        self.done.clear();
        let Ok(chains) = vring.get_queue_mut().iter(memory.clone()) else { return false };
        for mut chain in chains {
            let head = chain.head_index();
            let Some(header) = chain.next() else { continue };
            let mut request = [0u8; 16];
            let _ = memory.read_slice(&mut request, header.addr());
            let (mut len, mut last) = (0, None);
            for descriptor in chain {
                if descriptor.is_write_only() {
                    len += descriptor.len();
                }
                last = Some(descriptor);
            }
            if let Some(status) = last {
                let _ = memory.write_obj(0u8, status.addr());
            }
            self.done.push((head, len));
        }
        for &(head, len) in &self.done {
            let _ = vring.add_used(head, len);
        }
        if !self.done.is_empty() && vring.needs_notification().unwrap_or(true) {
            let _ = vring.signal_used_queue();
        }
        !self.done.is_empty()
    }
}

impl VhostUserBackendMut for Null {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_FLUSH,
        ]
        .iter()
        .fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |all, bit| all | 1 << bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    // The queue itself keeps the event index.
    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // struct virtio_blk_config: capacity, seg_max, blk_size
        let mut config = [0u8; 256];
        config[..8].copy_from_slice(&SECTORS.to_le_bytes());
        config[12..16].copy_from_slice(&126u32.to_le_bytes());
        config[20..24].copy_from_slice(&512u32.to_le_bytes());
        let range = offset as usize..(offset as usize).saturating_add(size as usize);
        config.get(range).unwrap_or_default().to_vec()
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn handle_event(
        &mut self,
        _event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> Result<()> {
        let Some(vring) = vrings.first() else { return Ok(()) };
        loop {
            let _ = vring.disable_notification();
            let mut idle = 0;
            while idle <= PATIENCE {
                if self.drain(vring) {
                    idle = 0;
                } else if self.spin {
                    idle += 1;
                    std::hint::spin_loop();
                } else {
                    break;
                }
            }
            if !vring.enable_notification().unwrap_or(false) {
                return Ok(());
            }
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let (Some(socket), Some(mode)) = (args.get(1), args.get(2)) else {
        eprintln!("usage: rust-vmm-null SOCKET spin|epoll");
        std::process::exit(2);
    };
    let null = Arc::new(RwLock::new(Null {
        memory: GuestMemoryAtomic::new(GuestMemoryMmap::new()),
        spin: mode == "spin",
        done: Vec::with_capacity(QUEUE_SIZE),
    }));
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("null".into(), null, memory).expect("a daemon");
    // One client; it hangs up when it is done, and the queue's thread is not waited for.
    let served = daemon.serve(socket);
    std::process::exit(i32::from(served.is_err()));
}
