//! Pause, resume, fail and limits: commands to the shard that has the disk.

use std::sync::Arc;

use shard::api::{Command, DiskId, ShardErrorKind};
use tokio::time::Instant;

use super::attach::check_groups;
use super::disk::Standing;
use super::{Daemon, Disk};
use crate::limit_change::LimitChange;
use crate::model::{self, Level, QosRequest, ResumeRequest, State};
use crate::placement;
use crate::problem::{Problem, ProblemKind};
use crate::state::{Attachment, Hold};
use crate::xen::backend::Report;
use crate::xen::device::DeviceId;

impl Daemon {
    /// Holds a disk's requests; returns when nothing is in flight. A disk that cannot be quiet in time runs on.
    /// With `release` its image is closed then, and a resume opens it again.
    pub async fn pause(
        self: &Arc<Self>,
        name: &str,
        release: bool,
        deadline: Instant,
    ) -> Result<model::Disk, Problem> {
        let paused = self.hold_requests(name, deadline).await?;
        if !release {
            return Ok(paused);
        }
        let _guard = self.lock_name(name, deadline).await?;
        let disk = self.disk(name)?;
        self.release_paused(&disk, deadline).await?;
        Ok(self.describe(&disk))
    }

    async fn hold_requests(self: &Arc<Self>, name: &str, deadline: Instant) -> Result<model::Disk, Problem> {
        let (disk, id, mut call) = {
            let _guard = self.lock_name(name, deadline).await?;
            let disk = self.disk(name)?;
            let (id, shard) = live(&disk)?;
            if disk.state() == State::Paused {
                return self.keep_pause(&disk).await;
            }
            let call = self.fleet.start(shard, Command::Pause { disk: id })?;
            (disk, id, call)
        };
        // Without the lock, so that `fail` and `detach --force` can end the wait.
        match tokio::time::timeout_at(deadline, call.answer()).await {
            Ok(answer) => {
                answer.map_err(|error| named(&disk, error.into()))?;
                self.events.record(Level::Info, Some(name), "paused");
                let _guard = self.lock_name(name, deadline).await?;
                self.keep_pause(&disk).await
            }
            Err(_) => {
                let waiting = disk.counters.io_now.get();
                if let Some((_, shard)) = disk.place() {
                    self.fleet.call(shard, Command::Resume { disk: id, data_in_doubt: false }).await?;
                }
                Err(Problem::new(
                    ProblemKind::TimedOut,
                    format!(
                        "disk {name} could not be paused: {waiting} requests were not answered in time; it runs on; try a \
                         longer --timeout, or see `ctl show {name}`"
                    ),
                ))
            }
        }
    }

    /// A disk that was just paused stays so over a restart, unless something has ended the pause since. A pause that cannot be
    /// kept is ended. The caller holds the name.
    async fn keep_pause(&self, disk: &Arc<Disk>) -> Result<model::Disk, Problem> {
        let released = disk.inner().attachment.hold == Hold::Released;
        if disk.state() != State::Paused || released {
            return Ok(self.describe(disk));
        }
        if let Err(problem) = self.set_hold(disk, Hold::Paused).await {
            if let Some((id, shard)) = disk.place() {
                self.fleet.call(shard, Command::Resume { disk: id, data_in_doubt: false }).await?;
            }
            return Err(problem.context(&format!("disk {} could not be paused, and runs on", disk.name)));
        }
        disk.inner().reason.get_or_insert_with(|| Hold::Paused.reason().unwrap_or_default().to_owned());
        Ok(self.describe(disk))
    }

    /// Keeps what an operator told a disk to do. The caller holds the name, and the disk is attached.
    pub(super) async fn set_hold(&self, disk: &Disk, hold: Hold) -> Result<(), Problem> {
        let attachment = Attachment { hold, ..disk.inner().attachment.clone() };
        if attachment != disk.inner().attachment {
            self.state.set_disk(&disk.name, Some(attachment)).await?;
        }
        disk.inner().attachment.hold = hold;
        Ok(())
    }

    /// Brings a disk that was just added to a shard into the state that an operator wants. Nobody uses it yet.
    pub(super) async fn restore_hold(
        &self,
        disk: &Disk,
        shard: usize,
        id: DiskId,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let hold = disk.inner().attachment.hold;
        match hold {
            Hold::No => Ok(()),
            Hold::Paused | Hold::Released => {
                self.command(disk, shard, Command::Pause { disk: id }, deadline).await
            }
            Hold::GivenUp => self.command(disk, shard, Command::Fail { disk: id }, deadline).await,
        }
    }

