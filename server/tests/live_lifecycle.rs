//! Goal: the daemon starts, reloads, restarts and stops as an operator expects: attachments survive, a missing image
//! does not stop the others, a wrong configuration changes nothing, many and concurrent commands leave nothing behind.
//! Method: a real daemon that is reloaded, terminated, killed and started again on the same directories; what was
//! acknowledged is compared with the image file.

#![allow(clippy::unwrap_used, reason = "a failed test is what they are for")]

mod live_client;
mod live_process;
mod live_rig;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use live_client::{BLOCK, Client, WRITE, contents};
use live_process::descriptors;
use live_rig::{BLKTAPD, PATIENCE, Random, Rig, raw, run_command, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// `serve` with these arguments: for daemons that must not start.
fn serve(arguments: &[&str]) -> live_rig::Outcome {
    let mut command = Command::new(BLKTAPD);
    command.args(["serve", "--metrics", "none"]).args(arguments);
    run_command(&mut command, PATIENCE)
}

/// The list of disks without what changes by itself.
fn attachments(rig: &Rig) -> Value {
    let mut list = rig.ctl_json(&["list"]);
    for disk in list.as_array_mut().unwrap() {
        let disk = disk.as_object_mut().unwrap();
        disk.retain(|key, _| !["age_s", "allocated_bytes", "reason", "shard"].contains(&key.as_str()));
    }
    list
}

fn hangup(rig: &Rig) {
    kill(Pid::from_raw(rig.pid() as i32), Signal::SIGHUP).unwrap();
}

#[test]
fn a_configuration_with_a_mistake_is_refused_with_line_and_hint() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("blktapd.toml");
    let path = config.display().to_string();
    let run_dir = dir.path().join("run").display().to_string();
    for (text, place, words) in [
        (
            "log = \"info\"\n[nbd]\nmax_conections = 5\n",
            ":3:1",
            &["max_conections", "did you mean max_connections?"][..],
        ),
        ("[shards]\n cpus = 7\n", ":2:9", &["string"]),
        ("[groups.gold]\niops = \"many\"\n", ":2:8", &["many"]),
        ("[nbd\n", ":1:", &["]"]),
        ("[nbd]\nmax_connections = 0\n", "", &["nbd.max_connections is 0", "at least 1"]),
        ("[ctl]\nmode = \"9999\"\n", "", &["ctl.mode", "octal"]),
        ("[groups.\"a/b\"]\niops = 1\n", "", &["\"a/b\""]),
    ] {
        fs::write(&config, text).unwrap();
        let outcome = serve(&["--run-dir", &run_dir, "--config", &path]);
        assert_eq!(outcome.code, Some(2), "{text}: {outcome:?}");
        for word in words.iter().chain([&path.as_str(), &place]) {
            assert!(outcome.stderr.contains(word), "{word:?} is missing for {text:?}: {outcome:?}");
        }
    }
    let outcome = serve(&["--run-dir", &run_dir, "--config", &format!("{path}.missing")]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.stderr.contains("cannot be read"), "{outcome:?}");
    assert!(!Path::new(&run_dir).exists(), "nothing was made");
}

#[test]
fn a_reload_applies_what_it_can_and_a_wrong_one_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("blktapd.toml");
    fs::write(&config, "log = \"info\"\n[groups.gold]\niops = 100\n").unwrap();
    let rig = Rig::with(1, &["--config", config.to_str().unwrap()]);
    rig.attach("d1", "null:?size=1M", &["--group", "gold"]);
    let iops = || rig.ctl_json(&["qos", "--group", "gold"])["limits"]["iops"].as_u64();
    assert_eq!(iops(), Some(100));

    fs::write(&config, "log = \"info\"\n[groups.gold]\niops = 200\n").unwrap();
    hangup(&rig);
    wait_until("SIGHUP is obeyed", || iops() == Some(200));

    fs::write(&config, "shutdown_timeout_s = 7\n[ctl]\nmode = \"0600\"\n[groups.gold]\niops = 300\n")
        .unwrap();
    let report = rig.ctl_json(&["reload"]);
    let has = |list: &str, word: &str| report[list].as_array().unwrap().iter().any(|entry| entry == word);
    assert!(
        has("applied", "groups") && has("applied", "shutdown_timeout_s") && has("restart", "ctl"),
        "{report}"
    );
    assert_eq!(iops(), Some(300));

    fs::write(&config, "log = \"info\"\n[groups.gold]\niopz = 400\n").unwrap();
    let outcome = rig.ctl(&["reload"]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.stderr.contains(":3:1") && outcome.stderr.contains("did you mean iops?"), "{outcome:?}");
    hangup(&rig);
    wait_until("the log has it", || rig.log().contains("the configuration was not reloaded"));
    assert_eq!(iops(), Some(300));
    Client::connect(&rig.socket("d1"), "").unwrap().read(0, 512).unwrap();
}

