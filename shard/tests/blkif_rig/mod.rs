//! What the tests of guests share: real shards, and guests without Xen, whose memory is a memfd and whose frontend is the library's.
#![allow(dead_code)] // each test file uses a part

pub mod load;

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use nix::sys::memfd::{MFdFlags, memfd_create};
use ring_bridge::blkif::frontend::{self, Completion, Frontend};
use ring_bridge::blkif::inflight::table_bytes;
use ring_bridge::blkif::request::Status;
use ring_bridge::blkif::wire::{Abi, Message, PAGE_BYTES, WireSegment, entries, operation};
use ring_bridge::grants::budget::Budget;
use ring_bridge::grants::memfd::{
    CLIENT_BYTES_DEFAULT, Channel, ClientChannel, ClientMemory, channel, make_client_memory,
};
use ring_bridge::memory::{MemoryError, RingMemory, SharedRegion};
use shard::api::{
    Backend, CacheMode, Command, DiskConfig, DiskId, Envelope, ErrorPolicy, Event, FileKind, ImageFile,
    Reply, ShardError, ShardErrorKind,
};
use shard::blkif::{GuestConnect, GuestCounters, GuestInUse, Offer, QueueConnect, Transport};
use shard::executor::{
    EventReceiver, EventSender, RingFlavour, ShardHandle, ShardOptions, event_channel, start,
};
use shard::limits::Limits;
use shard::ram::{PageSize, RamBudget, RamDisk, anonymous_backing};

