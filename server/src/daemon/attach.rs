//! Attach: open the image, find a shard, add the disk, bind its socket, keep it. A step that fails takes back those before it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use shard::api::{Command, DiskId, Reply};
use shard::limits::Limits;
use tokio::time::Instant;

use super::control::device_of;
use super::disk::{Listeners, Live, Standing};
use super::{Daemon, Disk};
use crate::model::{self, AttachRequest, Level};
use crate::placement;
use crate::problem::{Problem, ProblemKind};
use crate::state::{Attachment, Hold};
use crate::xen::device::DeviceId;

/// Groups that one disk may be in.
const GROUPS_MAX: usize = 4;

impl Daemon {
    /// Serves an image as the disk `name`. Repeating an attach with equal arguments succeeds; the second value says whether
    /// the disk is new.
    pub async fn attach(
        self: &Arc<Self>,
        name: &str,
        request: AttachRequest,
        deadline: Instant,
    ) -> Result<(model::Disk, bool), Problem> {
        let mut attachment = self.checked(name, request)?;
        let device = match &attachment.request.guest {
            Some(guest) => Some(self.guests()?.resolve(guest, deadline).await?),
            None => None,
        };
        let Some(device) = device else { return self.attach_checked(name, attachment, deadline).await };
        for_device(&mut attachment, device)?;
        let read_only = attachment.request.read_only;
        let (disk, new) = self.attach_checked(name, attachment, deadline).await?;
        let live = self.find(name);
        let to_come = |yes| live.iter().for_each(|disk| disk.device_to_come.store(yes, Ordering::Relaxed));
        to_come(true);
        let created = self.guests()?.create(device, name, read_only, deadline).await;
        to_come(false);
        if let Err(problem) = created {
            // One that was cut off may have come through.
            if new
                && let Err(problem) = self.detach(name, true, Instant::now() + super::DEFAULT_TIMEOUT).await
            {
                tracing::error!(disk = name, "it could not be detached again: {problem}");
            }
            return Err(problem.context(&format!("disk {name} was not attached")));
        }
        Ok((disk, new))
    }

    /// Serves the image of a toolstack's device as the disk `name`.
    pub async fn attach_device(
        self: &Arc<Self>,
        name: &str,
        request: AttachRequest,
        device: DeviceId,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let mut attachment = self.checked(name, request)?;
        for_device(&mut attachment, device)?;
        self.attach_checked(name, attachment, deadline).await.map(drop)
    }

    async fn attach_checked(
        self: &Arc<Self>,
        name: &str,
        attachment: Attachment,
        deadline: Instant,
    ) -> Result<(model::Disk, bool), Problem> {
        let _guard = self.lock_name(name, deadline).await?;
        if let Some(disk) = self.find(name) {
            self.attach_again(&disk, &attachment, deadline).await?;
            return Ok((self.describe(&disk), false));
        }
        let disk = Disk::new(name, attachment, "it is being attached");
        let live = self.bring_up(&disk, deadline).await?;
        let kept = disk.inner().attachment.clone();
        if let Err(problem) = self.state.set_disk(name, Some(kept)).await {
            self.take_down(&disk, live).await;
            return Err(problem);
        }
        self.go_live(&disk, live);
        self.events.record(Level::Info, Some(name), format!("attached {}", disk.inner().attachment.image));
        Ok((self.describe(&disk), true))
    }

    /// What a request means, or what is wrong with it.
    fn checked(&self, name: &str, request: AttachRequest) -> Result<Attachment, Problem> {
        formats::spec::check_disk_name(name)?;
        let settings = self.settings();
        if !request.nbd && !request.blkif && request.guest.is_none() {
            return Err(Problem::invalid(format!(
                "disk {name} has no frontend, so nobody could use it; the frontends are: --nbd (NBD clients, at {}), --domain and \
                 --vdev (a guest of Xen), --blkif (clients that share memory, at {})",
                settings.nbd_socket(name).display(),
                settings.blkif_socket(name).display()
            )));
        }
        formats::spec::check_socket_path(&settings.nbd_socket(name))?;
        if request.blkif {
            formats::spec::check_socket_path(&settings.blkif_socket(name))?;
        }
        let image = request.image.spec()?;
        check_groups(&request.groups)?;
        if let Some(index) = request.shard {
            placement::named(&self.fleet, index)?;
        }
        Ok(Attachment {
            limits: request.limits.to_limits()?,
            groups: request.groups.clone(),
            on_error: request.on_error.unwrap_or(settings.on_error),
            on_enospc: request.on_enospc.unwrap_or(settings.on_enospc),
            shard: request.shard,
            data_in_doubt: 0,
            hold: Hold::No,
            device: None,
            boot: None,
            image,
            request,
        })
    }

