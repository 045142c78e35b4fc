//! Runs futures of one thread from one seed: among the tasks that are awake a seeded choice goes first, so that a seed is a
//! schedule. Whoever drives it completes operations of the store in between ([`super::store::Store::run`]).

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// A future that has no answer.
pub type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Entry<'a> {
    task: Task<'a>,
    awake: Arc<Flag>,
}

/// Tasks that have not ended.
pub struct Tasks<'a> {
    entries: Vec<Option<Entry<'a>>>,
}

impl<'a> Tasks<'a> {
    /// All of them awake.
    pub fn new(tasks: Vec<Task<'a>>) -> Tasks<'a> {
        let entry = |task| Some(Entry { task, awake: Arc::new(Flag(AtomicBool::new(true))) });
        Tasks { entries: tasks.into_iter().map(entry).collect() }
    }

    /// Polls one task that is awake; false when none is.
    pub fn turn(&mut self, rng: &mut fastrand::Rng) -> bool {
        let is_awake = |entry: &Entry| entry.awake.0.load(Ordering::Relaxed);
        let awake: Vec<usize> = (0..self.entries.len())
            .filter(|number| self.entries[*number].as_ref().is_some_and(is_awake))
            .collect();
        let Some(chosen) = rng.choice(awake) else { return false };
        if let Some(entry) = &mut self.entries[chosen] {
            entry.awake.0.store(false, Ordering::Relaxed);
            let waker = Waker::from(entry.awake.clone());
            if let Poll::Ready(()) = entry.task.as_mut().poll(&mut Context::from_waker(&waker)) {
                self.entries[chosen] = None;
            }
        }
        true
    }

    /// How many have not ended.
    pub fn left(&self) -> usize {
        self.entries.iter().flatten().count()
    }
}

impl std::fmt::Debug for Tasks<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tasks({} left)", self.left())
    }
}

/// Polls a future at most `polls` times and drops it then: a caller that went away.
#[derive(Debug)]
pub struct Abandon<F> {
    future: Option<Pin<Box<F>>>,
    polls: usize,
}

impl<F> Abandon<F> {
    /// `future` is dropped at the end of its poll number `polls` (from 1 on) unless it has ended.
    pub fn after(polls: usize, future: F) -> Abandon<F> {
        Abandon { future: Some(Box::pin(future)), polls }
    }
}

impl<F: Future> Future for Abandon<F> {
    /// `None` when it was dropped.
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<F::Output>> {
        let Some(future) = &mut self.future else { return Poll::Ready(None) };
        if let Poll::Ready(answer) = future.as_mut().poll(context) {
            self.future = None;
            return Poll::Ready(Some(answer));
        }
        self.polls = self.polls.saturating_sub(1);
        if self.polls == 0 {
            self.future = None;
            return Poll::Ready(None);
        }
        Poll::Pending
    }
}
