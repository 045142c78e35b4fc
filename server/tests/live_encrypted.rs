//! Goal: an encrypted disk is a disk like any other to its clients, its file is what QEMU expects of it, also after moves and crashes;
//! who has no key, a wrong one or one too many is told; a key is nowhere but in its file; a snapshot of an encrypted disk is
//! encrypted. Method: a real daemon, images made by our tools, random requests of any alignment against a byte model, kill -9 and
//! restarts, then qemu-img with the key as the judge; the passphrase is searched for in everything that the daemon leaves and says.

#![allow(clippy::unwrap_used, reason = "a failed test is what they are for")]

mod live_rig;

use std::fs;
use std::path::{Path, PathBuf};

use live_rig::load::Load;
use live_rig::model::Model;
use live_rig::{BLKTAPD, PATIENCE, Random, Rig, Running, run};

const MIB: u64 = 1 << 20;
const PASSPHRASE: &str = "staple of the correct horse";

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A file with a key.
fn key(rig: &Rig, name: &str, bytes: &str) -> PathBuf {
    let path = rig.path(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// An encrypted image of 4 MiB, and its specification.
fn image(rig: &Rig, format: &str, key: &Path) -> (PathBuf, String) {
    let path = rig.path(&format!("disk.{format}"));
    let spec = format!("{format}:{}?key-file={}", path.display(), key.display());
    let options: &[&str] = match format {
        "luks" => &["-o", "iter-time=20"],
        _ => &["-o", "encrypt.format=luks", "-o", "encrypt.iter-time=20"],
    };
    run(BLKTAPD, &[&["image", "create", &spec, "4M"], options].concat()).expect_ok();
    (path, spec)
}

/// What QEMU reads.
fn qemu_reads(rig: &Rig, format: &str, path: &Path) -> Vec<u8> {
    let out = rig.path("read.raw");
    let named = match format {
        "luks" => format!("driver=luks,key-secret=k,file.filename={}", path.display()),
        _ => format!("driver=qcow2,encrypt.key-secret=k,file.filename={}", path.display()),
    };
    let secret = format!("secret,id=k,file={}", rig.path("key").display());
    run("qemu-img", &["convert", "--object", &secret, "--image-opts", &named, "-O", "raw", &text(&out)])
        .expect_ok();
    fs::read(out).unwrap()
}

fn serves_clients(format: &str) {
    let mut rig = Rig::with(2, &[]);
    let key = key(&rig, "key", PASSPHRASE);
    let (path, spec) = image(&rig, format, &key);
    rig.attach("disk", &spec, &[]);
    let shards = rig.ctl_json(&["shards"]).as_array().unwrap().len() as u64;
    let (mut model, mut random) = (Model::new(vec![0; 4 * MIB as usize]), Random(7));
    for round in 0..3 {
        let mut load = Load::new(&rig.socket("disk"), 2, model, random.next());
        load.never_flushes = true;
        load.run(150);
        let shard = random.below(shards).to_string();
        let moving = Running::start(&mut rig.ctl_command(&["move", "disk", &shard]));
        load.run(200);
        moving.finish(PATIENCE).expect_ok();
        if round == 2 {
            model = load.settle();
            break;
        }
        rig.kill();
        model = load.abandon();
        rig.restart();
        rig.wait_for_state("disk", "running");
        model = Load::new(&rig.socket("disk"), 1, model, 0).settle();
    }
    says_no_key(&rig, &["disk"]);
    rig.ctl_ok(&["detach", "disk"]);
    assert!(qemu_reads(&rig, format, &path) == model.into_bytes(), "QEMU reads other bytes");
    let stored = fs::read(&path).unwrap();
    assert!(!stored.windows(PASSPHRASE.len()).any(|part| part == PASSPHRASE.as_bytes()));
}

/// The passphrase is in nothing that the daemon says or keeps.
fn says_no_key(rig: &Rig, disks: &[&str]) {
    let mut said = vec![rig.log(), rig.ctl_ok(&["list"]), rig.ctl_ok(&["list", "--json"])];
    said.extend(disks.iter().map(|disk| rig.ctl_ok(&["show", disk])));
    let mut folders = vec![rig.run_dir()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => folders.push(entry.path()),
                kind if kind.is_file() => {
                    said.push(String::from_utf8_lossy(&fs::read(entry.path()).unwrap()).into_owned());
                }
                _ => {}
            }
        }
    }
    assert!(said.iter().any(|text| text.contains("key-file")), "the specification names the file");
    assert!(said.iter().all(|text| !text.contains(PASSPHRASE)));
    let dumpable = fs::metadata(format!("/proc/{}/environ", rig.pid())).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!(dumpable.uid(), 0, "what cannot be dumped belongs to root in /proc");
}

