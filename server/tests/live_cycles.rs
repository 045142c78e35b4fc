//! Goal: disks come, move, fail and go without a trace, and without a neighbour's notice: no descriptor, memory or CPU
//! time is lost, a failure of one disk's code stays with it, an image has one writer.
//! Method: a real daemon under loads that check every byte; panics injected into a disk; QEMU's programs as the other
//! writer; figures of the process from /proc.

#![allow(clippy::unwrap_used, reason = "a failed test is what they are for")]

mod live_client;
mod live_process;
mod live_rig;

use std::process::Command;
use std::time::{Duration, Instant};

use live_client::{Client, Load, READ, WRITE};
use live_process::{cpu_ticks, descriptor_list, descriptors, memory_kib};
use live_rig::{PATIENCE, Rig, Running, raw, run, wait_until};

const MIB: u64 = 1 << 20;

/// Descriptors and KiB of memory, when the daemon has closed the connections of clients that have just gone: when the number of
/// descriptors has not changed for half a second.
fn uses(rig: &Rig) -> (usize, u64) {
    let (mut open, mut since) = (descriptors(rig.pid()), Instant::now());
    while since.elapsed() < Duration::from_millis(500) {
        std::thread::sleep(Duration::from_millis(20));
        let now = descriptors(rig.pid());
        if now != open {
            (open, since) = (now, Instant::now());
        }
    }
    (open, memory_kib(rig.pid()))
}