#[test]
fn a_run_directory_has_one_daemon() {
    let rig = Rig::start();
    rig.attach("d1", "null:?size=1M", &[]);
    let run_dir = rig.run_dir().display().to_string();
    let state_dir = rig.run_dir().join("state").display().to_string();
    let ctl = rig.run_dir().join("ctl.sock").display().to_string();
    let other = rig.path("other").display().to_string();
    let pid = format!("pid {}", rig.pid());
    for (arguments, words) in [
        (&["--run-dir", &run_dir][..], [&run_dir, &pid, "--run-dir"]),
        (&["--run-dir", &other, "--state-dir", &state_dir], [&state_dir, &pid, "--state-dir"]),
        (&["--run-dir", &other, "--ctl", &ctl], [&ctl, "somebody answers", "--ctl"]),
    ] {
        let outcome = serve(arguments);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(words.iter().all(|word| outcome.stderr.contains(word)), "{words:?}: {outcome:?}");
    }
    rig.ctl_ok(&["list"]);
    Client::connect(&rig.socket("d1"), "").unwrap().read(0, 512).unwrap();
}

#[test]
fn attachments_survive_a_restart_and_a_crash() {
    // RAM disks outlive the process on a tmpfs only.
    let ram_dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut rig = Rig::with(2, &["--ram-dir", ram_dir.path().to_str().unwrap()]);
    let (writable, read_only) = (raw(&rig.image("d1.img", MIB)), raw(&rig.image("d2.img", MIB)));
    rig.attach(
        "d1",
        &writable,
        &["--iops", "5000", "--bps-write", "10M", "--group", "gold", "--on-error", "pause"],
    );
    rig.attach("d2", &read_only, &["--read-only", "--group", "gold", "--group", "host"]);
    rig.attach("d3", "ram:scratch?size=1M", &[]);
    rig.attach("d4", "ram:scratch?size=1M", &[]);
    rig.attach("gone", "null:?size=1M", &[]);
    rig.ctl_ok(&["detach", "gone"]);
    rig.ctl_ok(&["qos", "--group", "gold", "--iops", "7000"]);
    rig.ctl_ok(&["qos", "d2", "--iops-read", "900"]);
    let moved = rig.ctl_json(&["shards"]).as_array().unwrap().len() - 1;
    rig.ctl_ok(&["move", "d1", &moved.to_string()]);
    Client::connect(&rig.socket("d3"), "").unwrap().write(4096, &[9; 512]).unwrap();
    let before = attachments(&rig);
    for crash in [false, true] {
        match crash {
            true => rig.kill(),
            false => assert!(rig.terminate().success()),
        }
        rig.restart();
        ["d1", "d2", "d3", "d4"].iter().for_each(|disk| rig.wait_for_state(disk, "running"));
        assert_eq!(attachments(&rig), before, "after a crash: {crash}");
        assert_eq!(rig.ctl_json(&["show", "d1"])["shard"], moved);
        assert_eq!(rig.ctl_json(&["qos", "--group", "gold"])["limits"]["iops"], 7000);
        let mut ram = Client::connect(&rig.socket("d4"), "").unwrap();
        assert!(ram.read(4096, 512).unwrap() == [9; 512], "RAM disks outlive the process");
        let mut reader = Client::connect(&rig.socket("d2"), "").unwrap();
        assert_eq!(reader.write(0, &[1; 512]).unwrap_err().raw_os_error(), Some(1), "still read-only");
    }
}

