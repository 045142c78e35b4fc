//! Goal: what QEMU encrypts we read and the other way round, for every cipher and hash that both know; a wrong key is told; a header
//! asks for no more work than it may. Method: `qemu-img` and `qemu-io` on real files, headers changed by hand.

use std::path::Path;
use std::rc::Rc;

use futures_lite::future::block_on;

use super::luks::Luks;
use super::luks1::{HEADER_BYTES, Header};
use super::{Secret, derive, legacy};
use crate::blocking::Blocking;
use crate::driver::{Budget, Create, Driver, Format, Open, SnapshotChange};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile};
use crate::qcow2::Qcow2;
use crate::testing::rig::{read, read_all, write};
use crate::volume::{Layer, Volume};

const PASSPHRASE: &str = "correct horse";
const MIB: u64 = 1 << 20;

fn file(path: &Path, writable: bool) -> Rc<dyn ImageFile> {
    let file = std::fs::File::options().read(true).write(writable).create(writable).open(path).unwrap();
    Blocking::new(file, &path.display().to_string(), writable).unwrap()
}

fn open(format: &dyn Format, path: &Path, passphrase: &str, writable: bool) -> Result<Volume, Error> {
    let file = file(path, writable);
    let key = block_on(format.unlock(file.clone(), &Secret::new(passphrase.into())))?;
    volume(format, file, Some(key))
}

fn volume(format: &dyn Format, file: Rc<dyn ImageFile>, key: Option<Secret>) -> Result<Volume, Error> {
    let open = Open {
        writable: file.is_writable(),
        files: vec![file.clone()],
        below_size: None,
        budget: Budget::new(1 << 20),
        log: None,
        snapshot: None,
        key,
    };
    let driver: Rc<dyn Driver> = block_on(format.open(open))?;
    Volume::new(vec![Layer { driver, files: vec![file] }])
}

/// Runs one of QEMU's programs, with a deadline. It must be there: the package is `qemu-utils`.
fn qemu(folder: &Path, arguments: &[&str]) -> String {
    for _ in 0..20 {
        let mut command = std::process::Command::new("timeout");
        let output = command.args(["-s", "KILL", "60"]).args(arguments).current_dir(folder).output().unwrap();
        assert_ne!(output.status.code(), Some(127), "{} is needed (package qemu-utils)", arguments[0]);
        let text =
            [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].concat();
        // How many iterations it takes it measures, and on a busy machine gives up at times.
        if !text.contains("accurate CPU usage") {
            assert!(output.status.success(), "{arguments:?}: {text}");
            return text;
        }
    }
    panic!("{arguments:?}: it could not measure the processor in 20 attempts");
}

const SECRET: [&str; 2] = ["--object", "secret,id=key,data=correct horse"];

/// How QEMU opens an image.
fn image_options(format: &str, path: &str) -> String {
    match format {
        "luks" => format!("driver=luks,key-secret=key,file.filename={path}"),
        "qcow" => format!("driver=qcow,encrypt.format=aes,encrypt.key-secret=key,file.filename={path}"),
        _ => format!("driver=qcow2,encrypt.key-secret=key,file.filename={path}"),
    }
}

fn qemu_io(folder: &Path, format: &str, commands: &[&str]) -> String {
    let options = image_options(format, "image");
    let mut arguments = vec!["qemu-io", SECRET[0], SECRET[1]];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.extend(["--image-opts", &options]);
    qemu(folder, &arguments)
}

