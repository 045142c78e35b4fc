//! Goal: limits hold end to end: never more than what is allowed, at once when they change, writes apart from reads,
//! over groups whose disks are on several shards, and only counted in a dry run.
//! Method: a real daemon under fio, or under a client that keeps many requests in flight; operations are counted and
//! compared with what the limit allows for the time that was measured. Only upper bounds: how much less a busy machine
//! does says nothing about the limit.

#![allow(clippy::unwrap_used, reason = "a failed test is what they are for")]

mod live_client;
mod live_rig;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use live_client::{Client, FLUSH, READ, WRITE};
use live_rig::{Rig, Running, run_command, wait_until};
use serde_json::Value;

/// How much of its rate an unused limit gathers, and the leases of a group: both of a hundredth of a second together
/// with the requests that are on their way (limits/group.rs, "Error bound").
const CATCH_UP_S: f64 = 0.011;

/// The most that a limit lets through in a time: 1 % for what is measured on another clock.
fn allowed(rate: f64, burst: f64, time: Duration, takers: f64) -> f64 {
    let seconds = time.as_secs_f64();
    (rate * seconds + burst.max(rate * CATCH_UP_S) + rate / 1000.0 + takers) * 1.01
}

/// Keeps `depth` requests in flight for some time; returns how many were answered, and the time from the first request to
/// the last answer that counts.
fn keep_busy(socket: &Path, operation: u16, len: u32, depth: usize, time: Duration) -> (u64, Duration) {
    let mut client = Client::connect(socket, "").unwrap();
    let payload = if operation == WRITE { vec![1; len as usize] } else { Vec::new() };
    let mut answered = 0;
    let start = Instant::now();
    for _ in 0..depth {
        client.send(operation, 0, len, &payload).unwrap();
    }
    loop {
        let left = time.saturating_sub(start.elapsed());
        if left.is_zero() || !client.speaks_within(left.max(Duration::from_millis(1))) {
            break;
        }
        assert_eq!(client.receive().unwrap().error, 0);
        answered += 1;
        client.send(operation, 0, len, &payload).unwrap();
    }
    (answered, start.elapsed())
}

fn fio(uri: &str, options: &[&str]) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--name=limit", "--ioengine=nbd", &format!("--uri={uri}"), "--bs=4k", "--iodepth=16"])
        .args(["--output-format=json", "--size=16M"])
        .args(options);
    fio
}

/// What fio reports about its only job.
fn report(outcome: live_rig::Outcome) -> Value {
    let text = outcome.expect_ok();
    // Notes of its engine may stand before the report.
    let report: Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
    report["jobs"][0].clone()
}

fn count(stats: &Value, operation: &str, what: &str) -> u64 {
    stats[0]["ops"][operation][what].as_u64().unwrap()
}

#[test]
fn fio_never_gets_more_than_the_limit() {
    let rig = Rig::start();
    rig.attach("d1", "null:?size=16M", &["--iops", "500"]);
    for workload in ["randread", "randwrite", "randrw"] {
        let before = rig.ctl_json(&["stats", "d1"]);
        let line = [&format!("--rw={workload}")[..], "--time_based", "--runtime=4"];
        let job = report(run_command(&mut fio(&rig.uri("d1"), &line), Duration::from_secs(60)));
        let ios = job["read"]["total_ios"].as_f64().unwrap() + job["write"]["total_ios"].as_f64().unwrap();
        let time = Duration::from_millis(job["job_runtime"].as_u64().unwrap());
        assert!(ios <= allowed(500.0, 0.0, time, 2.0), "{workload}: {ios} operations in {time:?}");
        let after = rig.ctl_json(&["stats", "d1"]);
        let done = |what: &str| {
            let total = |stats: &Value| count(stats, "read", what) + count(stats, "write", what);
            total(&after) - total(&before)
        };
        assert_eq!(done("completed") as f64, ios, "{workload}: the daemon counted what fio did");
        assert!(done("throttled") > 0, "{workload}: nothing waited, so the limit was not tested: {after}");
        println!("{workload}: {ios} operations in {time:?}, at a limit of 500/s");
    }
}

