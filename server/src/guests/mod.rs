//! Guests of Xen: between what [`crate::xen`] finds in XenStore and the disks of the [`Daemon`].
//!
//! ```text
//! toolstack's nodes ─▶ xen::backend ─▶ GuestDisks ─▶ Daemon: attach, detach        ─▶ shard: ConnectGuest, DisconnectGuest
//! clients without Xen ─▶ shared                                                      ─▶ the same
//! ctl attach --domain ─▶ Daemon ─▶ xen::create (both ends) ─▶ xen::backend ─▶ GuestDisks (the disk is there already)
//! ```
//! Invariants: a guest's disk ends with its device, and its attachment with the boot of the host; a device that a dead daemon had
//! connected maps nothing and is left alone in XenStore, while its image is open and locked here.

pub mod counters;
mod disks;
pub mod shared;
mod tables;

use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ring_bridge::grants::budget::Budget;
use shard::blkif::{GuestCounters, GuestInUse};
use tokio::time::Instant;

pub use disks::GuestDisks;

use crate::daemon::Daemon;
use crate::model;
use crate::problem::{Problem, ProblemKind};
use crate::xen::backend::{Backend, Report};
use crate::xen::batch::{Batch, Condition};
use crate::xen::client::Store;
use crate::xen::create::{self, NewDevice};
use crate::xen::device::{DeviceId, Kind, devid_of, vdev_of};
use crate::xen::host::ThisHost;
use crate::xen::publish::Features;
use crate::xen::transport::{SOCKET_VARIABLE, Transport};
use crate::xen::xenbus::XenbusState;

/// Pages of guests that may be mapped persistently on this host: a PV domain takes two handles per page, so half of what the
/// hypervisor tracks by default for one domain
/// (`gnttab_max_maptrack_frames`), so that blkback and others have the rest.
const PERSISTENT_PAGES: usize = 64 << 10;

/// Between two looks for disks whose devices are gone.
const SWEEP_EVERY: Duration = Duration::from_secs(30);

/// What tells that this host may have a XenStore.
const SIGNS: [&str; 4] =
    ["/run/xenstored/socket", "/var/run/xenstored/socket", "/dev/xen/xenbus", "/proc/xen/xenbus"];

/// A device, and its counters once somebody serves it.
pub type Found = (model::GuestDevice, Option<Arc<GuestCounters>>);

/// All devices of guests, and the clients without Xen that share memory.
pub fn all(daemon: &Daemon) -> Vec<Found> {
    let mut all = daemon.guests.get().map(Guests::list).unwrap_or_default();
    for disk in daemon.all_disks() {
        all.extend(disk.sharers.list(&disk.name));
    }
    all
}

impl model::GuestDevice {
    fn with(self, in_use: Option<&GuestInUse>, counters: Option<&Arc<GuestCounters>>) -> model::GuestDevice {
        model::GuestDevice {
            queues: in_use.map(|in_use| in_use.entries.len() as u32),
            ring_entries: in_use.and_then(|in_use| in_use.entries.first().copied()),
            persistent: in_use.map(|in_use| in_use.persistent),
            counters: counters.map(|counters| counters::totals(counters)),
            ..self
        }
    }
}

/// The devices of all guests.
pub struct Guests {
    store: Store,
    disks: Arc<GuestDisks>,
    backend: Backend<GuestDisks>,
    sweeper: tokio::task::JoinHandle<()>,
}

impl Drop for Guests {
    fn drop(&mut self) {
        self.sweeper.abort();
    }
}

/// Looks now and then for disks whose devices are gone.
async fn sweep(disks: Weak<GuestDisks>, store: Store) {
    loop {
        tokio::time::sleep(SWEEP_EVERY).await;
        let Some(disks) = disks.upgrade() else { return };
        disks.sweep(&store).await;
    }
}

impl std::fmt::Debug for Guests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guests").finish_non_exhaustive()
    }
}

impl Guests {
    /// Starts to serve guests where the host has a XenStore; none elsewhere.
    pub fn start(daemon: &Arc<Daemon>) -> Option<Guests> {
        let named = std::env::var_os(SOCKET_VARIABLE).is_some();
        if !named && !SIGNS.iter().any(|sign| Path::new(sign).exists()) {
            return None;
        }
        let store = Store::new(Transport::Auto);
        let budget = Budget::of_host(PERSISTENT_PAGES);
        let features = Features::default();
        let disks = Arc::new(GuestDisks::new(daemon, budget, features));
        let backend = Backend::start(store.clone(), disks.clone(), Arc::new(ThisHost::default()), features);
        let sweeper = tokio::spawn(sweep(Arc::downgrade(&disks), store.clone()));
        Some(Guests { store, disks, backend, sweeper })
    }