#[test]
fn luks_serves_clients() {
    serves_clients("luks");
}

#[test]
fn encrypted_qcow2_serves_clients() {
    serves_clients("qcow2");
}

#[test]
fn keys_that_do_not_fit_are_told() {
    let rig = Rig::start();
    let right = key(&rig, "key", PASSPHRASE);
    let (path, spec) = image(&rig, "qcow2", &right);
    let plain = rig.image("plain.raw", MIB);
    let wrong = key(&rig, "wrong", "something else");
    let (empty, qcow2) = (key(&rig, "empty", ""), format!("qcow2:{}", path.display()));
    run(BLKTAPD, &["image", "create", &format!("qcow2:{}", rig.path("open.qcow2").display()), "1M"])
        .expect_ok();
    let open = format!("qcow2:{}", rig.path("open.qcow2").display());
    for (spec, words) in [
        (qcow2.clone(), &["encrypted", "key-file="][..]),
        (format!("{qcow2}?key-file={}", wrong.display()), &["opens none", "wrong"]),
        (format!("{qcow2}?key-file={}", empty.display()), &["empty"]),
        (format!("{qcow2}?key-file={}", rig.path("none").display()), &["none"]),
        (format!("{qcow2}?key-file={}", rig.path("").display()), &["regular file"]),
        (format!("{qcow2}?key-file={}&key-file-3={}", right.display(), right.display()), &["image 3"]),
        (format!("{qcow2}?key-credential=disk"), &["CREDENTIALS_DIRECTORY"]),
        (format!("{qcow2}?key-fd=3"), &["descriptor"]),
        (format!("{open}?key-file={}", right.display()), &["opens nothing"]),
        (format!("raw:{}?key-file={}", plain.display(), right.display()), &["no option"]),
    ] {
        let said = rig.ctl(&["attach", "disk", &spec, "--nbd"]).expect_failure();
        assert!(words.iter().all(|word| said.contains(word)), "{spec}: {said}");
        assert!(!said.contains(PASSPHRASE) && !said.contains("something else"));
    }
    rig.attach("disk", &spec, &[]);
    rig.ctl_ok(&["detach", "disk"]);
}

#[test]
fn a_snapshot_of_an_encrypted_disk_is_encrypted() {
    let mut rig = Rig::start();
    let key_path = key(&rig, "key", PASSPHRASE);
    let other = key(&rig, "other", "another passphrase");
    let (_, spec) = image(&rig, "luks", &key_path);
    rig.attach("disk", &spec, &[]);
    let mut load = Load::new(&rig.socket("disk"), 1, Model::new(vec![0; 4 * MIB as usize]), 1);
    load.run(100);
    let overlay = format!("qcow2:{}", rig.path("overlay.qcow2").display());
    let said = rig.ctl(&["snapshot", &format!("disk={overlay}")]).expect_failure();
    assert!(said.contains("would not be") && said.contains("key-file="), "{said}");
    let vhd = format!("vhd:{}?key-file={}", rig.path("overlay.vhd").display(), other.display());
    assert!(rig.ctl(&["snapshot", &format!("disk={vhd}")]).expect_failure().contains("only a qcow2"));
    assert!(!rig.path("overlay.qcow2").exists() && !rig.path("overlay.vhd").exists());
    rig.ctl_ok(&["snapshot", &format!("disk={overlay}?key-file={}", other.display())]);
    load.run(200);
    let model = load.settle();
    says_no_key(&rig, &["disk"]);
    // Both keys are found again.
    rig.kill();
    rig.restart();
    rig.wait_for_state("disk", "running");
    let model = Load::new(&rig.socket("disk"), 1, model, 2).settle();
    rig.ctl_ok(&["detach", "disk"]);
    let out = rig.path("out.raw");
    let chain = format!("{overlay}?key-file={}&key-file-1={}", other.display(), key_path.display());
    run(BLKTAPD, &["image", "convert", &chain, &format!("raw:{}", out.display())]).expect_ok();
    assert!(fs::read(out).unwrap() == model.into_bytes());
    assert!(run(BLKTAPD, &["image", "info", &overlay]).expect_ok().contains("LUKS1 aes-xts-plain64"));
}
