//! For tests: a xenstored in memory behind a Unix socket, a guest's driver, a toolstack and a daemon's disks.
//!
//! The store knows the protocol by itself (it shares no code with the client but the header's shape): nodes with permissions, watches,
//! transactions that conflict when somebody changed what they touched, and faults on request.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::client::Store;
use super::transport::Transport;

#[derive(Debug, Clone, Default)]
pub struct Node {
    pub value: Vec<u8>,
    pub perms: Vec<String>,
    generation: u64,
}

type Tree = BTreeMap<String, Node>;

struct Transaction {
    base: u64,
    tree: Tree,
    touched: BTreeSet<String>,
    fired: Vec<(String, bool)>,
}

struct WatchEntry {
    connection: u64,
    path: String,
    token: String,
}

/// What the store shall do wrong.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// So many commits fail.
    pub conflicts: u32,
    /// Every batch of replies is late.
    pub delay: Duration,
    /// Replies of one batch come in another order.
    pub shuffle: bool,
    /// DIRECTORY_PART is unknown.
    pub is_old: bool,
    /// Everything below is refused.
    pub deny: Vec<String>,
    /// Watches are answered without their request's number, as the kernel's device does.
    pub kernel_watches: bool,
    /// Requests are read and not answered.
    pub mute: bool,
}

#[derive(Default)]
pub struct State {
    pub tree: Tree,
    removed: BTreeMap<String, u64>,
    generation: u64,
    next: u64,
    watches: Vec<WatchEntry>,
    transactions: HashMap<(u64, u32), Transaction>,
    pub introduced: BTreeSet<u16>,
    outputs: HashMap<u64, mpsc::UnboundedSender<Vec<u8>>>,
    pub faults: Faults,
    pub requests: u64,
    tasks: Vec<JoinHandle<()>>,
}

/// The store.
pub struct FakeStore {
    dir: tempfile::TempDir,
    state: Arc<Mutex<State>>,
    accepting: JoinHandle<()>,
}

impl Drop for FakeStore {
    fn drop(&mut self) {
        self.accepting.abort();
        self.state().tasks.iter().for_each(JoinHandle::abort);
    }
}

fn absolute(path: &str) -> String {
    if path.starts_with(['/', '@']) { path.to_owned() } else { format!("/local/domain/0/{path}") }
}

fn parent(path: &str) -> Option<&str> {
    path.rsplit_once('/').map(|(parent, _)| parent).filter(|parent| !parent.is_empty())
}

fn is_below(path: &str, root: &str) -> bool {
    path.strip_prefix(root).is_some_and(|rest| rest.starts_with('/'))
}

impl FakeStore {
    pub fn new() -> FakeStore {
        let dir = tempfile::tempdir().unwrap();
        let state: Arc<Mutex<State>> = Arc::default();
        state.lock().unwrap().introduced.insert(0);
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let accepting = tokio::spawn(accept(listener, state.clone()));
        let fake = FakeStore { dir, state, accepting };
        fake.write("/local/domain/0/domid", "0");
        fake
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub fn client(&self) -> Store {
        Store::new(Transport::Socket(self.path()))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.state().faults);
    }

    pub fn write(&self, path: &str, value: impl ToString) {
        self.state().change(|tree, generation| {
            set(tree, path, value.to_string().into_bytes(), generation);
            vec![(path.to_owned(), false)]
        });
    }

    /// Several nodes at once, as in a transaction.
    pub fn write_all(&self, dir: &str, pairs: &[(&str, String)]) {
        self.state().change(|tree, generation| {
            for (name, value) in pairs {
                set(tree, &format!("{dir}/{name}"), value.clone().into_bytes(), generation);
            }
            pairs.iter().map(|(name, _)| (format!("{dir}/{name}"), false)).collect()
        });
    }

    pub fn remove(&self, path: &str) {
        self.state().change(|tree, _| {
            tree.retain(|node, _| node != path && !is_below(node, path));
            vec![(path.to_owned(), true)]
        });
    }

    pub fn read(&self, path: &str) -> Option<String> {
        self.state().tree.get(path).map(|node| String::from_utf8_lossy(&node.value).into_owned())
    }

    pub fn nodes_below(&self, root: &str) -> Vec<String> {
        self.state().tree.keys().filter(|path| is_below(path, root)).cloned().collect()
    }

