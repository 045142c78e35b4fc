//! Goal: the program does for a stranger what its command line promises: exit codes, sockets, real clients, restarts, the
//! service manager. Method: the built program in a directory of its own, real shards, and the clients that the host has (libnbd's,
//! fio, systemd-socket-activate); a stage whose client is missing prints that it was skipped.

#![allow(clippy::unwrap_used)] // a failed test is what an unwrap in it is for

use std::io::{Read, Write};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PROGRAM: &str = env!("CARGO_BIN_EXE_blktapd");
/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running daemon; killed when the test ends.
struct Daemon {
    child: Child,
    dir: PathBuf,
}

impl Daemon {
    fn start(dir: &Path, options: &[&str]) -> Daemon {
        Daemon::start_with(dir, options, &[])
    }

    fn start_with(dir: &Path, options: &[&str], environment: &[(&str, &str)]) -> Daemon {
        let log = std::fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
        let child = Command::new(PROGRAM)
            .args(["serve", "--metrics", "none", "--run-dir"])
            .arg(dir.join("run"))
            .args(options)
            .envs(environment.iter().copied())
            .stderr(log)
            .spawn()
            .unwrap();
        let daemon = Daemon { child, dir: dir.to_owned() };
        daemon.wait_until("it answers", || daemon.ctl(&["version"]).status.success());
        daemon
    }

