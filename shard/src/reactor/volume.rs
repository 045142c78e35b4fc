//! Disks that are images of a format: a [`Volume`] on this shard, its files, and the futures of requests that cannot be answered
//! from memory.
//!
//! ```text
//! disk.start ─▶ Action::Volume ─▶ map (memory) ─ all known ─▶ pieces: requests of the files' own disks ─▶ on_volume ─▶ answer
//!                                      └ no ─▶ a future ─▶ port ─▶ requests of the files' own disks ─▶ port ─▶ … ─┘
//! ```
//! Every file of the image is a raw disk of its own, hidden (`Entry::owner`): alignment, read-modify-write, group commit, space
//! and the bounds of the store work there as for any raw disk, for payload and metadata alike. The operations of a volume's files
//! count as operations of the volume's disk, so that it comes to rest only when they have ended.
//!
//! A panic in a driver quarantines its disk: the volume and its futures are dropped, operations that are out keep their memory (it
//! is the reactor's), and when they have ended the image is opened anew, which is what a restart after a crash does.

use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use formats::allocation_log::{AllocationLog, replay};
use formats::driver::{Erase, Open};
use formats::error::Error;
use formats::file::Buf as Bytes;
use formats::metadata::Budget;
use formats::volume::{Layer, Piece, Source, Volume};

use super::*;
use crate::alog::{Log, LogFile};
use crate::api::{DiskConfig, ErrorPolicy, FileKind, ImageChain, Reply, ShardError, ShardErrorKind};
use crate::disk::Mem;
use crate::image::{Job, Port, ShardFile, ShardPayload, TaskWaker, Work};
use crate::limits::Limits;
use crate::request::{Kind, PIECE, Via};
use crate::storage::side::Extent;

/// Pieces of one request that go the fast way; more are the work of a future.
const PIECES_MAX: usize = 32;
/// Mappings that only memory and log have are written back after this time, also when no guest flushes…
const TIDY_AFTER: Nanos = 100 * MILLISECOND;
/// …or when there are so many: early enough that nobody waits for room in the log.
const TIDY_MANY: u64 = crate::alog::ENTRIES as u64 / 4;
/// The time after which it is tried again when that has failed.
const TIDY_AGAIN: Nanos = SECOND;

type Task = std::pin::Pin<Box<dyn Future<Output = Result<Outcome, Error>>>>;

/// What a future comes to.
enum Outcome {
    /// It is done.
    Done,
    /// The volume is open.
    Open(Rc<Volume>),
    /// Data and holes.
    Extents(Vec<Extent>),
}

/// Whom a future works for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum For {
    /// A request of the disk.
    Request(ReqKey),
    /// The image is being opened.
    Open,
    /// The image is being closed.
    Close,
    /// Pending mappings are written back.
    Tidy,
    /// An offline tool.
    Tool,
}

struct Running {
    whom: For,
    future: Task,
    waker: Waker,
}

/// How far the image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Being opened; the command to answer.
    Opening { tag: Option<u64> },
    /// In use.
    Open,
    /// Being closed.
    Closing,
    /// Closed: everything is in the files.
    Closed,
}

/// The volume of a disk.
pub(super) struct Engine {
    pub stage: Stage,
    volume: Option<Rc<Volume>>,
    port: Rc<Port>,
    files: Rc<Vec<Vec<Rc<ShardFile>>>>,
    /// Slots of the files' disks.
    slots: Vec<u32>,
    tasks: slab::Slab<Running>,
    ready: Arc<Mutex<Vec<usize>>>,
    /// A future that writes pending mappings back is at work.
    tidying: bool,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("stage", &self.stage).field("tasks", &self.tasks.len()).finish()
    }
}

impl Engine {
    fn new(stage: Stage, port: Rc<Port>, files: Rc<Vec<Vec<Rc<ShardFile>>>>, slots: Vec<u32>) -> Engine {
        Engine {
            stage,
            volume: None,
            port,
            files,
            slots,
            tasks: slab::Slab::new(),
            ready: Arc::default(),
            tidying: false,
        }
    }

    fn spawn(&mut self, whom: For, future: Task) {
        let entry = self.tasks.vacant_entry();
        let task = entry.key();
        let waker = Waker::from(Arc::new(TaskWaker { ready: self.ready.clone(), task }));
        entry.insert(Running { whom, future, waker });
        self.lock_ready().push(task);
    }

