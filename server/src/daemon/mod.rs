//! The daemon: what is attached, and the flows that change it.
//!
//! ```text
//! mod      the table of disks, locks by name, looking at disks
//! disk     one disk as the control thread knows it
//! attach   attach, and bringing a disk up            detach    drain, force, zombies
//! control  pause, resume, fail, limits               moving    to another shard and back
//! restore  disks of the last run, tried until they work
//! snapshot overlays at one instant, other images for paused disks
//! reports  what shards say by themselves             shutdown  drain and flush everything
//! ```
//! Invariants: commands on one name run one after the other ([`Daemon::lock_name`]), those on different names do not wait for
//! each other. A flow runs to its end even when its caller has gone ([`Daemon::run`]); a flow that fails leaves things as they
//! were. A disk is in the table from before it is kept until after it is forgotten.

mod attach;
mod control;
mod detach;
pub mod disk;
mod groups;
mod moving;
mod reports;
mod restore;
mod shutdown;
mod snapshot;
mod view;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use shard::api::DiskId;
use tokio::time::Instant;

use crate::args::ServeArgs;
use crate::config::Settings;
use crate::events::EventLog;
use crate::fleet::Fleet;
use crate::guests::Guests;
use crate::guests::shared::SharedServer;
use crate::images::Images;
use crate::model::Reload;
use crate::nbd::NbdServer;
use crate::problem::{Problem, ProblemKind};
use crate::state::StateStore;

pub use disk::Disk;
pub use groups::Groups;

/// A command's time when it does not say.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Everything of the control thread.
pub struct Daemon {
    /// All shards.
    pub fleet: Arc<Fleet>,
    /// All images.
    pub images: Images,
    /// What is kept.
    pub state: StateStore,
    /// What happened.
    pub events: EventLog,
    /// Groups by name.
    pub groups: Groups,
    /// NBD listeners and negotiations.
    pub nbd: NbdServer,
    /// Clients that share memory.
    pub shared: SharedServer,
    /// Guests of Xen; absent where the host has none.
    pub guests: OnceLock<Guests>,
    /// Told when the last shard has ended by itself.
    pub no_shard_left: tokio::sync::Notify,
    settings: Mutex<Arc<Settings>>,
    args: ServeArgs,
    disks: Mutex<Table>,
    names: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
    next_id: AtomicU64,
    started: Instant,
    stopping: AtomicBool,
    measured: Mutex<Option<Instant>>,
}

#[derive(Default)]
struct Table {
    by_name: BTreeMap<String, Arc<Disk>>,
    by_id: HashMap<DiskId, Arc<Disk>>,
}

/// The right to change the disk of one name.
pub type NameGuard = tokio::sync::OwnedMutexGuard<()>;

impl Daemon {
    /// A daemon without disks. `args` are those of the command line, for reloads.
    pub fn new(
        args: ServeArgs,
        settings: Settings,
        fleet: Arc<Fleet>,
        images: Images,
        state: StateStore,
    ) -> Result<Arc<Daemon>, Problem> {
        let groups = Groups::default();
        groups.configure(&settings.groups);
        state.read(|state| state.groups.iter().for_each(|(name, limits)| groups.restore(name, *limits)));
        Ok(Arc::new(Daemon {
            fleet,
            images,
            state,
            events: EventLog::default(),
            groups,
            nbd: NbdServer::new(&settings)?,
            shared: SharedServer::new(&settings),
            guests: OnceLock::new(),
            no_shard_left: tokio::sync::Notify::new(),
            settings: Mutex::new(Arc::new(settings)),
            args,
            disks: Mutex::default(),
            names: Mutex::default(),
            next_id: AtomicU64::new(1),
            started: Instant::now(),
            stopping: AtomicBool::new(false),
            measured: Mutex::new(None),
        }))
    }

    /// What the daemon was told to do.
    pub fn settings(&self) -> Arc<Settings> {
        lock(&self.settings).clone()
    }

