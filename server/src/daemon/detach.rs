//! Detach: wait for clients, forget the attachment, drain, close. By force: at once, with zombies.
//!
//! ```text
//! live ─(clients gone)─▶ forgotten ─▶ Draining ─(Removed)─▶ gone
//!   └──── --force ─────▶ forgotten ─▶ Draining ─(Zombie)──▶ Zombie ─(ZombieGone)─▶ gone
//! ```
//! While clients are waited for, the disk serves them and takes no new ones; when they stay, nothing has changed. The answer of
//! the shard is awaited by a task of its own, so that a drain which outlasts its command still ends.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use shard::api::{ClientInfo, Command, Reply, ShardErrorKind};
use tokio::time::Instant;

use super::control::device_of;
use super::disk::{Listeners, Removal, Standing};
use super::{Daemon, Disk};
use crate::model::{self, Level};
use crate::problem::{Problem, ProblemKind};
use crate::xen::device::DeviceId;

/// How long a detach by force waits for the guest to let go by itself.
const CONSENT_PATIENCE: Duration = Duration::from_secs(3);
/// How long a detach by force waits for XenStore.
const XENSTORE_PATIENCE: Duration = Duration::from_secs(2);
/// Clients that a message names.
const CLIENTS_NAMED: usize = 5;

/// While this lives the disk takes no new clients, and nobody brings it up. Several detaches may wait at a time.
struct Closing<'a>(&'a Disk);

impl<'a> Closing<'a> {
    fn new(disk: &'a Disk) -> Closing<'a> {
        disk.inner().closing += 1;
        Closing(disk)
    }
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.inner().closing -= 1;
    }
}

impl Daemon {
    /// Stops serving a disk and forgets it. Returns what is left of it: a zombie, or nothing.
    pub async fn detach(
        self: &Arc<Self>,
        name: &str,
        force: bool,
        deadline: Instant,
    ) -> Result<Option<model::Disk>, Problem> {
        let disk = self.disk(name)?;
        let device = device_of(&disk);
        match device {
            Some(device) if self.guests.get().is_some() => {
                self.detach_from_guest(&disk, device, force, deadline).await?;
            }
            _ => {}
        }
        match self.detach_disk(&disk, force, deadline).await {
            // The end of its device has detached it.
            Err(problem) if problem.kind == ProblemKind::NotFound && device.is_some() => Ok(None),
            result => result,
        }
    }

    /// Takes the device away from its guest: with its consent, or by force.
    async fn detach_from_guest(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        device: DeviceId,
        force: bool,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let ours = disk.inner().attachment.request.guest.is_some();
        let guests = self.guests()?;
        if force {
            // A frontend whose rings go under its requests waits for their answers for ever, so it is asked first. One that does not
            // answer, and a XenStore that does not, must not keep the disk.
            let asked = ours
                && guests
                    .remove(device, false, deadline.min(Instant::now() + CONSENT_PATIENCE))
                    .await
                    .is_ok();
            let deadline = deadline.min(Instant::now() + XENSTORE_PATIENCE);
            let gone = match (asked, ours) {
                (true, _) => Ok(()),
                (false, true) => guests.remove(device, true, deadline).await,
                (false, false) => guests.close(device, deadline).await,
            };
            if let Err(problem) = gone {
                let message =
                    format!("detached by force, and XenStore still has its device {device}: {problem}");
                self.events.record(Level::Warning, Some(&disk.name), message);
            }
            return Ok(());
        }
        if ours {
            let removed = guests.remove(device, false, deadline).await;
            return removed.map_err(|problem| problem.context(&format!("disk {}", disk.name)));
        }
        if !guests.has(device) {
            return Ok(());
        }
        Err(Problem::new(
            ProblemKind::Busy,
            format!(
                "disk {} belongs to device {device}, which a toolstack made: remove it there (`xl block-detach {} {}`), or give it up \
                 with --force",
                disk.name, device.domid, device.devid
            ),
        ))
    }

