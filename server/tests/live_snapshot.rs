//! Goal: a live snapshot of several disks freezes all of them at one instant under load, on any shard, and loses nothing that was
//! acknowledged; one that cannot be taken changes nothing; a crash at any moment leaves all disks before it or all behind it.
//! Method: writers count, each through all disks in turn, and write the next number only when the last one is acknowledged. So the
//! newest number in the frozen images tells for every other place which number it must have, on every disk: a cut that is not one
//! instant shows. The frozen images are read by qemu-img (VHD with a parent: by our tools, which QEMU cannot). Failures are compared
//! with the list of disks and of files before; crashes are kill -9 around the moment at which the snapshot is taken, with random
//! requests against a byte model. `SNAPSHOT_ROUNDS=N` takes N snapshots and N crashes.

#![allow(clippy::unwrap_used, reason = "a failed test is what they are for")]

mod live_process;
mod live_rig;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use live_rig::load::Load;
use live_rig::model::Model;
use live_rig::nbd_client::Client;
use live_rig::{BLKTAPD, PATIENCE, Random, Rig, Running, raw, run, wait_until};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// Blocks that one writer has on each disk.
const PLACES: u64 = 48;
const WRITERS: u64 = 3;
/// Snapshots over one set of disks; an image may have 64 below it.
const DEPTH: usize = 40;

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn rounds(few: usize) -> usize {
    std::env::var("SNAPSHOT_ROUNDS").ok().and_then(|number| number.parse().ok()).unwrap_or(few)
}

/// A disk with everything that was ever below it.
struct Chain {
    name: &'static str,
    /// Type of its overlays.
    format: &'static str,
    /// The newest last.
    images: Vec<(String, PathBuf)>,
}

impl Chain {
    fn new(rig: &Rig, name: &'static str, format: &'static str, overlay: &'static str) -> Chain {
        let path = rig.path(&format!("{name}-0.{format}"));
        let spec = format!("{format}:{}", path.display());
        match format {
            "raw" => drop(rig.image(&format!("{name}-0.raw"), 4 * MIB)),
            _ => drop(run(BLKTAPD, &["image", "create", &spec, "4M"]).expect_ok()),
        }
        Chain { name, format: overlay, images: vec![(format.to_owned(), path)] }
    }

    fn spec(&self) -> String {
        let (format, path) = self.images.last().expect("one");
        format!("{format}:{}", path.display())
    }

    fn next(&self, rig: &Rig) -> PathBuf {
        rig.path(&format!("{}-{}.{}", self.name, self.images.len(), self.format))
    }

    fn attach(&self, rig: &Rig, shard: usize) {
        rig.attach(self.name, &self.spec(), &["--shard", &shard.to_string()]);
    }

    /// What an image of the chain holds, read by a program of its own while the daemon has it.
    fn read(&self, rig: &Rig, index: usize) -> Vec<u8> {
        let out = rig.path(&format!("{}-read.raw", self.name));
        let _ = fs::remove_file(&out);
        let (format, path) = &self.images[index];
        if format == "vhd" {
            let spec = format!("vhd:{}", path.display());
            run(BLKTAPD, &["image", "convert", &spec, &raw(&out)]).expect_ok();
        } else {
            run("qemu-img", &["convert", "-f", format, "-O", "raw", &text(path), &text(&out)]).expect_ok();
        }
        fs::read(&out).expect("reads")
    }

    fn check_all(&self) {
        for (format, path) in &self.images {
            let checked = match format.as_str() {
                "raw" => continue,
                "qcow2" => run("qemu-img", &["check", "-f", "qcow2", &text(path)]),
                _ => run(BLKTAPD, &["image", "check", &format!("{format}:{}", path.display())]),
            };
            assert!(matches!(checked.code, Some(0 | 3)), "at most leaks: {checked:?}");
        }
    }
}

/// Where writer `writer` has number `count` (from 1): the disk, and the offset on it.
fn place(writer: u64, count: u64, disks: u64) -> (usize, u64) {
    let offset = (writer * PLACES + count / disks % PLACES) * BLOCK;
    ((count % disks) as usize, offset)
}

/// The block that says `count`.
fn block(writer: u64, count: u64) -> Vec<u8> {
    if count == 0 {
        return vec![0; BLOCK as usize];
    }
    let word = (writer << 56 | count).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = count.to_le_bytes().to_vec();
    bytes.extend(
        (1..BLOCK / 8).flat_map(|at| word.rotate_left(at as u32 % 64).wrapping_mul(at).to_le_bytes()),
    );
    bytes
}

