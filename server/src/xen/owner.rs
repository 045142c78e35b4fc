//! One device's task: looks at XenStore, asks [`step`] what to do, and does it.
//!
//! ```text
//! wait for a mark ─▶ look (four reads at once) ─▶ step ─▶ write in a transaction ─▶ start a call to Disks
//!      ▲                                                                                  │ its end is the next event
//!      └──────────────────────────────────────────────────────────────────────────────────┘
//! ```
//! Invariants: at most one connect or disconnect is under way; its end is never lost, even when XenStore is away meanwhile. How often
//! a guest can make us look or connect is bounded.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::backend::{Context, DeviceStatus, Disks, Entry, TAPBACK_KNOWN, note};
use super::batch::{Batch, Condition, Outcome};
use super::client::{Store, StoreError, Watch};
use super::create;
use super::device::{DeviceId, Kind};
use super::keys::{Connect, KeyError, Layout, Nodes, Offer, top_names};
use super::publish::{Pairs, features, properties};
use super::spec::{self, Owner, Wanted};
use super::xenbus::{Action, DiskIs, Event, Link, Step, View, Why, XenbusState, step};
use crate::daemon::lock;

/// A guest that writes its state without pause makes us look this often at most, after a burst.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Looks at once.
const LOOK_BURST: u32 = 20;
/// A guest that connects and closes without pause does so this often at most.
const CONNECT_EVERY: Duration = Duration::from_millis(100);
/// After an error of XenStore.
const RETRY: Duration = Duration::from_millis(500);

type Running<T> = Option<Pin<Box<dyn Future<Output = T> + Send>>>;

/// The end of a future that may be there.
async fn end<T>(running: &mut Running<T>) -> T {
    match running {
        Some(future) => {
            let value = future.await;
            *running = None;
            value
        }
        None => std::future::pending().await,
    }
}

/// Takes the device off the list when its task ends in any way, a panic included.
struct Guard<D: Disks> {
    context: Arc<Context<D>>,
    id: DeviceId,
    entry: Arc<Entry>,
}

impl<D: Disks> Drop for Guard<D> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(
                "device {}: its task failed: report the log; it is looked at again when it changes",
                self.id
            );
            lock(&self.entry.marks).look = false;
        }
        self.context.leave(self.id, &self.entry);
        self.entry.status.send_modify(|status| (status.served, status.own) = (false, None));
    }
}

/// Runs until the device is gone from XenStore.
pub(super) async fn run<D: Disks>(context: Arc<Context<D>>, id: DeviceId, entry: Arc<Entry>) {
    let _guard = Guard { context: context.clone(), id, entry: entry.clone() };
    loop {
        let Some((wanted, own)) = adopt(&context, id, &entry).await else {
            if context.leave(id, &entry) {
                return;
            }
            continue;
        };
        let mut owner = Task::new(&context, id, &entry, wanted, own);
        owner.serve().await;
        drop(owner);
        context.disks.removed(id).await;
        entry.status.send_modify(|status| (status.served, status.ready) = (false, false));
    }
}

