//! Goal: a child is over the parent that it was made over, or over none; another parent is named whole or not at all. Method: chains of
//! both programs' images, writes to parents, and crashes while the name is changed.

use super::*;
use crate::driver::Identity;
use crate::testing::replay::crashes;
use crate::testing::rig::{Case, LayerCase, Rig};

/// Goal: the identity changes with the first change after an opening, once, and not without one. Method: openings with and without
/// writes, by us and by QEMU.
#[test]
fn the_identity_is_of_the_contents() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vmdk");
    for options in [&[][..], &[("subformat", "monolithicFlat")], &[("subformat", "twoGbMaxExtentSparse")]] {
        create(&path, Some(MIB), None, options).unwrap();
        let new = cid(&path);
        wait(open(&path, true).unwrap().close()).unwrap();
        wait(open(&path, false).unwrap().close()).unwrap();
        assert_eq!(cid(&path), new, "nothing was written");
        let volume = open(&path, true).unwrap();
        write(&volume, 0, &[1; 512]);
        let written = cid(&path);
        write(&volume, 8192, &[1; 512]);
        wait(volume.close()).unwrap();
        assert_ne!(new, written);
        assert_eq!(cid(&path), written, "once");
        let volume = open(&path, true).unwrap();
        write(&volume, 0, &[1; 512]);
        wait(volume.close()).unwrap();
        assert_ne!(cid(&path), written, "again after the next opening");
        let volume = open(&path, true).unwrap();
        let kept = cid(&path);
        volume.layers()[0].driver.keep_identity();
        write(&volume, 0, &[2; 512]);
        wait(volume.close()).unwrap();
        assert_eq!(cid(&path), kept, "what a merge writes");
    }
}

/// Goal: QEMU and we agree which parent is the right one. Method: children of both over parents of both; then the parent is written.
#[test]
fn a_parent_that_was_written_is_another_one() {
    for ours in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (parent, child) = (folder.path().join("p.vmdk"), folder.path().join("c.vmdk"));
        if ours {
            create(&parent, Some(3 * MIB), None, &[]).unwrap();
        } else {
            qemu(folder.path(), &["qemu-img", "create", "-q", "-f", "vmdk", "p.vmdk", "3M"]).unwrap();
        }
        let volume = open(&parent, true).unwrap();
        write(&volume, 100_000, &[7; 3000]);
        wait(volume.close()).unwrap();
        if ours {
            create(&child, None, Some(&parent), &[("zeroed_grain", "on")]).unwrap();
        } else {
            let arguments =
                ["qemu-img", "create", "-q", "-f", "vmdk", "-b", "p.vmdk", "-F", "vmdk", "c.vmdk"];
            qemu(folder.path(), &arguments).unwrap();
        }
        let link = || wait(Vmdk.describe(Blocking::open(&child, false).unwrap())).unwrap().backing.unwrap();
        let known = |link: Link| super::super::cid_of(link.identity);
        assert_eq!((known(link()), link().paths), (Some(cid(&parent)), vec!["p.vmdk".to_owned()]));
        let volume = open(&child, true).unwrap();
        write(&volume, 101_000, &[8; 500]);
        wait(volume.close()).unwrap();
        let io =
            |pattern: &str| qemu(folder.path(), &["qemu-io", "-r", "-f", "vmdk", "-c", pattern, "c.vmdk"]);
        for pattern in
            ["read -P 7 100000 1000", "read -P 8 101000 500", "read -P 7 101500 1500", "read -P 0 200000 512"]
        {
            assert!(!io(pattern).unwrap().contains("failed"), "{pattern}");
        }
        assert_eq!(
            read(&open(&child, false).unwrap(), 100_900, 700),
            [vec![7; 100], vec![8; 500], vec![7; 100]].concat()
        );
        assert_clean(&child, "child");
        let volume = open(&parent, true).unwrap();
        write(&volume, 0, &[1; 512]);
        wait(volume.close()).unwrap();
        assert_ne!(known(link()), Some(cid(&parent)));
        assert!(io("read 300000 512").is_err(), "QEMU takes the parent for the right one");
    }
}

fn link_to(path: &str) -> (Link, u64) {
    let identity = Identity { uuid: 0x1234_5678u128.to_be_bytes(), modified: None, of_contents: true };
    (Link { paths: vec![path.to_owned()], format: Some("vmdk".to_owned()), identity: Some(identity) }, MIB)
}

#[test]
fn a_crash_leaves_the_old_parent_or_the_new_one() {
    let layer = |options: &[(&str, &str)]| LayerCase::new(&Vmdk, options, MIB);
    let rig = Rig::create(&Case::new("chain", vec![layer(&[]), layer(&[])]), 5).unwrap();
    let mut rig = rig.copy(1);
    let mut old = Some("1.vmdk".to_owned());
    for (round, len) in [Some(1), Some(200), Some(370), Some(3), None].into_iter().enumerate() {
        let new = len.map(|len| format!("{}.vmdk", "p".repeat(len)));
        rig.store.start_record();
        let file = rig.store.open(rig.files(0)[0], true);
        rig.store.run(Vmdk.set_backing(file, new.as_deref().map(link_to))).unwrap();
        let record = rig.store.take_record();
        crashes(&record, 10, round as u64, |crash, seed| {
            let left = rig.with_files(crash.files.clone(), seed);
            let file = left.store.open(left.files(0)[0], false);
            let described = left.store.run(Vmdk.describe(file)).map_err(|error| error.message)?;
            let path = described.backing.map(|link| link.paths[0].clone());
            if path == old || path == new {
                Ok(())
            } else {
                Err(format!("{old:?} to {new:?}: it is {path:?}"))
            }
        })
        .unwrap();
        rig = rig.after_death(round as u64).unwrap();
        old = new;
    }
    // A name that takes more than one write, and what no descriptor can name.
    let file = rig.store.open(rig.files(0)[0], true);
    let before = rig.store.pages(rig.files(0)[0]);
    let raw = (Link { format: Some("raw".to_owned()), ..link_to("a").0 }, MIB);
    let nobody = (Link { identity: None, ..link_to("a").0 }, MIB);
    for (link, word) in [
        (link_to(&"p".repeat(600)), "convert"),
        (link_to("a\"b"), "quotes"),
        (raw, "raw"),
        (nobody, "identity"),
    ] {
        let error = rig.store.run(Vmdk.set_backing(file.clone(), Some(link))).unwrap_err();
        assert!(error.message.contains(word), "{error}");
    }
    assert_eq!(rig.store.pages(rig.files(0)[0]).first_difference(&before), None);
}
