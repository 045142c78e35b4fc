//! Who works on which bytes of a disk: one queue, first come first served among those who conflict.
//!
//! | held \ wanted | Read | Write | Allocate | Erase |
//! |---|---|---|---|---|
//! | Read     | yes | yes | yes | no |
//! | Write    | yes | yes | no  | no |
//! | Allocate | yes | no  | no  | no |
//! | Erase    | no  | no  | no  | no |
//!
//! (*yes*: both at a time.) Reads and writes in place do not exclude each other: what overlapping requests of a guest leave is the
//! guest's affair. Allocations exclude each other, so that a range gets one
//! place, and writes in place, which rely on that place: it is safe only when the allocation has ended. Erase is for everything that takes a place
//! away: whoever reads or writes it has ended, and nobody begins.
//!
//! A waiter also waits for earlier waiters that it conflicts with, so nobody starves.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// What somebody does with a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Reads it where it is.
    Read,
    /// Writes it where it is.
    Write,
    /// Gives it a place.
    Allocate,
    /// Takes its place away.
    Erase,
}

impl Use {
    fn goes_with(self, other: Use) -> bool {
        !matches!(
            (self, other),
            (Use::Erase, _)
                | (_, Use::Erase)
                | (Use::Allocate, Use::Allocate | Use::Write)
                | (Use::Write, Use::Allocate)
        )
    }
}

#[derive(Debug)]
struct Entry {
    range: Range<u64>,
    kind: Use,
    waiting: bool,
    /// Who waits.
    waker: Option<Waker>,
}

/// The ranges of one disk.
#[derive(Debug, Default, Clone)]
pub struct RangeLocks {
    /// In order of arrival, holders and waiters.
    queue: Rc<RefCell<Queue>>,
}

#[derive(Debug, Default)]
struct Queue {
    entries: std::collections::BTreeMap<u64, Entry>,
    next: u64,
    /// Entries that are not reads or writes in place, or that wait: while there are none, reads and writes need not look.
    special: usize,
    /// Guards that wait to become an erase.
    upgrades: usize,
}

/// A range that is held, or waited for; gone when it is dropped.
#[derive(Debug)]
pub struct RangeGuard {
    queue: Rc<RefCell<Queue>>,
    key: u64,
}

fn conflict(a: &Entry, range: &Range<u64>, kind: Use) -> bool {
    a.range.start < range.end && range.start < a.range.end && !a.kind.goes_with(kind)
}

impl Queue {
    fn is_special(entry: &Entry) -> bool {
        entry.waiting || matches!(entry.kind, Use::Allocate | Use::Erase)
    }

    fn is_free(&self, before: u64, range: &Range<u64>, kind: Use) -> bool {
        if self.special == 0 && matches!(kind, Use::Read | Use::Write) {
            return true;
        }
        !self.entries.range(..before).any(|(_, entry)| conflict(entry, range, kind))
    }

    fn insert(&mut self, entry: Entry) -> u64 {
        let key = self.next;
        self.next += 1;
        self.special += usize::from(Self::is_special(&entry));
        self.entries.insert(key, entry);
        key
    }

    /// Lets those go who are not in anybody's way any more.
    fn wake(&mut self) {
        let waiting: Vec<u64> =
            self.entries.iter().filter(|(_, entry)| entry.waiting).map(|(key, _)| *key).collect();
        for key in waiting {
            let entry = &self.entries[&key];
            if self.is_free(key, &entry.range, entry.kind)
                && let Some(entry) = self.entries.get_mut(&key)
            {
                entry.waiting = false;
                self.special -= usize::from(matches!(entry.kind, Use::Read | Use::Write));
                if let Some(waker) = entry.waker.take() {
                    waker.wake();
                }
            }
        }
    }
}

impl RangeLocks {
    /// Nobody works on anything.
    pub fn new() -> RangeLocks {
        RangeLocks::default()
    }

    /// Takes a range if nobody is in the way, without waiting.
    pub fn try_take(&self, range: Range<u64>, kind: Use) -> Option<RangeGuard> {
        let mut queue = self.queue.borrow_mut();
        if !queue.is_free(u64::MAX, &range, kind) {
            return None;
        }
        let key = queue.insert(Entry { range, kind, waiting: false, waker: None });
        Some(RangeGuard { queue: self.queue.clone(), key })
    }

