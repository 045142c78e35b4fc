//! Goal: a disk is a byte array, whatever order reads, writes, erases, flushes and re-opens come in.
//! Method: random histories against an array, with a budget of a few slices so that tables come and go; checked by our own check.

use futures_lite::future::block_on;

use super::rig::*;

#[test]
fn random_histories() {
    let cases = [
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=65536",
        "extended_l2=on",
        "compat=0.10",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=16384,extended_l2=on",
        "refcount_bits=1",
    ];
    for (number, options) in cases.iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.qcow2");
        let size = 3_000 * 1024 + 512 * number as u64;
        let list: Vec<(&str, &str)> =
            options.split(',').filter_map(|option| option.split_once('=')).collect();
        create(&path, size, None, &list).unwrap();
        let layers = [("qcow2", vec![path.clone()])];
        let mut model = vec![0; size as usize];
        let mut rng = fastrand::Rng::with_seed(1000 + number as u64);
        for round in 0..4 {
            let volume = open(&layers, true);
            for _ in 0..60 {
                change(&volume, &mut model, &mut rng);
            }
            same(options, &read_all(&volume), &model);
            if round == 2 {
                // What a crash of the process leaves: without a log everything acknowledged is in the file.
                drop(volume);
                let found = check(&[&path], None);
                assert_eq!(found.corruptions, Vec::<String>::new(), "{options}");
                continue;
            }
            block_on(volume.close()).unwrap();
            let found = check(&[&path], Some(crate::driver::Repair::Leaks));
            assert_eq!(found.corruptions, Vec::<String>::new(), "{options}");
            if round != 3 {
                assert_eq!(found.leaks, Vec::<String>::new(), "{options}");
            }
        }
    }
}

#[test]
fn space_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    create(&path, 64 << 20, None, &[]).unwrap();
    let layers = [("qcow2", vec![path.clone()])];
    let empty = std::fs::metadata(&path).unwrap().len();
    let volume = open(&layers, true);
    for round in 0..20 {
        for at in 0..16u64 {
            write(&volume, (at * 4 + round % 4) << 20, &vec![1; 1 << 20]);
        }
        block_on(volume.flush()).unwrap();
        block_on(volume.erase(0, 64 << 20, crate::driver::Erase::Discard)).unwrap();
        block_on(volume.tidy()).unwrap();
    }
    block_on(volume.close()).unwrap();
    let found = check(&[&path], None);
    assert_eq!((found.corruptions_total, found.leaks_total, found.allocated_bytes), (0, 0, 0));
    let length = std::fs::metadata(&path).unwrap().len();
    // 16 MiB are in use at a time, and a busy image keeps up to 64 MiB in reserve.
    assert!(length < empty + (96 << 20), "320 MiB went through an image that now has {length} bytes");
}

#[test]
fn sequential_writes_lie_in_a_row() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    create(&path, 256 << 20, None, &[]).unwrap();
    let volume = open(&[("qcow2", vec![path])], true);
    for at in 0..64u64 {
        write(&volume, at << 20, &vec![7; 1 << 20]);
    }
    let mut pieces = Vec::new();
    let covered = volume.map_read(0, 64 << 20, &mut pieces).unwrap();
    assert_eq!(covered, 64 << 20);
    assert!(pieces.len() <= 12, "64 MiB in {} pieces", pieces.len());
}
