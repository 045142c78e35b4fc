//! Goal: a disk on a qcow2, qcow or VHD image, alone or over others, is what a raw disk is to its clients, and its files are what other
//! programs expect of that format; images below are shared and locked as those programs expect; a damaged image is refused with
//! the reason; a paused disk goes on with the image that a script has made meanwhile.
//! Method: images made by qemu-img where it can make them, a real daemon, fio, nbdcopy and libnbd as clients with their own
//! verification, moves under load, kill -9 of a daemon whose clients never flush; then `qemu-img check` and `qemu-img compare`
//! with the bytes that a model or the clients expect, and the same bytes again after another attach.

mod live_rig;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use live_rig::load::Load;
use live_rig::model::Model;
use live_rig::nbd_client::Client;
use live_rig::{BLKTAPD, PATIENCE, Random, Rig, Running, fio_verified, nbdsh, raw, run, wait_until};
use serde_json::Value;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// How an image is made.
#[derive(Clone, Copy)]
enum Kind {
    /// By qemu-img, alone.
    Qcow2,
    /// With clusters of 4 KiB: many tables.
    Qcow2Small,
    /// Over qcow2 over a shorter raw file, all by qemu-img.
    Qcow2Chain,
    /// By qemu-img, alone.
    Vhd,
    /// By our own tools, over a dynamic one with data; QEMU does not know this kind.
    VhdDifferencing,
    /// Compressed by qemu-img.
    Qcow2Compressed,
    /// Version 1, compressed by our own tools.
    Qcow,
}

