//! Clients without Xen: they reach a disk's blkif engine through rings in memory that they share with us, and eventfds.
//!
//! ```text
//! listener, one per disk ─▶ place (bounded) ─▶ open, offer, connect ─▶ shard: ConnectGuest ─▶ connected … end ─▶ DisconnectGuest
//! ```
//! The protocol of the socket is that of [`ring_bridge::grants::share`]; keys and their checks are those of guests of Xen.
//!
//! Invariants:
//! * a client costs a task, a socket and at most [`CHANNELS_MAX`] event channels until its rings are connected, at most for the negotiation's
//!   time; of those that negotiate there are at most `NEGOTIATING` (a quarter of them on one disk), and who was silent longest goes
//!   first;
//! * a disk has at most `CLIENTS_PER_DISK` clients with `DISK_BYTES_MAX` of memory, besides the bounds that hold for clients of NBD too;
//! * the socket is the client: when it ends, the shard finishes what the client has begun, and lets go of its memory. When the disk
//!   goes, or the client breaks a ring, the socket ends with the reason;
//! * clients get numbers of domains that no domain of Xen has, and no two clients of this process have the same, whichever disk they use: a
//!   disk may come to any shard.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ring_bridge::grants::Domid;
use ring_bridge::grants::budget::Budget;
use ring_bridge::grants::share::{self, CHANNELS_MAX, Message, ShareError};
use shard::api::{Command, Reply};
use shard::blkif::{GuestConnect, GuestCounters, GuestInUse, Transport};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::disks::{self, PATIENCE};
use super::tables;
use crate::config::Settings;
use crate::daemon::{Daemon, Disk, lock};
use crate::model::GuestDevice;
use crate::nbd::places::{Places, Ticket};
use crate::nbd::{Connecting, bind_seqpacket, pause_after_failed_accept, peer};
use crate::problem::{Problem, ProblemKind};
use crate::xen::keys::{self, Connect, Layout, Nodes};
use crate::xen::publish::{self, Features};

/// The first number of a client: numbers of Xen's domains are below 0x7ff0.
const FIRST_DOMID: Domid = 0x8000;
/// A client has one device, of this number.
const DEVID: u32 = 0;
/// Most memory of one client.
const CLIENT_BYTES_MAX: u64 = 256 << 20;
/// Most memory of all clients of one disk.
const DISK_BYTES_MAX: u64 = 1 << 30;
/// Clients of one disk.
const CLIENTS_PER_DISK: usize = 16;
/// Clients that have not connected their rings, of all disks.
const NEGOTIATING: u32 = 64;
/// How long a message may wait for a client that reads nothing.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// Pages of clients that may be mapped persistently. Each may be a memory area of the process, of which Xen's guests take half.
const PERSISTENT_PAGES: usize = 16 << 10;

/// What all clients share.
#[derive(Debug)]
pub struct SharedServer {
    places: Places,
    budget: Arc<Budget>,
    domids: Mutex<Domids>,
}

#[derive(Debug)]
struct Domids {
    last: Domid,
    taken: BTreeSet<Domid>,
}

impl SharedServer {
    /// No client yet. Tables that a dead daemon left for its clients go: their sockets ended with it.
    pub fn new(settings: &Settings) -> SharedServer {
        tables::remove_shared(&settings.run_dir);
        SharedServer {
            places: Places::default(),
            budget: Budget::new(PERSISTENT_PAGES, PERSISTENT_PAGES),
            domids: Mutex::new(Domids { last: Domid::MAX, taken: BTreeSet::new() }),
        }
    }

    /// A number that no client has, not one that was free just now.
    fn take_domid(&self) -> Option<Domid> {
        let mut domids = lock(&self.domids);
        let after = domids.last.checked_add(1).unwrap_or(FIRST_DOMID);
        let mut numbers = (after..=Domid::MAX).chain(FIRST_DOMID..after);
        let found = numbers.find(|number| !domids.taken.contains(number))?;
        domids.taken.insert(found);
        domids.last = found;
        Some(found)
    }
}

/// What a client is to hear.
#[derive(Debug, Default)]
struct News {
    /// The disk has another size.
    resized: bool,
    /// Why it is to go.
    end: Option<String>,
}

#[derive(Debug)]
struct Member {
    bytes: u64,
    news: watch::Sender<News>,
    counters: Arc<GuestCounters>,
    /// Once its rings are connected.
    in_use: Option<GuestInUse>,
}

/// The clients of one disk whose rings are connected, or are being so.
#[derive(Debug, Default)]
pub struct Clients {
    members: Mutex<BTreeMap<Domid, Member>>,
}

impl Clients {
    /// Sends a client away: nothing of it is served any more.
    pub fn end(&self, domid: Domid, reason: &str) {
        if let Some(member) = lock(&self.members).get(&domid) {
            member.news.send_modify(|news| news.end = Some(reason.to_owned()));
        }
    }

