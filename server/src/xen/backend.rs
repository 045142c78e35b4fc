//! All devices that guests are to have from us: found in XenStore, one task each.
//!
//! ```text
//!  backend/vbd3, backend/vbd (one watch each) ─▶ manager ─ marks ─▶ owner task of one device ─▶ Disks (the daemon, its shards)
//!  @releaseDomain ──────────────────────────────▶    │                    ▲ frontend's state (one watch each)
//! ```
//! Invariants: a device has one task, and only that task writes its state or speaks to [`Disks`] about it. What the task is told are
//! marks, never a queue. The manager knows devices by the numbers in paths; whatever else is in XenStore the task reads itself.
//! No directory of a toolstack is ever removed here, see [`super::xenbus`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::client::{Status, Store, StoreError};
use super::device::{DeviceId, Domid, Kind, backend_root};
use super::host::Host;
use super::keys::Connect;
use super::owner;
use super::publish::{Features, Properties};
use super::spec::Wanted;
use super::wire::{Errno, Request};
use super::xenbus::{Link, XenbusState};
use crate::daemon::lock;
use crate::problem::{Problem, ProblemKind};

/// How long an answer about tapback is believed.
pub(super) const TAPBACK_KNOWN: Duration =
    if cfg!(test) { Duration::from_millis(100) } else { Duration::from_secs(5) };

/// The rest of the daemon, as devices need it.
///
/// For one device there is one call at a time, except [`Disks::properties`]. Everything may be called again after it was done.
pub trait Disks: Send + Sync + 'static {
    /// Makes the disk ready. The error goes into XenStore, for the toolstack and the operator.
    fn open(&self, wanted: &Wanted) -> impl Future<Output = Result<(), Problem>> + Send;

    /// What the disk of a device is like now; none when it is not open.
    fn properties(&self, id: DeviceId) -> Option<Properties>;

    /// Maps the rings and begins to serve them. After an error nothing is mapped.
    fn connect(&self, id: DeviceId, connect: Connect) -> impl Future<Output = Result<(), Problem>> + Send;

    /// Answers what is in flight, then lets go of rings, grants and ports; ends when all that is done.
    fn disconnect(&self, id: DeviceId) -> impl Future<Output = ()> + Send;

    /// The device is gone: its disk is not used any more.
    fn removed(&self, id: DeviceId) -> impl Future<Output = ()> + Send;

    /// How the device was found. `awaits`: connected, by a daemon that is dead: its guest waits, and its image must not be written by others,
    /// until the next [`Disks::connect`] or [`Disks::removed`]. Called before [`Disks::open`].
    fn awaiting(&self, id: DeviceId, awaits: bool);
}

/// What a shard says by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// The disk has another size.
    Resized,
    /// A ring was stopped, and why.
    RingBroken(String),
}

/// A device, for lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Which.
    pub id: DeviceId,
    /// Our state.
    pub own: Option<XenbusState>,
    /// The frontend's.
    pub front: Option<XenbusState>,
    /// How far the shard is.
    pub link: Link,
    /// The image is open.
    pub ready: bool,
    /// We made the device.
    pub ours: bool,
    /// Why it is not served, or what went wrong last.
    pub reason: Option<String>,
    /// False while it belongs to somebody else, or to nobody yet.
    pub served: bool,
}

/// What a device's task is told.
#[derive(Debug, Default)]
pub(super) struct Marks {
    pub(super) look: bool,
    pub(super) resized: bool,
    pub(super) broken: Option<String>,
    /// Its domain is dead.
    pub(super) dead: bool,
    /// The script of the device asked us to take it over from blkback.
    pub(super) claimed: bool,
    /// The operator wants the image to be opened again.
    pub(super) retry: bool,
}

/// A device as others see its task.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) marks: Mutex<Marks>,
    pub(super) wake: Notify,
    pub(super) status: watch::Sender<DeviceStatus>,
    task: OnceLock<AbortHandle>,
}

impl Entry {
    fn new(id: DeviceId) -> Entry {
        let status = DeviceStatus {
            id,
            own: None,
            front: None,
            link: Link::Idle,
            ready: false,
            ours: false,
            reason: None,
            served: false,
        };
        let marks = Marks { look: true, ..Marks::default() };
        Entry {
            marks: Mutex::new(marks),
            wake: Notify::new(),
            status: watch::channel(status).0,
            task: OnceLock::new(),
        }
    }

