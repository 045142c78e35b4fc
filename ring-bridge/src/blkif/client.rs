//! A client without Xen: one piece of memory for its rings and its data, the messages that hand them over, and its queues. For tests, benches
//! and programs that want a disk by blkif over the protocol of [`crate::grants::share`]. Nothing here waits.
//!
//! ```text
//! memory, for each queue:  ring (1..16 pages) │ place 0: segments (1 page), data │ place 1 │ …
//! ```
//! A request lives in a *place*, which the caller chooses: its pages are the same each time, as of a frontend with persistent grants.
//!
//! Invariant: a place has at most one request at a time.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::frontend::{self, Completion, Fault, Frontend};
use super::request::Status;
use super::wire::{Abi, PAGE_BYTES, SEGMENTS_MAX, SEGMENTS_PER_PAGE, WireSegment, operation};
use crate::grants::memfd::{ClientChannel, make_client_memory};
use crate::grants::share::{Kind, Message};
use crate::memory::{MemoryError, RingMemory, SharedRegion};

/// Sectors of a page.
const PAGE_SECTORS: usize = PAGE_BYTES / 512;

/// What a client is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Layout of its rings.
    pub abi: Abi,
    /// Its queues, 1 to 8.
    pub queues: usize,
    /// Pages of each ring: a power of two up to 16.
    pub ring_pages: u32,
    /// Places of each queue.
    pub places: usize,
    /// Pages of data of each place: segments of its largest request, up to 512. More than 11 need indirect requests.
    pub pages: usize,
    /// Offers that its pages stay mapped.
    pub persistent: bool,
}

/// A client's memory and its queues.
#[derive(Debug)]
pub struct Client {
    shape: Shape,
    file: OwnedFd,
    /// Its queues; they can be taken away, to use each on a thread of its own.
    pub queues: Vec<Queue>,
}

/// A client cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No memory, or no descriptors.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No ring has this shape.
    #[error(transparent)]
    Ring(#[from] Fault),
    /// Its numbers are none.
    #[error("no client is like {0:?}")]
    Shape(Shape),
}

impl Client {
    /// Makes its memory and its rings.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn new(shape: Shape) -> Result<Client, ClientError> {
        let Shape { abi, queues, ring_pages, places, pages, .. } = shape;
        if pages > SEGMENTS_PER_PAGE || queues == 0 || ring_pages == 0 {
            return Err(ClientError::Shape(shape));
        }
        let place_pages = 1 + pages;
        let queue_pages = ring_pages as usize + places * place_pages;
        let total = u32::try_from(queues * queue_pages).map_err(|_| ClientError::Shape(shape))?;
        let file = make_client_memory(total)?;
        let memory = Arc::new(SharedRegion::map(&file, total as usize * PAGE_BYTES)?);
        let make_queue = |number: usize| {
            let first = number * queue_pages;
            let (at, bytes) = (first * PAGE_BYTES, ring_pages as usize * PAGE_BYTES);
            let window = Window { region: memory.clone(), at, bytes };
            let frontend = Frontend::create(window, abi, ring_pages, 0)?;
            Ok(Queue {
                place_of: vec![0; frontend.entries() as usize].into(),
                frontend,
                memory: memory.clone(),
                first_page: first + ring_pages as usize,
                place_pages,
                completions: Vec::new(),
            })
        };
        let queues = (0..queues).map(make_queue).collect::<Result<_, Fault>>()?;
        Ok(Client { shape, file, queues })
    }

    /// The descriptor that goes with [`Client::open`].
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The first message.
    pub fn open(&self, disk: &str) -> Message {
        let keys = [("disk", disk.to_owned()), ("queues", self.shape.queues.to_string())];
        Message::new(Kind::Open, keys.map(|(key, value)| (key.to_owned(), value)))
    }

    /// The message that answers the offer.
    pub fn connect(&self) -> Message {
        let Shape { abi, queues, ring_pages, places, persistent, .. } = self.shape;
        let mut keys = BTreeMap::new();
        let mut put = |key: String, value: String| keys.insert(key, value);
        let protocol = if abi == Abi::X86_32 { "x86_32-abi" } else { "x86_64-abi" };
        put("protocol".into(), protocol.into());
        put("feature-persistent".into(), u32::from(persistent).to_string());
        put("ring-page-order".into(), ring_pages.ilog2().to_string());
        if queues > 1 {
            put("multi-queue-num-queues".into(), queues.to_string());
        }
        let queue_pages = ring_pages as usize + places * (1 + self.shape.pages);
        for queue in 0..queues {
            let prefix = if queues > 1 { format!("queue-{queue}/") } else { String::new() };
            for page in 0..ring_pages as usize {
                put(format!("{prefix}ring-ref{page}"), (queue * queue_pages + page).to_string());
            }
            put(format!("{prefix}event-channel"), queue.to_string());
        }
        Message::new(Kind::Connect, keys)
    }
}

/// A part of a client's memory.
#[derive(Debug, Clone)]
pub struct Window {
    region: Arc<SharedRegion>,
    at: usize,
    bytes: usize,
}

