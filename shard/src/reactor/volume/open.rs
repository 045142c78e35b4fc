//! Opening and closing the image of a disk, and the files of an offline tool.

use std::rc::Rc;
use std::sync::Arc;

use formats::allocation_log::{AllocationLog, replay};
use formats::driver::Open;
use formats::error::Error;
use formats::metadata::Budget;
use formats::volume::{Layer, Volume};

use super::*;
use crate::alog::{Log, LogFile};
use crate::api::{DiskConfig, ErrorPolicy, FileKind, ImageChain, Reply, ShardError, ShardErrorKind};
use crate::image::{Port, ShardFile};
use crate::limits::Limits;

impl<K: Kernel> Shard<K> {
    /// Begins the work of an offline tool on files: its one future runs until [`Shard::tool_runs`] says no.
    pub(crate) fn start_tool(
        &mut self,
        files: &[crate::offline::OfflineFile],
        work: impl FnOnce(
            Vec<Rc<dyn formats::file::ImageFile>>,
            Rc<Budget>,
        ) -> formats::file::Pending<'static, ()>,
    ) {
        let config = Box::new(DiskConfig {
            id: DiskId(0),
            name: "tool".into(),
            backend: Backend::Null,
            size_bytes: 0,
            read_only: true,
            on_error: ErrorPolicy::Report,
            on_enospc: ErrorPolicy::Report,
            limits: Limits::default(),
            groups: Vec::new(),
            counters: Arc::default(),
        });
        let slot = self.insert_entry(config, None);
        let port = Rc::new(Port::default());
        let (mut slots, mut opened) = (Vec::new(), Vec::new());
        for file in files {
            let file = self.insert_file(slot, &port, &file.image, &file.name, (file.writable, false));
            slots.push(file.slot);
            opened.push(Rc::new(file) as Rc<dyn formats::file::ImageFile>);
        }
        let mut engine = Engine::new(Stage::Closed, port, Rc::default(), slots);
        let budget = self.budget.clone();
        let work = work(opened, budget);
        engine.spawn(For::Tool, Box::pin(async move { work.await.map(|()| Outcome::Done) }));
        self.disks[slot as usize].engine = Some(Box::new(engine));
        self.awake.push(slot);
        self.run_actions();
    }

    /// A tool's future, or I/O that it asked for, is still under way.
    pub(crate) fn tool_runs(&self) -> bool {
        self.disks.iter().any(|(_, entry)| {
            entry.ops > 0 || entry.engine.as_ref().is_some_and(|engine| !engine.tasks.is_empty())
        })
    }

    /// The hidden disk of a file of the disk `owner`.
    fn insert_file(
        &mut self,
        owner: u32,
        port: &Rc<Port>,
        image: &Arc<crate::api::ImageFile>,
        name: &Arc<str>,
        (writable, flush): (bool, bool),
    ) -> ShardFile {
        let config = Box::new(DiskConfig {
            id: DiskId(u64::MAX),
            name: name.clone(),
            backend: Backend::File(image.clone()),
            size_bytes: formats::raw::SIZE_MAX_BYTES,
            read_only: !writable && !flush,
            // The disk of the volume decides what a failure means.
            on_error: ErrorPolicy::Report,
            on_enospc: ErrorPolicy::Report,
            limits: Limits::default(),
            groups: Vec::new(),
            counters: Arc::default(),
        });
        ShardFile {
            port: port.clone(),
            slot: self.insert_entry(config, Some(owner)),
            name: name.clone(),
            image: image.clone(),
            device: matches!(image.kind, FileKind::Block { .. }),
            writable,
            memory_align: image.memory_align.max(1),
        }
    }

    /// Makes the hidden disks of an image's files and begins to open it. `tag` is answered when that has ended.
    pub(in crate::reactor) fn start_engine(&mut self, slot: u32, chain: &ImageChain, tag: Option<u64>) {
        let port = Rc::new(Port::default());
        let (mut slots, mut files) = (Vec::new(), Vec::new());
        for layer in &chain.layers {
            let mut layer_files = Vec::new();
            for (file, name) in layer.files.iter().zip(&layer.names) {
                let file = self.insert_file(slot, &port, file, name, (layer.writable, layer.flush));
                slots.push(file.slot);
                layer_files.push(Rc::new(file));
            }
            files.push(layer_files);
        }
        let engine = Engine::new(Stage::Opening { tag }, port, Rc::new(files), slots);
        self.disks[slot as usize].engine = Some(Box::new(engine));
        self.open_engine(slot, chain, tag);
    }

