//! Threads that may hang: every call that touches a path or closes an image runs on one of them.
//!
//! Each file system has a lane: a queue and a few threads, which start when there is work and end when there
//! has been none for a while. A dead mount fills its own lane; callers get an error at their deadline, and
//! what the kernel delivers later is dropped where it arrives, so that a late descriptor is closed on the
//! lane as well.
//!
//! Invariants:
//! - At most [`Bounds::per_mount`] threads per file system, and [`Bounds::total`] in all, of which the last
//!   half is kept for the first thread of a lane: file systems that hang cannot keep the others from getting
//!   one until there are very many.
//! - No job is run or dropped while the lock is held (dropping one may queue another).

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::mounts::Mount;
use super::{OpenError, OpenErrorKind};

/// Bounds of the pool.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Threads of one file system.
    pub per_mount: usize,
    /// Threads of all.
    pub total: usize,
    /// Calls that wait in one lane.
    pub queue: usize,
    /// How long an idle thread stays.
    pub idle: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds { per_mount: 4, total: 128, queue: 1024, idle: Duration::from_secs(10) }
    }
}

/// The pool; clones are handles of the same one.
#[derive(Clone)]
pub struct Lanes(Arc<Shared>);

struct Shared {
    bounds: Bounds,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By [`Mount::device`].
    lanes: HashMap<String, Lane>,
    threads: usize,
}

#[derive(Default)]
struct Lane {
    queue: VecDeque<Box<dyn Job>>,
    threads: usize,
    idle: usize,
    wake: Arc<Condvar>,
}

trait Job: Send {
    fn run(self: Box<Self>);
    /// False when the caller has given up.
    fn wanted(&self) -> bool;
}

/// A call whose caller waits for the result.
struct Call<T, F> {
    work: F,
    reply: oneshot::Sender<T>,
}

impl<T: Send, F: FnOnce() -> T + Send> Job for Call<T, F> {
    fn run(self: Box<Self>) {
        let Call { work, reply } = *self;
        if !reply.is_closed() {
            // A result that nobody waits for any more comes back, and is dropped here: on the lane.
            drop(reply.send(work()));
        }
    }

    fn wanted(&self) -> bool {
        !self.reply.is_closed()
    }
}

/// Something to drop on the lane.
struct Close<T>(T);

impl<T: Send> Job for Close<T> {
    fn run(self: Box<Self>) {
        drop(self);
    }

    fn wanted(&self) -> bool {
        true
    }
}

impl Lanes {
    /// A pool without threads.
    pub fn new(bounds: Bounds) -> Lanes {
        Lanes(Arc::new(Shared { bounds, state: Mutex::default() }))
    }

    /// Threads that exist now, in all lanes.
    pub fn threads(&self) -> usize {
        self.lock().threads
    }

