//! Goal: what Prometheus scrapes is well formed, and its counters are what clients did.
//! Method: a real daemon under fio and a client that counts; the scrape over the control socket, by curl, is judged by
//! promtool and compared with fio's own report.

#![allow(clippy::unwrap_used, reason = "a failed test is what they are for")]

mod live_client;
mod live_process;
mod live_rig;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use live_client::{Client, READ, TRIM, WRITE_ZEROES};
use live_process::{descriptors, memory_kib};
use live_rig::{BLKTAPD, Rig, raw, run, run_command, wait_until};
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn scrape(rig: &Rig) -> String {
    let socket = rig.run_dir().join("ctl.sock").display().to_string();
    let url = "http://localhost/metrics";
    run("curl", &["-fsS", "--max-time", "30", "--unix-socket", &socket, url]).expect_ok()
}

/// Values by series, as they are written: `name{label="value"}`.
fn series(text: &str) -> BTreeMap<&str, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name, value.parse().unwrap()))
        .collect()
}

/// promtool, from the PATH or from where deploy/install-deps.sh unpacks it.
fn promtool() -> Option<PathBuf> {
    let target = Path::new(BLKTAPD).ancestors().nth(2).unwrap();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs = vec![target.join("deploy-tools/bin")];
    dirs.extend(std::env::split_paths(&path));
    dirs.into_iter().map(|dir| dir.join("promtool")).find(|file| file.is_file())
}

/// `promtool check metrics`; its complaints.
fn complaints(promtool: &Path, text: &str) -> String {
    let mut child = Command::new("timeout")
        .args(["-s", "KILL", "30"])
        .arg(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    if output.status.success() { said } else { format!("{}: {said}", output.status) }
}

/// What fio reports about its only job.
fn fio(uri: &str, options: &[&str]) -> Value {
    let mut fio = Command::new("fio");
    fio.args(["--name=count", "--ioengine=nbd", &format!("--uri={uri}"), "--iodepth=8"]);
    fio.args(["--output-format=json"]).args(options);
    let text = run_command(&mut fio, Duration::from_secs(60)).expect_ok();
    // Notes of its engine may stand before the report.
    let report: Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
    report["jobs"][0].clone()
}

#[test]
fn counters_are_what_clients_did() {
    let rig = Rig::with(2, &[]);
    rig.attach("d1", &raw(&rig.image("d1.img", 16 * MIB)), &["--iops", "100000", "--bps-write", "1G"]);
    rig.attach("idle", "null:?size=1M", &["--read-only"]);
    let job = fio(&rig.uri("d1"), &["--rw=randrw", "--bsrange=4k-64k", "--size=16M"]);
    let mut client = Client::connect(&rig.socket("d1"), "").unwrap();
    for _ in 0..5 {
        client.flush().unwrap();
    }
    client.send(TRIM, 0, 65536, &[]).unwrap();
    client.send(WRITE_ZEROES, 0, 8192, &[]).unwrap();
    client.send(READ, 16 * MIB, 512, &[]).unwrap();
    let errors: Vec<u32> = (0..3).map(|_| client.receive().unwrap().error).collect();
    assert_eq!(errors.iter().filter(|error| **error != 0).count(), 1, "{errors:?}");

    // fio's connection ends a moment after fio.
    wait_until("one client is left", || scrape(&rig).contains("blktapd_disk_clients{disk=\"d1\"} 1\n"));
    let text = scrape(&rig);
    let found = series(&text);
    let value = |name: &str| {
        *found.get(name).unwrap_or_else(|| {
            let family = name.split('{').next().unwrap();
            let near: Vec<&str> = text.lines().filter(|line| line.starts_with(family)).collect();
            panic!("{name} is missing: {near:#?}")
        })
    };
    let disk = |name: &str| value(&format!("blktapd_disk_{name}{{disk=\"d1\"}}"));
    let did = |operation: &str, what: &str| job[operation][what].as_f64().unwrap();
    assert_eq!(disk("reads_completed_total"), did("read", "total_ios"));
    assert_eq!(disk("writes_completed_total"), did("write", "total_ios"));
    assert_eq!(disk("read_bytes_total"), did("read", "io_bytes"));
    assert_eq!(disk("written_bytes_total"), did("write", "io_bytes"));
    assert!(disk("flush_requests_total") >= 5.0);
    assert_eq!((disk("discards_completed_total"), disk("discarded_bytes_total")), (1.0, 65536.0));
    assert_eq!((disk("write_zeroes_completed_total"), disk("zeroed_bytes_total")), (1.0, 8192.0));
    assert_eq!(
        (disk("clients"), disk("io_now"), disk("up"), disk("size_bytes")),
        (1.0, 0.0, 1.0, 16777216.0)
    );
    // Histograms have each request once, in cumulative buckets.
    for (family, labels, least) in [
        ("request_duration_seconds", "disk=\"d1\",op=\"read\"", did("read", "total_ios")),
        ("request_duration_seconds", "disk=\"d1\",op=\"write\"", did("write", "total_ios")),
        ("queue_duration_seconds", "disk=\"d1\"", did("read", "total_ios") + did("write", "total_ios")),
    ] {
        let count = value(&format!("blktapd_disk_{family}_count{{{labels}}}"));
        assert!(count >= least, "{family}: {count}");
        assert_eq!(value(&format!("blktapd_disk_{family}_bucket{{{labels},le=\"+Inf\"}}")), count);
    }
    assert_eq!(value("blktapd_disk_qos_limit_iops{disk=\"d1\",direction=\"total\"}"), 100_000.0);
    assert_eq!(value("blktapd_disk_state{disk=\"idle\",state=\"running\"}"), 1.0);
    assert_eq!(value("blktapd_disks"), 2.0);
    let stats = rig.ctl_json(&["stats", "d1"]);
    assert_eq!(stats[0]["ops"]["read"]["completed"].as_f64().unwrap(), disk("reads_completed_total"));
    assert_eq!(stats[0]["ops"]["write"]["bytes"].as_f64().unwrap(), disk("written_bytes_total"));

    // Counters go with the disk to another shard.
    if rig.ctl_json(&["shards"]).as_array().unwrap().len() > 1 {
        rig.ctl_ok(&["move", "d1", "0"]);
        rig.ctl_ok(&["move", "d1", "1"]);
        let text = scrape(&rig);
        assert_eq!(
            series(&text)["blktapd_disk_reads_completed_total{disk=\"d1\"}"],
            did("read", "total_ios")
        );
    }
}

#[test]
fn promtool_has_nothing_to_complain_about() {
    let Some(promtool) = promtool() else {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED promtool_has_nothing_to_complain_about: promtool is not installed (deploy/install-deps.sh)"
        );
        return;
    };
    // The judge judges.
    assert!(!complaints(&promtool, "# TYPE x counter\nx 1\n").is_empty());
    let rig = Rig::with(2, &["--ram-limit", "64M"]);
    assert_eq!(complaints(&promtool, &scrape(&rig)), "", "without disks");
    rig.attach("file", &raw(&rig.image("d1.img", MIB)), &["--iops", "1000", "--group", "g"]);
    rig.attach("ram", "ram:r?size=1M", &["--bps", "1G"]);
    rig.attach("null", "null:?size=1M", &["--read-only"]);
    rig.ctl_ok(&["qos", "--group", "g", "--bps-read", "1G", "--iops-write", "7000"]);
    for disk in ["file", "ram"] {
        let mut client = Client::connect(&rig.socket(disk), "").unwrap();
        client.write(0, &[1; 4096]).unwrap();
        client.flush().unwrap();
        client.read(0, 4096).unwrap();
    }
    rig.ctl_ok(&["pause", "null"]);
    let text = scrape(&rig);
    assert_eq!(complaints(&promtool, &text), "", "{text}");
}

