//! Live snapshots, and another image for a paused disk.
//!
//! ```text
//! check ─▶ make the overlays ─▶ pause all ─▶ [one instant] ─▶ the overlays take over ─▶ kept ─▶ resume all
//!             └────────────────── on any failure: the old images come back, the overlays go, all run ──┘
//! ```
//! The pause of all disks together is the instant of the snapshot: nothing is in flight on any of them, and nothing begins before
//! the new state is on the disk. After a crash before that the disks have their old images, and nobody has written to an overlay;
//! after a crash behind it they have the new ones.

use std::path::Path;
use std::sync::Arc;

use formats::crypt::Secret;
use formats::crypt::source::KeySources;
use formats::driver::Create;
use formats::spec::{ImageSpec, ImageType, Target};
use shard::api::{Backend, ChainLayer, Command, DiskId, ImageChain};
use tokio::sync::OwnedRwLockReadGuard;
use tokio::time::Instant;

use super::control::live;
use super::{Daemon, Disk, NameGuard};
use crate::images::OpenImage;
use crate::model::{self, Level, SnapshotItem, State};
use crate::problem::{Problem, ProblemKind};
use crate::state::{Attachment, Hold};

/// One disk of a snapshot on its way.
struct Taking {
    disk: Arc<Disk>,
    spec: ImageSpec,
    /// It was paused before, and stays so.
    paused: bool,
    /// The overlay exists.
    made: bool,
    /// The overlay with the old image below, open; until the disk has it.
    next: Option<OpenImage>,
    /// The shard was told to take the overlay.
    swapped: bool,
}

impl Daemon {
    /// Puts a new overlay over each of some disks, all at one instant: what they hold then stays in their images.
    pub async fn snapshot(
        self: &Arc<Self>,
        mut items: Vec<SnapshotItem>,
        deadline: Instant,
    ) -> Result<Vec<model::Disk>, Problem> {
        items.sort_by(|a, b| a.disk.cmp(&b.disk));
        if let Some(pair) = items.windows(2).find(|pair| pair[0].disk == pair[1].disk) {
            return Err(Problem::invalid(format!("disk {} is given twice: give it once", pair[0].disk)));
        }
        if items.is_empty() {
            return Err(Problem::invalid("no disk is given: name at least one, as NAME=TYPE:FILE"));
        }
        let mut guards: Vec<(NameGuard, OwnedRwLockReadGuard<()>)> = Vec::new();
        let mut taking = Vec::new();
        // In the order of their names, so that two snapshots never wait for each other.
        for item in &items {
            let name = self.lock_name(&item.disk, deadline).await?;
            let place = self.hold_place(&*self.disk(&item.disk)?, deadline).await?;
            guards.push((name, place));
            taking.push(self.check_snapshot(item)?);
        }
        let result = self.take_snapshot(&mut taking, deadline).await;
        if let Err(problem) = result {
            // It may have failed because its time was up; what it made goes all the same.
            self.undo_snapshot(taking, Instant::now() + super::DEFAULT_TIMEOUT).await;
            return Err(problem.context("no snapshot was taken"));
        }
        let disks = taking.iter().map(|one| self.describe(&one.disk)).collect();
        drop(guards);
        Ok(disks)
    }

    /// Whether a disk can have the overlay that is asked for.
    fn check_snapshot(&self, item: &SnapshotItem) -> Result<Taking, Problem> {
        let disk = self.disk(&item.disk)?;
        live(&disk)?;
        let spec = item.image.spec()?;
        let refuse = |why: String| Err(Problem::invalid(format!("disk {}: {why}", disk.name)));
        let Target::Image { options, .. } = spec.target()? else {
            return refuse(format!("{spec} cannot be an overlay: use qcow2:FILE or vhd:FILE"));
        };
        if options.snapshot.is_some() {
            return refuse(format!("{spec} names a snapshot inside an image; an overlay is a new file"));
        }
        if disk.inner().live.as_ref().is_some_and(|live| live.image.is_released()) {
            let message = format!("disk {}: its image was released by a pause: resume it first", disk.name);
            return Err(Problem::new(ProblemKind::Busy, message));
        }
        let paused = match disk.state() {
            State::Running => false,
            State::Paused => true,
            state => {
                let why = format!("is {}: only a disk that runs or is paused can be snapshot", state.name());
                return Err(Problem::new(ProblemKind::Busy, format!("disk {} {why}", disk.name)));
            }
        };
        let (image, read_only) = {
            let inner = disk.inner();
            (inner.attachment.image.clone(), inner.attachment.request.read_only)
        };
        if read_only {
            return refuse("is read-only, so there is nothing that a snapshot could keep".into());
        }
        if !image.image_type.is_file() {
            return refuse(format!("is of type {}: only files and devices have snapshots", image.image_type));
        }
        Ok(Taking { disk, spec, paused, made: false, next: None, swapped: false })
    }