/// The state of all disks is that of one instant for this writer: returns its newest number.
fn check_cut(writer: u64, disks: &[Vec<u8>]) -> u64 {
    let number = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let region = (writer * PLACES * BLOCK) as usize..((writer + 1) * PLACES * BLOCK) as usize;
    let blocks = disks.iter().flat_map(|disk| disk[region.clone()].chunks(BLOCK as usize));
    let newest = blocks.map(number).max().unwrap_or(0);
    let (count, period) = (disks.len() as u64, PLACES * disks.len() as u64);
    for back in 0..period {
        // Before the first number there was zero; places come again after a period.
        let expected = newest.saturating_sub(back);
        let (disk, offset) = place(writer, newest + period - back, count);
        let found = &disks[disk][offset as usize..(offset + BLOCK) as usize];
        assert!(
            found == block(writer, expected),
            "writer {writer}, newest {newest}: at {offset} of disk {disk} is {} and not {expected}",
            number(found)
        );
    }
    newest
}

/// What a writer does until it is told to stop.
struct Writer {
    sent: AtomicU64,
    acknowledged: AtomicU64,
    slowest_us: AtomicU64,
}

impl Writer {
    fn run(&self, writer: u64, sockets: &[PathBuf], from: u64, stop: &AtomicBool) {
        let connect = |socket: &PathBuf| Client::connect(socket).expect("connects");
        let mut clients: Vec<Client> = sockets.iter().map(connect).collect();
        let disks = clients.len() as u64;
        let mut random = Random(writer ^ from);
        let mut count = from;
        while !stop.load(Ordering::Relaxed) {
            count += 1;
            let (disk, offset) = place(writer, count, disks);
            self.sent.store(count, Ordering::SeqCst);
            let start = Instant::now();
            clients[disk].write(offset, &block(writer, count));
            self.slowest_us.fetch_max(start.elapsed().as_micros() as u64, Ordering::Relaxed);
            self.acknowledged.store(count, Ordering::SeqCst);
            if random.below(4) == 0 {
                // Something older, wherever it lies by now.
                let older = count - random.below(count.min(PLACES * disks));
                let (disk, offset) = place(writer, older, disks);
                assert!(clients[disk].read(offset, BLOCK as usize) == block(writer, older), "number {older}");
            }
            if random.below(64) == 0 {
                clients[disk].flush();
            }
        }
    }
}

/// Takes `snapshots` snapshots of three disks under load.
fn under_load(snapshots: usize) -> Duration {
    let rig = Rig::with(2, &[]);
    let mut chains = [
        Chain::new(&rig, "a", "raw", "qcow2"),
        Chain::new(&rig, "b", "qcow2", "qcow2"),
        Chain::new(&rig, "c", "vhd", "vhd"),
    ];
    let shards = rig.ctl_json(&["shards"]).as_array().expect("a list").len();
    for (index, chain) in chains.iter().enumerate() {
        chain.attach(&rig, index % shards);
    }
    let sockets: Vec<PathBuf> = chains.iter().map(|chain| rig.socket(chain.name)).collect();
    let new = |_| Writer { sent: 0.into(), acknowledged: 0.into(), slowest_us: 0.into() };
    let (stop, writers) = (AtomicBool::new(false), (0..WRITERS).map(new).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        let stopped = StopOnDrop(&stop);
        for (number, writer) in writers.iter().enumerate() {
            let (sockets, stop) = (&sockets, &stop);
            scope.spawn(move || writer.run(number as u64, sockets, 0, stop));
        }
        for round in 0..snapshots {
            let before: Vec<u64> = writers.iter().map(|w| w.acknowledged.load(Ordering::SeqCst)).collect();
            let more =
                |(writer, before): (&Writer, &u64)| writer.acknowledged.load(Ordering::SeqCst) > before + 20;
            wait_until("all writers go on", || writers.iter().zip(&before).all(more));
            snapshot(&rig, &mut chains, &writers);
            if round % 3 == 2 {
                rig.ctl_ok(&["move", "b", &(round % shards).to_string()]);
            }
        }
        drop(stopped);
    });
    let slowest = writers.iter().map(|w| w.slowest_us.load(Ordering::Relaxed)).max().unwrap_or(0);
    let ends: Vec<u64> = writers.iter().map(|w| w.acknowledged.load(Ordering::SeqCst)).collect();
    let served: Vec<Vec<u8>> = chains
        .iter()
        .map(|chain| Client::connect(&rig.socket(chain.name)).expect("connects").read(0, 4 * MIB as usize))
        .collect();
    for (writer, end) in ends.iter().enumerate() {
        assert_eq!(check_cut(writer as u64, &served), *end, "writer {writer}");
    }
    for (chain, served) in chains.iter().zip(&served) {
        rig.ctl_ok(&["detach", chain.name]);
        chain.check_all();
        assert!(chain.read(&rig, chain.images.len() - 1) == *served, "{}: the files hold it", chain.name);
        chain.attach(&rig, 0);
        let mut again = Client::connect(&rig.socket(chain.name)).expect("connects");
        assert!(again.read(0, 4 * MIB as usize) == *served, "{}: attached again", chain.name);
    }
    Duration::from_micros(slowest)
}

