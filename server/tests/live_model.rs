//! Goal: whatever clients do at once, and whenever the daemon dies, a disk holds what was acknowledged.
//! Method: seeded random requests on several connections against a byte model that knows which bytes are possible,
//! while the disk moves from shard to shard; in between the daemon gets kill -9 or SIGTERM with requests in flight and is
//! started on the same directories, or the shard that has the disk dies and the other goes on with it. `BLKTAPD_MODEL_SEEDS=N` tries N seeds of each kind instead of a few.

mod live_rig;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use live_rig::load::Load;
use live_rig::model::{Effect, Model};
use live_rig::nbd_client::{STATE_HOLE, STATE_ZERO};
use live_rig::{PATIENCE, Random, Rig, Running, fio_verified, raw, skip};

/// How a round of requests ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// All are answered.
    Quiet,
    /// kill -9 in the middle.
    Kill,
    /// SIGTERM in the middle.
    Terminate,
    /// The shard that has the disk panics in the middle. Both are back after the next restart.
    ShardDies,
}

const ROUNDS: [End; 10] = [
    End::Quiet,
    End::Kill,
    End::ShardDies,
    End::Kill,
    End::ShardDies,
    End::Quiet,
    End::Terminate,
    End::Kill,
    End::Terminate,
    End::Kill,
];

/// A disk under random requests, over several lives of the daemon.
struct Disk {
    rig: Rig,
    name: &'static str,
    /// The image of a disk that has one.
    image: Option<PathBuf>,
    shards: u64,
    random: Random,
    seed: u64,
    /// Changes that were in flight when the daemon died.
    cut_off: usize,
}

impl Disk {
    fn new(name: &'static str, seed: u64, rig: Rig, spec: &str, image: Option<PathBuf>) -> Disk {
        rig.attach(name, spec, &[]);
        let shards = rig.ctl_json(&["shards"]).as_array().expect("a list").len() as u64;
        let mut disk = Disk { rig, name, image, shards, random: Random(seed), seed, cut_off: 0 };
        disk.rig.expect_panics();
        disk
    }

    /// Runs all rounds on a disk whose bytes are `start`.
    fn run(&mut self, start: Vec<u8>) {
        let mut model = Model::new(start);
        for (number, end) in ROUNDS.into_iter().enumerate() {
            eprintln!("{}: seed {:#x}, round {number}", self.name, self.seed);
            model = self.round(model, end);
        }
        // A fast disk may have answered everything each time: what was cut off is what this test is for.
        for _ in 0..50 {
            if self.cut_off > 0 {
                return;
            }
            model = self.round(model, End::Kill);
        }
        panic!("nothing was in flight when the daemon died");
    }

    fn round(&mut self, model: Model, end: End) -> Model {
        let connections = 1 + self.random.below(3) as usize;
        let seed = self.random.next();
        let mut load = Load::new(&self.rig.socket(self.name), connections, model, seed);
        load.run(self.random.below(100) as u32);
        let shard = self.random.below(self.shards).to_string();
        let moving = Running::start(&mut self.rig.ctl_command(&["move", self.name, &shard]));
        load.run(200 + self.random.below(200) as u32);
        if end == End::ShardDies {
            moving.finish(PATIENCE).expect_ok();
        }
        let mut model = match end {
            End::Quiet => load.settle(),
            End::Kill => {
                std::thread::sleep(Duration::from_micros(self.random.below(3000)));
                self.rig.kill();
                load.abandon()
            }
            End::Terminate => {
                load.errors_allowed = true;
                let status = self.rig.terminate();
                assert!(status.success(), "SIGTERM: {status}");
                load.abandon()
            }
            End::ShardDies if self.shards > 1 => {
                let shard = self.rig.ctl_json(&["show", self.name])["shard"].to_string();
                load.run(20);
                self.rig.ctl_ok(&["inject-panic", "--shard", &shard]);
                load.abandon()
            }
            End::ShardDies => load.settle(),
        };
        if end != End::Quiet {
            self.cut_off += model.unanswered();
            if matches!(end, End::Kill | End::Terminate) {
                self.rig.restart();
            }
            self.rig.wait_for_state(self.name, "running");
            model = Load::new(&self.rig.socket(self.name), 1, model, 0).settle();
        }
        self.compare_with_the_file(&mut model);
        model
    }