    fn lock_ready(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the volume and everything that works on it.
    fn drop_volume(&mut self) {
        // Futures first: they hold guards and plans of the volume.
        self.tasks.clear();
        self.volume = None;
        self.lock_ready().clear();
        self.tidying = false;
    }
}

/// Runs code of a driver; a panic is the disk's.
fn guarded<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    std::panic::catch_unwind(AssertUnwindSafe(run)).map_err(|panic| panic_message(panic.as_ref()))
}

impl<K: Kernel> Shard<K> {
    /// Begins the work of an offline tool on files: its one future runs until [`Shard::tool_runs`] says no.
    pub(crate) fn start_tool(
        &mut self,
        files: &[crate::offline::OfflineFile],
        work: impl FnOnce(
            Vec<Rc<dyn formats::file::ImageFile>>,
            Rc<Budget>,
        ) -> formats::file::Pending<'static, ()>,
    ) {
        let config = Box::new(DiskConfig {
            id: DiskId(0),
            name: "tool".into(),
            backend: Backend::Null,
            size_bytes: 0,
            read_only: true,
            on_error: ErrorPolicy::Report,
            on_enospc: ErrorPolicy::Report,
            limits: Limits::default(),
            groups: Vec::new(),
            counters: Arc::default(),
        });
        let slot = self.insert_entry(config, None);
        let port = Rc::new(Port::default());
        let (mut slots, mut opened) = (Vec::new(), Vec::new());
        for file in files {
            let file = self.insert_file(slot, &port, &file.image, &file.name, (file.writable, false));
            slots.push(file.slot);
            opened.push(Rc::new(file) as Rc<dyn formats::file::ImageFile>);
        }
        let mut engine = Engine::new(Stage::Closed, port, Rc::default(), slots);
        let budget = self.budget.clone();
        let work = work(opened, budget);
        engine.spawn(For::Tool, Box::pin(async move { work.await.map(|()| Outcome::Done) }));
        self.disks[slot as usize].engine = Some(Box::new(engine));
        self.awake.push(slot);
        self.run_actions();
    }

    /// A tool's future, or I/O that it asked for, is still under way.
    pub(crate) fn tool_runs(&self) -> bool {
        self.disks.iter().any(|(_, entry)| {
            entry.ops > 0 || entry.engine.as_ref().is_some_and(|engine| !engine.tasks.is_empty())
        })
    }

    /// The hidden disk of a file of the disk `owner`.
    fn insert_file(
        &mut self,
        owner: u32,
        port: &Rc<Port>,
        image: &Arc<crate::api::ImageFile>,
        name: &Arc<str>,
        (writable, flush): (bool, bool),
    ) -> ShardFile {
        let config = Box::new(DiskConfig {
            id: DiskId(u64::MAX),
            name: name.clone(),
            backend: Backend::File(image.clone()),
            size_bytes: formats::raw::SIZE_MAX_BYTES,
            read_only: !writable && !flush,
            // The disk of the volume decides what a failure means.
            on_error: ErrorPolicy::Report,
            on_enospc: ErrorPolicy::Report,
            limits: Limits::default(),
            groups: Vec::new(),
            counters: Arc::default(),
        });
        ShardFile {
            port: port.clone(),
            slot: self.insert_entry(config, Some(owner)),
            name: name.clone(),
            image: image.clone(),
            device: matches!(image.kind, FileKind::Block { .. }),
            writable,
            memory_align: image.memory_align.max(1),
        }
    }

    /// Makes the hidden disks of an image's files and begins to open it. `tag` is answered when that has ended.
    pub(super) fn start_engine(&mut self, slot: u32, chain: &ImageChain, tag: Option<u64>) {
        let port = Rc::new(Port::default());
        let (mut slots, mut files) = (Vec::new(), Vec::new());
        for layer in &chain.layers {
            let mut layer_files = Vec::new();
            for (file, name) in layer.files.iter().zip(&layer.names) {
                let file = self.insert_file(slot, &port, file, name, (layer.writable, layer.flush));
                slots.push(file.slot);
                layer_files.push(Rc::new(file));
            }
            files.push(layer_files);
        }
        let engine = Engine::new(Stage::Opening { tag }, port, Rc::new(files), slots);
        self.disks[slot as usize].engine = Some(Box::new(engine));
        self.open_engine(slot, chain, tag);
    }

