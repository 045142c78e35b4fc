//! What devices need of the daemon: their disks opened, their rings connected to the disk's shard.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use ring_bridge::blkif::inflight::table_bytes;
use ring_bridge::blkif::wire::{Abi, entries};
use ring_bridge::grants::budget::Budget;
use shard::api::{Command, Reply, ShardErrorKind};
use shard::blkif::{GuestConnect, GuestCounters, GuestInUse, Offer, QueueConnect, Transport};
use tokio::time::Instant;

use super::tables;
use crate::daemon::{Daemon, Disk, lock};
use crate::model::{self, AttachRequest, Level, State};
use crate::problem::{Problem, ProblemKind};
use crate::xen::backend::Disks;
use crate::xen::device::DeviceId;
use crate::xen::keys::{Connect, Protocol, QUEUES_MAX};
use crate::xen::publish::{Discard, Features, Properties};
use crate::xen::spec::Wanted;
use formats::spec::{ImageSpec, ImageType};

/// A toolstack waits ten seconds for a device, then it takes the whole guest back.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two looks at a disk that is on no shard.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A device that is served.
#[derive(Debug)]
struct Device {
    disk: String,
    wanted: Wanted,
    counters: Arc<GuestCounters>,
    in_use: Option<GuestInUse>,
    /// Queues that have a table of requests in flight.
    tables: usize,
}

/// Devices and their disks.
#[derive(Debug)]
pub struct GuestDisks {
    daemon: Weak<Daemon>,
    run_dir: PathBuf,
    budget: Arc<Budget>,
    features: Features,
    devices: Mutex<BTreeMap<DeviceId, Device>>,
}

impl GuestDisks {
    pub(super) fn new(daemon: &Arc<Daemon>, budget: Arc<Budget>, features: Features) -> GuestDisks {
        let run_dir = daemon.settings().run_dir.clone();
        GuestDisks { daemon: Arc::downgrade(daemon), run_dir, budget, features, devices: Mutex::default() }
    }

    pub(super) fn disk_of(&self, id: DeviceId) -> Option<String> {
        lock(&self.devices).get(&id).map(|device| device.disk.clone())
    }

    pub(super) fn find(&self, domid: u16, devid: u32) -> Option<DeviceId> {
        lock(&self.devices).keys().copied().find(|id| id.domid == domid && id.devid == devid)
    }

    pub(super) fn details(&self, id: DeviceId) -> (Option<String>, Option<GuestInUse>) {
        let devices = lock(&self.devices);
        devices.get(&id).map_or((None, None), |device| (Some(device.disk.clone()), device.in_use.clone()))
    }

    pub(super) fn counters(&self, id: DeviceId) -> Option<Arc<GuestCounters>> {
        lock(&self.devices).get(&id).map(|device| device.counters.clone())
    }

    fn daemon(&self) -> Result<Arc<Daemon>, Problem> {
        let stopping = || Problem::new(ProblemKind::Unavailable, "the daemon is stopping");
        self.daemon.upgrade().filter(|daemon| !daemon.is_stopping()).ok_or_else(stopping)
    }

    /// The disk of a device that is served.
    fn disk(&self, id: DeviceId) -> Result<Arc<Disk>, Problem> {
        let name = self.disk_of(id).ok_or_else(|| Problem::failed(format!("device {id} has no disk")))?;
        self.daemon()?.disk(&name)
    }

    fn offer(&self, id: DeviceId) -> Option<Offer> {
        let devices = lock(&self.devices);
        let wanted = &devices.get(&id)?.wanted;
        let disk = self.daemon.upgrade()?.find(&devices.get(&id)?.disk)?;
        let block = disk.inner().live.as_ref().map(|live| live.image.block_bytes)?;
        Some(Offer {
            flush: true,
            barrier: true,
            discard: wanted.discard,
            secure_discard: wanted.discard,
            indirect_segments_max: self.features.max_indirect_segments as u16,
            block_bytes: block.max(512),
            read_only: wanted.read_only,
        })
    }

    async fn make_tables(
        &self,
        id: DeviceId,
        connect: &Connect,
        segments: u16,
    ) -> Result<Vec<QueueConnect>, Problem> {
        let mut queues = Vec::new();
        for (number, queue) in connect.queues.iter().enumerate() {
            let pages = queue.grefs.len() as u32;
            let Some(entries) = entries(pages) else {
                return Err(Problem::invalid(format!("a ring of {pages} pages is none")));
            };
            let (path, bytes) = (tables::path(&self.run_dir, id, number), table_bytes(entries, segments));
            let made = tokio::task::spawn_blocking(move || tables::make(&path, bytes)).await;
            let table = made.map_err(|error| Problem::failed(format!("a thread ended: {error}")))??;
            queues.push(QueueConnect { grefs: queue.grefs.clone(), port: queue.port, table });
        }
        Ok(queues)
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
        let daemon = self.daemon()?;
        let id = wanted.id;
        let deadline = Instant::now() + OPEN_TIMEOUT;
        let name = match &wanted.disk {
            Some(name) => {
                let disk = daemon.disk(name)?;
                if disk.inner().attachment.device.as_deref() != Some(&id.to_string()) {
                    return Err(Problem::new(
                        ProblemKind::Conflict,
                        format!(
                            "disk {name} was not attached to device {id}: remove the device from XenStore"
                        ),
                    ));
                }
                name.clone()
            }
            None => {
                let name = format!("{}-{}-{}", id.kind.name(), id.domid, id.devid);
                let request = AttachRequest {
                    image: model::Image::Parts(image_of(&wanted.params)?),
                    read_only: wanted.read_only,
                    nbd: true,
                    guest: None,
                    limits: crate::limit_change::LimitChange::default(),
                    groups: Vec::new(),
                    on_error: None,
                    on_enospc: None,
                    shard: None,
                };
                daemon.attach_device(&name, request, id, deadline).await?;
                name
            }
        };
        let device =
            Device { disk: name, wanted: wanted.clone(), counters: Arc::default(), in_use: None, tables: 0 };
        lock(&self.devices).entry(id).or_insert(device);
        Ok(())
    }