    /// What clients read is what the file holds; behind its end the disk reads as zero.
    fn compare_with_the_file(&self, model: &mut Model) {
        if let Some(image) = &self.image {
            let mut bytes = fs::read(image).expect("reads");
            assert!(bytes.len() as u64 <= model.size(), "the file has grown to {}", bytes.len());
            bytes.resize(model.size() as usize, 0);
            model.settle(bytes).unwrap_or_else(|why| panic!("the file: {why}"));
        }
    }
}

const MIB: usize = 1 << 20;

/// The seeds to try: `few`, or as many as the environment says.
fn seeds(kind: u64, few: u64) -> impl Iterator<Item = u64> {
    let wanted = std::env::var("BLKTAPD_MODEL_SEEDS").ok().and_then(|number| number.parse().ok());
    (0..wanted.unwrap_or(few)).map(move |number| kind << 32 | number)
}

/// A file of random bytes, whose length is no multiple of a sector, attached with these options.
fn on_a_file(seed: u64, options: &str) {
    on_a_file_of(Rig::with(2, &["--fault-commands"]), seed, options);
}

fn on_a_file_of(rig: Rig, seed: u64, options: &str) {
    let mut start = Random(!seed).bytes(MIB + 200);
    let image = rig.path("disk.img");
    fs::write(&image, &start).expect("writes");
    let mut disk = Disk::new("disk", seed, rig, &format!("{}{options}", raw(&image)), Some(image));
    // The served size; behind the end of the file are zeroes.
    start.resize(MIB + 512, 0);
    disk.run(start);
}

#[test]
fn a_raw_file_holds_what_was_acknowledged() {
    seeds(1, 3).for_each(|seed| on_a_file(seed, ""));
}

#[test]
fn a_file_with_cache_writeback_holds_what_was_acknowledged() {
    seeds(2, 2).for_each(|seed| on_a_file(seed, "?cache=writeback"));
}

#[test]
fn a_file_with_cache_writethrough_holds_what_was_acknowledged() {
    seeds(3, 2).for_each(|seed| on_a_file(seed, "?cache=writethrough"));
}

/// A kernel or a policy may refuse the set-up of io_uring that is best; the shard then runs on a plainer one, which completes
/// operations at other moments. fio checks what it wrote on each of them, through O_DIRECT and through the page cache at once,
/// and then come the rounds with moves, kill -9 and SIGTERM.
fn on_a_ring(kind: u64, flavour: &str) {
    for seed in seeds(kind, 1) {
        let rig = Rig::with(2, &["--ring", flavour, "--fault-commands"]);
        let rings: Vec<_> =
            rig.ctl_json(&["shards"]).as_array().expect("a list").iter().map(|s| s["ring"].clone()).collect();
        assert!(rings.iter().all(|ring| ring == flavour), "asked for {flavour}, not {rings:?}");
        let direct = rig.attach("direct", &raw(&rig.image("direct.img", 16 << 20)), &[]);
        let cached = format!("{}?cache=writeback", raw(&rig.image("cached.img", 16 << 20)));
        let cached = rig.attach("cached", &cached, &[]);
        std::thread::scope(|scope| {
            for uri in [&direct, &cached] {
                let mix = "--bssplit=512/20:4k/40:64k/20:512k/20";
                scope.spawn(move || fio_verified(uri, 2, &[mix, "--bs_unaligned=1", "--size=8m"]));
            }
        });
        on_a_file_of(rig, seed, "");
    }
}

#[test]
fn a_cooperative_ring_holds_what_was_acknowledged() {
    on_a_ring(5, "cooperative");
}

#[test]
fn a_plain_ring_holds_what_was_acknowledged() {
    on_a_ring(6, "plain");
}

/// The contents of a RAM disk are kept over a restart when its directory is on a tmpfs: one that is named, and the default.
#[test]
fn a_ram_disk_outlives_the_daemon() {
    for seed in seeds(4, 3) {
        if seed & 1 == 1 && fs::metadata("/dev/shm").is_ok() {
            let rig = Rig::with(2, &["--fault-commands"]);
            let mut disk = Disk::new("memory", seed, rig, "ram:m?size=1M", None);
            disk.run(vec![0; MIB]);
            continue;
        }
        let directory = match tempfile::tempdir_in("/dev/shm") {
            Ok(directory) => directory,
            Err(error) => return skip("a_ram_disk_outlives_the_daemon", &format!("/dev/shm: {error}")),
        };
        let directory = directory.path().to_string_lossy().into_owned();
        let rig = Rig::with(2, &["--fault-commands", "--ram-dir", &directory]);
        let mut disk = Disk::new("memory", seed, rig, "ram:m?size=1M", None);
        disk.run(vec![0; MIB]);
    }
}

