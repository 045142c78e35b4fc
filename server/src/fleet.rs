//! All shards of the process as the control thread sees them: sending commands, routing replies, heartbeats.
//!
//! A command gets a tag; the reply with that tag completes the caller's future. A reply whose caller has gone is not lost:
//! it comes out as a notice, since it may carry a disk. When a shard ends, every command that waits for it fails; a parked disk
//! that such a command carries is handed back, as if the shard had refused it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use shard::api::{Command, Envelope, Event, Reply, ShardError, ShardErrorKind};
use shard::clock::{Nanos, SECOND};
use shard::executor::{ShardGone, ShardHandle};
use shard::stats::ShardCounters;
use tokio::sync::{mpsc, oneshot};

use crate::model::ShardState;

/// A shard that has not turned for so long is stalled: an idle one turns every second.
pub const STALL_NS: Nanos = 5 * SECOND;

/// The way to a shard; a thread of the shard crate, or a fake in tests.
pub trait ShardLink: Send + Sync {
    /// Sends a command.
    fn send(&self, envelope: Envelope);

    /// The commands that a shard had not taken when it ended.
    fn take_back(&self) -> Vec<Envelope>;
}

impl ShardLink for ShardHandle {
    fn send(&self, envelope: Envelope) {
        ShardHandle::send(self, envelope);
    }

    fn take_back(&self) -> Vec<Envelope> {
        ShardHandle::take_back(self)
    }
}

/// One shard.
pub struct Shard {
    /// Its number.
    pub index: usize,
    /// The CPU that it is pinned to.
    pub cpu: Option<usize>,
    /// Its counters.
    pub counters: Arc<ShardCounters>,
    link: Box<dyn ShardLink>,
    /// Why it ended, once it has.
    ended: OnceLock<String>,
    /// Disks that were given to it or are on their way: placement counts these.
    seats: AtomicUsize,
    /// Share of the last seconds spent working, in thousandths.
    busy_permille: AtomicU64,
    last_sample: Mutex<Option<(Nanos, u64)>>,
    started: Nanos,
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard").field("index", &self.index).field("cpu", &self.cpu).finish_non_exhaustive()
    }
}

impl Shard {
    /// A shard behind a link.
    pub fn new(
        index: usize,
        cpu: Option<usize>,
        counters: Arc<ShardCounters>,
        link: Box<dyn ShardLink>,
    ) -> Shard {
        Shard {
            index,
            cpu,
            counters,
            link,
            ended: OnceLock::new(),
            seats: AtomicUsize::new(0),
            busy_permille: AtomicU64::new(0),
            last_sample: Mutex::new(None),
            started: monotonic_now(),
        }
    }

    /// Why it ended, if it has.
    pub fn ended(&self) -> Option<&str> {
        self.ended.get().map(String::as_str)
    }

    /// Nanoseconds since its last turn, or since its start.
    pub fn heartbeat_age(&self) -> Nanos {
        monotonic_now().saturating_sub(self.counters.last_turn.get().max(self.started))
    }

    /// What it is doing.
    pub fn state(&self) -> ShardState {
        if self.ended().is_some() {
            ShardState::Ended
        } else if self.heartbeat_age() > STALL_NS {
            ShardState::Stalled
        } else {
            ShardState::Running
        }
    }

    /// Share of the last seconds spent working, in thousandths.
    pub fn busy_permille(&self) -> u64 {
        self.busy_permille.load(Ordering::Relaxed)
    }

    /// Disks that it has, or will have.
    pub fn seats(&self) -> usize {
        self.seats.load(Ordering::Relaxed)
    }

    /// Looks how busy it was since the last look.
    pub fn sample(&self) {
        let (now, busy) = (monotonic_now(), self.counters.busy_ns.get());
        let mut last = self.last_sample.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((then, busy_then)) = last.replace((now, busy)) {
            let share = busy.saturating_sub(busy_then).saturating_mul(1000) / now.saturating_sub(then).max(1);
            self.busy_permille.store(share.min(1000), Ordering::Relaxed);
        }
    }
}