    /// Begins to open an image whose files have their disks.
    fn open_engine(&mut self, slot: u32, chain: &ImageChain, tag: Option<u64>) {
        let budget = self.budget.clone();
        let Some(engine) = &mut self.disks[slot as usize].engine else { return };
        engine.stage = Stage::Opening { tag };
        let future = Box::pin(open(chain.clone(), engine.files.clone(), budget));
        engine.spawn(For::Open, future);
        self.hold_disk(slot, true);
        self.awake.push(slot);
    }

    /// Opens the image anew after its disk was rebuilt.
    pub(super) fn reopen_engine(&mut self, slot: u32) {
        if let Some(Backend::Image(chain)) = self.backend(slot).cloned() {
            self.open_engine(slot, &chain, None);
        }
    }

    fn hold_disk(&mut self, slot: u32, hold: bool) {
        self.with_disk(slot, |disk, ctx| disk.set_opening(ctx, hold));
    }

    /// After a panic: nothing of the volume goes on, except what the kernel has.
    pub(super) fn drop_volume(&mut self, slot: u32) {
        let Some(engine) = &mut self.disks[slot as usize].engine else { return };
        // Its destructors are code of the driver as well.
        if let Err(message) = guarded(|| engine.drop_volume()) {
            tracing::error!("a driver failed while its image was given up: {message}");
        }
        let port = engine.port.clone();
        for job in port.take() {
            port.answer(job.reply, Err(libc::EIO));
        }
    }

    /// Begins to close the image of a disk at rest. True when it is closed already, or there is none.
    pub(super) fn close_engine(&mut self, slot: u32) -> bool {
        let Some(engine) = &mut self.disks[slot as usize].engine else { return true };
        match (engine.stage, engine.volume.clone()) {
            (Stage::Closed, _) => return true,
            (Stage::Open, Some(volume)) => {
                engine.stage = Stage::Closing;
                let future = async move { volume.close().await.map(|()| Outcome::Done) };
                engine.spawn(For::Close, Box::pin(future));
                self.awake.push(slot);
            }
            _ => {}
        }
        false
    }

    /// Takes the hidden disks of a volume away. None of their operations is out.
    pub(super) fn remove_engine(&mut self, slot: u32) {
        let Some(mut engine) = self.disks[slot as usize].engine.take() else { return };
        if let Err(message) = guarded(|| engine.drop_volume()) {
            tracing::error!("a driver failed while its image was given up: {message}");
        }
        for file in engine.slots.drain(..) {
            self.disks.remove(file as usize);
        }
    }

    /// The hidden disks of a volume.
    pub(super) fn file_slots(&self, slot: u32) -> Vec<u32> {
        let engine = self.disks.get(slot as usize).and_then(|entry| entry.engine.as_ref());
        engine.map(|engine| engine.slots.clone()).unwrap_or_default()
    }

    /// Carries a request of a volume out: from memory if that will do, else by a future.
    pub(super) fn start_volume(&mut self, slot: u32, req: ReqKey) {
        let kind = self.requests[req].kind;
        let moves = matches!(kind, Kind::Read | Kind::Write { .. });
        if moves && self.address(slot, req, Mem::Payload(0)).is_none() {
            self.counters.buffer_waits.add(1);
            self.starved.push_back((slot, Action::Volume { req }));
            if self.disks[slot as usize].pending.is_some() && !self.feeding {
                self.unsettled.push(slot);
            }
            return;
        }
        let write_through = self.disks[slot as usize].disk.as_ref().is_some_and(Disk::writes_through);
        let fast = match kind {
            Kind::Read => true,
            Kind::Write { fua } => !fua && !write_through,
            _ => false,
        };
        if fast && self.try_fast(slot, req, kind != Kind::Read) {
            return;
        }
        let Some(entry) = self.disks.get_mut(slot as usize) else { return };
        let stage = entry.engine.as_ref().map_or(Stage::Closed, |engine| engine.stage);
        if matches!(stage, Stage::Opening { .. } | Stage::Closing) {
            // It was on its way when the image was closed; it runs when that is open again.
            return self.with_disk(slot, |disk, ctx| disk.unstart(ctx, req));
        }
        let open = entry.engine.as_mut().and_then(|engine| Some((engine.volume.clone()?, engine)));
        let Some((volume, engine)) = open else {
            return self.volume_done(slot, req, Err(Error::io("the image", "a request", libc::EIO)));
        };
        let (port, files) = (engine.port.clone(), engine.files.clone());
        let payload = ShardPayload { port, req, files };
        let request = &self.requests[req];
        let job =
            Asked { kind, offset: request.offset, len: request.len, durable: kind.fua() || write_through };
        engine.spawn(For::Request(req), Box::pin(run(volume, payload, job)));
        self.awake.push(slot);
    }