    pub fn watch_paths(&self) -> Vec<String> {
        self.state().watches.iter().map(|watch| watch.path.clone()).collect()
    }

    pub fn open_transactions(&self) -> usize {
        self.state().transactions.len()
    }

    pub fn introduce(&self, domid: u16) {
        self.state().introduced.insert(domid);
    }

    pub fn kill_domain(&self, domid: u16) {
        let mut state = self.state();
        state.introduced.remove(&domid);
        state.fire(&[("@releaseDomain".to_owned(), false)]);
    }

    /// All connections are lost, and what belonged to them; the nodes stay.
    pub fn restart(&self) {
        let mut state = self.state();
        state.tasks.drain(..).for_each(|task| task.abort());
        state.outputs.clear();
        state.watches.clear();
        state.transactions.clear();
    }

    pub async fn wait_for(&self, path: &str, value: &str) {
        self.wait(&format!("{path} = {value}"), |fake| fake.read(path).as_deref() == Some(value)).await;
    }

    pub async fn wait(&self, what: &str, condition: impl Fn(&FakeStore) -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        while tokio::time::Instant::now() < deadline {
            if condition(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let tree: Vec<String> = self
            .state()
            .tree
            .iter()
            .map(|(path, node)| format!("{path} = {}", String::from_utf8_lossy(&node.value)))
            .collect();
        panic!("waited in vain for {what}; the store has:\n{}", tree.join("\n"));
    }
}

fn set(tree: &mut Tree, path: &str, value: Vec<u8>, generation: u64) {
    make(tree, path, generation);
    let node = tree.get_mut(path).unwrap();
    (node.value, node.generation) = (value, generation);
}

/// A node, and its parents, with the permissions of the nearest that was there.
fn make(tree: &mut Tree, path: &str, generation: u64) {
    if tree.contains_key(path) {
        return;
    }
    let mut perms = vec!["n0".to_owned()];
    if let Some(parent) = parent(path) {
        make(tree, parent, generation);
        perms = tree[parent].perms.clone();
    }
    tree.insert(path.to_owned(), Node { value: Vec::new(), perms, generation });
}

impl State {
    fn change(&mut self, change: impl FnOnce(&mut Tree, u64) -> Vec<(String, bool)>) {
        self.generation += 1;
        let fired = change(&mut self.tree, self.generation);
        self.after(&fired);
    }

    fn after(&mut self, fired: &[(String, bool)]) {
        for (path, removed) in fired {
            if *removed {
                self.removed.insert(path.clone(), self.generation);
            }
        }
        self.fire(fired);
    }

    fn fire(&mut self, fired: &[(String, bool)]) {
        for (path, removed) in fired {
            for watch in &self.watches {
                let root = absolute(&watch.path);
                let told = if *path == root || is_below(path, &root) {
                    if watch.path.starts_with(['/', '@']) {
                        path.clone()
                    } else {
                        path.trim_start_matches("/local/domain/0/").to_owned()
                    }
                } else if *removed && is_below(&root, path) {
                    watch.path.clone()
                } else {
                    continue;
                };
                if let Some(output) = self.outputs.get(&watch.connection) {
                    let _ = output.send(packet(15, 0, 0, format!("{told}\0{}\0", watch.token).as_bytes()));
                }
            }
        }
    }

    /// The generation at which a node, or one above it that was removed, changed last.
    fn changed_at(&self, path: &str) -> u64 {
        let mut at = self.tree.get(path).map_or(0, |node| node.generation);
        let mut above = Some(path);
        while let Some(name) = above {
            at = at.max(self.removed.get(name).copied().unwrap_or(0));
            above = parent(name);
        }
        at
    }

    fn answer(&mut self, connection: u64, op: u32, id: u32, tx: u32, payload: &[u8]) -> Vec<u8> {
        self.requests += 1;
        match self.handle(connection, op, tx, payload) {
            Ok(reply) if self.faults.kernel_watches && matches!(op, 4 | 5) => packet(op, 0, 0, &reply),
            Ok(reply) => packet(op, id, tx, &reply),
            Err(name) => packet(16, id, tx, format!("{name}\0").as_bytes()),
        }
    }

    fn handle(&mut self, connection: u64, op: u32, tx: u32, payload: &[u8]) -> Result<Vec<u8>, &'static str> {
        let ok = || Ok(b"OK\0".to_vec());
        let mut parts = payload.split(|byte| *byte == 0);
        let first = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
        let path = absolute(&first);
        if self.faults.deny.iter().any(|denied| path == *denied || is_below(&path, denied)) {
            return Err("EACCES");
        }
        match op {
            4 => {
                let token = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
                if self.watches.iter().any(|other| {
                    (other.connection, &other.path, &other.token) == (connection, &first, &token)
                }) {
                    return Err("EEXIST");
                }
                let output = &self.outputs[&connection];
                let _ = output.send(packet(15, 0, 0, format!("{first}\0{token}\0").as_bytes()));
                self.watches.push(WatchEntry { connection, path: first, token });
                ok()
            }
            5 => {
                let token = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
                let before = self.watches.len();
                self.watches.retain(|other| {
                    (other.connection, &other.path, &other.token) != (connection, &first, &token)
                });
                if self.watches.len() < before { ok() } else { Err("ENOENT") }
            }
            6 => {
                self.next += 1;
                let id = self.next as u32;
                let (base, tree) = (self.generation, self.tree.clone());
                let open = Transaction { base, tree, touched: BTreeSet::new(), fired: Vec::new() };
                self.transactions.insert((connection, id), open);
                Ok(format!("{id}\0").into_bytes())
            }
            7 => {
                let open = self.transactions.remove(&(connection, tx)).ok_or("ENOENT")?;
                if first == "F" {
                    return ok();
                }
                let met = open.touched.iter().any(|path| self.changed_at(path) > open.base);
                if met || self.faults.conflicts > 0 {
                    self.faults.conflicts = self.faults.conflicts.saturating_sub(1);
                    return Err("EAGAIN");
                }
                self.generation += 1;
                let generation = self.generation;
                // What the transaction did not touch may have changed meanwhile.
                for path in &open.touched {
                    match open.tree.get(path) {
                        Some(node) => {
                            make(&mut self.tree, path, generation);
                            let mut node = node.clone();
                            if open.fired.iter().any(|(fired, _)| fired == path) {
                                node.generation = generation;
                            }
                            self.tree.insert(path.clone(), node);
                        }
                        None => {
                            self.tree.remove(path);
                        }
                    }
                }
                for (path, removed) in &open.fired {
                    if *removed {
                        let kept = |node: &String| {
                            open.tree.contains_key(node) || (node != path && !is_below(node, path))
                        };
                        self.tree.retain(|node, _| kept(node));
                    }
                }
                self.after(&open.fired);
                ok()
            }
            17 => {
                let known = first.parse().is_ok_and(|domid| self.introduced.contains(&domid));
                Ok(if known { b"T\0".to_vec() } else { b"F\0".to_vec() })
            }
            22 if self.faults.is_old => Err("ENOSYS"),
            1 | 2 | 11 | 12 | 13 | 14 | 22 => self.node(connection, op, tx, &path, &first, payload),
            _ => Err("ENOSYS"),
        }
    }

    fn node(
        &mut self,
        connection: u64,
        op: u32,
        tx: u32,
        path: &str,
        first: &str,
        payload: &[u8],
    ) -> Result<Vec<u8>, &'static str> {
        let generation = self.generation + 1;
        let list_generation = self.generation;
        let mut none = Vec::new();
        let (tree, fired, touched) = if tx == 0 {
            (&mut self.tree, &mut none, None)
        } else {
            let open = self.transactions.get_mut(&(connection, tx)).ok_or("ENOENT")?;
            (&mut open.tree, &mut open.fired, Some(&mut open.touched))
        };
        if let Some(touched) = touched {
            touched.insert(path.to_owned());
        }
        match op {
            2 => return tree.get(path).map(|node| node.value.clone()).ok_or("ENOENT"),
            1 | 22 => {
                if !tree.contains_key(path) {
                    return Err("ENOENT");
                }
                let mut names = Vec::new();
                for node in tree.keys().filter(|node| is_below(node, path)) {
                    let name = &node[path.len() + 1..];
                    if !name.contains('/') {
                        names.extend_from_slice(name.as_bytes());
                        names.push(0);
                    }
                }
                if op == 1 {
                    return if names.len() > 4096 { Err("E2BIG") } else { Ok(names) };
                }
                let offset = payload[first.len() + 1..].split(|byte| *byte == 0).next().unwrap_or_default();
                let offset: usize = String::from_utf8_lossy(offset).parse().map_err(|_| "EINVAL")?;
                let mut reply = format!("{list_generation}\0").into_bytes();
                let mut rest = names.get(offset..).ok_or("EINVAL")?;
                while let Some(end) = rest.iter().position(|byte| *byte == 0) {
                    if reply.len() + end + 2 > 4096 {
                        return Ok(reply);
                    }
                    reply.extend_from_slice(&rest[..=end]);
                    rest = &rest[end + 1..];
                }
                reply.push(0);
                return Ok(reply);
            }
            11 => {
                set(tree, path, payload[first.len() + 1..].to_vec(), generation);
                fired.push((path.to_owned(), false));
            }
            12 => {
                make(tree, path, generation);
                fired.push((path.to_owned(), false));
            }
            13 => {
                if !tree.contains_key(path) {
                    return Err("ENOENT");
                }
                tree.retain(|node, _| node != path && !is_below(node, path));
                fired.push((path.to_owned(), true));
            }
            14 => {
                let perms = payload[first.len() + 1..].split(|byte| *byte == 0);
                let perms = perms.filter(|perm| !perm.is_empty());
                let node = tree.get_mut(path).ok_or("ENOENT")?;
                node.perms = perms.map(|perm| String::from_utf8_lossy(perm).into_owned()).collect();
                fired.push((path.to_owned(), false));
            }
            _ => return Err("ENOSYS"),
        }
        if tx == 0 {
            self.generation = generation;
            let fired = none;
            self.after(&fired);
        }
        Ok(b"OK\0".to_vec())
    }
}

