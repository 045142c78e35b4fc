//! Goal: every command of `ctl` does what it says, with the exit code that scripts rely on, and a wrong one names the
//! thing, disturbs nothing and leaves nothing behind.
//! Method: a real daemon, `ctl` as a program, and what can be seen from outside: its output, the daemon's descriptors,
//! sockets in the run directory, an NBD client.

#![allow(clippy::unwrap_used, reason = "a failed test is what they are for")]

mod live_client;
mod live_process;
mod live_rig;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use live_client::{Client, READ};
use live_process::{descriptor_list, descriptors};
use live_rig::{BLKTAPD, Rig, Running, raw, run, run_command, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Runs a command that must be refused with this exit code and these words.
#[track_caller]
fn refused(rig: &Rig, arguments: &[&str], code: i32, words: &[&str]) {
    let outcome = rig.ctl(arguments);
    assert_eq!(outcome.code, Some(code), "{outcome:?}");
    for word in words {
        assert!(outcome.stderr.contains(word), "{word:?} is missing: {outcome:?}");
    }
    assert_eq!(outcome.stdout, "", "a refused command prints nothing to standard output: {outcome:?}");
}

/// Names of the disks.
fn names(rig: &Rig) -> Vec<String> {
    let list = rig.ctl_json(&["list"]);
    list.as_array().unwrap().iter().map(|disk| disk["name"].as_str().unwrap().to_owned()).collect()
}

/// Files in the directory of the disks' sockets.
fn sockets(rig: &Rig) -> usize {
    fs::read_dir(rig.run_dir().join("nbd")).unwrap().count()
}

/// Waits until the daemon has as many descriptors as before.
#[track_caller]
fn wait_for_descriptors(rig: &Rig, before: usize) {
    let deadline = std::time::Instant::now() + live_rig::PATIENCE;
    while descriptors(rig.pid()) > before {
        let found = descriptor_list(rig.pid());
        assert!(std::time::Instant::now() < deadline, "{before} descriptors before, and now {found:#?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn attach_says_where_the_disk_is_and_may_be_repeated() {
    let rig = Rig::with(2, &[]);
    let image = raw(&rig.image("d1.img", 8 * MIB));
    let attach = ["attach", "d1", &image, "--nbd", "--iops", "5000", "--group", "g1"];
    let said = rig.ctl_ok(&attach);
    let uri = said.trim();
    assert_eq!(uri, format!("nbd+unix:///d1?socket={}", rig.socket("d1").display()));
    assert_eq!(run("nbdinfo", &["--size", uri]).expect_ok().trim(), (8 * MIB).to_string());
    assert_eq!(run("nbdinfo", &["--size", &rig.uri_by_name("d1")]).expect_ok().trim(), (8 * MIB).to_string());

    assert_eq!(rig.ctl_ok(&attach), said, "the same once more");
    let same_image = image.replace("raw:", "aio:");
    rig.ctl_ok(&["attach", "d1", &same_image, "--nbd", "--iops", "5000", "--group", "g1"]);
    let other = raw(&rig.image("other.img", MIB));
    let exists = "disk d1 exists with";
    refused(&rig, &["attach", "d1", &other, "--nbd"], 4, &[exists, &other, "detach it first"]);
    refused(&rig, &["attach", "d1", &image, "--nbd", "--read-only"], 4, &[exists, "--read-only"]);
    refused(&rig, &["attach", "d1", &image, "--nbd", "--iops", "1"], 4, &[exists, "limits", "5000"]);
    let elsewhere = ["attach", "d1", &image, "--nbd", "--iops", "5000", "--group", "g1", "--shard", "1"];
    let shard = rig.ctl_json(&["show", "d1"])["shard"].as_u64().unwrap();
    match (shard, rig.ctl_json(&["shards"]).as_array().unwrap().len()) {
        (0, 1) => refused(&rig, &elsewhere, 2, &["no shard 1"]),
        (0, _) => refused(&rig, &elsewhere, 4, &[exists, "shard 0 instead of 1"]),
        _ => drop(rig.ctl_ok(&elsewhere)),
    }
    refused(&rig, &["attach", "d2", &image, "--nbd"], 4, &["d1.img", "the disk d1 writes to it"]);
    refused(&rig, &["attach", "d2", &image, "--nbd", "--read-only"], 4, &["the disk d1 writes to it"]);
    assert_eq!(names(&rig), ["d1"]);
    assert_eq!(run("nbdinfo", &["--size", uri]).expect_ok().trim(), (8 * MIB).to_string());
}

/// Disk name, image, further arguments, exit code, words of the message.
type Refusal<'a> = (&'a str, &'a str, &'a [&'a str], i32, &'a [&'a str]);

#[test]
fn a_wrong_attach_names_the_thing_and_leaves_nothing_behind() {
    let rig = Rig::start();
    rig.attach("neighbour", "null:?size=1M", &[]);
    let file = raw(&rig.image("ok.img", MIB));
    fs::create_dir(rig.path("dir")).unwrap();
    nix::unistd::mkfifo(&rig.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    rig.image("empty.img", 0);
    let at = |name: &str| raw(&rig.path(name));
    let long = "n".repeat(65);
    let before = descriptors(rig.pid());
    let cases: &[Refusal] = &[
        ("d1", &file, &[], 2, &["disk d1 has no frontend", "--nbd", "d1.sock"]),
        ("a/b", &file, &["--nbd"], 2, &["\"a/b\"", "contains '/'", "1 to 64"]),
        ("", &file, &["--nbd"], 2, &["\"\"", "1 to 64"]),
        (".hidden", &file, &["--nbd"], 2, &["\".hidden\"", "does not start with"]),
        ("..", &file, &["--nbd"], 2, &["\"..\""]),
        ("d\n1", &file, &["--nbd"], 2, &["\"d\\n1\""]),
        (&long, &file, &["--nbd"], 2, &["1 to 64"]),
        ("d1", &at("missing.img"), &["--nbd"], 1, &["missing.img", "no such file", "check the path"]),
        ("d1", &at("none/missing.img"), &["--nbd"], 1, &["none"]),
        ("d1", &at("dir"), &["--nbd"], 1, &["is a directory", "regular file or a block device"]),
        ("d1", &at("fifo"), &["--nbd"], 1, &["is a FIFO", "regular file or a block device"]),
        ("d1", "raw:/dev/null", &["--nbd"], 1, &["/dev/null", "character device"]),
        ("d1", &at("empty.img"), &["--nbd"], 1, &["empty.img"]),
        ("d1", "vhdx:/x.img", &["--nbd"], 2, &["\"vhdx\"", "not built into this version", "raw"]),
        ("d1", "floppy:/x.img", &["--nbd"], 2, &["\"floppy\"", "raw (or aio), vhd, qcow2", "ram and null"]),
        ("d1", "/x.img", &["--nbd"], 2, &["TYPE"]),
        ("d1", "raw:/a,b", &["--nbd"], 2, &["%2C"]),
        ("d1", "raw:/a%zz", &["--nbd"], 2, &["%"]),
        ("d1", "raw:/a.img?sector=513", &["--nbd"], 2, &["sector", "513", "4096"]),
        ("d1", "raw:/a.img?cash=none", &["--nbd"], 2, &["cash", "cache"]),
        ("d1", "null:", &["--nbd"], 2, &["size=1G"]),
        ("d1", "null:?size=0", &["--nbd"], 2, &["\"0\"", "multiple of 512"]),
        ("d1", "null:?size=99999999T", &["--nbd"], 2, &["99999999T"]),
        ("d1", "ram:../x?size=1M", &["--nbd"], 2, &["../x"]),
        ("d1", &file, &["--nbd", "--shard", "77"], 2, &["no shard 77", "from 0 to 0"]),
        ("d1", &file, &["--nbd", "--group", "a/b"], 2, &["group", "\"a/b\""]),
        ("d1", &file, &["--nbd", "--group", "g", "--group", "g"], 2, &["group g", "twice"]),
        ("d1", &file, &["--nbd", "--iops-burst", "5"], 2, &["burst", "--iops"]),
        ("d1", &file, &["--nbd", "--iops=-1"], 2, &["--iops"]),
        ("d1", &file, &["--nbd", "--bps", "1Q"], 2, &["1Q"]),
        ("d1", &file, &["--nbd", "--on-error", "panic"], 2, &["panic", "pause", "report"]),
        ("d1", &file, &["--nbd", "--frobnicate"], 2, &["--frobnicate"]),
    ];
    for (name, spec, options, code, words) in cases {
        refused(&rig, &[&["attach", name, spec], *options].concat(), *code, words);
    }
    assert_eq!(names(&rig), ["neighbour"]);
    assert_eq!(sockets(&rig), 1);
    wait_for_descriptors(&rig, before);
    // The name and the image are as free as before.
    rig.attach("d1", &file, &[]);
}

#[test]
fn a_path_for_sockets_that_is_too_long_is_refused_with_its_length() {
    let dir = tempfile::tempdir().unwrap();
    let with_length = |bytes: usize| {
        let pad = bytes - dir.path().as_os_str().len() - 1;
        dir.path().join("r".repeat(pad)).display().to_string()
    };
    let serve = |run_dir: &str| {
        let mut command = Command::new(BLKTAPD);
        command.args(["serve", "--metrics", "none", "--run-dir", run_dir]);
        command
    };
    let too_long = with_length(120);
    let outcome = run_command(&mut serve(&too_long), live_rig::PATIENCE);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.stderr.contains("107") && outcome.stderr.contains(&too_long), "{outcome:?}");

    // Long enough for its own sockets, and not for those of disks with long names.
    let run_dir = with_length(60);
    let mut daemon = Running::start(&mut serve(&run_dir));
    let ctl = |arguments: &[&str]| {
        let socket = format!("{run_dir}/ctl.sock");
        run(BLKTAPD, &[&["ctl", "--ctl", &socket], arguments].concat())
    };
    wait_until("the daemon answers", || ctl(&["version"]).code == Some(0));
    let name = "n".repeat(64);
    let outcome = ctl(&["attach", &name, "null:?size=1M", "--nbd"]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.stderr.contains("107") && outcome.stderr.contains(&name), "{outcome:?}");
    ctl(&["attach", "short", "null:?size=1M", "--nbd"]).expect_ok();
    assert!(daemon.runs());
    kill(Pid::from_raw(daemon.pid() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(daemon.finish(live_rig::PATIENCE).code, Some(0));
}

#[test]
fn a_disk_in_use_says_by_whom_and_force_detaches_it() {
    let rig = Rig::start();
    let image = raw(&rig.image("d1.img", MIB));
    rig.attach("d1", &image, &[]);
    let before = descriptors(rig.pid());
    let mut client = Client::connect(&rig.socket("d1"), "").unwrap();
    client.write(0, &[7; 512]).unwrap();
    let pid = std::process::id().to_string();
    // The name of this program, as the kernel cuts it.
    let words = ["d1 is in use", &format!("pid {pid} (live_control"), "0 requests in flight", "--force"];
    refused(&rig, &["--timeout", "1", "detach", "d1"], 4, &words);
    assert_eq!(client.read(0, 512).unwrap(), [7; 512], "nothing has happened to its client");
    let shown = rig.ctl_json(&["show", "d1"]);
    assert!(shown["connections"][0]["peer"].as_str().unwrap().contains(&pid), "{shown}");
    // A second client may come after the refusal.
    Client::connect(&rig.socket("d1"), "").unwrap().disconnect().unwrap();

    assert_eq!(rig.ctl_ok(&["detach", "d1", "--force"]), "");
    assert!(client.read(0, 512).is_err(), "its connection is closed");
    assert_eq!(names(&rig), [""; 0]);
    assert!(!rig.socket("d1").exists());
    refused(&rig, &["detach", "d1"], 3, &["no disk \"d1\"", "ctl list"]);
    wait_for_descriptors(&rig, before - 2);
    // The image is free, and a detach waits for a client that leaves by itself.
    rig.attach("d1", &image, &[]);
    let client = Client::connect(&rig.socket("d1"), "").unwrap();
    let leaver = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        client.disconnect()
    });
    rig.ctl_ok(&["detach", "d1"]);
    leaver.join().unwrap().unwrap();
}

#[test]
fn exit_codes_are_those_of_the_contract() {
    let rig = Rig::start();
    let commands: [&[&str]; 8] = [
        &["show", "nope"],
        &["stats", "nope"],
        &["qos", "nope", "--iops", "1"],
        &["pause", "nope"],
        &["resume", "nope"],
        &["fail", "nope"],
        &["move", "nope", "0"],
        &["detach", "nope", "--force"],
    ];
    for command in commands {
        refused(&rig, command, 3, &["no disk \"nope\"", "blktapd ctl list"]);
    }
    refused(&rig, &["qos", "--group", "nope"], 3, &["no group \"nope\""]);
    refused(&rig, &["show", "a/b"], 2, &["contains '/'"]);
    for usage in [&["frobnicate"][..], &["show"], &["list", "--timeout", "601"], &["move", "d1", "x"], &[]] {
        refused(&rig, usage, 2, &["--help"]);
    }

    let ctl = |socket: &Path, arguments: &[&str]| {
        run(BLKTAPD, &[&["ctl", "--ctl", &socket.display().to_string()], arguments].concat())
    };
    let outcome = ctl(&rig.path("nobody.sock"), &["list"]);
    assert_eq!(outcome.code, Some(5), "{outcome:?}");
    assert!(
        outcome.stderr.contains("nobody.sock") && outcome.stderr.contains("blktapd serve"),
        "{outcome:?}"
    );
    drop(std::os::unix::net::UnixListener::bind(rig.path("dead.sock")).unwrap());
    assert_eq!(ctl(&rig.path("dead.sock"), &["list"]).code, Some(5));
    let mut by_environment = Command::new(BLKTAPD);
    by_environment.args(["ctl", "list"]).env("BLKTAPD_CTL", rig.run_dir().join("ctl.sock"));
    run_command(&mut by_environment, live_rig::PATIENCE).expect_ok();

    // A daemon that does not turn: the client gives up by itself.
    let daemon = Pid::from_raw(rig.pid() as i32);
    kill(daemon, Signal::SIGSTOP).unwrap();
    let outcome = rig.ctl(&["--timeout", "0", "list"]);
    kill(daemon, Signal::SIGCONT).unwrap();
    assert_eq!(outcome.code, Some(6), "{outcome:?}");
    assert!(outcome.stderr.contains("has not answered"), "{outcome:?}");
    rig.ctl_ok(&["list"]);
}

#[test]
fn every_command_prints_json_that_programs_can_read() {
    let rig = Rig::with(2, &[]);
    let image = raw(&rig.image("d1.img", MIB));
    let attached = rig.ctl_json(&["attach", "d1", &image, "--nbd", "--shard", "0"]);
    assert_eq!((&attached["name"], &attached["state"]), (&"d1".into(), &"running".into()));
    Client::connect(&rig.socket("d1"), "").unwrap().read(0, 4096).unwrap();
    assert_eq!(rig.ctl_json(&["list"])[0]["size_bytes"], MIB);
    assert_eq!(rig.ctl_json(&["show", "d1"])["image"], image.as_str());
    assert_eq!(rig.ctl_json(&["stats"])[0]["ops"]["read"]["completed"], 1);
    assert_eq!(rig.ctl_json(&["stats", "d1"])[0]["ops"]["read"]["bytes"], 4096);
    assert_eq!(rig.ctl_json(&["qos", "d1", "--iops", "900"])["limits"]["iops"], 900);
    assert_eq!(rig.ctl_json(&["qos", "--group", "g", "--bps", "1M"])["limits"]["bps"], MIB);
    assert_eq!(rig.ctl_json(&["groups"])[0]["name"], "g");
    assert_eq!(rig.ctl_json(&["pause", "d1"])["state"], "paused");
    assert_eq!(rig.ctl_json(&["resume", "d1"])["state"], "running");
    let shards = rig.ctl_json(&["shards"]);
    assert_eq!(shards[0]["disks"], 1, "{shards}");
    if shards.as_array().unwrap().len() > 1 {
        assert_eq!(rig.ctl_json(&["move", "d1", "1"])["shard"], 1);
    }
    assert_eq!(rig.ctl_json(&["fail", "d1"])["state"], "failed");
    assert_eq!(rig.ctl_json(&["version"])["daemon"]["pid"], rig.pid());
    assert!(rig.ctl_json(&["reload"])["restart"].as_array().unwrap().is_empty());
    assert_eq!(rig.ctl_json(&["detach", "d1"]), Value::Null);
    let events = rig.ctl_json(&["events"]);
    let events = events.as_array().unwrap();
    let said = |what: &str| events.iter().any(|event| event["message"].as_str().unwrap().contains(what));
    assert!(
        ["attached", "limits changed", "paused", "resumed", "given up", "detached"].into_iter().all(said)
    );
    let last = events.last().unwrap()["seq"].as_u64().unwrap();
    assert_eq!(rig.ctl_json(&["events", "--after", &last.to_string()]), Value::Array(Vec::new()));
    assert_eq!(rig.ctl_json(&["events", "--limit", "2"]).as_array().unwrap().len(), 2);
    let looks = rig.ctl_ok(&["--json", "top", "--interval", "0.1", "--count", "2"]);
    let looks: Vec<Value> =
        serde_json::Deserializer::from_str(&looks).into_iter().collect::<Result<_, _>>().unwrap();
    assert!(looks.len() == 2 && looks[1]["shards"].is_array(), "{looks:?}");
    for table in [&["list"][..], &["shards"], &["stats"], &["groups"], &["events"], &["version"]] {
        let text = rig.ctl_ok(table);
        assert!(!text.trim().is_empty() && text.ends_with('\n'), "{table:?}: {text:?}");
    }
}

#[test]
fn a_paused_disk_holds_its_requests_and_a_failed_one_answers_errors() {
    let mut rig = Rig::with(2, &[]);
    rig.attach("d1", &raw(&rig.image("d1.img", MIB)), &["--shard", "0"]);
    rig.attach("d2", &raw(&rig.image("d2.img", MIB)), &["--shard", "0"]);
    // It stays paused when the daemon is started again, however that ended.
    rig.ctl_ok(&["pause", "d1"]);
    assert!(rig.terminate().success());
    rig.restart();
    rig.wait_for_state("d1", "paused");
    rig.kill();
    rig.restart();
    rig.wait_for_state("d1", "paused");
    rig.wait_for_state("d2", "running");
    let mut client = Client::connect(&rig.socket("d1"), "").unwrap();
    let mut neighbour = Client::connect(&rig.socket("d2"), "").unwrap();
    rig.ctl_ok(&["pause", "d1"]);
    rig.ctl_ok(&["pause", "d1"]);
    let cookie = client.send(READ, 0, 512, &[]).unwrap();
    assert!(!client.speaks_within(Duration::from_millis(300)), "the request is held");
    neighbour.write(0, &[1; 512]).unwrap();
    // A paused disk moves as it is.
    if rig.ctl_json(&["shards"]).as_array().unwrap().len() > 1 {
        rig.ctl_ok(&["move", "d1", "1"]);
        let shown = rig.ctl_json(&["show", "d1"]);
        assert_eq!((&shown["state"], &shown["shard"]), (&"paused".into(), &1.into()));
        assert!(!client.speaks_within(Duration::from_millis(100)), "the request is still held");
        assert_eq!(rig.ctl_json(&["shards"])[1]["disks"], 1);
    }
    refused(&rig, &["move", "d1", "9"], 2, &["no shard 9", "from 0 to"]);
    rig.ctl_ok(&["resume", "d1"]);
    let reply = client.receive().unwrap();
    assert_eq!((reply.cookie, reply.error, reply.data), (cookie, 0, vec![0; 512]));

    rig.ctl_ok(&["pause", "d1"]);
    client.send(READ, 0, 512, &[]).unwrap();
    rig.ctl_ok(&["fail", "d1"]);
    assert_eq!(client.receive().unwrap().error, 5, "what was held is answered with EIO");
    assert_eq!(client.read(0, 512).unwrap_err().raw_os_error(), Some(5));
    let shown = rig.ctl_json(&["show", "d1"]);
    assert_eq!(shown["state"], "failed");
    assert!(shown["reason"].as_str().unwrap().contains("ctl fail"), "{shown}");
    neighbour.read(0, 512).unwrap();
    drop((client, neighbour));
    rig.kill();
    rig.restart();
    rig.wait_for_state("d1", "failed");
    rig.wait_for_state("d2", "running");
    // A disk whose image is being opened is called failed, too.
    let mut client = None;
    wait_until("the disk that was given up has its socket", || {
        client = Client::connect(&rig.socket("d1"), "").ok();
        client.is_some()
    });
    let mut client = client.unwrap();
    assert_eq!(client.read(0, 512).unwrap_err().raw_os_error(), Some(5), "it stays given up");
    refused(&rig, &["resume", "d1"], 4, &["detach it"]);
    let mut neighbour = Client::connect(&rig.socket("d2"), "").unwrap();
    neighbour.read(0, 512).unwrap();
    client.disconnect().unwrap();
    rig.ctl_ok(&["detach", "d1"]);
    // Nobody uses a paused disk that has no clients.
    neighbour.disconnect().unwrap();
    rig.ctl_ok(&["pause", "d2"]);
    rig.ctl_ok(&["detach", "d2"]);
    assert_eq!(names(&rig), [""; 0]);
}