#[test]
fn a_change_takes_effect_at_once_and_zero_means_none() {
    let rig = Rig::start();
    rig.attach("d1", "null:?size=16M", &["--iops", "50"]);
    // 20,000 operations take 400 s at this limit.
    let mut fio =
        Running::start(&mut fio(&rig.uri("d1"), &["--rw=randread", "--io_size=80000k", "--norandommap"]));
    wait_until("fio waits for the limit", || count(&rig.ctl_json(&["stats", "d1"]), "read", "throttled") > 0);
    let start = Instant::now();
    rig.ctl_ok(&["qos", "d1", "--iops", "100"]);
    std::thread::sleep(Duration::from_secs(1));
    let done = count(&rig.ctl_json(&["stats", "d1"]), "read", "completed") as f64;
    assert!(fio.runs());
    // Before the change it had no more than 100/s either.
    let time = start.elapsed() + Duration::from_secs(20);
    assert!(done <= allowed(100.0, 0.0, time, 2.0), "{done} operations");
    rig.ctl_ok(&["qos", "d1", "--iops", "0"]);
    let job = report(fio.finish(Duration::from_secs(60)));
    assert_eq!(job["read"]["total_ios"], 20_000);
    assert_eq!(rig.ctl_json(&["show", "d1"])["limits"], serde_json::json!({}));
}

#[test]
fn a_limit_on_bytes_and_a_burst_hold() {
    let rig = Rig::start();
    let time = Duration::from_secs(3);
    rig.attach("bytes", "null:?size=16M", &["--bps", "4M"]);
    let (answered, took) = keep_busy(&rig.socket("bytes"), READ, 65536, 16, time);
    let bytes = answered as f64 * 65536.0;
    assert!(bytes <= allowed(4e6 * 1.048576, 0.0, took, 2.0 * 65536.0), "{bytes} bytes in {took:?}");

    rig.attach("burst", "null:?size=16M", &["--iops", "100", "--iops-burst", "300"]);
    let begun = Instant::now();
    let (answered, took) = keep_busy(&rig.socket("burst"), READ, 512, 16, time);
    assert!(answered as f64 <= allowed(100.0, 300.0, took, 2.0), "{answered} operations in {took:?}");
    // A second later there is what that time earned, and not a new burst.
    let (again, _) = keep_busy(&rig.socket("burst"), READ, 512, 16, Duration::from_secs(1));
    let (together, took) = (answered + again, begun.elapsed());
    assert!(together as f64 <= allowed(100.0, 300.0, took, 2.0 + 16.0), "{together} operations in {took:?}");

    // One operation of 64 KiB counts as 16.
    rig.attach("sized", "null:?size=16M", &["--iops", "320", "--iops-size", "4096"]);
    let (answered, took) = keep_busy(&rig.socket("sized"), READ, 65536, 16, time);
    assert!(answered as f64 <= allowed(20.0, 0.0, took, 2.0), "{answered} operations in {took:?}");
    println!("{bytes} bytes; burst {answered}, {again}");
}

#[test]
fn a_write_limit_delays_neither_reads_nor_flushes() {
    let rig = Rig::start();
    rig.attach("d1", "ram:r?size=16M", &["--iops-write", "1"]);
    let mut writer = Client::connect(&rig.socket("d1"), "").unwrap();
    let mut other = Client::connect(&rig.socket("d1"), "").unwrap();
    // They take nearly a minute at this limit, and what follows here must not.
    const WRITES: u64 = 50;
    for block in 0..WRITES {
        writer.send(WRITE, block * 4096, 4096, &[2; 4096]).unwrap();
    }
    wait_until("the writes wait", || {
        rig.ctl_json(&["stats", "d1"])[0]["throttled_now"].as_u64().unwrap() > 10
    });
    // On another connection, and behind them on the same one.
    for _ in 0..200 {
        other.read(0, 4096).unwrap();
        other.flush().unwrap();
    }
    let mut asked = Vec::new();
    for operation in [READ, FLUSH, READ, FLUSH] {
        let (offset, len) = if operation == READ { (8 << 20, 4096) } else { (0, 0) };
        asked.push(writer.send(operation, offset, len, &[]).unwrap());
    }
    let mut writes = 0;
    while !asked.is_empty() {
        let reply = writer.receive().unwrap();
        assert_eq!(reply.error, 0);
        match asked.iter().position(|cookie| *cookie == reply.cookie) {
            Some(index) => drop(asked.remove(index)),
            None => writes += 1,
        }
    }
    assert!(writes < WRITES, "reads and flushes came after all writes");
    let waiting = rig.ctl_json(&["stats", "d1"])[0]["throttled_now"].as_u64().unwrap();
    assert!(waiting > 0, "the writes do not wait any more, so nothing was shown");
    // Without the limit, those that wait go at once, and not one each second.
    rig.ctl_ok(&["qos", "d1", "--iops-write", "0"]);
    let start = Instant::now();
    while writes < WRITES {
        assert_eq!(writer.receive().unwrap().error, 0);
        writes += 1;
    }
    assert!(
        start.elapsed() < Duration::from_secs(waiting.max(5)),
        "{waiting} writes took {:?}",
        start.elapsed()
    );
    assert_eq!(other.read(0, 512).unwrap(), [2; 512]);
}