    fn properties(&self, id: DeviceId) -> Option<Properties> {
        let offer = self.offer(id)?;
        let (cdrom, removable, read_only, discard) = {
            let devices = lock(&self.devices);
            let wanted = &devices.get(&id)?.wanted;
            (wanted.cdrom, wanted.removable, wanted.read_only, wanted.discard)
        };
        let disk = self.disk(id).ok()?;
        let inner = disk.inner();
        let live = inner.live.as_ref()?;
        let read_only = read_only || inner.attachment.request.read_only;
        let physical = live.image.file().map_or(512, |file| file.offset_align.max(512));
        let overwrites =
            matches!(inner.attachment.image.image_type, ImageType::Raw | ImageType::Ram | ImageType::Null);
        let block = u64::from(offer.block_bytes);
        Some(Properties {
            sectors: live.image.size_bytes / block * (block / 512),
            sector_size: offer.block_bytes,
            physical_sector_size: physical.max(offer.block_bytes),
            read_only,
            cdrom,
            removable,
            flush: offer.flush,
            barrier: offer.barrier,
            discard: (discard && !read_only).then_some(Discard {
                granularity: physical.max(4096),
                alignment: 0,
                secure: overwrites,
            }),
        })
    }

    async fn connect(&self, id: DeviceId, connect: Connect) -> Result<(), Problem> {
        let disk = self.disk(id)?;
        let offer =
            self.offer(id).ok_or_else(|| Problem::failed(format!("disk {} is not open", disk.name)))?;
        let counters = self.counters(id).unwrap_or_default();
        let queues = self.make_tables(id, &connect, offer.indirect_segments_max).await?;
        if let Some(device) = lock(&self.devices).get_mut(&id) {
            device.tables = queues.len();
        }
        let abi = match connect.protocol {
            Protocol::X86_32 => Abi::X86_32,
            Protocol::X86_64 | Protocol::Arm => Abi::X86_64,
        };
        let guest = Box::new(GuestConnect {
            domid: connect.domid,
            devid: connect.devid,
            abi,
            transport: Transport::Xen,
            numbered: connect.queues.iter().any(|queue| queue.grefs.len() > 1),
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
                tables::remove(&self.run_dir, id, QUEUES_MAX as usize);
                Err(problem)
            }
        }
    }

    async fn disconnect(&self, id: DeviceId) {
        let (domid, devid) = (id.domid, id.devid);
        while let Ok(disk) = self.disk(id) {
            let Ok(daemon) = self.daemon() else { break };
            let told = {
                // Not over the answer: a drain may take as long as the store does, and a move must be able to say so.
                let _place = disk.place.read().await;
                match disk.place() {
                    Some((disk, shard)) => {
                        let command = Command::DisconnectGuest { disk, domid, devid, force: false };
                        Some(daemon.fleet.start(shard, command))
                    }
                    None => None,
                }
            };
            let answer = match told {
                Some(Ok(mut call)) => call.answer().await,
                Some(Err(_)) | None => {
                    if disk.standing() == crate::daemon::disk::Standing::Down {
                        break;
                    }
                    tokio::time::sleep(LOOK_AGAIN).await;
                    continue;
                }
            };
            match answer {
                Err(error) if error.kind == ShardErrorKind::WrongState => {
                    tokio::time::sleep(LOOK_AGAIN).await
                }
                Err(error) if error.kind == ShardErrorKind::Interrupted => {}
                Ok(_) | Err(_) => break,
            }
        }
        let tables = {
            let mut devices = lock(&self.devices);
            let device = devices.get_mut(&id);
            device.map_or(0, |device| {
                device.in_use = None;
                std::mem::take(&mut device.tables)
            })
        };
        tables::remove(&self.run_dir, id, tables);
    }

    async fn removed(&self, id: DeviceId) {
        let device = lock(&self.devices).remove(&id);
        let (Some(device), Ok(daemon)) = (device, self.daemon()) else { return };
        // By itself: a command that detaches the disk may be waiting for this.
        tokio::spawn(async move {
            if daemon.find(&device.disk).is_none() {
                return;
            }
            let deadline = Instant::now() + crate::daemon::DEFAULT_TIMEOUT;
            match daemon.detach_device(&device.disk, id, deadline).await {
                Err(problem) if problem.kind != ProblemKind::NotFound => {
                    let message = format!("its device {id} is gone, and it could not be detached: {problem}");
                    daemon.events.record(Level::Error, Some(&device.disk), message);
                }
                _ => {}
            }
        });
    }

    fn awaiting(&self, id: DeviceId) {
        let Ok(daemon) = self.daemon() else { return };
        let device = id.to_string();
        let disks = daemon.all_disks();
        let disk = disks.iter().find(|disk| disk.inner().attachment.device.as_ref() == Some(&device));
        let Some(disk) = disk else { return };
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