impl Window {
    fn place(&self, offset: usize, len: usize) -> Result<usize, MemoryError> {
        let end = offset.checked_add(len).filter(|&end| end <= self.bytes);
        end.ok_or(MemoryError::OutOfBounds { offset, len, region_len: self.bytes })?;
        Ok(self.at + offset)
    }
}

impl RingMemory for Window {
    fn len(&self) -> usize {
        self.bytes
    }

    fn load(&self, offset: usize) -> Result<u32, MemoryError> {
        self.region.load(self.place(offset, 4)?)
    }

    fn store(&self, offset: usize, value: u32) -> Result<(), MemoryError> {
        self.region.store(self.place(offset, 4)?, value)
    }

    fn copy_out(&self, offset: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.region.copy_out(self.place(offset, dst.len())?, dst)
    }

    fn copy_in(&self, offset: usize, src: &[u8]) -> Result<(), MemoryError> {
        self.region.copy_in(self.place(offset, src.len())?, src)
    }
}

/// One queue: its ring and its places.
#[derive(Debug)]
pub struct Queue {
    /// The ring, for requests that are not made here.
    pub frontend: Frontend<Window>,
    memory: Arc<SharedRegion>,
    first_page: usize,
    place_pages: usize,
    /// Place of each request that is pending.
    place_of: Box<[usize]>,
    completions: Vec<Completion>,
}

impl Queue {
    fn page(&self, place: usize, page: usize) -> usize {
        self.first_page + place * self.place_pages + page
    }

    /// Where a place's data begin in the client's memory.
    fn data_at(&self, place: usize) -> usize {
        self.page(place, 1) * PAGE_BYTES
    }

    /// Writes a read or write of whole sectors to the ring, with the data at the start of the place; false when the ring is full.
    ///
    /// # Errors
    /// [`Fault::Memory`], also when the place has less room.
    pub fn submit(&mut self, write: bool, sector: u64, bytes: usize, place: usize) -> Result<bool, Fault> {
        let region_len = (self.place_pages - 1) * PAGE_BYTES;
        if bytes > region_len {
            return Err(MemoryError::OutOfBounds { offset: 0, len: bytes, region_len }.into());
        }
        let count = bytes.div_ceil(PAGE_BYTES);
        let segment = |index: usize| {
            let sectors = (bytes / 512 - index * PAGE_SECTORS).min(PAGE_SECTORS);
            WireSegment { gref: self.page(place, 1 + index) as u32, first: 0, last: sectors as u8 - 1 }
        };
        let index = if count <= SEGMENTS_MAX {
            let mut segments = [WireSegment { gref: 0, first: 0, last: 0 }; SEGMENTS_MAX];
            segments[..count].iter_mut().enumerate().for_each(|(index, place)| *place = segment(index));
            let segments = &segments[..count];
            let op = if write { operation::WRITE } else { operation::READ };
            self.frontend.submit(frontend::direct(op, sector, segments), segments)?
        } else {
            let segments: Vec<WireSegment> = (0..count).map(segment).collect();
            let page = self.page(place, 0);
            self.memory.copy_in(page * PAGE_BYTES, &frontend::pack(&segments))?;
            let message = frontend::indirect(write, sector, count as u16, &[page as u32]);
            self.frontend.submit(message, &[])?
        };
        Ok(self.note(index, place))
    }

    /// Writes a flush to the ring; false when it is full.
    ///
    /// # Errors
    /// [`Fault::Memory`].
    pub fn submit_flush(&mut self, place: usize) -> Result<bool, Fault> {
        let index = self.frontend.submit(frontend::flush(0, &[]), &[])?;
        Ok(self.note(index, place))
    }

    fn note(&mut self, index: Option<u16>, place: usize) -> bool {
        if let Some(index) = index {
            self.place_of[usize::from(index)] = place;
        }
        index.is_some()
    }

    /// Shows the backend what was submitted; it is notified if it wants that.
    ///
    /// # Errors
    /// [`Fault::Memory`].
    pub fn publish(&mut self, channel: &ClientChannel) -> Result<(), Fault> {
        if self.frontend.publish()? {
            kick(channel);
        }
        Ok(())
    }

    /// Takes the responses that have come: place and status of each.
    ///
    /// # Errors
    /// What the backend did wrong.
    pub fn poll(&mut self, mut done: impl FnMut(usize, Status)) -> Result<(), Fault> {
        self.frontend.poll(&mut self.completions)?;
        for completion in self.completions.drain(..) {
            done(self.place_of[usize::from(completion.index)], completion.status);
        }
        Ok(())
    }

    /// Copies a place's data from `offset` on.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn copy_out(&self, place: usize, offset: usize, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.copy_out(self.data_at(place) + offset, dst)
    }

    /// Copies to a place's data from `offset` on.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn copy_in(&self, place: usize, offset: usize, src: &[u8]) -> Result<(), MemoryError> {
        self.memory.copy_in(self.data_at(place) + offset, src)
    }
}

/// Notifies the backend.
pub fn kick(channel: &ClientChannel) {
    // An eventfd refuses a 1 only when its counter is full, and then it is readable already.
    let _ = nix::unistd::write(&channel.kick, &1u64.to_ne_bytes());
}
