//! Operations of a driver that go on although the caller that began them went away.
//!
//! The kernel carries out what was begun ([`crate::file`], rule 2), also when the future that waited for it is dropped. Zeroes that
//! a driver writes around a request would then land at any time, over what somebody else wrote there in between. So a driver
//! awaits such operations through [`Late::finish`], which keeps what was dropped; waits with [`Late::wait`] before it plans or
//! erases anything; and calls no place *in place* as long as one is kept ([`Late::is_empty`]), so that every write comes by a plan.

use std::cell::{Cell, RefCell};

use crate::error::Error;
use crate::file::Pending;

/// See the module.
#[derive(Default)]
pub(crate) struct Late {
    kept: RefCell<Vec<Pending<'static, ()>>>,
    /// An operation that was kept is being waited for.
    waiting: Cell<bool>,
    /// Held by who waits for what was kept, so that nobody overtakes it.
    turn: async_lock::Mutex<()>,
}

/// An operation that is awaited; it is kept when its caller goes away.
struct Awaited<'a> {
    late: &'a Late,
    operation: Option<Pending<'static, ()>>,
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.late.kept.borrow_mut().extend(self.operation.take());
    }
}

impl Late {
    /// Waits for an operation that must not be forgotten when the caller goes away.
    pub async fn finish(&self, operation: Pending<'static, ()>) -> Result<(), Error> {
        let mut awaited = Awaited { late: self, operation: Some(operation) };
        let result = match &mut awaited.operation {
            Some(operation) => operation.await,
            None => Ok(()),
        };
        awaited.operation = None;
        result
    }

    /// Waits until no operation is left whose caller went away. What became of them is nobody's affair: nothing was answered that
    /// relies on them.
    pub async fn wait(&self) {
        let _turn = self.turn.lock().await;
        loop {
            let Some(operation) = self.kept.borrow_mut().pop() else {
                self.waiting.set(false);
                return;
            };
            self.waiting.set(true);
            let _ = self.finish(operation).await;
        }
    }

    /// No operation is left whose caller went away.
    pub fn is_empty(&self) -> bool {
        !self.waiting.get() && self.kept.borrow().is_empty()
    }
}

impl std::fmt::Debug for Late {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Late({} kept)", self.kept.borrow().len())
    }
}

#[cfg(test)]
mod tests {
    //! Goal: nobody goes past an operation whose caller went away, and its error is nobody's. Method: one write that is held in the
    //! store, its caller dropped, and several who wait.

    use std::rc::Rc;

    use super::*;
    use crate::file::{Buf, ImageFile};
    use crate::testing::run::{Abandon, Task};
    use crate::testing::{Fault, Pages, Rule, Store};

    #[test]
    fn nobody_overtakes() {
        for fails in [false, true] {
            let store = Store::new(1);
            let file = store.add("a", Pages::empty());
            let late = Late::default();
            if fails {
                store.inject(Rule::nth(0, Fault::EIO));
            }
            store.hold(|_| true);
            let write = file.write(0, Buf::zeroed(512));
            assert!(store.run(Abandon::after(1, late.finish(write))).is_none());
            assert!(!late.is_empty());
            let passed = Rc::new(Cell::new(0));
            // Each of them can be dropped on the way, too, and the others wait all the same.
            assert!(store.run(Abandon::after(1, late.wait())).is_none());
            let tasks = || {
                (0..3).map(|_| {
                    let (late, passed) = (&late, passed.clone());
                    let task: Task<'_> = Box::pin(async move {
                        late.wait().await;
                        passed.set(passed.get() + 1);
                    });
                    task
                })
            };
            store.try_run_all(tasks().collect()).unwrap_err();
            assert_eq!((passed.get(), late.is_empty()), (0, false));
            store.release();
            store.run_all(tasks().collect());
            assert_eq!((passed.get(), late.is_empty()), (3, true));
        }
    }
}
