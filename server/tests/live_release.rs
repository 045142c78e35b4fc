//! Goal: the image of a disk that was paused with `--release` belongs to others until `ctl resume`, whatever happens meanwhile, and
//! a change of the image that fails leaves the disk paused with its clients waiting, never on nothing and never on the wrong file.
//! Method: QEMU's tools are the others, with their own locks; what they write is what clients read behind the resume. A file that
//! takes the place of the old one tells whether the daemon had opened it too early.

#![allow(clippy::unwrap_used, reason = "a failed test is what they are for")]

mod live_rig;

use std::fs;
use std::path::Path;

use live_rig::nbd_client::Client;
use live_rig::{Rig, raw, run, wait_until};

const MIB: u64 = 1 << 20;

/// Another program writes four KiB of `byte` at the start, under its own lock.
fn others_write(file: &Path, byte: u8) {
    let command = format!("write -P {byte} 0 4k");
    run("qemu-io", &["-f", "raw", "-c", &command, &file.display().to_string()]).expect_ok();
}

fn others_are_refused(file: &Path) {
    let command = ["-f", "raw", "-c", "write -P 99 0 4k", &file.display().to_string()];
    let said = run("qemu-io", &command).expect_failure();
    assert!(said.contains("lock"), "{said}");
}

/// State and reason.
fn state(rig: &Rig) -> (String, String) {
    let disk = rig.ctl_json(&["show", "d"]);
    (disk["state"].as_str().unwrap().to_owned(), disk["reason"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn a_released_image_belongs_to_others_until_the_resume() {
    let mut rig = Rig::with(1, &[]);
    let file = rig.image("d.raw", 4 * MIB);
    rig.attach("d", &raw(&file), &[]);
    let mut client = Client::connect(&rig.socket("d")).unwrap();
    client.write(0, &[1; 4096]);
    others_are_refused(&file);
    rig.ctl_ok(&["pause", "d"]);
    others_are_refused(&file);
    rig.ctl_ok(&["pause", "d", "--release"]);
    assert!(state(&rig).1.contains("--release"), "{:?}", state(&rig));
    // Again, and a plain pause behind it, change nothing.
    rig.ctl_ok(&["pause", "d", "--release"]);
    rig.ctl_ok(&["pause", "d"]);
    others_write(&file, 2);
    rig.ctl_ok(&["resume", "d"]);
    assert!(client.read(0, 4096) == [2; 4096]);
    others_are_refused(&file);

    // Over the end of the daemon, by a signal and by a kill; behind the latter the file is another one.
    for kill in [false, true] {
        rig.ctl_ok(&["pause", "d", "--release"]);
        let other = rig.image("other.raw", 4 * MIB);
        others_write(&other, 3 + u8::from(kill));
        if kill {
            rig.kill();
        } else {
            rig.terminate();
        }
        rig.restart();
        wait_until("it says what it waits for", || state(&rig).1.contains("ctl resume"));
        assert_eq!(state(&rig).0, "failed");
        others_write(&file, 98);
        fs::rename(&other, &file).unwrap();
        rig.ctl_ok(&["resume", "d"]);
        rig.wait_for_state("d", "running");
        let mut client = Client::connect(&rig.socket("d")).unwrap();
        assert!(client.read(0, 4096) == [3 + u8::from(kill); 4096]);
    }
    // Memory has nothing that could be released.
    rig.attach("memory", "ram:m?size=1M", &[]);
    assert!(rig.ctl(&["pause", "memory", "--release"]).expect_failure().contains("no file"));
    rig.ctl_ok(&["resume", "memory"]);
}

#[test]
fn a_change_of_the_image_that_fails_leaves_the_disk_paused() {
    let mut rig = Rig::with(1, &[]);
    let file = rig.image("d.raw", 4 * MIB);
    let (small, hidden) = (raw(&rig.image("small.raw", MIB)), rig.path("hidden.raw"));
    let missing = raw(&rig.path("missing.raw"));
    rig.attach("d", &raw(&file), &[]);
    let mut client = Client::connect(&rig.socket("d")).unwrap();
    client.write(0, &[1; 4096]);

    // Paused: the old image comes back, and is locked.
    rig.ctl_ok(&["pause", "d"]);
    for (image, word) in [(&small, "bytes"), (&missing, "no such file")] {
        let said = rig.ctl(&["resume", "d", "--image", image]).expect_failure();
        assert!(said.contains(word), "{said}");
        assert_eq!(state(&rig).0, "paused");
        others_are_refused(&file);
    }
    rig.ctl_ok(&["resume", "d"]);
    assert!(client.read(0, 4096) == [1; 4096]);

    // Paused, and the old image has gone as well: the disk waits without one, and says so; then it comes back.
    rig.ctl_ok(&["pause", "d"]);
    fs::rename(&file, &hidden).unwrap();
    let said = rig.ctl(&["resume", "d", "--image", &small]).expect_failure();
    assert!(said.contains("small.raw") && said.contains("d.raw") && said.contains("ctl resume"), "{said}");
    assert_eq!(state(&rig).0, "paused");
    let said = rig.ctl(&["resume", "d"]).expect_failure();
    assert!(said.contains("no such file") && said.contains("stays paused"), "{said}");
    fs::rename(&hidden, &file).unwrap();
    others_write(&file, 2);
    rig.ctl_ok(&["resume", "d"]);
    assert!(client.read(0, 4096) == [2; 4096]);

    // Released: no other image is taken in the place of the one that does not fit, and a restart knows the name of the old one.
    rig.ctl_ok(&["pause", "d", "--release"]);
    let said = rig.ctl(&["resume", "d", "--image", &small]).expect_failure();
    assert!(said.contains("stays paused"), "{said}");
    others_write(&file, 3);
    drop(client);
    rig.kill();
    rig.restart();
    let refused = rig.ctl(&["resume", "d", "--image", &small]);
    assert!(refused.expect_failure().contains("not served"));
    assert_eq!(rig.ctl(&["resume", "d", "--image", &small]).code, Some(4));
    rig.ctl_ok(&["resume", "d"]);
    let mut client = Client::connect(&rig.socket("d")).unwrap();
    assert!(client.read(0, 4096) == [3; 4096]);

    // An overlay that others made of the released image.
    rig.ctl_ok(&["pause", "d", "--release"]);
    let overlay = rig.path("over.qcow2");
    let text = overlay.display().to_string();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &file.display().to_string(), "-F", "raw", &text])
        .expect_ok();
    rig.ctl_ok(&["resume", "d", "--image", &format!("qcow2:{text}")]);
    client.write(0, &[4; 4096]);
    assert!(client.read(0, 8192).starts_with(&[4; 4096]));
    drop(client);
    wait_until("the client is gone", || rig.ctl(&["detach", "d"]).code == Some(0));
    assert!(fs::read(&file).unwrap()[..4096] == [3; 4096]);
    run("qemu-img", &["check", "-f", "qcow2", &text]).expect_ok();
}
