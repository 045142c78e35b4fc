//! A daemon in this process, on shards that are scripted: they answer commands at once, refuse them, or hold them.

#![allow(dead_code)] // each test program uses a part of it
#![allow(clippy::unwrap_used)] // a failed test is what an unwrap in it is for

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blktapd::args::ServeArgs;
use blktapd::config::Settings;
use blktapd::daemon::Daemon;
use blktapd::fleet::{Fleet, Shard, ShardLink, monotonic_now};
use blktapd::images::Images;
use blktapd::model::AttachRequest;
use blktapd::problem::Problem;
use blktapd::ram_dir::RamDir;
use blktapd::rundir;
use blktapd::state::StateStore;
use shard::api::{
    ClientInfo, Command, DiskConfig, DiskId, DiskState, Envelope, Event, Reply, ShardError, ShardErrorKind,
};
use tokio::time::Instant;

/// What a scripted shard does with the commands of one kind.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    Answer,
    Hold,
    Refuse(ShardErrorKind),
}

#[derive(Default)]
struct Script {
    connected: Vec<ring_bridge::nbd::Handoff>,
    behaviour: HashMap<&'static str, Behaviour>,
    disks: HashMap<DiskId, Box<DiskConfig>>,
    held: Vec<Envelope>,
    log: Vec<&'static str>,
    fleet: Option<Arc<Fleet>>,
    ended: bool,
}

/// A shard that does what it is told.
#[derive(Clone)]
pub struct FakeShard {
    index: usize,
    script: Arc<Mutex<Script>>,
}

impl ShardLink for FakeShard {
    fn send(&self, envelope: Envelope) {
        let mut script = self.script.lock().unwrap();
        if script.ended {
            return script.held.push(envelope);
        }
        let kind = kind_of(&envelope.command);
        script.log.push(kind);
        match script.behaviour.get(kind).copied().unwrap_or(Behaviour::Answer) {
            Behaviour::Hold => script.held.push(envelope),
            Behaviour::Refuse(kind) => {
                let message = "the scripted shard refuses".to_owned();
                self.reply(&script, envelope.tag, Err(ShardError { kind, message }));
            }
            Behaviour::Answer => {
                let result = answer(&mut script, envelope.command);
                self.reply(&script, envelope.tag, result);
            }
        }
    }

    fn take_back(&self) -> Vec<Envelope> {
        std::mem::take(&mut self.script.lock().unwrap().held)
    }
}

fn kind_of(command: &Command) -> &'static str {
    match command {
        Command::AddDisk(_) => "add",
        Command::RemoveDisk { force: false, .. } => "remove",
        Command::RemoveDisk { force: true, .. } => "force",
        Command::Connect { .. } => "connect",
        Command::ConnectGuest { .. } => "connect guest",
        Command::DisconnectGuest { .. } => "disconnect guest",
        Command::SetLimits { .. } => "limits",
        Command::Pause { .. } => "pause",
        Command::Resume { .. } => "resume",
        Command::Fail { .. } => "fail",
        Command::Park { .. } => "park",
        Command::CancelPark { .. } => "cancel",
        Command::Unpark(_) => "unpark",
        Command::Stats { .. } => "stats",
        Command::Clients { .. } => "clients",
        Command::Stop => "stop",
        Command::Swap { .. } => "swap",
        Command::Resize { .. } => "resize",
        Command::InjectPanic { .. } => "panic",
        Command::InjectShardPanic => "shard panic",
    }
}

fn answer(script: &mut Script, command: Command) -> Result<Reply, ShardError> {
    let set = |script: &Script, disk: &DiskId, state: DiskState| {
        script.disks[disk].counters.state.set(state as u64);
    };
    match command {
        Command::AddDisk(config) => {
            script.disks.insert(config.id, config);
        }
        Command::RemoveDisk { disk, .. } => {
            return script
                .disks
                .remove(&disk)
                .map(Reply::Removed)
                .ok_or(ShardError { kind: ShardErrorKind::NoSuchDisk, message: "no such disk".into() });
        }
        Command::Pause { disk } => set(script, &disk, DiskState::Paused),
        Command::Resume { disk, .. } => set(script, &disk, DiskState::Running),
        Command::Fail { disk } => set(script, &disk, DiskState::Failed),
        Command::SetLimits { disk, limits, groups } => {
            if let Some(config) = script.disks.get_mut(&disk) {
                config.limits = limits;
                config.groups = groups;
            }
        }
        Command::Stats { .. } => return Ok(Reply::Stats(Box::default())),
        Command::Clients { disk } => {
            let clients = script.disks[&disk].counters.clients.get();
            let client = |n| ClientInfo { peer: format!("unix pid {n} (fio)"), in_flight: 1, age_s: 3 };
            return Ok(Reply::Clients((0..clients).map(client).collect()));
        }
        Command::Connect { disk, handoff } => {
            script.disks[&disk].counters.clients.add(1);
            script.connected.push(*handoff);
        }
        _ => {}
    }
    Ok(Reply::Done)
}

