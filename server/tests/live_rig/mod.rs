//! A real daemon for end-to-end tests: the built program in a run directory of its own, driven by `ctl` and by
//! programs that we did not write.
//!
//! Invariants: everything has a deadline; nothing is left behind (the daemon is killed by its pid, also when the
//! test program dies); a daemon that panicked, ended by itself or does not stop on SIGTERM fails the test, and its
//! log is printed with every failure.

#![allow(dead_code, reason = "each test program uses its part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test is what they are for")]

pub mod load;
pub mod model;
pub mod nbd_client;

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blktapd::ram_dir::RamDir;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine; what takes longer is stuck.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The program under test.
pub const BLKTAPD: &str = env!("CARGO_BIN_EXE_blktapd");

/// The first CPU of the next daemon, so that tests that run at once spread.
static NEXT_CPU: AtomicUsize = AtomicUsize::new(0);

/// A daemon and its directory.
pub struct Rig {
    dir: TempDir,
    cpus: String,
    arguments: Vec<String>,
    daemon: Option<Child>,
    panics_expected: bool,
}

impl Rig {
    /// A daemon of one shard.
    pub fn start() -> Rig {
        Rig::with(1, &[])
    }

    /// A daemon of up to `shards` shards (as many as there are CPUs) with these options of `serve` besides.
    pub fn with(shards: usize, arguments: &[&str]) -> Rig {
        let mut cpus = core_affinity::get_core_ids().expect("the CPUs of this process");
        let first = NEXT_CPU.fetch_add(1, Ordering::Relaxed) % cpus.len();
        cpus.rotate_left(first);
        let cpus: Vec<String> = cpus.iter().take(shards).map(|cpu| cpu.id.to_string()).collect();
        let mut rig = Rig {
            // Short: paths of sockets are limited to 107 bytes.
            dir: tempfile::Builder::new().prefix("blktapd-").tempdir().expect("a temporary directory"),
            cpus: cpus.join(","),
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            daemon: None,
            panics_expected: false,
        };
        rig.restart();
        rig
    }

    /// Starts the daemon (again) on the same directories and waits until it answers. Disks may still be opening.
    pub fn restart(&mut self) {
        assert!(self.daemon.is_none(), "it runs");
        let log = File::options().create(true).append(true).open(self.path("log")).expect("the log opens");
        // A test program that is killed takes its daemon along.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", BLKTAPD, "serve", "--cpus", &self.cpus, "--metrics", "none"])
            .arg("--run-dir")
            .arg(self.run_dir())
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("dup"))
            .stderr(log)
            .spawn();
        self.daemon = Some(child.unwrap_or_else(|error| panic!("{}", missing("setpriv", &error))));
        let deadline = Instant::now() + PATIENCE;
        while self.ctl(&["version"]).code != Some(0) {
            let ended = self.daemon.as_mut().expect("started").try_wait().expect("wait");
            assert!(ended.is_none(), "the daemon ended with {ended:?}:\n{}", self.log());
            assert!(Instant::now() < deadline, "the daemon does not answer:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("it runs").id()
    }

    /// kill -9, and waits until it is gone.
    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("it runs");
        let ended = daemon.try_wait().expect("wait");
        daemon.kill().expect("kill");
        daemon.wait().expect("wait");
        assert!(ended.is_none(), "the daemon had ended with {ended:?}:\n{}", self.log());
    }

