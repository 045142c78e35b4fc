//! The places of clients that negotiate: a bound for each listener and for all together.
//!
//! When the places are taken, a newcomer gets the place of the oldest client that has not said a word, else of the oldest. A
//! flood of silent clients therefore evicts itself: one that speaks finishes within some round trips, and a flood would have
//! to fill all places with clients that speak within that time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::task::AbortHandle;

use crate::daemon::lock;

/// All places.
#[derive(Debug, Default)]
pub struct Places {
    taken: Arc<Mutex<BTreeMap<u64, Place>>>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Place {
    listener: u64,
    spoke: Arc<AtomicBool>,
    /// `None` until the task is known.
    task: Option<AbortHandle>,
}

/// A client's place; it is free when this is dropped.
#[derive(Debug)]
pub struct Ticket {
    number: u64,
    taken: Arc<Mutex<BTreeMap<u64, Place>>>,
    spoke: Arc<AtomicBool>,
}

impl Ticket {
    /// The client sent something.
    pub fn spoke(&self) {
        self.spoke.store(true, Ordering::Relaxed);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.taken).remove(&self.number);
    }
}

impl Places {
    /// A place for a client of `listener`, of at most `all` places, of which one listener has at most a quarter. Somebody else
    /// may lose theirs.
    pub fn take(&self, listener: u64, all: u32) -> Ticket {
        let all = all.max(1) as usize;
        let own = (all / 4).max(1);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let spoke = Arc::new(AtomicBool::new(false));
        let mut taken = lock(&self.taken);
        if taken.values().filter(|place| place.listener == listener).count() >= own {
            evict(&mut taken, Some(listener));
        } else if taken.len() >= all {
            evict(&mut taken, None);
        }
        taken.insert(number, Place { listener, spoke: spoke.clone(), task: None });
        Ticket { number, taken: self.taken.clone(), spoke }
    }

    /// The task that serves the client of a place: it ends when the place is lost.
    pub fn set_task(&self, number: u64, task: AbortHandle) {
        match lock(&self.taken).get_mut(&number) {
            Some(place) => place.task = Some(task),
            None => task.abort(),
        }
    }

    /// Places that are taken.
    pub fn taken(&self) -> usize {
        lock(&self.taken).len()
    }
}

impl Ticket {
    /// For [`Places::set_task`].
    pub fn number(&self) -> u64 {
        self.number
    }
}

fn evict(taken: &mut BTreeMap<u64, Place>, listener: Option<u64>) {
    let of_listener = |place: &&Place| listener.is_none_or(|listener| place.listener == listener);
    let silent = |place: &Place| !place.spoke.load(Ordering::Relaxed);
    let mut candidates = taken.iter().filter(|(_, place)| of_listener(place));
    let victim = candidates.clone().find(|(_, place)| silent(place)).or_else(|| candidates.next());
    if let Some(number) = victim.map(|(number, _)| *number)
        && let Some(place) = taken.remove(&number)
        && let Some(task) = place.task
    {
        task.abort();
    }
}

#[cfg(test)]
mod tests {
    //! Goal: the bounds hold, silent clients go first, one listener cannot take all. Method: tickets without sockets.

    use super::*;

    #[tokio::test]
    async fn the_oldest_silent_client_goes_first() {
        let places = Places::default();
        let tickets: Vec<Ticket> = (0..4).map(|_| places.take(1, 16)).collect();
        let tasks: Vec<_> = tickets
            .iter()
            .map(|ticket| {
                let task = tokio::spawn(std::future::pending::<()>());
                places.set_task(ticket.number(), task.abort_handle());
                task
            })
            .collect();
        tickets[0].spoke();
        let newcomer = places.take(1, 16);
        tokio::task::yield_now().await;
        assert_eq!(
            tasks.iter().map(|task| task.is_finished()).collect::<Vec<_>>(),
            [false, true, false, false]
        );
        assert_eq!(places.taken(), 4);
        drop(newcomer);
        drop(tickets);
        assert_eq!(places.taken(), 0);
    }

    #[tokio::test]
    async fn one_listener_has_a_quarter_and_all_together_the_whole() {
        let places = Places::default();
        let first: Vec<Ticket> = (0..40).map(|_| places.take(1, 16)).collect();
        assert_eq!(places.taken(), 4);
        let others: Vec<Ticket> = (2..20).map(|listener| places.take(listener, 16)).collect();
        assert_eq!(places.taken(), 16);
        drop((first, others));
    }
}