/// Nothing in these tests takes longer unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until something is true.
#[track_caller]
pub fn wait_until(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Shards and the control side.
pub struct Rig {
    pub shards: Vec<ShardHandle>,
    events: EventReceiver,
    _sender: EventSender,
    next_tag: RefCell<u64>,
    replies: RefCell<HashMap<u64, Result<Reply, ShardError>>>,
    /// What shards said by themselves.
    pub news: RefCell<Vec<Event>>,
}

impl Rig {
    pub fn new(shards: usize) -> Rig {
        Rig::with_budget(shards, 32 << 20)
    }

    pub fn with_budget(shards: usize, buffer_budget_bytes: usize) -> Rig {
        let (sender, events) = event_channel().expect("eventfd");
        let start_one = |index| {
            let options = ShardOptions {
                index,
                cpu: None,
                ring: RingFlavour::Deferred,
                buffer_budget_bytes,
                table_budget_bytes: 1 << 20,
                fault_commands: true,
            };
            start(options, sender.clone()).expect("a shard")
        };
        let shards = (0..shards).map(start_one).collect();
        Rig {
            shards,
            events,
            _sender: sender,
            next_tag: RefCell::new(1),
            replies: RefCell::default(),
            news: RefCell::default(),
        }
    }

    /// Sends a command; its tag.
    pub fn send(&self, shard: usize, command: Command) -> u64 {
        let tag = self.next_tag.replace_with(|tag| *tag + 1);
        self.shards[shard].send(Envelope { tag, command });
        tag
    }

    fn hear(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok((_, event)) = self.events.rx.recv_timeout(left) else { return false };
        match event {
            Event::Reply { tag, result } => {
                self.replies.borrow_mut().insert(tag, result);
            }
            other => self.news.borrow_mut().push(other),
        }
        true
    }

    /// The reply to a command.
    pub fn answer(&self, tag: u64) -> Result<Reply, ShardError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(result) = self.replies.borrow_mut().remove(&tag) {
                return result;
            }
            assert!(self.hear(deadline), "no reply to command {tag}; news: {:?}", self.news.borrow());
        }
    }

    /// The reply, if it comes soon.
    pub fn answer_within(&self, tag: u64, time: Duration) -> Option<Result<Reply, ShardError>> {
        let deadline = Instant::now() + time;
        loop {
            if let Some(result) = self.replies.borrow_mut().remove(&tag) {
                return Some(result);
            }
            if !self.hear(deadline) {
                return None;
            }
        }
    }

    pub fn call(&self, shard: usize, command: Command) -> Result<Reply, ShardError> {
        self.answer(self.send(shard, command))
    }

    /// Waits until a shard has said something.
    pub fn wait_news(&self, what: &str, mut is_it: impl FnMut(&Event) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if self.news.borrow().iter().any(&mut is_it) {
                return;
            }
            assert!(self.hear(deadline), "never heard: {what}; but {:?}", self.news.borrow());
        }
    }

    pub fn add(&self, shard: usize, id: u64, backend: Backend, size_bytes: u64) -> DiskId {
        self.add_as(shard, id, backend, size_bytes, ErrorPolicy::Pause)
    }

    pub fn add_as(
        &self,
        shard: usize,
        id: u64,
        backend: Backend,
        size_bytes: u64,
        policy: ErrorPolicy,
    ) -> DiskId {
        let config = Box::new(DiskConfig {
            id: DiskId(id),
            name: format!("disk-{id}").into(),
            backend,
            size_bytes,
            read_only: false,
            on_error: policy,
            on_enospc: policy,
            limits: Limits::default(),
            groups: Vec::new(),
            counters: Arc::default(),
        });
        let reply = self.call(shard, Command::AddDisk(config));
        assert!(matches!(reply, Ok(Reply::Done)), "{reply:?}");
        DiskId(id)
    }

    pub fn connect(&self, shard: usize, disk: DiskId, guest: GuestConnect) -> Result<GuestInUse, ShardError> {
        match self.call(shard, Command::ConnectGuest { disk, guest: Box::new(guest) })? {
            Reply::GuestConnected(in_use) => Ok(*in_use),
            other => panic!("{other:?}"),
        }
    }

    /// Connects when the disk is free: its store may still work for requests of a guest that was dropped by force.
    pub fn connect_in_turn(&self, shard: usize, disk: DiskId, guest: &Guest) {
        wait_until("the disk is free", || match self.connect(shard, disk, guest.connect()) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.kind, ShardErrorKind::WrongState, "{error}");
                false
            }
        });
    }

    pub fn disconnect(&self, shard: usize, disk: DiskId, guest: &Guest) {
        let Guest { domid, devid, .. } = *guest;
        let reply = self.call(shard, Command::DisconnectGuest { disk, domid, devid, force: false });
        assert!(matches!(reply, Ok(Reply::Done)), "{reply:?}");
    }

    pub fn remove(&self, shard: usize, disk: DiskId) {
        let reply = self.call(shard, Command::RemoveDisk { disk, force: false });
        assert!(matches!(reply, Ok(Reply::Removed(_))), "{reply:?}");
    }

    pub fn move_disk(&self, disk: DiskId, from: usize, to: usize) {
        let reply = self.call(from, Command::Park { disk });
        let Ok(Reply::Parked(parked)) = reply else { panic!("{reply:?}") };
        let reply = self.call(to, Command::Unpark(parked));
        assert!(matches!(reply, Ok(Reply::Done)), "{reply:?}");
    }

    /// What a shard holds of guests that share memory.
    pub fn grants(&self, shard: usize) -> ring_bridge::grants::Counts {
        let grants = self.shards[shard].counters.grants.get(shard::blkif::Realm::Shared);
        grants.map(|accounts| accounts.counts()).unwrap_or_default()
    }

    /// Ends the shards.
    pub fn stop(mut self) {
        for shard in std::mem::take(&mut self.shards) {
            let tag = self.next_tag.replace_with(|tag| *tag + 1);
            // One that a test has killed does not hear it.
            shard.send(Envelope { tag, command: Command::Stop });
            shard.join();
        }
    }
}

/// A RAM disk.
pub fn ram(size_bytes: u64) -> Backend {
    let file = anonymous_backing("blkif", size_bytes, PageSize::Base).expect("memfd");
    let budget = Arc::new(RamBudget::new(1 << 30));
    Backend::Ram(RamDisk::create(file, "blkif", size_bytes, PageSize::Base, budget).expect("create"))
}

/// A raw disk over a descriptor.
pub fn image(fd: OwnedFd, length: u64, cache: CacheMode) -> Backend {
    let align = if cache == CacheMode::None { 4096 } else { 1 };
    Backend::File(Arc::new(ImageFile {
        fd,
        tail: None,
        offset_align: align,
        memory_align: align,
        cache,
        kind: FileKind::Regular,
        length,
        length_now: AtomicU64::new(length),
        punts: false,
        store: 1,
    }))
}

