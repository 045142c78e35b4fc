//! A disk of qemu-storage-daemon through its vhost-user-blk socket: the handshake by the crate `vhost`, the split virtqueue here, over the
//! same kind of shared memory as the other ring. (The crate `virtio-driver` has such a queue too, but takes slices of shared memory only, which
//! cannot be made without unsafe code.) Event indices are used, requests are chains of three descriptors, data are in one piece.
//!
//! ```text
//! memory: descriptors │ available ring │ used ring │ per place: header (16 bytes), status (1) │ per place: data
//! ```
//! Source: Virtual I/O Device 1.1, 2.6 (split virtqueues) and 5.2 (block device). Place n has the descriptors 3n to 3n+2.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{Ordering, fence};

use anyhow::{Context, Result, ensure};
use ring_bridge::grants::memfd::make_client_memory;
use ring_bridge::memory::{RingMemory, SharedRegion};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Op;
use super::ring::Ring;
use crate::servers::Endpoint;

/// Where the server is told that the memory begins; it maps it elsewhere.
const BASE: u64 = 1 << 40;
const PAGE: usize = 4096;
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const CHAIN: usize = 3;
const HEADER_BYTES: usize = 16;
/// Header, status, and room between places.
const META_BYTES: usize = 64;

/// Offsets of the parts of the memory.
#[derive(Debug, Clone, Copy)]
struct Layout {
    entries: usize,
    available: usize,
    used: usize,
    meta: usize,
    data: usize,
    place_bytes: usize,
    bytes: usize,
}

impl Layout {
    fn new(places: usize, bytes: usize) -> Layout {
        let up = |value: usize| value.next_multiple_of(PAGE);
        let entries = (places * CHAIN).next_power_of_two();
        let available = up(entries * 16);
        let used = available + up(4 + 2 * entries + 4);
        let meta = used + up(4 + 8 * entries + 4);
        let data = meta + up(places * META_BYTES);
        let place_bytes = up(bytes);
        Layout { entries, available, used, meta, data, place_bytes, bytes: data + places * place_bytes }
    }

    /// A place's header; its status follows.
    fn header(&self, place: usize) -> usize {
        self.meta + place * META_BYTES
    }

    fn data(&self, place: usize) -> usize {
        self.data + place * self.place_bytes
    }
}

/// A connected disk.
pub struct Disk {
    layout: Layout,
    memory: SharedRegion,
    kick: EventFd,
    _call: EventFd,
    calls: Epoll,
    size_bytes: u64,
    /// Entries of the available ring that are written, and those that the server may see.
    written: u16,
    published: u16,
    /// Entries of the used ring that were taken.
    taken: u16,
    _frontend: Frontend,
    _file: OwnedFd,
}

impl Disk {
    /// Connects, for `places` requests of up to `bytes`.
    pub fn open(endpoint: &Endpoint, places: usize, bytes: usize) -> Result<Disk> {
        let layout = Layout::new(places, bytes);
        let file = make_client_memory((layout.bytes / PAGE) as u32)?;
        let memory = SharedRegion::map(&file, layout.bytes)?;
        let mut frontend = Frontend::connect(&endpoint.socket, 1)
            .with_context(|| format!("cannot connect to {}", endpoint.socket.display()))?;
        frontend.set_owner()?;
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let wanted = VERSION_1 | EVENT_IDX | protocol;
        let offered = frontend.get_features()?;
        ensure!(
            offered & wanted == wanted,
            "the server offers the features {offered:#x}, without some of {wanted:#x}"
        );
        frontend.set_features(wanted)?;
        let offered = frontend.get_protocol_features()?;
        frontend.set_protocol_features(offered & VhostUserProtocolFeatures::CONFIG)?;
        let (_, config) = frontend.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8])?;
        let capacity =
            config.try_into().ok().map(u64::from_le_bytes).context("the configuration is too short")?;
        frontend.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: layout.bytes as u64,
            userspace_addr: BASE,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        }])?;
        let (kick, call) = (EventFd::new(EFD_CLOEXEC)?, EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        frontend.set_vring_num(0, layout.entries as u16)?;
        frontend.set_vring_base(0, 0)?;
        frontend.set_vring_addr(
            0,
            &VringConfigData {
                queue_max_size: layout.entries as u16,
                queue_size: layout.entries as u16,
                flags: 0,
                desc_table_addr: BASE,
                used_ring_addr: BASE + layout.used as u64,
                avail_ring_addr: BASE + layout.available as u64,
                log_addr: None,
            },
        )?;
        frontend.set_vring_call(0, &call)?;
        frontend.set_vring_kick(0, &kick)?;
        frontend.set_vring_enable(0, true)?;
        let calls = Epoll::new()?;
        let watched = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        calls.ctl(ControlOperation::Add, call.as_raw_fd(), watched)?;
        Ok(Disk {
            layout,
            memory,
            kick,
            _call: call,
            calls,
            size_bytes: capacity * 512,
            written: 0,
            published: 0,
            taken: 0,
            _frontend: frontend,
            _file: file,
        })
    }

    fn descriptor(&self, index: usize, at: usize, len: usize, flags: u16) -> Result<()> {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&(BASE + at as u64).to_le_bytes());
        bytes[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&(index as u16 + 1).to_le_bytes());
        Ok(self.memory.copy_in(index * 16, &bytes)?)
    }

    fn used_index(&self) -> Result<u16> {
        Ok((self.memory.load(self.layout.used)? >> 16) as u16)
    }
}