#[test]
fn five_hundred_and_twelve_disks_are_scraped_and_nothing_grows() {
    const DISKS: usize = 512;
    let rig = Rig::with(2, &[]);
    let socket = rig.run_dir().join("ctl.sock").display().to_string();
    let mut attaches = String::new();
    // One process of curl for all: what it sends is what `ctl attach` sends.
    for disk in 0..DISKS {
        attaches.push_str(&format!(
            "{}url = \"http://localhost/v1/disks/d{disk}\"\nunix-socket = \"{socket}\"\nrequest = \"PUT\"\nfail\nsilent\n\
             show-error\nheader = \"content-type: application/json\"\noutput = \"/dev/null\"\n\
             data = \"{{\\\"image\\\":\\\"null:?size=1M\\\",\\\"nbd\\\":true}}\"\n",
            if disk == 0 { "" } else { "next\n" }
        ));
    }
    let config = rig.path("attaches");
    std::fs::write(&config, attaches).unwrap();
    // Each flushes the state.
    let limit = Duration::from_secs(300);
    run_command(Command::new("curl").arg("--config").arg(config), limit).expect_ok();
    for _ in 0..3 {
        scrape(&rig);
    }
    // The daemon closes the last connection a moment after curl has gone.
    std::thread::sleep(Duration::from_millis(500));
    let before = (descriptors(rig.pid()), memory_kib(rig.pid()));
    let start = std::time::Instant::now();
    for _ in 0..20 {
        let text = scrape(&rig);
        let up = text.lines().filter(|line| line.starts_with("blktapd_disk_up{")).count();
        assert_eq!(up, DISKS);
    }
    println!("a scrape of {DISKS} disks takes {:?}, curl included", start.elapsed() / 20);
    wait_until("the connections are closed", || descriptors(rig.pid()) <= before.0);
    let kib = memory_kib(rig.pid());
    assert!(kib <= before.1 + 4096, "{} KiB before, {kib} KiB after", before.1);
}