/// A raw disk in a file that goes with the test; past the page cache where the file system can.
pub fn file(size_bytes: u64) -> Backend {
    use std::os::unix::fs::OpenOptionsExt;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    std::fs::File::create(&path).and_then(|file| file.set_len(size_bytes)).expect("a file");
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true);
    match options.clone().custom_flags(libc::O_DIRECT).open(&path) {
        Ok(file) => image(file.into(), size_bytes, CacheMode::None),
        Err(_) => image(options.open(&path).expect("open").into(), size_bytes, CacheMode::Writeback),
    }
}

/// What a guest is like.
#[derive(Debug, Clone)]
pub struct Kind {
    pub abi: Abi,
    pub queues: usize,
    pub ring_pages: u32,
    /// Segments of its largest request.
    pub segments: usize,
    /// Requests at a time, for which there are pages.
    pub depth: usize,
    pub persistent: Option<Arc<Budget>>,
    pub block_bytes: u32,
}

impl Default for Kind {
    fn default() -> Kind {
        Kind {
            abi: Abi::X86_64,
            queues: 1,
            ring_pages: 1,
            segments: 11,
            depth: 32,
            persistent: None,
            block_bytes: 512,
        }
    }
}

pub const OFFER: Offer = Offer {
    flush: true,
    barrier: true,
    discard: true,
    secure_discard: true,
    indirect_segments_max: 256,
    block_bytes: 512,
    read_only: false,
};

/// A guest: its device's keys and its queues.
pub struct Guest {
    pub domid: u16,
    pub devid: u32,
    pub queues: Vec<Queue>,
    pub counters: Arc<GuestCounters>,
    pub memory: Arc<SharedRegion>,
    /// Ends of channels that have not been handed over.
    pub ends: Vec<Arc<Channel>>,
    file: OwnedFd,
    /// Files of its tables of requests in flight.
    tables: Vec<OwnedFd>,
    pub kind: Kind,
}

/// A part of a guest's memory.
#[derive(Debug, Clone)]
pub struct Window {
    pub region: Arc<SharedRegion>,
    pub at: usize,
    pub bytes: usize,
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

impl Guest {
    pub fn new(domid: u16, kind: Kind) -> Guest {
        // For each queue: the ring, then for each place a page of segments and the pages of data.
        let place_pages = 1 + kind.segments;
        let queue_pages = kind.ring_pages as usize + kind.depth * place_pages;
        let pages = kind.queues * queue_pages;
        let file = make_client_memory(pages as u32).expect("memory");
        let memory = Arc::new(SharedRegion::map(&file, pages * PAGE_BYTES).expect("map"));
        let (mut queues, mut ends) = (Vec::new(), Vec::new());
        for number in 0..kind.queues {
            let (ours, theirs) = channel().expect("a channel");
            ends.push(Arc::new(ours));
            let first = number * queue_pages;
            let window = Window {
                region: memory.clone(),
                at: first * PAGE_BYTES,
                bytes: kind.ring_pages as usize * PAGE_BYTES,
            };
            // Indices that wrap around soon.
            let frontend = Frontend::create(window, kind.abi, kind.ring_pages, u32::MAX - 40);
            queues.push(Queue {
                frontend: frontend.expect("a ring"),
                channel: Some(theirs),
                first_page: first + kind.ring_pages as usize,
                place_pages,
                free: (0..kind.depth).rev().collect(),
                places: HashMap::new(),
                completions: Vec::new(),
                memory: memory.clone(),
                notifies: 0,
                requests: 0,
            });
        }
        let tables = (0..kind.queues).map(|_| table(kind.ring_pages)).collect();
        Guest { domid, devid: 51712, queues, counters: Arc::default(), memory, ends, file, tables, kind }
    }