    /// An attach of a name that exists.
    async fn attach_again(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        wanted: &Attachment,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let shard = disk.place().map(|(_, shard)| shard);
        let difference = difference(&disk.inner().attachment, wanted, shard);
        if let Some(difference) = difference {
            return Err(Problem::new(
                ProblemKind::Conflict,
                format!(
                    "disk {} exists with {difference}: detach it first, or choose another name (limits are changed with \
                     `ctl qos`, the shard with `ctl move`)",
                    disk.name
                ),
            ));
        }
        match disk.standing() {
            Standing::Live => Ok(()),
            Standing::Down => self.try_again(disk, deadline).await,
            Standing::Draining | Standing::Gone => Err(Problem::new(
                ProblemKind::Busy,
                format!("disk {} is being detached: attach it when that has ended", disk.name),
            )),
            Standing::Zombie => Err(Problem::new(
                ProblemKind::Busy,
                format!(
                    "disk {} was detached by force and operations of the kernel are still out: attach it when they have \
                     come back, or choose another name",
                    disk.name
                ),
            )),
        }
    }

    /// Opens the image and gives the disk to a shard. The disk is not live yet; nothing stays behind after an error.
    pub(super) async fn bring_up(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        deadline: Instant,
    ) -> Result<Live, Problem> {
        let attachment = disk.inner().attachment.clone();
        let request = &attachment.request;
        let image = self.images.open(&attachment.image, request.read_only, &disk.name, deadline).await?;
        let seat = match self.seat(&attachment) {
            Ok(seat) => seat,
            Err(problem) => {
                self.close(disk, image).await;
                return Err(problem);
            }
        };
        let id = self.new_id();
        let config = disk.config(id, &image, self.groups.resolve(&attachment.groups));
        let shard = seat.shard().index;
        let added = match self.fleet.start(shard, Command::AddDisk(config)) {
            Ok(mut call) => match tokio::time::timeout_at(deadline, call.answer()).await {
                Ok(answer) => answer.map_err(Problem::from),
                Err(_) => {
                    // The shard may still take it: then it has to give it back before the image can be closed.
                    let (daemon, late) = (self.clone(), disk.clone());
                    tokio::spawn(async move {
                        if call.answer().await.is_ok() {
                            daemon.remove_from_shard(shard, id).await;
                        }
                        daemon.close(&late, image).await;
                        drop(seat);
                    });
                    return Err(Problem::new(
                        ProblemKind::TimedOut,
                        format!("shard {shard} has not taken disk {} in time: see `ctl shards`", disk.name),
                    ));
                }
            },
            Err(error) => Err(error.into()),
        };
        let mut live = Live { id, seat, image, listeners: Listeners::default() };
        if let Err(problem) = added {
            self.close(disk, live.image).await;
            return Err(problem.context(&format!("disk {}", disk.name)));
        }
        if let Err(problem) = self.restore_hold(disk, shard, id, deadline).await {
            self.take_down(disk, live).await;
            return Err(problem);
        }
        match Listeners::bind(&self.settings(), disk) {
            Ok(listeners) => live.listeners = listeners,
            Err(problem) => {
                self.take_down(disk, live).await;
                return Err(problem);
            }
        }
        Ok(live)
    }

    fn seat(&self, attachment: &Attachment) -> Result<crate::fleet::Seat, Problem> {
        // A shard that was chosen in another run need not exist in this one.
        let wanted = attachment.shard.filter(|index| placement::named(&self.fleet, *index).is_ok());
        placement::place(&self.fleet, wanted)
    }

    /// The disk serves from now on.
    pub(super) fn go_live(self: &Arc<Self>, disk: &Arc<Disk>, mut live: Live) {
        live.listeners.serve(self, &disk.name);
        if let Some(note) = &live.image.note {
            self.events.record(Level::Warning, Some(&disk.name), note.clone());
        }
        disk.go_live(live);
        self.insert(disk);
        if let (Some(guests), Some(device)) = (self.guests.get(), device_of(disk)) {
            guests.retry(device);
        }
    }

    /// Undoes [`Daemon::bring_up`].
    pub(super) async fn take_down(self: &Arc<Self>, disk: &Arc<Disk>, live: Live) {
        let Live { id, seat, image, listeners } = live;
        drop(listeners);
        self.remove_from_shard(seat.shard().index, id).await;
        self.close(disk, image).await;
    }