    /// Starts a read or write all of whose places are known. False when they are not.
    fn try_fast(&mut self, slot: u32, req: ReqKey, write: bool) -> bool {
        let (offset, len) = (self.requests[req].offset, self.requests[req].len);
        let Some(engine) = &self.disks[slot as usize].engine else { return false };
        let Some(volume) = engine.volume.clone().filter(|_| engine.stage == Stage::Open) else {
            return false;
        };
        let files = engine.files.clone();
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.clear();
        let found = guarded(|| {
            let guard = volume.try_hold(offset, len, write)?;
            let all = if write {
                volume.map_write(offset, len, &mut pieces)
            } else {
                volume.map_read(offset, len, &mut pieces) == Ok(len)
            };
            (all && pieces.len() <= PIECES_MAX).then_some(guard)
        });
        let aligned = |piece: &Piece| match piece.source {
            Source::File { id, .. } => files
                .get(usize::from(id.layer))
                .and_then(|files| files.get(usize::from(id.file.0)))
                .is_some_and(|file| (piece.start - offset).is_multiple_of(u64::from(file.memory_align))),
            Source::Zero => true,
            Source::Encoded { .. } => false,
        };
        let guard = match found {
            Ok(Some(guard)) if pieces.iter().all(aligned) => guard,
            Ok(_) => {
                self.pieces = pieces;
                return false;
            }
            Err(message) => {
                self.pieces = pieces;
                self.quarantine(slot, &message);
                return true;
            }
        };
        let request = &mut self.requests[req];
        request.guard = Some(guard);
        request.pending = 1;
        for piece in &pieces {
            let at = (piece.start - offset) as u32;
            match piece.source {
                Source::File { id, offset } => {
                    self.requests[req].pending += 1;
                    let file = files[usize::from(id.layer)][usize::from(id.file.0)].slot;
                    let kind = if write { Kind::Write { fua: false } } else { Kind::Read };
                    self.submit_via(file, kind, offset, piece.len, None, Via::Piece { disk: slot, req, at });
                }
                Source::Zero | Source::Encoded { .. } => self.zero_payload(req, at, piece.len as u32),
            }
        }
        self.pieces = pieces;
        self.piece_done(slot, req, 0);
        true
    }

    fn zero_payload(&mut self, req: ReqKey, at: u32, len: u32) {
        if let Some(payload) = self.requests.get(req).and_then(|request| request.payload.as_ref()) {
            self.pool.bytes_mut(payload)[at as usize..][..len as usize].fill(0);
        }
    }

    /// Gives a request to the disk of a file.
    fn submit_via(
        &mut self,
        file: u32,
        kind: Kind,
        offset: u64,
        len: u64,
        payload: Option<crate::storage::pool::Buf>,
        via: Via,
    ) {
        self.disks[via.disk() as usize].ops += 1;
        let mut request = Request::new(file, kind, offset, len, None, self.now);
        request.payload = payload;
        request.via = Some(via);
        self.submit(request);
    }

    /// A piece of a request on the fast path is done, or its start is.
    fn piece_done(&mut self, slot: u32, req: ReqKey, errno: i32) {
        let request = &mut self.requests[req];
        request.pending -= 1;
        if request.errno == 0 {
            request.errno = errno;
        }
        if request.pending > 0 {
            return;
        }
        request.guard = None;
        let errno = request.errno;
        self.with_disk(slot, |disk, ctx| disk.on_volume(ctx, req, errno, false));
    }