    /// Sends all away.
    pub fn end_all(&self, reason: &str) {
        for member in lock(&self.members).values() {
            member.news.send_modify(|news| news.end = Some(reason.to_owned()));
        }
    }

    /// The disk has another size.
    pub fn resized(&self) {
        for member in lock(&self.members).values() {
            member.news.send_modify(|news| news.resized = true);
        }
    }

    /// What they have.
    pub(super) fn list(&self, disk: &str) -> Vec<super::Found> {
        let members = lock(&self.members);
        let describe = |(domid, member): (&Domid, &Member)| {
            let device = GuestDevice {
                device: format!("blkif/{disk}/{domid}"),
                domain: *domid,
                vdev: "-".into(),
                disk: Some(disk.to_owned()),
                served: true,
                link: if member.in_use.is_some() { "connected" } else { "connecting" }.into(),
                ..GuestDevice::default()
            };
            (device.with(member.in_use.as_ref(), Some(&member.counters)), Some(member.counters.clone()))
        };
        members.iter().map(describe).collect()
    }

    /// Nobody is left.
    pub fn is_empty(&self) -> bool {
        lock(&self.members).is_empty()
    }
}

/// A client's entry, and its number.
struct Membership<'a> {
    daemon: &'a Daemon,
    disk: &'a Disk,
    domid: Domid,
    news: watch::Receiver<News>,
    counters: Arc<GuestCounters>,
}

impl<'a> Membership<'a> {
    fn take(daemon: &'a Daemon, disk: &'a Disk, bytes: u64) -> Result<Membership<'a>, Problem> {
        let full = |why: String| Problem::new(ProblemKind::Unavailable, format!("disk {} {why}", disk.name));
        let mut members = lock(&disk.sharers.members);
        if members.len() >= CLIENTS_PER_DISK {
            return Err(full(format!(
                "has {CLIENTS_PER_DISK} clients with shared memory: no more are allowed"
            )));
        }
        let all: u64 = members.values().map(|member| member.bytes).sum();
        if all + bytes > DISK_BYTES_MAX {
            return Err(full(format!(
                "has clients with {all} bytes of shared memory: {bytes} more would pass {DISK_BYTES_MAX}"
            )));
        }
        let domid =
            daemon.shared.take_domid().ok_or_else(|| full("gets no number for one more client".into()))?;
        let (sender, news) = watch::channel(News::default());
        let counters: Arc<GuestCounters> = Arc::default();
        members.insert(domid, Member { bytes, news: sender, counters: counters.clone(), in_use: None });
        Ok(Membership { daemon, disk, domid, news, counters })
    }

    fn connected(&self, in_use: GuestInUse) {
        if let Some(member) = lock(&self.disk.sharers.members).get_mut(&self.domid) {
            member.in_use = Some(in_use);
        }
    }
}

impl Drop for Membership<'_> {
    fn drop(&mut self) {
        lock(&self.disk.sharers.members).remove(&self.domid);
        lock(&self.daemon.shared.domids).taken.remove(&self.domid);
    }
}

/// The socket of one disk; it ends when this is dropped, its clients do not.
#[derive(Debug)]
pub struct SharedListener {
    path: PathBuf,
    waiting: Option<UnixListener>,
    task: Option<JoinHandle<()>>,
}

impl SharedListener {
    /// Binds the socket of a disk.
    pub fn bind(settings: &Settings, disk: &str) -> Result<SharedListener, Problem> {
        let path = settings.blkif_socket(disk);
        let listener: StdUnixListener = bind_seqpacket(&settings.run_dir, &path, &settings.nbd_access)?;
        // Accepting is the same for sockets of any type, and nothing else is asked of this one.
        let listener = UnixListener::from_std(listener).map_err(|error| {
            Problem::failed(format!("the socket {} cannot be used: {error}", path.display()))
        })?;
        Ok(SharedListener { path, waiting: Some(listener), task: None })
    }

    /// Starts to take clients.
    pub fn serve(&mut self, daemon: &Arc<Daemon>, disk: &Arc<str>) {
        if let Some(listener) = self.waiting.take() {
            self.task = Some(tokio::spawn(run(listener, daemon.clone(), disk.clone())));
        }
    }
}

impl Drop for SharedListener {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
        // Gone already, or a directory that is: nothing that would help anybody.
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn run(listener: UnixListener, daemon: Arc<Daemon>, disk: Arc<str>) {
    let number = crate::nbd::listener_number();
    let mut pause = None;
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                pause = None;
                let ticket = daemon.shared.places.take(number, NEGOTIATING).await;
                let place = ticket.number();
                let task = tokio::spawn(serve(daemon.clone(), disk.clone(), socket, ticket));
                daemon.shared.places.set_task(place, task.abort_handle());
            }
            Err(error) => pause = pause_after_failed_accept(pause, &error).await,
        }
    }
}

