//! The operator: commands to the shards, and whether their replies keep the promises of `api`.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::image::{self, Swapping};
use super::kernel::{Event as Happening, World};
use super::oracle::{Model, Stamp};
use super::scenario::Sim;
use crate::api::{
    Backend, Command, DiskConfig, DiskId, DiskState, ErrorPolicy, Event, ImageFile, Reply, ShardError,
    ShardErrorKind,
};
use crate::clock::{MICROSECOND, MILLISECOND, SECOND};
use crate::limits::{Limits, Rate};
use crate::park::ParkedDisk;
use crate::stats::DiskCounters;

/// Where a disk is.
#[derive(Debug)]
pub enum Place {
    Shard(usize),
    /// On its way to a shard.
    Moving(Box<ParkedDisk>, usize),
    Absent,
}

/// Kinds of commands, for the check of their replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Add,
    Connect,
    Pause,
    Resume,
    ResumeInDoubt,
    Park,
    CancelPark,
    Unpark,
    Limits,
    Fail,
    Remove,
    RemoveForce,
    Panic,
    Stats,
    Clients,
    Swap,
    Resize,
}

/// A command without a reply.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    pub disk: usize,
    pub kind: Kind,
}

/// A disk as the operator knows it.
#[derive(Debug)]
pub struct SimDisk {
    /// The raw file, be it the disk or the lowest layer of its image.
    pub image: Arc<ImageFile>,
    /// What the disk is served from, as far as the operator knows.
    pub backend: Backend,
    pub swap: Swapping,
    pub id: DiskId,
    pub size: u64,
    pub model: Model,
    pub on_error: ErrorPolicy,
    pub on_enospc: ErrorPolicy,
    pub read_only: bool,
    pub counters: Arc<DiskCounters>,
    pub place: Place,
    pub limits: Limits,
    pub grouped: bool,
    pub paused: bool,
    pub storage_error: bool,
    /// `fail` was sent.
    pub given_up: bool,
    /// Given up or detached by force; EIO is a proper answer to what was asked before it is attached anew.
    pub failed: bool,
    pub zombie: bool,
    /// Requests that were sent before this instant may get EIO.
    pub attached_at: u64,
    /// An fdatasync failed at this instant, and nobody has accepted it.
    pub sync_failed: Option<u64>,
    /// It failed in the turn that is being looked at.
    pub sync_failed_now: bool,
    /// Earlier ones: from when to when.
    pub doubts: Vec<(u64, u64)>,
    /// Changes of clients that have gone.
    pub orphans: Vec<Stamp>,
    /// In this round somebody went away without waiting for answers, or requests ran twice.
    pub lost_requests: bool,
    pub panics: u32,
    /// Requests that got the error of a failed operation: when they were sent, and their range.
    pub reported: Vec<(u64, u64, u64)>,
}

impl SimDisk {
    pub fn new(
        image: Arc<ImageFile>,
        size: u64,
        model: Model,
        on_error: ErrorPolicy,
        on_enospc: ErrorPolicy,
        read_only: bool,
    ) -> SimDisk {
        SimDisk {
            backend: Backend::File(image.clone()),
            image,
            swap: Swapping::default(),
            id: DiskId(0),
            size,
            model,
            on_error,
            on_enospc,
            read_only,
            counters: Arc::new(DiskCounters::default()),
            place: Place::Absent,
            limits: Limits::default(),
            grouped: false,
            paused: false,
            storage_error: false,
            given_up: false,
            failed: false,
            zombie: false,
            attached_at: 0,
            sync_failed: None,
            sync_failed_now: false,
            doubts: Vec::new(),
            orphans: Vec::new(),
            lost_requests: false,
            panics: 0,
            reported: Vec::new(),
        }
    }

    pub fn attach(&mut self, id: DiskId, shard: usize, now: u64) {
        self.id = id;
        self.place = Place::Shard(shard);
        self.limits = Limits::default();
        self.grouped = false;
        (self.paused, self.storage_error) = (false, false);
        (self.given_up, self.failed, self.zombie) = (false, false, false);
        self.swap = Swapping { was_image: self.is_image(), ..Swapping::default() };
        self.attached_at = now;
        self.accept_doubt(now);
        self.panics = 0;
    }