/// An image and what it holds.
struct Image {
    path: PathBuf,
    spec: String,
    /// How `qemu-img` calls the format, if it reads this kind.
    peer: Option<&'static str>,
    start: Vec<u8>,
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn qemu_img(arguments: &[&str]) -> String {
    run("qemu-img", arguments).expect_ok()
}

fn image_tool(arguments: &[&str]) -> String {
    run(BLKTAPD, &[&["image"], arguments].concat()).expect_ok()
}

/// Data and holes.
fn patches(seed: u64, bytes: u64) -> Vec<u8> {
    let (mut random, mut out) = (Random(seed), vec![0; bytes as usize]);
    for piece in out.chunks_mut(96 << 10) {
        if random.below(3) > 0 {
            let length = 1 + random.below(piece.len() as u64) as usize;
            piece[..length].copy_from_slice(&random.bytes(length));
        }
    }
    out
}

/// A file with these bytes and holes where they are zero.
fn file_of(rig: &Rig, name: &str, bytes: &[u8]) -> PathBuf {
    let path = rig.image(name, bytes.len() as u64);
    let file = File::options().write(true).open(&path).expect("opens");
    for (index, piece) in bytes.chunks(64 << 10).enumerate() {
        if piece.iter().any(|byte| *byte != 0) {
            file.write_all_at(piece, (index as u64) << 16).expect("writes");
        }
    }
    file.sync_all().expect("fsync");
    path
}

impl Kind {
    fn make(self, rig: &Rig, name: &str, bytes: u64) -> Image {
        let (size, zeroes) = (bytes.to_string(), vec![0; bytes as usize]);
        let at = |suffix: &str| rig.path(&format!("{name}{suffix}"));
        match self {
            Kind::Qcow2 | Kind::Qcow2Small => {
                let path = at(".qcow2");
                let options = if let Kind::Qcow2 = self { "compat=1.1" } else { "cluster_size=4k" };
                qemu_img(&["create", "-f", "qcow2", "-o", options, &text(&path), &size]);
                Image { spec: format!("qcow2:{}", path.display()), path, peer: Some("qcow2"), start: zeroes }
            }
            Kind::Qcow2Chain => {
                let mut start = patches(bytes, bytes - bytes / 4 - 512);
                let base = file_of(rig, &format!("{name}-base.raw"), &start);
                let (middle, path) = (at("-middle.qcow2"), at(".qcow2"));
                let (below, over) = (text(&base), text(&middle));
                qemu_img(&["create", "-f", "qcow2", "-b", &below, "-F", "raw", &over, &size]);
                qemu_img(&["create", "-f", "qcow2", "-b", &over, "-F", "qcow2", &text(&path)]);
                let commands =
                    ["-c", "write -P 7 100k 300k", "-c", "write -z 64k 64k", "-c", "write -P 9 3071k 512"];
                run("qemu-io", &[&["-f", "qcow2"], &commands[..], &[&over]].concat()).expect_ok();
                start.resize(bytes as usize, 0);
                start[100 << 10..400 << 10].fill(7);
                start[64 << 10..128 << 10].fill(0);
                start[3071 << 10..][..512].fill(9);
                Image { spec: format!("qcow2:{}", path.display()), path, peer: Some("qcow2"), start }
            }
            Kind::Vhd => {
                let path = at(".vhd");
                let options = "subformat=dynamic,force_size=on";
                qemu_img(&["create", "-f", "vpc", "-o", options, &text(&path), &size]);
                Image { spec: format!("vhd:{}", path.display()), path, peer: Some("vpc"), start: zeroes }
            }
            Kind::VhdDifferencing => {
                let start = patches(bytes, bytes);
                let data = file_of(rig, &format!("{name}-data.raw"), &start);
                let (parent, path) = (format!("vhd:{}", at("-base.vhd").display()), at(".vhd"));
                let spec = format!("vhd:{}", path.display());
                image_tool(&["convert", &raw(&data), &parent]);
                image_tool(&["snapshot", &parent, &spec]);
                Image { path, spec, peer: None, start }
            }
            Kind::Qcow2Compressed | Kind::Qcow => {
                let mut start = patches(bytes, bytes);
                start.iter_mut().for_each(|byte| *byte &= 15);
                let data = file_of(rig, &format!("{name}-data.raw"), &start);
                let peer = if let Kind::Qcow = self { "qcow" } else { "qcow2" };
                let path = at(&format!(".{peer}"));
                let spec = format!("{peer}:{}", path.display());
                if let Kind::Qcow = self {
                    image_tool(&["convert", "-c", &raw(&data), &spec]);
                } else {
                    let options = "compression_type=zstd";
                    qemu_img(&[
                        "convert",
                        "-c",
                        "-f",
                        "raw",
                        "-O",
                        "qcow2",
                        "-o",
                        options,
                        &text(&data),
                        &text(&path),
                    ]);
                }
                Image { path, spec, peer: Some(peer), start }
            }
        }
    }
}

impl Image {
    /// Nobody has it open: it is sound, and holds these bytes, to QEMU if it reads this kind and to our tools.
    #[track_caller]
    fn expect(&self, rig: &Rig, bytes: &[u8]) {
        let expected = file_of(rig, "expected.raw", bytes);
        let ours = run(BLKTAPD, &["image", "check", &self.spec]);
        assert!(matches!(ours.code, Some(0 | 3)), "at most leaks: {ours:?}");
        let same = run(BLKTAPD, &["image", "compare", &self.spec, &raw(&expected)]);
        same.expect_ok();
        let Some(peer) = self.peer else { return };
        if peer == "qcow2" {
            let theirs = run("qemu-img", &["check", "-f", peer, &text(&self.path)]);
            assert!(matches!(theirs.code, Some(0 | 3)), "at most leaks: {theirs:?}");
        }
        qemu_img(&["compare", "-f", peer, "-F", "raw", &text(&self.path), &text(&expected)]);
    }
}

/// All bytes of a disk.
fn contents(rig: &Rig, disk: &str) -> Vec<u8> {
    let mut client = Client::connect(&rig.socket(disk)).expect("connects");
    let size = client.size_bytes as usize;
    client.read(0, size)
}

#[track_caller]
fn assert_same(found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len());
    let differs = found.iter().zip(expected).position(|(left, right)| left != right);
    assert_eq!(differs, None, "first different byte");
}

/// The map covers the disk in order, and what it calls zero is zero.
fn check_map(uri: &str, bytes: &[u8]) -> Value {
    let map = run("nbdinfo", &["--map", "--json", uri]).expect_ok();
    let map: Value = serde_json::from_str(&map).expect("JSON");
    let mut at = 0;
    for extent in map.as_array().expect("a list") {
        let number = |key: &str| extent[key].as_u64().expect("a number") as usize;
        assert_eq!(number("offset"), at, "{map}");
        at += number("length");
        let zero = bytes[number("offset")..at].iter().all(|byte| *byte == 0);
        assert!(zero || number("type") & 2 == 0, "said to be zero, and is not: {extent}");
    }
    assert_eq!(at, bytes.len(), "{map}");
    map
}