    /// A request of a file's disk is done: the one place where its result goes back to the volume. True when it was one.
    pub(super) fn via_done(&mut self, request: &mut Request) -> bool {
        let Some(via) = request.via else { return false };
        let slot = via.disk();
        let errno = request.errno;
        let payload = request.payload.take();
        let alive = self.disks.get(slot as usize).is_some_and(|entry| !entry.quarantined);
        match via {
            Via::Piece { req, .. } => {
                if alive {
                    self.piece_done(slot, req, errno);
                }
            }
            Via::Future { reply, .. } => {
                let result = match (&payload, errno) {
                    (_, errno) if errno != 0 => Err(errno),
                    (Some(buf), _) if request.kind == Kind::Read => {
                        Ok(Bytes::copy_of(&self.pool.bytes(buf)[..request.len as usize]))
                    }
                    _ => Ok(Bytes::zeroed(0)),
                };
                let engine = self.disks.get(slot as usize).and_then(|entry| entry.engine.as_ref());
                if let Some(engine) = engine {
                    engine.port.answer(reply, result);
                    self.awake.push(slot);
                }
            }
        }
        if let Some(buf) = payload {
            self.pool.give(buf);
        }
        self.op_gone(slot, false);
        true
    }

    /// Lets futures of a volume go on that can.
    pub(super) fn run_tasks(&mut self, slot: u32) {
        loop {
            let Some(engine) = self.disks.get_mut(slot as usize).and_then(|entry| entry.engine.as_mut())
            else {
                return;
            };
            let ready = std::mem::take(&mut *engine.lock_ready());
            if ready.is_empty() {
                return;
            }
            for task in ready {
                let Some(engine) = self.disks.get_mut(slot as usize).and_then(|entry| entry.engine.as_mut())
                else {
                    return;
                };
                let Some(running) = engine.tasks.get_mut(task) else { continue };
                let mut context = Context::from_waker(&running.waker);
                let polled = guarded(|| running.future.as_mut().poll(&mut context));
                let whom = running.whom;
                if matches!(polled, Ok(Poll::Ready(_))) {
                    let done = engine.tasks.remove(task);
                    drop(done);
                }
                let jobs = engine.port.take();
                for job in jobs {
                    self.start_job(slot, job);
                }
                match polled {
                    Ok(Poll::Pending) => {}
                    Ok(Poll::Ready(result)) => self.task_done(slot, whom, result),
                    // Opening it once more would come to the same: it is an error of the image, not a quarantine.
                    Err(message) if whom == For::Open => {
                        if let Some(engine) = &mut self.disks[slot as usize].engine {
                            engine.tasks.try_remove(task);
                        }
                        let what =
                            format!("its driver failed while it was opened ({message}); please report it");
                        self.task_done(slot, whom, Err(Error::corrupt("the image", what)));
                    }
                    Err(message) => return self.quarantine(slot, &message),
                }
            }
        }
    }

    /// Starts what a future asked for.
    fn start_job(&mut self, slot: u32, job: Job) {
        let Job { file, reply, work } = job;
        let via = Via::Future { disk: slot, reply, payload: None };
        let borrowed = |req, at| Via::Future { disk: slot, reply, payload: Some((req, at)) };
        match work {
            Work::Read { offset, len } => {
                debug_assert!(len <= PIECE);
                self.submit_via(file, Kind::Read, offset, u64::from(len), None, via);
            }
            Work::Write { offset, data } => {
                let Some(buf) = self.pool.take(data.len(), true) else {
                    return self.answer_job(slot, reply, Err(libc::ENOMEM));
                };
                self.pool.bytes_mut(&buf)[..data.len()].copy_from_slice(&data);
                let kind = Kind::Write { fua: false };
                self.submit_via(file, kind, offset, data.len() as u64, Some(buf), via);
            }
            Work::ReadPayload { req, at, offset, len } => {
                self.submit_via(file, Kind::Read, offset, u64::from(len), None, borrowed(req, at));
            }
            Work::WritePayload { req, at, offset, len } => {
                let kind = Kind::Write { fua: false };
                self.submit_via(file, kind, offset, u64::from(len), None, borrowed(req, at));
            }
            Work::Flush => self.submit_via(file, Kind::Flush, 0, 0, None, via),
            Work::Zero { offset, len } => {
                let kind = Kind::WriteZeroes { fua: false, no_hole: false, fast: false };
                self.submit_via(file, kind, offset, len, None, via);
            }
            Work::Extend { length } => {
                self.submit_via(file, Kind::SetLength { grow: true }, length, 0, None, via);
            }
            Work::Truncate { length } => {
                self.submit_via(file, Kind::SetLength { grow: false }, length, 0, None, via);
            }
            Work::Get { req, at, len } => {
                let payload = self.requests.get(req).and_then(|request| request.payload.as_ref());
                let bytes =
                    payload.map(|buf| Bytes::copy_of(&self.pool.bytes(buf)[at as usize..][..len as usize]));
                self.answer_job(slot, reply, bytes.ok_or(libc::EIO));
            }
            Work::Put { req, at, bytes } => {
                if let Some(payload) = self.requests.get(req).and_then(|request| request.payload.as_ref()) {
                    self.pool.bytes_mut(payload)[at as usize..][..bytes.len()].copy_from_slice(&bytes);
                }
                self.answer_job(slot, reply, Ok(Bytes::zeroed(0)));
            }
            Work::ZeroPayload { req, at, len } => {
                self.zero_payload(req, at, len);
                self.answer_job(slot, reply, Ok(Bytes::zeroed(0)));
            }
        }
    }