impl Ring for Disk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn submit(&mut self, op: Op, offset: u64, bytes: usize, place: usize) -> Result<()> {
        let layout = self.layout;
        ensure!(bytes <= layout.place_bytes, "{bytes} bytes do not fit into a place");
        let (header, head) = (layout.header(place), place * CHAIN);
        let mut request = [0; HEADER_BYTES + 1];
        request[0] = u8::from(op == Op::Write);
        request[8..16].copy_from_slice(&(offset / 512).to_le_bytes());
        // The status is none that a server gives.
        request[HEADER_BYTES] = 0xff;
        self.memory.copy_in(header, &request)?;
        let direction = if op == Op::Write { 0 } else { WRITE };
        self.descriptor(head, header, HEADER_BYTES, NEXT)?;
        self.descriptor(head + 1, layout.data(place), bytes, NEXT | direction)?;
        self.descriptor(head + 2, header + HEADER_BYTES, 1, WRITE)?;
        let slot = usize::from(self.written) % layout.entries;
        self.memory.copy_in(layout.available + 4 + 2 * slot, &(head as u16).to_le_bytes())?;
        self.written = self.written.wrapping_add(1);
        Ok(())
    }

    fn publish(&mut self) -> Result<()> {
        let (old, new) = (self.published, self.written);
        // The flags, 0, and the index.
        self.memory.store(self.layout.available, u32::from(new) << 16)?;
        fence(Ordering::SeqCst); // between the store of the index and the load of avail_event
        self.published = new;
        let event = self.memory.load(self.layout.used + 4 + 8 * self.layout.entries)? as u16;
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.kick.write(1)?;
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<(usize, bool)>) -> Result<()> {
        let used = self.used_index()?;
        while self.taken != used {
            let at = self.layout.used + 4 + 8 * (usize::from(self.taken) % self.layout.entries);
            let place = self.memory.load(at)? as usize / CHAIN;
            let mut status = [0xff];
            self.memory.copy_out(self.layout.header(place) + HEADER_BYTES, &mut status)?;
            done.push((place, status == [0]));
            self.taken = self.taken.wrapping_add(1);
        }
        Ok(())
    }

    fn sleep(&mut self) -> Result<bool> {
        self.memory.store(self.layout.available + 4 + 2 * self.layout.entries, u32::from(self.taken))?;
        fence(Ordering::SeqCst); // between the store of used_event and the load of the index
        Ok(self.used_index()? != self.taken)
    }

    fn call_fd(&self) -> RawFd {
        self.calls.as_raw_fd()
    }

    fn wait(&mut self, timeout_ms: u16) -> Result<()> {
        match self.calls.wait(i32::from(timeout_ms), &mut [EpollEvent::default()]) {
            Err(error) if error.kind() != ErrorKind::Interrupted => Err(error).context("epoll_wait"),
            _ => Ok(()),
        }
    }

    fn copy_in(&mut self, place: usize, data: &[u8]) -> Result<()> {
        ensure!(data.len() <= self.layout.place_bytes, "too long for a place");
        Ok(self.memory.copy_in(self.layout.data(place), data)?)
    }

    fn copy_out(&self, place: usize, data: &mut [u8]) -> Result<()> {
        ensure!(data.len() <= self.layout.place_bytes, "too long for a place");
        Ok(self.memory.copy_out(self.layout.data(place), data)?)
    }
}