    /// Runs a paused disk, or the held requests of a disk in storage-error again.
    pub async fn resume(
        self: &Arc<Self>,
        name: &str,
        request: ResumeRequest,
        deadline: Instant,
    ) -> Result<model::Disk, Problem> {
        let _guard = self.lock_name(name, deadline).await?;
        let disk = self.disk(name)?;
        if let (Standing::Down, Some(image)) = (disk.standing(), &request.image) {
            let image = image.spec()?;
            return Err(Problem::new(
                ProblemKind::Busy,
                format!(
                    "disk {name} is not served, so it cannot be given {image}: detach it, and attach {image}"
                ),
            ));
        }
        let hold = disk.inner().attachment.hold;
        if matches!(disk.standing(), Standing::Live | Standing::Down) && hold.is_pause() {
            // First, so that nothing can fail behind it.
            self.set_hold(&disk, Hold::No).await?;
            let result = self.resume_now(&disk, request, deadline).await;
            if result.is_err() {
                let hold = match &disk.inner().live {
                    Some(live) if live.image.is_released() => Hold::Released,
                    Some(_) => Hold::Paused,
                    None => hold,
                };
                self.set_hold(&disk, hold).await?;
            }
            return result;
        }
        self.resume_now(&disk, request, deadline).await
    }

    async fn resume_now(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        request: ResumeRequest,
        deadline: Instant,
    ) -> Result<model::Disk, Problem> {
        let name = &*disk.name;
        if disk.standing() == Standing::Down {
            self.try_again(disk, deadline).await?;
            if disk.state() != State::Paused {
                return Ok(self.describe(disk));
            }
            // An attempt that had begun before has brought it up as it was.
        }
        let released = disk.inner().live.as_ref().is_some_and(|live| live.image.is_released());
        match &request.image {
            Some(image) => self.change_image(disk, &image.spec()?, deadline).await?,
            None if released => {
                let image = disk.inner().attachment.image.clone();
                self.change_image(disk, &image, deadline).await?;
            }
            None => {}
        }
        let (id, shard) = live(disk)?;
        let doubts = disk.counters.data_in_doubt.get();
        let command = Command::Resume { disk: id, data_in_doubt: request.data_in_doubt };
        self.command(disk, shard, command, deadline).await.map_err(|problem| match problem {
            Problem { kind: ProblemKind::Busy, message } if !request.data_in_doubt && disk.counters.flush_failures.get() > 0 => {
                Problem::new(
                    ProblemKind::Busy,
                    format!(
                        "{message}; `ctl resume {name} --data-in-doubt` goes on all the same, `ctl fail {name}` gives the disk up"
                    ),
                )
            }
            other => other,
        })?;
        let doubted = disk.counters.data_in_doubt.get().saturating_sub(doubts);
        if doubted > 0 {
            let attachment = {
                let mut inner = disk.inner();
                inner.attachment.data_in_doubt += doubted;
                inner.attachment.clone()
            };
            self.events.record(
                Level::Error,
                Some(name),
                "resumed although a flush had failed: data that was acknowledged may be lost",
            );
            self.state.set_disk(name, Some(attachment)).await?;
        } else {
            self.events.record(Level::Info, Some(name), "resumed");
        }
        disk.inner().reason = None;
        Ok(self.describe(disk))
    }

    /// Makes a disk larger while it runs. Clients see it when they connect again.
    pub async fn resize(
        self: &Arc<Self>,
        name: &str,
        size_bytes: u64,
        deadline: Instant,
    ) -> Result<model::Disk, Problem> {
        let _guard = self.lock_name(name, deadline).await?;
        let disk = self.disk(name)?;
        let (id, shard) = live(&disk)?;
        let (now, image) = {
            let inner = disk.inner();
            let now = inner.live.as_ref().map_or(0, |live| live.image.size_bytes);
            (now, inner.attachment.image.clone())
        };
        let refuse = |why: String| Err(Problem::invalid(format!("disk {name}: {why}")));
        if !image.image_type.is_file() {
            return refuse(format!("{image} has the size of its name: attach another"));
        }
        if !size_bytes.is_multiple_of(512) || size_bytes > formats::raw::SIZE_MAX_BYTES {
            return refuse(format!("a size of {size_bytes} bytes: take a multiple of 512"));
        }
        if size_bytes < now {
            return refuse(format!(
                "it has {now} bytes, and {size_bytes} would cut data off: only growing is possible while a disk runs; detach it and use `blktapd image resize`"
            ));
        }
        if size_bytes > now {
            self.command(&disk, shard, Command::Resize { disk: id, size_bytes }, deadline).await?;
            if let Some(live) = &mut disk.inner().live {
                live.image.size_bytes = size_bytes;
            }
            let message = format!("resized from {now} to {size_bytes} bytes");
            self.events.record(Level::Info, Some(name), message);
            self.report_to_guest(&disk, Report::Resized);
            disk.sharers.resized();
        }
        Ok(self.describe(&disk))
    }