/// fio, copies, trims and zeroes, moves between shards; then the file, alone and attached again.
fn serves_clients(kind: Kind) {
    const SIZE: u64 = 16 * MIB;
    let mut rig = Rig::with(2, &[]);
    let image = kind.make(&rig, "disk", SIZE);
    let uri = rig.attach("disk", &image.spec, &[]);
    assert_same(&contents(&rig, "disk"), &image.start);
    check_map(&uri, &image.start);

    let shards = rig.ctl_json(&["shards"]).as_array().expect("a list").len();
    std::thread::scope(|scope| {
        const MIXED: &[&str] = &["--thread", "--bsrange=512-256k", "--bs_unaligned=1", "--size=2m"];
        let load = scope.spawn(|| fio_verified(&uri, 4, MIXED));
        let mut moves = 0;
        while !load.is_finished() {
            moves += 1;
            rig.ctl_ok(&["move", "disk", &(moves % shards).to_string()]);
            std::thread::sleep(Duration::from_millis(100));
        }
        println!("{moves} moves under fio");
    });

    // In and out by another program; what was there is overwritten, also by zeroes.
    let mut model = patches(!SIZE, SIZE);
    let source = file_of(&rig, "source.raw", &model);
    let many = ["--connections=4", "--requests=32", "--flush"];
    run("nbdcopy", &[&many[..], &[&text(&source), &uri]].concat()).expect_ok();
    let out = rig.path("out.raw");
    run("nbdcopy", &[&many[..], &[&uri, &text(&out)]].concat()).expect_ok();
    assert_same(&fs::read(&out).expect("reads"), &model);
    check_map(&uri, &model);

    // Trims may leave data; zeroes may not. Whole clusters, parts of them, and the end.
    let changes = "
h.zero(1 << 20, 1 << 20)
h.zero(700, (3 << 20) - 300)
h.zero(65536, 4 << 20, nbd.CMD_FLAG_NO_HOLE)
h.pwrite(b'x' * 5000, (5 << 20) + 77, nbd.CMD_FLAG_FUA)
h.zero((1 << 20) + 512, (15 << 20) - 512)
h.trim(2 << 20, 8 << 20)
h.trim(999, (12 << 20) - 1)
h.flush()";
    nbdsh(&uri, changes).expect_ok();
    model[1 << 20..2 << 20].fill(0);
    model[(3 << 20) - 300..][..700].fill(0);
    model[4 << 20..][..65536].fill(0);
    model[(5 << 20) + 77..][..5000].fill(b'x');
    model[(15 << 20) - 512..].fill(0);
    let now = contents(&rig, "disk");
    for trimmed in [8 << 20..10 << 20, (12 << 20) - 1..(12 << 20) + 998] {
        let as_before = |at: usize| now[at] == model[at] || now[at] == 0;
        assert_eq!(trimmed.clone().find(|at| !as_before(*at)), None, "zeroes or what was there");
        model[trimmed.clone()].copy_from_slice(&now[trimmed]);
    }
    assert_same(&now, &model);
    let map = check_map(&uri, &model);
    let zero = |at: u64| {
        let covers = |extent: &&Value| {
            let start = extent["offset"].as_u64().unwrap_or(0);
            (start..start + extent["length"].as_u64().unwrap_or(0)).contains(&at)
        };
        map.as_array().expect("a list").iter().find(covers).map(|extent| extent["type"] != 0)
    };
    if !matches!(kind, Kind::Vhd | Kind::VhdDifferencing | Kind::Qcow) {
        assert_eq!(zero(MIB + 512 * KIB), Some(true), "zeroed clusters are known to be zero: {map}");
    }

    rig.ctl_ok(&["detach", "disk"]);
    image.expect(&rig, &model);
    let uri = rig.attach("disk", &image.spec, &["--read-only"]);
    assert_same(&contents(&rig, "disk"), &model);
    run("qemu-io", &["-f", "raw", "-c", "write 0 512", &uri]).expect_failure();
    assert!(rig.terminate().success());
    image.expect(&rig, &model);
}

