//! What devices need of the daemon: their disks opened, their rings connected to the disk's shard.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use ring_bridge::blkif::wire::Abi;
use ring_bridge::grants::budget::Budget;
use shard::api::{Command, Reply, ShardErrorKind};
use shard::blkif::{GuestConnect, GuestCounters, GuestInUse, Offer, Transport};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::tables;
use crate::daemon::disk::Standing;
use crate::daemon::{Daemon, Disk, lock};
use crate::model::{self, AttachRequest, Level, State};
use crate::problem::{Problem, ProblemKind};
use crate::xen::backend::Disks;
use crate::xen::client::Store;
use crate::xen::device::DeviceId;
use crate::xen::keys::{Connect, Protocol, QUEUES_MAX};
use crate::xen::publish::{Discard, Features, Properties};
use crate::xen::spec::Wanted;
use formats::spec::{ImageSpec, ImageType};

/// A toolstack waits ten seconds for a device, then it takes the whole guest back.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a guest waits for a disk that is on its way to another shard.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at a disk that is on no shard, or that somebody else has yet.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How long a guest that has let go of its device waits for answers; then what has not begun is dropped.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

/// A device that is served.
#[derive(Debug)]
struct Device {
    /// This very disk: another one of that name is somebody else's.
    disk: Arc<Disk>,
    wanted: Wanted,
    counters: Arc<GuestCounters>,
    in_use: Option<GuestInUse>,
}

/// Devices and their disks.
#[derive(Debug)]
pub struct GuestDisks {
    daemon: Weak<Daemon>,
    run_dir: PathBuf,
    budget: Arc<Budget>,
    features: Features,
    devices: Mutex<BTreeMap<DeviceId, Device>>,
    /// Detaches of disks whose devices are gone: a device that is made anew in the same place waits for them.
    leaving: Mutex<BTreeMap<DeviceId, JoinHandle<()>>>,
}

impl GuestDisks {
    pub(super) fn new(daemon: &Arc<Daemon>, budget: Arc<Budget>, features: Features) -> GuestDisks {
        let run_dir = daemon.settings().run_dir.clone();
        let daemon = Arc::downgrade(daemon);
        GuestDisks { daemon, run_dir, budget, features, devices: Mutex::default(), leaving: Mutex::default() }
    }

    pub(super) fn disk_of(&self, id: DeviceId) -> Option<String> {
        lock(&self.devices).get(&id).map(|device| device.disk.name.to_string())
    }

    pub(super) fn details(&self, id: DeviceId) -> (Option<String>, Option<GuestInUse>) {
        let devices = lock(&self.devices);
        devices
            .get(&id)
            .map_or((None, None), |device| (Some(device.disk.name.to_string()), device.in_use.clone()))
    }

    pub(super) fn counters(&self, id: DeviceId) -> Option<Arc<GuestCounters>> {
        lock(&self.devices).get(&id).map(|device| device.counters.clone())
    }

    fn daemon(&self) -> Result<Arc<Daemon>, Problem> {
        let stopping = || Problem::new(ProblemKind::Unavailable, "the daemon is stopping");
        self.daemon.upgrade().filter(|daemon| !daemon.is_stopping()).ok_or_else(stopping)
    }

    /// The disk of a device that is served, while it is attached. Also while the daemon is stopping.
    fn disk(&self, id: DeviceId) -> Result<(Arc<Daemon>, Arc<Disk>), Problem> {
        let gone = || Problem::new(ProblemKind::NotFound, format!("the disk of device {id} was detached"));
        let disk = lock(&self.devices).get(&id).map(|device| device.disk.clone()).ok_or_else(gone)?;
        let daemon = self.daemon.upgrade().ok_or_else(gone)?;
        if daemon.has(&disk) { Ok((daemon, disk)) } else { Err(gone()) }
    }

    fn offer(&self, id: DeviceId) -> Option<Offer> {
        let (_, disk) = self.disk(id).ok()?;
        let devices = lock(&self.devices);
        let wanted = &devices.get(&id)?.wanted;
        offer(&disk, &self.features, wanted.read_only, wanted.discard)
    }

