//! The client of XenStore: one connection, requests pipelined on it, watches as marks, and a new connection when it is lost.
//!
//! ```text
//! Store (any task) ── commands ──▶ Connection (one task) ══ socket ══ xenstored
//!       ▲ answers (oneshot)            │ events
//!       └───────────── Mark ◀──────────┘
//! ```
//! Invariants: the task reads whatever comes before it does anything else, so the store never waits for us. A request gets exactly one
//! answer: the store's, or that the connection was lost. A transaction belongs to one connection and is refused on another. After a
//! loss every watch is set again and marked, so that whoever waits looks at everything once more.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::transport::Transport;
use super::watches::{Changes, Mark, Marks, token};
use super::wire::{Decoder, Errno, Message, Op, Request, WireError, strings};
use crate::daemon::lock;
use crate::problem::{Problem, ProblemKind};

/// Requests of ours that the store has not answered: more wait here. A store limits those of a driver domain to 20.
const IN_FLIGHT_MAX: usize = 16;

/// A store that is silent for so long is given up; a live update of xenstored takes a few seconds.
const SILENCE_MAX: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 30 });

/// Pauses between attempts to connect: the first, and the longest.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// Parts of one listing: 4 MiB of names, far beyond any host.
const PARTS_MAX: usize = 1024;

/// Attempts to list a directory that changes all the time.
const LIST_TRIES: usize = 8;

/// Why XenStore did not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// It refused.
    #[error("XenStore, {op} {subject}: {errno}")]
    Refused {
        /// What was asked.
        op: Op,
        /// About which node.
        subject: String,
        /// Why not.
        errno: Errno,
    },
    /// There is no connection, or it ended before the answer.
    #[error("XenStore is away: {0}")]
    Away(String),
    /// Others changed the same nodes each time.
    #[error(
        "XenStore: {0} attempts to change {1} in one transaction met changes by somebody else; something writes there without pause"
    )]
    Conflict(u32, String),
    /// The request cannot be sent.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The answer makes no sense.
    #[error("XenStore, {0} {1}: the answer {2:?} makes no sense")]
    Nonsense(Op, String, String),
}

impl StoreError {
    /// The store's reason, if it gave one.
    pub fn errno(&self) -> Option<&Errno> {
        match self {
            StoreError::Refused { errno, .. } => Some(errno),
            _ => None,
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Problem {
        let kind = match &error {
            StoreError::Away(_) => ProblemKind::Unavailable,
            StoreError::Conflict(..) => ProblemKind::Busy,
            StoreError::Refused { errno: Errno::Access, .. } => ProblemKind::Forbidden,
            _ => ProblemKind::Failed,
        };
        Problem::new(kind, error.to_string())
    }
}

/// How the connection is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Not there, and why.
    Away(String),
    /// There, for the n-th time.
    Connected(u64),
}

/// A transaction's number on one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tx {
    pub(super) id: u32,
    pub(super) connection: u64,
}

type Answer = Result<Vec<u8>, StoreError>;

enum Command {
    Ask { request: Request, tx: Option<Tx>, answer: Option<oneshot::Sender<Answer>> },
    Watch(u64),
    Unwatch(u64, String),
}

/// A request on its way. Dropping it does not take the request back.
#[derive(Debug)]
pub struct Call(oneshot::Receiver<Answer>);

impl Call {
    /// The answer: the payload, as the store sent it.
    pub async fn answer(self) -> Answer {
        self.0.await.unwrap_or_else(|_| Err(StoreError::Away("the daemon is stopping".into())))
    }
}

#[derive(Debug)]
struct Shared {
    marks: Mutex<Marks>,
    status: watch::Sender<Status>,
    connections: AtomicU64,
}

/// XenStore. Cheap to clone; the connection ends when all clones and watches are gone.
#[derive(Debug, Clone)]
pub struct Store {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedSender<Command>,
}