    /// What the control side would hand over.
    pub fn connect(&self) -> GuestConnect {
        let memory = self.file.try_clone().expect("dup");
        let memory = ClientMemory::admit(memory, CLIENT_BYTES_DEFAULT).expect("fit");
        let queue_pages = self.kind.ring_pages as usize + self.kind.depth * (1 + self.kind.segments);
        let queues = (0..self.kind.queues).map(|number| {
            let first = (number * queue_pages) as u32;
            QueueConnect {
                grefs: (first..first + self.kind.ring_pages).collect(),
                port: number as u32,
                table: map_all(&self.tables[number]),
            }
        });
        GuestConnect {
            domid: self.domid,
            devid: self.devid,
            peer: None,
            abi: self.kind.abi,
            transport: Transport::Shared { memory, channels: self.ends.clone() },
            numbered: self.kind.ring_pages > 1,
            queues: queues.collect(),
            persistent: self.kind.persistent.clone(),
            offer: Offer { block_bytes: self.kind.block_bytes, ..OFFER },
            recover: false,
            counters: self.counters.clone(),
        }
    }
}

/// A file for a table of requests in flight.
fn table(ring_pages: u32) -> OwnedFd {
    let bytes = table_bytes(entries(ring_pages).expect("pages"), OFFER.indirect_segments_max);
    let file = memfd_create(c"in-flight", MFdFlags::MFD_CLOEXEC).expect("memfd");
    nix::unistd::ftruncate(&file, bytes as i64).expect("size");
    file
}

fn map_all(file: &OwnedFd) -> SharedRegion {
    let bytes = nix::sys::stat::fstat(file).expect("stat").st_size as usize;
    SharedRegion::map(file, bytes).expect("map")
}

/// One queue of a guest.
pub struct Queue {
    pub frontend: Frontend<Window>,
    pub channel: Option<ClientChannel>,
    first_page: usize,
    place_pages: usize,
    free: Vec<usize>,
    /// Place of each request.
    places: HashMap<u16, usize>,
    pub completions: Vec<Completion>,
    memory: Arc<SharedRegion>,
    /// Notifications that we sent, and requests.
    pub notifies: u64,
    pub requests: u64,
}

impl Queue {
    fn page(&self, place: usize, page: usize) -> usize {
        self.first_page + place * self.place_pages + page
    }

    /// There is room for a request.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty() && self.frontend.free() > 0
    }

    /// Segments for bytes of a request: each page of data from a sector of its own.
    pub fn lay_out(&self, mut bytes: usize, mut first: impl FnMut(usize) -> u8) -> Vec<(u8, u8)> {
        let mut out = Vec::new();
        while bytes > 0 {
            let from = first(out.len());
            let sectors = (8 - usize::from(from)).min(bytes / 512);
            out.push((from, from + sectors as u8 - 1));
            bytes -= sectors * 512;
        }
        out
    }

    /// Submits a request with the data of `layout`; `data` goes into the guest's pages before. Returns its index.
    pub fn submit(&mut self, what: u8, sector: u64, layout: &[(u8, u8)], data: Option<&[u8]>) -> u16 {
        let place = self.free.pop().expect("room");
        let segments: Vec<WireSegment> = layout
            .iter()
            .enumerate()
            .map(|(i, &(first, last))| WireSegment { gref: self.page(place, 1 + i) as u32, first, last })
            .collect();
        if let Some(data) = data {
            self.put(&segments, data);
        }
        let message = if segments.len() > 11 {
            let bytes = frontend::pack(&segments);
            let page = self.page(place, 0);
            self.memory.copy_in(page * PAGE_BYTES, &bytes).expect("inside");
            frontend::indirect(what == operation::WRITE, sector, segments.len() as u16, &[page as u32])
        } else {
            frontend::direct(what, sector, &segments)
        };
        let index = self.frontend.submit(message, &segments).expect("memory").expect("room");
        self.places.insert(index, place);
        self.requests += 1;
        index
    }

    /// Submits any request.
    pub fn submit_message(&mut self, message: Message, segments: &[WireSegment]) -> u16 {
        let place = self.free.pop().expect("room");
        let index = self.frontend.submit(message, segments).expect("memory").expect("room");
        self.places.insert(index, place);
        self.requests += 1;
        index
    }

