//! What the tests of files need from the host: mounts, loop devices and programs, undone in every case.
#![allow(dead_code, reason = "each test program uses its part")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use blktapd::files::{Files, OpenRequest};
use shard::api::CacheMode;
use tempfile::TempDir;
use tokio::sync::{Mutex, OwnedMutexGuard};

/// Longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Tests of one program take turns: between fork and exec a child has every descriptor of its parent, and
/// with them the locks that another test has just given up.
static TURN: LazyLock<Arc<Mutex<()>>> = LazyLock::new(Arc::default);

/// A directory with a run directory in it, and the files of a daemon that runs there.
pub struct Rig {
    pub files: Files,
    pub dir: TempDir,
    _turn: OwnedMutexGuard<()>,
}

impl Rig {
    pub async fn new() -> Rig {
        Rig::with_roots(|_| Vec::new()).await
    }

    pub async fn with_roots(roots: impl FnOnce(&Path) -> Vec<PathBuf>) -> Rig {
        let _turn = TURN.clone().lock_owned().await;
        let dir = tempfile::tempdir().expect("temporary directory");
        let run_dir = dir.path().join("run");
        fs::create_dir(&run_dir).expect("run directory");
        let files = Files::new(roots(dir.path()), &run_dir).expect("no roots, or absolute ones");
        Rig { files, dir, _turn }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A sparse file of this length.
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        make_image(&self.path(name), bytes)
    }
}

pub fn make_image(path: &Path, bytes: u64) -> PathBuf {
    File::create(path).and_then(|file| file.set_len(bytes)).expect("create an image");
    path.to_owned()
}

/// A request of the disk "d1" to write through O_DIRECT.
pub fn request(path: &Path) -> OpenRequest {
    OpenRequest {
        path: path.to_owned(),
        read_only: false,
        cache: CacheMode::None,
        sector: None,
        formatted: false,
        user: "d1".into(),
        deadline: PATIENCE,
    }
}

/// The same for a reader.
pub fn reader(path: &Path, user: &str) -> OpenRequest {
    OpenRequest { read_only: true, user: user.into(), ..request(path) }
}

/// Runs a program to its end: success, and what it said.
pub fn run(program: &str, arguments: &[&str]) -> (bool, String) {
    match Command::new(program).args(arguments).output() {
        Ok(output) => {
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.push_str(&String::from_utf8_lossy(&output.stderr));
            (output.status.success(), text)
        }
        Err(error) => (false, format!("{program}: {error}")),
    }
}

/// Says why a test cannot run here; it then passes without having shown anything.
pub fn skip(test: &str, reason: &str) {
    // Not by the macro, whose output is hidden when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

pub fn has_program(name: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()))
}

/// A mounted file system; unmounted when dropped.
pub struct Mounted {
    pub point: PathBuf,
}

impl Mounted {
    /// `mount -t TYPE SOURCE POINT`; the error is the reason for a skip.
    pub fn new(point: &Path, fs_type: &str, source: &str) -> Result<Mounted, String> {
        fs::create_dir_all(point).map_err(|error| error.to_string())?;
        let point_text = point.to_string_lossy();
        match run("mount", &["-t", fs_type, source, &point_text]) {
            (true, _) => Ok(Mounted { point: point.to_owned() }),
            (false, why) => Err(format!("cannot mount {fs_type}: {why}")),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let (done, why) = run("umount", &["-l", &self.point.to_string_lossy()]);
        if !done {
            eprintln!("left mounted: {}: {why}", self.point.display());
        }
    }
}

/// A loop device; detached when dropped.
pub struct Loop {
    pub node: PathBuf,
}

impl Loop {
    pub fn new(image: &Path, options: &[&str]) -> Result<Loop, String> {
        let mut arguments = vec!["-f", "--show"];
        arguments.extend_from_slice(options);
        let image = image.to_string_lossy();
        arguments.push(&image);
        match run("losetup", &arguments) {
            (true, node) => Ok(Loop { node: node.trim().into() }),
            (false, why) => Err(format!("no loop device: {why}")),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let (done, why) = run("losetup", &["-d", &self.node.to_string_lossy()]);
        if !done {
            eprintln!("left attached: {}: {why}", self.node.display());
        }
    }
}

/// A program in the background; killed when dropped.
pub struct Running {
    child: Child,
    /// Kept open: a program whose output nobody can read may end.
    _output: Option<BufReader<ChildStdout>>,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("it is our child");
    }

    /// Some thread of it waits in the kernel and cannot be killed there (state D).
    pub fn is_uninterruptible(&self) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        let status = |task: fs::DirEntry| fs::read_to_string(task.path().join("status")).unwrap_or_default();
        tasks.map(status).any(|text| text.contains("\nState:\tD"))
    }

    pub fn start(command: &mut Command) -> Running {
        Running { child: command.spawn().expect("the program starts"), _output: None }
    }

    /// Starts a program and waits until it prints a line; `None` when it ended before.
    pub fn until_it_speaks(command: &mut Command) -> Option<Running> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
        let mut output = BufReader::new(child.stdout.take()?);
        let read = output.read_line(&mut String::new());
        let running = Running { child, _output: Some(output) };
        read.is_ok_and(|bytes| bytes > 0).then_some(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `done`, or fails after [`PATIENCE`].
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether files in this directory can be opened past the page cache: those of a tmpfs since Linux 6.6.
pub fn takes_direct_io(dir: &Path) -> bool {
    use std::os::unix::fs::OpenOptionsExt;
    let path = dir.join("probe");
    let mut options = File::options();
    let opened = options.write(true).create_new(true).custom_flags(libc::O_DIRECT).open(&path);
    let _ = fs::remove_file(path);
    opened.is_ok()
}

/// Whether a read of `length` bytes at `offset`, in memory aligned to `align` and no coarser, is taken.
pub fn read_works(image: &shard::api::ImageFile, offset: u64, length: usize, align: usize) -> bool {
    let file = File::from(image.fd.try_clone().expect("dup"));
    let mut buffer = vec![0_u8; length + 3 * 8192];
    let start = buffer.as_ptr().align_offset(8192) + if align < 8192 { align } else { 0 };
    file.read_at(&mut buffer[start..start + length], offset).is_ok()
}