    /// A failed fdatasync is accepted, or forgotten with the disk.
    pub fn accept_doubt(&mut self, now: u64) {
        if let Some(at) = self.sync_failed.take() {
            self.doubts.push((at, now));
        }
    }

    pub fn is_image(&self) -> bool {
        matches!(self.backend, Backend::Image(_)) || self.swap.was_image
    }

    pub fn is_in_memory(&self) -> bool {
        matches!(self.backend, Backend::Ram(_) | Backend::Null)
    }

    /// Whether anybody but the operator keeps a file of it.
    fn is_kept(&self) -> bool {
        let layers = match &self.backend {
            Backend::Image(chain) if Arc::strong_count(chain) > 1 => return true,
            Backend::Image(chain) => &chain.layers[..],
            _ => &[],
        };
        let files = || layers.iter().flat_map(|layer| &layer.files);
        let ours = |file: &Arc<ImageFile>| files().filter(|other| Arc::ptr_eq(file, other)).count();
        let raw = usize::from(matches!(self.backend, Backend::File(_)));
        Arc::strong_count(&self.image) > 1 + raw + ours(&self.image)
            || files().any(|file| {
                Arc::strong_count(file) > ours(file) + usize::from(Arc::ptr_eq(file, &self.image))
            })
    }

    /// What a power loss would leave of some ranges; `None` when nobody can say.
    pub fn durable(&self, world: &World, ranges: &[Range<u64>]) -> Option<Vec<Vec<u8>>> {
        match &self.backend {
            Backend::File(file) => {
                let durable = &world.file_behind(file.fd.as_raw_fd()).durable;
                let cut = |range: &Range<u64>| durable[range.start as usize..range.end as usize].to_vec();
                Some(ranges.iter().map(cut).collect())
            }
            // An fdatasync that failed may have lost tables, and what was written since may be found through them only.
            Backend::Image(_) if self.model.doubt > 0 => None,
            Backend::Image(chain) => Some(image::contents(world, chain, true, ranges)),
            Backend::Ram(_) | Backend::Null => None,
        }
    }

    pub fn config(&self, index: usize) -> DiskConfig {
        DiskConfig {
            id: self.id,
            name: format!("disk{index}").into(),
            backend: self.backend.clone(),
            size_bytes: self.size,
            read_only: self.read_only,
            on_error: self.on_error,
            on_enospc: self.on_enospc,
            limits: self.limits,
            groups: Vec::new(),
            counters: self.counters.clone(),
        }
    }
}

impl Sim {
    pub fn soon(&mut self, disk: usize, most_us: u64) {
        let after = self.rng.between(1, most_us) * MICROSECOND;
        self.world.borrow_mut().schedule(after, Happening::Operator(disk));
    }

    pub fn ordered(&self, disk: usize) -> Option<Kind> {
        let ours = self.orders.values().filter(|order| order.disk == disk);
        ours.map(|order| order.kind).find(|kind| !matches!(kind, Kind::Connect | Kind::Stats | Kind::Clients))
    }

    /// The operator looks at a disk and does something.
    pub fn operate(&mut self, disk: usize) {
        if self.scripted {
            return;
        }
        match std::mem::replace(&mut self.disks[disk].place, Place::Absent) {
            Place::Absent => {
                self.attach(disk);
                self.connect(disk);
            }
            Place::Moving(parked, to) => {
                let to = if self.stopped[to] { 1 - to } else { to };
                self.disks[disk].place = Place::Shard(to);
                let d = &self.disks[disk];
                // An image is opened.
                self.world.borrow_mut().set_frozen(disk, d.paused && !d.is_image());
                if self.plan.faults && self.rng.chance(200) {
                    self.shards[to].take_buffers_away();
                    let after = self.rng.between(MICROSECOND, 5 * MILLISECOND);
                    self.world.borrow_mut().schedule(after, Happening::Buffers(to));
                }
                self.command(disk, to, Command::Unpark(parked), Kind::Unpark);
            }
            Place::Shard(shard) => {
                self.disks[disk].place = Place::Shard(shard);
                self.operate_attached(disk, shard);
            }
        }
    }