#[test]
fn a_missing_image_is_listed_with_the_reason_and_tried_again() {
    let mut rig = Rig::start();
    let (image, away) = (rig.image("d1.img", MIB), rig.path("away.img"));
    rig.attach("d1", &raw(&image), &[]);
    rig.attach("d2", &raw(&rig.image("d2.img", MIB)), &[]);
    rig.terminate();
    fs::rename(&image, &away).unwrap();
    rig.restart();
    rig.wait_for_state("d2", "running");
    wait_until("the reason is known", || rig.ctl_ok(&["show", "d1"]).contains("no such file"));
    let shown = rig.ctl_json(&["show", "d1"]);
    assert_eq!(shown["state"], "failed");
    assert!(
        shown["reason"].as_str().unwrap().contains("d1.img") && !shown["retry_in_s"].is_null(),
        "{shown}"
    );
    assert!(rig.ctl_ok(&["list"]).contains("no such file"));
    assert!(Client::connect(&rig.run_dir().join("nbd.sock"), "d1").is_err());
    Client::connect(&rig.socket("d2"), "").unwrap().read(0, 512).unwrap();
    // An operator who does not want to wait is told the same.
    let outcome = rig.ctl(&["resume", "d1"]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("no such file"), "{outcome:?}");
    fs::rename(&away, &image).unwrap();
    rig.wait_for_state("d1", "running");
    Client::connect(&rig.socket("d1"), "").unwrap().read(0, 512).unwrap();

    // Or resumes it himself; or gives it up while it is missing.
    rig.terminate();
    fs::rename(&image, &away).unwrap();
    rig.restart();
    wait_until("the reason is known", || rig.ctl_ok(&["show", "d1"]).contains("no such file"));
    fs::rename(&away, &image).unwrap();
    rig.ctl_ok(&["resume", "d1"]);
    assert_eq!(rig.ctl_json(&["show", "d1"])["state"], "running");
    rig.terminate();
    fs::rename(&image, &away).unwrap();
    rig.restart();
    rig.ctl_ok(&["detach", "d1"]);
    rig.terminate();
    rig.restart();
    assert_eq!(rig.ctl(&["show", "d1"]).code, Some(3));
}

#[test]
fn a_change_that_cannot_be_kept_is_undone() {
    let rig = Rig::with(2, &[]);
    let image = raw(&rig.image("d1.img", MIB));
    rig.attach("d1", &image, &["--shard", "0", "--iops", "5000"]);
    let before = rig.ctl_json(&["list"]);
    // A directory in the place of the new file makes opening it fail, also for root.
    let obstacle = rig.run_dir().join("state/attachments.json.new");
    fs::create_dir(&obstacle).unwrap();
    let mut commands = vec![
        vec!["attach", "d2", "null:?size=1M", "--nbd"],
        vec!["detach", "d1"],
        vec!["detach", "d1", "--force"],
        vec!["qos", "d1", "--iops", "1"],
        vec!["qos", "--group", "g", "--iops", "1"],
    ];
    if rig.ctl_json(&["shards"]).as_array().unwrap().len() > 1 {
        commands.push(vec!["move", "d1", "1"]);
    }
    for command in commands {
        let outcome = rig.ctl(&command);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(
            outcome.stderr.contains("was undone") && outcome.stderr.contains("attachments.json"),
            "{outcome:?}"
        );
        let mut now = rig.ctl_json(&["list"]);
        now[0]["age_s"] = before[0]["age_s"].clone();
        now[0]["allocated_bytes"] = before[0]["allocated_bytes"].clone();
        assert_eq!(now, before, "after {command:?}");
        Client::connect(&rig.socket("d1"), "").unwrap().write(0, &[1; 512]).unwrap();
    }
    fs::remove_dir(&obstacle).unwrap();
    rig.attach("d2", "null:?size=1M", &[]);
    rig.ctl_ok(&["detach", "d1"]);
}