    fn put(&self, segments: &[WireSegment], data: &[u8]) {
        let mut at = 0;
        for segment in segments {
            let len = usize::from(segment.last - segment.first + 1) * 512;
            let to = segment.gref as usize * PAGE_BYTES + usize::from(segment.first) * 512;
            self.memory.copy_in(to, &data[at..at + len]).expect("inside");
            at += len;
        }
    }

    /// The data of a request in the guest's pages.
    pub fn data(&self, index: u16, layout: &[(u8, u8)]) -> Vec<u8> {
        let place = self.places[&index];
        let mut data = Vec::new();
        for (i, &(first, last)) in layout.iter().enumerate() {
            let at = data.len();
            data.resize(at + usize::from(last - first + 1) * 512, 0);
            let from = self.page(place, 1 + i) * PAGE_BYTES + usize::from(first) * 512;
            self.memory.copy_out(from, &mut data[at..]).expect("inside");
        }
        data
    }

    /// Gives the pages of a completed request back.
    pub fn release(&mut self, index: u16) {
        let place = self.places.remove(&index).expect("a request");
        self.free.push(place);
    }

    /// Publishes what was submitted.
    pub fn publish(&mut self) {
        if self.frontend.publish().expect("memory") {
            self.kick();
        }
    }

    /// Notifies the backend.
    pub fn kick(&mut self) {
        self.notifies += 1;
        let channel = self.channel.as_ref().expect("connected");
        nix::unistd::write(&channel.kick, &1u64.to_ne_bytes()).expect("a kick");
    }

    /// The same, for those who do not count.
    pub fn kick_once(&self) {
        let channel = self.channel.as_ref().expect("connected");
        nix::unistd::write(&channel.kick, &1u64.to_ne_bytes()).expect("a kick");
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<SharedRegion> {
        &self.memory
    }

    /// Pages of it that are this queue's and not of its ring.
    pub fn memory_pages(&self) -> std::ops::Range<usize> {
        self.first_page..self.first_page + self.place_pages * 8
    }

    /// Waits for a notification; false when none comes in that time.
    pub fn wait_call(&self, time: Duration) -> bool {
        let channel = self.channel.as_ref().expect("connected");
        let mut fds = [PollFd::new(channel.call.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(time).expect("short");
        if poll(&mut fds, timeout).unwrap_or(0) == 0 {
            return false;
        }
        let set = Epoll(channel.call.try_clone().expect("dup"));
        set.wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO).expect("epoll");
        true
    }

    /// Waits for at least one completion. `false` after `time`.
    pub fn wait_within(&mut self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        loop {
            let before = self.completions.len();
            self.frontend.poll(&mut self.completions).expect("an honest backend");
            if self.completions.len() > before {
                return true;
            }
            if self.frontend.sleep(1).expect("memory") {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.wait_call(left) {
                return false;
            }
        }
    }

    /// Waits for at least one completion.
    pub fn wait(&mut self) {
        assert!(self.wait_within(PATIENCE), "no answer; {} are pending", self.frontend.pending());
    }

    /// Does one request and waits for it: its status, and the data of a read.
    pub fn run(&mut self, what: u8, sector: u64, bytes: usize, data: Option<&[u8]>) -> (Status, Vec<u8>) {
        let layout = self.lay_out(bytes, |_| 0);
        let index = self.submit(what, sector, &layout, data);
        self.publish();
        let status = self.status_of(index);
        let data = self.data(index, &layout);
        self.release(index);
        (status, data)
    }

    /// The same with any message.
    pub fn run_message(&mut self, message: Message) -> Status {
        let index = self.submit_message(message, &[]);
        self.publish();
        let status = self.status_of(index);
        self.release(index);
        status
    }

    /// Waits for one request.
    pub fn status_of(&mut self, index: u16) -> Status {
        loop {
            if let Some(at) = self.completions.iter().position(|done| done.index == index) {
                return self.completions.swap_remove(at).status;
            }
            self.wait();
        }
    }
}

pub const READ: u8 = operation::READ;
pub const WRITE: u8 = operation::WRITE;
pub const FLUSH: u8 = operation::FLUSH_DISKCACHE;
pub const BARRIER: u8 = operation::WRITE_BARRIER;