    fn wait_until(&self, what: &str, mut check: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !check() {
            let log = || std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "never: {what}; log:\n{}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn ctl(&self, args: &[&str]) -> Output {
        ctl(&self.dir.join("run/ctl.sock"), args)
    }

    /// Standard output of a command that must succeed.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.ctl(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Exit code and standard error of a command that must not succeed.
    fn refused(&self, args: &[&str]) -> (i32, String) {
        let output = self.ctl(args);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    fn exit_code(mut self) -> Option<i32> {
        let status = self.child.wait().unwrap();
        status.code()
    }

    fn socket(&self, disk: &str) -> PathBuf {
        self.dir.join("run/nbd").join(format!("{disk}.sock"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ctl(socket: &Path, args: &[&str]) -> Output {
    Command::new(PROGRAM)
        .arg("ctl")
        .arg("--ctl")
        .arg(socket)
        .args(args)
        .env_remove("BLKTAPD_CTL")
        .output()
        .unwrap()
}

fn image(dir: &Path, name: &str, bytes: u64) -> String {
    let path = dir.join(name);
    std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    format!("raw:{}", path.display())
}

/// Whether a program is there; says so if not.
fn has(program: &str, package: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    let found = found.is_ok_and(|status| status.success());
    if !found {
        println!("skipped: {program} is not there (Debian: package {package})");
    }
    found
}

/// Runs a client that must succeed.
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// Bytes that do not repeat.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..bytes / 8).flat_map(|_| next()).collect()
}

#[test]
fn exit_codes_and_messages_are_those_of_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = ctl(&dir.path().join("none.sock"), &["list"]);
    assert_eq!(nobody.status.code(), Some(5), "{}", String::from_utf8_lossy(&nobody.stderr));
    let daemon = Daemon::start(dir.path(), &[]);
    let spec = image(dir.path(), "a.img", 1 << 20);
    let uri = daemon.ok(&["attach", "d1", &spec, "--nbd", "--iops", "500"]);
    assert_eq!(uri, format!("nbd+unix:///d1?socket={}\n", daemon.socket("d1").display()));
    assert_eq!(
        daemon.ok(&["attach", "d1", &spec, "--nbd", "--iops", "500"]),
        uri,
        "repeating it is no error"
    );
    let (code, message) = daemon.refused(&["attach", "d1", &spec, "--nbd"]);
    assert!(code == 4 && message.contains("limits {\"iops\":500} instead of {}"), "{code} {message}");
    let (code, message) = daemon.refused(&["attach", "d2", &spec, "--nbd"]);
    assert!(code == 4 && message.contains("d1"), "{code} {message}");
    let cases: [(&[&str], i32, &str); 11] = [
        (&["qos", "d1", "--bps-burst", "7M"], 2, "a burst of bps is given, and no rate"),
        (
            &["qos", "--group", "g", "--iops-read-one-time-burst", "7"],
            2,
            "give iops_read (--iops-read) as well",
        ),
        (&["attach", "d2", "null:?size=1M", "--nbd", "--iops-one-time-burst", "7"], 2, "no rate"),
        (&["attach", "d2", "null:?size=1M"], 2, "--nbd"),
        (&["attach", "a/b", "null:?size=1M", "--nbd"], 2, "contains '/'"),
        (&["attach", "d2", "vmdk:/x", "--nbd"], 2, "not built"),
        (&["attach", "d2", "raw:/no/such.img", "--nbd"], 1, "/no/such.img"),
        (&["show", "d9"], 3, "no disk \"d9\""),
        (&["detach", "d9"], 3, "no disk \"d9\""),
        (&["move", "d1", "99"], 2, "no shard 99"),
        (&["qos", "d1", "--iops-burst", "7x"], 2, "7x"),
    ];
    for (args, expected_code, expected) in cases {
        let (code, message) = daemon.refused(args);
        assert!(code == expected_code && message.contains(expected), "{args:?}: {code} {message}");
    }
    let listed: serde_json::Value = serde_json::from_str(&daemon.ok(&["list", "--json"])).unwrap();
    assert_eq!((&listed[0]["name"], &listed[0]["limits"]["iops"]), (&"d1".into(), &500.into()));
    assert!(daemon.ok(&["qos", "d1", "--iops", "0"]).contains('-'));
    assert!(daemon.ok(&["list"]).contains("running") && daemon.ok(&["events"]).contains("attached"));
    assert!(daemon.ok(&["shards"]).lines().count() >= 2);
    daemon.signal(Signal::SIGSTOP);
    let (code, message) = daemon.refused(&["--timeout", "0", "list"]);
    daemon.signal(Signal::SIGCONT);
    assert!(code == 6 && message.contains("has not answered"), "{code} {message}");
    assert_eq!(daemon.ok(&["detach", "d1"]), "");
    let second =
        Command::new(PROGRAM).args(["serve", "--run-dir"]).arg(dir.path().join("run")).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("belongs to a running blktapd"));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.exit_code(), Some(0));
    assert!(!dir.path().join("run/ctl.sock").exists());
}

#[test]
fn data_survives_a_kill_and_attachments_come_back() {
    if !has("nbdcopy", "libnbd-bin") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = image(dir.path(), "a.img", 16 << 20);
    let daemon = Daemon::start(dir.path(), &[]);
    let uri = daemon.ok(&["attach", "d1", &spec, "--nbd"]).trim().to_owned();
    daemon.ok(&["attach", "gone", &image(dir.path(), "gone.img", 1 << 20), "--nbd"]);
    let (source, copy) = (dir.path().join("source"), dir.path().join("copy"));
    std::fs::write(&source, noise(16 << 20)).unwrap();
    run("nbdcopy", &["--flush", source.to_str().unwrap(), &uri]);
    drop(daemon);
    std::fs::remove_file(dir.path().join("gone.img")).unwrap();
    let daemon = Daemon::start(dir.path(), &[]);
    daemon.wait_until("d1 is restored", || daemon.ok(&["show", "d1"]).contains("running"));
    run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&source).unwrap(), "the copy differs");
    // Failed it is from the start; the reason tells that it was tried.
    daemon.wait_until("the other was tried", || daemon.ok(&["show", "gone"]).contains("no such file"));
    let gone: serde_json::Value = serde_json::from_str(&daemon.ok(&["show", "gone", "--json"])).unwrap();
    assert_eq!(gone["state"], "failed");
    assert!(gone["reason"].as_str().unwrap().contains("gone.img"), "{gone}");
    image(dir.path(), "gone.img", 1 << 20);
    daemon.ok(&["resume", "gone"]);
    assert!(daemon.ok(&["show", "gone"]).contains("running"), "resume tries a failed disk at once");
}