    fn answer_job(&mut self, slot: u32, reply: usize, result: Result<Bytes, i32>) {
        if let Some(engine) = self.disks.get(slot as usize).and_then(|entry| entry.engine.as_ref()) {
            engine.port.answer(reply, result);
        }
    }

    fn task_done(&mut self, slot: u32, whom: For, result: Result<Outcome, Error>) {
        match whom {
            For::Request(req) => self.volume_done(slot, req, result),
            For::Tool => {}
            For::Open => self.open_done(slot, result),
            For::Close => self.close_done(slot, result.map(drop)),
            For::Tidy => {
                if let Some(engine) = &mut self.disks[slot as usize].engine {
                    engine.tidying = false;
                }
                match result {
                    Ok(_) => self.watch_pending(slot),
                    Err(error) => {
                        self.tell_image_error(slot, &error);
                        self.tidy_at(slot, self.now + TIDY_AGAIN);
                    }
                }
            }
        }
    }

    fn volume_done(&mut self, slot: u32, req: ReqKey, result: Result<Outcome, Error>) {
        let errno = match result {
            Ok(Outcome::Extents(extents)) => {
                self.requests[req].extents = extents;
                0
            }
            Ok(_) => 0,
            Err(error) => {
                self.tell_image_error(slot, &error);
                error.errno()
            }
        };
        // A flush that failed below must not be asked for again until somebody accepts what it means.
        let sync_failed = errno != 0
            && self
                .file_slots(slot)
                .iter()
                .any(|&file| self.disks[file as usize].disk.as_ref().is_some_and(Disk::flush_failed));
        self.with_disk(slot, |disk, ctx| disk.on_volume(ctx, req, errno, sync_failed));
        self.watch_pending(slot);
    }

    /// An operator accepted that acknowledged data may be lost.
    pub(super) fn accept_doubt(&mut self, slot: u32) {
        for file in self.file_slots(slot) {
            if let Some(disk) = &mut self.disks[file as usize].disk {
                disk.accept_doubt();
            }
        }
    }

    /// What a driver or a store said, at most once a second for each disk.
    fn tell_image_error(&mut self, slot: u32, error: &Error) {
        let entry = &mut self.disks[slot as usize];
        if entry.told.is_some_and(|at| self.now < at + SECOND) {
            return;
        }
        entry.told = Some(self.now);
        self.events.send(Event::ImageError { disk: entry.id, message: error.message.clone() });
    }

    fn open_done(&mut self, slot: u32, result: Result<Outcome, Error>) {
        let Some(engine) = &mut self.disks[slot as usize].engine else { return };
        let Stage::Opening { tag } = engine.stage else { return };
        match result {
            Ok(Outcome::Open(volume)) => {
                let size = volume.size();
                engine.volume = Some(volume);
                engine.stage = Stage::Open;
                self.with_disk(slot, |disk, _| disk.set_size(size));
                self.hold_disk(slot, false);
                if let Some(tag) = tag {
                    self.reply(tag, Ok(Reply::Done));
                }
                self.swap_opened(slot);
            }
            Ok(_) => {}
            Err(error) => {
                engine.stage = Stage::Closed;
                let entry = &self.disks[slot as usize];
                let unseen = entry.conns.is_empty() && entry.requests == 0;
                if let Some(tag) = tag.filter(|_| unseen) {
                    // Nobody has seen the disk yet; it goes when its operations have come back.
                    self.disks[slot as usize].failed_open = Some((tag, error.message));
                    return self.unsettled.push(slot);
                }
                if let Some(tag) = tag {
                    // It came with its clients: it is here, and its state says what it is.
                    self.reply(tag, Ok(Reply::Done));
                }
                if self.swap_failed(slot, &error.message) {
                    return;
                }
                let reason = format!("its image cannot be opened again: {error}");
                self.with_disk(slot, |disk, ctx| {
                    disk.set_opening(ctx, false);
                    disk.fail(ctx, DiskState::Failed, &reason);
                });
                let id = self.disks[slot as usize].id;
                self.events.send(Event::State { disk: id, state: DiskState::Failed, reason });
            }
        }
        self.unsettled.push(slot);
    }