#[test]
fn a_group_limit_holds_over_disks_on_two_shards() {
    let rig = Rig::with(2, &[]);
    let shards = rig.ctl_json(&["shards"]).as_array().unwrap().len();
    // Few, so that the slowest machine does many times as many without it.
    rig.ctl_ok(&["qos", "--group", "vm", "--iops", "50"]);
    for disk in 0..2 {
        let shard = (disk % shards).to_string();
        rig.attach(&format!("d{disk}"), "null:?size=16M", &["--group", "vm", "--shard", &shard]);
    }
    rig.attach("outside", "null:?size=16M", &[]);
    let start = Instant::now();
    let loads: Vec<_> = ["d0", "d1", "outside"]
        .map(|disk| {
            let socket = rig.socket(disk);
            std::thread::spawn(move || keep_busy(&socket, READ, 512, 16, Duration::from_secs(4)).0)
        })
        .into();
    let done: Vec<u64> = loads.into_iter().map(|load| load.join().unwrap()).collect();
    let took = start.elapsed();
    let together = (done[0] + done[1]) as f64;
    assert!(together <= allowed(50.0, 0.0, took, 4.0), "{done:?} operations in {took:?}");
    assert!(done[0] > 0 && done[1] > 0, "one of them got nothing: {done:?}");
    assert!(done[2] > 2 * (done[0] + done[1]), "a disk outside of the group is not limited: {done:?}");
    println!("{done:?} operations in {took:?}, at a limit of 50/s for the first two");

    // Out of the group, live.
    rig.ctl_ok(&["qos", "d0", "--group", ""]);
    let (free, took) = keep_busy(&rig.socket("d0"), READ, 512, 16, Duration::from_secs(1));
    assert!(free as f64 > allowed(50.0, 0.0, took, 4.0), "{free} operations in {took:?}");
    assert_eq!(rig.ctl_json(&["qos", "--group", "vm"])["disks"], serde_json::json!(["d1"]));
}

#[test]
fn a_dry_run_counts_and_delays_nothing() {
    let rig = Rig::start();
    rig.attach("d1", "null:?size=16M", &["--iops", "10", "--dry-run"]);
    let (answered, took) = keep_busy(&rig.socket("d1"), READ, 512, 16, Duration::from_secs(1));
    assert!(
        answered as f64 > allowed(10.0, 0.0, took, 2.0),
        "{answered} operations in {took:?}: it was delayed"
    );
    let stats = rig.ctl_json(&["stats", "d1"]);
    let (would, throttled) = (count(&stats, "read", "would_throttle"), count(&stats, "read", "throttled"));
    assert!(would > 0 && would < count(&stats, "read", "completed") && throttled == 0, "{stats}");
    assert!(rig.ctl_ok(&["list"]).contains("dry run"));

    rig.ctl_ok(&["qos", "d1", "--dry-run=false"]);
    let (answered, took) = keep_busy(&rig.socket("d1"), READ, 512, 16, Duration::from_secs(2));
    assert!(answered as f64 <= allowed(10.0, 0.0, took, 2.0), "{answered} operations in {took:?}");
    assert!(count(&rig.ctl_json(&["stats", "d1"]), "read", "throttled") > 0);
}
