//! What the control side hands over when a guest connects, what a shard checks of it, and what travels with the disk in a move.

use std::sync::Arc;

use ring_bridge::blkif::request::Limits;
use ring_bridge::blkif::wire::{Abi, INDIRECT_SEGMENTS_MAX, RING_PAGES_MAX, SECTOR_BYTES, entries};
use ring_bridge::grants::budget::Budget;
use ring_bridge::grants::memfd::{Channel, ClientMemory};
use ring_bridge::grants::{Domid, Gref, Port};
use ring_bridge::memory::SharedRegion;

use super::GuestCounters;
use crate::api::{Backend, DiskConfig};

/// Queues of one device at most.
pub const QUEUES_MAX: usize = 8;

/// How a guest's pages and events are reached.
#[derive(Debug)]
pub enum Transport {
    /// The hypervisor's grants and event channels.
    Xen,
    /// A client that shares memory: a gref is a page of it, a port the number of a channel.
    Shared {
        /// Its memory.
        memory: ClientMemory,
        /// Our ends of its channels.
        channels: Vec<Arc<Channel>>,
    },
}

impl Transport {
    /// Which kind it is.
    pub fn realm(&self) -> Realm {
        match self {
            Transport::Xen => Realm::Xen,
            Transport::Shared { .. } => Realm::Shared,
        }
    }
}

/// The two kinds of [`Transport`]. Domains of one kind have nothing to do with equal numbers of the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Realm {
    /// Domains of the hypervisor.
    Xen = 0,
    /// Clients that share memory.
    Shared = 1,
}

impl Realm {
    /// Both, in the order of their numbers.
    pub const ALL: [Realm; 2] = [Realm::Xen, Realm::Shared];
}

/// What the control side is willing to offer; the shard takes back what the disk cannot keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Flushes.
    pub flush: bool,
    /// Write barriers.
    pub barrier: bool,
    /// Discards.
    pub discard: bool,
    /// Discards that overwrite with zeroes. On raw disks and RAM disks only: images of a format may hold older copies. What the store does below
    /// (copies of a file system, spare cells of flash) is the operator's to know.
    pub secure_discard: bool,
    /// Segments of indirect requests; 0: none are offered. Also the room in the tables of requests in flight.
    pub indirect_segments_max: u16,
    /// Logical block, bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Refuse what changes data, whatever the disk allows.
    pub read_only: bool,
}

impl Offer {
    /// What the engine is to hold guests to, with this disk as it is now.
    pub fn limits(&self, disk: &DiskConfig) -> Limits {
        let read_only = self.read_only || disk.read_only;
        let block = u64::from(self.block_bytes);
        let overwrites = matches!(disk.backend, Backend::File(_) | Backend::Ram(_) | Backend::Null);
        Limits {
            sectors: disk.size_bytes / block * (block / SECTOR_BYTES),
            block_bytes: self.block_bytes,
            read_only,
            flush: self.flush,
            barrier: self.barrier,
            discard: self.discard && !read_only,
            secure_discard: self.discard && self.secure_discard && !read_only && overwrites,
            indirect_segments_max: self.indirect_segments_max,
        }
    }
}

/// One queue of a device.
#[derive(Debug)]
pub struct QueueConnect {
    /// Pages of its ring, in order.
    pub grefs: Vec<Gref>,
    /// The guest's event channel port.
    pub port: Port,
    /// Memory of its table of requests in flight, at least [`ring_bridge::blkif::inflight::table_bytes`]: a file that outlives the process,
    /// fallocated and mapped by the control side, which also removes it after a disconnect.
    pub table: SharedRegion,
}

/// A guest that wants to use a disk: its keys, copied and checked for their form by the control side, and not trusted.
#[derive(Debug)]
pub struct GuestConnect {
    /// Its domain.
    pub domid: Domid,
    /// The device's number in XenStore.
    pub devid: u32,
    /// Who it is, for lists; `None`: its domain and device say it.
    pub peer: Option<Arc<str>>,
    /// Layout of its rings.
    pub abi: Abi,
    /// How it is reached.
    pub transport: Transport,
    /// Its pages came from `ring-ref0` and so on (`ring-page-order` is there), not from `ring-ref`: for messages.
    pub numbered: bool,
    /// Its queues: 1 to [`QUEUES_MAX`].
    pub queues: Vec<QueueConnect>,
    /// It has `feature-persistent` and was offered it: its pages are kept mapped under this budget of the host.
    pub persistent: Option<Arc<Budget>>,
    /// What is offered.
    pub offer: Offer,
    /// The tables are those of a dead process, and none of its I/O can land any more: what they hold is answered. Else they are
    /// made anew.
    pub recover: bool,
    /// Its counters.
    pub counters: Arc<GuestCounters>,
}

/// What is in use after a connect: for the keys that are published to the guest, and for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestInUse {
    /// What is offered.
    pub limits: Limits,
    /// Entries of each ring.
    pub entries: Vec<u32>,
    /// Its pages are kept mapped while the budget lasts.
    pub persistent: bool,
    /// Requests of a dead process that were begun again.
    pub begun_again: usize,
}

/// Name of a queue's key.
fn key(queues: usize, queue: usize, name: &str) -> String {
    if queues > 1 { format!("queue-{queue}/{name}") } else { name.to_owned() }
}

impl GuestConnect {
    /// The guest's name of a ring page, and its number.
    pub(crate) fn page_key(&self, queues: usize, queue: usize, page: usize) -> String {
        let name = if self.numbered { format!("ring-ref{page}") } else { "ring-ref".to_owned() };
        key(queues, queue, &name)
    }

    /// The guest's name of a port.
    pub(crate) fn port_key(&self, queues: usize, queue: usize) -> String {
        key(queues, queue, "event-channel")
    }

    /// Looks at what needs no kernel.
    ///
    /// # Errors
    /// The key and the number at fault.
    pub(crate) fn check(&self) -> Result<(), String> {
        let count = self.queues.len();
        if count == 0 || count > QUEUES_MAX {
            return Err(format!("multi-queue-num-queues is {count}: 1 to {QUEUES_MAX} queues are served"));
        }
        for queue in &self.queues {
            let pages = queue.grefs.len();
            if u32::try_from(pages).ok().and_then(entries).is_none() {
                return Err(format!(
                    "ring-page-order: a ring of {pages} pages is none; 1, 2, 4, 8 or {RING_PAGES_MAX} are served"
                ));
            }
        }
        let segments = self.offer.indirect_segments_max;
        if segments > INDIRECT_SEGMENTS_MAX {
            return Err(format!(
                "feature-max-indirect-segments is {segments}: at most {INDIRECT_SEGMENTS_MAX} can be offered"
            ));
        }
        let block = self.offer.block_bytes;
        if !block.is_power_of_two() || !(512..=4096).contains(&block) {
            return Err(format!("sector-size is {block}: 512 to 4096 bytes can be offered"));
        }
        Ok(())
    }
}

/// A guest between two shards. Its requests in flight are in the tables, from where the next shard begins them again: a disk is moved when
/// nothing of it runs, and what was not begun costs nothing to take once more.
#[derive(Debug)]
pub(crate) struct ParkedGuest {
    /// Its rings that are not broken.
    pub connect: GuestConnect,
    /// Numbers of these queues.
    pub numbers: Vec<u32>,
    /// The control side knows that a flush is held.
    pub flush_held: bool,
}