    fn mark(&self, change: impl FnOnce(&mut Marks)) {
        change(&mut lock(&self.marks));
        self.wake.notify_one();
    }
}

/// What all tasks share.
pub(super) struct Context<D> {
    pub(super) store: Store,
    pub(super) disks: Arc<D>,
    pub(super) host: Arc<dyn Host>,
    pub(super) features: Features,
    pub(super) own: OnceLock<Domid>,
    pub(super) entries: Mutex<BTreeMap<DeviceId, Arc<Entry>>>,
    tapback: tokio::sync::Mutex<Option<(Instant, Option<u32>)>>,
    /// Memory is kept for disks of our own domain, or why it is not.
    pub(super) kept: tokio::sync::OnceCell<Result<(), String>>,
    problems: Mutex<BTreeMap<&'static str, String>>,
}

impl<D: Disks> Context<D> {
    pub(super) fn own(&self) -> Domid {
        self.own.get().copied().unwrap_or(0)
    }

    /// A tapback that runs, as of some seconds ago at most.
    pub(super) async fn tapback(&self) -> Option<u32> {
        let mut known = self.tapback.lock().await;
        if let Some((when, found)) = *known
            && when.elapsed() < TAPBACK_KNOWN
        {
            return found;
        }
        let host = self.host.clone();
        let found = tokio::task::spawn_blocking(move || host.tapback()).await.ok().flatten();
        *known = Some((Instant::now(), found));
        found
    }

    /// Takes a device off the list, unless something new was said about it.
    pub(super) fn leave(&self, id: DeviceId, entry: &Arc<Entry>) -> bool {
        let mut entries = lock(&self.entries);
        if lock(&entry.marks).look {
            return false;
        }
        if entries.get(&id).is_some_and(|other| Arc::ptr_eq(other, entry)) {
            entries.remove(&id);
        }
        true
    }

    fn find(&self, id: DeviceId) -> Option<Arc<Entry>> {
        lock(&self.entries).get(&id).cloned()
    }

    /// Something about a device changed; its task is made if there is none.
    fn mark(self: &Arc<Self>, id: DeviceId, change: impl FnOnce(&mut Marks)) -> Arc<Entry> {
        let mut entries = lock(&self.entries);
        if let Some(entry) = entries.get(&id) {
            entry.mark(change);
            return entry.clone();
        }
        let entry = Arc::new(Entry::new(id));
        change(&mut lock(&entry.marks));
        entries.insert(id, entry.clone());
        let task = tokio::spawn(owner::run(self.clone(), id, entry.clone()));
        let _ = entry.task.set(task.abort_handle());
        entry
    }
}

/// All devices. When it is dropped its tasks end where they are: what is in XenStore stays, and so do rings.
pub struct Backend<D> {
    context: Arc<Context<D>>,
    manager: AbortHandle,
}

impl<D> Drop for Backend<D> {
    fn drop(&mut self) {
        self.manager.abort();
        let tasks: Vec<AbortHandle> =
            lock(&self.context.entries).values().filter_map(|entry| entry.task.get().cloned()).collect();
        tasks.iter().for_each(AbortHandle::abort);
    }
}

impl<D: Disks> Backend<D> {
    /// Starts to look for devices, now or as soon as there is a XenStore.
    pub fn start(store: Store, disks: Arc<D>, host: Arc<dyn Host>, features: Features) -> Backend<D> {
        let context = Arc::new(Context {
            store,
            disks,
            host,
            features,
            own: OnceLock::new(),
            kept: tokio::sync::OnceCell::new(),
            entries: Mutex::default(),
            tapback: tokio::sync::Mutex::new(None),
            problems: Mutex::default(),
        });
        let manager = tokio::spawn(manage(context.clone())).abort_handle();
        Backend { context, manager }
    }

    /// Why guests' devices are not served now, in one sentence; none when all is well.
    pub fn problem(&self) -> Option<String> {
        if let Status::Away(why) = &*self.context.store.status().borrow() {
            return Some(why.clone());
        }
        lock(&self.context.problems).values().next().cloned()
    }

    /// Every device that was found, also those of others.
    pub fn devices(&self) -> Vec<DeviceStatus> {
        lock(&self.context.entries).values().map(|entry| entry.status.borrow().clone()).collect()
    }