#[test]
fn two_hundred_and_fifty_six_disks_come_and_go() {
    const DISKS: usize = 256;
    let mut rig = Rig::with(2, &[]);
    let before = descriptors(rig.pid());
    let each = |what: &str, command: &(dyn Fn(usize) -> Vec<String> + Sync)| {
        let (start, next) = (Instant::now(), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    loop {
                        let disk = next.fetch_add(1, Ordering::Relaxed) as usize;
                        if disk >= DISKS {
                            break;
                        }
                        let arguments = command(disk);
                        rig.ctl_ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
                    }
                });
            }
        });
        println!("{DISKS} disks: {what} in {:?}, each with a process of its own", start.elapsed());
    };
    each("attached", &|disk| {
        let image = raw(&rig.image(&format!("{disk}.img"), MIB));
        ["attach", &format!("d{disk}"), &image, "--nbd"].map(str::to_owned).to_vec()
    });
    assert_eq!(rig.ctl_json(&["list"]).as_array().unwrap().len(), DISKS);
    let shards = rig.ctl_json(&["shards"]);
    let shards = shards.as_array().unwrap();
    for shard in shards {
        // A shard that is busy with attaching counts for up to 40 disks more.
        let disks = shard["disks"].as_u64().unwrap() as usize;
        assert!(disks.abs_diff(DISKS / shards.len()) <= 40, "{disks} disks: they spread evenly");
    }
    rig.terminate();
    let start = Instant::now();
    rig.restart();
    wait_until("all disks serve again", || {
        let list = rig.ctl_json(&["list"]);
        list.as_array().unwrap().iter().filter(|disk| disk["state"] == "running").count() == DISKS
    });
    println!("{DISKS} disks: served again {:?} after the start", start.elapsed());
    Client::connect(&rig.socket("d255"), "").unwrap().write(0, &[1; 512]).unwrap();
    let each = |command: &(dyn Fn(usize) -> Vec<String> + Sync)| {
        (0..DISKS).for_each(|disk| {
            let arguments = command(disk);
            rig.ctl_ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        })
    };
    each(&|disk| vec!["detach".to_owned(), format!("d{disk}")]);
    assert_eq!(fs::read_dir(rig.run_dir().join("nbd")).unwrap().count(), 0);
    wait_until("the descriptors are closed", || descriptors(rig.pid()) <= before);
}

#[test]
fn concurrent_commands_on_the_same_names_end_consistently() {
    let mut rig = Rig::with(2, &[]);
    let images: Vec<String> = (0..3).map(|n| raw(&rig.image(&format!("{n}.img"), MIB))).collect();
    let before = descriptors(rig.pid());
    std::thread::scope(|scope| {
        for worker in 0..8 {
            let (rig, images) = (&rig, &images);
            scope.spawn(move || {
                let mut random = Random(worker);
                for _ in 0..25 {
                    let name = format!("d{}", random.below(3));
                    // Different disks ask for the same image now and then.
                    let image = &images[random.below(3) as usize];
                    let arguments = match random.below(8) {
                        0..3 => vec!["attach", &name, image, "--nbd"],
                        3 => vec!["attach", &name, "null:?size=1M", "--nbd"],
                        4 => vec!["detach", &name],
                        5 => vec!["detach", &name, "--force"],
                        6 => vec!["move", &name, "0"],
                        _ => vec!["qos", &name, "--iops", "9"],
                    };
                    let outcome = rig.ctl(&arguments);
                    assert!(matches!(outcome.code, Some(0 | 3 | 4)), "{outcome:?}");
                }
            });
        }
    });
    for disk in rig.ctl_json(&["list"]).as_array().unwrap() {
        assert_eq!(disk["state"], "running");
        let name = disk["name"].as_str().unwrap();
        Client::connect(&rig.socket(name), "").unwrap().read(0, 512).unwrap();
        rig.ctl_ok(&["detach", name]);
    }
    assert_eq!(fs::read_dir(rig.run_dir().join("nbd")).unwrap().count(), 0);
    wait_until("the descriptors are closed", || descriptors(rig.pid()) <= before);
    let shards = rig.ctl_json(&["shards"]);
    assert!(shards.as_array().unwrap().iter().all(|shard| shard["disks"] == 0), "{shards}");
    // No lock, no place on a shard and no attachment is left.
    for (number, image) in images.iter().enumerate() {
        rig.attach(&format!("e{number}"), image, &[]);
        rig.ctl_ok(&["detach", &format!("e{number}")]);
    }
    rig.terminate();
    rig.restart();
    assert_eq!(rig.ctl_json(&["list"]), Value::Array(Vec::new()));
}