    /// Stops serving a disk that no guest has, and forgets it. Nothing happens to another disk of its name.
    pub async fn detach_disk(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        force: bool,
        deadline: Instant,
    ) -> Result<Option<model::Disk>, Problem> {
        let name = &*disk.name;
        let _closing = Closing::new(disk);
        if force {
            disk.interrupt.notify_waiters();
        } else {
            self.wait_for_clients(disk, deadline).await?;
        }
        let done = {
            let _guard = self.lock_name(name, deadline).await?;
            if !self.has(disk) {
                return Ok(None);
            }
            let done = disk.removed.subscribe();
            match disk.standing() {
                Standing::Live => self.start_removal(disk, force, deadline).await?,
                Standing::Draining if force => self.force_removal(disk),
                Standing::Draining | Standing::Gone => {}
                Standing::Zombie => {
                    return Err(Problem::new(
                        ProblemKind::Busy,
                        format!(
                            "disk {name} was detached by force already; it is listed until the kernel's operations on it \
                             come back, and nothing can speed that up but the store itself"
                        ),
                    ));
                }
                // An attempt to bring it up that is under way gives up when it sees that the disk is closing.
                Standing::Down => {
                    self.forget(disk).await?;
                    self.finish(disk).await;
                    return Ok(None);
                }
            }
            done
        };
        self.wait_for_removal(disk, done, deadline).await
    }

    /// Waits until nobody uses the disk. New clients are refused meanwhile.
    async fn wait_for_clients(self: &Arc<Self>, disk: &Arc<Disk>, deadline: Instant) -> Result<(), Problem> {
        let busy = || {
            disk.standing() == Standing::Live
                && (disk.counters.clients.get() > 0 || disk.connecting.load(Ordering::Relaxed) > 0)
        };
        let mut pause = Duration::from_millis(5);
        while busy() {
            if Instant::now() >= deadline {
                return Err(self.in_use(disk).await);
            }
            tokio::time::sleep_until((Instant::now() + pause).min(deadline)).await;
            pause = (pause * 2).min(Duration::from_millis(200));
        }
        Ok(())
    }

    /// Who uses a disk, as an error.
    async fn in_use(&self, disk: &Disk) -> Problem {
        let clients = self.clients(disk).await.unwrap_or_default();
        let mut who = String::new();
        for client in clients.iter().take(CLIENTS_NAMED) {
            let _ = write!(
                who,
                "; {} connected {} s ago, {} requests in flight",
                client.peer, client.age_s, client.in_flight
            );
        }
        if clients.len() > CLIENTS_NAMED {
            let _ = write!(who, "; and {} more", clients.len() - CLIENTS_NAMED);
        }
        Problem::new(
            ProblemKind::Busy,
            format!("disk {} is in use{who}: close its clients, or detach it with --force", disk.name),
        )
    }

    /// Clients of a disk, as its shard knows them.
    pub(super) async fn clients(&self, disk: &Disk) -> Option<Vec<ClientInfo>> {
        let (id, shard) = disk.place()?;
        let call = self.fleet.call(shard, Command::Clients { disk: id });
        match tokio::time::timeout(Duration::from_secs(2), call).await {
            Ok(Ok(Reply::Clients(clients))) => Some(clients),
            _ => None,
        }
    }

    /// Forgets a live disk and tells its shard to remove it.
    async fn start_removal(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        force: bool,
        deadline: Instant,
    ) -> Result<(), Problem> {
        // A new client on its way is let in before, and one that comes later finds no disk.
        let _place = disk.whole_place(deadline).await?;
        self.forget(disk).await?;
        let Some((id, shard)) = disk.place() else { return Ok(()) };
        let listeners = {
            let mut inner = disk.inner();
            inner.standing = Standing::Draining;
            inner.live.as_mut().map(|live| std::mem::take(&mut live.listeners))
        };
        drop(listeners);
        disk.removed.send_replace(None);
        match self.fleet.start(shard, Command::RemoveDisk { disk: id, force }) {
            Ok(call) => {
                tokio::spawn(self.clone().await_removal(disk.clone(), call));
                disk.sharers.end_all("the disk was detached");
                Ok(())
            }
            // The shard has just ended, and its disks are being marked; the disk is forgotten, so it only has to go.
            Err(_) => {
                self.finish(disk).await;
                disk.removed.send_replace(Some(Removal::Gone));
                Ok(())
            }
        }
    }

    /// A drain is under way and somebody does not want to wait for it.
    fn force_removal(self: &Arc<Self>, disk: &Arc<Disk>) {
        let Some((id, shard)) = disk.place() else { return };
        disk.removed.send_replace(None);
        if let Ok(call) = self.fleet.start(shard, Command::RemoveDisk { disk: id, force: true }) {
            tokio::spawn(self.clone().await_removal(disk.clone(), call));
        }
    }

