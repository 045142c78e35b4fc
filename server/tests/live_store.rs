//! Goal: a store that fails, fills up or stops answering does to clients what the disk's policy says, to the request that
//! failed and to nobody else, and an operator can mend it.
//! Method: a real daemon on real file systems that fail: a tmpfs that is full, a loop device whose file cannot grow
//! (EIO, also at a flush), an ext4 that is frozen. They need root, mounts and loop devices; where those are missing, the
//! test says that it was skipped.

#![allow(clippy::unwrap_used, reason = "a failed test is what they are for")]

mod live_client;
mod live_rig;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use live_client::{Client, FLUSH, Load, WRITE};
use live_rig::{Rig, Running, raw, run, wait_until};

const MIB: u64 = 1 << 20;
const EIO: Option<i32> = Some(5);
const ENOSPC: Option<i32> = Some(28);

/// Undone by a command when dropped.
struct Undo(&'static str, Vec<String>);

impl Drop for Undo {
    fn drop(&mut self) {
        let arguments: Vec<&str> = self.1.iter().map(String::as_str).collect();
        let outcome = run(self.0, &arguments);
        if outcome.code != Some(0) {
            eprintln!("not undone: {outcome:?}");
        }
    }
}

/// Runs a command that this host may not allow; says so when it does not.
fn possible(test: &str, program: &str, arguments: &[&str]) -> Option<String> {
    let outcome = run(program, arguments);
    if outcome.code == Some(0) {
        return Some(outcome.stdout.trim().to_owned());
    }
    // Not by the macro, whose output is hidden when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {program} {arguments:?}: {}", outcome.stderr.trim());
    None
}

/// Mounts a tmpfs of this size.
fn tmpfs(test: &str, point: &Path, size: &str) -> Option<Undo> {
    fs::create_dir_all(point).unwrap();
    let point = point.display().to_string();
    possible(test, "mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "none", &point])?;
    Some(Undo("umount", vec!["-l".into(), point]))
}

/// A loop device on a file.
fn loop_device(test: &str, file: &Path) -> Option<(PathBuf, Undo)> {
    let node = possible(test, "losetup", &["-f", "--show", &file.display().to_string()])?;
    Some((PathBuf::from(&node), Undo("losetup", vec!["-d".into(), node])))
}

fn sparse(path: &Path, bytes: u64) {
    File::create(path).and_then(|file| file.set_len(bytes)).unwrap();
}

fn errors(rig: &Rig, disk: &str) -> u64 {
    rig.ctl_json(&["stats", disk])[0]["ops"]["write"]["errors"].as_u64().unwrap()
}

#[test]
fn a_full_store_holds_the_write_or_reports_it_as_the_policy_says() {
    let rig = Rig::start();
    let full = rig.path("full");
    let Some(_mounted) = tmpfs("a_full_store", &full, "2m") else { return };
    let ballast = full.join("ballast");
    fs::write(&ballast, vec![1; MIB as usize]).unwrap();
    for name in ["pause", "report"] {
        sparse(&full.join(name), 8 * MIB);
        // A tmpfs may not take O_DIRECT.
        rig.attach(name, &format!("{}?cache=writeback", raw(&full.join(name))), &["--on-enospc", name]);
    }
    rig.attach("neighbour", &raw(&rig.image("neighbour.img", MIB)), &[]);
    let neighbour = Load::start(rig.socket("neighbour"), "", 64, 1);
    let connect = |disk: &str| Client::connect(&rig.socket(disk), "").unwrap();

    // Reported: this write fails, and reads, and writes that need no space, go on.
    let mut client = connect("report");
    client.write(0, &[3; 4096]).unwrap();
    assert_eq!(client.write(MIB, &vec![4; MIB as usize]).unwrap_err().raw_os_error(), ENOSPC);
    assert!(client.read(0, 4096).unwrap() == [3; 4096]);
    client.write(0, &[5; 4096]).unwrap();
    client.flush().unwrap();
    assert_eq!(
        (rig.ctl_json(&["show", "report"])["state"].as_str(), errors(&rig, "report")),
        (Some("running"), 1)
    );

    // Held: no answer until there is space and somebody says so.
    let mut client = connect("pause");
    let data = vec![6; MIB as usize];
    let cookie = client.send(WRITE, 0, MIB as u32, &data).unwrap();
    rig.wait_for_state("pause", "storage-error");
    assert!(!client.speaks_within(Duration::from_millis(300)), "the write is held");
    let shown = rig.ctl_json(&["show", "pause"]);
    let reason = shown["reason"].as_str().unwrap();
    for word in ["write", "No space left", "resume", "fail"] {
        assert!(reason.contains(word), "{word:?} is missing: {reason}");
    }
    assert!(
        rig.ctl_ok(&["list"]).contains("storage-error") && rig.ctl_ok(&["events"]).contains("No space left")
    );
    // Resumed too early, it is held again; a detach is refused as long as data would be lost.
    rig.ctl_ok(&["resume", "pause"]);
    rig.wait_for_state("pause", "storage-error");
    assert!(!client.speaks_within(Duration::from_millis(100)), "the write is still held");
    let outcome = rig.ctl(&["--timeout", "1", "detach", "pause"]);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    fs::remove_file(&ballast).unwrap();
    rig.ctl_ok(&["resume", "pause"]);
    let reply = client.receive().unwrap();
    assert_eq!((reply.cookie, reply.error), (cookie, 0));
    assert!(client.read(0, MIB as u32).unwrap() == data);
    assert_eq!(rig.ctl_json(&["show", "pause"])["state"], "running");
    assert_eq!(errors(&rig, "pause"), 0);
    neighbour.wait_for(100);
    neighbour.finish();
}

#[test]
fn a_held_disk_can_be_given_up_or_detached_by_force() {
    let rig = Rig::start();
    let full = rig.path("full");
    let Some(_mounted) = tmpfs("a_held_disk", &full, "1m") else { return };
    let held = |name: &str| {
        sparse(&full.join(name), 8 * MIB);
        let spec = format!("{}?cache=writeback", raw(&full.join(name)));
        rig.attach(name, &spec, &["--on-enospc", "pause"]);
        let mut client = Client::connect(&rig.socket(name), "").unwrap();
        client.send(WRITE, 0, 2 << 20, &[1; 2 << 20]).unwrap();
        rig.wait_for_state(name, "storage-error");
        client
    };
    let mut client = held("d1");
    rig.ctl_ok(&["fail", "d1"]);
    assert_eq!(client.receive().unwrap().error, 5, "the held write fails");
    client.disconnect().unwrap();
    rig.ctl_ok(&["detach", "d1"]);
    fs::remove_file(full.join("d1")).unwrap();

    let mut client = held("d2");
    let outcome = rig.ctl(&["--timeout", "1", "detach", "d2"]);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    rig.ctl_ok(&["detach", "d2", "--force"]);
    assert!(client.receive().is_err(), "its connection is closed and its write not acknowledged");
    assert_eq!(rig.ctl_json(&["list"]), serde_json::json!([]));
    // The image is free at once.
    rig.attach("d3", &format!("{}?cache=writeback", raw(&full.join("d2"))), &[]);
}

#[test]
fn a_store_with_errors_is_reported_or_held_and_a_failed_flush_is_never_success() {
    const TEST: &str = "a_store_with_errors";
    let rig = Rig::start();
    let full = rig.path("full");
    // A loop device whose file cannot grow: it takes writes, and fails with EIO when they reach the file.
    let Some(_mounted) = tmpfs(TEST, &full, "1m") else { return };
    let back = full.join("back");
    sparse(&back, 16 * MIB);
    let Some((node, _loop)) = loop_device(TEST, &back) else { return };

    rig.attach("d1", &raw(&node), &["--on-error", "report"]);
    let mut client = Client::connect(&rig.socket("d1"), "").unwrap();
    client.write(0, &[7; 4096]).unwrap();
    let failed = client.write(MIB, &vec![8; 4 << 20]).unwrap_err().raw_os_error();
    assert!(failed == EIO || failed == ENOSPC, "{failed:?}");
    assert!(client.read(0, 4096).unwrap() == [7; 4096]);
    client.disconnect().unwrap();
    // A device whose writes failed may fail its last flush as well; then the disk goes by force.
    if rig.ctl(&["detach", "d1"]).code != Some(0) {
        rig.ctl_ok(&["detach", "d1", "--force"]);
    }

    // Through the page cache the write is taken, and the fdatasync is what fails.
    rig.attach(
        "d2",
        &format!("{}?cache=writeback", raw(&node)),
        &["--on-error", "pause", "--on-enospc", "pause"],
    );
    let mut client = Client::connect(&rig.socket("d2"), "").unwrap();
    client.write(4 * MIB, &vec![9; 4 << 20]).unwrap();
    client.send(FLUSH, 0, 0, &[]).unwrap();
    rig.wait_for_state("d2", "storage-error");
    assert!(!client.speaks_within(Duration::from_millis(300)), "a failed flush is not answered");
    let outcome = rig.ctl(&["resume", "d2"]);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    assert!(outcome.stderr.contains("--data-in-doubt") && outcome.stderr.contains("fail"), "{outcome:?}");
    // The kernel would say yes to the next fdatasync: we do not ask it.
    rig.ctl_ok(&["resume", "d2", "--data-in-doubt"]);
    assert_eq!(client.receive().unwrap().error, 0, "the operator has taken it upon himself");
    let shown = rig.ctl_json(&["show", "d2"]);
    assert_eq!((&shown["state"], &shown["data_in_doubt"]), (&"running".into(), &1.into()));
    let events = rig.ctl_ok(&["events"]);
    assert!(events.contains("acknowledged may be lost"), "{events}");
    client.disconnect().unwrap();
    if rig.ctl(&["detach", "d2"]).code != Some(0) {
        rig.ctl_ok(&["detach", "d2", "--force"]);
    }

    // With the policy to report, the flush fails, and goes on failing.
    rig.attach("d3", &format!("{}?cache=writeback", raw(&node)), &["--on-error", "report"]);
    let mut client = Client::connect(&rig.socket("d3"), "").unwrap();
    client.write(8 * MIB, &vec![10; 4 << 20]).unwrap();
    for attempt in 0..3 {
        let failed = client.flush().unwrap_err().raw_os_error();
        assert!(failed == EIO || failed == ENOSPC, "attempt {attempt}: {failed:?}");
    }
    client.read(0, 4096).unwrap();
    client.disconnect().unwrap();
    rig.ctl_ok(&["detach", "d3", "--force"]);
}

/// A frozen file system. A program beside this one thaws it when this one is killed.
struct Frozen {
    point: String,
    _watchdog: Running,
}

impl Frozen {
    fn new(test: &str, point: &Path) -> Option<Frozen> {
        let point = point.display().to_string();
        let mut thaw = Command::new("sh");
        let watchdog = Running::start(thaw.args(["-c", "sleep 150; fsfreeze -u \"$0\"", &point]));
        possible(test, "fsfreeze", &["-f", &point])?;
        Some(Frozen { point, _watchdog: watchdog })
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        run("fsfreeze", &["-u", &self.point]);
    }
}

/// Mounts an ext4 of its own. What is returned is undone from left to right.
fn ext4(test: &str, rig: &Rig) -> Option<(PathBuf, [Undo; 2])> {
    let file = rig.image("ext4", 64 * MIB);
    run("mkfs.ext4", &["-q", &file.display().to_string()]).expect_ok();
    let (node, device) = loop_device(test, &file)?;
    let point = rig.path("mnt");
    fs::create_dir(&point).unwrap();
    let (node, at) = (node.display().to_string(), point.display().to_string());
    possible(test, "mount", &["-t", "ext4", &node, &at])?;
    Some((point, [Undo("umount", vec!["-l".into(), at]), device]))
}

/// Goal: what the kernel cannot do without waiting is bounded per store, also for direct I/O on a file system that mostly
/// does not wait. Method: four disks on a frozen ext4 are sent 1,024 writes, more than the kernel has workers for. Then a neighbour
/// on another file system flushes, which takes a worker. When the store is thawed, every write is done.
#[test]
fn a_thousand_writes_to_a_store_that_never_answers_delay_no_flush_of_a_neighbour() {
    const TEST: &str = "a_thousand_writes";
    const DISKS: u64 = 4;
    const EACH: u64 = 128;
    let rig = Rig::start();
    let Some((point, _mounted)) = ext4(TEST, &rig) else { return };
    let mut clients = Vec::new();
    for disk in 0..DISKS {
        let name = format!("d{disk}");
        sparse(&point.join(&name), 4 * MIB);
        rig.attach(&name, &raw(&point.join(&name)), &[]);
        clients.extend((0..2).map(|half| (half, Client::connect(&rig.socket(&name), "").unwrap())));
    }
    rig.attach("neighbour", &raw(&rig.image("neighbour.img", MIB)), &[]);
    let mut neighbour = Client::connect(&rig.socket("neighbour"), "").unwrap();
    neighbour.write(0, &[1; 4096]).unwrap();
    neighbour.flush().unwrap();

    let Some(frozen) = Frozen::new(TEST, &point) else { return };
    for (half, client) in &mut clients {
        for number in 0..EACH {
            // Space has to be found for each, which a frozen file system does not do.
            let block = 2 * number + *half;
            client.send(WRITE, block * 4096, 4096, &[number as u8 + 1; 4096]).unwrap();
        }
    }
    for round in 2..52 {
        neighbour.write(0, &[round; 4096]).unwrap();
        neighbour.flush().unwrap();
    }
    let answered = clients.iter().any(|(_, client)| client.speaks_within(Duration::ZERO));
    assert!(!answered, "the store answers, so nothing is tested");

    drop(frozen);
    for (half, client) in &mut clients {
        for _ in 0..EACH {
            assert_eq!(client.receive().unwrap().error, 0);
        }
        client.flush().unwrap();
        for number in 0..EACH {
            let found = client.read((2 * number + *half) * 4096, 4096).unwrap();
            assert!(found == [number as u8 + 1; 4096], "write {number} is not there");
        }
    }
}

#[test]
fn a_store_that_never_answers_makes_a_zombie_and_disturbs_nobody() {
    const TEST: &str = "a_store_that_never_answers";
    let rig = Rig::start();
    let Some((point, _mounted)) = ext4(TEST, &rig) else { return };
    sparse(&point.join("d1.img"), MIB);
    rig.attach("d1", &raw(&point.join("d1.img")), &[]);
    rig.attach("neighbour", &raw(&rig.image("neighbour.img", MIB)), &[]);
    let neighbour = Load::start(rig.socket("neighbour"), "", 64, 1);
    let mut client = Client::connect(&rig.socket("d1"), "").unwrap();
    client.write(0, &[1; 4096]).unwrap();

    let Some(frozen) = Frozen::new(TEST, &point) else { return };
    // Space has to be found for it, which a frozen file system does not do.
    client.send(WRITE, 65536, 65536, &[2; 65536]).unwrap();
    assert!(!client.speaks_within(Duration::from_millis(500)), "the store answers, so nothing is tested");
    neighbour.wait_for(500);
    // What waits for the store gives up in time, and changes nothing.
    let outcome = rig.ctl(&["--timeout", "2", "pause", "d1"]);
    assert_eq!(outcome.code, Some(6), "{outcome:?}");
    assert!(outcome.stderr.contains("1 requests were not answered in time"), "{outcome:?}");
    let overlays = [rig.path("over-d1.qcow2"), rig.path("over-neighbour.qcow2")];
    let [stuck, other] = overlays.each_ref().map(|path| format!("qcow2:{}", path.display()));
    let pair = [format!("d1={stuck}"), format!("neighbour={other}")];
    // Long enough for the overlays to be made.
    let outcome = rig.ctl(&["--timeout", "6", "snapshot", &pair[0], &pair[1]]);
    assert_eq!(outcome.code, Some(6), "{outcome:?}");
    assert!(outcome.stderr.contains("1 requests were not answered in time"), "{outcome:?}");
    assert!(
        overlays.iter().all(|path| !path.exists()),
        "what was made for a snapshot that timed out is left"
    );
    neighbour.wait_for(500);
    let outcome = rig.ctl(&["--timeout", "1", "detach", "d1"]);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    assert!(outcome.stderr.contains("1 requests in flight"), "{outcome:?}");
    // By force it is gone for its client, and listed until the kernel is done with it.
    let outcome = rig.ctl(&["detach", "d1", "--force"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains("zombie"), "{outcome:?}");
    assert!(client.receive().is_err(), "its connection is closed");
    let shown = rig.ctl_json(&["show", "d1"]);
    assert_eq!(shown["state"], "zombie", "{shown}");
    let again = rig.ctl(&["attach", "d1", &raw(&point.join("d1.img")), "--nbd"]);
    assert_eq!(again.code, Some(4), "{again:?}");
    let other = rig.ctl(&["--timeout", "2", "attach", "d2", &raw(&point.join("d1.img")), "--nbd"]);
    assert!(matches!(other.code, Some(1 | 4 | 6)) && other.stderr.contains("d1"), "{other:?}");
    rig.attach("d4", &raw(&rig.image("d4.img", MIB)), &[]);
    neighbour.wait_for(500);

    drop(frozen);
    wait_until("the zombie is gone", || rig.ctl(&["show", "d1"]).code == Some(3));
    rig.attach("d1", &raw(&point.join("d1.img")), &[]);
    let mut client = Client::connect(&rig.socket("d1"), "").unwrap();
    assert!(client.read(0, 4096).unwrap() == [1; 4096]);
    client.disconnect().unwrap();
    neighbour.finish();
    rig.ctl_ok(&["detach", "d1"]);
}