/// A disk's place on a shard, counted until it is dropped.
#[derive(Debug)]
pub struct Seat(Arc<Shard>);

impl Seat {
    /// Takes a place.
    pub fn take(shard: &Arc<Shard>) -> Seat {
        shard.seats.fetch_add(1, Ordering::Relaxed);
        Seat(Arc::clone(shard))
    }

    /// The shard.
    pub fn shard(&self) -> &Arc<Shard> {
        &self.0
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.seats.fetch_sub(1, Ordering::Relaxed);
    }
}

type Answer = Result<Reply, ShardError>;

/// What a shard says without being asked, or too late.
#[derive(Debug)]
pub struct Notice {
    /// Which shard.
    pub shard: usize,
    /// What.
    pub event: Event,
}

/// All shards.
#[derive(Debug)]
pub struct Fleet {
    shards: Vec<Arc<Shard>>,
    pending: Mutex<HashMap<u64, (usize, oneshot::Sender<Answer>)>>,
    next_tag: AtomicU64,
    notices: mpsc::UnboundedSender<Notice>,
    stopping: AtomicBool,
}

/// A command on its way.
#[derive(Debug)]
pub struct Call {
    shard: usize,
    answer: oneshot::Receiver<Answer>,
}

impl Call {
    /// The answer. Safe to drop and call again: an answer is never lost between two calls.
    pub async fn answer(&mut self) -> Answer {
        (&mut self.answer).await.unwrap_or_else(|_| Err(gone(self.shard)))
    }
}

impl Fleet {
    /// The fleet, and the end at which notices come out.
    pub fn new(shards: Vec<Shard>) -> (Arc<Fleet>, mpsc::UnboundedReceiver<Notice>) {
        let (notices, out) = mpsc::unbounded_channel();
        let fleet = Fleet {
            shards: shards.into_iter().map(Arc::new).collect(),
            pending: Mutex::default(),
            next_tag: AtomicU64::new(1),
            notices,
            stopping: AtomicBool::new(false),
        };
        (Arc::new(fleet), out)
    }

    /// The shards, by their numbers.
    pub fn shards(&self) -> &[Arc<Shard>] {
        &self.shards
    }

    /// Sends a command whose answer is waited for later.
    ///
    /// # Errors
    /// The shard has ended. A parked disk is not lost with the command: the call is then answered with [`Reply::NotTaken`].
    pub fn start(&self, shard: usize, command: Command) -> Result<Call, ShardError> {
        let (tx, answer) = oneshot::channel();
        let Some(alive) = self.shards.get(shard).filter(|shard| shard.ended().is_none()) else {
            let Command::Unpark(parked) = command else { return Err(gone(shard)) };
            let _ = tx.send(Ok(Reply::NotTaken(parked)));
            return Ok(Call { shard, answer });
        };
        let tag = self.next_tag.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(tag, (shard, tx));
        alive.link.send(Envelope { tag, command });
        Ok(Call { shard, answer })
    }

    /// Sends a command and waits for the answer.
    pub async fn call(&self, shard: usize, command: Command) -> Answer {
        self.start(shard, command)?.answer().await
    }

    /// Takes an event from a shard: a reply goes to its caller, the rest comes out as a notice.
    pub fn deliver(&self, shard: usize, event: Event) {
        let event = match event {
            Event::Reply { tag, result } => {
                let caller = self.lock().remove(&tag);
                let undelivered = match caller {
                    Some((_, caller)) => caller.send(result).err(),
                    None => Some(result),
                };
                match undelivered {
                    None => return,
                    Some(result) => Event::Reply { tag, result },
                }
            }
            Event::Stopped { error } => {
                self.mark_ended(shard, error.clone());
                Event::Stopped { error }
            }
            other => other,
        };
        // The receiver ends with the daemon; what comes after that is nobody's business.
        let _ = self.notices.send(Notice { shard, event });
    }