    fn remove_tables(&self, id: DeviceId) {
        tables::remove(&self.run_dir, &tables::device(id), QUEUES_MAX as usize);
    }

    /// Opens a device's disk once.
    async fn open_now(&self, wanted: &Wanted, deadline: Instant) -> Result<Arc<Disk>, Problem> {
        let daemon = self.daemon()?;
        let id = wanted.id;
        if let Some(name) = &wanted.disk {
            let disk = daemon.disk(name)?;
            if disk.inner().attachment.device.as_deref() != Some(&id.to_string()) {
                return Err(Problem::new(
                    ProblemKind::Conflict,
                    format!("disk {name} was not attached to device {id}: remove the device from XenStore"),
                ));
            }
            daemon.bring_up_again(&disk, deadline).await?;
            return Ok(disk);
        }
        let name = format!("{}-{}-{}", id.kind.name(), id.domid, id.devid);
        let request = AttachRequest {
            image: model::Image::Parts(image_of(&wanted.params)?),
            read_only: wanted.read_only,
            nbd: true,
            blkif: false,
            guest: None,
            limits: crate::limit_change::LimitChange::default(),
            groups: Vec::new(),
            on_error: None,
            on_enospc: None,
            shard: None,
        };
        daemon.attach_device(&name, request, id, deadline).await?;
        daemon.disk(&name)
    }

    /// Detaches disks of devices that XenStore does not have any more: those whose domain ended while the daemon was away, and those
    /// that could not be detached when their device went.
    pub(super) async fn sweep(&self, store: &Store) {
        let (Ok(daemon), Ok(own)) = (self.daemon(), store.own_domid().await) else { return };
        for disk in daemon.all_disks() {
            let device = disk.inner().attachment.device.clone();
            let device = device.and_then(|device| DeviceId::from_xenbus_path(&format!("backend/{device}")));
            let Some(device) = device.filter(|_| !disk.device_to_come.load(Ordering::Relaxed)) else {
                continue;
            };
            if matches!(store.list(&device.backend(own)).await, Ok(None)) {
                self.leave(daemon.clone(), device, disk);
            }
        }
    }

    /// Detaches a disk in the background.
    fn leave(&self, daemon: Arc<Daemon>, id: DeviceId, disk: Arc<Disk>) {
        let mut leaving = lock(&self.leaving);
        leaving.retain(|_, task| !task.is_finished());
        // One that is under way has its time; the next sweep looks again.
        if leaving.contains_key(&id) {
            return;
        }
        let task = tokio::spawn(async move {
            let deadline = Instant::now() + crate::daemon::DEFAULT_TIMEOUT;
            match daemon.detach_disk(&disk, false, deadline).await {
                Err(problem) if problem.kind != ProblemKind::NotFound => {
                    let message = format!(
                        "its device {id} is gone, and it could not be detached: {problem}; it is tried again"
                    );
                    daemon.events.record(Level::Error, Some(&disk.name), message);
                }
                _ => {}
            }
        });
        leaving.insert(id, task);
    }

    /// Tells the disk's shard, whichever it is meanwhile.
    async fn tell(
        &self,
        disk: &Arc<Disk>,
        command: impl FnOnce(shard::api::DiskId) -> Command,
    ) -> Result<Reply, Problem> {
        let daemon = self.daemon()?;
        let _place = disk.place.read().await;
        let Some((id, shard)) = disk.place() else {
            return Err(Problem::new(ProblemKind::Busy, format!("disk {} is on no shard now", disk.name)));
        };
        Ok(daemon.fleet.call(shard, command(id)).await?)
    }
}

/// What is offered to guests of a disk that is open.
pub(super) fn offer(disk: &Disk, features: &Features, read_only: bool, discard: bool) -> Option<Offer> {
    let block = disk.inner().live.as_ref().map(|live| live.image.block_bytes)?;
    Some(Offer {
        flush: true,
        barrier: true,
        discard,
        secure_discard: discard,
        indirect_segments_max: features.max_indirect_segments as u16,
        block_bytes: block.max(512),
        read_only,
    })
}