    fn operate_attached(&mut self, disk: usize, shard: usize) {
        let running = self.ordered(disk);
        let d = &self.disks[disk];
        match running {
            Some(kind) => {
                let waits = d.storage_error || d.paused || d.failed;
                self.interrupt(disk, shard, kind);
                if waits {
                    self.soon(disk, 10_000);
                }
            }
            None if d.zombie => {}
            None if d.failed => {
                let force = self.rng.chance(500);
                self.remove(disk, shard, force);
            }
            None if d.storage_error && !self.closing && self.rng.chance(50) => self.give_up(disk, shard),
            // It would run on something that is not its image.
            None if d.storage_error && d.swap.must.is_some() => self.give_up(disk, shard),
            None if d.storage_error => self.resume(disk, shard),
            None if d.paused => {
                if !self.swap(disk, shard) {
                    self.resume(disk, shard);
                }
            }
            None if self.closing => {}
            None => self.mischief(disk, shard, d.id),
        }
    }

    fn resume(&mut self, disk: usize, shard: usize) {
        let d = &self.disks[disk];
        // First without accepting a loss, at times.
        let in_doubt = d.sync_failed.is_some() && self.rng.chance(500);
        let kind = if in_doubt { Kind::ResumeInDoubt } else { Kind::Resume };
        let command = Command::Resume { disk: d.id, data_in_doubt: in_doubt };
        self.world.borrow_mut().set_frozen(disk, false);
        self.command(disk, shard, command, kind);
    }

    pub fn give_up(&mut self, disk: usize, shard: usize) {
        let d = &mut self.disks[disk];
        (d.given_up, d.failed) = (true, true);
        let command = Command::Fail { disk: d.id };
        self.command(disk, shard, command, Kind::Fail);
    }

    fn remove(&mut self, disk: usize, shard: usize, force: bool) {
        let d = &mut self.disks[disk];
        let id = d.id;
        d.lost_requests = true;
        if force {
            d.failed = true;
            d.zombie = true;
        }
        let kind = if force { Kind::RemoveForce } else { Kind::Remove };
        self.command(disk, shard, Command::RemoveDisk { disk: id, force }, kind);
    }

    /// Takes a disk off at the end of a run.
    pub fn detach(&mut self, disk: usize) {
        if let Place::Shard(shard) = self.disks[disk].place {
            let force = self.rng.chance(300);
            self.remove(disk, shard, force);
        }
    }

    /// A second command while the first has not been answered.
    fn interrupt(&mut self, disk: usize, shard: usize, running: Kind) {
        let id = self.disks[disk].id;
        match (running, self.rng.below(4)) {
            (Kind::Park, 0 | 1) => {
                self.command(disk, shard, Command::CancelPark { disk: id }, Kind::CancelPark)
            }
            (Kind::Pause, 0 | 1) => self.resume(disk, shard),
            (Kind::Swap, 0 | 1) if self.rng.chance(300) => self.resume(disk, shard),
            (Kind::Park | Kind::Pause | Kind::Remove | Kind::Swap | Kind::Resize, 2)
                if !self.disks[disk].zombie && self.rng.chance(300) =>
            {
                self.remove(disk, shard, true);
            }
            (_, 3) => self.command(disk, shard, Command::Stats { disk: id }, Kind::Stats),
            _ => {}
        }
    }

