//! A mount that never answers, and a predecessor whose operations have not ended.

mod files_rig;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use blktapd::files::{Fence, OpenErrorKind, OpenRequest, Released};
use files_rig::{
    Loop, Mounted, PATIENCE, Rig, Running, has_program, make_image, reader, request, run, skip, wait_until,
};

/// A FUSE mount whose server never reads a request: every look-up in it hangs until the server ends.
fn dead_mount(rig: &Rig) -> Result<(Running, Mounted), String> {
    let point = rig.path("dead");
    fs::create_dir(&point).map_err(|error| error.to_string())?;
    let script = "exec 3<>/dev/fuse && mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 \
    dead-server \"$0\" && echo mounted && read line";
    let server = Running::until_it_speaks(Command::new("sh").arg("-c").arg(script).arg(&point))
        .ok_or("cannot mount FUSE here")?;
    Ok((server, Mounted { point }))
}

/// Goal: a dead mount costs those who ask for it their deadline, with an error that names mount, path and
/// time, and nobody else anything; even a link into it from a healthy directory hangs in the dead mount's
/// lane. When it comes to life (here: goes away) the threads are free. Method: a FUSE server that never
/// answers.
#[tokio::test]
async fn dead_mount_stops_nothing_else() {
    let rig = Rig::new().await;
    let (server, mounted) = match dead_mount(&rig) {
        Ok(dead) => dead,
        Err(why) => return skip("dead_mount_stops_nothing_else", &why),
    };
    let healthy = rig.image("healthy.img", 8192);
    symlink(mounted.point.join("disk.img"), rig.path("link")).expect("symlink");
    // Time enough for what does not hang.
    let short = Duration::from_millis(500);
    for round in 0..8 {
        let path = if round % 2 == 0 { mounted.point.join("disk.img") } else { rig.path("link") };
        let asked = OpenRequest { deadline: short, ..request(&path) };
        let error = rig.files.open(asked).await.expect_err("it hangs");
        assert_eq!(error.kind, OpenErrorKind::Timeout, "{error}");
        let mount = format!("{} (fuse from dead-server)", mounted.point.display());
        let path = path.display().to_string();
        for part in [mount.as_str(), path.as_str(), " ms"] {
            assert!(error.message.contains(part), "{part} is missing in: {error}");
        }
    }
    // One thread for the healthy file system, and the dead mount's own few.
    assert!(rig.files.threads() <= 8, "{} threads", rig.files.threads());
    let opened = rig.files.open(request(&healthy)).await.expect("the neighbour works");
    let key = opened.key;
    drop(opened);
    assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
    assert_eq!(rig.files.entries(), []);
    drop(server);
    let error =
        rig.files.open(request(&mounted.point.join("disk.img"))).await.expect_err("the server is gone");
    assert_ne!(error.kind, OpenErrorKind::Timeout, "the lane works again: {error}");
}

/// Goal: after a crash an image is opened only when the predecessor's kernel operations have ended, parents
/// of readers included; without a predecessor at once. Method: another description holds the fence for a
/// while, as one with operations in flight does.
#[tokio::test]
async fn fence_is_waited_for() {
    let rig = Rig::new().await;
    let path = rig.image("disk.img", 8192);
    for read_only in [false, true] {
        let predecessor = File::open(&path).expect("open");
        rig.files.fence().hold(&predecessor).expect("locks work");
        let wanted = OpenRequest { read_only, ..request(&path) };
        let short = OpenRequest { deadline: Duration::from_millis(500), ..wanted.clone() };
        let error = rig.files.open(short).await.expect_err("fenced");
        assert_eq!(error.kind, OpenErrorKind::Timeout, "{error}");
        assert!(error.message.contains("a former blktapd"), "{error}");
        assert_eq!(rig.files.entries(), [], "nothing is left behind");

        let waiting = rig.files.open(wanted);
        tokio::pin!(waiting);
        let early = tokio::time::timeout(Duration::from_millis(100), waiting.as_mut()).await;
        assert!(early.is_err(), "it waits while the fence is held");
        drop(predecessor);
        let opened = waiting.await.expect("then it opens");
        let key = opened.key;
        drop(opened);
        assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
    }
}

/// Goal: every description for I/O carries the fence, the one for the last bytes too, until it is closed; a
/// tool's does not.
/// Method: keep one of the two descriptors alive beyond the release, and ask from outside.
#[tokio::test]
async fn every_description_carries_the_fence() {
    let rig = Rig::new().await;
    let path = rig.image("disk.img", 5000);
    let outside = File::open(&path).expect("open");
    let is_held = || rig.files.fence().is_held(&outside).expect("locks work");
    for keep_tail in [false, true] {
        assert!(!is_held());
        let opened = rig.files.open(reader(&path, "d1")).await.expect("opens");
        assert!(is_held());
        // A duplicate is the same description: it stands for an operation in flight.
        let kept = if keep_tail { opened.image.tail.as_ref() } else { Some(&opened.image.fd) };
        let kept = kept.expect("5000 bytes have a tail").try_clone().expect("dup");
        let key = opened.key;
        drop(opened);
        assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
        assert!(is_held(), "an operation is still out (tail: {keep_tail})");
        drop(kept);
    }
    assert!(!is_held());
}