    /// Seconds since the start.
    pub fn uptime_s(&self) -> u64 {
        self.started.elapsed().as_secs()
    }

    /// Microseconds since the start, to date counters.
    pub fn uptime_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// The guests of Xen, or why there are none.
    pub fn guests(&self) -> Result<&Guests, Problem> {
        self.guests.get().ok_or_else(|| {
            Problem::new(
                ProblemKind::Invalid,
                "this host has no XenStore (neither /run/xenstored/socket nor /dev/xen/xenbus): guests of Xen need the daemon in dom0 or \
                 a driver domain, after xenstored; other disks are served all the same",
            )
        })
    }

    /// Starts to serve guests, where there can be any.
    pub fn start_guests(self: &Arc<Self>) {
        if let Some(guests) = Guests::start(self) {
            let _ = self.guests.set(guests);
        }
    }

    /// True from the moment a stop was asked for.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Runs a flow to its end, also when the caller goes away.
    pub async fn run<T, F>(self: &Arc<Self>, flow: F) -> Result<T, Problem>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Problem>> + Send + 'static,
    {
        if self.is_stopping() {
            return Err(Problem::new(
                ProblemKind::Unavailable,
                "the daemon is stopping: try again when it is back",
            ));
        }
        tokio::spawn(flow).await.unwrap_or_else(|error| {
            Err(Problem::failed(format!("the command failed inside the daemon ({error}): report its log")))
        })
    }

    /// All disks, by name.
    pub fn all_disks(&self) -> Vec<Arc<Disk>> {
        lock(&self.disks).by_name.values().cloned().collect()
    }

    /// The disk of a name.
    pub fn find(&self, name: &str) -> Option<Arc<Disk>> {
        lock(&self.disks).by_name.get(name).cloned()
    }

    /// The disk of a name, or a sentence.
    pub fn disk(&self, name: &str) -> Result<Arc<Disk>, Problem> {
        self.find(name).ok_or_else(|| no_such_disk(name))
    }

    fn disk_by_id(&self, id: DiskId) -> Option<Arc<Disk>> {
        lock(&self.disks).by_id.get(&id).cloned()
    }

    fn insert(&self, disk: &Arc<Disk>) {
        let mut table = lock(&self.disks);
        table.by_name.insert(disk.name.to_string(), disk.clone());
        if let Some(id) = disk.id() {
            table.by_id.insert(id, disk.clone());
        }
    }

    /// Takes a disk off the table, if it is still that one.
    fn remove(&self, disk: &Arc<Disk>) {
        let mut table = lock(&self.disks);
        table.by_id.retain(|_, other| !Arc::ptr_eq(other, disk));
        if table.by_name.get(&*disk.name).is_some_and(|other| Arc::ptr_eq(other, disk)) {
            table.by_name.remove(&*disk.name);
        }
    }

    /// True while the table has this very disk.
    pub fn has(&self, disk: &Arc<Disk>) -> bool {
        lock(&self.disks).by_name.get(&*disk.name).is_some_and(|other| Arc::ptr_eq(other, disk))
    }