    fn mark_ended(&self, shard: usize, error: Option<String>) {
        if let Some(ended) = self.shards.get(shard) {
            let _ = ended.ended.set(error.unwrap_or_else(|| "it was stopped".into()));
            // Nothing is sent to it from here on, so this is all.
            for Envelope { tag, command } in ended.link.take_back() {
                if let Command::Unpark(parked) = command {
                    self.deliver(shard, Event::Reply { tag, result: Ok(Reply::NotTaken(parked)) });
                }
            }
        }
        // Dropping the senders tells the callers.
        self.lock().retain(|_, (waiting_for, _)| *waiting_for != shard);
    }

    /// Tells every shard to stop, and waits until all have, at most so long. The disks must be gone.
    pub async fn stop(&self, patience: Duration) {
        const LOOK_EVERY: Duration = Duration::from_millis(5);
        self.stopping.store(true, Ordering::Relaxed);
        for shard in &self.shards {
            let tag = self.next_tag.fetch_add(1, Ordering::Relaxed);
            shard.link.send(Envelope { tag, command: Command::Stop });
        }
        let all_ended = async {
            while !self.all_ended() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        if tokio::time::timeout(patience, all_ended).await.is_err() {
            tracing::warn!("a shard did not stop in time");
        }
    }

    /// True when [`Fleet::stop`] was called: a shard that ends now was told to.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// True when no shard is left.
    pub fn all_ended(&self) -> bool {
        self.shards.iter().all(|shard| shard.ended().is_some())
    }

    /// The shard, or why there is none of that number.
    pub fn shard(&self, index: usize) -> Option<&Arc<Shard>> {
        self.shards.get(index)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, (usize, oneshot::Sender<Answer>)>> {
        self.pending.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn gone(shard: usize) -> ShardError {
    ShardError { kind: ShardErrorKind::Failed, message: ShardGone(shard).to_string() }
}

/// CLOCK_MONOTONIC in nanoseconds: the clock of the shards' heartbeats.
pub fn monotonic_now() -> Nanos {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() as Nanos * SECOND + time.tv_nsec() as Nanos)
}

#[cfg(test)]
mod tests {
    //! Goal: a reply reaches its caller or comes out as a notice, and a dead shard leaves no caller waiting.
    //! Method: a link that only records.

    use super::*;

    #[derive(Clone, Default)]
    struct Recorder(Arc<Mutex<Vec<u64>>>);

    impl ShardLink for Recorder {
        fn send(&self, envelope: Envelope) {
            self.0.lock().unwrap().push(envelope.tag);
        }

        fn take_back(&self) -> Vec<Envelope> {
            Vec::new()
        }
    }

    fn fleet() -> (Arc<Fleet>, mpsc::UnboundedReceiver<Notice>, Recorder) {
        let link = Recorder::default();
        let shards = (0..2).map(|n| Shard::new(n, None, Arc::default(), Box::new(link.clone()))).collect();
        let (fleet, notices) = Fleet::new(shards);
        (fleet, notices, link)
    }

    #[tokio::test]
    async fn replies_find_their_callers_in_any_order() {
        let (fleet, mut notices, link) = fleet();
        let mut first = fleet.start(0, Command::Stop).unwrap();
        let mut second = fleet.start(1, Command::Stop).unwrap();
        let tags = link.0.lock().unwrap().clone();
        fleet.deliver(1, Event::Reply { tag: tags[1], result: Ok(Reply::Zombie { in_flight: 7 }) });
        fleet.deliver(0, Event::Reply { tag: tags[0], result: Ok(Reply::Done) });
        assert!(matches!(first.answer().await, Ok(Reply::Done)));
        assert!(matches!(second.answer().await, Ok(Reply::Zombie { in_flight: 7 })));
        let late = fleet.start(0, Command::Stop).unwrap();
        drop(late);
        let tag = *link.0.lock().unwrap().last().unwrap();
        fleet.deliver(0, Event::Reply { tag, result: Ok(Reply::Done) });
        assert!(matches!(notices.recv().await, Some(Notice { shard: 0, event: Event::Reply { .. } })));
    }

    #[tokio::test]
    async fn a_dead_shard_fails_its_callers_only() {
        let (fleet, mut notices, link) = fleet();
        let mut lost = fleet.start(0, Command::Stop).unwrap();
        let mut kept = fleet.start(1, Command::Stop).unwrap();
        fleet.deliver(0, Event::Stopped { error: Some("boom".into()) });
        assert!(lost.answer().await.unwrap_err().message.contains("shard 0"));
        assert!(matches!(notices.recv().await, Some(Notice { event: Event::Stopped { .. }, .. })));
        assert_eq!(fleet.shards()[0].ended(), Some("boom"));
        assert!(fleet.start(0, Command::Stop).is_err());
        let tag = link.0.lock().unwrap()[1];
        fleet.deliver(1, Event::Reply { tag, result: Ok(Reply::Done) });
        assert!(kept.answer().await.is_ok());
    }

    /// Goal: a disk between two shards survives the end of the one that it goes to. Method: two real shards; the second gets it
    /// behind the command at which it panics, and once more when everybody knows that it has ended.
    #[tokio::test]
    async fn a_parked_disk_comes_back_from_a_shard_that_has_ended() {
        use shard::api::{Backend, DiskConfig, DiskId, ErrorPolicy};
        let (events, inbox) = shard::executor::event_channel().unwrap();
        let shards = (0..2).map(|index| {
            let options = shard::executor::ShardOptions {
                index,
                cpu: None,
                ring: shard::executor::RingFlavour::Deferred,
                buffer_budget_bytes: 1 << 20,
                table_budget_bytes: 1 << 20,
                fault_commands: true,
            };
            let handle = shard::executor::start(options, events.clone()).unwrap();
            Shard::new(index, None, handle.counters.clone(), Box::new(handle))
        });
        let (fleet, _notices) = Fleet::new(shards.collect());
        let hear = fleet.clone();
        let ears = std::thread::spawn(move || {
            while !hear.all_ended() {
                let Ok((shard, event)) = inbox.rx.recv() else { return };
                hear.deliver(shard, event);
            }
        });
        let disk = DiskId(7);
        let config = Box::new(DiskConfig {
            id: disk,
            name: "d".into(),
            backend: Backend::Null,
            size_bytes: 1 << 20,
            read_only: false,
            on_error: ErrorPolicy::Report,
            on_enospc: ErrorPolicy::Report,
            limits: shard::limits::Limits::default(),
            groups: Vec::new(),
            counters: Arc::default(),
        });
        fleet.call(0, Command::AddDisk(config)).await.unwrap();
        let Ok(Reply::Parked(parked)) = fleet.call(0, Command::Park { disk }).await else { panic!("parked") };
        let mut shot = fleet.start(1, Command::InjectShardPanic).unwrap();
        let mut late = fleet.start(1, Command::Unpark(parked)).unwrap();
        let Ok(Reply::NotTaken(parked)) = late.answer().await else { panic!("it was lost on its way") };
        assert!(shot.answer().await.is_err());
        let Ok(Reply::NotTaken(parked)) = fleet.call(1, Command::Unpark(parked)).await else {
            panic!("it was lost at the door")
        };
        assert!(matches!(fleet.call(0, Command::Unpark(parked)).await, Ok(Reply::Done)));
        let removed = fleet.call(0, Command::RemoveDisk { disk, force: false }).await;
        assert!(matches!(removed, Ok(Reply::Removed(_))), "{removed:?}");
        fleet.stop(Duration::from_secs(10)).await;
        ears.join().unwrap();
    }
}