/// A watch; ends when dropped.
#[derive(Debug)]
pub struct Watch {
    store: Store,
    id: u64,
    mark: Arc<Mark>,
}

impl Watch {
    /// Waits until something changed, or may have: at first, after a lost connection, and at whim of the store. Safe to drop.
    pub async fn changed(&self) -> Changes {
        self.mark.changed().await
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        lock(&self.store.shared.marks).remove(self.id);
        self.store.command(Command::Unwatch(self.id, self.mark.path.clone()));
    }
}

impl Store {
    /// A client that connects by itself, now and whenever the connection is lost. Needs a runtime.
    pub fn new(transport: Transport) -> Store {
        let (commands, queue) = mpsc::unbounded_channel();
        let (status, _) = watch::channel(Status::Away("it has not been asked yet".into()));
        let shared = Arc::new(Shared { marks: Mutex::default(), status, connections: AtomicU64::new(0) });
        tokio::spawn(run(shared.clone(), transport, queue));
        Store { shared, commands }
    }

    /// How the connection is, and a way to wait for changes of it.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.shared.status.subscribe()
    }

    /// Waits until there is a connection, at most so long.
    pub async fn connected(&self, patience: Duration) -> Result<(), StoreError> {
        let mut status = self.status();
        let there = status.wait_for(|status| matches!(status, Status::Connected(_)));
        let found = tokio::time::timeout(patience, there).await.is_ok();
        match &*self.shared.status.borrow() {
            Status::Away(why) if !found => Err(StoreError::Away(why.clone())),
            _ => Ok(()),
        }
    }

    fn command(&self, command: Command) {
        // The task ends with the runtime; what comes after that is answered by the dropped sender.
        let _ = self.commands.send(command);
    }

    /// Sends a request. Those that one task sends are answered as if done in that order.
    pub fn start(&self, request: Request, tx: Option<Tx>) -> Call {
        let (answer, call) = oneshot::channel();
        self.command(Command::Ask { request, tx, answer: Some(answer) });
        Call(call)
    }

    /// Sends a request whose answer nobody needs.
    pub(super) fn tell(&self, request: Request, tx: Option<Tx>) {
        self.command(Command::Ask { request, tx, answer: None });
    }

    /// A node's value; none when there is no such node.
    pub async fn read(&self, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
        optional(self.start(Request::Read(path.to_owned()), None).answer().await)
    }

    /// Values of several nodes, asked for all at once.
    pub async fn read_all(&self, paths: &[String]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        let calls: Vec<Call> =
            paths.iter().map(|path| self.start(Request::Read(path.clone()), None)).collect();
        let mut values = Vec::with_capacity(calls.len());
        for call in calls {
            values.push(optional(call.answer().await)?);
        }
        Ok(values)
    }

    /// The names below a node, in any number; none when there is no such node.
    pub async fn list(&self, path: &str) -> Result<Option<Vec<String>>, StoreError> {
        match self.start(Request::Directory(path.to_owned()), None).answer().await {
            Ok(payload) => Ok(Some(strings(&payload))),
            Err(error) if error.errno() == Some(&Errno::NoEntry) => Ok(None),
            Err(error) if error.errno() == Some(&Errno::TooBig) => self.list_parts(path).await,
            Err(error) => Err(error),
        }
    }

    /// The names below several nodes, asked for all at once; nothing below a node that is not there.
    pub async fn list_all(&self, paths: &[String]) -> Result<Vec<Vec<String>>, StoreError> {
        let calls: Vec<Call> =
            paths.iter().map(|path| self.start(Request::Directory(path.clone()), None)).collect();
        let mut lists = Vec::with_capacity(calls.len());
        for (path, call) in paths.iter().zip(calls) {
            lists.push(match call.answer().await {
                Ok(payload) => strings(&payload),
                Err(error) if error.errno() == Some(&Errno::TooBig) => {
                    self.list_parts(path).await?.unwrap_or_default()
                }
                answer => optional(answer)?.map_or_else(Vec::new, |payload| strings(&payload)),
            });
        }
        Ok(lists)
    }

    /// Lists in parts, again from the start when the directory changed meanwhile.
    async fn list_parts(&self, path: &str) -> Result<Option<Vec<String>>, StoreError> {
        'again: for _ in 0..LIST_TRIES {
            let (mut names, mut generation) = (Vec::new(), None);
            for _ in 0..PARTS_MAX {
                let request = Request::DirectoryPart(path.to_owned(), names.len());
                let part = match self.start(request, None).answer().await {
                    Ok(part) => part,
                    Err(error) if error.errno() == Some(&Errno::NoEntry) => return Ok(None),
                    Err(error) => return Err(error),
                };
                // A part: generation, NUL, names each with a NUL; an empty name, so a second NUL, ends the last part.
                let Some(end) = part.iter().position(|byte| *byte == 0) else {
                    let text = super::wire::shown(&part);
                    return Err(StoreError::Nonsense(Op::DirectoryPart, path.to_owned(), text));
                };
                let (seen, rest) = (part[..end].to_vec(), &part[end + 1..]);
                if generation.get_or_insert_with(|| seen.clone()) != &seen {
                    continue 'again;
                }
                names.extend_from_slice(rest);
                if names.ends_with(b"\0\0") || names == b"\0" || rest.is_empty() {
                    return Ok(Some(strings(&names)));
                }
            }
            break;
        }
        Err(StoreError::Conflict(LIST_TRIES as u32, format!("{path} (listing it)")))
    }

    /// Does XenStore know the domain? It does not when the domain is dead.
    pub async fn domain_exists(&self, domid: u16) -> Result<bool, StoreError> {
        Ok(self.start(Request::IsDomainIntroduced(domid), None).answer().await?.first() == Some(&b'T'))
    }

    /// The domain that we are in.
    pub async fn own_domid(&self) -> Result<u16, StoreError> {
        let Some(value) = self.read("domid").await? else { return Ok(0) };
        let text = String::from_utf8_lossy(&value).trim().to_owned();
        text.parse().map_err(|_| StoreError::Nonsense(Op::Read, "domid".into(), text))
    }

    /// Watches a node and all below it. With a depth, [`Changes`] names what changed so many levels below.
    pub fn watch(&self, path: impl Into<String>, depth: usize) -> Watch {
        let (id, mark) = lock(&self.shared.marks).add(path.into(), depth);
        self.command(Command::Watch(id));
        Watch { store: self.clone(), id, mark }
    }
}

