//! For tests: a toolstack's writes, a guest's driver over the store, and disks that check how they are used.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::task::JoinHandle;

use super::backend::{Backend, Disks};
use super::client::Store;
use super::device::{DeviceId, Kind};
use super::fake::FakeStore;
use super::host::Host;
use super::keys::Connect;
use super::publish::{Features, Properties};
use super::spec::Wanted;
use crate::problem::Problem;

pub const XVDA: u32 = 51712;

pub fn vbd3(domid: u16, devid: u32) -> DeviceId {
    DeviceId { kind: Kind::Vbd3, domid, devid }
}

pub fn backend_state(id: DeviceId) -> String {
    format!("{}/state", id.backend(0))
}

pub fn front_state(id: DeviceId) -> String {
    format!("{}/state", id.frontend())
}

/// Writes a device as libxl does; `extra` replaces or adds nodes of the backend.
pub fn toolstack_attach(fake: &FakeStore, id: DeviceId, extra: &[(&str, &str)]) {
    fake.introduce(id.domid);
    let mut nodes = vec![
        ("frontend", id.frontend()),
        ("frontend-id", id.domid.to_string()),
        ("online", "1".to_owned()),
        ("params", format!("aio:/srv/{}-{}.img", id.domid, id.devid)),
        ("mode", "w".to_owned()),
        ("state", "1".to_owned()),
    ];
    nodes.retain(|(name, _)| !extra.iter().any(|(other, _)| other == name));
    nodes.extend(extra.iter().map(|(name, value)| (*name, (*value).to_owned())));
    fake.write_all(
        &id.frontend(),
        &[("backend", id.backend(0)), ("backend-id", "0".into()), ("state", "1".into())],
    );
    fake.write_all(&id.backend(0), &nodes);
}

/// As libxl asks for a removal.
pub fn toolstack_detach(fake: &FakeStore, id: DeviceId) {
    fake.write_all(&id.backend(0), &[("online", "0".to_owned()), ("state", "5".to_owned())]);
}

/// As libxl cleans up.
pub fn toolstack_clean(fake: &FakeStore, id: DeviceId) {
    fake.remove(&id.frontend());
    fake.remove(&id.backend(0));
}

/// Nodes of rings as a driver publishes them, and state 3.
pub fn publish_rings(fake: &FakeStore, id: DeviceId) {
    let nodes = [
        ("ring-ref", "8"),
        ("event-channel", "12"),
        ("protocol", "x86_64-abi"),
        ("feature-persistent", "1"),
        ("state", "3"),
    ];
    fake.write_all(&id.frontend(), &nodes.map(|(name, value)| (name, value.to_owned())));
}

/// A guest's driver that does as it should, until it is dropped.
pub struct Guest(JoinHandle<()>);

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Guest {
    pub fn start(fake: &Arc<FakeStore>, store: &Store, id: DeviceId) -> Guest {
        let (fake, watch) = (fake.clone(), store.watch(backend_state(id), 0));
        Guest(tokio::spawn(async move {
            loop {
                watch.changed().await;
                let front = fake.read(&front_state(id));
                let set = |state: &str| fake.write(&front_state(id), state);
                match (front.as_deref(), fake.read(&backend_state(id)).as_deref()) {
                    (Some("1"), Some("2")) => publish_rings(&fake, id),
                    (Some("3"), Some("4")) => set("4"),
                    (Some("1" | "3" | "4"), Some("5")) => {
                        set("5");
                        tokio::task::yield_now().await;
                        set("6");
                    }
                    _ => {}
                }
            }
        }))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    Open,
    Connected,
    Busy,
}

#[derive(Debug, Default)]
pub struct DiskState {
    pub uses: HashMap<DeviceId, Use>,
    pub log: Vec<String>,
    pub last_connect: Option<Connect>,
    pub wanted: HashMap<DeviceId, Wanted>,
    pub fail_open: Option<String>,
    pub fail_connect: Option<String>,
    pub panic_once: Option<DeviceId>,
    pub open_delay: Duration,
    pub delay: Duration,
    pub sectors: u64,
    pub connects: u64,
    pub awaiting: Vec<DeviceId>,
}

/// Disks that panic when they are used out of order.
#[derive(Debug)]
pub struct FakeDisks(Mutex<DiskState>);

impl FakeDisks {
    pub fn state(&self) -> MutexGuard<'_, DiskState> {
        self.0.lock().unwrap()
    }

    fn change(&self, id: DeviceId, what: &str, from: &[Option<Use>], to: Option<Use>) {
        let mut state = self.state();
        let now = state.uses.get(&id).copied();
        if !from.contains(&now) {
            state.log.push(format!("WRONG {what} {id} while {now:?}"));
        }
        state.log.push(format!("{what} {id}"));
        match to {
            Some(to) => state.uses.insert(id, to),
            None => state.uses.remove(&id),
        };
    }

    pub fn log_of(&self, id: DeviceId) -> Vec<String> {
        let name = format!(" {id}");
        let state = self.state();
        let lines = state.log.iter().filter(|line| line.ends_with(&name));
        lines.map(|line| line.trim_end_matches(&name).to_owned()).collect()
    }

    pub fn assert_never_wrong(&self) {
        let state = self.state();
        let wrong: Vec<_> = state.log.iter().filter(|line| line.starts_with("WRONG")).collect();
        assert!(wrong.is_empty(), "{wrong:?}");
    }
}