impl FakeShard {
    fn reply(&self, script: &Script, tag: u64, result: Result<Reply, ShardError>) {
        let fleet = script.fleet.clone().expect("the fleet is known before the first command");
        fleet.deliver(self.index, Event::Reply { tag, result });
    }

    /// From now on commands of a kind are treated like this.
    pub fn script(&self, kind: &'static str, behaviour: Behaviour) {
        self.script.lock().unwrap().behaviour.insert(kind, behaviour);
    }

    /// Commands that came, by kind.
    pub fn log(&self) -> Vec<&'static str> {
        self.script.lock().unwrap().log.clone()
    }

    /// Peers of the connections that it got.
    pub fn connected(&self) -> Vec<String> {
        self.script.lock().unwrap().connected.iter().map(|handoff| handoff.peer.clone()).collect()
    }

    /// Disks that it serves, by name.
    pub fn disks(&self) -> Vec<String> {
        let mut names: Vec<_> =
            self.script.lock().unwrap().disks.values().map(|config| config.name.to_string()).collect();
        names.sort();
        names
    }

    /// Limits of a disk as the shard knows them.
    pub fn limits(&self, name: &str) -> shard::limits::Limits {
        self.script.lock().unwrap().disks.values().find(|config| &*config.name == name).unwrap().limits
    }

    /// Answers the commands that were held.
    pub fn release(&self) {
        let mut script = self.script.lock().unwrap();
        for envelope in std::mem::take(&mut script.held) {
            let result = answer(&mut script, envelope.command);
            self.reply(&script, envelope.tag, result);
        }
    }

    /// Answers the first held command of a kind with this.
    pub fn answer_held(&self, kind: &'static str, result: Result<Reply, ShardError>) {
        let mut script = self.script.lock().unwrap();
        let index =
            script.held.iter().position(|envelope| kind_of(&envelope.command) == kind).expect("one is held");
        let envelope = script.held.remove(index);
        self.reply(&script, envelope.tag, result);
    }

    /// Refuses the first held disk that comes from another shard.
    pub fn hand_back(&self) {
        let mut script = self.script.lock().unwrap();
        let index = script.held.iter().position(|envelope| kind_of(&envelope.command) == "unpark");
        let Envelope { tag, command } = script.held.remove(index.expect("one is held"));
        let Command::Unpark(parked) = command else { unreachable!() };
        self.reply(&script, tag, Ok(Reply::NotTaken(parked)));
    }

    /// Gives the configuration of a disk away, as a shard does with a zombie.
    pub fn take(&self, name: &str) -> Box<DiskConfig> {
        let mut script = self.script.lock().unwrap();
        let id = *script.disks.iter().find(|(_, config)| &*config.name == name).expect("it has the disk").0;
        script.disks.remove(&id).unwrap()
    }

    /// Says something by itself.
    pub fn say(&self, event: Event) {
        let fleet = self.script.lock().unwrap().fleet.clone().unwrap();
        fleet.deliver(self.index, event);
    }

    /// Ends, as after a panic.
    pub fn die(&self) {
        self.script.lock().unwrap().ended = true;
        self.say(Event::Stopped { error: Some("it was shot by a test".into()) });
    }
}

/// A daemon, its shards and its directory.
pub struct Rig {
    pub daemon: Arc<Daemon>,
    pub shards: Vec<FakeShard>,
    pub dir: Arc<tempfile::TempDir>,
    _owned: rundir::Owned,
}

impl Drop for Rig {
    fn drop(&mut self) {
        // RAM disks outlive a daemon, and not the last one in this directory.
        if Arc::strong_count(&self.dir) == 1 {
            let _ = std::fs::remove_dir_all(RamDir::new(None, &self.dir.path().join("run")).in_shm());
        }
    }
}

impl Rig {
    /// A daemon on two scripted shards in a new directory.
    pub fn new() -> Rig {
        Rig::with(Arc::new(tempfile::tempdir().unwrap()), "")
    }