/// What a disk that is open is like for guests that are offered this.
pub(super) fn properties(disk: &Disk, offer: &Offer) -> Option<Properties> {
    let inner = disk.inner();
    let live = inner.live.as_ref()?;
    let read_only = offer.read_only || inner.attachment.request.read_only;
    let physical = live.image.file().map_or(512, |file| file.offset_align.max(512));
    let overwrites = !matches!(inner.attachment.image.image_type, ImageType::Image(_));
    let block = u64::from(offer.block_bytes);
    Some(Properties {
        sectors: live.image.size_bytes / block * (block / 512),
        sector_size: offer.block_bytes,
        physical_sector_size: physical.max(offer.block_bytes),
        read_only,
        cdrom: false,
        removable: false,
        flush: offer.flush,
        barrier: offer.barrier,
        discard: (offer.discard && !read_only).then_some(Discard {
            granularity: physical.max(4096),
            alignment: 0,
            secure: overwrites,
        }),
    })
}

/// The layout of a protocol's rings.
pub(super) fn abi(protocol: Protocol) -> Abi {
    match protocol {
        Protocol::X86_32 => Abi::X86_32,
        Protocol::X86_64 | Protocol::Arm => Abi::X86_64,
    }
}

/// Has a disk's shard let go of a guest. `find` is the disk, with the daemon, while it is attached.
///
/// The guest has let go of its rings, so nobody waits for what has not begun: after [`DRAIN_PATIENCE`], or when the disk holds requests
/// and would never answer them, that is dropped.
pub(super) async fn disconnect(find: impl Fn() -> Option<(Arc<Daemon>, Arc<Disk>)>, domid: u16, devid: u32) {
    let patience = Instant::now() + DRAIN_PATIENCE;
    while let Some((daemon, disk)) = find() {
        let force = disk.state() != State::Running || Instant::now() >= patience;
        let told = {
            // Not over the answer, which takes as long as the store does: a move must be able to say so.
            let _place = disk.place.read().await;
            let command = |disk| Command::DisconnectGuest { disk, domid, devid, force };
            disk.place().map(|(disk, shard)| daemon.fleet.start(shard, command(disk)))
        };
        let Some(Ok(mut call)) = told else {
            if disk.standing() == Standing::Down {
                break;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
            continue;
        };
        let answer = if force {
            call.answer().await
        } else {
            match tokio::time::timeout_at(patience, call.answer()).await {
                Ok(answer) => answer,
                Err(_) => continue,
            }
        };
        match answer {
            Err(error) if matches!(error.kind, ShardErrorKind::WrongState | ShardErrorKind::Interrupted) => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            Ok(_) | Err(_) => break,
        }
    }
}

/// The image of a toolstack's `params`: the grammar if it begins with a type, else a path.
fn image_of(params: &str) -> Result<ImageSpec, Problem> {
    let typed = params.split_once(':').is_some_and(|(word, _)| word.parse::<ImageType>().is_ok());
    if typed {
        return Ok(params.parse()?);
    }
    let spec = ImageSpec { image_type: ImageType::Raw, path: params.to_owned(), options: BTreeMap::new() };
    spec.target()?;
    Ok(spec)
}

impl Disks for GuestDisks {
    async fn open(&self, wanted: &Wanted) -> Result<(), Problem> {
        let id = wanted.id;
        let deadline = Instant::now() + OPEN_TIMEOUT;
        let leaving = lock(&self.leaving).remove(&id);
        if let Some(leaving) = leaving {
            let _ = tokio::time::timeout_at(deadline, leaving).await;
        }
        let disk = loop {
            match self.open_now(wanted, deadline).await {
                Ok(disk) => break disk,
                // A guest that is started again finds its image being flushed and closed behind its last run.
                Err(problem)
                    if problem.kind == ProblemKind::Busy && Instant::now() + LOOK_AGAIN < deadline =>
                {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                Err(problem) => return Err(problem),
            }
        };
        let mut devices = lock(&self.devices);
        let same = devices.get(&id).is_some_and(|device| Arc::ptr_eq(&device.disk, &disk));
        if !same {
            let device = Device { disk, wanted: wanted.clone(), counters: Arc::default(), in_use: None };
            devices.insert(id, device);
        }
        Ok(())
    }

    fn properties(&self, id: DeviceId) -> Option<Properties> {
        let offer = self.offer(id)?;
        let (cdrom, removable) = {
            let devices = lock(&self.devices);
            let wanted = &devices.get(&id)?.wanted;
            (wanted.cdrom, wanted.removable)
        };
        let (_, disk) = self.disk(id).ok()?;
        Some(Properties { cdrom, removable, ..properties(&disk, &offer)? })
    }

    async fn connect(&self, id: DeviceId, connect: Connect) -> Result<(), Problem> {
        self.daemon()?;
        let (_, disk) = self.disk(id)?;
        let offer =
            self.offer(id).ok_or_else(|| Problem::failed(format!("disk {} is not open", disk.name)))?;
        let counters = self.counters(id).unwrap_or_default();
        let (device, segments) = (tables::device(id), offer.indirect_segments_max);
        let queues = match tables::make_all(&self.run_dir, &device, &connect.queues, segments).await {
            Ok(queues) => queues,
            Err(problem) => {
                self.remove_tables(id);
                return Err(problem);
            }
        };
        let guest = Box::new(GuestConnect {
            domid: connect.domid,
            devid: connect.devid,
            peer: None,
            abi: abi(connect.protocol),
            transport: Transport::Xen,
            numbered: connect.numbered,
            queues,
            persistent: connect.persistent.then(|| self.budget.clone()),
            offer,
            recover: false,
            counters,
        });
        disk.inner().awaiting = false;
        let reply = self.tell(&disk, |disk| Command::ConnectGuest { disk, guest }).await;
        match reply {
            Ok(Reply::GuestConnected(in_use)) => {
                if let Some(device) = lock(&self.devices).get_mut(&id) {
                    device.in_use = Some(*in_use);
                }
                Ok(())
            }
            Ok(other) => Err(Problem::failed(format!("unexpected answer to a connect: {other:?}"))),
            Err(problem) => {
                self.remove_tables(id);
                Err(problem)
            }
        }
    }

    async fn disconnect(&self, id: DeviceId) {
        disconnect(|| self.disk(id).ok(), id.domid, id.devid).await;
        if let Some(device) = lock(&self.devices).get_mut(&id) {
            device.in_use = None;
        }
        self.remove_tables(id);
    }

    async fn removed(&self, id: DeviceId) {
        let device = lock(&self.devices).remove(&id);
        self.remove_tables(id);
        // By itself: a command that detaches the disk may be waiting for this.
        if let (Some(device), Ok(daemon)) = (device, self.daemon()) {
            self.leave(daemon, id, device.disk);
        }
    }

    fn awaiting(&self, id: DeviceId, awaits: bool) {
        let Ok(daemon) = self.daemon() else { return };
        let device = id.to_string();
        let disks = daemon.all_disks();
        let disk = disks.iter().find(|disk| disk.inner().attachment.device.as_ref() == Some(&device));
        let Some(disk) = disk else { return };
        if !awaits {
            disk.inner().awaiting = false;
            return;
        }
        {
            let mut inner = disk.inner();
            inner.awaiting = true;
            inner.reason = Some(format!(
                "device {id} was connected when the daemon died: its guest's requests wait until the guest connects anew (restart or \
                 unplug it), or `ctl detach {} --force` gives the disk up",
                disk.name
            ));
        }
        daemon.events.record(
            Level::Error,
            Some(&disk.name),
            format!("{}: a guest waits", State::AwaitingRecovery.name()),
        );
    }
}