/// "No such node" as a value.
fn optional(answer: Answer) -> Result<Option<Vec<u8>>, StoreError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.errno() == Some(&Errno::NoEntry) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Why a connection ended.
enum End {
    Lost(String),
    NobodyLeft,
}

async fn run(shared: Arc<Shared>, transport: Transport, mut queue: mpsc::UnboundedReceiver<Command>) {
    let mut pause = RECONNECT.0;
    loop {
        let why = match transport.open().await {
            Ok(stream) => {
                pause = RECONNECT.0;
                let number = shared.connections.fetch_add(1, Ordering::Relaxed) + 1;
                let mut connection = Connection::new(&shared, number);
                tracing::info!("connected to XenStore");
                shared.status.send_replace(Status::Connected(number));
                match connection.serve(stream, &mut queue).await {
                    End::NobodyLeft => return,
                    End::Lost(why) => why,
                }
            }
            Err(why) => why,
        };
        let known = matches!(&*shared.status.borrow(), Status::Away(before) if *before == why);
        if !known {
            tracing::warn!("XenStore is away: {why}");
            shared.status.send_replace(Status::Away(why.clone()));
        }
        // Half of the pause is chance: not every client of a restarted store comes back at once.
        let until = Instant::now() + pause / 2 + pause.mul_f64(fastrand::f64() / 2.0);
        pause = (pause * 2).min(RECONNECT.1);
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => break,
                command = queue.recv() => match command {
                    None => return,
                    Some(Command::Ask { answer: Some(answer), .. }) => {
                        let _ = answer.send(Err(StoreError::Away(why.clone())));
                    }
                    // Watches are set when there is a connection, and end with it.
                    Some(_) => {}
                },
            }
        }
    }
}