/// Waits until no more descriptors are open than these.
#[track_caller]
fn wait_for_descriptors(rig: &Rig, most: usize) {
    let deadline = Instant::now() + PATIENCE;
    while descriptors(rig.pid()) > most {
        let list = || descriptor_list(rig.pid());
        assert!(Instant::now() < deadline, "at most {most} descriptors were expected: {:#?}", list());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn two_hundred_cycles_of_attach_move_and_detach_leave_nothing() {
    const CYCLES: u64 = 200;
    let rig = Rig::with(2, &[]);
    let shards = rig.ctl_json(&["shards"]).as_array().unwrap().len() as u64;
    let image = raw(&rig.image("cycle.img", MIB));
    for name in ["neighbour", "mover"] {
        rig.attach(name, &raw(&rig.image(&format!("{name}.img"), MIB)), &["--shard", "0"]);
    }
    let loads = ["neighbour", "mover"].map(|name| Load::start(rig.socket(name), "", 64, 3));
    let mut before = (0, 0);
    for cycle in 0..CYCLES {
        // One disk is under load while it moves; the other comes and goes.
        rig.ctl_ok(&["attach", "cycle", &image, "--nbd", "--shard", &(cycle % shards).to_string()]);
        let mut client = Client::connect(&rig.socket("cycle"), "").unwrap();
        client.write(4096, &[cycle as u8; 4096]).unwrap();
        rig.ctl_ok(&["move", "mover", &((cycle + 1) % shards).to_string()]);
        rig.ctl_ok(&["move", "cycle", &((cycle + 1) % shards).to_string()]);
        assert!(client.read(4096, 4096).unwrap() == [cycle as u8; 4096], "after the move");
        client.disconnect().unwrap();
        rig.ctl_ok(&["detach", "cycle"]);
        loads.iter().for_each(|load| load.wait_for(8));
        if cycle == CYCLES / 4 {
            // By now everything that is made once and kept has been made.
            before = uses(&rig);
        }
    }
    wait_for_descriptors(&rig, before.0);
    let after = uses(&rig);
    println!("after a quarter and after all of {CYCLES} cycles: descriptors and KiB {before:?}, {after:?}");
    // 150 cycles that lose 8 KiB each would be seen.
    assert!(after.1 <= before.1 + 1024, "{before:?}, {after:?}");
    for (load, name) in loads.into_iter().zip(["neighbour", "mover"]) {
        println!("{name}: {} checked operations", load.finish());
    }
    rig.ctl_ok(&["detach", "mover"]);
    rig.ctl_ok(&["detach", "neighbour"]);
    let shown = rig.ctl_json(&["shards"]);
    for shard in shown.as_array().unwrap() {
        assert_eq!(
            (&shard["disks"], &shard["clients"], &shard["ops_in_flight"]),
            (&0.into(), &0.into(), &0.into())
        );
    }
}

#[test]
fn a_panic_in_a_disk_stays_with_it_and_the_second_pauses_it() {
    let mut rig = Rig::with(1, &["--fault-commands"]);
    rig.expect_panics();
    rig.attach("d1", &raw(&rig.image("d1.img", MIB)), &[]);
    rig.attach("d2", &raw(&rig.image("d2.img", MIB)), &[]);
    // Both are under load on one shard while the code of the first fails.
    let (victim, neighbour) =
        (Load::start(rig.socket("d1"), "", 64, 1), Load::start(rig.socket("d2"), "", 64, 2));
    victim.wait_for(500);
    rig.ctl_ok(&["inject-panic", "d1"]);
    victim.wait_for(500);
    neighbour.wait_for(500);
    assert_eq!(rig.ctl_json(&["show", "d1"])["state"], "running");
    let events = rig.ctl_ok(&["events"]);
    assert!(events.contains("quarantined") && events.contains("injected panic"), "{events}");

    // The second time it is paused: its requests are held, the neighbour goes on.
    rig.ctl_ok(&["inject-panic", "d1"]);
    rig.wait_for_state("d1", "paused");
    let reason = rig.ctl_json(&["show", "d1"])["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("failed twice") && reason.contains("`resume`"), "{reason}");
    let stood = victim.operations();
    neighbour.wait_for(500);
    assert!(victim.operations() <= stood + 8, "a paused disk answers nothing");
    rig.ctl_ok(&["resume", "d1"]);
    victim.wait_for(500);
    // Every byte is right in the end: the requests that the panics interrupted ran again.
    victim.finish();
    neighbour.finish();
    let shards = rig.ctl_json(&["shards"]);
    assert_eq!((&shards[0]["state"], &shards[0]["disks"]), (&"running".into(), &2.into()));
    rig.ctl_ok(&["detach", "d1"]);
    rig.ctl_ok(&["detach", "d2"]);
}

#[test]
fn the_last_shard_takes_the_daemon_along_and_a_restart_has_everything_back() {
    let mut rig = Rig::with(1, &["--fault-commands"]);
    rig.expect_panics();
    rig.attach("d1", &raw(&rig.image("d1.img", MIB)), &["--iops", "5000"]);
    let mut client = Client::connect(&rig.socket("d1"), "").unwrap();
    client.write(4096, &[7; 4096]).unwrap();
    // The answer may be lost with the daemon.
    rig.ctl(&["inject-panic", "--shard", "0"]);
    let status = rig.wait_for_end();
    assert_eq!(status.code(), Some(1), "{status}: {}", rig.log());
    assert!(rig.log().contains("no shard is left"), "{}", rig.log());
    assert!(client.read(4096, 4096).is_err(), "the client sees the end");
    rig.restart();
    rig.wait_for_state("d1", "running");
    assert_eq!(rig.ctl_json(&["show", "d1"])["limits"]["iops"], 5000);
    let mut client = Client::connect(&rig.socket("d1"), "").unwrap();
    assert!(client.read(4096, 4096).unwrap() == [7; 4096], "what was acknowledged");
    client.disconnect().unwrap();
}

#[test]
fn a_shard_that_panics_gives_back_its_clients_and_descriptors() {
    let mut rig = Rig::with(2, &["--fault-commands"]);
    rig.expect_panics();
    if rig.ctl_json(&["shards"]).as_array().unwrap().len() < 2 {
        return live_rig::skip(
            "a_shard_that_panics_gives_back_its_clients_and_descriptors",
            "there is one CPU",
        );
    }
    let images = ["d0", "d1", "d2", "d3"].map(|name| (name, raw(&rig.image(&format!("{name}.img"), MIB))));
    for (index, (name, image)) in images.iter().enumerate() {
        rig.attach(name, image, &["--shard", &(index % 2).to_string()]);
    }
    // Two that go on, two that lose their shard; idle clients see the end as well.
    let mut clients = images.each_ref().map(|(name, _)| Client::connect(&rig.socket(name), "").unwrap());
    for client in [1, 3] {
        clients[client].write(0, &[1; 65536]).unwrap();
    }
    let neighbours = ["d0", "d2"].map(|name| Load::start(rig.socket(name), "", 64, 1));
    let before = uses(&rig).0;
    rig.ctl_ok(&["inject-panic", "--shard", "1"]);
    for name in ["d1", "d3"] {
        rig.wait_for_state(name, "running");
        assert_eq!(rig.ctl_json(&["show", name])["shard"], 0);
    }
    let shards = rig.ctl_json(&["shards"]);
    assert_eq!((&shards[1]["state"], &shards[1]["clients"]), (&"ended".into(), &0.into()));
    assert!(shards[1]["reason"].as_str().unwrap().contains("panicked"), "{shards}");
    assert_eq!((&shards[0]["state"], &shards[0]["disks"]), (&"running".into(), &4.into()));
    for client in [1, 3] {
        assert!(clients[client].read(0, 4096).is_err(), "the old connection has ended");
        let mut again = Client::connect(&rig.socket(images[client].0), "").unwrap();
        assert!(again.read(0, 65536).unwrap() == [1; 65536]);
        again.disconnect().unwrap();
    }
    neighbours.into_iter().for_each(|load| _ = load.finish());
    // The descriptors of the dead shard's ring, its connections and its images are closed; those of its eventfd and of
    // glommio may be.
    wait_for_descriptors(&rig, before - 1);
    assert!(clients[0].read(0, 65536).is_ok() && clients[2].read(0, 65536).is_ok());
}

#[test]
fn faults_are_refused_unless_the_daemon_was_started_for_them() {
    let rig = Rig::start();
    rig.attach("d1", "null:?size=1M", &[]);
    assert!(rig.ctl(&["inject-panic", "d1"]).code != Some(0));
    assert!(rig.ctl(&["inject-panic", "--shard", "0"]).code != Some(0));
    assert_eq!(rig.ctl_json(&["show", "d1"])["state"], "running");
}

#[test]
fn an_image_has_one_writer_whoever_it_is() {
    let rig = Rig::start();
    let image = rig.image("d1.img", MIB);
    let path = image.display().to_string();
    let link = rig.path("link.img");
    std::os::unix::fs::symlink(&image, &link).unwrap();
    rig.attach("d1", &raw(&image), &[]);
    // Another of our disks, whatever it calls the file.
    for spec in [raw(&image), raw(&link)] {
        let outcome = rig.ctl(&["attach", "d2", &spec, "--nbd"]);
        assert_eq!(outcome.code, Some(4), "{outcome:?}");
        assert!(outcome.stderr.contains("the disk d1 writes to it"), "{outcome:?}");
    }
    // QEMU, while we have it.
    let write = ["-f", "raw", "-c", "write 0 512", &path];
    let said = run("qemu-io", &write).expect_failure();
    assert!(said.contains("lock"), "{said}");
    rig.ctl_ok(&["detach", "d1"]);
    run("qemu-io", &write).expect_ok();

    // We, while QEMU has it.
    let socket = rig.path("qemu.sock");
    let mut qemu = Command::new("qemu-nbd");
    qemu.args(["-f", "raw", "-t", "-k"]).arg(&socket).arg(&image);
    let qemu = Running::start(&mut qemu);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    wait_until("qemu-nbd serves", || run("nbdinfo", &["--size", &uri]).code == Some(0));
    for options in [&[][..], &["--read-only"]] {
        let outcome = rig.ctl(&[&["attach", "d1", &raw(&image), "--nbd"], options].concat());
        assert!(matches!(outcome.code, Some(1 | 4)), "{outcome:?}");
        let words = [&path, "qemu-nbd", &qemu.pid().to_string()];
        assert!(words.iter().all(|word| outcome.stderr.contains(*word)), "{words:?}: {outcome:?}");
    }
    drop(qemu);
    rig.attach("d1", &raw(&image), &[]);
    // Readers share.
    rig.ctl_ok(&["detach", "d1"]);
    rig.attach("d1", &raw(&image), &["--read-only"]);
    rig.attach("d2", &raw(&image), &["--read-only"]);
    run("qemu-io", &["-r", "-f", "raw", "-c", "read 0 512", &path]).expect_ok();
    run("qemu-io", &write).expect_failure();
}

#[test]
fn an_idle_daemon_uses_no_cpu() {
    let rig = Rig::with(2, &[]);
    let mut clients = Vec::new();
    for disk in 0..64 {
        let (name, limit) = (format!("d{disk}"), if disk % 2 == 0 { "0" } else { "1000" });
        rig.attach(&name, &raw(&rig.image(&name, MIB)), &["--iops", limit]);
        // Each has been busy, and its client stays.
        let mut client = Client::connect(&rig.socket(&name), "").unwrap();
        client.write(0, &[1; 4096]).unwrap();
        client.flush().unwrap();
        clients.push(client);
    }
    // What is given back after a time of rest is given back, if late on a busy machine: one that never rests never passes.
    std::thread::sleep(Duration::from_secs(3));
    let mut looks = Vec::new();
    while looks.last().is_none_or(|ticks| *ticks > 3) {
        assert!(looks.len() < 5, "it never rests: ticks of CPU in times of 10 s: {looks:?}");
        let (before, start) = (cpu_ticks(rig.pid()), Instant::now());
        std::thread::sleep(Duration::from_secs(10));
        let (ticks, time) = (cpu_ticks(rig.pid()) - before, start.elapsed());
        println!("64 idle disks with clients: {ticks} ticks of CPU in {time:?}");
        looks.push(ticks);
    }
    for mut client in clients {
        assert!(client.read(0, 4096).unwrap() == [1; 4096]);
    }
}

#[test]
fn a_move_takes_requests_that_wait_along() {
    let rig = Rig::with(2, &[]);
    if rig.ctl_json(&["shards"]).as_array().unwrap().len() < 2 {
        eprintln!("SKIPPED a_move_takes_requests_that_wait_along: there is one CPU only");
        return;
    }
    rig.attach("d1", "ram:r?size=1M", &["--shard", "0", "--iops", "10"]);
    let mut client = Client::connect(&rig.socket("d1"), "").unwrap();
    let mut asked = Vec::new();
    for block in 0..20u64 {
        asked.push(client.send(WRITE, block * 4096, 4096, &[block as u8 + 1; 4096]).unwrap());
    }
    for shard in ["1", "0", "1"] {
        rig.ctl_ok(&["move", "d1", shard]);
    }
    rig.ctl_ok(&["qos", "d1", "--iops", "0"]);
    for _ in 0..20 {
        let reply = client.receive().unwrap();
        assert_eq!(reply.error, 0);
        asked.retain(|cookie| *cookie != reply.cookie);
    }
    assert!(asked.is_empty(), "each is answered once: {asked:?}");
    for block in 0..20u64 {
        client.send(READ, block * 4096, 4096, &[]).unwrap();
        assert!(client.receive().unwrap().data == [block as u8 + 1; 4096], "block {block}");
    }
}