    /// Tells the guest of a disk, if it has one.
    pub(super) fn report_to_guest(&self, disk: &Disk, report: Report) {
        if let (Some(guests), Some(device)) = (self.guests.get(), device_of(disk)) {
            guests.report(device, report);
        }
    }

    /// Gives a disk up: its requests are answered with errors.
    pub async fn fail(self: &Arc<Self>, name: &str, deadline: Instant) -> Result<model::Disk, Problem> {
        self.disk(name)?.interrupt.notify_waiters();
        let _guard = self.lock_name(name, deadline).await?;
        let disk = self.disk(name)?;
        let (id, shard) = live(&disk)?;
        let before = disk.inner().attachment.hold;
        self.set_hold(&disk, Hold::GivenUp).await?;
        if let Err(problem) = self.command(&disk, shard, Command::Fail { disk: id }, deadline).await {
            self.set_hold(&disk, before).await?;
            return Err(problem);
        }
        disk.inner().reason = Hold::GivenUp.reason().map(str::to_owned);
        self.events.record(Level::Warning, Some(name), "given up by `ctl fail`");
        // Its flushes are held for ever: the guest is told by the state of the device, not by an error of a flush.
        if let (Some(guests), Some(device)) = (self.guests.get(), device_of(&disk))
            && let Err(problem) = guests.close(device, deadline).await
        {
            let message = format!("its guest could not be asked to close device {device}: {problem}");
            self.events.record(Level::Error, Some(name), message);
        }
        Ok(self.describe(&disk))
    }

    /// Makes a disk's own code panic: the test of quarantine. The shard refuses unless faults were asked for at the start.
    pub async fn inject_panic(self: &Arc<Self>, name: &str, deadline: Instant) -> Result<(), Problem> {
        let disk = self.disk(name)?;
        let (id, shard) = live(&disk)?;
        self.command(&disk, shard, Command::InjectPanic { disk: id }, deadline).await
    }