/// Ends the writers also when a check fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One snapshot of all disks, and what it froze.
fn snapshot(rig: &Rig, chains: &mut [Chain], writers: &[Writer]) {
    let arguments: Vec<String> = chains
        .iter()
        .map(|chain| format!("{}={}:{}", chain.name, chain.format, chain.next(rig).display()))
        .collect();
    let before: Vec<u64> = writers.iter().map(|w| w.acknowledged.load(Ordering::SeqCst)).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    rig.ctl_ok(&[&["snapshot"], &words[..]].concat());
    let after: Vec<u64> = writers.iter().map(|w| w.sent.load(Ordering::SeqCst)).collect();
    for chain in chains.iter_mut() {
        let next = chain.next(rig);
        chain.images.push((chain.format.to_owned(), next));
    }
    let frozen: Vec<Vec<u8>> = chains.iter().map(|chain| chain.read(rig, chain.images.len() - 2)).collect();
    for (writer, (before, after)) in before.into_iter().zip(after).enumerate() {
        let newest = check_cut(writer as u64, &frozen);
        assert!((before..=after).contains(&newest), "writer {writer}: {before} ≤ {newest} ≤ {after}");
    }
}

#[test]
fn snapshots_under_load_are_one_instant() {
    let (mut left, mut slowest) = (rounds(5), Duration::ZERO);
    while left > 0 {
        let now = left.min(DEPTH);
        slowest = slowest.max(under_load(now));
        left -= now;
    }
    println!("slowest write, three disks in a snapshot together under load: {slowest:?}");
}

/// Names of the files beside the run directory.
fn files(rig: &Rig) -> BTreeSet<String> {
    let dir = rig.path("");
    let walk = |dir: &Path| {
        let entries = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").path());
        entries.map(|path| path.display().to_string()).collect::<Vec<_>>()
    };
    let logs = rig.run_dir().join("log");
    let logs = if logs.exists() { walk(&logs) } else { Vec::new() };
    walk(&dir).into_iter().chain(walk(&rig.path("sub"))).chain(logs).collect()
}

/// The list of disks without what changes by itself.
fn listed(rig: &Rig) -> Value {
    let mut list = rig.ctl_json(&["list"]);
    for disk in list.as_array_mut().expect("a list") {
        disk.as_object_mut()
            .expect("a disk")
            .retain(|key, _| !["age_s", "allocated_bytes"].contains(&key.as_str()));
    }
    list
}