#[test]
fn a_disk_moves_and_is_refused_to_be_detached_under_verified_load() {
    if !has("fio", "fio") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path(), &[]);
    let shards: serde_json::Value = serde_json::from_str(&daemon.ok(&["shards", "--json"])).unwrap();
    let shards = shards.as_array().unwrap().len();
    if shards < 2 {
        println!("skipped: one CPU, so there is no second shard");
        return;
    }
    // At this limit fio takes a minute: it ends when the limit does, however long the moves take.
    let image = image(dir.path(), "a.img", 32 << 20);
    let uri = daemon.ok(&["attach", "d1", &image, "--nbd", "--iops", "200"]).trim().to_owned();
    let fio = Command::new("fio")
        .args(["--name=x", "--ioengine=nbd", "--rw=randrw", "--bs=4k", "--iodepth=16", "--size=32M"])
        .args(["--verify=crc32c", &format!("--uri={uri}")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    daemon.wait_until("fio is connected", || daemon.ok(&["show", "d1"]).contains("(fio)"));
    for n in 0..20 {
        daemon.ok(&["move", "d1", &(n % 2).to_string()]);
    }
    let (code, message) = daemon.refused(&["detach", "d1", "--timeout", "0"]);
    assert!(code == 4 && message.contains("(fio)"), "{code} {message}");
    daemon.ok(&["qos", "d1", "--iops", "0"]);
    for n in 0..20 {
        daemon.ok(&["move", "d1", &(n % 2).to_string()]);
    }
    let output = fio.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    daemon.ok(&["detach", "d1"]);
    assert!(!daemon.socket("d1").exists());
}

#[test]
fn a_panic_in_one_disk_is_its_own_matter() {
    let dir = tempfile::tempdir().unwrap();
    let cpu = core_affinity::get_core_ids().unwrap()[0].id.to_string();
    let daemon = Daemon::start(dir.path(), &["--fault-commands", "--cpus", &cpu]);
    daemon.ok(&["attach", "a", &image(dir.path(), "a.img", 1 << 20), "--nbd"]);
    daemon.ok(&["attach", "b", &image(dir.path(), "b.img", 1 << 20), "--nbd"]);
    let before = daemon.ok(&["show", "b"]);
    let _ = daemon.ctl(&["inject-panic", "a"]);
    daemon.wait_until("it is told", || daemon.ok(&["events"]).contains("quarantined"));
    assert_eq!(before.lines().nth(1), daemon.ok(&["show", "b"]).lines().nth(1), "the neighbour runs on");
    daemon.ok(&["detach", "b"]);
    daemon.ok(&["detach", "a", "--force"]);
    let without = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(without.path(), &[]);
    daemon.ok(&["attach", "a", "null:?size=1M", "--nbd"]);
    assert!(!daemon.ctl(&["inject-panic", "a"]).status.success());
}

#[test]
fn the_service_manager_hears_what_happens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let hear = |wanted: &str| {
        let mut buffer = [0; 4096];
        loop {
            let count =
                manager.recv(&mut buffer).unwrap_or_else(|error| panic!("{wanted} was not heard: {error}"));
            if String::from_utf8_lossy(&buffer[..count]).contains(wanted) {
                return;
            }
        }
    };
    let environment = [("NOTIFY_SOCKET", path.to_str().unwrap()), ("WATCHDOG_USEC", "2000000")];
    let daemon = Daemon::start_with(dir.path(), &[], &environment);
    hear("READY=1");
    hear("WATCHDOG=1");
    daemon.signal(Signal::SIGHUP);
    hear("RELOADING=1");
    hear("READY=1");
    daemon.signal(Signal::SIGTERM);
    hear("STOPPING=1");
    assert_eq!(daemon.exit_code(), Some(0));
}