/// kill -9 with requests in flight and no flush ever; every acknowledged write is there, and the file is sound.
fn survives_kill(kind: Kind, seed: u64) {
    let mut rig = Rig::with(2, &[]);
    let image = kind.make(&rig, "disk", 4 * MIB);
    rig.attach("disk", &image.spec, &[]);
    let shards = rig.ctl_json(&["shards"]).as_array().expect("a list").len() as u64;
    let (mut model, mut random) = (Model::new(image.start.clone()), Random(seed));
    for round in 0..3 {
        let mut load = Load::new(&rig.socket("disk"), 2, model, random.next());
        load.never_flushes = true;
        load.run(150);
        let shard = random.below(shards).to_string();
        let moving = Running::start(&mut rig.ctl_command(&["move", "disk", &shard]));
        load.run(200);
        if round == 2 {
            moving.finish(PATIENCE).expect_ok();
            model = load.settle();
            break;
        }
        std::thread::sleep(Duration::from_micros(random.below(3000)));
        rig.kill();
        drop(moving);
        model = load.abandon();
        rig.restart();
        rig.wait_for_state("disk", "running");
        model = Load::new(&rig.socket("disk"), 1, model, 0).settle();
    }
    rig.ctl_ok(&["detach", "disk"]);
    image.expect(&rig, &model.into_bytes());
}

#[test]
fn qcow2_serves_clients() {
    serves_clients(Kind::Qcow2);
}

#[test]
fn qcow2_with_small_clusters_serves_clients() {
    serves_clients(Kind::Qcow2Small);
}

#[test]
fn qcow2_over_qcow2_over_raw_serves_clients() {
    serves_clients(Kind::Qcow2Chain);
}

#[test]
fn a_dynamic_vhd_serves_clients() {
    serves_clients(Kind::Vhd);
}

#[test]
fn a_differencing_vhd_serves_clients() {
    serves_clients(Kind::VhdDifferencing);
}

#[test]
fn compressed_qcow2_serves_clients() {
    serves_clients(Kind::Qcow2Compressed);
}

#[test]
fn qcow_serves_clients() {
    serves_clients(Kind::Qcow);
}

#[test]
fn images_survive_kill_without_a_flush() {
    let kinds = [
        Kind::Qcow2,
        Kind::Qcow2Small,
        Kind::Qcow2Chain,
        Kind::Qcow2Compressed,
        Kind::Qcow,
        Kind::Vhd,
        Kind::VhdDifferencing,
    ];
    std::thread::scope(|scope| {
        for (seed, kind) in kinds.into_iter().enumerate() {
            scope.spawn(move || survives_kill(kind, seed as u64));
        }
    });
}

/// A program that has a file open, for writing unless it says otherwise.
fn holder(rig: &Rig, path: &Path, options: &[&str]) -> Running {
    let socket = rig.path("peer.sock");
    let _ = fs::remove_file(&socket);
    let serve = ["-t", "-f", "raw", "-k", &text(&socket), &text(path)];
    let mut running = Running::start(std::process::Command::new("qemu-nbd").args(options).args(serve));
    // Its socket is there before it has opened the file.
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    wait_until("it has the file", || run("nbdinfo", &["--size", &uri]).code == Some(0) || !running.runs());
    assert!(running.runs(), "{}", running.printed());
    running
}