const CHILD_PATH: &str = "BLKTAPD_TEST_FENCE_IMAGE";
const CHILD_WRITES: &str = "BLKTAPD_TEST_FENCE_WRITES";

/// Not a test: the process that the next ones start.
#[test]
fn child_that_holds_a_fence() {
    let Some(path) = std::env::var_os(CHILD_PATH) else { return };
    let path = std::path::PathBuf::from(path);
    let run_dir = path.parent().expect("a directory").join("run");
    let file = File::open(&path).expect("open");
    Fence::of_run_dir(&run_dir).and_then(|fence| fence.hold(&file)).expect("locks work");
    println!("held");
    if std::env::var_os(CHILD_WRITES).is_some() {
        let writer = File::options().write(true).open(&path).expect("open");
        loop {
            writer.write_all_at(&[1; 4096], 0).and_then(|()| writer.sync_data()).expect("write");
        }
    }
    let _ = std::io::stdin().read_line(&mut String::new());
}

fn start_holder(rig: &Rig, path: &Path, writes: bool) -> Running {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "child_that_holds_a_fence", "--nocapture"]).env(CHILD_PATH, path);
    if writes {
        command.env(CHILD_WRITES, "1");
    }
    let child = Running::until_it_speaks(&mut command).expect("starts");
    let outside = File::open(path).expect("open");
    wait_until("the child holds the fence", || rig.files.fence().is_held(&outside).expect("locks work"));
    child
}

/// A file system that lets no write through; thawed when dropped.
struct Frozen<'a>(&'a Mounted);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let (done, why) = run("fsfreeze", &["-u", &self.0.point.to_string_lossy()]);
        if !done {
            eprintln!("left frozen: {}: {why}", self.0.point.display());
        }
    }
}

/// Goal: after kill -9 the fence stands for as long as the kernel has a write of the dead process under way, and goes
/// by itself when that has landed.
/// Method: freeze the file system under a process that writes, kill it, try to open, thaw.
#[tokio::test]
async fn write_in_flight_keeps_the_fence() {
    let test = "write_in_flight_keeps_the_fence";
    let rig = Rig::new().await;
    let backing = rig.image("backing", 16 << 20);
    let (made, why) = run("mkfs.ext4", &["-q", &backing.to_string_lossy()]);
    if !made || !has_program("fsfreeze") {
        return skip(test, &format!("needs mkfs.ext4 and fsfreeze: {why}"));
    }
    let device = match Loop::new(&backing, &[]) {
        Ok(device) => device,
        Err(why) => return skip(test, &why),
    };
    let mounted = match Mounted::new(&rig.path("mnt"), "ext4", &device.node.to_string_lossy()) {
        Ok(mounted) => mounted,
        Err(why) => return skip(test, &why),
    };
    // The child finds its run directory beside the image.
    std::os::unix::fs::symlink(rig.path("run"), mounted.point.join("run")).expect("symlink");
    let path = make_image(&mounted.point.join("disk.img"), 8192);
    let mut child = start_holder(&rig, &path, true);
    let (done, why) = run("fsfreeze", &["-f", &mounted.point.to_string_lossy()]);
    if !done {
        return skip(test, &why);
    }
    let frozen = Frozen(&mounted);
    wait_until("the child hangs in its write", || child.is_uninterruptible());
    child.kill();
    // Read-only, since the frozen file system would hold up nobody else.
    let short = OpenRequest { deadline: Duration::from_secs(1), ..reader(&path, "d1") };
    let error = rig.files.open(short).await.expect_err("a write is under way");
    assert_eq!(error.kind, OpenErrorKind::Timeout, "{error}");
    assert!(error.message.contains("under way"), "{error}");
    drop(frozen);
    let opened = rig.files.open(request(&path)).await.expect("the write has landed");
    let key = opened.key;
    drop(opened);
    assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
    drop(child);
}

/// Goal: when it is not a dead predecessor but a daemon that lives, the message names it. Method: a second
/// process with the same run directory holds the fence.
#[tokio::test]
async fn live_daemon_is_named() {
    let rig = Rig::new().await;
    let path = rig.image("disk.img", 8192);
    let child = start_holder(&rig, &path, false);
    let short = OpenRequest { deadline: Duration::from_secs(1), ..request(&path) };
    let error = rig.files.open(short).await.expect_err("fenced");
    assert!(error.message.contains(&format!("(pid {})", child.pid())), "{error}");
    assert!(error.message.contains("the same run directory"), "{error}");
}