/// A stop finds the disk wherever a move under way takes it: it is flushed, and the daemon says so.
#[test]
fn a_stop_in_the_middle_of_a_move_flushes_the_disk() {
    let mut rig = Rig::with(2, &[]);
    let image = rig.image("disk.img", MIB as u64);
    rig.attach("disk", &raw(&image), &[]);
    let shards = rig.ctl_json(&["shards"]).as_array().expect("a list").len();
    if shards < 2 {
        return skip("a_stop_in_the_middle_of_a_move_flushes_the_disk", "there is one CPU");
    }
    let mut model = Model::new(vec![0; MIB]);
    for round in 0..12 {
        let mut load = Load::new(&rig.socket("disk"), 2, model, round);
        load.run(100);
        let from = rig.ctl_json(&["show", "disk"])["shard"].as_u64().expect("a number");
        let _moving = Running::start(&mut rig.ctl_command(&["move", "disk", &(1 - from).to_string()]));
        load.run(40);
        std::thread::sleep(Duration::from_micros(round * 700));
        load.errors_allowed = true;
        let status = rig.terminate();
        assert!(status.success(), "round {round}: {status}");
        model = load.abandon();
        rig.restart();
        rig.wait_for_state("disk", "running");
        model = Load::new(&rig.socket("disk"), 1, model, 0).settle();
    }
}

// The oracle itself: it accepts what may be and refuses what may not, case by case.

fn write(value: u8) -> Effect {
    Effect::Bytes(vec![value; 4])
}

#[test]
fn an_answered_write_replaces_what_was_there() {
    let mut model = Model::new(vec![0; 8]);
    let first = model.sent(2..6, write(1));
    let looked = model.tick();
    assert!(model.check(0, &[0, 0, 1, 0, 1, 1, 0, 0], looked).is_ok(), "in flight: old or new");
    model.answered(first);
    let looked_later = model.tick();
    assert!(model.check(2, &[0; 4], looked).is_ok(), "a look that began before the answer");
    assert!(model.check(2, &[0; 4], looked_later).is_err(), "lost");
    assert!(model.check(2, &[1; 4], looked_later).is_ok());
    assert!(model.check(1, &[1; 4], looked_later).is_err(), "at the wrong place");
    let second = model.sent(2..6, write(2));
    model.answered(second);
    let now = model.tick();
    assert!(model.check(2, &[1; 4], now).is_err(), "the first came back");
}

#[test]
fn writes_in_flight_together_may_end_in_either_order() {
    let mut model = Model::new(vec![0; 8]);
    let first = model.sent(0..4, write(1));
    let second = model.sent(0..4, write(2));
    model.answered(second);
    model.answered(first);
    let now = model.tick();
    assert!(model.check(0, &[1, 2, 1, 2], now).is_ok());
    assert!(model.check(0, &[0, 2, 1, 2], now).is_err());
    let trim = model.sent(0..4, Effect::Trim);
    model.answered(trim);
    let now = model.tick();
    assert!(model.check(0, &[0, 2, 1, 0], now).is_ok(), "a trim may do nothing");
    let zeroes = model.sent(0..4, Effect::Zeroes);
    assert!(model.settle(vec![0, 0, 1, 0, 0, 0, 0, 0]).is_ok(), "never answered");
    assert_eq!(zeroes, 3);
    let now = model.tick();
    assert!(model.check(0, &[0, 0, 2, 0], now).is_err(), "known since");
}

#[test]
fn what_is_said_to_be_zero_may_be_zero() {
    let mut model = Model::new(vec![0, 0, 7, 7]);
    let now = model.tick();
    assert!(model.check_extents(0..4, &[(2, STATE_ZERO | STATE_HOLE), (2, 0)], now).is_ok());
    assert!(model.check_extents(0..4, &[(3, STATE_ZERO), (1, 0)], now).is_err());
    assert!(model.check_extents(0..4, &[(2, STATE_HOLE), (2, 0)], now).is_err());
    assert!(model.check_extents(0..4, &[(2, 0), (3, 0)], now).is_err(), "behind the end");
}
