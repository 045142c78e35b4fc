//! Disks that are images of a format: a [`Volume`] on this shard, its files, and the futures of requests that cannot be answered
//! from memory.
//!
//! ```text
//! disk.start ─▶ Action::Volume ─▶ map (memory) ─ all known ─▶ pieces: requests of the files' own disks ─▶ on_volume ─▶ answer
//!                                      └ no ─▶ a future ─▶ port ─▶ requests of the files' own disks ─▶ port ─▶ … ─┘
//! ```
//! `open` opens and closes images, `pieces` carries requests out, `tasks` runs the futures.
//!
//! Every file of the image is a raw disk of its own, hidden (`Entry::owner`): alignment, read-modify-write, group commit, space
//! and the bounds of the store work there as for any raw disk, for payload and metadata alike. The operations of a volume's files
//! count as operations of the volume's disk, so that it comes to rest only when they have ended.
//!
//! A panic in a driver quarantines its disk: the volume and its futures are dropped, operations that are out keep their memory (it
//! is the reactor's), and when they have ended the image is opened anew, which is what a restart after a crash does.

mod open;
mod pieces;
mod tasks;

use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;

use formats::error::Error;
use formats::volume::Volume;

use super::*;
use crate::image::{Port, ShardFile, TaskWaker};
use crate::storage::side::Extent;

type Task = std::pin::Pin<Box<dyn Future<Output = Result<Outcome, Error>>>>;

/// What a future comes to.
enum Outcome {
    /// It is done.
    Done,
    /// The volume is open.
    Open(Rc<Volume>),
    /// Data and holes.
    Extents(Vec<Extent>),
}

/// Whom a future works for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum For {
    /// A request of the disk.
    Request(ReqKey),
    /// The image is being opened.
    Open,
    /// The image is being closed.
    Close,
    /// Pending mappings are written back.
    Tidy,
    /// What no flush has covered is written again.
    Doubt,
    /// An offline tool.
    Tool,
}

struct Running {
    whom: For,
    future: Task,
    waker: Waker,
}

/// How far the image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::reactor) enum Stage {
    /// Being opened; the command to answer.
    Opening { tag: Option<u64> },
    /// In use.
    Open,
    /// Being closed.
    Closing,
    /// Closed: everything is in the files.
    Closed,
}

/// The volume of a disk.
pub(in crate::reactor) struct Engine {
    pub stage: Stage,
    volume: Option<Rc<Volume>>,
    port: Rc<Port>,
    files: Rc<Vec<Vec<Rc<ShardFile>>>>,
    /// Slots of the files' disks.
    slots: Vec<u32>,
    tasks: slab::Slab<Running>,
    ready: Arc<Mutex<Vec<usize>>>,
    /// Futures that have let others go first: they go on in the next turn.
    yielded: Vec<usize>,
    /// The turn in which futures were polled last, and how often.
    polled: (u64, u32),
    /// A future that writes pending mappings back is at work.
    tidying: bool,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("stage", &self.stage).field("tasks", &self.tasks.len()).finish()
    }
}

impl Engine {
    fn new(stage: Stage, port: Rc<Port>, files: Rc<Vec<Vec<Rc<ShardFile>>>>, slots: Vec<u32>) -> Engine {
        Engine {
            stage,
            volume: None,
            port,
            files,
            slots,
            tasks: slab::Slab::new(),
            ready: Arc::default(),
            yielded: Vec::new(),
            polled: (0, 0),
            tidying: false,
        }
    }

    fn spawn(&mut self, whom: For, future: Task) {
        let entry = self.tasks.vacant_entry();
        let task = entry.key();
        let waker = Waker::from(Arc::new(TaskWaker { ready: self.ready.clone(), task }));
        entry.insert(Running { whom, future, waker });
        self.lock_ready().push(task);
    }

    fn lock_ready(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a future that was just polled has woken itself. It lets others go first then, until the next turn.
    fn take_woken(&mut self, task: usize) -> bool {
        let mut ready = self.lock_ready();
        let Some(index) = ready.iter().position(|&woken| woken == task) else { return false };
        ready.swap_remove(index);
        drop(ready);
        self.yielded.push(task);
        true
    }

    /// Forgets the volume and everything that works on it.
    fn drop_volume(&mut self) {
        // Futures first: they hold guards and plans of the volume.
        self.tasks.clear();
        self.volume = None;
        self.lock_ready().clear();
        self.yielded.clear();
        self.tidying = false;
    }
}

/// Runs code of a driver; a panic is the disk's.
fn guarded<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    std::panic::catch_unwind(AssertUnwindSafe(run)).map_err(|panic| panic_message(panic.as_ref()))
}

impl<K: Kernel> Shard<K> {
    /// The hidden disks of a volume.
    pub(in crate::reactor) fn file_slots(&self, slot: u32) -> Vec<u32> {
        let engine = self.disks.get(slot as usize).and_then(|entry| entry.engine.as_ref());
        engine.map(|engine| engine.slots.clone()).unwrap_or_default()
    }
}

impl Entry {
    /// Its image is closed.
    pub(in crate::reactor) fn closed(&self) -> bool {
        self.engine.as_ref().is_some_and(|engine| engine.stage == Stage::Closed)
    }

    /// Its image is being opened.
    pub(in crate::reactor) fn opening(&self) -> bool {
        self.engine.as_ref().is_some_and(|engine| matches!(engine.stage, Stage::Opening { .. }))
    }
}