    /// SIGTERM; returns how it ended.
    pub fn terminate(&mut self) -> ExitStatus {
        let mut daemon = self.daemon.take().expect("it runs");
        kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).expect("SIGTERM");
        match wait(&mut daemon, PATIENCE) {
            Some(status) => status,
            None => {
                let _ = daemon.kill();
                let _ = daemon.wait();
                panic!("the daemon does not stop on SIGTERM:\n{}", self.log());
            }
        }
    }

    /// Waits until it ends by itself.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let daemon = self.daemon.as_mut().expect("it runs");
        let status =
            wait(daemon, PATIENCE).unwrap_or_else(|| panic!("the daemon does not end:\n{}", self.log()));
        self.daemon = None;
        status
    }

    /// This test makes the daemon panic on purpose.
    pub fn expect_panics(&mut self) {
        self.panics_expected = true;
    }

    /// What the daemon has logged, over all its lives.
    pub fn log(&self) -> String {
        fs::read(self.path("log"))
            .map(|text| String::from_utf8_lossy(&text).into_owned())
            .unwrap_or_else(|error| format!("(no log: {error})"))
    }

    /// A path beside the run directory, for images and the like.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// RUN_DIR.
    pub fn run_dir(&self) -> PathBuf {
        self.path("run")
    }

    /// A new sparse file of this length.
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).and_then(|file| file.set_len(bytes)).expect("create an image");
        path
    }

    /// `blktapd ctl` with these arguments.
    pub fn ctl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(BLKTAPD);
        command.arg("ctl").arg("--ctl").arg(self.run_dir().join("ctl.sock")).args(arguments);
        command
    }

    /// Runs `blktapd ctl`.
    pub fn ctl(&self, arguments: &[&str]) -> Outcome {
        run_command(&mut self.ctl_command(arguments), PATIENCE)
    }

    /// Runs `blktapd ctl`, which must succeed; returns what it printed.
    pub fn ctl_ok(&self, arguments: &[&str]) -> String {
        self.ctl(arguments).expect_ok()
    }

    /// Runs `blktapd ctl --json`, which must succeed; returns what it printed.
    pub fn ctl_json(&self, arguments: &[&str]) -> Value {
        let text = self.ctl_ok(&[&["--json"], arguments].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments:?} printed {text}: {error}"))
    }

    /// `ctl attach NAME SPEC --nbd` with more options; returns the address of its own socket.
    pub fn attach(&self, name: &str, spec: &str, options: &[&str]) -> String {
        self.ctl_ok(&[&["attach", name, spec, "--nbd"], options].concat());
        self.uri(name)
    }

    /// Waits until a disk is in this state, after a restart for example.
    pub fn wait_for_state(&self, name: &str, state: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let outcome = self.ctl(&["--json", "show", name]);
            let shown: Option<Value> = serde_json::from_str(&outcome.stdout).ok();
            if shown.is_some_and(|disk| disk["state"] == state) {
                return;
            }
            assert!(Instant::now() < deadline, "{name} is not {state}: {outcome:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The socket of one disk.
    pub fn socket(&self, disk: &str) -> PathBuf {
        self.run_dir().join("nbd").join(format!("{disk}.sock"))
    }

    /// Address of a disk at its own socket, with the empty export name.
    pub fn uri(&self, disk: &str) -> String {
        format!("nbd+unix:///?socket={}", self.socket(disk).display())
    }

    /// Address of a disk at the socket of all exports.
    pub fn uri_by_name(&self, disk: &str) -> String {
        format!("nbd+unix:///{disk}?socket={}", self.run_dir().join("nbd.sock").display())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        let status = match self.daemon.take() {
            Some(mut daemon) if failed => {
                eprintln!("--- threads of the daemon ---\n{}", threads(daemon.id()));
                let _ = daemon.kill();
                daemon.wait().ok()
            }
            Some(daemon) => {
                self.daemon = Some(daemon);
                Some(self.terminate())
            }
            None => None,
        };
        // RAM disks outlive a daemon; this directory does not.
        let _ = fs::remove_dir_all(RamDir::new(None, &self.run_dir()).in_shm());
        let log = self.log();
        if failed {
            eprintln!("--- log of the daemon ---\n{log}--- end of the log ---");
            return;
        }
        assert!(status.is_none_or(|status| status.success()), "the daemon ended with {status:?}:\n{log}");
        assert!(self.panics_expected || !log.contains("panicked"), "the daemon panicked:\n{log}");
    }
}

/// Where the threads of a process are in the kernel, if anywhere: for one that hangs.
fn threads(pid: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let line = |task: fs::DirEntry| {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let (name, waits, call) = (read("comm"), read("wchan"), read("syscall"));
        format!("{}: {waits}, system call {}", name.trim(), call.trim())
    };
    tasks.map(line).collect::<Vec<_>>().join("\n")
}

/// How a program ended.
#[derive(Debug)]
pub struct Outcome {
    /// The command line, for messages.
    pub line: String,
    /// Exit code; `None` when a signal ended it, as at the deadline.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// What it printed; fails the test when the program failed.
    #[track_caller]
    pub fn expect_ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}\n{}{}", self.line, self.stdout, self.stderr);
        self.stdout
    }

    /// What it printed and said; fails the test when the program succeeded or was killed.
    #[track_caller]
    pub fn expect_failure(self) -> String {
        assert!(self.code.is_some_and(|code| code != 0), "{}: {self:?}", self.line);
        self.stdout + &self.stderr
    }
}

/// Runs a program to its end, at most [`PATIENCE`] long. A program that is not installed fails the test.
pub fn run(program: &str, arguments: &[&str]) -> Outcome {
    run_command(Command::new(program).args(arguments), PATIENCE)
}

/// Runs a program to its end; at the deadline, it and its children are killed.
pub fn run_command(command: &mut Command, limit: Duration) -> Outcome {
    Running::start(command).finish(limit)
}

/// A program in the background; it and its children are killed when dropped.
pub struct Running {
    child: Child,
    line: String,
    stdout: File,
    stderr: File,
}