    async fn take_snapshot(
        self: &Arc<Self>,
        taking: &mut [Taking],
        deadline: Instant,
    ) -> Result<(), Problem> {
        for one in taking.iter_mut() {
            self.make_overlay(one, deadline).await.map_err(|problem| named(&one.disk, problem))?;
        }
        self.pause_all(taking, deadline).await?;
        for one in taking.iter_mut() {
            self.swap_to_overlay(one).await.map_err(|problem| named(&one.disk, problem))?;
        }
        let kept = taking.iter().map(|one| (one.disk.name.to_string(), after(one))).collect();
        self.state.set_disks(kept).await?;
        // From here on the snapshot is taken.
        for one in taking.iter_mut() {
            one.disk.inner().attachment = after(one);
            self.finish_snapshot(one).await;
        }
        Ok(())
    }

    /// Makes the new file over the disk's image, and opens it.
    async fn make_overlay(&self, one: &mut Taking, deadline: Instant) -> Result<(), Problem> {
        let (link, below, spec, size, encrypted) = {
            let inner = one.disk.inner();
            let spec = inner.attachment.image.clone();
            let image = inner.live.as_ref().map(|live| &live.image);
            let Some((image, file)) = image.and_then(|image| Some((image, image.file()?))) else {
                return Err(Problem::failed("it has no file"));
            };
            (image.link(&spec), file, spec, image.size_bytes, image.encrypted())
        };
        let (options, key) = self.encryption_of_overlay(one, &spec, &encrypted, deadline).await?;
        let create = Create { size: None, backing: Some((link, size)), options, key };
        self.images.create_overlay(&one.spec, create, &one.disk.name, deadline).await?;
        one.made = true;
        let top = self.images.open_overlay(&one.spec, (below, &spec), &one.disk.name, deadline).await?;
        let size_bytes = top.size_bytes;
        one.next = Some(top);
        if size_bytes != size {
            return Err(Problem::failed(format!(
                "the overlay {} has {size_bytes} bytes and the disk {size}: the format {} cannot have this size exactly; use \
                 another",
                one.spec, one.spec.image_type
            )));
        }
        Ok(())
    }

    /// How the overlay over an image of `below` is encrypted: if a key is named for it, which must be so when what is right below it is.
    /// The keys of the images below are named in its own specification from now on.
    async fn encryption_of_overlay(
        &self,
        one: &mut Taking,
        below: &ImageSpec,
        encrypted: &[bool],
        deadline: Instant,
    ) -> Result<(Vec<(String, String)>, Option<Secret>), Problem> {
        let keys_of = |spec: &ImageSpec| match spec.target() {
            Ok(Target::Image { options, .. }) => options.keys,
            _ => KeySources::default(),
        };
        let own = keys_of(&one.spec);
        for (option, value) in keys_of(below).carried(encrypted) {
            if !KeySources::KINDS.iter().any(|kind| {
                option
                    .rsplit_once('-')
                    .is_some_and(|(_, number)| one.spec.options.contains_key(&format!("{kind}-{number}")))
            }) {
                one.spec.options.insert(option, value);
            }
        }
        match own.of(0) {
            None if encrypted.first() == Some(&true) => Err(Problem::invalid(format!(
                "it is encrypted and {} would not be: name a key for the overlay, like qcow2:FILE?key-file=PATH",
                one.spec
            ))),
            None => Ok((Vec::new(), None)),
            Some(_) if one.spec.image_type != ImageType::Image("qcow2") => Err(Problem::invalid(format!(
                "a key is named for {}, and only a qcow2 overlay can be encrypted",
                one.spec
            ))),
            Some(source) => {
                let key = self.images.read_key(source, deadline).await?;
                Ok((vec![("encrypt.format".to_owned(), "luks".to_owned())], Some(key)))
            }
        }
    }