impl Disks for FakeDisks {
    async fn open(&self, wanted: &Wanted) -> Result<(), Problem> {
        let (delay, fail) = {
            let state = self.state();
            (state.open_delay, state.fail_open.clone())
        };
        tokio::time::sleep(delay).await;
        let panics = self.state().panic_once.take_if(|id| *id == wanted.id).is_some();
        assert!(!panics, "a panic that a test asked for");
        if let Some(why) = fail {
            return Err(Problem::failed(why));
        }
        self.state().wanted.insert(wanted.id, wanted.clone());
        self.change(wanted.id, "open", &[None], Some(Use::Open));
        Ok(())
    }

    fn properties(&self, id: DeviceId) -> Option<Properties> {
        let state = self.state();
        state.uses.contains_key(&id).then(|| Properties {
            sectors: state.sectors,
            sector_size: 512,
            physical_sector_size: 4096,
            read_only: state.wanted[&id].read_only,
            cdrom: false,
            removable: false,
            flush: true,
            barrier: true,
            discard: None,
        })
    }

    async fn connect(&self, id: DeviceId, connect: Connect) -> Result<(), Problem> {
        let (delay, fail) = {
            let mut state = self.state();
            state.connects += 1;
            state.last_connect = Some(connect);
            (state.delay, state.fail_connect.clone())
        };
        self.change(id, "connect", &[Some(Use::Open)], Some(Use::Busy));
        tokio::time::sleep(delay).await;
        let to = if fail.is_some() { Use::Open } else { Use::Connected };
        self.state().uses.insert(id, to);
        fail.map_or(Ok(()), |why| Err(Problem::failed(why)))
    }

    async fn disconnect(&self, id: DeviceId) {
        self.change(id, "disconnect", &[Some(Use::Connected)], Some(Use::Busy));
        let delay = self.state().delay;
        tokio::time::sleep(delay).await;
        self.state().uses.insert(id, Use::Open);
    }

    async fn removed(&self, id: DeviceId) {
        self.change(id, "removed", &[None, Some(Use::Open)], None);
    }

    fn awaiting(&self, id: DeviceId, awaits: bool) {
        if awaits {
            self.state().awaiting.push(id);
        }
    }
}

/// A host whose other servers of disks are switched on and off.
#[derive(Debug, Default)]
pub struct FakeHost {
    pub tapback: Mutex<Option<u32>>,
    pub loaded: Mutex<bool>,
    pub bound: Mutex<Vec<DeviceId>>,
    /// Times that memory was to be kept.
    pub kept: Mutex<u32>,
}

impl Host for FakeHost {
    fn tapback(&self) -> Option<u32> {
        *self.tapback.lock().unwrap()
    }

    fn blkback_loaded(&self) -> bool {
        *self.loaded.lock().unwrap()
    }

    fn blkback_has(&self, id: DeviceId) -> bool {
        self.bound.lock().unwrap().contains(&id)
    }

    fn keep_memory(&self) -> Result<(), String> {
        *self.kept.lock().unwrap() += 1;
        Err("a test's host keeps none".into())
    }
}

/// Everything together.
pub struct Rig {
    pub fake: Arc<FakeStore>,
    /// The backend's connection.
    pub store: Store,
    /// The guests' connection.
    pub guests: Store,
    pub disks: Arc<FakeDisks>,
    pub host: Arc<FakeHost>,
    pub backend: Backend<FakeDisks>,
}

impl Rig {
    pub fn new() -> Rig {
        Rig::on(FakeStore::new())
    }

    pub fn on(fake: FakeStore) -> Rig {
        let fake = Arc::new(fake);
        let (store, guests) = (fake.client(), fake.client());
        let disks = Arc::new(FakeDisks(Mutex::new(DiskState { sectors: 2048, ..DiskState::default() })));
        let host = Arc::new(FakeHost::default());
        let backend = Backend::start(store.clone(), disks.clone(), host.clone(), Features::default());
        Rig { fake, store, guests, disks, host, backend }
    }

    pub fn guest(&self, id: DeviceId) -> Guest {
        Guest::start(&self.fake, &self.guests, id)
    }

    /// Both ends are in these states.
    pub async fn wait_states(&self, id: DeviceId, own: &str, front: &str) {
        self.fake.wait_for(&backend_state(id), own).await;
        self.fake.wait_for(&front_state(id), front).await;
    }

    pub async fn wait_log(&self, id: DeviceId, last: &str) {
        let disks = self.disks.clone();
        self.fake
            .wait(&format!("{last} {id}"), move |_| disks.log_of(id).last().is_some_and(|line| line == last))
            .await;
    }
}