/// Waits until the device is ours to serve; none when it is gone. The state is the one that it is found in.
async fn adopt<D: Disks>(
    context: &Arc<Context<D>>,
    id: DeviceId,
    entry: &Arc<Entry>,
) -> Option<(Wanted, XenbusState)> {
    loop {
        let mut by_tapback = false;
        let claimed = {
            let mut marks = lock(&entry.marks);
            marks.look = false;
            marks.claimed
        };
        let reason = match read_spec(&context.store, id, context.own()).await {
            Ok((Owner::Nobody, _)) => {
                if !exists(context, id).await {
                    return None;
                }
                "its directory has no state yet".to_owned()
            }
            Ok((Owner::Other(reason), _)) => reason,
            Ok((Owner::Us(wanted), own)) => match free_of_others(context, &wanted, claimed).await {
                Ok(()) => {
                    // A death that was noticed before the device was known is not noticed again.
                    let alive = context.store.domain_exists(id.domid).await.unwrap_or(true);
                    lock(&entry.marks).dead = !alive;
                    if id.domid == context.own() {
                        keep_memory(context).await;
                    }
                    return Some((wanted, own));
                }
                Err(reason) => {
                    by_tapback = id.kind == Kind::Vbd3;
                    reason
                }
            },
            Err(error) => error.to_string(),
        };
        entry.status.send_modify(|status| {
            status.served = false;
            status.reason = Some(reason);
        });
        // Of all that may change, only the end of tapback leaves no trace in XenStore.
        let tapback_ends = async {
            while by_tapback && context.tapback().await.is_some() {
                tokio::time::sleep(TAPBACK_KNOWN).await;
            }
            if !by_tapback {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = entry.wake.notified() => {}
            () = tapback_ends => {}
        }
    }
}

/// Before a disk of this very domain is served.
async fn keep_memory<D: Disks>(context: &Arc<Context<D>>) {
    let keep = async || {
        let context = context.clone();
        tokio::task::spawn_blocking(move || context.host.keep_memory()).await.unwrap_or(Ok(()))
    };
    if let Err(why) = context.kept.get_or_init(keep).await {
        tracing::warn!(
            "a disk is used in the domain that serves it, and under memory pressure both may wait for each other: {why}"
        );
    }
}

async fn read_spec(store: &Store, id: DeviceId, own: u16) -> Result<(Owner, XenbusState), StoreError> {
    let values = store.read_all(&spec::paths(id, own)).await?;
    let state = values.first().and_then(Option::as_deref).map_or(XenbusState::Unknown, XenbusState::parse);
    Ok((spec::read(id, &values), state))
}

async fn exists<D: Disks>(context: &Arc<Context<D>>, id: DeviceId) -> bool {
    !matches!(context.store.list(&id.backend(context.own())).await, Ok(None))
}

/// Nobody else serves this device. The error says who does.
async fn free_of_others<D: Disks>(
    context: &Arc<Context<D>>,
    wanted: &Wanted,
    claimed: bool,
) -> Result<(), String> {
    let id = wanted.id;
    match id.kind {
        Kind::Vbd3 => match context.tapback().await {
            None => {
                note(context, "tapback", None);
                Ok(())
            }
            Some(pid) => {
                let reason = format!(
                    "tapback (process {pid}) runs and serves all devices of backend/vbd3: stop it, and blktapd takes over within seconds"
                );
                // Devices without our name on them may well be meant for tapback.
                if wanted.by_script || wanted.disk.is_some() {
                    note(context, "tapback", Some(reason.clone()));
                }
                Err(reason)
            }
        },
        Kind::Vbd if context.host.blkback_has(id) => Err(format!(
            "the kernel's xen-blkback has it: write vbd-{}-{} to /sys/bus/xen-backend/drivers/vbd/unbind, as the script {} does",
            id.domid,
            id.devid,
            spec::SCRIPT
        )),
        Kind::Vbd if context.host.blkback_loaded() && !claimed => Err(format!(
            "the kernel's xen-blkback is loaded, so the script {} takes it over first",
            spec::SCRIPT
        )),
        Kind::Vbd => Ok(()),
    }
}

/// What a look found.
struct Look {
    own: Option<XenbusState>,
    front: Option<XenbusState>,
    online: bool,
}

struct Task<'a, D: Disks> {
    context: &'a Arc<Context<D>>,
    id: DeviceId,
    entry: &'a Arc<Entry>,
    front: Watch,
    wanted: Wanted,
    link: Link,
    disk: DiskIs,
    announced: bool,
    /// Our state at the last look.
    last_own: Option<XenbusState>,
    /// The directory may be another one than that which the disk was opened for.
    is_stale: bool,
    /// An event whose look failed.
    pending: Option<Event>,
    trouble: Option<String>,
    opening: Running<Result<(), String>>,
    connecting: Running<Result<(), String>>,
    draining: Running<()>,
    retry_at: Option<Instant>,
    not_before: Instant,
    looks: u32,
    looks_since: Instant,
    size_to_tell: bool,
    error_written: bool,
}