impl Running {
    /// Starts a program. One that is not installed fails the test.
    pub fn start(command: &mut Command) -> Running {
        let program = command.get_program().to_string_lossy().into_owned();
        let line = format!("{command:?}");
        // Files, not pipes: nobody has to read them for the program to go on.
        let output = || tempfile::tempfile().expect("a temporary file");
        let (stdout, stderr) = (output(), output());
        let child = command
            .stdin(Stdio::null())
            .stdout(stdout.try_clone().expect("dup"))
            .stderr(stderr.try_clone().expect("dup"))
            .process_group(0)
            .spawn();
        let child = child.unwrap_or_else(|error| panic!("{}", missing(&program, &error)));
        Running { child, line, stdout, stderr }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// What it printed up to now.
    pub fn printed(&mut self) -> String {
        whole(&mut self.stdout)
    }

    /// Waits for its end; at the deadline, it and its children are killed.
    pub fn finish(mut self, limit: Duration) -> Outcome {
        let status = wait(&mut self.child, limit);
        let late = if status.is_none() { format!("\n(killed after {limit:?})") } else { String::new() };
        Outcome {
            line: self.line.clone(),
            code: status.and_then(|status| status.code()),
            stdout: whole(&mut self.stdout),
            stderr: whole(&mut self.stderr) + &late,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // Not reaped yet, so the number of the group is still this program's.
            let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

fn whole(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("read what it printed");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// How a child ended, or `None` at the deadline.
fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        match child.try_wait().expect("wait") {
            Some(status) => return Some(status),
            None if Instant::now() >= deadline => return None,
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The message for a program that does not start.
fn missing(program: &str, error: &std::io::Error) -> String {
    let package = match program {
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "nbdsh" | "/usr/bin/python3" => "python3-libnbd",
        "qemu-img" | "qemu-io" | "qemu-nbd" => "qemu-utils",
        "certtool" | "psktool" => "gnutls-bin",
        "losetup" | "setpriv" | "mount" => "util-linux",
        "mkfs.ext4" => "e2fsprogs",
        other => other,
    };
    format!("cannot run {program}: {error}; the Debian package {package} has it")
}

/// Waits until `done`, or fails after [`PATIENCE`].
#[track_caller]
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Says why a test cannot run on this host; it then passes without having shown anything.
pub fn skip(test: &str, reason: &str) {
    // Not by the macro, whose output is hidden when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

/// `raw:PATH` for `ctl attach`.
pub fn raw(path: &Path) -> String {
    format!("raw:{}", path.display())
}

/// A TCP port of this host that nobody uses right now.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    listener.local_addr().expect("address").port()
}

/// Bytes that look like no others, the same for the same seed: splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

/// Runs Python statements with `h` connected to `uri` by libnbd, and `nbd` its module.
pub fn nbdsh(uri: &str, script: &str) -> Outcome {
    nbdsh_after("", uri, script)
}

/// The same with statements that prepare `h` before it connects.
pub fn nbdsh_after(prepare: &str, uri: &str, script: &str) -> Outcome {
    let script =
        format!("import nbd\nh = nbd.NBD()\n{prepare}\nh.connect_uri({uri:?})\n{script}\nh.shutdown()\n");
    // Debian's own interpreter: another one on the PATH would not find the module.
    run("/usr/bin/python3", &["-c", &script])
}

/// Random reads and writes by `jobs` jobs of fio at once, each with a connection and a part of the disk of its own
/// (`--size`), and then everything that was written is read and its checksums are compared.
pub fn fio_verified(uri: &str, jobs: u32, options: &[&str]) {
    let size = options.iter().find_map(|option| option.strip_prefix("--size=")).expect("a size");
    let fixed = [
        "--name=verify",
        "--ioengine=nbd",
        &format!("--uri={uri}"),
        &format!("--numjobs={jobs}"),
        &format!("--offset_increment={size}"),
        "--rw=randrw",
        "--rwmixread=30",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--randseed=7",
        "--fsync=64",
        "--group_reporting",
        "--output-format=json",
    ];
    // It flushes some hundred times, which takes a slow disk long.
    let mut fio = Command::new("fio");
    let Outcome { code, stdout, stderr, line } = run_command(fio.args(fixed).args(options), 3 * PATIENCE);
    let start = stdout.find('{').unwrap_or_default();
    let end = stdout.rfind('}').map_or(stdout.len(), |end| end + 1);
    let (said, json) = (format!("{}{stderr}", &stdout[..start]), &stdout[start..end]);
    assert_eq!(code, Some(0), "{line}\n{said}");
    let report: Value = serde_json::from_str(json).unwrap_or_else(|error| panic!("{error} in {json}"));
    let job = &report["jobs"][0];
    let [read, written] = ["read", "write"].map(|way| job[way]["io_bytes"].as_u64().expect("a number"));
    assert_eq!(job["error"], 0, "{line}\n{said}");
    // It read more than the load alone does: it verified what it wrote.
    assert!(written > 0 && read >= written, "{read} bytes read, {written} written: {line}\n{said}");
}