#[test]
fn disks_share_what_is_below_and_respect_locks() {
    let rig = Rig::with(2, &[]);
    let bytes = patches(3, 4 * MIB);
    let base = file_of(&rig, "base.raw", &bytes);
    let over = |name: &str| {
        let path = rig.path(&format!("{name}.qcow2"));
        qemu_img(&["create", "-f", "qcow2", "-b", &text(&base), "-F", "raw", &text(&path)]);
        (format!("qcow2:{}", path.display()), path)
    };
    let ((one, one_path), (two, two_path)) = (over("one"), over("two"));
    let shards = rig.ctl_json(&["shards"]).as_array().expect("a list").len();
    rig.attach("one", &one, &["--shard", "0"]);
    rig.attach("two", &two, &["--shard", &(shards - 1).to_string()]);
    let mut expected = [bytes.clone(), bytes.clone()];
    for (index, disk) in ["one", "two"].into_iter().enumerate() {
        let value = 100 + index as u8;
        Client::connect(&rig.socket(disk)).expect("connects").write(MIB + 77, &[value; 70_000]);
        expected[index][MIB as usize + 77..][..70_000].fill(value);
    }
    rig.ctl_ok(&["move", "one", &(shards - 1).to_string()]);
    assert_same(&contents(&rig, "one"), &expected[0]);
    assert_same(&contents(&rig, "two"), &expected[1]);

    // Others read what is below, and nobody writes to it; nobody else has the overlays.
    let (below, copy) = (text(&base), text(&rig.path("copy.raw")));
    qemu_img(&["convert", "-f", "raw", "-O", "raw", &below, &copy]);
    let locked = |arguments: &[&str]| {
        let said = run("qemu-io", arguments).expect_failure();
        assert!(said.contains("lock"), "{said}");
    };
    locked(&["-f", "raw", "-c", "write 0 512", &below]);
    locked(&["-f", "qcow2", "-c", "write 0 512", &text(&one_path)]);
    locked(&["-r", "-f", "qcow2", "-c", "read 0 512", &text(&two_path)]);
    for line in
        [&["image", "resize", &raw(&base), "8M"][..], &["image", "check", &one], &["image", "coalesce", &two]]
    {
        let said = run(BLKTAPD, line).expect_failure();
        assert!(said.contains("in use") || said.contains("uses it"), "{line:?}: {said}");
    }
    let said = rig.ctl(&["attach", "three", &raw(&base), "--nbd"]).expect_failure();
    assert!(said.contains("one") && said.contains("base.raw") && said.contains("--read-only"), "{said}");
    rig.attach("three", &raw(&base), &["--read-only"]);
    assert_same(&contents(&rig, "three"), &bytes);
    rig.ctl_ok(&["detach", "three"]);

    // The last one gives it back.
    rig.ctl_ok(&["detach", "one"]);
    locked(&["-f", "raw", "-c", "write 0 512", &below]);
    qemu_img(&["check", "-f", "qcow2", &text(&one_path)]);
    rig.ctl_ok(&["detach", "two"]);
    let writer = holder(&rig, &base, &[]);
    let said = rig.ctl(&["attach", "one", &one, "--nbd"]).expect_failure();
    assert!(said.contains("base.raw") && said.contains("one.qcow2"), "{said}");
    drop(writer);
    let reader = holder(&rig, &base, &["-r"]);
    rig.attach("one", &one, &[]);
    assert_same(&contents(&rig, "one"), &expected[0]);
    let said = rig.ctl(&["attach", "base", &raw(&base), "--nbd"]).expect_failure();
    assert!(said.contains("base.raw"), "{said}");
    drop(reader);
    assert_same(&fs::read(&base).expect("reads"), &bytes);
}

/// Goal: the disk of a snapshot inside an image is what the disk was then, its size included. Method: an image that has grown since.
#[test]
fn a_snapshot_inside_has_the_size_of_its_time() {
    let rig = Rig::with(1, &[]);
    let start = patches(6, 4 * MIB);
    let (data, path) = (file_of(&rig, "data.raw", &start), rig.path("disk.qcow2"));
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &text(&data), &text(&path)]);
    qemu_img(&["snapshot", "-c", "then", &text(&path)]);
    qemu_img(&["snapshot", "-c", "1", &text(&path)]);
    qemu_img(&["resize", "-f", "qcow2", &text(&path), "9M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 9M", &text(&path)]).expect_ok();
    let spec = format!("qcow2:{}", path.display());
    for wanted in ["then", "1", "2"] {
        rig.attach("disk", &format!("{spec}?snapshot={wanted}"), &["--read-only"]);
        assert_eq!(rig.ctl_json(&["show", "disk"])["size_bytes"], 4 * MIB);
        assert_same(&contents(&rig, "disk"), &start);
        rig.ctl_ok(&["detach", "disk"]);
    }
    let none = format!("{spec}?snapshot=none");
    let said = rig.ctl(&["attach", "disk", "--nbd", "--read-only", &none]).expect_failure();
    assert!(said.contains("\"none\"") && said.contains("then"), "{said}");
    rig.attach("disk", &spec, &[]);
    assert_same(&contents(&rig, "disk"), &[5; 9 * MIB as usize]);
}