    /// Ends a removal when the shard answers, however late.
    async fn await_removal(self: Arc<Self>, disk: Arc<Disk>, mut call: crate::fleet::Call) {
        let outcome = match call.answer().await {
            Ok(Reply::Removed(config)) => {
                drop(config);
                self.finish(&disk).await;
                Removal::Gone
            }
            Ok(Reply::Zombie { in_flight }) => {
                let reason =
                    format!("detached by force; {in_flight} operations of the kernel were still out");
                {
                    let mut inner = disk.inner();
                    inner.standing = Standing::Zombie;
                    inner.reason = Some(reason.clone());
                }
                self.events.record(Level::Warning, Some(&disk.name), reason);
                Removal::Zombie
            }
            // A later command with force took over, and its own task ends the removal.
            Err(error) if error.kind == ShardErrorKind::Interrupted => return,
            // The shard ended: there is nothing to drain any more.
            Err(_) if disk.place().is_none_or(|(_, shard)| self.shard_has_ended(shard)) => {
                self.finish(&disk).await;
                Removal::Gone
            }
            Err(error) => {
                self.revive(&disk).await;
                Removal::Refused(error.into())
            }
            Ok(other) => Removal::Refused(Problem::failed(format!(
                "unexpected answer of the shard to a removal: {other:?}"
            ))),
        };
        disk.removed.send_replace(Some(outcome));
    }

    fn shard_has_ended(&self, shard: usize) -> bool {
        self.fleet.shard(shard).is_none_or(|shard| shard.ended().is_some())
    }

    /// The shard refused to remove the disk: it is as before.
    async fn revive(self: &Arc<Self>, disk: &Arc<Disk>) {
        let attachment = disk.inner().attachment.clone();
        if let Err(problem) = self.state.set_disk(&disk.name, Some(attachment)).await {
            self.events.record(Level::Error, Some(&disk.name), format!("the disk stays, and: {problem}"));
        }
        let mut listeners = Listeners::bind(&self.settings(), disk).unwrap_or_default();
        listeners.serve(self, &disk.name);
        let mut inner = disk.inner();
        inner.standing = Standing::Live;
        if let Some(live) = &mut inner.live {
            live.listeners = listeners;
        }
    }

    async fn wait_for_removal(
        &self,
        disk: &Arc<Disk>,
        mut done: tokio::sync::watch::Receiver<Option<Removal>>,
        deadline: Instant,
    ) -> Result<Option<model::Disk>, Problem> {
        let outcome = tokio::time::timeout_at(deadline, done.wait_for(Option::is_some)).await;
        let outcome = outcome.ok().and_then(Result::ok).and_then(|outcome| outcome.clone());
        match outcome {
            Some(Removal::Gone) => Ok(None),
            Some(Removal::Zombie) => Ok(Some(self.describe(disk))),
            Some(Removal::Refused(problem)) => Err(problem.context(&format!("disk {}", disk.name))),
            None => Err(Problem::new(
                ProblemKind::TimedOut,
                format!(
                    "disk {} is forgotten and still draining: {} requests have not been answered by its store; it goes when \
                     they are, or detach it with --force",
                    disk.name,
                    disk.counters.io_now.get()
                ),
            )),
        }
    }

    /// The attachment will not come back after a restart.
    async fn forget(&self, disk: &Disk) -> Result<(), Problem> {
        self.state.set_disk(&disk.name, None).await
    }

    /// The shard has nothing of the disk any more: closes its image and takes it off the table.
    pub(super) async fn finish(self: &Arc<Self>, disk: &Arc<Disk>) {
        let live = disk.leave();
        disk.sharers.end_all("the disk was detached");
        match live {
            Some(live) => {
                drop(live.listeners);
                self.close(disk, live.image).await;
            }
            None => self.forget_ram_of(disk).await,
        }
        self.remove(disk);
        self.events.record(Level::Info, Some(&disk.name), "detached");
    }

    /// The memory of a RAM disk goes with its last attachment, also when that one was down.
    pub(super) async fn forget_ram_of(&self, disk: &Disk) {
        let spec = disk.inner().attachment.image.clone();
        let used = self.state.read(|state| {
            state.disks.values().any(|other| {
                let image = &other.image;
                image.image_type == spec.image_type && image.path == spec.path
            })
        });
        if !used {
            self.images.forget_ram(&spec).await;
        }
    }
}