    fn mischief(&mut self, disk: usize, shard: usize, id: DiskId) {
        match self.rng.below(18) {
            0..=2 => self.command(disk, shard, Command::Pause { disk: id }, Kind::Pause),
            3..=5 => {
                self.command(disk, shard, Command::Park { disk: id }, Kind::Park);
                if self.rng.chance(300) {
                    self.soon(disk, 2000);
                }
            }
            6 | 7 => self.limit(disk, shard),
            8 => {
                self.disks[disk].lost_requests = true;
                self.disks[disk].panics += 1;
                self.command(disk, shard, Command::InjectPanic { disk: id }, Kind::Panic);
            }
            9 => self.connect(disk),
            10 if !self.disks[disk].is_in_memory() => {
                self.world.borrow_mut().hang(disk);
                let after = self.rng.between(100 * MILLISECOND, 40 * SECOND);
                self.world.borrow_mut().schedule(after, Happening::Release(disk));
            }
            11 => self.remove(disk, shard, false),
            12 => self.remove(disk, shard, true),
            13 if self.rng.chance(300) => self.give_up(disk, shard),
            14 => self.command(disk, shard, Command::Clients { disk: id }, Kind::Clients),
            16 | 17 if matches!(self.disks[disk].backend, Backend::Image(_)) => self.resize(disk, shard),
            _ => self.command(disk, shard, Command::Stats { disk: id }, Kind::Stats),
        }
    }

    fn limit(&mut self, disk: usize, shard: usize) {
        let rng = &mut self.rng;
        let mut rate = |most: u64, on: u64| Rate {
            per_second: if rng.chance(on) { rng.between(most / 20, most) } else { 0 },
            burst: if rng.chance(200) { most / 10 } else { 0 },
            one_time_burst: 0,
        };
        let limits = Limits {
            iops_total: rate(4000, 200),
            iops_read: rate(4000, 150),
            iops_write: rate(2000, 400),
            bps_total: rate(100 << 20, 100),
            bps_read: rate(100 << 20, 100),
            bps_write: rate(50 << 20, 300),
            iops_size: 0,
            dry_run: self.rng.chance(100),
        };
        let limits = if self.rng.chance(300) { Limits::default() } else { limits };
        let grouped = self.rng.chance(300);
        if grouped && self.rng.chance(500) {
            let rate = Rate { per_second: self.rng.between(100, 4000), ..Rate::default() };
            let now = self.world.borrow().now;
            self.group.set(Limits { iops_total: rate, ..Limits::default() }, now);
        }
        let groups = if grouped { vec![self.group.clone()] } else { Vec::new() };
        let d = &mut self.disks[disk];
        (d.limits, d.grouped) = (limits, grouped);
        let command = Command::SetLimits { disk: d.id, limits, groups };
        self.command(disk, shard, command, Kind::Limits);
    }

    // ---- what the shards say ----

    pub fn on_event(&mut self, shard: usize, event: Event) {
        self.world.borrow().say(format_args!("shard {shard}: {event:?}"));
        match event {
            Event::Reply { tag: 0, .. } => {}
            Event::Reply { tag, result } => {
                let Some(order) = self.orders.remove(&tag) else {
                    panic!("a reply to {tag}, twice or unasked")
                };
                self.on_reply(shard, order, result);
            }
            Event::State { disk, state, reason } => {
                let Some(index) = self.disks.iter().position(|d| d.id == disk) else { return };
                self.count(format!("state {state:?}"));
                let d = &mut self.disks[index];
                if reason.starts_with("fdatasync failed") && d.sync_failed.is_none() {
                    // In the same turn as a resume, and after it.
                    d.sync_failed = Some(d.model.doubt);
                }
                self.on_state(index, state);
            }
            Event::ZombieGone { config } => {
                let Some(index) = self.disks.iter().position(|d| d.id == config.id) else {
                    panic!("a zombie nobody knows is gone");
                };
                drop(config);
                self.gone(index);
            }
            Event::ImageError { disk, message } => {
                let d = self.disks.iter().find(|d| d.id == disk);
                assert!(d.is_none_or(SimDisk::is_image), "a raw disk has no image: {message}");
            }
            Event::ClientGone { peer, reason, .. } => {
                let number: usize =
                    peer.trim_start_matches("client ").parse().expect("a client of the simulator");
                self.clients[number].ended_well = reason.is_empty() || reason == "the disk was detached";
            }
            Event::RingBroken { .. } | Event::FlushHeld { .. } => panic!("there are no guests: {event:?}"),
            Event::Stopped { error } => panic!("shard {shard} stopped: {error:?}"),
        }
    }

