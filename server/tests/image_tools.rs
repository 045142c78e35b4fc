//! Goal: `blktapd image` does what its help says: right results as qemu-img sees them, exit codes, messages, JSON, nothing left behind
//! by a kill at any instant, nobody's image touched who uses it. Method: the built program in a directory of its own, with qemu-img
//! and qemu-io as peers; a stage whose peer is missing prints that it was skipped.

#![allow(clippy::unwrap_used)] // a failed test is what an unwrap in it is for

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_blktapd");

/// A directory, and commands in it.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        // A file system with O_DIRECT, holes and nameless files, as hosts have.
        Bench { dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a program in the directory; what takes three minutes hangs.
    fn run(&self, program: &str, line: &str) -> Output {
        let words = line.split(' ').filter(|word| !word.is_empty());
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", "180", program]).args(words).current_dir(self.dir.path());
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// `blktapd image`: exit code, standard output, standard error.
    fn image(&self, line: &str) -> (i32, String, String) {
        let output = self.run(PROGRAM, &format!("image {line}"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    fn ok(&self, line: &str) -> String {
        let (code, stdout, stderr) = self.image(line);
        assert_eq!(code, 0, "{line}: {stderr}");
        assert_eq!(stderr, "", "{line}");
        stdout
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(&format!("{line} --json"))).unwrap()
    }

    /// A refusal: its code, and words of the message.
    fn refuses(&self, line: &str, code: i32, words: &[&str]) {
        let (found, stdout, stderr) = self.image(line);
        assert_eq!((found, stdout.as_str()), (code, ""), "{line}: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{line}: {word:?} is not in {stderr}");
        }
    }

    /// A peer that must succeed.
    fn peer(&self, line: &str) -> String {
        let (program, rest) = line.split_once(' ').unwrap();
        let output = self.run(program, rest);
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A raw image of 24 MiB with data here and there.
    fn sample(&self, name: &str, seed: u64) {
        let mut file = fs::File::create(self.path(name)).unwrap();
        file.set_len(24 << 20).unwrap();
        let mut state = 2 * seed + 1;
        for (start, len) in
            [(0, 512), (3 << 20, 2 << 20), ((9 << 20) + 4096, 12_288), ((24 << 20) - 1024, 1024)]
        {
            let bytes: Vec<u8> = std::iter::repeat_with(|| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .take(len)
            .collect();
            file.seek(SeekFrom::Start(start)).unwrap();
            file.write_all(&bytes).unwrap();
        }
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn same(&self, one: &str, two: &str) -> bool {
        fs::read(self.path(one)).unwrap() == fs::read(self.path(two)).unwrap()
    }
}

fn has_qemu() -> bool {
    let found =
        Command::new("qemu-img").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        println!("skipped: qemu-img is not installed");
    }
    found
}

#[test]
fn convert_keeps_every_byte_and_the_holes() {
    let bench = Bench::new();
    bench.sample("a.raw", 1);
    for (target, options) in [
        ("raw:b", ""),
        ("qcow2:b", ""),
        ("qcow2:b", "-o cluster_size=512"),
        ("qcow2:b", "-o cluster_size=2M -o extended_l2=on"),
        ("qcow2:b", "-o data_file=b.data"),
        ("qcow2:b", "-c"),
        ("qcow2:b", "-c -o compression_type=zstd"),
        ("qcow2:b", "-c -o compression_type=zstd -o cluster_size=2M"),
        ("qcow:b", ""),
        ("qcow:b", "-o cluster_size=512"),
        ("qcow:b", "-c -o extended=off"),
        ("vhd:b", ""),
        ("vhd:b", "-o subformat=fixed"),
    ] {
        bench.ok(&format!("convert raw:a.raw {target} {options} --force"));
        bench.ok(&format!("convert {target} raw:back.raw --force"));
        assert!(bench.same("a.raw", "back.raw"), "{target} {options}");
        let blocks = |name: &str| fs::metadata(bench.path(name)).unwrap().blocks();
        assert!(blocks("back.raw") <= blocks("a.raw") + 64, "{target} {options}: the holes are holes again");
        assert_eq!(bench.image(&format!("compare raw:a.raw {target} --strict")).0, 0, "{target} {options}");
        assert_eq!(bench.image(&format!("check {target}")).0, 0, "{target} {options}");
        if has_qemu() && !target.starts_with("raw") {
            let format =
                target.split_once(':').map_or("", |(name, _)| if name == "vhd" { "vpc" } else { name });
            bench.peer(&format!("qemu-img compare -f raw -F {format} a.raw b"));
        }
    }
}

#[test]
fn convert_compresses() {
    let bench = Bench::new();
    let text = "All bytes of a disk image that somebody wrote, once more. ".repeat(100_000);
    fs::write(bench.path("a.raw"), &text.as_bytes()[..4 << 20]).unwrap();
    for target in ["qcow2:b", "qcow:b"] {
        bench.ok(&format!("convert raw:a.raw {target} --force"));
        let plain = fs::metadata(bench.path("b")).unwrap().len();
        bench.ok(&format!("convert -c {target} {target}.c --force"));
        let compressed = fs::metadata(bench.path("b.c")).unwrap().len();
        assert!(compressed < plain / 3, "{target}: {plain} bytes, compressed {compressed}");
        assert_eq!(bench.image(&format!("compare {target} {target}.c")).0, 0, "{target}");
        let map = bench.ok(&format!("map {target}.c"));
        assert!(map.contains("coded"), "{map}");
    }
    assert_eq!(bench.image("measure qcow2:b.c --to raw").0, 1, "b.c is a qcow image now");
    bench.ok("measure qcow:b.c --to qcow2");
    bench.ok("snapshot qcow:b.c qcow:over");
    bench.ok("resize qcow:b.c +1M");
    bench.refuses("convert -c raw:a.raw raw:x", 1, &["cannot be compressed"]);
    bench.refuses("convert -c raw:a.raw vhd:x", 1, &["cannot be compressed"]);
    bench.refuses("convert -c --in-place raw:a.raw qcow2:b", 64, &["--compress"]);
    fs::write(bench.path("x.vhdx"), [&b"vhdxfile"[..], &[0; 70_000]].concat()).unwrap();
    bench.refuses("info qcow2:x.vhdx", 1, &["vhdx", "qemu-img convert"]);
    bench.refuses("info vhdx:x.vhdx", 64, &["vhdx"]);
}

#[test]
fn images_of_qemu_are_read_alike() {
    if !has_qemu() {
        return;
    }
    let bench = Bench::new();
    bench.sample("a.raw", 2);
    for (format, name, options) in [
        ("qcow2", "qcow2", "cluster_size=4096"),
        ("qcow2", "qcow2", "compat=0.10"),
        ("qcow2", "qcow2", "preallocation=metadata"),
        ("vpc", "vhd", "force_size=on"),
        ("vpc", "vhd", "subformat=fixed,force_size=on"),
    ] {
        bench.peer(&format!("qemu-img convert -f raw -O {format} -o {options} a.raw q"));
        assert_eq!(bench.image(&format!("compare raw:a.raw {name}:q")).0, 0, "{options}");
        bench.ok(&format!("convert {name}:q raw:back.raw --force"));
        assert!(bench.same("a.raw", "back.raw"), "{options}");
    }
    // Where the bytes are, with the names that qemu-img gives them.
    bench.peer("qemu-img convert -f raw -O qcow2 a.raw q");
    let theirs: Value = serde_json::from_str(&bench.peer("qemu-img map -f qcow2 --output=json q")).unwrap();
    // Ours also shows holes inside of clusters: they are there, and zero.
    let allocated = |map: &Value| {
        let mut runs: Vec<(u64, u64, u64)> = Vec::new();
        for span in map.as_array().unwrap().iter().filter(|span| span["present"] == true) {
            let number = |key: &str| span[key].as_u64().unwrap();
            let (start, len, offset) = (number("start"), number("length"), number("offset"));
            match runs.last_mut() {
                Some((first, run, at)) if *first + *run == start && *at + *run == offset => *run += len,
                _ => runs.push((start, len, offset)),
            }
        }
        runs
    };
    assert_eq!(allocated(&bench.json("map qcow2:q")), allocated(&theirs));
    let measured = bench.json("measure --to qcow2 raw:a.raw");
    let expected: Value =
        serde_json::from_str(&bench.peer("qemu-img measure --output=json -f raw -O qcow2 a.raw")).unwrap();
    assert_eq!(measured["required"], expected["required"]);
    assert_eq!(measured["fully_allocated"], expected["fully-allocated"]);
}

#[test]
fn a_kill_at_any_instant_leaves_the_target_absent_or_whole() {
    let bench = Bench::new();
    bench.sample("a.raw", 3);
    let before = fs::read(bench.path("a.raw")).unwrap();
    let (mut absent, mut whole) = (0, 0);
    for round in 0..60 {
        let target = if round % 2 == 0 { "qcow2:b" } else { "vhd:b" };
        let mut child = Command::new(PROGRAM)
            .args(["image", "convert", "raw:a.raw", target])
            .current_dir(bench.dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(round * 2500));
        let _ = child.kill();
        child.wait().unwrap();
        match bench.names().as_slice() {
            [only] if only == "a.raw" => absent += 1,
            [_, new] if new == "b" => {
                whole += 1;
                assert_eq!(bench.image(&format!("compare raw:a.raw {target}")).0, 0, "round {round}");
                assert_eq!(bench.image(&format!("check {target}")).0, 0, "round {round}");
                fs::remove_file(bench.path("b")).unwrap();
            }
            other => panic!("round {round}: {other:?}"),
        }
        assert!(fs::read(bench.path("a.raw")).unwrap() == before, "round {round}: the source");
    }
    println!("{absent} absent, {whole} whole");
    assert!(absent > 0, "no kill came early enough to prove anything");
}

#[test]
fn coalesce_and_in_place_can_be_run_again_after_a_kill() {
    let bench = Bench::new();
    bench.sample("a.raw", 4);
    bench.sample("other.raw", 5);
    bench.ok("create qcow2:base 24M");
    for round in 0..20 {
        bench.ok("convert raw:other.raw qcow2:base --force");
        bench.ok("create qcow2:child --parent qcow2:base --force");
        bench.ok("convert raw:a.raw qcow2:child --in-place");
        let mut child = Command::new(PROGRAM)
            .args(["image", "coalesce", "qcow2:child"])
            .current_dir(bench.dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(round * 8));
        let _ = child.kill();
        child.wait().unwrap();
        assert_eq!(bench.image("compare raw:a.raw qcow2:child").0, 0, "round {round}: the disk");
        bench.ok("coalesce qcow2:child");
        assert_eq!(bench.image("compare raw:a.raw qcow2:base").0, 0, "round {round}: the parent");
    }
}

#[test]
fn exit_codes_are_findings_or_64() {
    let bench = Bench::new();
    bench.sample("a.raw", 6);
    bench.ok("convert raw:a.raw qcow2:q");
    // compare
    assert_eq!(bench.image("compare raw:a.raw qcow2:q").0, 0);
    bench.sample("b.raw", 7);
    assert_eq!(bench.image("compare raw:a.raw raw:b.raw").0, 1);
    bench.refuses("compare raw:a.raw raw:none", 2, &["none", "check the path"]);
    bench.ok("resize raw:b.raw +1M");
    assert_eq!(bench.image("compare raw:a.raw raw:b.raw --strict").0, 1);
    // check
    bench.refuses("check qcow2:none", 1, &["none"]);
    assert_eq!(bench.image("check qcow2:q").0, 0);
    let mut file = fs::File::options().write(true).open(bench.path("q")).unwrap();
    // An entry of the active L1 table that points behind the file.
    let l1 = u64::from_be_bytes(fs::read(bench.path("q")).unwrap()[40..48].try_into().unwrap());
    file.seek(SeekFrom::Start(l1)).unwrap();
    file.write_all(&(1u64 << 40 | 1 << 63).to_be_bytes()).unwrap();
    let (code, stdout, _) = bench.image("check qcow2:q --json");
    let found: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &found["clean"]), (2, &Value::Bool(false)), "{found}");
    // Usage: never a code that means a finding.
    for line in [
        "",
        "compare raw:a.raw",
        "check",
        "check raw",
        "check nosuch:a.raw",
        "check ram:x",
        "check raw:a.raw?sector=512",
        "check raw:a,b",
        "compare raw:a.raw qcow2:q --nonsense",
        "create qcow2:new",
        "create qcow2:new 1X",
        "create qcow2:new 1M -o nonsense",
        "resize qcow2:q 7",
        "rebase qcow2:q",
        "measure --to qcow2",
        "measure --to nosuch --size 1M",
        "snapshot --internal create x",
        "snapshot raw:a.raw",
        "dd raw:a.raw raw:c.raw --bs 100",
    ] {
        assert_eq!(bench.image(line).0, 64, "{line}");
    }
    assert_eq!(bench.image("--help").0, 0);
    assert_eq!(bench.names(), ["a.raw", "b.raw", "q"], "nothing was made");
}

#[test]
fn the_gate_opens_what_was_stated_and_nothing_else() {
    if !has_qemu() {
        return;
    }
    let bench = Bench::new();
    bench.sample("a.raw", 8);
    let make = |name: &str, parent: &str| {
        bench.peer(&format!("qemu-img create -q -u -f qcow2 -b {parent} -F raw {name} 24M"));
    };
    // A circle, of one and of two.
    bench.peer("qemu-img create -q -u -f qcow2 -b one -F qcow2 zero 1M");
    fs::rename(bench.path("zero"), bench.path("one")).unwrap();
    bench.refuses("convert qcow2:one raw:x", 1, &["circle", "rebase --unsafe"]);
    bench.peer("qemu-img create -q -u -f qcow2 -b two -F qcow2 three 1M");
    bench.peer("qemu-img create -q -u -f qcow2 -b three -F qcow2 two 1M");
    bench.refuses("info --chain qcow2:two", 1, &["circle"]);
    bench.ok("rebase --unsafe --parent raw:a.raw qcow2:two");
    bench.ok("info --chain qcow2:two");
    // Neither file nor directory.
    nix::unistd::mkfifo(&bench.path("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    make("f", "fifo");
    bench.refuses("map qcow2:f", 1, &["FIFO"]);
    bench.refuses("map raw:fifo", 1, &["FIFO"]);
    make("d", "/dev/null");
    bench.refuses("map qcow2:d", 1, &["character device"]);
    make("m", "none.raw");
    bench.refuses("map qcow2:m", 1, &["missing", "none.raw", "rebase --unsafe"]);
    bench.ok("info qcow2:m");
    // No type: raw is never guessed.
    make("n", "a.raw");
    let mut bytes = fs::read(bench.path("n")).unwrap();
    let at = bytes.windows(4).position(|word| word == 0xe279_2aca_u32.to_be_bytes()).unwrap();
    bytes[at..at + 4].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    fs::write(bench.path("n"), bytes).unwrap();
    bench.refuses("map qcow2:n", 1, &["never guessed", "rebase --unsafe"]);
    bench.ok("rebase --unsafe --parent raw:a.raw qcow2:n");
    assert_eq!(bench.image("compare raw:a.raw qcow2:n").0, 0);
    // Relative paths are relative to the image, wherever the command runs.
    fs::create_dir(bench.path("sub")).unwrap();
    bench.ok("snapshot raw:a.raw qcow2:sub/child");
    assert_eq!(bench.json("info qcow2:sub/child")["parent"]["paths"][0], "../a.raw");
    assert_eq!(bench.image("compare raw:a.raw qcow2:sub/child").0, 0);
    // An own parent; another type than was said.
    bench.refuses("rebase --parent qcow2:n qcow2:n", 1, &["in use"]);
    bench.refuses("info vhd:n", 1, &["write qcow2:"]);
    // Depth.
    let mut last = "raw:a.raw".to_owned();
    for depth in 2..=64 {
        let next = format!("qcow2:c{depth}");
        bench.ok(&format!("snapshot --empty {last} {next}"));
        last = next;
    }
    bench.refuses(&format!("snapshot --empty {last} qcow2:c65"), 1, &["65", "coalesce"]);
    assert_eq!(bench.image(&format!("compare raw:a.raw {last}")).0, 0);
}

#[test]
fn an_image_in_use_is_refused_and_its_user_named() {
    if !has_qemu() {
        return;
    }
    let bench = Bench::new();
    bench.sample("a.raw", 9);
    let mut user = Command::new("timeout")
        .args(["-s", "KILL", "180", "qemu-io", "-f", "raw", "a.raw"])
        .current_dir(bench.dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut started = [0];
    std::io::Read::read_exact(user.stdout.as_mut().unwrap(), &mut started).unwrap();
    for line in [
        "convert raw:a.raw qcow2:b",
        "resize raw:a.raw +1M",
        "check raw:a.raw",
        "convert raw:a.raw raw:a.raw --force",
    ] {
        bench.refuses(line, 1, &["a.raw is in use", "qemu-io", "pid"]);
    }
    bench.refuses("compare raw:a.raw raw:a.raw", 2, &["qemu-io"]);
    bench.ok("info -U raw:a.raw");
    drop(user.stdin.take());
    user.wait().unwrap();
    bench.ok("check raw:a.raw");
    assert_eq!(bench.names(), ["a.raw"]);
}

#[test]
fn overlays_are_made_merged_and_moved() {
    let bench = Bench::new();
    bench.sample("a.raw", 10);
    bench.sample("b.raw", 11);
    bench.ok("snapshot -m a.raw vhd:one");
    bench.ok("snapshot --empty vhd:one vhd:two");
    let (_, stdout, stderr) = bench.image("snapshot vhd:two vhd:three");
    assert!(stdout.contains("over raw:") && stderr.contains("nothing of its own"), "{stdout}{stderr}");
    bench.refuses("snapshot vhd:two vhd:two", 1, &["exists", "--force"]);
    bench.refuses("snapshot --empty -l 3 vhd:two vhd:four", 1, &["number 4", "--depth-limit"]);
    bench.ok("dd --bs 1M --skip 3 --seek 3 --count 2 raw:b.raw vhd:two");
    bench.ok("convert vhd:two raw:want.raw");
    // Another parent, the same disk.
    bench.ok("rebase --parent raw:a.raw vhd:two");
    assert_eq!(bench.image("compare raw:want.raw vhd:two").0, 0);
    bench.ok("rebase --parent vhd:one vhd:two");
    assert_eq!(bench.image("compare raw:want.raw vhd:two").0, 0);
    // Into the parent, which takes the place.
    bench.ok("coalesce vhd:two");
    assert_eq!(bench.image("compare raw:want.raw vhd:one").0, 0);
    assert_eq!(bench.image("compare raw:want.raw vhd:two").0, 0);
    // The parent is not as the overlay remembers it, which may be said.
    assert_eq!(bench.image("coalesce --take-place vhd:two").0, 0);
    assert!(!bench.path("one").exists());
    assert_eq!(bench.image("compare raw:want.raw vhd:two").0, 0);
    bench.refuses("coalesce --take-place vhd:two", 1, &["another type"]);
    // Into the raw parent.
    bench.ok("coalesce vhd:two");
    assert!(bench.same("a.raw", "want.raw"));
    bench.refuses("coalesce raw:a.raw", 1, &["no parent"]);
    // A parent that was replaced by something else is not believed.
    bench.ok("convert raw:a.raw vhd:base");
    bench.ok("snapshot vhd:base vhd:over");
    bench.ok("convert raw:b.raw vhd:base --force");
    bench.refuses("convert vhd:over raw:x", 1, &["another image", "vhd:"]);
}

#[test]
fn snapshots_inside_an_image() {
    let bench = Bench::new();
    bench.sample("a.raw", 12);
    bench.sample("b.raw", 13);
    bench.ok("convert raw:a.raw qcow2:q");
    bench.ok("snapshot --internal create first qcow2:q");
    bench.ok("convert raw:b.raw qcow2:q --in-place");
    let list = bench.json("snapshot --internal list qcow2:q");
    assert_eq!((&list[0]["name"], &list[0]["size"]), (&"first".into(), &(24u64 << 20).into()));
    assert_eq!(bench.image("compare raw:b.raw qcow2:q").0, 0);
    assert_eq!(bench.image("compare raw:a.raw qcow2:q?snapshot=first").0, 0);
    bench.refuses("resize qcow2:q?snapshot=first 1G", 1, &["read-only"]);
    // The active state may be smaller by now.
    bench.refuses("map qcow2:q?snapshot=first --start 25M", 64, &["25165824 bytes"]);
    bench.refuses("map qcow2:q?snapshot=none", 1, &["none", "it has: first"]);
    bench.ok("convert qcow2:q?snapshot=first raw:x");
    assert!(bench.same("a.raw", "x"));
    bench.ok("snapshot --internal apply first qcow2:q");
    assert_eq!(bench.image("compare raw:a.raw qcow2:q").0, 0);
    bench.ok("snapshot --internal delete first qcow2:q");
    assert_eq!(bench.json("snapshot --internal list qcow2:q"), Value::Array(Vec::new()));
    assert_eq!(bench.image("check qcow2:q").0, 0);
    if has_qemu() {
        bench.peer("qemu-img check -f qcow2 q");
    }
    bench.refuses("snapshot --internal apply first qcow2:q", 1, &["first"]);
    bench.refuses("snapshot --internal list raw:a.raw", 1, &["the format raw"]);
}

#[test]
fn sizes_and_parts() {
    let bench = Bench::new();
    bench.sample("a.raw", 14);
    for image in ["raw:r", "qcow2:q", "vhd:v"] {
        bench.ok(&format!("convert raw:a.raw {image}"));
        bench.ok(&format!("resize {image} +8M"));
        assert_eq!(bench.json(&format!("info {image}"))["size"], 32 << 20);
        assert_eq!(bench.image(&format!("compare raw:a.raw {image}")).0, 0, "{image}: what is new is zero");
        assert_eq!(bench.image(&format!("check {image}")).0, 0, "{image}");
        bench.refuses(&format!("resize {image} 1M"), 1, &["--shrink"]);
    }
    for image in ["raw:r", "qcow2:q"] {
        bench.ok(&format!("resize --shrink {image} 4M"));
        bench.ok(&format!("resize {image} 24M"));
        bench.ok(&format!("dd --bs 4M --count 1 raw:a.raw {image}.part"));
        assert_eq!(
            bench.image(&format!("compare {image}.part {image}")).0,
            0,
            "{image}: what was cut is gone"
        );
    }
    // A part into the middle of an image that exists.
    bench.ok("create raw:m 24M");
    bench.ok("dd --bs 1M --skip 3 --seek 10 --count 2 raw:a.raw raw:m");
    let (source, target) = (fs::read(bench.path("a.raw")).unwrap(), fs::read(bench.path("m")).unwrap());
    assert!(target[10 << 20..12 << 20] == source[3 << 20..5 << 20]);
    assert!(target[..10 << 20].iter().chain(&target[12 << 20..]).all(|byte| *byte == 0));
    bench.refuses("dd --bs 1M --seek 23 raw:a.raw raw:m", 1, &["do not fit"]);
    // A length that is no whole sector.
    fs::write(bench.path("odd"), [7; 5001]).unwrap();
    bench.ok("convert raw:odd qcow2:oddq");
    assert_eq!(bench.json("info qcow2:oddq")["size"], 5120);
    bench.ok("convert qcow2:oddq raw:even");
    let even = fs::read(bench.path("even")).unwrap();
    assert!(even[..5001] == [7; 5001] && even[5001..] == [0; 119]);
}

#[test]
fn repair_gives_back_and_says_so() {
    if !has_qemu() {
        return;
    }
    let bench = Bench::new();
    bench.sample("a.raw", 15);
    bench.ok("convert raw:a.raw qcow2:q");
    // A cluster that is counted and used by nothing: the refcount of the cluster behind the last.
    let mut bytes = fs::read(bench.path("q")).unwrap();
    let be64 = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let block = be64(&bytes, be64(&bytes, 48));
    let clusters = bytes.len().div_ceil(65536);
    bytes.resize((clusters + 1) * 65536, 0);
    bytes[block + 2 * clusters + 1] = 1;
    fs::write(bench.path("q"), bytes).unwrap();
    let (code, stdout, _) = bench.image("check qcow2:q");
    assert_eq!(code, 3, "{stdout}");
    assert!(stdout.contains("leak") && stdout.contains("nothing corrupt"), "{stdout}");
    bench.ok("repair --leaks qcow2:q");
    assert_eq!(bench.image("check qcow2:q").0, 0);
    bench.peer("qemu-img check -f qcow2 q");
    assert_eq!(bench.image("compare raw:a.raw qcow2:q").0, 0);
}

#[test]
fn every_command_has_json_and_a_page_of_the_manual() {
    let bench = Bench::new();
    bench.sample("a.raw", 16);
    for (line, keys) in [
        ("create qcow2:q 24M", "image size parent"),
        ("info qcow2:q", "image type path size file_bytes allocated_bytes parent properties writable"),
        ("check qcow2:q", "clean corruptions_total leaks_total remarks"),
        ("repair qcow2:q", "clean repaired_total"),
        ("convert raw:a.raw qcow2:q --in-place", "source target data_bytes zero_bytes"),
        ("snapshot qcow2:q qcow2:child", "image size parent"),
        ("coalesce qcow2:child", "image parent result data_bytes"),
        ("rebase --parent raw:a.raw qcow2:child", "image parent copied_bytes"),
        ("resize qcow2:child 30M", "image old_size size"),
        ("compare raw:a.raw qcow2:child", "same first_difference sizes"),
        ("measure --to vhd raw:a.raw", "required fully_allocated"),
        ("dd raw:a.raw raw:new --count 8", "data_bytes"),
    ] {
        let value = bench.json(line);
        for key in keys.split(' ') {
            assert!(value.get(key).is_some(), "{line}: no {key} in {value}");
        }
    }
    let map = bench.json("map raw:a.raw");
    let total: u64 = map.as_array().unwrap().iter().map(|span| span["length"].as_u64().unwrap()).sum();
    assert_eq!(total, 24 << 20);
    assert!(bench.run(PROGRAM, "generate man --out man").status.success());
    for command in ["create", "convert", "check", "snapshot", "measure", "dd"] {
        assert!(Path::new(&bench.path(&format!("man/blktapd-image-{command}.1"))).exists(), "{command}");
    }
}

/// A block device with sectors of 4 KiB over a file; gone when the test ends.
struct Loop(String);

impl Loop {
    fn over(path: &Path) -> Option<Loop> {
        let made = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on", "--sector-size", "4096"])
            .arg(path)
            .output();
        let made = made.ok().filter(|output| output.status.success());
        let node = made.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        node.filter(|node| Path::new(node).exists()).map(Loop)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn devices_are_written_whole_and_opened_when_they_are_allowed() {
    let bench = Bench::new();
    bench.sample("a.raw", 17);
    // What was there before must not shine through.
    fs::write(bench.path("store"), vec![0x77; 48 << 20]).unwrap();
    let Some(device) = Loop::over(&bench.path("store")) else {
        println!("skipped: no loop devices here");
        return;
    };
    let node = &device.0;
    for image in ["qcow2", "vhd", "raw"] {
        bench.ok(&format!("convert raw:a.raw {image}:{node}"));
        bench.ok(&format!("dd --bs 1M --count 24 {image}:{node} raw:back"));
        assert!(bench.same("a.raw", "back"), "{image}");
        fs::remove_file(bench.path("back")).unwrap();
        assert_eq!(bench.image(&format!("check {image}:{node}")).0, 0, "{image}");
    }
    bench.ok(&format!("snapshot raw:{node} qcow2:child"));
    bench.refuses("map qcow2:child", 1, &[node, "--allow-device"]);
    bench.ok(&format!("map qcow2:child --allow-device {node}"));
    bench.refuses(&format!("resize raw:{node} +1M"), 1, &[node]);
    fs::write(bench.path("long"), vec![1; 49 << 20]).unwrap();
    bench.refuses(&format!("convert raw:long raw:{node}"), 1, &["larger"]);
}

#[test]
fn an_image_with_writes_in_a_log_is_refused() {
    let bench = Bench::new();
    bench.sample("a.raw", 18);
    bench.ok("convert raw:a.raw qcow2:q");
    let stat = fs::metadata(bench.path("q")).unwrap();
    fs::create_dir_all(bench.path("run/log")).unwrap();
    // What cannot be read as a log is taken for one that holds something.
    fs::write(bench.path(&format!("run/log/{:x}-{}.alog", stat.dev(), stat.ino())), "x").unwrap();
    for line in ["check", "repair", "resize --shrink"] {
        let size = if line.starts_with("resize") { "1M" } else { "" };
        bench.refuses(
            &format!("{line} qcow2:q {size} --run-dir run"),
            1,
            &["acknowledged writes", "ctl attach"],
        );
    }
    bench.ok("info -U qcow2:q --run-dir run");
    bench.ok("check qcow2:q --run-dir elsewhere");
    // Nor is anything put in its place: the new image would be taken for the old one.
    let before = fs::read(bench.path("q")).unwrap();
    for line in [
        "create qcow2:q 1M --force",
        "convert raw:a.raw qcow2:q --force",
        "snapshot raw:a.raw qcow2:q --force",
    ] {
        bench.refuses(&format!("{line} --run-dir run"), 1, &["acknowledged writes", "move the log aside"]);
    }
    assert!(fs::read(bench.path("q")).unwrap() == before);
    let Some(device) = Loop::over(&bench.path("a.raw")) else {
        println!("no loop devices here: not tried on one");
        return;
    };
    let node = &device.0;
    let number = fs::metadata(node).unwrap().rdev();
    fs::write(bench.path(&format!("run/log/{number:x}.alog")), "x").unwrap();
    for line in [
        format!("create qcow2:{node} 1M"),
        format!("convert qcow2:q qcow2:{node} --allow-device {node}"),
        format!("dd qcow2:q raw:{node} --count 1"),
    ] {
        // The source is not the one with a log.
        fs::remove_file(bench.path(&format!("run/log/{:x}-{}.alog", stat.dev(), stat.ino()))).ok();
        bench.refuses(&format!("{line} --run-dir run"), 1, &["acknowledged writes", node]);
    }
}

#[test]
fn new_images_ask_for_logs_of_their_number() {
    let bench = Bench::new();
    bench.sample("a.raw", 19);
    fs::create_dir(bench.path("run")).unwrap();
    // A directory of logs that nobody can look into.
    fs::write(bench.path("run/log"), "").unwrap();
    for line in ["create qcow2:new 1M", "create qcow2:new 1M -o data_file=new.data", "create vhd:new 1M"] {
        let words = ["new", "run/log is a file", "directory", "move the file away"];
        bench.refuses(&format!("{line} --run-dir run"), 1, &words);
        bench.ok(&format!("{line} --run-dir elsewhere"));
        fs::remove_file(bench.path("new")).unwrap();
    }
    fs::remove_file(bench.path("new.data")).unwrap();
    assert_eq!(bench.names(), ["a.raw", "run"], "nothing is left");
}

#[test]
fn snapshots_inside_are_not_changed_through_a_parent() {
    let bench = Bench::new();
    bench.sample("a.raw", 20);
    bench.sample("b.raw", 21);
    bench.ok("convert raw:a.raw qcow2:base");
    bench.ok("snapshot qcow2:base qcow2:child --empty");
    bench.ok("snapshot --internal create first qcow2:child");
    bench.ok("convert raw:b.raw qcow2:child --in-place");
    let files = ["base", "child"].map(|name| fs::read(bench.path(name)).unwrap());
    for line in [
        "coalesce qcow2:child",
        "coalesce --take-place qcow2:child",
        "rebase --parent raw:b.raw qcow2:child",
        "rebase --no-parent qcow2:child",
    ] {
        bench.refuses(line, 1, &["qcow2:", "snapshots inside", "first", "--internal delete"]);
    }
    assert!(
        files == ["base", "child"].map(|name| fs::read(bench.path(name)).unwrap()),
        "nothing was written"
    );
    assert_eq!(bench.image("compare raw:a.raw qcow2:child?snapshot=first").0, 0);
    // The same parent elsewhere, as the operator says.
    fs::rename(bench.path("base"), bench.path("moved")).unwrap();
    bench.ok("rebase --unsafe --parent qcow2:moved qcow2:child");
    assert_eq!(bench.image("compare raw:a.raw qcow2:child?snapshot=first").0, 0);
    // Of the parent they are its own.
    bench.ok("snapshot --internal delete first qcow2:child");
    bench.ok("snapshot --internal create second qcow2:moved");
    bench.ok("coalesce qcow2:child");
    assert_eq!(bench.image("compare raw:b.raw qcow2:moved").0, 0);
    assert_eq!(bench.image("compare raw:a.raw qcow2:moved?snapshot=second").0, 0);
}

#[test]
fn a_snapshot_inside_an_image_is_no_parent() {
    let bench = Bench::new();
    bench.sample("a.raw", 22);
    bench.sample("b.raw", 23);
    bench.ok("convert raw:a.raw qcow2:b");
    bench.ok("snapshot --internal create s qcow2:b");
    bench.ok("convert raw:b.raw qcow2:b --in-place");
    bench.ok("snapshot raw:a.raw qcow2:c");
    let before = fs::read(bench.path("c")).unwrap();
    for line in [
        "rebase --parent qcow2:b?snapshot=s qcow2:c",
        "rebase --unsafe --parent qcow2:b?snapshot=s qcow2:c",
        "create qcow2:d --parent qcow2:b?snapshot=s",
        "snapshot qcow2:b?snapshot=s qcow2:d",
        "snapshot --empty qcow2:b?snapshot=s qcow2:d",
    ] {
        bench.refuses(line, 64, &["qcow2:", "snapshot \"s\"", "parent", "convert"]);
    }
    assert!(fs::read(bench.path("c")).unwrap() == before);
    assert_eq!(bench.names(), ["a.raw", "b", "b.raw", "c"]);
}

#[test]
fn an_empty_image_that_cuts_its_parent_off_is_kept() {
    let bench = Bench::new();
    bench.sample("a.raw", 24);
    bench.ok("snapshot -S 4M raw:a.raw qcow2:short");
    bench.ok("dd --bs 4M --count 1 raw:a.raw raw:want");
    bench.ok("resize raw:want 24M");
    bench.ok("snapshot -S 24M qcow2:short qcow2:long");
    assert_eq!(bench.image("compare --strict raw:want qcow2:long").0, 0, "zeroes behind what the parent has");
    bench.ok("snapshot qcow2:short qcow2:same");
    assert_eq!(bench.json("info qcow2:same")["size"], 4 << 20);
    // Where nothing is cut off the parent's parent will do.
    let (code, stdout, _) = bench.image("snapshot -S 2M qcow2:short qcow2:shorter");
    assert!(code == 0 && stdout.contains("over raw:"), "{stdout}");
    assert_eq!(bench.image("compare raw:want qcow2:shorter").0, 1);
    bench.ok("dd --bs 2M --count 1 raw:a.raw raw:start");
    assert_eq!(bench.image("compare --strict raw:start qcow2:shorter").0, 0);
}