#[test]
fn sockets_of_the_service_manager_are_served() {
    if !has("systemd-socket-activate", "systemd") || !has("nbdinfo", "libnbd-bin") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (nbd, control) = (dir.path().join("nbd.act"), dir.path().join("ctl.act"));
    let mut activator = Command::new("systemd-socket-activate")
        .arg("-l")
        .arg(&nbd)
        .arg("-l")
        .arg(&control)
        .args(["--fdname=nbd:ctl", PROGRAM, "serve", "--metrics", "none", "--run-dir"])
        .arg(dir.path().join("run"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !nbd.exists() || !control.exists() {
        assert!(Instant::now() < deadline, "the activator has not bound its sockets");
        std::thread::sleep(Duration::from_millis(20));
    }
    let attached = ctl(&control, &["attach", "d1", "null:?size=1M", "--nbd"]);
    let size = Command::new("nbdinfo")
        .args(["--size", &format!("nbd+unix:///d1?socket={}", nbd.display())])
        .output();
    let _ = kill(Pid::from_raw(activator.id() as i32), Signal::SIGTERM);
    let _ = activator.wait();
    assert!(attached.status.success(), "{}", String::from_utf8_lossy(&attached.stderr));
    assert_eq!(String::from_utf8_lossy(&size.unwrap().stdout).trim(), "1048576");
}

/// Where the group blktapd-ro exists, its members find the socket open to them, to read only; nobody has configured anything.
#[test]
fn members_of_the_readers_group_may_read_and_nobody_else_may() {
    use std::os::unix::fs::PermissionsExt;
    const GROUP: u32 = 4711;
    let dir = tempfile::tempdir().unwrap();
    // Other users have to get at the program and the socket, whatever the mask of this user is.
    let open = |path: &Path| std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    open(dir.path());
    let is_open =
        |dir: &Path| std::fs::metadata(dir).is_ok_and(|found| found.permissions().mode() & 0o1 != 0);
    if !dir.path().ancestors().all(is_open) {
        println!("skipped: {} is closed to others", dir.path().display());
        return;
    }
    let program = dir.path().join("blktapd");
    std::fs::copy(PROGRAM, &program).unwrap();
    open(&program);
    let group_file = dir.path().join("group");
    std::fs::write(&group_file, format!("root:x:0:\nblktapd-ro:x:{GROUP}:\n")).unwrap();
    // A mount namespace in which the host has that group.
    let inside = |script: &str| {
        let script =
            format!("mount --bind {} /etc/group && umask 022 && exec {script}", group_file.display());
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]).stderr(Stdio::null());
        command
    };
    if !inside("true").status().is_ok_and(|status| status.success()) {
        println!("skipped: no mount namespace here (it takes root)");
        return;
    }
    let run_dir = dir.path().join("run");
    let serve = format!("{} serve --metrics none --run-dir {}", program.display(), run_dir.display());
    let daemon = Daemon { child: inside(&serve).spawn().unwrap(), dir: dir.path().to_owned() };
    daemon.wait_until("it answers", || daemon.ctl(&["version"]).status.success());
    daemon.ok(&["attach", "a", "null:?size=1M", "--nbd"]);
    let socket = run_dir.join("ctl.sock");
    let found = std::fs::metadata(&socket).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::gid(&found), GROUP);
    assert_eq!(found.permissions().mode() & 0o777, 0o660);
    let as_other = |group: u32, args: &[&str]| {
        let output = Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", &group.to_string(), "--clear-groups", "--"])
            .arg(&program)
            .args(["ctl", "--ctl", socket.to_str().unwrap()])
            .args(args)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let (code, text) = as_other(GROUP, &["list"]);
    assert!(code == Some(0) && text.contains("null:"), "{code:?}: {text}");
    let (code, text) = as_other(GROUP, &["detach", "a"]);
    assert!(code == Some(1) && text.contains("only read"), "{code:?}: {text}");
    let (code, text) = as_other(65534, &["list"]);
    assert!(code != Some(0) && text.contains("blktapd-ro"), "{code:?}: {text}");
    daemon.ok(&["detach", "a"]);
}

#[test]
fn tls_with_keys_on_tcp() {
    if !has("nbdinfo", "libnbd-bin") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    std::fs::write(&keys, format!("alice:{}\n", "5a".repeat(32))).unwrap();
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port},tls");
    let daemon = Daemon::start(dir.path(), &["--nbd-listen", &listen, "--tls-psk", keys.to_str().unwrap()]);
    daemon.ok(&["attach", "d1", "null:?size=1M", "--nbd"]);
    let uri = format!("nbds://alice@127.0.0.1:{port}/d1?tls-psk-file={}", keys.display());
    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), "1048576");
    let plain =
        Command::new("nbdinfo").args(["--size", &format!("nbd://127.0.0.1:{port}/d1")]).output().unwrap();
    assert!(!plain.status.success(), "a listener with TLS takes nobody without");
}

#[test]
fn what_serve_is_told_wrongly_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("wrong.toml");
    std::fs::File::create(&config).unwrap().write_all(b"[metrics]\nlistn = 'x'\n").unwrap();
    let long = format!("/tmp/{}", "x".repeat(120));
    let cases: [(&[&str], i32, &str); 5] = [
        (&["--config", config.to_str().unwrap()], 2, "wrong.toml:2:1: unknown field `listn`"),
        (&["--cpus", "3-1"], 2, "the CPU list is \"3-1\""),
        (&["--run-dir", &long], 2, "at most 107"),
        (&["--nbd-listen", "here"], 2, "the NBD address is \"here\""),
        (&["--log", "a=b=c"], 2, "log filter"),
    ];
    for (args, code, expected) in cases {
        let mut child = Command::new(PROGRAM)
            .arg("serve")
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut message = String::new();
        child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{args:?}: {message}");
        assert!(message.contains(expected), "{args:?}: {message}");
    }
}