    async fn remove_from_shard(&self, shard: usize, id: DiskId) {
        match self.fleet.call(shard, Command::RemoveDisk { disk: id, force: true }).await {
            Ok(Reply::Removed(config)) => drop(config),
            Ok(other) => tracing::warn!(shard, "unexpected answer to the removal of a new disk: {other:?}"),
            Err(error) => tracing::warn!(shard, "a new disk could not be removed again: {error}"),
        }
    }

    /// Gives an image back; the memory of a RAM disk goes when no attachment is left that names it.
    pub(super) async fn close(&self, disk: &Disk, image: crate::images::OpenImage) {
        self.images.release(image, &disk.name).await;
        self.forget_ram_of(disk).await;
    }
}

/// Makes an attachment one of a guest. What a guest's file system is told to be an error it gives up on, so by default requests wait.
fn for_device(attachment: &mut Attachment, device: DeviceId) -> Result<(), Problem> {
    let boot = crate::state::boot_id();
    attachment.boot = Some(boot.ok_or_else(|| Problem::failed("the boot id of the host cannot be read"))?);
    attachment.device = Some(device.to_string());
    if attachment.request.on_error.is_none() {
        attachment.on_error = model::ErrorPolicy::Pause;
    }
    if attachment.request.on_enospc.is_none() {
        attachment.on_enospc = model::ErrorPolicy::Pause;
    }
    Ok(())
}

/// Checks names of groups.
pub(super) fn check_groups(groups: &[String]) -> Result<(), Problem> {
    if groups.len() > GROUPS_MAX {
        return Err(Problem::invalid(format!(
            "{} groups are given: at most {GROUPS_MAX} are possible",
            groups.len()
        )));
    }
    for (index, name) in groups.iter().enumerate() {
        formats::spec::check_disk_name(name).map_err(|error| Problem::from(error).context("group"))?;
        if groups[..index].contains(name) {
            return Err(Problem::invalid(format!("group {name} is given twice: give it once")));
        }
    }
    Ok(())
}

/// What an existing disk has that the request does not ask for; `None` when the request is one that it fulfils. Limits and
/// groups may be those of the first attach or those of now.
fn difference(existing: &Attachment, wanted: &Attachment, shard: Option<usize>) -> Option<String> {
    let (old, new) = (&existing.request, &wanted.request);
    if existing.image.target() != wanted.image.target() {
        return Some(format!("image {} instead of {}", existing.image, wanted.image));
    }
    let word = |yes: bool, what: &str| if yes { what.to_owned() } else { format!("no {what}") };
    if old.read_only != new.read_only {
        return Some(format!(
            "{} instead of {}",
            word(old.read_only, "--read-only"),
            word(new.read_only, "--read-only")
        ));
    }
    if old.nbd != new.nbd {
        return Some(format!("{} instead of {}", word(old.nbd, "--nbd"), word(new.nbd, "--nbd")));
    }
    if old.blkif != new.blkif {
        return Some(format!("{} instead of {}", word(old.blkif, "--blkif"), word(new.blkif, "--blkif")));
    }
    if existing.device != wanted.device {
        let name = |device: &Option<String>| device.clone().unwrap_or_else(|| "no guest".into());
        return Some(format!("{} instead of {}", name(&existing.device), name(&wanted.device)));
    }
    if wanted.limits != existing.limits && Ok(wanted.limits) != old.limits.to_limits() {
        return Some(format!(
            "limits {} instead of {}",
            limits_text(&existing.limits),
            limits_text(&wanted.limits)
        ));
    }
    if wanted.groups != existing.groups && wanted.groups != old.groups {
        return Some(format!("groups {:?} instead of {:?}", existing.groups, wanted.groups));
    }
    if new.on_error.is_some_and(|policy| policy != existing.on_error) {
        return Some(format!("on-error {:?} instead of {:?}", existing.on_error, wanted.on_error));
    }
    if new.on_enospc.is_some_and(|policy| policy != existing.on_enospc) {
        return Some(format!("on-enospc {:?} instead of {:?}", existing.on_enospc, wanted.on_enospc));
    }
    match (new.shard, shard) {
        (Some(wanted), Some(now)) if usize::from(wanted) != now => {
            Some(format!("shard {now} instead of {wanted}"))
        }
        _ => None,
    }
}

fn limits_text(limits: &Limits) -> String {
    serde_json::to_string(&crate::limit_change::LimitChange::from(limits)).unwrap_or_default()
}