    /// Runs `work` on the lane of `mount` and waits for it until `deadline`. `path` and `doing` (as in "open
    /// it") are for the message.
    ///
    /// Errors: `Timeout` at the deadline, `Busy` when the lane's queue or the pool is full, `Io` when `work`
    /// panicked. When the future is dropped, or the deadline passes, a result that comes later is dropped on
    /// the lane.
    pub async fn run<T, F>(
        &self,
        mount: &Arc<Mount>,
        deadline: Instant,
        path: &Path,
        doing: &str,
        work: F,
    ) -> Result<T, OpenError>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let asked = Instant::now();
        let (reply, mut result) = oneshot::channel();
        self.submit(mount, Box::new(Call { work, reply }))
            .map_err(|full| full.explain(mount, path, doing))?;
        let answer = match tokio::time::timeout_at(deadline, &mut result).await {
            Ok(answer) => answer,
            Err(_) => {
                // It may have arrived in this instant: after close() it either is here or goes back to the
                // lane.
                result.close();
                let late = |_| {
                    let waited_ms = asked.elapsed().as_millis();
                    OpenError::new(
                        OpenErrorKind::Timeout,
                        format!(
                            "{}: {} ({} from {}) did not answer within {waited_ms} ms when asked to \
                            {doing}; check the store or the server behind it, then try again",
                            path.display(),
                            mount.point.display(),
                            mount.fs_type,
                            mount.source
                        ),
                    )
                };
                return result.try_recv().map_err(late);
            }
        };
        answer.map_err(|_| {
            OpenError::new(
                OpenErrorKind::Io,
                format!("{}: the attempt to {doing} failed inside blktapd; report its log", path.display()),
            )
        })
    }

    /// Drops `value` on the lane of `mount`; never waits.
    fn close<T: Send + 'static>(&self, mount: &Arc<Mount>, value: T) {
        let key = mount.device.clone();
        let job = Box::new(Close(value));
        let mut state = self.lock();
        // Never refused: a thread takes it as soon as one can be had, and as many can wait as there are
        // descriptors.
        state.lanes.entry(key.clone()).or_default().queue.push_back(job);
        self.staff(&mut state, &key);
    }

    fn submit(&self, mount: &Arc<Mount>, job: Box<dyn Job>) -> Result<(), Full> {
        let key = &mount.device;
        let mut state = self.lock();
        let mut dropped = Vec::new();
        let lane = state.lanes.entry(key.clone()).or_default();
        if lane.queue.len() >= self.0.bounds.queue {
            let (wanted, unwanted) =
                std::mem::take(&mut lane.queue).into_iter().partition(|job| job.wanted());
            lane.queue = wanted;
            dropped = Vec::from(unwanted as VecDeque<Box<dyn Job>>);
        }
        let outcome = if lane.queue.len() >= self.0.bounds.queue {
            dropped.push(job);
            Err(Full::Queue(lane.queue.len()))
        } else {
            lane.queue.push_back(job);
            self.staff(&mut state, key);
            let total = state.threads;
            match state.lanes.get_mut(key) {
                Some(lane) if lane.threads == 0 => {
                    dropped.extend(lane.queue.pop_back());
                    if lane.queue.is_empty() {
                        state.lanes.remove(key);
                    }
                    Err(Full::Threads(total))
                }
                _ => Ok(()),
            }
        };
        drop(state);
        drop(dropped);
        outcome
    }

    /// Wakes or starts a thread for the lane `key` if it has more work than idle threads.
    fn staff(&self, state: &mut State, key: &str) {
        let Bounds { per_mount, total, .. } = self.0.bounds;
        let threads_of_all = state.threads;
        let Some(lane) = state.lanes.get_mut(key) else { return };
        lane.wake.notify_one();
        let bound_of_all = if lane.threads == 0 { total } else { total / 2 };
        if lane.idle >= lane.queue.len() || lane.threads >= per_mount || threads_of_all >= bound_of_all {
            return;
        }
        let (lanes, lane_key, wake) = (self.clone(), key.to_owned(), lane.wake.clone());
        let spawned = std::thread::Builder::new()
            .name("files".into())
            .stack_size(256 * 1024)
            .spawn(move || lanes.work(&lane_key, &wake));
        match spawned {
            Ok(_) => {
                lane.threads += 1;
                state.threads += 1;
            }
            Err(error) => tracing::warn!(%error, "no thread for opening files"),
        }
    }

    /// The life of a thread of the lane `key`.
    fn work(&self, key: &str, wake: &Condvar) {
        let mut state = self.lock();
        loop {
            let next = state.lanes.get_mut(key).and_then(|lane| lane.queue.pop_front());
            if let Some(job) = next {
                drop(state);
                if catch_unwind(AssertUnwindSafe(|| job.run())).is_err() {
                    tracing::error!(mount = key, "a call on a file panicked");
                }
                state = self.lock();
                continue;
            }
            let Some(lane) = state.lanes.get_mut(key) else { break };
            lane.idle += 1;
            let (woken, wait) =
                wake.wait_timeout(state, self.0.bounds.idle).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            let Some(lane) = state.lanes.get_mut(key) else { break };
            lane.idle -= 1;
            if wait.timed_out() && lane.queue.is_empty() {
                lane.threads -= 1;
                if lane.threads == 0 {
                    state.lanes.remove(key);
                }
                break;
            }
        }
        state.threads -= 1;
        // A lane that was refused its first thread (only closes wait in such a lane) gets this one's place.
        let waiting = state.lanes.iter().find(|(_, lane)| lane.threads == 0 && !lane.queue.is_empty());
        if let Some(key) = waiting.map(|(key, _)| key.clone()) {
            self.staff(&mut state, &key);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock, so a poisoned state is whole.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a job was not taken.
enum Full {
    Queue(usize),
    Threads(usize),
}

impl Full {
    fn explain(self, mount: &Mount, path: &Path, doing: &str) -> OpenError {
        let why = match self {
            Full::Queue(waiting) => format!("{waiting} calls already wait for {}", mount.point.display()),
            Full::Threads(threads) => format!("all {threads} threads for files hang in other mounts"),
        };
        let message = format!("{}: no attempt to {doing}: {why}; find the mount that hangs", path.display());
        OpenError::new(OpenErrorKind::Busy, message)
    }
}

/// Owns descriptors of a mount: wherever this is dropped, they are closed on the mount's lane.
pub struct OnLane<T: Send + 'static> {
    value: Option<T>,
    lanes: Lanes,
    mount: Arc<Mount>,
}

impl<T: Send + 'static> OnLane<T> {
    /// Takes over `value`.
    pub fn new(lanes: &Lanes, mount: &Arc<Mount>, value: T) -> Self {
        OnLane { value: Some(value), lanes: lanes.clone(), mount: mount.clone() }
    }

    /// The mount whose lane will close it.
    pub fn mount(&self) -> &Arc<Mount> {
        &self.mount
    }
}