/// Goal: of several names that an image has for its parent, the one that leads to what it was made over is taken. Method: a child that
/// was moved to where another image has its parent's name.
#[test]
fn a_name_that_leads_to_another_image_is_not_the_parent() {
    let rig = Rig::with(1, &[]);
    let start = patches(7, 4 * MIB);
    let data = file_of(&rig, "data.raw", &start);
    fs::create_dir(rig.path("first")).expect("mkdir");
    let (parent, child) = (rig.path("first/parent.vhd"), rig.path("first/child.vhd"));
    let (parent, child) = (format!("vhd:{}", parent.display()), format!("vhd:{}", child.display()));
    image_tool(&["convert", &raw(&data), &parent]);
    image_tool(&["snapshot", &parent, &child]);
    fs::rename(rig.path("first/child.vhd"), rig.path("child.vhd")).expect("renames");
    image_tool(&["create", &format!("vhd:{}", rig.path("parent.vhd").display()), "4M"]);
    let child = format!("vhd:{}", rig.path("child.vhd").display());
    rig.attach("disk", &child, &[]);
    assert_same(&contents(&rig, "disk"), &start);
    rig.ctl_ok(&["detach", "disk"]);
    image_tool(&["compare", &child, &raw(&data)]);
    // What was looked at and not taken is free.
    run("qemu-io", &["-f", "vpc", "-c", "write 0 512", &text(&rig.path("parent.vhd"))]).expect_ok();
}

/// Goal: an overlay of a live snapshot finds its parent when both are moved together, where the format can say it. Method: moved files.
#[test]
fn overlays_of_live_snapshots_can_be_moved_with_their_parents() {
    let rig = Rig::with(1, &[]);
    let start = patches(8, 4 * MIB);
    // Not beside each other: a VHD has the last part of its parent's path anyway.
    fs::create_dir(rig.path("below")).expect("mkdir");
    fs::create_dir_all(rig.path("moved/below")).expect("mkdir");
    let (data, base) = (file_of(&rig, "data.raw", &start), rig.path("below/base.vhd"));
    let over = rig.path("over.vhd");
    image_tool(&["convert", &raw(&data), &format!("vhd:{}", base.display())]);
    rig.attach("disk", &format!("vhd:{}", base.display()), &[]);
    rig.ctl_ok(&["snapshot", &format!("disk=vhd:{}", over.display())]);
    Client::connect(&rig.socket("disk")).expect("connects").write(MIB, &[9; 4096]);
    rig.ctl_ok(&["detach", "disk"]);
    fs::rename(&base, rig.path("moved/below/base.vhd")).expect("renames");
    fs::rename(&over, rig.path("moved/over.vhd")).expect("renames");
    let mut expected = start;
    expected[MIB as usize..][..4096].fill(9);
    let moved = format!("vhd:{}", rig.path("moved/over.vhd").display());
    rig.attach("disk", &moved, &[]);
    assert_same(&contents(&rig, "disk"), &expected);
}

#[test]
fn a_file_in_the_place_of_the_logs_is_named() {
    let rig = Rig::with(1, &[]);
    let image = Kind::Qcow2.make(&rig, "disk", 4 * MIB);
    let logs = rig.run_dir().join("log");
    assert!(!logs.exists(), "made by the first image that needs it");
    fs::write(&logs, "").expect("writes");
    for options in [&["--nbd"][..], &["--nbd", "--read-only"]] {
        let said = rig.ctl(&[&["attach", "disk", &image.spec], options].concat()).expect_failure();
        let words = [&*text(&logs), "is a file", "directory", "move the file away"];
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    }
    fs::remove_file(&logs).expect("removes");
    rig.attach("disk", &image.spec, &[]);
    // An overlay that cannot be told from a deleted image's is not made, and the disk goes on.
    let aside = rig.run_dir().join("aside");
    fs::rename(&logs, &aside).expect("renames");
    fs::write(&logs, "").expect("writes");
    let over = rig.path("over.qcow2");
    let said = rig.ctl(&["snapshot", &format!("disk=qcow2:{}", over.display())]).expect_failure();
    assert!(said.contains("is a file") && !over.exists(), "{said}");
    fs::remove_file(&logs).expect("removes");
    fs::rename(&aside, &logs).expect("renames");
    rig.ctl_ok(&["snapshot", &format!("disk=qcow2:{}", over.display())]);
}