    /// Begins to open an image whose files have their disks.
    fn open_engine(&mut self, slot: u32, chain: &ImageChain, tag: Option<u64>) {
        let budget = self.budget.clone();
        let Some(engine) = &mut self.disks[slot as usize].engine else { return };
        engine.stage = Stage::Opening { tag };
        let future = Box::pin(open(chain.clone(), engine.files.clone(), budget));
        engine.spawn(For::Open, future);
        self.hold_disk(slot, true);
        self.awake.push(slot);
    }

    /// Opens the image anew after its disk was rebuilt.
    pub(in crate::reactor) fn reopen_engine(&mut self, slot: u32) {
        if let Some(Backend::Image(chain)) = self.backend(slot).cloned() {
            self.open_engine(slot, &chain, None);
        }
    }

    pub(in crate::reactor) fn hold_disk(&mut self, slot: u32, hold: bool) {
        self.with_disk(slot, |disk, ctx| disk.set_opening(ctx, hold));
    }

    /// After a panic: nothing of the volume goes on, except what the kernel has.
    pub(in crate::reactor) fn drop_volume(&mut self, slot: u32) {
        let Some(engine) = &mut self.disks[slot as usize].engine else { return };
        // Its destructors are code of the driver as well.
        if let Err(message) = guarded(|| engine.drop_volume()) {
            tracing::error!("a driver failed while its image was given up: {message}");
        }
        let port = engine.port.clone();
        for job in port.take() {
            port.answer(job.reply, Err(libc::EIO));
        }
    }

    /// Begins to close the image of a disk at rest. True when it is closed already, or there is none.
    pub(in crate::reactor) fn close_engine(&mut self, slot: u32) -> bool {
        let Some(engine) = &mut self.disks[slot as usize].engine else { return true };
        match (engine.stage, engine.volume.clone()) {
            (Stage::Closed, _) => return true,
            (Stage::Open, Some(volume)) => {
                engine.stage = Stage::Closing;
                let future = async move { volume.close().await.map(|()| Outcome::Done) };
                engine.spawn(For::Close, Box::pin(future));
                self.awake.push(slot);
            }
            _ => {}
        }
        false
    }

    /// Takes the hidden disks of a volume away. None of their operations is out.
    pub(in crate::reactor) fn remove_engine(&mut self, slot: u32) {
        let Some(mut engine) = self.disks[slot as usize].engine.take() else { return };
        if let Err(message) = guarded(|| engine.drop_volume()) {
            tracing::error!("a driver failed while its image was given up: {message}");
        }
        for file in engine.slots.drain(..) {
            self.disks.remove(file as usize);
        }
    }

    pub(super) fn open_done(&mut self, slot: u32, result: Result<Outcome, Error>) {
        let Some(engine) = &mut self.disks[slot as usize].engine else { return };
        let Stage::Opening { tag } = engine.stage else { return };
        match result {
            Ok(Outcome::Open(volume)) => {
                let size = volume.size();
                engine.volume = Some(volume);
                engine.stage = Stage::Open;
                self.with_disk(slot, |disk, _| disk.set_size(size));
                self.hold_disk(slot, false);
                if let Some(tag) = tag {
                    self.reply(tag, Ok(Reply::Done));
                }
                self.swap_opened(slot);
            }
            Ok(_) => {}
            Err(error) => {
                engine.stage = Stage::Closed;
                let entry = &self.disks[slot as usize];
                let unseen = entry.conns.is_empty() && entry.requests == 0;
                if let Some(tag) = tag.filter(|_| unseen) {
                    // Nobody has seen the disk yet; it goes when its operations have come back.
                    self.disks[slot as usize].failed_open = Some((tag, error.message));
                    return self.unsettled.push(slot);
                }
                if let Some(tag) = tag {
                    // It came with its clients: it is here, and its state says what it is.
                    self.reply(tag, Ok(Reply::Done));
                }
                if self.swap_failed(slot, &error.message) {
                    return;
                }
                let reason = format!("its image cannot be opened again: {error}");
                self.with_disk(slot, |disk, ctx| {
                    disk.set_opening(ctx, false);
                    disk.fail(ctx, DiskState::Failed, &reason);
                });
                let id = self.disks[slot as usize].id;
                self.events.send(Event::State { disk: id, state: DiskState::Failed, reason });
            }
        }
        self.unsettled.push(slot);
    }