#[test]
fn a_snapshot_that_cannot_be_taken_changes_nothing() {
    let mut rig = Rig::with(2, &[]);
    fs::create_dir(rig.path("sub")).expect("makes");
    let mut a = Chain::new(&rig, "a", "raw", "qcow2");
    let b = Chain::new(&rig, "b", "qcow2", "qcow2");
    let locked = Chain::new(&rig, "locked", "vhd", "vhd");
    a.attach(&rig, 0);
    b.attach(&rig, 0);
    rig.attach("locked", &locked.spec(), &["--read-only"]);
    rig.attach("memory", "ram:m?size=1M", &[]);
    rig.attach("nothing", "null:?size=1M", &[]);
    // A file that is shorter than its disk.
    let odd = raw(&rig.image("odd.raw", MIB + 100));
    rig.attach("odd", &odd, &[]);
    let taken = rig.image("taken.qcow2", 100);
    fs::write(&taken, b"precious").expect("writes");
    let mut clients =
        [Client::connect(&rig.socket("a")), Client::connect(&rig.socket("b"))].map(Result::unwrap);
    clients.iter_mut().for_each(|client| client.write(0, &[1; 512]));

    let at = |name: &str| rig.path(name).display().to_string();
    let (q1, q2, v1) =
        (format!("qcow2:{}", at("n1.qcow2")), format!("qcow2:{}", at("n2.qcow2")), at("n1.vhd"));
    let occupied = format!("qcow2:{}", taken.display());
    let cases: Vec<(Vec<String>, &[&str])> = vec![
        (vec!["a".into(), occupied.clone()], &["taken.qcow2", "exists"]),
        (vec![format!("a={q1}"), format!("b={occupied}")], &["disk b", "taken.qcow2", "exists"]),
        (vec!["a".into(), format!("qcow2:{}", at("missing/n.qcow2"))], &["missing", "no such file"]),
        (vec!["locked".into(), format!("vhd:{v1}")], &["locked", "read-only"]),
        (vec![format!("a={q1}"), format!("locked=vhd:{v1}")], &["locked", "read-only"]),
        (vec!["memory".into(), q1.clone()], &["memory", "ram"]),
        (vec!["nothing".into(), q1.clone()], &["nothing", "null"]),
        (vec![format!("a={q1}"), format!("a={q2}")], &["a", "twice"]),
        (vec![format!("a={q1}"), format!("b={q1}")], &["n1.qcow2", "exists"]),
        (vec![format!("a={q1}"), format!("nobody={q2}")], &["nobody"]),
        (vec!["a".into(), format!("raw:{}", at("n1.raw"))], &["raw:", "qcow2:"]),
        (vec!["a".into(), "ram:other?size=4M".into()], &["ram", "qcow2:"]),
        (vec!["b".into(), format!("vhd:{v1}")], &["disk b", "b-0.qcow2", "of type qcow2"]),
        // It could be written, and could not be attached again.
        (
            vec!["a".into(), format!("qcow2:{}", at("sub/n.qcow2"))],
            &["sub/n.qcow2", "a-0.raw", "allowed_dirs"],
        ),
        (vec![format!("b={q2}"), format!("a=qcow2:{}", at("sub/n.qcow2"))], &["disk a", "allowed_dirs"]),
    ];
    let (files_before, list_before) = (files(&rig), listed(&rig));
    let descriptors = live_process::descriptors(rig.pid());
    for (arguments, words) in cases {
        let words_given: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let said = rig.ctl(&[&["snapshot"], &words_given[..]].concat()).expect_failure();
        for word in words {
            assert!(said.contains(word), "{word:?} is missing for {arguments:?}: {said}");
        }
        assert_eq!(files(&rig), files_before, "after {arguments:?}: {said}");
        assert_eq!(listed(&rig), list_before, "after {arguments:?}: {said}");
        clients.iter_mut().for_each(|client| client.write(4096, &[2; 512]));
    }
    assert_eq!(fs::read(&taken).expect("reads"), b"precious");
    wait_until("what was opened is closed", || live_process::descriptors(rig.pid()) <= descriptors);

    // The new state cannot be kept: all is undone.
    let obstacle = rig.run_dir().join("state/attachments.json.new");
    fs::create_dir(&obstacle).expect("makes");
    let said = rig.ctl(&["snapshot", &format!("a={q1}"), &format!("b={q2}")]).expect_failure();
    assert!(said.contains("attachments.json") && said.contains("no snapshot was taken"), "{said}");
    fs::remove_dir(&obstacle).expect("removes");
    assert_eq!((files(&rig), listed(&rig)), (files_before, list_before), "{said}");
    clients.iter_mut().for_each(|client| client.write(8192, &[3; 512]));

    // And then it works, also for a disk that is paused and for one of an odd length; the old images are as they were.
    rig.ctl_ok(&["pause", "b"]);
    let q3 = format!("qcow2:{}", at("n3.qcow2"));
    rig.ctl_ok(&["snapshot", &format!("a={q1}"), &format!("b={q2}"), &format!("odd={q3}")]);
    assert_eq!(rig.ctl_json(&["show", "b"])["state"], "paused");
    rig.ctl_ok(&["resume", "b"]);
    clients.iter_mut().for_each(|client| client.write(0, &[4; 12_288]));
    a.images.push(("qcow2".into(), rig.path("n1.qcow2")));
    assert!(a.read(&rig, 0)[..12_288].chunks(512).step_by(8).map(|block| block[0]).eq([1, 2, 3]));
    drop(clients);
    rig.terminate();
    rig.restart();
    for disk in ["a", "b", "odd"] {
        rig.wait_for_state(disk, "running");
    }
    assert!(Client::connect(&rig.socket("b")).unwrap().read(0, 12_288) == [4; 12_288]);
    assert_eq!(Client::connect(&rig.socket("odd")).unwrap().size_bytes, MIB + 512);
}