    fn on_state(&mut self, index: usize, state: DiskState) {
        let d = &mut self.disks[index];
        match state {
            DiskState::StorageError => {
                d.storage_error = true;
                self.soon(index, 20_000);
            }
            DiskState::Failed => {
                assert!(d.is_image() || d.given_up, "a disk failed by itself");
                d.failed = true;
                self.soon(index, 20_000);
            }
            DiskState::Paused if d.paused => {}
            DiskState::Paused => {
                // After a second panic.
                assert!(d.panics >= 2, "a disk was paused by nobody");
                d.paused = true;
                self.soon(index, 20_000);
            }
            _ => {}
        }
    }

    /// The disk has left its shard for good.
    fn gone(&mut self, index: usize) {
        let d = &mut self.disks[index];
        d.place = Place::Absent;
        d.zombie = false;
        (d.swap.to, d.swap.must) = (None, None);
        assert!(!d.is_kept(), "a shard keeps a file of a disk that it gave back");
        assert_eq!(d.counters.io_now.get(), 0, "io_now of a disk that is gone");
        assert_eq!(d.counters.throttled_now.get(), 0, "throttled_now of a disk that is gone");
        assert!(!self.world.borrow().is_busy(index), "a disk is gone with operations in flight");
        self.world.borrow_mut().set_frozen(index, self.closing);
        if !self.closing {
            self.soon(index, 10_000);
        }
    }

    fn on_reply(&mut self, shard: usize, order: Order, result: Result<Reply, ShardError>) {
        let Order { disk, kind } = order;
        let busy = self.world.borrow().is_busy(disk);
        self.count(match &result {
            Ok(Reply::Zombie { .. }) => "Zombie".to_owned(),
            Ok(_) => format!("{kind:?}"),
            Err(error) => format!("{kind:?} refused: {:?}", error.kind),
        });
        match (kind, result) {
            (Kind::Pause, Ok(Reply::Done)) => {
                assert!(!busy, "paused with operations in flight");
                // A resume may have been sent meanwhile.
                let resumed = matches!(self.ordered(disk), Some(Kind::Resume | Kind::ResumeInDoubt));
                let d = &mut self.disks[disk];
                if !d.storage_error && !d.failed && !resumed {
                    d.paused = true;
                    self.world.borrow_mut().set_frozen(disk, true);
                }
                self.soon(disk, 10_000);
            }
            (Kind::Resume | Kind::ResumeInDoubt, Ok(Reply::Done)) => {
                let now = self.instant();
                let d = &mut self.disks[disk];
                // In the same turn the resume came first; an event says so after this reply.
                let before = d.sync_failed.is_some() && !d.sync_failed_now;
                assert!(kind == Kind::ResumeInDoubt || !before, "resumed over a failed fdatasync");
                (d.paused, d.storage_error) = (false, false);
                d.accept_doubt(now);
            }
            (Kind::Resume, Err(error)) if error.kind == ShardErrorKind::DataInDoubt => {
                assert!(self.disks[disk].sync_failed.is_some(), "no fdatasync failed: {error}");
                self.soon(disk, 10_000);
            }
            (Kind::Park, Ok(Reply::Parked(parked))) => {
                assert!(!busy, "parked with operations in flight");
                let sockets: Vec<_> =
                    self.clients.iter().filter(|c| c.disk == disk).map(|c| c.sock).collect();
                let mut world = self.world.borrow_mut();
                assert!(
                    !sockets.into_iter().any(|sock| world.sockets_busy(sock)),
                    "parked with a socket in use"
                );
                world.set_frozen(disk, true);
                drop(world);
                let to = if self.rng.chance(800) { 1 - shard } else { shard };
                self.disks[disk].place = Place::Moving(parked, to);
                self.soon(disk, 5_000);
            }
            (Kind::Unpark, Ok(Reply::NotTaken(parked))) => {
                assert_eq!(self.stopping, Some(shard), "a shard that is not stopping refused a disk");
                self.count("Unpark handed back");
                self.world.borrow_mut().set_frozen(disk, true);
                self.disks[disk].place = Place::Moving(parked, 1 - shard);
                self.soon(disk, 5_000);
            }
            (Kind::Remove, Ok(Reply::Removed(config))) => {
                drop(config);
                let d = &self.disks[disk];
                if !d.read_only && !d.failed {
                    self.check_durable_all(disk);
                }
                self.gone(disk);
            }
            (Kind::RemoveForce, Ok(Reply::Removed(config))) => {
                drop(config);
                self.gone(disk);
            }
            (Kind::RemoveForce, Ok(Reply::Zombie { in_flight })) => {
                assert!(in_flight > 0 && busy, "a zombie with nothing in flight");
            }
            (Kind::Fail, Ok(Reply::Done)) => {
                let d = &mut self.disks[disk];
                (d.paused, d.storage_error) = (false, false);
                self.soon(disk, 10_000);
            }
            (
                Kind::Add | Kind::Connect | Kind::CancelPark | Kind::Unpark | Kind::Limits | Kind::Panic,
                Ok(Reply::Done),
            ) => {}
            (Kind::Swap, Ok(Reply::Done)) => self.swapped(disk, Ok(())),
            (Kind::Swap, Err(error)) => {
                self.swapped(disk, Err(error.kind));
            }
            (Kind::Resize, result) => {
                let size = self.resizes.remove(&disk).unwrap_or(0);
                match result {
                    Ok(reply) => {
                        assert!(matches!(reply, Reply::Done), "{reply:?}");
                        self.disks[disk].size = size;
                    }
                    Err(error) => assert!(
                        matches!(error.kind, ShardErrorKind::Failed | ShardErrorKind::WrongState),
                        "{error:?}"
                    ),
                }
            }
            // Its image cannot be opened, and it has no clients.
            (Kind::Add | Kind::Unpark, Err(error)) if self.disks[disk].is_image() => {
                assert_eq!(error.kind, ShardErrorKind::Failed, "{error}");
                self.disks[disk].lost_requests = true;
                if !matches!(self.ordered(disk), Some(Kind::RemoveForce)) {
                    self.gone(disk);
                }
            }
            (Kind::Stats, Ok(Reply::Stats(_))) | (Kind::Clients, Ok(Reply::Clients(_))) => {}
            (Kind::Add | Kind::Unpark | Kind::Fail, result) => panic!("{kind:?} of disk {disk}: {result:?}"),
            (kind, Ok(reply)) => panic!("{kind:?} of disk {disk} was answered with {reply:?}"),
            (kind, Err(error)) => self.refused(disk, kind, &error),
        }
    }