    /// Makes a shard's own code panic: the test of its end. Refused like [`Daemon::inject_panic`].
    pub async fn inject_shard_panic(&self, shard: u16, deadline: Instant) -> Result<(), Problem> {
        let shard = placement::named(&self.fleet, shard)?;
        let mut call = self.fleet.start(shard.index, Command::InjectShardPanic)?;
        match tokio::time::timeout_at(deadline, call.answer()).await {
            // There is no answer but the end.
            Ok(Err(_)) if shard.ended().is_some() => Ok(()),
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(reply)) => Err(Problem::failed(format!("unexpected answer to a panic: {reply:?}"))),
            Err(_) => Err(Problem::new(
                ProblemKind::TimedOut,
                format!("shard {} has not ended in time", shard.index),
            )),
        }
    }

    /// Changes a disk's limits and groups; in effect, and kept, when it returns.
    pub async fn set_disk_limits(
        self: &Arc<Self>,
        name: &str,
        request: QosRequest,
        deadline: Instant,
    ) -> Result<model::Disk, Problem> {
        if let Some(groups) = &request.groups {
            check_groups(groups)?;
        }
        let _guard = self.lock_name(name, deadline).await?;
        let disk = self.disk(name)?;
        if matches!(disk.standing(), Standing::Draining | Standing::Zombie | Standing::Gone) {
            return Err(Problem::new(ProblemKind::Busy, format!("disk {name} is being detached")));
        }
        let before = disk.inner().attachment.clone();
        let mut after = before.clone();
        request.limits.apply(&mut after.limits)?;
        if let Some(groups) = request.groups {
            after.groups = groups;
        }
        if after == before {
            return Ok(self.describe(&disk));
        }
        self.state.set_disk(name, Some(after.clone())).await?;
        disk.inner().attachment = after;
        if let Err(problem) = self.send_limits(&disk, deadline).await {
            disk.inner().attachment = before.clone();
            self.state.set_disk(name, Some(before)).await?;
            return Err(problem);
        }
        self.events.record(Level::Info, Some(name), format!("limits changed: {}", text(&request.limits)));
        Ok(self.describe(&disk))
    }

    /// Tells the shard the limits and groups that the disk has now.
    pub(super) async fn send_limits(&self, disk: &Arc<Disk>, deadline: Instant) -> Result<(), Problem> {
        let _place = disk.place.read().await;
        let Some((id, shard)) = disk.place() else { return Ok(()) };
        let (limits, names) = {
            let inner = disk.inner();
            (inner.attachment.limits, inner.attachment.groups.clone())
        };
        let command = Command::SetLimits { disk: id, limits, groups: self.groups.resolve(&names) };
        self.command(disk, shard, command, deadline).await
    }

    /// Changes the limits of a group, for all its disks, at once.
    pub async fn set_group_limits(
        self: &Arc<Self>,
        name: &str,
        change: &LimitChange,
    ) -> Result<model::Group, Problem> {
        formats::spec::check_disk_name(name).map_err(|error| Problem::from(error).context("group"))?;
        let mut limits = self.groups.limits(name).unwrap_or_default();
        change.apply(&mut limits)?;
        if self.groups.limits(name) == Some(limits) {
            return self.describe_group(name);
        }
        if !self.groups.is_configured(name) {
            self.state.set_group(name, Some(limits)).await?;
        }
        self.groups.set(name, limits);
        self.refresh_group(name).await;
        self.events.record(Level::Info, None, format!("limits of group {name} changed: {}", text(change)));
        self.describe_group(name)
    }

    /// Forgets a group that no disk is in.
    pub async fn delete_group(self: &Arc<Self>, name: &str) -> Result<(), Problem> {
        let group = self.describe_group(name)?;
        if group.configured || !group.disks.is_empty() {
            let why = match group.disks.first() {
                Some(disk) => format!("disk {disk} is in it: give the disk other groups first"),
                None => "the configuration names it: take it out there, and reload".to_owned(),
            };
            return Err(Problem::new(
                ProblemKind::Conflict,
                format!("group {name} cannot be removed: {why}"),
            ));
        }
        self.state.set_group(name, None).await?;
        self.groups.remove(name);
        Ok(())
    }

    /// Makes the shards look at a group's limits again: requests that wait for the old ones may go.
    pub(super) async fn refresh_group(&self, name: &str) {
        let deadline = Instant::now() + super::DEFAULT_TIMEOUT;
        for disk in self.all_disks() {
            let member = disk.inner().attachment.groups.iter().any(|group| group == name);
            if member && let Err(problem) = self.send_limits(&disk, deadline).await {
                tracing::warn!(
                    disk = &*disk.name,
                    "its shard has not heard of the new limits of group {name}: {problem}"
                );
            }
        }
    }

    /// Sends a command whose answer carries nothing, and names the disk in its error.
    async fn command(
        &self,
        disk: &Disk,
        shard: usize,
        command: Command,
        deadline: Instant,
    ) -> Result<(), Problem> {
        match tokio::time::timeout_at(deadline, self.fleet.call(shard, command)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) if error.kind == ShardErrorKind::NoSuchDisk => Err(Problem::failed(format!(
                "disk {}: its shard {shard} does not know it; report the log of the daemon",
                disk.name
            ))),
            Ok(Err(error)) => Err(named(disk, error.into())),
            Err(_) => Err(Problem::new(
                ProblemKind::TimedOut,
                format!("disk {}: shard {shard} has not answered in time: see `ctl shards`", disk.name),
            )),
        }
    }
}

/// The device of a guest that a disk is for.
pub(super) fn device_of(disk: &Disk) -> Option<DeviceId> {
    let device = disk.inner().attachment.device.clone()?;
    DeviceId::from_xenbus_path(&format!("backend/{device}"))
}

/// The disk's place on a shard, or why it has none.
pub(super) fn live(disk: &Disk) -> Result<(shard::api::DiskId, usize), Problem> {
    let (standing, reason) = {
        let inner = disk.inner();
        (inner.standing, inner.reason.clone())
    };
    let why = match standing {
        Standing::Live => match disk.place() {
            Some(place) => return Ok(place),
            None => "is on no shard".to_owned(),
        },
        Standing::Draining | Standing::Gone => "is being detached".to_owned(),
        Standing::Zombie => "was detached by force".to_owned(),
        Standing::Down => format!("is not served: {}", reason.unwrap_or_default()),
    };
    Err(Problem::new(ProblemKind::Busy, format!("disk {} {why}", disk.name)))
}

fn named(disk: &Disk, problem: Problem) -> Problem {
    if problem.message.contains(&*disk.name) {
        problem
    } else {
        problem.context(&format!("disk {}", disk.name))
    }
}

fn text(change: &LimitChange) -> String {
    serde_json::to_string(change).unwrap_or_default()
}
