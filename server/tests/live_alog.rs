//! Goal: an acknowledged write to an image survives the death of the daemon although nobody ever asked for a flush; and an image
//! whose acknowledged writes are in its allocation log only is served to nobody who would not see them.
//! Method: seeded random requests without flushes against a byte model; kill -9 with requests in flight; a new daemon on the same
//! directories; everything that was answered is there, and what is left when the disk is detached is sound for `qemu-img check` and
//! for our own. Then logs that are live at the kill (looked at between two daemons) meet read-only attachments, other
//! types, and images that somebody changed. `BLKTAPD_MODEL_SEEDS=N` tries N seeds of each kind.

mod live_rig;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blktapd::files::FileKey;
use blktapd::images::logs::log_path;
use live_rig::load::Load;
use live_rig::model::Model;
use live_rig::nbd_client::Client;
use live_rig::{BLKTAPD, Random, Rig, Running, run, wait_until};
use shard::alog::{LiveLog, live};

const SIZE: usize = 4 << 20;
const ROUNDS: usize = 8;
/// So many more when a fast disk had answered everything, or had written it back, at each kill.
const MORE_ROUNDS: usize = 50;

/// An image to try.
struct Kind {
    spec: String,
    path: PathBuf,
    start: Vec<u8>,
}

fn image_tool(arguments: &[&str]) {
    run(BLKTAPD, &[&["image"], arguments].concat()).expect_ok();
}

/// Bytes of a layer below: data and holes.
fn below(seed: u64) -> Vec<u8> {
    let mut random = Random(!seed);
    let mut bytes = vec![0; SIZE];
    for piece in bytes.chunks_mut(128 << 10) {
        if random.below(3) > 0 {
            let data = random.bytes(piece.len());
            piece.copy_from_slice(&data);
        }
    }
    bytes
}

fn named(format: &str, path: &Path) -> String {
    format!("{format}:{}", path.display())
}

/// A new image, alone.
fn alone(rig: &Rig, format: &str, options: &[&str]) -> Kind {
    let path = rig.path(&format!("disk.{format}"));
    let spec = named(format, &path);
    let options: Vec<&str> = options.iter().flat_map(|option| ["-o", option]).collect();
    image_tool(&[&["create", &spec, &SIZE.to_string()], &options[..]].concat());
    Kind { spec, path, start: vec![0; SIZE] }
}

/// A new image over one with data.
fn over(rig: &Rig, format: &str, seed: u64, options: &[&str]) -> Kind {
    let (data, base) = (rig.path("base.raw"), rig.path(&format!("base.{format}")));
    let start = below(seed);
    fs::write(&data, &start).expect("writes");
    image_tool(&["convert", &named("raw", &data), &named(format, &base)]);
    let path = rig.path(&format!("disk.{format}"));
    let spec = named(format, &path);
    let options: Vec<&str> = options.iter().flat_map(|option| ["-o", option]).collect();
    image_tool(&[&["create", &spec, "--parent", &named(format, &base)], &options[..]].concat());
    Kind { spec, path, start }
}

/// The logs of a run directory.
fn logs(rig: &Rig) -> Vec<PathBuf> {
    let entries = fs::read_dir(rig.run_dir().join("log"));
    let paths = entries.into_iter().flatten().map(|entry| entry.expect("an entry").path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "alog")).collect()
}

fn live_log(rig: &Rig) -> Option<LiveLog> {
    logs(rig).iter().find_map(|path| live(path).expect("a log that can be read"))
}

/// The tables are sound: leaks are what a crash may leave.
fn check(kind: &Kind) {
    if kind.spec.starts_with("qcow2:") {
        let checked = run("qemu-img", &["check", "-f", "qcow2", &kind.path.display().to_string()]);
        assert!(matches!(checked.code, Some(0 | 3)), "{checked:?}");
    }
    let checked = run(BLKTAPD, &["image", "check", &kind.spec]);
    assert!(matches!(checked.code, Some(0 | 3)), "{checked:?}");
}