/// kill -9 around the moment at which two disks get their overlays: both or none, and nothing acknowledged is lost.
#[test]
fn a_crash_leaves_all_disks_before_the_snapshot_or_all_behind_it() {
    let all = rounds(10);
    let mut left = all;
    while left > 0 {
        left -= crashes(left, all as u64 ^ left as u64);
    }
}

/// At most `rounds` crashes around snapshots of two disks; returns how many there were.
fn crashes(rounds: usize, seed: u64) -> usize {
    let mut rig = Rig::with(2, &[]);
    let mut chains = [Chain::new(&rig, "a", "raw", "qcow2"), Chain::new(&rig, "b", "vhd", "vhd")];
    let shards = rig.ctl_json(&["shards"]).as_array().expect("a list").len();
    for (index, chain) in chains.iter().enumerate() {
        chain.attach(&rig, index % shards);
    }
    let zeroes = || Model::new(vec![0; 4 * MIB as usize]);
    let (mut models, mut random) = (vec![zeroes(), zeroes()], Random(seed));
    // Searches for the moment: later after a crash that came before the snapshot, sooner after one behind it.
    let (mut delay_us, mut step_us, mut taken, mut cut_off) = (60_000, 30_000, 0, 0);
    let mut round = 0;
    while round < rounds && chains[0].images.len() <= DEPTH {
        round += 1;
        let mut loads: Vec<Load> = chains
            .iter()
            .zip(models)
            .map(|(chain, model)| Load::new(&rig.socket(chain.name), 2, model, random.next()))
            .collect();
        loads.iter_mut().for_each(|load| load.never_flushes = true);
        loads.iter_mut().for_each(|load| load.run(100));
        loads.iter_mut().for_each(Load::drain);
        let arguments: Vec<String> = chains
            .iter()
            .map(|chain| format!("{}={}:{}", chain.name, chain.format, chain.next(&rig).display()))
            .collect();
        let command = ["snapshot", &arguments[0], &arguments[1]];
        let snapshot = Running::start(&mut rig.ctl_command(&command));
        // Fewer than a connection sends before it waits for an answer: a pause must not stop this thread.
        let started = Instant::now();
        loads.iter_mut().for_each(|load| load.run(10));
        std::thread::sleep(Duration::from_micros(delay_us).saturating_sub(started.elapsed()));
        loads.iter_mut().for_each(|load| load.run(10));
        rig.kill();
        let acknowledged = snapshot.finish(PATIENCE).code == Some(0);
        models = loads.into_iter().map(Load::abandon).collect();
        cut_off += models.iter().map(Model::unanswered).sum::<usize>();
        rig.restart();
        let specs: Vec<String> = chains
            .iter()
            .map(|chain| {
                rig.wait_for_state(chain.name, "running");
                rig.ctl_json(&["show", chain.name])["image"].as_str().expect("its image").to_owned()
            })
            .collect();
        let new: Vec<bool> = chains
            .iter()
            .zip(&specs)
            .map(|(chain, spec)| {
                assert!(*spec == chain.spec() || spec.ends_with(&text(&chain.next(&rig))), "{spec}");
                *spec != chain.spec()
            })
            .collect();
        assert_eq!(new[0], new[1], "round {round}: {specs:?}");
        assert!(new[0] || !acknowledged, "round {round}: it was acknowledged");
        for chain in &mut chains {
            let next = chain.next(&rig);
            if new[0] {
                chain.images.push((chain.format.to_owned(), next));
            } else {
                let _ = fs::remove_file(next);
            }
        }
        taken += u32::from(new[0]);
        delay_us = if new[0] { delay_us.saturating_sub(step_us) } else { delay_us + step_us };
        step_us = (step_us * 2 / 3).max(1500) + random.below(1000);
        models = chains
            .iter()
            .zip(models)
            .map(|(chain, model)| Load::new(&rig.socket(chain.name), 1, model, 0).settle())
            .collect();
    }
    println!("{taken} of {round} snapshots were taken before the crash; {cut_off} changes were in flight");
    for (chain, model) in chains.iter().zip(models) {
        rig.ctl_ok(&["detach", chain.name]);
        chain.check_all();
        assert!(chain.read(&rig, chain.images.len() - 1) == model.into_bytes(), "{}", chain.name);
    }
    round
}