    /// An image that could not be opened: answers the command and takes the disk away. True when that was the case.
    pub(super) fn settle_failed_open(&mut self, slot: u32) -> bool {
        if self.disks[slot as usize].failed_open.is_none() {
            return false;
        }
        if self.disks[slot as usize].ops == 0
            && let Some((tag, message)) = self.disks[slot as usize].failed_open.take()
        {
            let forced = self.disks[slot as usize].zombie_tag.take();
            if let (Some(config), Some(forced)) = (self.take_disk(slot), forced) {
                self.reply(forced, Ok(Reply::Removed(config)));
            }
            self.reply(tag, Err(ShardError { kind: ShardErrorKind::Failed, message }));
        }
        true
    }

    fn close_done(&mut self, slot: u32, result: Result<(), Error>) {
        let entry = &mut self.disks[slot as usize];
        let leaves = matches!(entry.pending, Some(Pending::Park { .. } | Pending::Remove { .. }))
            || entry.swap.is_some();
        let Some(engine) = &mut entry.engine else { return };
        engine.volume = None;
        engine.stage = Stage::Closed;
        if !entry.zombie {
            match result {
                Ok(()) if leaves => {}
                // The move was taken back meanwhile.
                Ok(()) => self.reopen_engine(slot),
                Err(error) => {
                    // The files are as a crash would leave them: opened anew, the disk goes on.
                    self.tell_image_error(slot, &error);
                    self.reopen_engine(slot);
                    self.close_failed(slot, &error.message);
                    self.end_swap(slot, &format!("its image could not be closed: {error}"));
                }
            }
        }
        self.unsettled.push(slot);
    }

    /// A future may have left mappings that only memory and log have: sees to it that they are written back.
    fn watch_pending(&mut self, slot: u32) {
        let entry = &mut self.disks[slot as usize];
        let Some(engine) =
            entry.engine.as_ref().filter(|engine| engine.stage == Stage::Open && !engine.tidying)
        else {
            return;
        };
        let Some(volume) = engine.volume.clone() else { return };
        // A panic of the driver here is met again by its next future.
        let pending = guarded(|| volume.usage().pending_mappings).unwrap_or(0);
        if pending >= TIDY_MANY {
            self.start_tidy(slot);
        } else if pending > 0 {
            self.tidy_at(slot, self.now + TIDY_AFTER);
        }
    }

    /// Sets the timer for writing mappings back, unless it is set.
    fn tidy_at(&mut self, slot: u32, at: Nanos) {
        let entry = &mut self.disks[slot as usize];
        if entry.tidy.is_none() {
            entry.tidy = Some(at);
            self.timers.push(Reverse((at, slot)));
        }
    }

    /// Mappings that only memory and log have are written back.
    pub(super) fn start_tidy(&mut self, slot: u32) {
        let Some(engine) = self.disks[slot as usize].engine.as_mut() else { return };
        if engine.stage != Stage::Open || engine.tidying {
            return;
        }
        let Some(volume) = engine.volume.clone() else { return };
        if guarded(|| volume.usage().pending_mappings > 0) == Ok(true) {
            engine.tidying = true;
            engine.spawn(For::Tidy, Box::pin(async move { volume.tidy().await.map(|()| Outcome::Done) }));
            self.awake.push(slot);
        }
    }
}

/// A request of a volume's disk.
struct Asked {
    kind: Kind,
    offset: u64,
    len: u64,
    /// Durable before the answer.
    durable: bool,
}