    /// A daemon in a directory that may have a state, with a configuration.
    pub fn with(dir: Arc<tempfile::TempDir>, config: &str) -> Rig {
        let config_path = dir.path().join("blktapd.toml");
        std::fs::write(&config_path, config).unwrap();
        let args = ServeArgs {
            config: Some(config_path),
            run_dir: Some(dir.path().join("run")),
            metrics: Some("none".into()),
            ..ServeArgs::default()
        };
        let settings = Settings::load(&args).unwrap();
        let owned = rundir::own(&settings).unwrap();
        let state = StateStore::open(&settings.state_dir).unwrap();
        let images = Images::new(&settings).unwrap();
        let fakes: Vec<FakeShard> = (0..2).map(|index| FakeShard { index, script: Arc::default() }).collect();
        let links = fakes
            .iter()
            .map(|fake| Shard::new(fake.index, Some(fake.index), Arc::default(), Box::new(fake.clone())));
        let (fleet, notices) = Fleet::new(links.collect());
        for fake in &fakes {
            fake.script.lock().unwrap().fleet = Some(fleet.clone());
        }
        // Scripted shards turn as well.
        let turning = fleet.clone();
        tokio::spawn(async move {
            loop {
                turning.shards().iter().for_each(|shard| shard.counters.last_turn.set(monotonic_now()));
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        let daemon = Daemon::new(args, settings, fleet, images, state).unwrap();
        tokio::spawn(daemon.clone().handle_notices(notices));
        Rig { daemon, shards: fakes, dir, _owned: owned }
    }

    /// Ends this daemon without a word to anybody, and starts another in the same directory. What the kernel would take back
    /// from a dead process (locks of images) is given back by hand.
    pub async fn crash(self, config: &str) -> Rig {
        self.shards.iter().for_each(|shard| shard.script.lock().unwrap().disks.clear());
        for disk in self.daemon.all_disks() {
            if let Some(live) = disk.go_down("crashed") {
                self.daemon.images.release(live.image, &disk.name).await;
            }
        }
        self.daemon.begin_stop();
        let dir = self.dir.clone();
        drop(self);
        Rig::with(dir, config)
    }

    /// A new image file of a size.
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    /// Attaches with NBD.
    pub async fn attach(&self, name: &str, image: &str) -> Result<(blktapd::model::Disk, bool), Problem> {
        self.daemon.attach(name, request(image), patient()).await
    }

    /// The path of a disk's socket.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join("run/nbd").join(format!("{name}.sock"))
    }
}

/// An attach request with NBD.
pub fn request(image: &str) -> AttachRequest {
    serde_json::from_value(serde_json::json!({ "image": image, "nbd": true })).unwrap()
}

/// A raw image's specification.
pub fn raw(path: &Path) -> String {
    format!("raw:{}", path.display())
}

/// A deadline that will pass.
pub fn soon(ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(ms)
}

/// A deadline that passes for what hangs only: commands flush the state, which takes long on a busy disk.
pub fn patient() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Waits until something is true; a test that waits for ever fails with these words.
pub async fn until(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = patient();
    while !check() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A disk without clients that was taken off a shard: a real one, since nobody else can make it.
pub fn parked_disk() -> Box<shard::park::ParkedDisk> {
    use shard::api::{Backend, ErrorPolicy};
    let (events, inbox) = shard::executor::event_channel().unwrap();
    let options = shard::executor::ShardOptions {
        index: 0,
        cpu: None,
        ring: shard::executor::RingFlavour::Deferred,
        buffer_budget_bytes: 1 << 20,
        table_budget_bytes: 1 << 20,
        fault_commands: false,
    };
    let handle = shard::executor::start(options, events).unwrap();
    let disk = DiskId(1);
    let config = DiskConfig {
        id: disk,
        name: "d".into(),
        backend: Backend::Null,
        size_bytes: 1 << 20,
        read_only: false,
        on_error: ErrorPolicy::Report,
        on_enospc: ErrorPolicy::Report,
        limits: shard::limits::Limits::default(),
        groups: Vec::new(),
        counters: Arc::default(),
    };
    for (tag, command) in
        [Command::AddDisk(Box::new(config)), Command::Park { disk }, Command::Stop].into_iter().enumerate()
    {
        handle.send(Envelope { tag: tag as u64, command });
    }
    let parked = inbox.rx.iter().find_map(|(_, event)| match event {
        Event::Reply { result: Ok(Reply::Parked(parked)), .. } => Some(parked),
        _ => None,
    });
    handle.join();
    parked.unwrap()
}