impl<'a, D: Disks> Task<'a, D> {
    fn new(
        context: &'a Arc<Context<D>>,
        id: DeviceId,
        entry: &'a Arc<Entry>,
        wanted: Wanted,
        own: XenbusState,
    ) -> Task<'a, D> {
        // Rings that somebody served before this daemon started; `Closing` may mean that, too.
        let awaits = matches!(own, XenbusState::Connected | XenbusState::Closing);
        context.disks.awaiting(id, awaits);
        let now = Instant::now();
        let mut task = Task {
            context,
            id,
            entry,
            front: context.store.watch(format!("{}/state", id.frontend()), 0),
            wanted,
            link: if awaits { Link::Awaiting } else { Link::Idle },
            disk: DiskIs::Pending,
            announced: false,
            last_own: Some(own),
            is_stale: false,
            pending: Some(Event::Look),
            trouble: None,
            opening: None,
            connecting: None,
            draining: None,
            retry_at: None,
            not_before: now,
            looks: 0,
            looks_since: now,
            size_to_tell: false,
            error_written: false,
        };
        task.open();
        task
    }

    fn open(&mut self) {
        self.disk = DiskIs::Pending;
        let (disks, wanted) = (self.context.disks.clone(), self.wanted.clone());
        self.opening =
            Some(Box::pin(async move { disks.open(&wanted).await.map_err(|problem| problem.to_string()) }));
    }

    /// Until the backend directory is gone and nothing is mapped.
    async fn serve(&mut self) {
        loop {
            let event = match self.pending.take() {
                Some(event) => event,
                None => self.next_event().await,
            };
            self.pace().await;
            let look = match self.look().await {
                Ok(look) => look,
                Err(error) => {
                    self.later(error.to_string());
                    self.entry.status.send_modify(|status| status.reason = Some(error.to_string()));
                    if event != Event::Look {
                        self.pending = Some(event);
                        tokio::time::sleep(RETRY).await;
                    }
                    continue;
                }
            };
            self.renew(&look).await;
            let view = self.view(&look);
            let out = step(self.link, view, event);
            self.link = out.link;
            let is_over = self.execute(&view, out).await;
            self.publish_status(&view);
            if is_over {
                return;
            }
        }
    }

    /// Something to look again for, in a moment.
    fn later(&mut self, why: String) {
        tracing::debug!("device {}: {why}", self.id);
        self.retry_at = Some(Instant::now() + RETRY);
    }

    async fn next_event(&mut self) -> Event {
        loop {
            let retry = {
                let mut marks = lock(&self.entry.marks);
                // A report may overtake the answer to the connect; one about rings that are gone says nothing.
                if self.connecting.is_none()
                    && let Some(why) = marks.broken.take()
                    && self.link == Link::Connected
                {
                    self.trouble = Some(why);
                    return Event::RingBroken;
                }
                self.size_to_tell |= std::mem::take(&mut marks.resized);
                let retry = std::mem::take(&mut marks.retry);
                if std::mem::take(&mut marks.look) && !retry {
                    return Event::Look;
                }
                retry
            };
            if retry {
                if self.disk == DiskIs::Failed {
                    self.open();
                }
                return Event::Look;
            }
            if std::mem::take(&mut self.size_to_tell) {
                return Event::Resized;
            }
            let retry_at = self.retry_at;
            tokio::select! {
                biased;
                outcome = end(&mut self.opening) => {
                    self.opened(outcome);
                    return Event::Look;
                }
                outcome = end(&mut self.connecting) => return self.connected(outcome),
                () = end(&mut self.draining) => return Event::Drained,
                () = self.entry.wake.notified() => {}
                _ = self.front.changed() => return Event::Look,
                () = tokio::time::sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => {
                    self.retry_at = None;
                    return Event::Look;
                }
            }
        }
    }

    fn opened(&mut self, outcome: Result<(), String>) {
        self.disk = match outcome {
            Ok(()) => {
                self.trouble = None;
                DiskIs::Ready
            }
            Err(why) => {
                tracing::warn!("device {}: {why}", self.id);
                self.trouble = Some(why);
                DiskIs::Failed
            }
        };
    }

    fn connected(&mut self, outcome: Result<(), String>) -> Event {
        match outcome {
            Ok(()) => {
                self.trouble = None;
                Event::Connected
            }
            Err(why) => {
                tracing::warn!("device {}: not connected: {why}", self.id);
                self.trouble = Some(why);
                Event::ConnectFailed
            }
        }
    }

    /// Bounds how often a guest can make us look.
    async fn pace(&mut self) {
        if self.looks_since.elapsed() >= LOOK_EVERY * LOOK_BURST {
            (self.looks, self.looks_since) = (0, Instant::now());
        }
        self.looks += 1;
        if self.looks > LOOK_BURST {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn look(&mut self) -> Result<Look, StoreError> {
        let backend = self.id.backend(self.context.own());
        let paths = [
            format!("{backend}/state"),
            format!("{backend}/online"),
            format!("{}/state", self.id.frontend()),
        ];
        let values = self.context.store.read_all(&paths).await?;
        let [own, online, front] = &values[..] else {
            return Err(StoreError::Away("an answer is missing".into()));
        };
        let own = match own {
            Some(value) => Some(XenbusState::parse(value)),
            // A directory may be there without its state.
            None if online.is_some() => Some(XenbusState::Unknown),
            None => None,
        };
        let front = front.as_deref().map(XenbusState::parse).filter(|state| *state != XenbusState::Unknown);
        let dead = lock(&self.entry.marks).dead;
        Ok(Look {
            own,
            front: front.filter(|_| !dead),
            online: !dead && online.as_deref().is_none_or(|value| value == b"1"),
        })
    }

    fn view(&mut self, look: &Look) -> View {
        let paced = self.disk == DiskIs::Ready && Instant::now() < self.not_before;
        if paced && self.link == Link::Idle {
            self.retry_at = Some(self.not_before);
        }
        View {
            own: look.own,
            front: look.front,
            online: look.online,
            disk: if paced { DiskIs::Pending } else { self.disk },
            ours: self.wanted.disk.is_some(),
            announced: self.announced,
        }
    }

    /// A directory that is new in state 1 may be another one at the same place: with another image. While rings are mapped the old
    /// image is in use; the first look after the drain comes back to this, before anything can be connected.
    async fn renew(&mut self, look: &Look) {
        let is_new = look.own == Some(XenbusState::Initialising) && self.last_own != look.own;
        self.is_stale |= is_new;
        self.last_own = look.own;
        if !self.is_stale || self.link != Link::Idle {
            return;
        }
        // What cannot be read, or is not ours any more, is looked at again.
        let Ok((Owner::Us(wanted), _)) = read_spec(&self.context.store, self.id, self.context.own()).await
        else {
            return;
        };
        (self.is_stale, self.announced) = (false, false);
        if wanted != self.wanted || self.disk == DiskIs::Failed {
            // An opening that is under way ends first: one call at a time.
            if self.opening.is_some() {
                let _ = end(&mut self.opening).await;
            }
            self.context.disks.removed(self.id).await;
            self.wanted = wanted;
            self.open();
        }
    }

    /// Does what a step says. True when the device is over.
    async fn execute(&mut self, view: &View, out: Step) -> bool {
        let does = |action| out.actions.contains(&action);
        if let Some(state) = out.write {
            let failure = out.actions.iter().find_map(|action| match action {
                Action::Fail(why) => Some(*why),
                _ => None,
            });
            let mut pairs = Pairs::new();
            let known = self.context.disks.properties(self.id);
            if does(Action::Announce) {
                pairs.extend(features(&self.context.features));
            }
            if does(Action::Announce) || does(Action::Publish) {
                pairs.extend(known.as_ref().map(properties).unwrap_or_default());
            }
            if does(Action::PublishSize) {
                pairs.extend(known.map(|known| ("sectors", known.sectors.to_string())));
            }
            let is_written = self.write(view, state, pairs, failure).await;
            self.announced |= is_written && does(Action::Announce);
            self.size_to_tell |= !is_written && does(Action::PublishSize);
        }
        if does(Action::ReportBroken) {
            let why = self.trouble.clone().unwrap_or_default();
            tracing::warn!("device {}: {why}", self.id);
            let batch = self.error_batch(view.own, &why);
            self.apply(batch).await;
        }
        if does(Action::Connect) {
            self.not_before = Instant::now() + CONNECT_EVERY;
            self.connecting = Some(Box::pin(connect(self.context.clone(), self.id)));
        }
        if does(Action::Disconnect) {
            let (disks, id) = (self.context.disks.clone(), self.id);
            self.draining = Some(Box::pin(async move { disks.disconnect(id).await }));
        }
        if does(Action::Remove)
            && let Err(error) = create::remove_closed(&self.context.store, self.context.own(), self.id).await
        {
            self.later(error.to_string());
        }
        if does(Action::Free) {
            if self.error_written {
                let error = self.id.error(self.context.own());
                if self.apply(Batch::new().remove(error.clone())).await
                    && let Err(error) = create::prune(&self.context.store, &[error]).await
                {
                    tracing::debug!("device {}: {error}", self.id);
                }
            }
            if self.opening.is_some() {
                let _ = end(&mut self.opening).await;
            }
            return true;
        }
        false
    }

    /// Writes our state with what goes with it; false when the toolstack was faster, or XenStore is away.
    async fn write(&mut self, view: &View, state: XenbusState, pairs: Pairs, failure: Option<Why>) -> bool {
        let backend = self.id.backend(self.context.own());
        let mut batch = match failure {
            None => self.own_is(view.own),
            Some(_) => {
                let why = self.trouble.clone().unwrap_or_else(|| "it failed".into());
                self.error_batch(view.own, &why)
            }
        };
        for (name, value) in pairs {
            batch = batch.write(format!("{backend}/{name}"), value);
        }
        self.apply(batch.write(format!("{backend}/state"), state.number())).await
    }

    /// A change that is made only if our state is still this one: neither is a directory made again that was removed, nor a state
    /// overwritten that the toolstack wrote meanwhile.
    fn own_is(&self, own: Option<XenbusState>) -> Batch {
        let path = format!("{}/state", self.id.backend(self.context.own()));
        let state = own.unwrap_or(XenbusState::Unknown);
        Batch::new().only_if(Condition::Equals(path, state.number().to_string()))
    }

    fn error_batch(&mut self, own: Option<XenbusState>, why: &str) -> Batch {
        self.error_written = true;
        // A node takes less than a message; a sentence of ours is far shorter.
        let why: String = why.chars().take(500).collect();
        self.own_is(own).write(format!("{}/error", self.id.error(self.context.own())), why)
    }

    async fn apply(&mut self, batch: Batch) -> bool {
        match self.context.store.apply(&batch).await {
            Ok(Outcome::Committed) => true,
            Ok(Outcome::Refused(_)) => {
                self.retry_at = Some(Instant::now());
                false
            }
            Err(error) => {
                self.trouble = Some(error.to_string());
                self.later(error.to_string());
                false
            }
        }
    }

    fn publish_status(&self, view: &View) {
        let status = DeviceStatus {
            id: self.id,
            own: view.own,
            front: view.front,
            link: self.link,
            ready: self.disk == DiskIs::Ready,
            ours: view.ours,
            reason: match self.link {
                Link::Awaiting => Some(
                    "its rings belong to a daemon that is gone: awaiting recovery; the guest is served again when it restarts"
                        .into(),
                ),
                _ => self.trouble.clone(),
            },
            served: true,
        };
        self.entry.status.send_if_modified(|known| {
            let changed = *known != status;
            *known = status;
            changed
        });
    }
}

/// Reads the frontend's nodes once, checks them, and has the shard connect.
async fn connect<D: Disks>(context: Arc<Context<D>>, id: DeviceId) -> Result<(), String> {
    let features = context.features;
    let (ring_page_order, queues) = (features.max_ring_page_order, features.max_queues);
    let offer = Offer { ring_page_order, queues, first_port: 1 };
    let connect = loop {
        match read_connect(&context.store, id, offer).await {
            Ok(checked) => break checked.map_err(|error| error.to_string())?,
            Err(StoreError::Away(_)) => tokio::time::sleep(RETRY).await,
            Err(error) => return Err(error.to_string()),
        }
    };
    let connect = Connect { persistent: connect.persistent && context.features.persistent, ..connect };
    context.disks.connect(id, connect).await.map_err(|problem| problem.to_string())
}

/// Reads and checks what a frontend published.
pub async fn read_connect(
    store: &Store,
    id: DeviceId,
    offer: Offer,
) -> Result<Result<Connect, KeyError>, StoreError> {
    let top = read_nodes(store, id, top_names()).await?;
    let layout = match Layout::read(&top, offer) {
        Ok(layout) => layout,
        Err(error) => return Ok(Err(error)),
    };
    let rings = read_nodes(store, id, layout.names()).await?;
    Ok(layout.connect(id.domid, id.devid, &rings))
}

async fn read_nodes(store: &Store, id: DeviceId, names: Vec<String>) -> Result<Nodes, StoreError> {
    let frontend = id.frontend();
    let paths: Vec<String> = names.iter().map(|name| format!("{frontend}/{name}")).collect();
    let values = store.read_all(&paths).await?;
    Ok(names.into_iter().zip(values).collect())
}