/// Serves one client until its rings are connected; from then on it is no stranger any more, and has a task that nobody ends.
async fn serve(daemon: Arc<Daemon>, name: Arc<str>, socket: UnixStream, ticket: Ticket) {
    let peer = peer::of_unix(&socket);
    let negotiation = negotiate(&daemon, &name, &socket, &ticket);
    let timeout = daemon.nbd.limits().negotiation_timeout;
    match tokio::time::timeout(timeout, negotiation).await {
        Ok(Ok(agreed)) => {
            tokio::spawn(async move {
                if let Err(problem) = attend(&daemon, &name, &socket, agreed, &peer).await {
                    tracing::warn!(disk = &*name, "blkif client {peer}: {problem}");
                    say(&socket, &problem.message);
                }
            });
        }
        Ok(Err(problem)) => {
            tracing::debug!(disk = &*name, "blkif client {peer} was refused: {problem}");
            say(&socket, &problem.message);
        }
        Err(_) => {
            tracing::info!(disk = &*name, "blkif client {peer} did not connect its rings in time");
            say(&socket, "the rings were not connected in time");
        }
    }
}

/// What a client wants, checked as far as that needs no shard.
struct Agreed {
    opened: share::Opened,
    layout: Layout,
    nodes: Nodes,
}

/// Until the client has named its rings.
async fn negotiate(
    daemon: &Daemon,
    name: &str,
    socket: &UnixStream,
    ticket: &Ticket,
) -> Result<Agreed, Problem> {
    let (message, fds) = receive(socket).await.map_err(refused)?;
    ticket.spoke();
    let mut opened = share::accept_open(message, fds, CLIENT_BYTES_MAX).map_err(refused)?;
    if opened.disk != name {
        let message = format!("disk {:?} is not served here: this is the socket of {name}", opened.disk);
        return Err(Problem::invalid(message));
    }
    let disk = daemon.disk(name)?;
    daemon.may_connect(&disk, 1)?;
    let channels = opened.channels.len() as u32;
    let features = Features { max_queues: channels, ..Features::default() };
    let theirs = std::mem::take(&mut opened.theirs);
    let offer = owned(publish::features(&features));
    when_ready(socket, Interest::WRITABLE, || share::send_offer(socket, offer.clone(), &theirs))
        .await
        .map_err(refused)?;
    drop(theirs);
    let (message, fds) = receive(socket).await.map_err(refused)?;
    ticket.spoke();
    if message.kind != share::Kind::Connect || !fds.is_empty() {
        return Err(Problem::invalid("a `connect` without descriptors has to follow the `offer`"));
    }
    let nodes: Nodes = message.keys.into_iter().map(|(key, value)| (key, Some(value.into_bytes()))).collect();
    let offer =
        keys::Offer { ring_page_order: features.max_ring_page_order, queues: channels, first_port: 0 };
    let layout = Layout::read(&nodes, offer).map_err(|error| Problem::invalid(error.to_string()))?;
    Ok(Agreed { opened, layout, nodes })
}

/// Connects the rings, and lets go of them at the end.
async fn attend(
    daemon: &Arc<Daemon>,
    name: &str,
    socket: &UnixStream,
    agreed: Agreed,
    peer: &str,
) -> Result<(), Problem> {
    let Agreed { opened, layout, nodes } = agreed;
    let disk = daemon.disk(name)?;
    let bytes = u64::from(opened.memory.pages()) * ring_bridge::grants::PAGE_BYTES as u64;
    let mut membership = Membership::take(daemon, &disk, bytes)?;
    let domid = membership.domid;
    let connect =
        layout.connect(domid, DEVID, &nodes).map_err(|error| Problem::invalid(error.to_string()))?;
    let tables =
        Tables { run_dir: daemon.settings().run_dir.clone(), device: tables::shared_device(domid, DEVID) };
    let transport = Transport::Shared {
        memory: opened.memory,
        channels: opened.channels.into_iter().map(Arc::new).collect(),
    };
    let counters = membership.counters.clone();
    let in_use = connect_rings(daemon, &disk, &tables, connect, transport, counters, peer).await?;
    membership.connected(in_use);
    tracing::debug!(disk = name, "blkif client {peer} connected as domain {domid}");
    let ended = attend_connected(&disk, socket, &mut membership.news).await;
    let find = || daemon.find(name).filter(|found| Arc::ptr_eq(found, &disk));
    disks::disconnect(|| find().map(|disk| (daemon.clone(), disk)), domid, DEVID).await;
    drop(tables);
    tracing::debug!(disk = name, "blkif client {peer} (domain {domid}) has gone");
    ended
}