    /// An image that could not be opened: answers the command and takes the disk away. True when that was the case.
    pub(in crate::reactor) fn settle_failed_open(&mut self, slot: u32) -> bool {
        if self.disks[slot as usize].failed_open.is_none() {
            return false;
        }
        if self.disks[slot as usize].ops == 0
            && let Some((tag, message)) = self.disks[slot as usize].failed_open.take()
        {
            let forced = self.disks[slot as usize].zombie_tag.take();
            if let (Some(config), Some(forced)) = (self.take_disk(slot), forced) {
                self.reply(forced, Ok(Reply::Removed(config)));
            }
            self.reply(tag, Err(ShardError { kind: ShardErrorKind::Failed, message }));
        }
        true
    }

    pub(super) fn close_done(&mut self, slot: u32, result: Result<(), Error>) {
        let entry = &mut self.disks[slot as usize];
        // A detach that came while a move was taken back has its last flush before it yet.
        let flushed = |pending: &Pending| {
            matches!(pending, Pending::Park { .. } | Pending::Remove { flush: Flush::Done, .. })
        };
        let leaves = entry.pending.as_ref().is_some_and(flushed) || entry.swap.is_some();
        let Some(engine) = &mut entry.engine else { return };
        engine.volume = None;
        engine.stage = Stage::Closed;
        if !entry.zombie {
            match result {
                Ok(()) if leaves => {}
                // The move was taken back meanwhile.
                Ok(()) => self.reopen_engine(slot),
                Err(error) => {
                    // The files are as a crash would leave them: opened anew, the disk goes on.
                    self.tell_image_error(slot, &error);
                    self.reopen_engine(slot);
                    self.close_failed(slot, &error.message);
                    self.swap_not_closed(slot, &format!("its image could not be closed: {error}"));
                }
            }
        }
        self.unsettled.push(slot);
    }
}

/// Opens all layers of a chain, the lowest first.
async fn open(
    chain: ImageChain,
    files: Rc<Vec<Vec<Rc<ShardFile>>>>,
    budget: Rc<Budget>,
) -> Result<Outcome, Error> {
    let mut layers = Vec::new();
    let mut below_size = None;
    for (layer, files) in chain.layers.iter().zip(files.iter()).rev() {
        let files: Vec<Rc<dyn formats::file::ImageFile>> =
            files.iter().map(|file| file.clone() as Rc<dyn formats::file::ImageFile>).collect();
        let log = match layer.log.as_ref().filter(|_| layer.writable) {
            Some(log) => Some(take_up(log, &files).await?),
            None => None,
        };
        let open = Open {
            files: files.clone(),
            writable: layer.writable,
            below_size,
            budget: budget.clone(),
            log: log.map(|log| log as Rc<dyn AllocationLog>),
            snapshot: layer.snapshot.clone(),
            key: layer.key.clone(),
        };
        if layer.flush {
            // It was written until now, and nobody else will flush it.
            for file in &files {
                file.flush().await?;
            }
        }
        let name = files.first().map_or("", |file| file.name()).to_owned();
        let driver = layer
            .format
            .open(open)
            .await
            .map_err(|error| if error.message.contains(&name) { error } else { error.context(&name) })?;
        below_size = Some(driver.size());
        layers.push(Layer { driver, files });
    }
    layers.reverse();
    Ok(Outcome::Open(Rc::new(Volume::new(layers)?)))
}

/// Carries out what a log holds that was not closed: after the end of a former daemon, or of the driver.
async fn take_up(log: &Arc<LogFile>, files: &[Rc<dyn formats::file::ImageFile>]) -> Result<Rc<Log>, Error> {
    let (log, entries) = Log::new(log.clone());
    if !entries.is_empty() {
        let name = files.first().map_or("", |file| file.name());
        tracing::info!(
            image = name,
            entries = entries.len(),
            "changes of its tables are carried out from its allocation log"
        );
        replay(&entries, files).await?;
        log.release(log.position());
    }
    Ok(Rc::new(log))
}