struct Pending {
    op: Op,
    subject: String,
    sent: Instant,
    then: Then,
}

enum Then {
    Tell(Option<oneshot::Sender<Answer>>),
    Watched(u64),
}

struct Connection<'a> {
    shared: &'a Shared,
    number: u64,
    next_id: u32,
    pending: BTreeMap<u32, Pending>,
    /// Whole messages, of which `written` bytes of the first are out. Each is written by itself: the device wants that.
    outgoing: VecDeque<Vec<u8>>,
    written: usize,
    to_watch: VecDeque<u64>,
    watched: HashSet<u64>,
}

impl<'a> Connection<'a> {
    fn new(shared: &'a Shared, number: u64) -> Connection<'a> {
        let marks = lock(&shared.marks);
        marks.mark_all();
        Connection {
            shared,
            number,
            next_id: 1,
            pending: BTreeMap::new(),
            outgoing: VecDeque::new(),
            written: 0,
            to_watch: marks.ids().into(),
            watched: HashSet::new(),
        }
    }

    async fn serve(&mut self, stream: UnixStream, queue: &mut mpsc::UnboundedReceiver<Command>) -> End {
        let (mut reader, mut writer) = stream.into_split();
        let mut decoder = Decoder::default();
        let mut chunk = vec![0u8; 16 * 1024];
        let end = loop {
            while self.has_room()
                && let Some(id) = self.to_watch.pop_front()
            {
                self.set_watch(id);
            }
            let silent = self.pending.first_key_value().map(|(_, oldest)| oldest.sent + SILENCE_MAX);
            let room = self.has_room();
            tokio::select! {
                biased;
                count = reader.read(&mut chunk) => {
                    let outcome = match count {
                        Ok(0) => Err("it closed the connection".into()),
                        Ok(count) => self.receive(&mut decoder, &chunk[..count]),
                        Err(error) => Err(format!("the connection failed: {error}")),
                    };
                    if let Err(why) = outcome {
                        break End::Lost(why);
                    }
                }
                count = writer.write(self.outgoing.front().map_or(&[][..], |first| &first[self.written..])),
                    if !self.outgoing.is_empty() =>
                {
                    match count {
                        Ok(count) => self.wrote(count),
                        Err(error) => break End::Lost(format!("the connection failed: {error}")),
                    }
                }
                command = queue.recv(), if room => match command {
                    Some(command) => self.take(command),
                    None => break End::NobodyLeft,
                },
                () = tokio::time::sleep_until(silent.unwrap_or_else(Instant::now)), if silent.is_some() => {
                    let seconds = SILENCE_MAX.as_secs();
                    break End::Lost(format!("it has not answered for {seconds} s: look at xenstored"));
                }
            }
        };
        let why = match &end {
            End::Lost(why) => why.clone(),
            End::NobodyLeft => "the daemon is stopping".into(),
        };
        for (_, pending) in std::mem::take(&mut self.pending) {
            if let Then::Tell(Some(answer)) = pending.then {
                let _ = answer.send(Err(StoreError::Away(why.clone())));
            }
        }
        end
    }

    fn has_room(&self) -> bool {
        self.pending.len() < IN_FLIGHT_MAX
    }

    fn wrote(&mut self, count: usize) {
        self.written += count;
        if self.outgoing.front().is_some_and(|first| first.len() <= self.written) {
            self.outgoing.pop_front();
            self.written = 0;
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Watch(id) => self.set_watch(id),
            Command::Unwatch(id, path) => {
                if self.watched.remove(&id) {
                    self.send(Request::Unwatch(path, token(id)), 0, Then::Tell(None));
                }
            }
            Command::Ask { request, tx, answer } => {
                if tx.is_some_and(|tx| tx.connection != self.number) {
                    if let Some(answer) = answer {
                        let why = "the connection was lost within a transaction";
                        let _ = answer.send(Err(StoreError::Away(why.into())));
                    }
                    return;
                }
                self.send(request, tx.map_or(0, |tx| tx.id), Then::Tell(answer));
            }
        }
    }

    fn set_watch(&mut self, id: u64) {
        let mark = lock(&self.shared.marks).get(id);
        if let Some(mark) = mark
            && self.watched.insert(id)
        {
            self.send(Request::Watch(mark.path.clone(), token(id)), 0, Then::Watched(id));
        }
    }

    fn send(&mut self, request: Request, transaction: u32, then: Then) {
        let id = self.next_id;
        // Number 0 is the kernel's, for answers that it makes up itself.
        self.next_id = self.next_id.checked_add(1).unwrap_or(1);
        match request.encode(id, transaction) {
            Ok(message) => {
                self.outgoing.push_back(message);
                let pending =
                    Pending { op: request.op(), subject: request.subject(), sent: Instant::now(), then };
                self.pending.insert(id, pending);
            }
            Err(error) => match then {
                Then::Tell(Some(answer)) => {
                    let _ = answer.send(Err(error.into()));
                }
                _ => tracing::error!("XenStore, {} {}: {error}", request.op(), request.subject()),
            },
        }
    }

    fn receive(&mut self, decoder: &mut Decoder, bytes: &[u8]) -> Result<(), String> {
        decoder.push(bytes);
        while let Some(message) = decoder.next_message().map_err(|error| error.to_string())? {
            match message {
                Message::Event { path, token } => lock(&self.shared.marks).event(&path, &token),
                Message::Reply { request_id, op, result } => self.reply(request_id, op, result)?,
            }
        }
        Ok(())
    }

    fn reply(&mut self, request_id: u32, op: u32, result: Result<Vec<u8>, Errno>) -> Result<(), String> {
        let id = match request_id {
            // The kernel's answer to a watch: they come in the order of the requests.
            0 => self.pending.iter().find(|(_, pending)| pending.op as u32 == op).map(|(id, _)| *id),
            id => Some(id),
        };
        let Some(pending) = id.and_then(|id| self.pending.remove(&id)) else {
            return Err(format!("it answered request {request_id}, which was not asked"));
        };
        if result.is_ok() && op != pending.op as u32 {
            return Err(format!("it answered a request of type {} by type {op}", pending.op as u32));
        }
        let result = result.map_err(|errno| StoreError::Refused {
            op: pending.op,
            subject: pending.subject.clone(),
            errno,
        });
        match pending.then {
            Then::Watched(id) => {
                if let Err(error) = result {
                    tracing::warn!("{error}");
                    self.watched.remove(&id);
                }
            }
            Then::Tell(Some(answer)) => {
                // A transaction that nobody waits for any more is not left open.
                if let (Op::TransactionStart, Err(Ok(payload))) = (pending.op, answer.send(result))
                    && let Some(transaction) = transaction_id(&payload)
                {
                    self.send(Request::TransactionEnd(false), transaction, Then::Tell(None));
                }
            }
            Then::Tell(None) => {}
        }
        Ok(())
    }
}

/// The number in the answer to a start of a transaction; 0 would mean "none".
pub(super) fn transaction_id(payload: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(payload).ok()?;
    text.trim_end_matches('\0').parse().ok().filter(|id| *id != 0)
}

impl Store {
    /// The number of the connection that is there now.
    pub(super) fn connection(&self) -> Option<u64> {
        match *self.shared.status.borrow() {
            Status::Connected(number) => Some(number),
            Status::Away(_) => None,
        }
    }
}