/// Rounds of writes, each ended by kill -9.
fn survives(kind: u64, make: impl Fn(&Rig, u64) -> Kind) {
    let wanted = std::env::var("BLKTAPD_MODEL_SEEDS").ok().and_then(|number| number.parse().ok());
    for seed in (0..wanted.unwrap_or(1)).map(|number| kind << 32 | number) {
        let mut rig = Rig::with(2, &["--fault-commands"]);
        rig.expect_panics();
        let kind = make(&rig, seed);
        let mut random = Random(seed);
        rig.attach("disk", &kind.spec, &[]);
        let mut model = Model::new(kind.start.clone());
        let (mut live, mut cut_off) = (0, 0);
        for round in 0..ROUNDS + MORE_ROUNDS {
            if round >= ROUNDS && live > 0 && cut_off > 0 {
                break;
            }
            eprintln!("seed {seed:#x}, round {round}");
            let mut load = Load::new(&rig.socket("disk"), 1 + random.below(2) as usize, model, random.next());
            load.never_flushes = true;
            load.run(50 + random.below(400) as u32);
            match round % 4 {
                // The driver dies, and its image is opened again from the log by the same process.
                1 => {
                    rig.ctl_ok(&["inject-panic", "disk"]);
                    load.run(60);
                }
                // The log goes to another shard empty.
                2 => {
                    let shard = random.below(2).to_string();
                    Running::start(&mut rig.ctl_command(&["move", "disk", &shard]))
                        .finish(live_rig::PATIENCE);
                    load.run(60);
                }
                _ => {}
            }
            std::thread::sleep(Duration::from_micros(random.below(3000)));
            rig.kill();
            model = load.abandon();
            cut_off += model.unanswered();
            live += usize::from(live_log(&rig).is_some());
            rig.restart();
            rig.wait_for_state("disk", "running");
            model = Load::new(&rig.socket("disk"), 1, model, 0).settle();
        }
        assert!(live > 0, "no log held anything at a kill");
        assert!(cut_off > 0, "nothing was in flight at a kill");
        assert!(rig.log().contains("carried out from its allocation log"), "{}", rig.log());
        rig.ctl_ok(&["detach", "disk"]);
        assert_eq!(logs(&rig), Vec::<PathBuf>::new(), "a closed image leaves no log");
        check(&kind);
    }
}

#[test]
fn qcow2_alone() {
    survives(1, |rig, _| alone(rig, "qcow2", &[]));
}

#[test]
fn qcow2_of_small_clusters() {
    survives(2, |rig, _| alone(rig, "qcow2", &["cluster_size=4K"]));
}

#[test]
fn qcow2_over_qcow2() {
    survives(3, |rig, seed| over(rig, "qcow2", seed, &[]));
}

#[test]
fn qcow2_with_subclusters_over_qcow2() {
    survives(4, |rig, seed| over(rig, "qcow2", seed, &["extended_l2=on", "cluster_size=16K"]));
}

#[test]
fn vhd_dynamic() {
    survives(5, |rig, _| alone(rig, "vhd", &["block_size=64K"]));
}

#[test]
fn vhd_differencing() {
    survives(6, |rig, seed| over(rig, "vhd", seed, &["block_size=64K"]));
}

/// A daemon that died with a live log of its disk, whose sector 0 has this byte.
fn died(rig: &mut Rig, kind: &Kind) -> (LiveLog, u8) {
    rig.attach("disk", &kind.spec, &[]);
    let mut client = Client::connect(&rig.socket("disk")).expect("connects");
    for value in 1..=50u8 {
        // A new cluster each time, and the first one over and over.
        client.write(u64::from(value) * (64 << 10), &[value; 512]);
        client.write(0, &[value; 512]);
        rig.kill();
        if let Some(live) = live_log(rig) {
            return (live, value);
        }
        rig.restart();
        rig.wait_for_state("disk", "running");
        client = Client::connect(&rig.socket("disk")).expect("connects");
    }
    panic!("no log was live at a kill");
}

#[test]
fn a_live_log_keeps_others_away() {
    let mut rig = Rig::with(1, &[]);
    let kind = alone(&rig, "qcow2", &[]);
    let overlay = rig.path("overlay.qcow2");
    image_tool(&["create", &named("qcow2", &overlay), "--parent", &kind.spec]);
    let (live, value) = died(&mut rig, &kind);
    assert_eq!(live.image, fs::canonicalize(&kind.path).unwrap().display().to_string());
    // The new daemon must not open the disk before the others have tried: its attachment is taken away.
    let attachments = rig.run_dir().join("state").join("attachments.json");
    let kept = fs::read(&attachments).expect("the attachments");
    fs::remove_file(&attachments).expect("removes");
    rig.restart();
    let raw = named("raw", &kind.path);
    let overlaid = named("qcow2", &overlay);
    for arguments in [
        &["attach", "other", "--nbd", &kind.spec, "--read-only"][..],
        &["attach", "other", "--nbd", &raw],
        &["attach", "other", "--nbd", &raw, "--read-only"],
        &["attach", "other", "--nbd", &overlaid],
    ] {
        let said = rig.ctl(arguments).expect_failure();
        assert!(said.contains("allocation log") && said.contains(".alog"), "{said}");
        assert!(live_log(&rig).is_some(), "it is kept");
    }
    assert!(rig.terminate().success());
    fs::write(&attachments, kept).expect("writes");
    rig.restart();
    rig.wait_for_state("disk", "running");
    let mut client = Client::connect(&rig.socket("disk")).expect("connects");
    assert_eq!(client.read(u64::from(value) * (64 << 10), 512), vec![value; 512]);
    drop(client);
    rig.ctl_ok(&["detach", "disk"]);
    rig.attach("other", &overlaid, &[]);
    check(&kind);
}