/// Carries out what a request asks for.
async fn run(volume: Rc<Volume>, payload: ShardPayload, asked: Asked) -> Result<Outcome, Error> {
    let Asked { kind, offset, len, durable } = asked;
    match kind {
        Kind::Read => volume.read(offset, len, &payload).await?,
        Kind::Write { .. } => volume.write(offset, len, &payload).await?,
        Kind::Flush => volume.flush().await?,
        Kind::Discard { .. } => volume.erase(offset, len, Erase::Discard).await?,
        Kind::WriteZeroes { fast: true, .. } => {
            let message = "whether zeroing is fast is not known before it is done";
            return Err(Error::new(formats::error::ErrorKind::Unsupported, message));
        }
        Kind::WriteZeroes { no_hole, .. } => {
            volume.erase(offset, len, if no_hole { Erase::ZeroKeep } else { Erase::Zero }).await?;
        }
        Kind::Extents { max } => return extents(&volume, offset, len, max).await,
        Kind::SetLength { .. } => {
            // Its offset is the new size.
            volume.resize(offset).await?;
            volume.flush().await?;
        }
    }
    if durable {
        volume.flush().await?;
    }
    Ok(Outcome::Done)
}

/// Data and holes of a range, as the tables of the chain have them.
async fn extents(volume: &Volume, offset: u64, len: u64, max: usize) -> Result<Outcome, Error> {
    let (mut at, end) = (offset, offset + len);
    let mut out: Vec<Extent> = Vec::new();
    let mut pieces = Vec::new();
    while at < end && out.len() < max {
        pieces.clear();
        let covered = volume.map_read(at, end - at, &mut pieces)?;
        if covered == 0 {
            volume.load(at, end - at).await?;
            continue;
        }
        for piece in &pieces {
            let hole = piece.source == Source::Zero;
            match out.last_mut() {
                Some(last) if last.hole == hole => last.len += piece.len,
                _ => out.push(Extent { len: piece.len, hole }),
            }
        }
        at += covered;
    }
    out.truncate(max);
    Ok(Outcome::Extents(out))
}

/// Opens all layers of a chain, the lowest first.
async fn open(
    chain: ImageChain,
    files: Rc<Vec<Vec<Rc<ShardFile>>>>,
    budget: Rc<Budget>,
) -> Result<Outcome, Error> {
    let mut layers = Vec::new();
    let mut below_size = None;
    for (layer, files) in chain.layers.iter().zip(files.iter()).rev() {
        let files: Vec<Rc<dyn formats::file::ImageFile>> =
            files.iter().map(|file| file.clone() as Rc<dyn formats::file::ImageFile>).collect();
        let log = match layer.log.as_ref().filter(|_| layer.writable) {
            Some(log) => Some(take_up(log, &files).await?),
            None => None,
        };
        let open = Open {
            files: files.clone(),
            writable: layer.writable,
            below_size,
            budget: budget.clone(),
            log: log.map(|log| log as Rc<dyn AllocationLog>),
            snapshot: layer.snapshot.clone(),
        };
        if layer.flush {
            // It was written until now, and nobody else will flush it.
            for file in &files {
                file.flush().await?;
            }
        }
        let name = files.first().map_or("", |file| file.name()).to_owned();
        let driver = layer
            .format
            .open(open)
            .await
            .map_err(|error| if error.message.contains(&name) { error } else { error.context(&name) })?;
        below_size = Some(driver.size());
        layers.push(Layer { driver, files });
    }
    layers.reverse();
    Ok(Outcome::Open(Rc::new(Volume::new(layers)?)))
}

/// Carries out what a log holds that was not closed: after the end of a former daemon, or of the driver.
async fn take_up(log: &Arc<LogFile>, files: &[Rc<dyn formats::file::ImageFile>]) -> Result<Rc<Log>, Error> {
    let (log, entries) = Log::new(log.clone());
    if !entries.is_empty() {
        let name = files.first().map_or("", |file| file.name());
        tracing::info!(
            image = name,
            entries = entries.len(),
            "changes of its tables are carried out from its allocation log"
        );
        replay(&entries, files).await?;
        log.release(log.position());
    }
    Ok(Rc::new(log))
}

impl Entry {
    /// Its image is being opened.
    pub(super) fn opening(&self) -> bool {
        self.engine.as_ref().is_some_and(|engine| matches!(engine.stage, Stage::Opening { .. }))
    }
}