    /// A command failed: it must be for a reason, and the disk must be where it was.
    fn refused(&mut self, disk: usize, kind: Kind, error: &ShardError) {
        let d = &self.disks[disk];
        let fine = match error.kind {
            ShardErrorKind::WrongState | ShardErrorKind::Interrupted => true,
            ShardErrorKind::NoSuchDisk => !matches!(d.place, Place::Shard(_)) || kind == Kind::CancelPark,
            ShardErrorKind::Limit => kind == Kind::Connect,
            // What has to be closed may not be.
            ShardErrorKind::Failed => {
                (kind == Kind::Remove && d.storage_error)
                    || (matches!(kind, Kind::Remove | Kind::Park) && d.is_image())
            }
            ShardErrorKind::DataInDoubt | ShardErrorKind::Guest => false,
        };
        let moved = matches!(
            kind,
            Kind::Connect | Kind::Resume | Kind::ResumeInDoubt | Kind::Stats | Kind::RemoveForce
        );
        assert!(fine || moved, "{kind:?} of disk {disk}: {error:?}");
        assert!(
            kind != Kind::RemoveForce || error.kind != ShardErrorKind::WrongState,
            "force was refused: {error}"
        );
        if kind == Kind::RemoveForce {
            let d = &mut self.disks[disk];
            (d.failed, d.zombie) = (d.given_up, false);
        }
        // Look again: it may wait for a resume.
        self.soon(disk, 10_000);
    }
}