#[test]
fn an_image_that_somebody_changed_is_not_served() {
    let mut rig = Rig::with(1, &[]);
    let kind = alone(&rig, "qcow2", &[]);
    let (live, _) = died(&mut rig, &kind);
    // Another program makes a snapshot inside it: the header changes.
    run("qemu-img", &["snapshot", "-c", "foreign", &kind.path.display().to_string()]).expect_ok();
    let before = fs::read(&kind.path).expect("reads");
    rig.restart();
    // Failed it is from the start, until its image is open: the reason tells.
    let log = live.path.display().to_string();
    wait_until("the reason", || rig.ctl_ok(&["show", "disk"]).contains(&log));
    rig.wait_for_state("disk", "failed");
    assert!(live_log(&rig).is_some(), "the log is kept");
    assert_eq!(fs::read(&kind.path).expect("reads"), before, "nothing was written");
    // What the message says to do.
    fs::rename(&live.path, live.path.with_extension("aside")).expect("renames");
    rig.wait_for_state("disk", "running");
}

#[test]
fn a_table_that_somebody_changed_is_not_served() {
    let mut rig = Rig::with(1, &[]);
    let kind = alone(&rig, "vhd", &["block_size=64K"]);
    let (live, _) = died(&mut rig, &kind);
    // The entry of a block that the log is about, to a value that it does not know.
    let mut bytes = fs::read(&kind.path).expect("reads");
    let table = u64::from_be_bytes(bytes[512 + 16..512 + 24].try_into().unwrap()) as usize;
    bytes[table..table + 4 * 64].fill(0x11);
    fs::write(&kind.path, &bytes).expect("writes");
    rig.restart();
    wait_until("the reason", || {
        let shown = rig.ctl_ok(&["show", "disk"]);
        shown.contains("allocation log") && shown.contains("0x1111")
    });
    rig.wait_for_state("disk", "failed");
    assert!(fs::metadata(&live.path).is_ok() && live_log(&rig).is_some(), "the log is kept");
    assert_eq!(fs::read(&kind.path).expect("reads"), bytes, "nothing was written");
}

#[test]
fn pending_mappings_are_written_back_without_a_flush() {
    let rig = Rig::with(1, &[]);
    let kind = alone(&rig, "qcow2", &[]);
    rig.attach("disk", &kind.spec, &[]);
    let mut client = Client::connect(&rig.socket("disk")).expect("connects");
    for cluster in 0..20 {
        client.write(cluster * (64 << 10), &[7; 4096]);
    }
    // No request follows: only the disk's own timer can do it.
    wait_until("the log is empty", || live_log(&rig).is_none());
    assert_eq!(logs(&rig).len(), 1, "and there for the next ones");
}

#[test]
fn without_room_for_a_log_writes_survive_all_the_same() {
    let mut rig = Rig::with(1, &[]);
    let kind = alone(&rig, "qcow2", &[]);
    let stat = fs::metadata(&kind.path).expect("stat");
    let key = FileKey::Regular { device: stat.dev(), inode: stat.ino() };
    // What the log is made as cannot be made.
    let in_the_way = log_path(&rig.run_dir(), key).with_extension("new");
    fs::create_dir_all(&in_the_way).expect("makes");
    rig.attach("disk", &kind.spec, &[]);
    let said = rig.log();
    assert!(said.contains("every allocation waits for a write of metadata"), "{said}");
    let mut client = Client::connect(&rig.socket("disk")).expect("connects");
    for cluster in 0..20u8 {
        client.write(u64::from(cluster) * (64 << 10), &[cluster + 1; 4096]);
    }
    rig.kill();
    assert_eq!(live_log(&rig), None);
    rig.restart();
    rig.wait_for_state("disk", "running");
    let mut client = Client::connect(&rig.socket("disk")).expect("connects");
    for cluster in 0..20u8 {
        assert_eq!(client.read(u64::from(cluster) * (64 << 10), 4096), [cluster + 1; 4096]);
    }
}