/// Writes blocks in order, 16 at a time, until the daemon closes the connection; returns which were acknowledged.
fn write_until_closed(mut client: Client, blocks: u64, acknowledged: &AtomicU64) -> Vec<u64> {
    let (mut done, mut next) = (Vec::new(), 0);
    let mut asked = std::collections::HashMap::new();
    loop {
        while asked.len() < 16 && next < blocks {
            let data = contents(1, next, 1);
            let Ok(cookie) = client.send(WRITE, next * BLOCK as u64, BLOCK as u32, &data) else { break };
            asked.insert(cookie, next);
            next += 1;
        }
        match client.receive() {
            Ok(reply) if reply.error == 0 => {
                done.extend(asked.remove(&reply.cookie));
                acknowledged.store(done.len() as u64, Ordering::Relaxed);
            }
            Ok(reply) => assert!(matches!(reply.error, 5 | 108), "{reply:?}"),
            Err(_) => return done,
        }
        assert!(next < blocks, "the image is full: the daemon should have stopped long ago");
    }
}

#[test]
fn a_daemon_that_is_told_to_stop_drains_flushes_and_leaves_no_socket() {
    let mut rig = Rig::with(2, &[]);
    let blocks = 50_000;
    let image = rig.image("d1.img", blocks * BLOCK as u64);
    // A paused disk is flushed, too; what it holds is dropped with its connection, unanswered.
    rig.attach("d3", &raw(&rig.image("d3.img", MIB)), &[]);
    let mut paused = Client::connect(&rig.socket("d3"), "").unwrap();
    paused.write(0, &[1; 512]).unwrap();
    rig.ctl_ok(&["pause", "d3"]);
    paused.send(WRITE, 0, 512, &[2; 512]).unwrap();
    // A limit, so that requests wait when the signal comes.
    rig.attach("d1", &raw(&image), &["--iops", "4000"]);
    rig.attach("d2", "ram:r?size=1M", &[]);
    let silent = Client::connect(&rig.socket("d2"), "").unwrap();
    let acknowledged = AtomicU64::new(0);
    let client = Client::connect(&rig.socket("d1"), "").unwrap();
    let done = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_until_closed(client, blocks, &acknowledged));
        wait_until("the load runs", || acknowledged.load(Ordering::Relaxed) > 200);
        assert!(rig.terminate().success());
        writer.join().unwrap()
    });
    assert!(rig.log().contains("every disk was flushed"));
    let file = fs::File::open(&image).unwrap();
    let mut found = vec![0; BLOCK];
    for block in &done {
        file.read_exact_at(&mut found, block * BLOCK as u64).unwrap();
        assert!(found == contents(1, *block, 1), "block {block} was acknowledged and is not in the image");
    }
    println!("{} writes were acknowledged and found", done.len());
    for socket in ["ctl.sock", "nbd.sock", "nbd/d1.sock", "nbd/d2.sock"] {
        assert!(!rig.run_dir().join(socket).exists(), "{socket} is left");
    }
    assert_eq!(rig.ctl(&["list"]).code, Some(5));
    assert!(silent.speaks_within(Duration::from_secs(5)), "the end of its connection");
    assert!(paused.receive().is_err(), "the held write is not acknowledged");
    assert_eq!(fs::read(rig.path("d3.img")).unwrap()[..512], [1; 512], "and was not done");
    rig.restart();
    rig.wait_for_state("d1", "running");
}