/// Writes by us over writes of QEMU's, at borders and within sectors; then both read the same.
fn share(folder: &Path, format: &'static dyn Format, name: &str) {
    let path = folder.join("image");
    let size = 4 * MIB;
    let mut model = vec![0; size as usize];
    if format.name() == "luks" {
        // What nobody wrote is noise.
        qemu_io(folder, name, &["write -P 0 0 4M"]);
    }
    qemu_io(
        folder,
        name,
        &["write -P 17 0 100k", "write -P 18 1M 4k", "write -z 8k 8k", "write -P 19 4193792 512"],
    );
    model[..100 << 10].fill(17);
    model[1 << 20..(1 << 20) + 4096].fill(18);
    model[8 << 10..16 << 10].fill(0);
    model[4193792..4194304].fill(19);
    let volume = open(format, &path, PASSPHRASE, true).unwrap();
    assert_eq!(volume.size(), size);
    let differs = |bytes: &[u8], model: &[u8]| bytes.iter().zip(model).position(|(a, b)| a != b);
    assert_eq!(differs(&block_on(read_all(&volume)).unwrap(), &model), None, "{name}: we read QEMU's");
    let mut rng = fastrand::Rng::with_seed(7);
    for number in 0..60 {
        let at = rng.u64(..size);
        let len = (1 + rng.u64(..if number % 4 == 0 { 200_000 } else { 2000 })).min(size - at);
        let (at, len) = if number % 2 == 0 {
            (at & !511, len.next_multiple_of(512).min(size - (at & !511)))
        } else {
            (at, len)
        };
        let bytes: Vec<u8> = (0..len).map(|_| rng.u8(..)).collect();
        block_on(write(&volume, at, &bytes)).unwrap();
        model[at as usize..(at + len) as usize].copy_from_slice(&bytes);
        let back = block_on(read(&volume, at.saturating_sub(3), (len + 3).min(size - at.saturating_sub(3))))
            .unwrap();
        assert_eq!(
            differs(&back, &model[at.saturating_sub(3) as usize..]),
            None,
            "{name}: what was written at {at}"
        );
    }
    block_on(volume.erase(300_001, 70_000, crate::driver::Erase::Zero)).unwrap();
    model[300_001..370_001].fill(0);
    assert_eq!(differs(&block_on(read_all(&volume)).unwrap(), &model), None, "{name}: we read ours");
    block_on(volume.close()).unwrap();
    drop(volume);
    let options = image_options(name, "image");
    qemu(
        folder,
        &["qemu-img", "convert", SECRET[0], SECRET[1], "--image-opts", &options, "-O", "raw", "raw"],
    );
    let theirs = std::fs::read(folder.join("raw")).unwrap();
    assert_eq!((theirs.len(), differs(&theirs, &model)), (model.len(), None), "{name}: QEMU reads ours");
    if name == "qcow2" {
        qemu(folder, &["qemu-img", "check", SECRET[0], SECRET[1], "--image-opts", &options]);
        let open = Open {
            files: vec![file(&path, false)],
            writable: false,
            below_size: None,
            budget: Budget::new(1 << 20),
            log: None,
            snapshot: None,
            key: None,
        };
        let found = block_on(format.check(open, None)).unwrap();
        assert_eq!((found.corruptions_total, found.leaks_total), (0, 0), "{found:?}");
    }
}

#[test]
fn images_of_qemu() {
    for options in [
        "",
        ",PREFIXcipher-alg=aes-128",
        ",PREFIXcipher-mode=cbc,PREFIXivgen-alg=plain64,PREFIXhash-alg=sha1",
        ",PREFIXcipher-mode=cbc,PREFIXivgen-alg=essiv,PREFIXivgen-hash-alg=sha256,PREFIXhash-alg=sha512",
        ",PREFIXivgen-alg=plain",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let luks = format!("key-secret=key,iter-time=10{}", options.replace("PREFIX", ""));
        let qcow2 = format!(
            "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10{}",
            options.replace("PREFIX", "encrypt.")
        );
        for (format, name, options) in
            [(&Luks as &'static dyn Format, "luks", &luks), (&Qcow2 as &'static dyn Format, "qcow2", &qcow2)]
        {
            qemu(
                folder.path(),
                &["qemu-img", "create", "-q", SECRET[0], SECRET[1], "-f", name, "-o", options, "image", "4M"],
            );
            share(folder.path(), format, name);
        }
    }
}

fn make(format: &dyn Format, path: &Path, options: &[(&str, &str)]) {
    let options = options.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let key = Some(Secret::new(PASSPHRASE.into()));
    let create = Create { size: Some(4 * MIB), backing: None, options, key };
    block_on(format.create(file(path, true), Vec::new(), &create)).unwrap();
}

