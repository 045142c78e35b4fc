//! One disk as the control thread knows it.

use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex, MutexGuard};

use shard::api::{DiskConfig, DiskId};
use shard::limits::Group;
use shard::stats::DiskCounters;
use tokio::sync::{Notify, OwnedRwLockWriteGuard, RwLock, watch};
use tokio::time::Instant;

use super::{Daemon, lock};
use crate::config::Settings;
use crate::fleet::Seat;
use crate::guests::shared::{Clients, SharedListener};
use crate::images::OpenImage;
use crate::model::State;
use crate::nbd::{self, ListenerHandle};
use crate::problem::{Problem, ProblemKind};
use crate::state::Attachment;

/// Whether a shard has the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// A shard serves it, in the state of its counters.
    Live,
    /// A shard was told to remove it, and has not done so.
    Draining,
    /// A shard removed it by force; operations of the kernel are still out.
    Zombie,
    /// No shard has it: its image could not be opened, or its shard ended and no other has it yet.
    Down,
    /// It was detached and its image is being closed: it never comes back.
    Gone,
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    /// Its name.
    pub name: Arc<str>,
    /// Counters; they stay with the disk when it moves or comes back.
    pub counters: Arc<DiskCounters>,
    /// When it was attached or restored.
    pub since: Instant,
    /// Shared by those who send something to the disk's shard, exclusive to the one who changes the shard.
    pub place: Arc<RwLock<()>>,
    /// Connections that were handed over and are not counted by the shard yet.
    pub connecting: AtomicU32,
    /// Its device is being made in XenStore, which may not have it yet.
    pub device_to_come: AtomicBool,
    /// Its clients that share memory.
    pub sharers: Clients,
    /// Held by the one attempt to bring a disk up that is down.
    pub attempt: tokio::sync::Mutex<()>,
    /// Tells a flow that waits for the shard to give up: somebody detaches by force.
    pub interrupt: Notify,
    /// How its removal ended.
    pub removed: watch::Sender<Option<Removal>>,
    inner: Mutex<Inner>,
}

/// How a removal ended.
#[derive(Debug, Clone)]
pub enum Removal {
    /// The disk is gone.
    Gone,
    /// It is a zombie.
    Zombie,
    /// The shard refused.
    Refused(Problem),
}

/// What changes.
#[derive(Debug)]
pub struct Inner {
    /// How it is to be served.
    pub attachment: Attachment,
    /// Whether a shard has it.
    pub standing: Standing,
    /// Why it is in its state, for the operator.
    pub reason: Option<String>,
    /// What it has while a shard has it.
    pub live: Option<Live>,
    /// Detaches that wait for it: new clients are refused.
    pub closing: u32,
    /// When a disk that is down is tried again.
    pub retry_at: Option<Instant>,
    /// Bytes of its image in the store, as measured last.
    pub allocated_bytes: Option<u64>,
    /// A dead daemon had connected its guest, and nobody answers the guest's requests.
    pub awaiting: bool,
}

/// What a disk has while a shard has it.
#[derive(Debug)]
pub struct Live {
    /// Its identity on shards.
    pub id: DiskId,
    /// Its shard.
    pub seat: Seat,
    /// Its image.
    pub image: OpenImage,
    /// Its own sockets.
    pub listeners: Listeners,
}

/// The sockets of one disk; they go when this is dropped.
#[derive(Debug, Default)]
pub struct Listeners {
    nbd: Option<ListenerHandle>,
    blkif: Option<SharedListener>,
}

impl Listeners {
    /// Binds those that a disk is to have.
    pub fn bind(settings: &Settings, disk: &Disk) -> Result<Listeners, Problem> {
        let (nbd, blkif) = {
            let inner = disk.inner();
            (inner.attachment.request.nbd, inner.attachment.request.blkif)
        };
        Ok(Listeners {
            nbd: nbd.then(|| nbd::bind_disk_socket(settings, &disk.name)).transpose()?,
            blkif: blkif.then(|| SharedListener::bind(settings, &disk.name)).transpose()?,
        })
    }

    /// Starts to take clients.
    pub fn serve(&mut self, daemon: &Arc<Daemon>, disk: &Arc<str>) {
        if let Some(listener) = &mut self.nbd {
            listener.serve(daemon, nbd::Scope::One(disk.clone()));
        }
        if let Some(listener) = &mut self.blkif {
            listener.serve(daemon, disk);
        }
    }
}

