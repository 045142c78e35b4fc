//! The places of clients that negotiate: a bound for each listener and for all together.
//!
//! When the places are taken, a newcomer gets the place of the client that has been silent longest. Nobody loses a place
//! within [`PATIENCE`] of its last word (or of its arrival): until then the newcomer waits, and those behind it wait in the
//! listener's backlog. A flood therefore evicts itself at a bounded rate, whether its clients are silent or say hello and
//! no more, and one that goes on talking finishes however many there are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::daemon::lock;

/// How long a client may be silent although others want its place: longer than a client on a busy host takes to answer.
const PATIENCE: Duration = Duration::from_millis(100);

/// All places.
#[derive(Debug, Default)]
pub struct Places {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    taken: BTreeMap<u64, Place>,
}

#[derive(Debug)]
struct Place {
    listener: u64,
    /// When its client arrived, or last said something.
    spoke_at: Instant,
    /// `None` until the task is known.
    task: Option<AbortHandle>,
}

/// A client's place; it is free when this is dropped.
#[derive(Debug)]
pub struct Ticket {
    number: u64,
    table: Arc<Mutex<Table>>,
}

impl Ticket {
    /// The client sent something.
    pub fn spoke(&self) {
        if let Some(place) = lock(&self.table).taken.get_mut(&self.number) {
            place.spoke_at = Instant::now();
        }
    }

    /// For [`Places::set_task`].
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.table).taken.remove(&self.number);
    }
}

impl Places {
    /// A place for a client of `listener`, of at most `all` places, of which one listener has at most a quarter. Waits for at
    /// most [`PATIENCE`] at a time; then somebody else loses theirs.
    pub async fn take(&self, listener: u64, all: u32) -> Ticket {
        loop {
            let free_at = match self.try_take(listener, all) {
                Ok(ticket) => return ticket,
                Err(free_at) => free_at,
            };
            tokio::time::sleep_until(free_at).await;
        }
    }

    /// A place, or when it is worth asking again.
    fn try_take(&self, listener: u64, all: u32) -> Result<Ticket, Instant> {
        let all = all.max(1) as usize;
        let own = (all / 4).max(1);
        let mut table = lock(&self.table);
        if table.taken.values().filter(|place| place.listener == listener).count() >= own {
            table.evict(Some(listener))?;
        } else if table.taken.len() >= all {
            table.evict(None)?;
        }
        let number = table.next;
        table.next += 1;
        table.taken.insert(number, Place { listener, spoke_at: Instant::now(), task: None });
        Ok(Ticket { number, table: self.table.clone() })
    }

    /// The task that serves the client of a place: it ends when the place is lost.
    pub fn set_task(&self, number: u64, task: AbortHandle) {
        match lock(&self.table).taken.get_mut(&number) {
            Some(place) => place.task = Some(task),
            None => task.abort(),
        }
    }

    /// Places that are taken.
    pub fn taken(&self) -> usize {
        lock(&self.table).taken.len()
    }
}

impl Table {
    /// Frees the place of the client that has been silent longest, or says when its patience ends.
    fn evict(&mut self, listener: Option<u64>) -> Result<(), Instant> {
        let of_listener = |place: &Place| listener.is_none_or(|listener| place.listener == listener);
        let candidates = self.taken.iter().filter(|(_, place)| of_listener(place));
        let Some((&number, victim)) = candidates.min_by_key(|(_, place)| place.spoke_at) else {
            return Ok(());
        };
        let free_at = victim.spoke_at + PATIENCE;
        if free_at > Instant::now() {
            return Err(free_at);
        }
        if let Some(task) = self.taken.remove(&number).and_then(|place| place.task) {
            task.abort();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    //! Goal: the bounds hold, whoever was silent longest goes first and not before its time, one listener cannot take all.
    //! Method: tickets without sockets.

    use super::*;

    #[tokio::test]
    async fn the_client_that_was_silent_longest_goes_first_and_not_at_once() {
        let places = Places::default();
        let mut tickets = Vec::new();
        let mut tasks = Vec::new();
        let begun = Instant::now();
        for _ in 0..4 {
            let ticket = places.take(1, 16).await;
            let task = tokio::spawn(std::future::pending::<()>());
            places.set_task(ticket.number(), task.abort_handle());
            tickets.push(ticket);
            tasks.push(task);
        }
        tokio::time::sleep(PATIENCE / 2).await;
        tickets[0].spoke();
        let newcomer = places.take(1, 16).await;
        assert!(begun.elapsed() >= PATIENCE, "the second client had some time left");
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
        let mut tickets = Vec::new();
        for listener in [1; 10].into_iter().chain(2..8) {
            tickets.push(places.take(listener, 16).await);
            assert!(places.taken() <= 4 + listener as usize);
        }
        assert_eq!(places.taken(), 10);
        for listener in 8..20 {
            tickets.push(places.take(listener, 16).await);
        }
        assert_eq!(places.taken(), 16);
    }
}
