//! Locks against QEMU's programs, in both directions.

mod files_rig;

use std::path::Path;
use std::process::Command;

use blktapd::files::{OpenErrorKind, Released};
use files_rig::{Loop, PATIENCE, Rig, Running, has_program, reader, request, run, skip, wait_until};

fn qemu_is_missing(test: &str) -> bool {
    let missing = ["qemu-img", "qemu-io", "qemu-nbd"].into_iter().find(|name| !has_program(name));
    if let Some(name) = missing {
        skip(test, &format!("{name} is not installed"));
    }
    missing.is_some()
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Waits until the server serves: only then it holds the locks that it keeps.
fn wait_for_export(socket: &Path, name: &str) {
    let export = format!("nbd:unix:{}{name}", text(socket));
    wait_until("QEMU serves", || run("qemu-img", &["info", &export]).0);
}

/// Starts qemu-nbd on `image`.
fn qemu_nbd(rig: &Rig, image: &Path, options: &[&str]) -> Running {
    let socket = rig.path("qemu.sock");
    let _ = std::fs::remove_file(&socket);
    let mut command = Command::new("qemu-nbd");
    command.args(["-f", "raw", "-t", "-k", &text(&socket)]).args(options).arg(image);
    let running = Running::start(&mut command);
    wait_for_export(&socket, "");
    running
}

/// Goal: QEMU's tools respect our locks and say so. Method: hold an image as writer, then as reader, and run
/// them.
#[tokio::test]
async fn qemu_respects_our_locks() {
    if qemu_is_missing("qemu_respects_our_locks") {
        return;
    }
    let rig = Rig::new().await;
    // QEMU's tools tolerate writers when they read a raw image, and do not when they read a qcow2. To us it
    // is bytes.
    let path = rig.path("disk.img");
    let name = text(&path);
    let (made, said) = run("qemu-img", &["create", "-f", "qcow2", &name, "1M"]);
    assert!(made, "{said}");
    let info = || run("qemu-img", &["info", &name]);
    let info_anyway = || run("qemu-img", &["info", "-U", &name]);
    let write = || run("qemu-io", &["-f", "qcow2", "-c", "write 0 512", &name]);
    let read = || run("qemu-io", &["-r", "-f", "qcow2", "-c", "read 0 512", &name]);
    let resize = || run("qemu-img", &["resize", "-f", "qcow2", &name, "2M"]);

    let opened = rig.files.open(request(&path)).await.expect("opens");
    for (done, said) in [info(), write(), read(), resize()] {
        assert!(!done && said.contains("lock"), "a writer has it: {said}");
    }
    let (done, said) = info_anyway();
    assert!(done, "{said}");
    let key = opened.key;
    drop(opened);
    assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
    for (done, said) in [info(), read(), write()] {
        assert!(done, "free again: {said}");
    }

    let _opened = rig.files.open(reader(&path, "d1")).await.expect("opens");
    for (done, said) in [info(), read(), info_anyway()] {
        assert!(done, "readers coexist: {said}");
    }
    for (done, said) in [write(), resize()] {
        assert!(!done && said.contains("lock"), "{said}");
    }
}

/// Goal: we respect QEMU's locks, and the refusal names the program; nothing is left open by it. Method:
/// qemu-nbd as writer and as reader, on a file and on a loop device.
#[tokio::test]
async fn we_respect_qemu_locks() {
    if qemu_is_missing("we_respect_qemu_locks") {
        return;
    }
    let rig = Rig::new().await;
    let image = rig.image("disk.img", 1 << 20);
    let backing = rig.image("backing", 1 << 20);
    let device = Loop::new(&backing, &[]);
    let mut targets = vec![image];
    match &device {
        Ok(device) => targets.push(device.node.clone()),
        Err(why) => skip("we_respect_qemu_locks (device)", why),
    }
    for path in targets {
        let writer = qemu_nbd(&rig, &path, &[]);
        for wanted in [request(&path), reader(&path, "d1")] {
            let error = rig.files.open(wanted).await.expect_err("QEMU writes to it");
            assert_eq!(error.kind, OpenErrorKind::Busy, "{error}");
            let holder = format!("qemu-nbd (pid {}) has it open for writing", writer.pid());
            assert!(error.message.contains(&holder) && error.message.contains(&text(&path)), "{error}");
            assert_eq!(rig.files.entries(), []);
        }
        drop(writer);
        let nbd_reader = qemu_nbd(&rig, &path, &["-r"]);
        let error = rig.files.open(request(&path)).await.expect_err("QEMU reads it");
        assert!(error.message.contains(&format!("qemu-nbd (pid {})", nbd_reader.pid())), "{error}");
        let opened = rig.files.open(reader(&path, "d1")).await.expect("readers coexist");
        let key = opened.key;
        drop(opened);
        assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
        drop(nbd_reader);
        let opened = rig.files.open(request(&path)).await.expect("free");
        let key = opened.key;
        drop(opened);
        assert_eq!(rig.files.release(key, "d1", PATIENCE).await, Released::Closed);
    }
}

/// Goal: a guest's block backend, which takes more permissions than the tools, excludes us and is excluded.
/// Method: qemu-storage-daemon with a writable NBD export of a raw node.
#[tokio::test]
async fn storage_daemon_and_we_exclude_each_other() {
    let test = "storage_daemon_and_we_exclude_each_other";
    if !has_program("qemu-storage-daemon") {
        return skip(test, "qemu-storage-daemon is not installed");
    }
    let rig = Rig::new().await;
    let path = rig.image("disk.img", 1 << 20);
    let socket = rig.path("qsd.sock");
    let daemon = || {
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(["--blockdev", &format!("driver=file,node-name=f,filename={}", text(&path))])
            .args(["--blockdev", "driver=raw,node-name=r,file=f"])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", text(&socket))])
            .args(["--export", "type=nbd,id=e,node-name=r,writable=on"]);
        command
    };
    {
        let running = Running::start(&mut daemon());
        wait_for_export(&socket, ":exportname=r");
        for wanted in [request(&path), reader(&path, "d1")] {
            let error = rig.files.open(wanted).await.expect_err("it writes");
            assert!(
                error.message.contains(&format!("qemu-storage-daemon (pid {})", running.pid())),
                "{error}"
            );
        }
    }
    let _ = std::fs::remove_file(&socket);
    let _opened = rig.files.open(request(&path)).await.expect("free");
    let output = daemon().output().expect("starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("lock"), "{said}");
}