    /// One device.
    pub fn device(&self, id: DeviceId) -> Option<DeviceStatus> {
        self.context.find(id).map(|entry| entry.status.borrow().clone())
    }

    /// Takes a report of a shard; one about a device that is gone is dropped.
    pub fn report(&self, id: DeviceId, report: Report) {
        if let Some(entry) = self.context.find(id) {
            entry.mark(|marks| match report {
                Report::Resized => marks.resized = true,
                Report::RingBroken(why) => marks.broken = Some(why),
            });
        }
    }

    /// Has the image of a device opened again that could not be opened before.
    pub fn retry(&self, id: DeviceId) {
        if let Some(entry) = self.context.find(id) {
            entry.mark(|marks| (marks.retry, marks.look) = (true, true));
        }
    }

    /// For the script of a device: takes it over where blkback had it, and waits until its disk is ready.
    pub async fn claim(&self, id: DeviceId, deadline: Instant) -> Result<(), Problem> {
        let path = id.backend(self.context.own());
        if self.context.store.list(&path).await?.is_none() {
            return Err(Problem::new(
                ProblemKind::NotFound,
                format!("device {id}: there is no {path} in XenStore"),
            ));
        }
        let entry = self.context.mark(id, |marks| {
            (marks.claimed, marks.retry, marks.look) = (true, true, true);
        });
        // What went wrong before is not the answer to this call.
        entry.status.send_modify(|status| status.reason = None);
        let mut status = entry.status.subscribe();
        let ready = status.wait_for(|status| status.served && (status.ready || status.reason.is_some()));
        let outcome = match tokio::time::timeout_at(deadline, ready).await {
            Ok(Ok(status)) if status.ready => return Ok(()),
            Ok(Ok(status)) => (ProblemKind::Image, status.reason.clone().unwrap_or_default()),
            Ok(Err(_)) => (ProblemKind::NotFound, "it is gone from XenStore".to_owned()),
            Err(_) => {
                let status = entry.status.borrow();
                let why = status.reason.clone().or_else(|| self.problem());
                (ProblemKind::TimedOut, why.unwrap_or_else(|| "its image is still being opened".into()))
            }
        };
        Err(Problem::new(outcome.0, format!("device {id}: {}", outcome.1)))
    }

    /// Waits until a device is gone from XenStore and from its shard.
    pub async fn wait_gone(&self, id: DeviceId, deadline: Instant) -> Result<(), Problem> {
        let mut status = match self.context.find(id) {
            Some(entry) => entry.status.subscribe(),
            None => return Ok(()),
        };
        while self.context.find(id).is_some() {
            match tokio::time::timeout_at(deadline, status.changed()).await {
                Ok(Ok(())) => {}
                // Its task has ended; there may be another one for a device made anew at the same place.
                Ok(Err(_)) => return Ok(()),
                Err(_) => {
                    let status = status.borrow().clone();
                    let message = format!(
                        "device {id} is not closed: its frontend is in state {}, ours {}; the guest has to let go of it, or detach it \
                         with --force",
                        number(status.front),
                        number(status.own)
                    );
                    return Err(Problem::new(ProblemKind::TimedOut, message));
                }
            }
        }
        Ok(())
    }
}

fn number(state: Option<XenbusState>) -> String {
    state.map_or("none".into(), |state| state.number().to_string())
}