#[test]
fn images_of_ours() {
    for (format, options) in [
        (&Luks as &'static dyn Format, vec![("iter-time", "1")]),
        (
            &Luks,
            vec![
                ("iter-time", "1"),
                ("cipher", "aes-cbc-essiv:sha256"),
                ("key-bits", "256"),
                ("hash", "sha1"),
                ("wipe", "off"),
            ],
        ),
        (&Qcow2, vec![("encrypt.format", "luks"), ("encrypt.iter-time", "1")]),
        (
            &Qcow2,
            vec![
                ("encrypt.format", "luks"),
                ("encrypt.iter-time", "1"),
                ("cluster_size", "512"),
                ("encrypt.key-bits", "256"),
                ("encrypt.hash", "sha512"),
            ],
        ),
        (
            &Qcow2,
            vec![
                ("encrypt.format", "luks"),
                ("encrypt.iter-time", "1"),
                ("extended_l2", "on"),
                ("preallocation", "metadata"),
            ],
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        make(format, &folder.path().join("image"), &options);
        let info = qemu(folder.path(), &["qemu-img", "info", "-f", format.name(), "image"]);
        assert!(info.contains("aes") && info.contains("4 MiB"), "{info}");
        share(folder.path(), format, format.name());
    }
}

// Goal: a snapshot inside an encrypted image brings its bytes back, and the image stays encrypted. Method: by both methods; what a raw
// look at the file shows is no plain text.
#[test]
fn snapshots_inside_are_made_and_applied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    make(&Qcow2, &path, &[("encrypt.format", "luks"), ("encrypt.iter-time", "1")]);
    let change = |change: SnapshotChange| {
        let file = file(&path, true);
        let key = block_on(Qcow2.unlock(file.clone(), &Secret::new(PASSPHRASE.into()))).unwrap();
        let open = Open {
            files: vec![file],
            writable: true,
            below_size: None,
            budget: Budget::new(1 << 20),
            log: None,
            snapshot: None,
            key: Some(key),
        };
        block_on(Qcow2.change_snapshots(open, &change)).unwrap();
    };
    let write_all = |byte: u8| {
        let volume = open(&Qcow2, &path, PASSPHRASE, true).unwrap();
        block_on(write(&volume, MIB, &vec![byte; 100 << 10])).unwrap();
        block_on(volume.close()).unwrap();
    };
    write_all(0x5a);
    change(SnapshotChange::Create("one".into()));
    write_all(0xc3);
    change(SnapshotChange::Apply("one".into()));
    let volume = open(&Qcow2, &path, PASSPHRASE, false).unwrap();
    assert!(block_on(read(&volume, MIB, 100 << 10)).unwrap().iter().all(|byte| *byte == 0x5a));
    drop(volume);
    write_all(0xc3);
    change(SnapshotChange::Delete("one".into()));
    let bytes = std::fs::read(&path).unwrap();
    assert!(!bytes.windows(64).any(|part| part.iter().all(|byte| [0x5a, 0xc3].contains(byte))), "plain text");
    qemu(
        folder.path(),
        &["qemu-img", "check", SECRET[0], SECRET[1], "--image-opts", &image_options("qcow2", "image")],
    );
}

#[test]
fn old_aes_images_are_read_and_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let options = "encrypt.format=aes,encrypt.key-secret=key";
    qemu(
        folder.path(),
        &["qemu-img", "create", "-q", SECRET[0], SECRET[1], "-f", "qcow2", "-o", options, "image", "4M"],
    );
    share(folder.path(), &Qcow2, "qcow2");
    let version1 = tempfile::tempdir().unwrap();
    qemu(
        version1.path(),
        &["qemu-img", "create", "-q", SECRET[0], SECRET[1], "-f", "qcow", "-o", options, "image", "4M"],
    );
    share(version1.path(), &crate::qcow::Qcow, "qcow");
    let description = block_on(Qcow2.describe(file(&path, false))).unwrap();
    assert_eq!(description.encryption, Some(legacy::in_words()));
    assert!(description.encryption.is_some_and(|found| found.warning.is_some()));
    let message = block_on(Qcow2.create(
        file(&folder.path().join("new"), true),
        Vec::new(),
        &Create {
            size: Some(MIB),
            backing: None,
            options: vec![("encrypt.format".into(), "aes".into())],
            key: None,
        },
    ));
    assert!(message.unwrap_err().message.contains("encrypt.format=luks"));
}