/// What a script does: pause, make another image of the same contents, resume on it.
#[test]
fn a_paused_disk_goes_on_with_another_image() {
    let mut rig = Rig::with(2, &[]);
    let image = Kind::Qcow2.make(&rig, "disk", 4 * MIB);
    rig.attach("disk", &image.spec, &[]);
    let mut client = Client::connect(&rig.socket("disk")).expect("connects");
    let mut expected = patches(5, 4 * MIB);
    client.write(0, &expected);
    let next = format!("qcow2:{}", rig.path("next.qcow2").display());

    rig.ctl_ok(&["pause", "disk"]);
    let waiting = client.send(live_rig::nbd_client::Op::Write, 0, 5000, 3, b"abc");
    // The old image is still locked; an overlay that nobody looks below of can be made all the same.
    let over = [
        "create",
        "-u",
        "-f",
        "qcow2",
        "-b",
        &text(&image.path),
        "-F",
        "qcow2",
        &next["qcow2:".len()..],
        "4M",
    ];
    qemu_img(&over);
    // What is wrong is refused, and the disk is still paused, with the old image.
    for (wrong, words) in [
        (raw(&rig.image("large.raw", 8 * MIB)), "8388608 bytes"),
        (format!("qcow2:{}", rig.path("none.qcow2").display()), "no such file"),
        ("ram:other?size=1M".to_owned(), "1048576 bytes"),
        (raw(&rig.image("x.raw", 4 * MIB)).replace("raw:", "vhd:"), "x.raw"),
    ] {
        let said = rig.ctl(&["resume", "disk", "--image", &wrong]).expect_failure();
        assert!(said.contains(words), "{words:?} is missing for {wrong}: {said}");
        let shown = rig.ctl_json(&["show", "disk"]);
        assert_eq!(
            (shown["state"].as_str(), shown["image"].as_str()),
            (Some("paused"), Some(&*image.spec)),
            "{said}"
        );
    }
    rig.ctl_ok(&["resume", "disk", "--image", &next]);
    let answer = client.receive().expect("an answer");
    assert_eq!((answer.cookie, answer.error), (waiting, 0));
    expected[5000..5003].copy_from_slice(b"abc");
    assert_same(&client.read(0, expected.len()), &expected);

    // A wrong one, and then on with the old one.
    rig.ctl_ok(&["pause", "disk"]);
    rig.ctl(&["resume", "disk", "--image", &raw(&rig.path("large.raw"))]).expect_failure();
    rig.ctl_ok(&["resume", "disk"]);
    client.write(9000, b"def");
    expected[9000..9003].copy_from_slice(b"def");
    // What is below is free to be read: a copy of another type.
    rig.ctl_ok(&["pause", "disk"]);
    let (third, copy) = (rig.path("third.qcow2"), format!("vhd:{}", rig.path("copy.vhd").display()));
    qemu_img(&[
        "create",
        "-u",
        "-f",
        "qcow2",
        "-b",
        &next["qcow2:".len()..],
        "-F",
        "qcow2",
        &text(&third),
        "4M",
    ]);
    rig.ctl_ok(&["resume", "disk", "--image", &format!("qcow2:{}", third.display())]);
    rig.ctl_ok(&["pause", "disk"]);
    image_tool(&["convert", &next, &copy]);
    rig.ctl_ok(&["resume", "disk", "--image", &copy]);
    assert_same(&client.read(0, expected.len()), &expected);
    client.write(70_000, b"ghi");
    expected[70_000..70_003].copy_from_slice(b"ghi");
    drop(client);
    rig.kill();
    rig.restart();
    rig.wait_for_state("disk", "running");
    assert_eq!(rig.ctl_json(&["show", "disk"])["image"], copy);
    assert_same(&contents(&rig, "disk"), &expected);
    // The old ones are free.
    qemu_img(&["check", "-f", "qcow2", &text(&image.path)]);
}