impl<T: Send + 'static> Deref for OnLane<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // Taken out only by `drop`.
        match &self.value {
            Some(value) => value,
            None => unreachable!("the value leaves only when its owner ends"),
        }
    }
}

impl<T: Send + 'static> Drop for OnLane<T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            self.lanes.close(&self.mount, value);
        }
    }
}

impl<T: Send + fmt::Debug + 'static> fmt::Debug for OnLane<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnLane").field("value", &self.value).field("mount", &self.mount.point).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::sync::mpsc;
    use std::thread::ThreadId;

    fn mount(number: usize) -> Arc<Mount> {
        Arc::new(Mount {
            device: format!("0:{number}"),
            point: format!("/m{number}").into(),
            fs_type: "nfs4".into(),
            source: "srv:/x".into(),
        })
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    fn far() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    const SMALL: Bounds = Bounds { per_mount: 2, total: 8, queue: 3, idle: Duration::from_millis(50) };

    /// Goal: a mount that hangs costs its callers their deadline and its own threads; another mount works;
    /// the threads end.
    /// Method: jobs that wait on channels stand for the hung kernel.
    #[tokio::test]
    async fn hung_mount_keeps_to_its_lane() {
        let lanes = Lanes::new(SMALL);
        let (dead, alive) = (mount(1), mount(2));
        let mut release = Vec::new();
        for _ in 0..4 {
            let (tx, rx) = mpsc::channel::<()>();
            release.push(tx);
            let error = lanes
                .run(&dead, soon(), Path::new("/m1/disk.img"), "open it", move || rx.recv().is_ok())
                .await
                .expect_err("it hangs");
            assert_eq!(error.kind, OpenErrorKind::Timeout);
            for part in ["/m1/disk.img", "/m1 (nfs4 from srv:/x)", "open it", " ms"] {
                assert!(error.message.contains(part), "{part} is missing in: {}", error.message);
            }
        }
        assert_eq!(lanes.threads(), 2, "the bound of one mount");
        let answer = lanes.run(&alive, far(), Path::new("/m2/a"), "open it", || 7).await;
        assert_eq!(answer, Ok(7));
        drop(release);
        while lanes.threads() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(lanes.lock().lanes.is_empty());
    }

    /// Goal: the queue is bounded, and calls whose callers have gone make room.
    /// Method: fill a hung lane with callers that wait, then with callers that have left.
    #[tokio::test]
    async fn queue_is_bounded_and_abandoned_calls_leave_it() {
        let lanes = Lanes::new(SMALL);
        let dead = mount(1);
        let (tx, rx) = mpsc::channel::<()>();
        let rx = Arc::new(Mutex::new(rx));
        let call = |deadline| {
            let (lanes, dead, rx) = (lanes.clone(), dead.clone(), rx.clone());
            tokio::spawn(async move {
                let hang = move || drop(rx.lock().map(|rx| rx.recv()));
                lanes.run(&dead, deadline, Path::new("/m1/a"), "open it", hang).await
            })
        };
        let mut waiting = Vec::new();
        for queued in [0, 0, 1, 2, 3] {
            waiting.push(call(far()));
            while lanes.lock().lanes.get("0:1").is_none_or(|lane| lane.queue.len() != queued) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let error = call(far()).await.expect("joins").expect_err("2 run, 3 wait");
        assert_eq!(error.kind, OpenErrorKind::Busy);
        assert!(error.message.contains("3 calls already wait for /m1"), "{}", error.message);
        for task in waiting {
            task.abort();
            assert!(task.await.is_err(), "aborted");
        }
        let error = call(soon()).await.expect("joins").expect_err("it waits, then its time is over");
        assert_eq!(error.kind, OpenErrorKind::Timeout);
        drop(tx);
    }

    /// Goal: many dead mounts cannot use up the places that other mounts' first threads need; at the bound
    /// the error says so.
    /// Method: more hung mounts than threads; the total is 8, of which each lane may have a second only below
    /// 4.
    #[tokio::test]
    async fn total_is_bounded() {
        let lanes = Lanes::new(SMALL);
        let mut release = Vec::new();
        for number in 0..8 {
            for _ in 0..2 {
                let (tx, rx) = mpsc::channel::<()>();
                release.push(tx);
                let at = mount(number);
                let hung = lanes.run(&at, soon(), Path::new("/a"), "open it", move || rx.recv().is_ok());
                // With 2+2 threads in the first two lanes there are 4 places left: the lanes 2 to 5 get one
                // each.
                assert!(hung.await.is_err());
            }
            assert!(lanes.threads() <= SMALL.total);
        }
        let error = lanes.run(&mount(20), soon(), Path::new("/a"), "open it", || 1).await.expect_err("full");
        assert_eq!(error.kind, OpenErrorKind::Busy);
        // A close is never refused; it is done when a place is free.
        let (mut reader, writer) = std::io::pipe().expect("pipe");
        drop(OnLane::new(&lanes, &mount(21), writer));
        drop(release);
        let end = tokio::task::spawn_blocking(move || reader.read(&mut [0]).expect("read"));
        assert_eq!(end.await.expect("joins"), 0);
    }

    /// Records on which thread it was dropped.
    struct Witness(mpsc::Sender<ThreadId>);

    impl Drop for Witness {
        fn drop(&mut self) {
            let _ = self.0.send(std::thread::current().id());
        }
    }

    /// Goal: a descriptor that arrives after the deadline is closed, on the lane. Method: a late result that
    /// tells its thread.
    #[tokio::test]
    async fn late_result_is_dropped_on_the_lane() {
        let lanes = Lanes::new(SMALL);
        let (tx, rx) = mpsc::channel::<()>();
        let (dropped, thread) = mpsc::channel();
        let at = mount(1);
        let late = lanes.run(&at, soon(), Path::new("/a"), "open it", move || {
            let _ = rx.recv();
            Witness(dropped)
        });
        assert!(late.await.is_err());
        drop(tx);
        assert_ne!(thread.recv().expect("dropped"), std::thread::current().id());
    }

    /// Goal: what a mount owns is closed on its lane, wherever it was dropped. Method: the same witness.
    #[tokio::test]
    async fn owner_closes_on_the_lane() {
        let lanes = Lanes::new(SMALL);
        let (dropped, thread) = mpsc::channel();
        drop(OnLane::new(&lanes, &mount(1), Witness(dropped)));
        assert_ne!(thread.recv().expect("dropped"), std::thread::current().id());
    }

    /// Goal: a panic in a call is an error of that call, and the lane goes on. Method: panic, then a good
    /// call.
    #[tokio::test]
    async fn panic_is_an_error_of_one_call() {
        let lanes = Lanes::new(SMALL);
        let panics = || -> u32 { std::panic::panic_any("bad") };
        let error =
            lanes.run(&mount(1), far(), Path::new("/a"), "open it", panics).await.expect_err("it panicked");
        assert_eq!(error.kind, OpenErrorKind::Io);
        assert_eq!(lanes.run(&mount(1), far(), Path::new("/a"), "open it", || 2).await, Ok(2));
    }
}