    /// Takes a range when those who are in the way have ended.
    pub async fn take(&self, range: Range<u64>, kind: Use) -> RangeGuard {
        let guard = {
            let mut queue = self.queue.borrow_mut();
            let waiting = !queue.is_free(u64::MAX, &range, kind);
            let key = queue.insert(Entry { range, kind, waiting, waker: None });
            RangeGuard { queue: self.queue.clone(), key }
        };
        std::future::poll_fn(|context| {
            let mut queue = self.queue.borrow_mut();
            match queue.entries.get_mut(&guard.key) {
                Some(entry) if entry.waiting => {
                    entry.waker = Some(context.waker().clone());
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            }
        })
        .await;
        guard
    }

    /// Ranges that are held or waited for.
    pub fn len(&self) -> usize {
        self.queue.borrow().entries.len()
    }

    /// Nobody works on anything.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl RangeGuard {
    /// Turns an allocation into an erase: waits until those who read or write the range have ended, and nobody begins.
    pub async fn become_erase(&self) {
        {
            let mut queue = self.queue.borrow_mut();
            if let Some(entry) = queue.entries.get_mut(&self.key) {
                entry.kind = Use::Erase;
            }
            queue.upgrades += 1;
        }
        let _waiting = Upgrade { guard: self };
        std::future::poll_fn(|context| {
            let mut queue = self.queue.borrow_mut();
            let Some(range) = queue.entries.get(&self.key).map(|entry| entry.range.clone()) else {
                return Poll::Ready(());
            };
            // Also those who came later and hold it already.
            let busy = queue.entries.iter().any(|(key, entry)| {
                *key != self.key && !entry.waiting && conflict(entry, &range, Use::Erase)
            });
            match queue.entries.get_mut(&self.key) {
                Some(entry) if busy => {
                    entry.waker = Some(context.waker().clone());
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            }
        })
        .await;
    }
}

/// A guard that waits to become an erase.
struct Upgrade<'a> {
    guard: &'a RangeGuard,
}

impl Drop for Upgrade<'_> {
    fn drop(&mut self) {
        self.guard.queue.borrow_mut().upgrades -= 1;
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut queue = self.queue.borrow_mut();
        if let Some(entry) = queue.entries.remove(&self.key)
            && Queue::is_special(&entry)
        {
            queue.special -= 1;
        }
        if queue.special > 0 {
            queue.wake();
        }
        if queue.upgrades > 0 {
            // They look for themselves.
            for entry in queue.entries.values_mut().filter(|entry| !entry.waiting) {
                if let Some(waker) = entry.waker.take() {
                    waker.wake();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    //! Goal: those who conflict never hold a range together, everybody gets a turn, a dropped waiter is in nobody's way.
    //! Method: the table above; random takers on an executor, with a count per byte of who holds it.

    use super::*;
    use futures_lite::future::{block_on, poll_once};
    use proptest::prelude::*;

    #[test]
    fn the_table() {
        use Use::{Allocate, Erase, Read, Write};
        for (held, wanted, both) in [
            (Read, Read, true),
            (Read, Allocate, true),
            (Read, Erase, false),
            (Write, Read, true),
            (Write, Allocate, false),
            (Write, Erase, false),
            (Allocate, Read, true),
            (Allocate, Write, false),
            (Allocate, Allocate, false),
            (Erase, Read, false),
            (Erase, Write, false),
            (Erase, Erase, false),
        ] {
            let locks = RangeLocks::new();
            let guard = locks.try_take(0..10, held).unwrap();
            assert_eq!(locks.try_take(9..20, wanted).is_some(), both, "{held:?} {wanted:?}");
            assert!(locks.try_take(10..20, wanted).is_some(), "beside it");
            drop(guard);
            assert!(locks.try_take(9..20, wanted).is_some());
            assert!(locks.is_empty());
        }
    }

    #[test]
    fn an_allocation_becomes_an_erase_when_readers_have_ended() {
        block_on(async {
            let locks = RangeLocks::new();
            let before = locks.take(0..10, Use::Read).await;
            let allocation = locks.take(0..10, Use::Allocate).await;
            let after = locks.take(5..6, Use::Read).await;
            let mut upgrade = Box::pin(allocation.become_erase());
            assert!(poll_once(&mut upgrade).await.is_none());
            let mut late = Box::pin(locks.take(5..6, Use::Read));
            assert!(poll_once(&mut late).await.is_none(), "nobody begins");
            drop(before);
            assert!(poll_once(&mut upgrade).await.is_none());
            drop(after);
            assert!(poll_once(&mut upgrade).await.is_some());
            assert!(poll_once(&mut late).await.is_none());
            drop(upgrade);
            drop(allocation);
            assert!(poll_once(&mut late).await.is_some());
        });
    }

    #[test]
    fn waiters_go_in_order_and_may_leave() {
        block_on(async {
            let locks = RangeLocks::new();
            let read = locks.take(0..10, Use::Read).await;
            let mut erase = Box::pin(locks.take(5..15, Use::Erase));
            assert!(poll_once(&mut erase).await.is_none());
            // A reader behind the waiting erase waits, too, though the holder would not mind it.
            let mut late = Box::pin(locks.take(8..9, Use::Read));
            assert!(poll_once(&mut late).await.is_none());
            assert!(locks.try_take(8..9, Use::Read).is_none());
            // Beside it one does not wait.
            assert!(locks.try_take(0..5, Use::Read).is_some());
            drop(erase);
            assert!(poll_once(&mut late).await.is_some());
            drop((read, late));
            assert!(locks.is_empty());
        });
    }

    proptest! {
        #[test]
        fn nobody_conflicts_and_everybody_ends(
            takers in proptest::collection::vec((0u64..30, 1u64..10, 0usize..4, 0u32..5), 1..40)
        ) {
            let executor = async_executor::LocalExecutor::new();
            let locks = RangeLocks::new();
            let held = Rc::new(RefCell::new(Vec::<(Range<u64>, Use)>::new()));
            let tasks: Vec<_> = takers.into_iter().map(|(start, len, kind, yields)| {
                let kind = [Use::Read, Use::Write, Use::Allocate, Use::Erase][kind];
                let (locks, held) = (locks.clone(), held.clone());
                executor.spawn(async move {
                    let range = start..start + len;
                    let _guard = locks.take(range.clone(), kind).await;
                    for (other, other_kind) in &*held.borrow() {
                        let apart = other.end <= range.start || range.end <= other.start;
                        assert!(apart || other_kind.goes_with(kind), "{other_kind:?} and {kind:?}");
                    }
                    held.borrow_mut().push((range.clone(), kind));
                    for _ in 0..yields {
                        futures_lite::future::yield_now().await;
                    }
                    let mut held = held.borrow_mut();
                    let index = held.iter().position(|entry| *entry == (range.clone(), kind)).unwrap();
                    held.swap_remove(index);
                })
            }).collect();
            block_on(executor.run(async {
                for task in tasks {
                    task.await;
                }
            }));
            prop_assert!(locks.is_empty());
        }
    }
}
