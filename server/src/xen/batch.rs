//! A change of several nodes at once: what must hold, then what to write, in one transaction.
//!
//! A transaction here is data, not code, so that it can be tried again when somebody changed a node meanwhile. The conditions are
//! what keeps us honest: a write to a directory that the toolstack has just removed would *make it again*, and a state of ours would
//! overwrite one that the toolstack wrote a moment ago.

use std::time::Duration;

use super::client::{Call, Store, StoreError, Tx, transaction_id};
use super::wire::{Errno, Op, Request, strings};

/// Attempts when others change the same nodes.
const TRIES: u32 = 40;

/// Pauses between them: the first and the longest; the half of each is chance.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(200));

/// What must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The node is there.
    Exists(String),
    /// The node is not there.
    Missing(String),
    /// The node has this value.
    Equals(String, String),
    /// The node is there and has nothing below it.
    Empty(String),
}

impl Condition {
    fn request(&self) -> Request {
        match self {
            Condition::Empty(path) => Request::Directory(path.clone()),
            Condition::Exists(path) | Condition::Missing(path) | Condition::Equals(path, _) => {
                Request::Read(path.clone())
            }
        }
    }

    fn holds(&self, found: Option<&[u8]>) -> bool {
        match self {
            Condition::Exists(_) => found.is_some(),
            Condition::Missing(_) => found.is_none(),
            Condition::Equals(_, value) => found == Some(value.as_bytes()),
            Condition::Empty(_) => found.is_some_and(|listing| strings(listing).is_empty()),
        }
    }
}

/// A change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    conditions: Vec<Condition>,
    changes: Vec<Request>,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All was written.
    Committed,
    /// Nothing was: this condition does not hold.
    Refused(Condition),
}

impl Batch {
    /// Nothing.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Only if this holds.
    pub fn only_if(mut self, condition: Condition) -> Batch {
        self.conditions.push(condition);
        self
    }

    /// Writes a node.
    pub fn write(mut self, path: impl Into<String>, value: impl ToString) -> Batch {
        self.changes.push(Request::Write(path.into(), value.to_string().into_bytes()));
        self
    }

    /// Makes a node with an empty value.
    pub fn mkdir(mut self, path: impl Into<String>) -> Batch {
        self.changes.push(Request::Mkdir(path.into()));
        self
    }

    /// Removes a node and what is below it; one that is not there is no error.
    pub fn remove(mut self, path: impl Into<String>) -> Batch {
        self.changes.push(Request::Rm(path.into()));
        self
    }

    /// Sets permissions: `n5` is the owner, `r0` a reader.
    pub fn permit(mut self, path: impl Into<String>, perms: &[String]) -> Batch {
        self.changes.push(Request::SetPerms(path.into(), perms.to_vec()));
        self
    }

    fn subject(&self) -> String {
        self.changes.first().map_or_else(String::new, Request::subject)
    }
}

/// A transaction that is given up when it is dropped before its end.
struct Open<'a> {
    store: &'a Store,
    tx: Option<Tx>,
}

impl Open<'_> {
    fn start(&self, request: Request) -> Call {
        self.store.start(request, self.tx)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if let Some(tx) = self.tx.take() {
            self.store.tell(Request::TransactionEnd(false), Some(tx));
        }
    }
}

impl Store {
    /// Makes a change, again and again while others change the same nodes.
    pub async fn apply(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        let mut pause = PAUSE.0;
        for _ in 0..TRIES {
            match self.attempt(batch).await {
                Err(error) if error.errno() == Some(&Errno::Again) => {
                    tokio::time::sleep(pause / 2 + pause.mul_f64(fastrand::f64() / 2.0)).await;
                    pause = (pause * 2).min(PAUSE.1);
                }
                outcome => return outcome,
            }
        }
        Err(StoreError::Conflict(TRIES, batch.subject()))
    }

    async fn attempt(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        let connection =
            self.connection().ok_or_else(|| StoreError::Away("there is no connection".into()))?;
        let answer = self.start(Request::TransactionStart, None).answer().await?;
        let id = transaction_id(&answer).ok_or_else(|| {
            StoreError::Nonsense(Op::TransactionStart, String::new(), super::wire::shown(&answer))
        })?;
        let mut open = Open { store: self, tx: Some(Tx { id, connection }) };
        let checks: Vec<Call> =
            batch.conditions.iter().map(|condition| open.start(condition.request())).collect();
        for (condition, call) in batch.conditions.iter().zip(checks) {
            let found = match call.answer().await {
                Ok(value) => Some(value),
                Err(error) if error.errno() == Some(&Errno::NoEntry) => None,
                Err(error) => return Err(error),
            };
            if !condition.holds(found.as_deref()) {
                return Ok(Outcome::Refused(condition.clone()));
            }
        }
        let changes: Vec<(Op, Call)> =
            batch.changes.iter().map(|change| (change.op(), open.start(change.clone()))).collect();
        for (op, call) in changes {
            match call.answer().await {
                Ok(_) => {}
                Err(error) if op == Op::Rm && error.errno() == Some(&Errno::NoEntry) => {}
                Err(error) => return Err(error),
            }
        }
        let tx = open.tx.take();
        self.start(Request::TransactionEnd(true), tx).answer().await?;
        Ok(Outcome::Committed)
    }
}