fn packet(op: u32, id: u32, tx: u32, payload: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> =
        [op, id, tx, payload.len() as u32].iter().flat_map(|word| word.to_ne_bytes()).collect();
    out.extend_from_slice(payload);
    out
}

async fn accept(listener: UnixListener, state: Arc<Mutex<State>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let mut locked = state.lock().unwrap();
        locked.next += 1;
        let number = locked.next;
        let (output, queue) = mpsc::unbounded_channel();
        locked.outputs.insert(number, output.clone());
        let task = tokio::spawn(serve(stream, state.clone(), number, output, queue));
        locked.tasks.push(task);
    }
}

async fn serve(
    stream: UnixStream,
    state: Arc<Mutex<State>>,
    number: u64,
    output: mpsc::UnboundedSender<Vec<u8>>,
    mut queue: mpsc::UnboundedReceiver<Vec<u8>>,
) {
    let (mut reader, mut writer) = stream.into_split();
    let writing = async move {
        while let Some(message) = queue.recv().await {
            if writer.write_all(&message).await.is_err() {
                break;
            }
        }
    };
    let reading = async {
        let mut buffer = Vec::new();
        while let Ok(count) = reader.read_buf(&mut buffer).await {
            if count == 0 {
                break;
            }
            let mut replies = Vec::new();
            while buffer.len() >= 16 {
                let word = |n: usize| u32::from_ne_bytes(buffer[4 * n..4 * n + 4].try_into().unwrap());
                let (op, id, tx, len) = (word(0), word(1), word(2), word(3) as usize);
                assert!(len <= 4096 - 16, "the client sends more than the device takes");
                if buffer.len() < 16 + len {
                    break;
                }
                let payload: Vec<u8> = buffer.drain(..16 + len).skip(16).collect();
                replies.push(state.lock().unwrap().answer(number, op, id, tx, &payload));
            }
            let faults = state.lock().unwrap().faults.clone();
            if faults.mute {
                continue;
            }
            if !faults.delay.is_zero() {
                tokio::time::sleep(faults.delay).await;
            }
            if faults.shuffle {
                fastrand::shuffle(&mut replies);
            }
            for reply in replies {
                let _ = output.send(reply);
            }
        }
    };
    tokio::select! {
        () = writing => {}
        () = reading => {}
    }
    let mut locked = state.lock().unwrap();
    locked.outputs.remove(&number);
    locked.watches.retain(|watch| watch.connection != number);
    locked.transactions.retain(|(connection, _), _| *connection != number);
}