    /// The device that a request means. The domain has to exist.
    pub async fn resolve(&self, guest: &model::Guest, deadline: Instant) -> Result<DeviceId, Problem> {
        let devid = devid_of(&guest.vdev).map_err(Problem::invalid)?;
        let domid = self.in_time(deadline, create::resolve(&self.store, &guest.domain)).await?;
        Ok(DeviceId { kind: Kind::Vbd3, domid, devid })
    }

    /// Makes both ends of a device for a disk that is live.
    pub async fn create(
        &self,
        id: DeviceId,
        disk: &str,
        read_only: bool,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let device = NewDevice { domid: id.domid, devid: id.devid, disk: disk.to_owned(), read_only };
        self.in_time(deadline, create::attach(&self.store, &device)).await.map(drop)
    }

    /// Lets go of a device: with the guest's consent, or by force at once.
    pub async fn remove(&self, id: DeviceId, force: bool, deadline: Instant) -> Result<(), Problem> {
        if force {
            return self.in_time(deadline, create::force(&self.store, id)).await;
        }
        self.in_time(deadline, create::detach(&self.store, id)).await?;
        self.backend.wait_gone(id, deadline).await
    }

    /// XenStore has the device.
    pub fn has(&self, id: DeviceId) -> bool {
        self.backend.device(id).is_some()
    }

    /// Asks the guest to let go of a device whose disk was given up; the device stays, for its toolstack to remove.
    pub async fn close(&self, id: DeviceId, deadline: Instant) -> Result<(), Problem> {
        let own = self.in_time(deadline, async { Ok(self.store.own_domid().await?) }).await?;
        let state = format!("{}/state", id.backend(own));
        let batch = Batch::new()
            .only_if(Condition::Equals(state.clone(), XenbusState::Connected.number().to_string()))
            .write(state, XenbusState::Closing.number());
        self.in_time(deadline, async { Ok(self.store.apply(&batch).await?) }).await.map(drop)
    }

    /// For the script of a toolstack: takes the device of `XENBUS_PATH`, and returns its disk's name when it is ready.
    pub async fn claim(&self, xenbus_path: &str, deadline: Instant) -> Result<String, Problem> {
        let Some(id) = DeviceId::from_xenbus_path(xenbus_path) else {
            let shown: String = xenbus_path.chars().take(100).collect();
            return Err(Problem::invalid(format!(
                "{shown:?} is no backend directory: expected the script's XENBUS_PATH, like backend/vbd/5/51712"
            )));
        };
        self.backend.claim(id, deadline).await?;
        self.disks.disk_of(id).ok_or_else(|| Problem::failed(format!("device {id} was closed again")))
    }

    /// Has devices opened again whose image could not be opened.
    pub fn retry(&self, id: DeviceId) {
        self.backend.retry(id);
    }

    /// What a shard or the daemon says of a device.
    pub fn report(&self, id: DeviceId, report: Report) {
        self.backend.report(id, report);
    }

    /// Why guests are not served now.
    pub fn problem(&self) -> Option<String> {
        self.backend.problem()
    }

    /// All devices that were found, with the counters of those that are served.
    fn list(&self) -> Vec<Found> {
        let devices = self.backend.devices().into_iter();
        devices
            .map(|status| {
                let id = status.id;
                let number = |state: Option<XenbusState>| state.map(|state| state.number());
                let (disk, in_use) = self.disks.details(id);
                let counters = self.disks.counters(id);
                let device = model::GuestDevice {
                    device: id.to_string(),
                    domain: id.domid,
                    vdev: vdev_of(id.devid),
                    disk,
                    backend_state: number(status.own),
                    frontend_state: number(status.front),
                    served: status.served,
                    link: format!("{:?}", status.link).to_lowercase(),
                    reason: status.reason,
                    ..model::GuestDevice::default()
                };
                (device.with(in_use.as_ref(), counters.as_ref()), counters)
            })
            .collect()
    }

    async fn in_time<T>(
        &self,
        deadline: Instant,
        work: impl Future<Output = Result<T, Problem>>,
    ) -> Result<T, Problem> {
        tokio::time::timeout_at(deadline, work).await.map_err(|_| {
            let why = self.problem().unwrap_or_else(|| "XenStore has not answered in time".into());
            Problem::new(ProblemKind::TimedOut, why)
        })?
    }
}