/// Tables of requests in flight; they go when this is dropped.
struct Tables {
    run_dir: PathBuf,
    device: String,
}

impl Drop for Tables {
    fn drop(&mut self) {
        tables::remove(&self.run_dir, &self.device, CHANNELS_MAX);
    }
}

/// Has the disk's shard serve the rings.
async fn connect_rings(
    daemon: &Arc<Daemon>,
    disk: &Arc<Disk>,
    tables: &Tables,
    connect: Connect,
    transport: Transport,
    counters: Arc<GuestCounters>,
    peer: &str,
) -> Result<GuestInUse, Problem> {
    let _counted = Connecting::new(disk);
    // Waits while the disk is on its way to another shard.
    let _place = tokio::time::timeout(PATIENCE, disk.place.read()).await.map_err(|_| {
        let message = format!("disk {} was on its way to another shard for too long", disk.name);
        Problem::new(ProblemKind::TimedOut, message)
    })?;
    daemon.may_connect(disk, 0)?;
    let busy = || Problem::new(ProblemKind::Busy, format!("disk {} is not served now", disk.name));
    let (id, shard) = disk.place().ok_or_else(busy)?;
    let features = Features::default();
    let offer = disks::offer(disk, &features, false, true).ok_or_else(busy)?;
    let segments = offer.indirect_segments_max;
    let guest = Box::new(GuestConnect {
        domid: connect.domid,
        devid: connect.devid,
        peer: Some(format!("blkif {peer}").into()),
        abi: disks::abi(connect.protocol),
        transport,
        numbered: connect.numbered,
        queues: tables::make_all(&tables.run_dir, &tables.device, &connect.queues, segments).await?,
        persistent: connect.persistent.then(|| daemon.shared.budget.clone()),
        offer,
        recover: false,
        counters,
    });
    match daemon.fleet.call(shard, Command::ConnectGuest { disk: id, guest }).await? {
        Reply::GuestConnected(in_use) => Ok(*in_use),
        other => Err(Problem::failed(format!("unexpected answer to a connect: {other:?}"))),
    }
}

/// Until the client or its disk goes. An error: the client has to be told.
async fn attend_connected(
    disk: &Disk,
    socket: &UnixStream,
    news: &mut watch::Receiver<News>,
) -> Result<(), Problem> {
    let tell = async || {
        let offer = disks::offer(disk, &Features::default(), false, true);
        let properties = offer.and_then(|offer| disks::properties(disk, &offer));
        let Some(properties) = properties else { return Ok(()) };
        let message = Message::new(share::Kind::Connected, owned(publish::properties(&properties)));
        let sent = when_ready(socket, Interest::WRITABLE, || share::send(socket, &message, &[]));
        tokio::time::timeout(SEND_TIMEOUT, sent).await.unwrap_or(Err(ShareError::NotReady))
    };
    tell().await.map_err(refused)?;
    loop {
        tokio::select! {
            received = receive(socket) => return match received {
                Err(ShareError::Closed) => Ok(()),
                Err(error) => Err(refused(error)),
                Ok(_) => Err(Problem::invalid("nothing may follow the `connect`")),
            },
            changed = news.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let (resized, end) = {
                    let news = news.borrow_and_update();
                    (news.resized, news.end.clone())
                };
                if let Some(reason) = end {
                    return Err(Problem::new(ProblemKind::Unavailable, reason));
                }
                if resized {
                    tell().await.map_err(refused)?;
                }
            }
        }
    }
}

fn owned(pairs: publish::Pairs) -> Vec<(String, String)> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

fn refused(error: ShareError) -> Problem {
    Problem::invalid(error.to_string())
}

/// Tells a client why it has to go, if it listens.
fn say(socket: &UnixStream, reason: &str) {
    let reason = reason.chars().filter(|c| !c.is_control()).take(1000).collect();
    let message = Message::new(share::Kind::Error, [("reason".to_owned(), reason)]);
    // It has gone, or reads nothing.
    let _ = share::send(socket, &message, &[]);
}

async fn receive(socket: &UnixStream) -> Result<(Message, Vec<std::os::fd::OwnedFd>), ShareError> {
    when_ready(socket, Interest::READABLE, || share::receive(socket)).await
}

/// Waits until the socket is ready for what is to be done.
async fn when_ready<T>(
    socket: &UnixStream,
    interest: Interest,
    mut act: impl FnMut() -> Result<T, ShareError>,
) -> Result<T, ShareError> {
    loop {
        if socket.ready(interest).await.is_err() {
            return Err(ShareError::Closed);
        }
        let tried = socket.try_io(interest, || match act() {
            Err(ShareError::NotReady) => Err(ErrorKind::WouldBlock.into()),
            done => Ok(done),
        });
        match tried {
            Ok(done) => return done,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return Err(ShareError::Closed),
        }
    }
}