impl Disk {
    /// A disk that no shard has yet.
    pub fn new(name: &str, attachment: Attachment, reason: &str) -> Arc<Disk> {
        Arc::new(Disk {
            name: name.into(),
            counters: Arc::default(),
            since: Instant::now(),
            place: Arc::default(),
            connecting: AtomicU32::new(0),
            device_to_come: AtomicBool::new(attachment.request.guest.is_some()),
            sharers: Clients::default(),
            attempt: tokio::sync::Mutex::default(),
            interrupt: Notify::new(),
            removed: watch::Sender::new(None),
            inner: Mutex::new(Inner {
                attachment,
                standing: Standing::Down,
                reason: Some(reason.to_owned()),
                live: None,
                closing: 0,
                retry_at: None,
                allocated_bytes: None,
                awaiting: false,
            }),
        })
    }

    /// Looks at, or changes, what changes. Not over an `await`.
    pub fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Its identity on shards, while one has it.
    pub fn id(&self) -> Option<DiskId> {
        self.inner().live.as_ref().map(|live| live.id)
    }

    /// Whether a shard has it.
    pub fn standing(&self) -> Standing {
        self.inner().standing
    }

    /// Its identity and its shard, while one has it.
    pub fn place(&self) -> Option<(DiskId, usize)> {
        self.inner().live.as_ref().map(|live| (live.id, live.seat.shard().index))
    }

    /// The right to change the disk's shard: nobody else sends it anything meanwhile.
    pub async fn whole_place(&self, deadline: Instant) -> Result<OwnedRwLockWriteGuard<()>, Problem> {
        let place = self.place.clone().write_owned();
        tokio::time::timeout_at(deadline, place).await.map_err(|_| {
            let message = format!(
                "disk {}: its shard has not answered an earlier command: see `ctl shards`",
                self.name
            );
            Problem::new(ProblemKind::TimedOut, message)
        })
    }

    fn shard_has_ended(&self) -> bool {
        self.inner().live.as_ref().is_some_and(|live| live.seat.shard().ended().is_some())
    }

    /// Its state, as `list` names it.
    pub fn state(&self) -> State {
        match self.standing() {
            // The last word of a shard that has ended says nothing any more.
            Standing::Live if self.shard_has_ended() => State::Failed,
            Standing::Live => match State::from_counter(self.counters.state.get()) {
                State::Running if self.inner().awaiting => State::AwaitingRecovery,
                state => state,
            },
            Standing::Draining | Standing::Gone => State::Draining,
            Standing::Zombie => State::Zombie,
            Standing::Down => State::Failed,
        }
    }

    /// What a shard needs to serve it.
    pub fn config(&self, id: DiskId, image: &OpenImage, groups: Vec<Arc<Group>>) -> Box<DiskConfig> {
        let inner = self.inner();
        Box::new(DiskConfig {
            id,
            name: self.name.clone(),
            backend: image.backend.clone(),
            size_bytes: image.size_bytes,
            read_only: inner.attachment.request.read_only,
            on_error: inner.attachment.on_error.into(),
            on_enospc: inner.attachment.on_enospc.into(),
            limits: inner.attachment.limits,
            groups,
            counters: self.counters.clone(),
        })
    }

    /// A shard has it now.
    pub fn go_live(&self, live: Live) {
        let mut inner = self.inner();
        inner.standing = Standing::Live;
        inner.reason = inner.attachment.hold.reason().map(str::to_owned).or_else(|| live.image.note.clone());
        inner.retry_at = None;
        inner.live = Some(live);
    }

    /// The shard that counted is gone: nothing is connected or in flight any more, whatever it counted last.
    pub fn reset_gauges(&self) {
        self.sharers.end_all("the shard of the disk has lost its clients: connect again");
        let counters = &self.counters;
        [&counters.clients, &counters.io_now, &counters.throttled_now].iter().for_each(|gauge| gauge.set(0));
    }

    /// No shard has it any more; what it had comes back. A disk that was being detached is gone with that.
    pub fn go_down(&self, reason: &str) -> Option<Live> {
        let mut inner = self.inner();
        inner.standing = match inner.standing {
            Standing::Live | Standing::Down => Standing::Down,
            Standing::Draining | Standing::Zombie | Standing::Gone => Standing::Gone,
        };
        inner.reason = Some(reason.to_owned());
        inner.live.take()
    }

    /// It was detached, and nobody brings it up or changes it any more; what it had comes back.
    pub fn leave(&self) -> Option<Live> {
        let mut inner = self.inner();
        inner.standing = Standing::Gone;
        inner.live.take()
    }
}