#[test]
fn keys_that_are_wrong_or_missing_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for (format, options) in [
        (&Luks as &dyn Format, vec![("iter-time", "1")]),
        (&Qcow2, vec![("encrypt.format", "luks"), ("encrypt.iter-time", "1")]),
    ] {
        make(format, &path, &options);
        let wrong = open(format, &path, "wrong horse", false).unwrap_err();
        assert_eq!(wrong.kind, ErrorKind::Invalid);
        assert!(wrong.message.contains("opens none of its 1 LUKS key slots"), "{wrong}");
        assert!(!wrong.message.contains("horse"));
        let missing = volume(format, file(&path, false), None).unwrap_err();
        assert!(missing.kind == ErrorKind::Missing && missing.message.contains("key-file="), "{missing}");
        let short = volume(format, file(&path, false), Some(Secret::new(vec![1; 16]))).unwrap_err();
        assert_eq!(short.kind, ErrorKind::Invalid);
        let description = block_on(format.describe(file(&path, false))).unwrap();
        assert!(description.encryption.is_some_and(|found| found.words.contains("aes-xts-plain64")));
        std::fs::remove_file(&path).unwrap();
    }
    // Without a passphrase nothing is made.
    let create = Create { size: Some(MIB), backing: None, options: Vec::new(), key: None };
    let error = block_on(Luks.create(file(&path, true), Vec::new(), &create)).unwrap_err();
    assert!(error.message.contains("key-file="));
    let plain = block_on(Qcow2.create(file(&path, true), Vec::new(), &create));
    plain.unwrap();
    assert!(
        block_on(Qcow2.unlock(file(&path, false), &Secret::new(vec![1])))
            .is_err_and(|e| e.message.contains("not encrypted"))
    );
    let secret = Secret::new(b"do not show".to_vec());
    assert!(!format!("{secret:?}").contains("do not"));
}

#[test]
fn several_slots_open_and_free_ones_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let options = "key-secret=key,iter-time=10";
    qemu(
        folder.path(),
        &["qemu-img", "create", "-q", SECRET[0], SECRET[1], "-f", "luks", "-o", options, "image", "1M"],
    );
    let second = ["--object", "secret,id=new,data=battery staple"];
    qemu(
        folder.path(),
        &[
            &["qemu-img", "amend"][..],
            &SECRET[..],
            &second[..],
            &[
                "--image-opts",
                "-o",
                "state=active,new-secret=new,iter-time=10",
                &image_options("luks", "image"),
            ][..],
        ]
        .concat(),
    );
    let path = folder.path().join("image");
    for (passphrase, opens) in [(PASSPHRASE, true), ("battery staple", true), ("other", false)] {
        assert_eq!(open(&Luks, &path, passphrase, false).is_ok(), opens, "{passphrase}");
    }
    let header = std::fs::read(&path).unwrap();
    let slots = Header::parse("image", &header, header.len() as u64).unwrap().used_slots();
    assert_eq!(slots.len(), 2);
}

#[test]
fn damaged_and_greedy_headers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    make(&Luks, &path, &[("iter-time", "1"), ("wipe", "off")]);
    let image = std::fs::read(&path).unwrap();
    let parse = |bytes: &[u8]| Header::parse("image", bytes, image.len() as u64);
    assert!(parse(&image).is_ok());
    let slot = 208;
    for (at, bytes, word) in [
        (0, &b"MUKS"[..], "no LUKS header"),
        (6, &[0, 3], "version 3"),
        (8, b"serpent", "serpent"),
        (40, b"ecb\0", "ecb"),
        (72, b"md5\0", "md5"),
        (104, &[0xff; 4], "outside"),
        (104, &[0; 4], "outside"),
        (108, &[0, 0, 0, 33], "33 bytes"),
        (108, &[0xff; 4], "bytes"),
        (164, &[0; 4], "no iterations"),
        (164, &[0xff; 4], "rounds"),
        (slot, &[1; 4], "neither used nor free"),
        (slot + 4, &[0; 4], "no iterations"),
        (slot + 4, &[0xff; 4], "rounds"),
        (slot + 40, &[0xff; 4], "outside"),
        (slot + 40, &[0; 4], "outside"),
        (slot + 44, &[0, 0, 0, 1], "stripes"),
        (slot + 44, &[0xff; 4], "stripes"),
    ] {
        let mut damaged = image.clone();
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        let error = parse(&damaged).unwrap_err();
        assert!(error.message.contains(word) && error.message.contains("image"), "{at}: {error}");
    }
    assert!(parse(&image[..HEADER_BYTES - 1]).is_err());
    // Many slots that are each within the bound are not, together.
    let mut greedy = image.clone();
    for number in 0..8 {
        let slot = slot + number * 48;
        let most = (derive::ROUNDS_MAX / 2 / 4) as u32;
        greedy.copy_within(208..256, slot);
        greedy[slot + 4..slot + 8].copy_from_slice(&most.to_be_bytes());
    }
    assert!(parse(&greedy).unwrap_err().message.contains("rounds"));
    // A damaged stripe is a key that opens nothing.
    let file = file(&path, true);
    block_on(file.write(5000, Buf::copy_of(&[1; 100]))).unwrap();
    assert!(open(&Luks, &path, PASSPHRASE, false).unwrap_err().message.contains("opens none"));
}