    fn new_id(&self) -> DiskId {
        DiskId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Waits for the right to change the disk of a name.
    pub async fn lock_name(&self, name: &str, deadline: Instant) -> Result<NameGuard, Problem> {
        let mutex = {
            let mut names = lock(&self.names);
            names.retain(|_, mutex| mutex.strong_count() > 0);
            match names.get(name).and_then(Weak::upgrade) {
                Some(mutex) => mutex,
                None => {
                    let mutex = Arc::new(tokio::sync::Mutex::new(()));
                    names.insert(name.to_owned(), Arc::downgrade(&mutex));
                    mutex
                }
            }
        };
        tokio::time::timeout_at(deadline, mutex.lock_owned()).await.map_err(|_| {
            Problem::new(
                ProblemKind::TimedOut,
                format!(
                    "disk {name}: another command on it has not ended; try again, or with a longer --timeout"
                ),
            )
        })
    }

    /// Reads the configuration again and applies what can change while the daemon runs.
    pub async fn reload(self: &Arc<Self>) -> Result<Reload, Problem> {
        let old = self.settings();
        let mut new = Settings::load(&self.args)?;
        if let Ok((descriptors, _)) =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        {
            new.nbd_limits = new.nbd_limits.within(descriptors);
        }
        let mut report = Reload::default();
        let mut note = |changed: bool, what: &str, restart: bool| {
            if changed {
                if restart { &mut report.restart } else { &mut report.applied }.push(what.to_owned());
            }
        };
        note(old.run_dir != new.run_dir, "run_dir", true);
        note(old.state_dir != new.state_dir, "state_dir", true);
        note((&old.ctl, &old.ctl_access) != (&new.ctl, &new.ctl_access), "ctl", true);
        note(old.metrics != new.metrics, "metrics.listen", true);
        note((&old.cpus, old.ring) != (&new.cpus, new.ring), "shards", true);
        note(old.buffer_budget_bytes != new.buffer_budget_bytes, "shards.buffer_budget", true);
        note(old.ram_dir != new.ram_dir, "ram.dir", true);
        note(old.nbd_listen != new.nbd_listen, "nbd.listen", true);
        note(old.log_format != new.log_format, "log_format", true);
        note(old.log != new.log, "log", false);
        note(old.allowed_dirs != new.allowed_dirs, "images.allowed_dirs", false);
        note(old.open_timeout != new.open_timeout, "images.open_timeout_s", false);
        note((old.on_error, old.on_enospc) != (new.on_error, new.on_enospc), "disks", false);
        note(old.ram_limit_bytes != new.ram_limit_bytes, "ram.limit", false);
        note(
            old.nbd_access != new.nbd_access,
            "nbd.mode and nbd.group (for disks attached from now on)",
            false,
        );
        note(old.nbd_limits != new.nbd_limits, "nbd limits", false);
        note(old.shutdown_timeout != new.shutdown_timeout, "shutdown_timeout_s", false);
        note(old.groups != new.groups, "groups", false);
        // Certificates and keys are read again even under their old names: that is how they are renewed.
        self.nbd.reload_tls(&new.tls)?;
        crate::logging::set_filter(&new.log)?;
        self.images.reconfigure(&new)?;
        note(true, "TLS certificates and keys were read again", false);
        self.nbd.set_limits(new.nbd_limits);
        for name in self.groups.configure(&new.groups) {
            self.refresh_group(&name).await;
        }
        // What needs a restart stays as it is in force.
        new.run_dir.clone_from(&old.run_dir);
        new.ctl.clone_from(&old.ctl);
        new.ram_dir.clone_from(&old.ram_dir);
        new.nbd_listen.clone_from(&old.nbd_listen);
        new.metrics.clone_from(&old.metrics);
        *lock(&self.settings) = Arc::new(new);
        self.events.record(crate::model::Level::Info, None, "the configuration was read again");
        Ok(report)
    }
}

/// No disk has this name.
pub fn no_such_disk(name: &str) -> Problem {
    let shown: String = name.chars().take(80).collect();
    Problem::new(
        ProblemKind::NotFound,
        format!("there is no disk {shown:?}: `blktapd ctl list` shows the disks"),
    )
}

/// A deadline from a number of seconds.
pub fn deadline_after(timeout_s: Option<u32>) -> Result<Instant, Problem> {
    match timeout_s {
        Some(seconds) if seconds > 600 => {
            let message = format!("timeout_s is {seconds}: at most 600 seconds are possible");
            Err(Problem::new(ProblemKind::Malformed, message))
        }
        Some(seconds) => Ok(Instant::now() + Duration::from_secs(seconds.into())),
        None => Ok(Instant::now() + DEFAULT_TIMEOUT),
    }
}

/// Locks for a few instructions. A panic elsewhere leaves plain data behind, never a broken promise.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