    /// Holds the requests of all disks; returns when nothing is in flight on any.
    async fn pause_all(&self, taking: &[Taking], deadline: Instant) -> Result<(), Problem> {
        let mut calls = Vec::new();
        for one in taking.iter().filter(|one| !one.paused) {
            let (id, shard) = live(&one.disk)?;
            calls.push((one, self.fleet.start(shard, Command::Pause { disk: id })?));
        }
        for (one, mut call) in calls {
            match tokio::time::timeout_at(deadline, call.answer()).await {
                Ok(answer) => drop(answer.map_err(|error| named(&one.disk, error.into()))?),
                Err(_) => {
                    let waiting = one.disk.counters.io_now.get();
                    return Err(Problem::new(
                        ProblemKind::TimedOut,
                        format!(
                            "disk {}: {waiting} requests were not answered in time, and it runs on; try a longer --timeout, \
                             or see `ctl show {}`",
                            one.disk.name, one.disk.name
                        ),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Gives the paused disk the overlay with the old image below it.
    async fn swap_to_overlay(&self, one: &mut Taking) -> Result<(), Problem> {
        let (id, shard) = live(&one.disk)?;
        let Some(next) = &mut one.next else { return Ok(()) };
        let old = {
            let inner = one.disk.inner();
            let attachment = inner.attachment.image.clone();
            inner.live.as_ref().map(|live| (live.image.backend.clone(), attachment))
        };
        let Some((old, old_spec)) = old else { return Err(Problem::failed("it has no image")) };
        next.backend = stack(&next.backend, &old, &old_spec)?;
        // Before the answer: one that says no may have come after the change.
        one.swapped = true;
        self.fleet.call(shard, Command::Swap { disk: id, backend: next.backend.clone() }).await?;
        Ok(())
    }

    /// The disk has its overlay for good: it runs on, and its old image becomes one that is only read.
    async fn finish_snapshot(&self, one: &mut Taking) {
        let Some(next) = one.next.take() else { return };
        let unused = match &mut one.disk.inner().live {
            Some(live) => {
                live.image.put_on_top(next);
                None
            }
            None => Some(next),
        };
        if let Some(next) = unused {
            self.images.release(next, &one.disk.name).await;
        }
        if let (false, Ok((id, shard))) = (one.paused, live(&one.disk)) {
            match self.fleet.call(shard, Command::Resume { disk: id, data_in_doubt: false }).await {
                Ok(_) => one.disk.inner().reason = None,
                Err(error) => {
                    let message = format!("its snapshot was taken, and it could not be resumed: {error}");
                    self.events.record(Level::Error, Some(&one.disk.name), message);
                }
            }
        }
        let below = one.disk.inner().live.as_ref().map(|live| live.image.below());
        if let Some(below) = below {
            self.images.become_reader(&below, &one.disk.name).await;
        }
        let message = format!("snapshot taken: {} is on top now", one.spec);
        self.events.record(Level::Info, Some(&one.disk.name), message);
    }

    /// Brings the old images back and lets the disks go on.
    async fn undo_snapshot(&self, taking: Vec<Taking>, deadline: Instant) {
        for mut one in taking {
            if let Ok((id, shard)) = live(&one.disk) {
                let old = one.disk.inner().live.as_ref().map(|live| live.image.backend.clone());
                if let (true, Some(old)) = (one.swapped, old)
                    && let Err(error) = self.fleet.call(shard, Command::Swap { disk: id, backend: old }).await
                {
                    self.give_up_between_images(&mut one, id, shard, &error.message).await;
                    continue;
                }
                // Also ends a pause that is still waited for.
                let resume = Command::Resume { disk: id, data_in_doubt: false };
                if !one.paused
                    && matches!(one.disk.state(), State::Paused | State::Pausing)
                    && let Err(error) = self.fleet.call(shard, resume).await
                {
                    let message = format!("it could not be resumed after a failed snapshot: {error}");
                    self.events.record(Level::Error, Some(&one.disk.name), message);
                }
            }
            if let Some(next) = one.next.take() {
                self.images.release(next, &one.disk.name).await;
            }
            if one.made {
                self.images.remove_overlay(&one.spec, deadline).await;
            }
        }
    }

    /// Nobody knows which image the shard has: nothing may be acknowledged any more, and no file of either is given back before
    /// the disk is detached. The attachment names the old image.
    async fn give_up_between_images(&self, one: &mut Taking, id: DiskId, shard: usize, why: &str) {
        let failed = self.fleet.call(shard, Command::Fail { disk: id }).await;
        let reason = format!(
            "its image could not be brought back after a failed snapshot: {why}; detach it, and attach it again"
        );
        if let Err(error) = failed {
            tracing::error!(disk = &*one.disk.name, "it could not be given up: {error}");
        }
        {
            let mut inner = one.disk.inner();
            inner.reason = Some(reason.clone());
            if let (Some(live), Some(next)) = (&mut inner.live, one.next.take()) {
                live.image.put_on_top(next);
            }
        }
        self.events.record(Level::Error, Some(&one.disk.name), reason);
    }

    /// Gives a paused disk another image: what a script has made of the old one. The old image is closed before the new one is
    /// opened, which may refer to it.
    pub(super) async fn change_image(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        spec: &ImageSpec,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let (id, shard) = live(disk)?;
        if disk.state() != State::Paused {
            return Err(Problem::new(
                ProblemKind::Busy,
                format!(
                    "disk {} is {}: pause it before it gets another image",
                    disk.name,
                    disk.state().name()
                ),
            ));
        }
        let _place = self.hold_place(disk, deadline).await?;
        let before = disk.inner().attachment.clone();
        let mut after = before.clone();
        after.image = spec.clone();
        after.request.image = model::Image::Parts(spec.clone());
        let released = disk.inner().live.as_ref().is_some_and(|live| live.image.is_released());
        if !released {
            self.fleet.call(shard, Command::Swap { disk: id, backend: Backend::Null }).await?;
            self.release_image(disk).await;
        }
        let Err(problem) = self.open_into(disk, (id, shard), after, deadline).await else { return Ok(()) };
        if released {
            return Err(problem.context(&format!("disk {} stays paused, its image released", disk.name)));
        }
        // It was open until now, and is wanted back although the command has used up its time.
        let deadline = Instant::now() + super::DEFAULT_TIMEOUT;
        let Err(second) = self.open_into(disk, (id, shard), before, deadline).await else {
            return Err(problem);
        };
        let reason = format!(
            "paused, and its image is closed: {problem}; then its old image: {second}; `ctl resume` tries that one again"
        );
        disk.inner().reason = Some(reason.clone());
        self.events.record(Level::Error, Some(&disk.name), reason.clone());
        Err(Problem::failed(format!("disk {} is {reason}", disk.name)))
    }

    /// Opens the image of `attachment` for a paused disk that has none, and keeps that. After an error it has none.
    async fn open_into(
        &self,
        disk: &Arc<Disk>,
        (id, shard): (DiskId, usize),
        attachment: Attachment,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let (spec, read_only) = (&attachment.image, attachment.request.read_only);
        let before = disk.inner().attachment.clone();
        let size = disk.inner().live.as_ref().map_or(0, |live| live.image.size_bytes);
        let image = self.images.open(spec, read_only, &disk.name, deadline).await?;
        let taken = async {
            if image.size_bytes != size {
                return Err(Problem::invalid(format!(
                    "{spec} has {} bytes and the disk has {size}: its clients would see another size; give it an image of the \
                     same size, or detach and attach it",
                    image.size_bytes
                )));
            }
            // Kept first: behind a change that was not kept a restart would bring the old image back.
            self.state.set_disk(&disk.name, Some(attachment.clone())).await?;
            let swap = Command::Swap { disk: id, backend: image.backend.clone() };
            if let Err(error) = self.fleet.call(shard, swap).await {
                self.state.set_disk(&disk.name, Some(before)).await?;
                return Err(Problem::from(error));
            }
            Ok(())
        };
        let unused = match taken.await {
            Ok(()) => {
                let mut inner = disk.inner();
                inner.attachment = attachment;
                match &mut inner.live {
                    Some(live) => {
                        live.image = image;
                        return Ok(());
                    }
                    None => (image, Ok(())),
                }
            }
            Err(problem) => (image, Err(problem)),
        };
        self.images.release(unused.0, &disk.name).await;
        unused.1
    }

    /// Closes the image of a paused disk, so that others can work on it. Its clients wait. The caller holds the name.
    pub(super) async fn release_paused(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        deadline: Instant,
    ) -> Result<(), Problem> {
        let (id, shard) = live(disk)?;
        let image = disk.inner().attachment.image.clone();
        if !image.image_type.is_file() {
            return Err(Problem::invalid(format!(
                "disk {} is paused; {image} has no file to release",
                disk.name
            )));
        }
        if disk.state() != State::Paused || disk.inner().live.as_ref().is_none_or(|l| l.image.is_released()) {
            return Ok(());
        }
        let _place = self.hold_place(disk, deadline).await?;
        // First: whatever happens behind it, nobody opens a file that others were promised.
        self.set_hold(disk, Hold::Released).await?;
        let swap = Command::Swap { disk: id, backend: Backend::Null };
        if let Err(error) = self.fleet.call(shard, swap).await {
            self.set_hold(disk, Hold::Paused).await?;
            return Err(Problem::from(error).context(&format!("disk {} is paused; its image", disk.name)));
        }
        self.release_image(disk).await;
        disk.inner().reason = Hold::Released.reason().map(str::to_owned);
        self.events.record(Level::Info, Some(&disk.name), format!("paused: {image} is released"));
        Ok(())
    }

    /// Keeps a disk on its shard, and what is known of it in place when that shard ends, until the guard goes.
    async fn hold_place(&self, disk: &Disk, deadline: Instant) -> Result<OwnedRwLockReadGuard<()>, Problem> {
        let place = disk.place.clone().read_owned();
        tokio::time::timeout_at(deadline, place).await.map_err(|_| {
            let message = format!("disk {}: its shard is being changed; try again", disk.name);
            Problem::new(ProblemKind::TimedOut, message)
        })
    }

    /// Closes the image of a disk that its shard does not use.
    async fn release_image(&self, disk: &Arc<Disk>) {
        let old = disk.inner().live.as_mut().map(|live| {
            let empty = OpenImage::nothing(live.image.size_bytes);
            std::mem::replace(&mut live.image, empty)
        });
        if let Some(old) = old {
            self.images.release(old, &disk.name).await;
        }
    }
}

/// The attachment with the overlay.
fn after(one: &Taking) -> Attachment {
    let mut attachment = one.disk.inner().attachment.clone();
    attachment.image = one.spec.clone();
    attachment.request.image = model::Image::Parts(one.spec.clone());
    if !one.paused {
        attachment.hold = Hold::No;
    }
    attachment
}

/// The chain of an overlay over what a disk has.
fn stack(overlay: &Backend, old: &Backend, old_spec: &ImageSpec) -> Result<Backend, Problem> {
    let Backend::Image(top) = overlay else { return Err(Problem::failed("the overlay is no image")) };
    let mut layers = top.layers.clone();
    match old {
        Backend::Image(chain) => {
            let below = chain.layers.iter().cloned().enumerate();
            layers.extend(below.map(|(index, layer)| ChainLayer {
                writable: false,
                flush: index == 0,
                ..layer
            }));
        }
        Backend::File(file) => {
            let format = formats::registry::format("raw").ok_or_else(|| Problem::failed("no raw format"))?;
            layers.push(ChainLayer {
                format,
                files: vec![file.clone()],
                names: vec![Path::new(&old_spec.path).display().to_string().into()],
                writable: false,
                flush: true,
                snapshot: None,
                key: None,
                log: None,
            });
        }
        Backend::Ram(_) | Backend::Null => return Err(Problem::failed("the disk has no file")),
    }
    if layers.len() > formats::volume::DEPTH_MAX {
        return Err(Problem::invalid(format!(
            "the chain would have {} images, and {} are possible: shorten it with `blktapd image coalesce`",
            layers.len(),
            formats::volume::DEPTH_MAX
        )));
    }
    Ok(Backend::Image(Arc::new(ImageChain { layers })))
}

fn named(disk: &Disk, problem: Problem) -> Problem {
    let name = format!("disk {}", disk.name);
    if problem.message.contains(&name) { problem } else { problem.context(&name) }
}