async fn manage<D: Disks>(context: Arc<Context<D>>) {
    let own = loop {
        match context.store.own_domid().await {
            Ok(own) => break own,
            Err(StoreError::Away(_)) => {
                // Whoever waits for a long time learns of it at once.
                let _ = context.store.connected(Duration::from_secs(60)).await;
            }
            Err(error) => {
                note(
                    &context,
                    "our own domain",
                    Some(format!("our own domain's number is unknown: {error}")),
                );
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
        }
    };
    let _ = context.own.set(own);
    let [vbd3, vbd] = Kind::ALL.map(|kind| scan(&context, kind));
    tokio::join!(vbd3, vbd, bury(&context));
}

/// Marks devices of one kind as they change.
async fn scan<D: Disks>(context: &Arc<Context<D>>, kind: Kind) {
    let watch = context.store.watch(backend_root(context.own(), kind), 2);
    loop {
        let changes = watch.changed().await;
        for below in &changes.below {
            match DeviceId::parse(kind, below) {
                Some(id) => {
                    context.mark(id, |marks| marks.look = true);
                }
                None => rescan_domain(context, kind, below).await,
            }
        }
        if changes.all {
            rescan(context, kind).await;
        }
    }
}

/// A domain's own directory was made or removed.
async fn rescan_domain<D: Disks>(context: &Arc<Context<D>>, kind: Kind, domain: &str) {
    let Some(domid) = DeviceId::parse(kind, &format!("{domain}/0")).map(|id| id.domid) else { return };
    let mut found: BTreeSet<DeviceId> =
        lock(&context.entries).keys().copied().filter(|id| id.kind == kind && id.domid == domid).collect();
    let path = format!("{}/{domain}", backend_root(context.own(), kind));
    let devices = context.store.list(&path).await.ok().flatten().unwrap_or_default();
    found.extend(devices.iter().filter_map(|device| DeviceId::parse(kind, &format!("{domain}/{device}"))));
    for id in found {
        context.mark(id, |marks| marks.look = true);
    }
}

/// Looks at every device that there is, and at every one that there was.
async fn rescan<D: Disks>(context: &Arc<Context<D>>, kind: Kind) {
    let root = backend_root(context.own(), kind);
    let mut found: BTreeSet<DeviceId> =
        lock(&context.entries).keys().copied().filter(|id| id.kind == kind).collect();
    match listing(context, &root, kind).await {
        Ok(listed) => {
            note(context, kind.name(), None);
            found.extend(listed);
        }
        // The connection's return marks everything again.
        Err(StoreError::Away(_)) => {}
        Err(error)
            if matches!(error.errno(), Some(Errno::TooBig | Errno::NotImplemented | Errno::Invalid)) =>
        {
            note(
                context,
                kind.name(),
                Some(format!(
                    "this xenstored cannot list {root}, which has more than 4 KiB of names (it is older than Xen 4.9): devices are found \
                     only as they are made or changed"
                )),
            );
        }
        Err(error) => {
            note(context, kind.name(), Some(format!("the devices of {root} cannot be listed: {error}")))
        }
    }
    for id in found {
        context.mark(id, |marks| marks.look = true);
    }
}

async fn listing<D: Disks>(
    context: &Arc<Context<D>>,
    root: &str,
    kind: Kind,
) -> Result<Vec<DeviceId>, StoreError> {
    let domains = context.store.list(root).await?.unwrap_or_default();
    let paths: Vec<String> = domains.iter().map(|domain| format!("{root}/{domain}")).collect();
    let devices = context.store.list_all(&paths).await?;
    let all = domains.iter().zip(devices).flat_map(|(domain, devices)| {
        let devices = devices.into_iter();
        devices.filter_map(move |device| DeviceId::parse(kind, &format!("{domain}/{device}")))
    });
    Ok(all.collect())
}

/// When a domain died: finds out which, asking once for each domain that has devices.
async fn bury<D: Disks>(context: &Arc<Context<D>>) {
    let released = context.store.watch("@releaseDomain", 0);
    loop {
        released.changed().await;
        let domains: BTreeSet<Domid> = lock(&context.entries).keys().map(|id| id.domid).collect();
        let ask = |domid| (domid, context.store.start(Request::IsDomainIntroduced(domid), None));
        let calls: Vec<_> = domains.into_iter().map(ask).collect();
        for (domid, call) in calls {
            // Without an answer it is taken to live: the next death, or connection, will tell.
            if call.answer().await.is_ok_and(|answer| answer.first() == Some(&b'F')) {
                let entries = lock(&context.entries);
                for (_, entry) in entries.iter().filter(|(id, _)| id.domid == domid) {
                    entry.mark(|marks| (marks.dead, marks.look) = (true, true));
                }
            }
        }
    }
}

/// Remembers and logs what keeps devices from being served, by topic.
pub(super) fn note<D>(context: &Context<D>, topic: &'static str, problem: Option<String>) {
    let mut known = lock(&context.problems);
    if known.get(topic) == problem.as_ref() {
        return;
    }
    match problem {
        Some(problem) => {
            tracing::warn!("guests' devices: {problem}");
            known.insert(topic, problem);
        }
        None => {
            tracing::info!("guests' devices: the trouble with {topic} is over");
            known.remove(topic);
        }
    }
}
