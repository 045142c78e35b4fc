//! Goal: every tool leaves the disk that it should, over every mix of formats, also when it was interrupted and run again; another
//! parent is named whole or not at all after any crash.
//! Method: chains with random contents in the simulated store, compared with the bytes that they are known to hold; tools dropped
//! after a random number of polls; crash replay of the change of a parent.

use std::rc::Rc;

use super::compare::Difference;
use super::copy::{Target, copy};
use super::layers::{self, LayerFiles};
use super::walk::Depth;
use super::*;
use crate::driver::{Budget, Create, Erase, Format, Link, Repair};
use crate::error::Error;
use crate::file::ImageFile;
use crate::registry::format;
use crate::testing::replay::crashes;
use crate::testing::rig::{Case, LayerCase, Rig, read_all, write};
use crate::testing::{Abandon, Pages, size_of_run};
use crate::volume::Volume;

const SIZE: u64 = 3 << 20;

fn layer(name: &str, options: &[(&str, &str)], size: u64) -> LayerCase {
    LayerCase::new(format(name).unwrap(), options, size)
}

fn small(name: &str, size: u64) -> LayerCase {
    let options: &[(&str, &str)] = match name {
        "qcow2" => &[("cluster_size", "4096")],
        "vhd" => &[("block_size", "65536")],
        _ => &[],
    };
    layer(name, options, size)
}

/// Chains of all mixes, with parents that are smaller and larger.
fn cases() -> Vec<Case> {
    [
        ("raw", vec![small("raw", SIZE)]),
        ("qcow2", vec![small("qcow2", SIZE)]),
        ("vhd", vec![layer("vhd", &[], SIZE)]),
        ("fixed", vec![layer("vhd", &[("type", "fixed")], SIZE)]),
        ("qcow", vec![small("qcow", SIZE)]),
        ("qcow/qcow2", vec![layer("qcow", &[("cluster_size", "64k")], SIZE), small("qcow2", SIZE - 512)]),
        ("qcow2/compressed", vec![small("qcow2", SIZE), layer("qcow2", &[], SIZE).encoded()]),
        ("qcow2/raw", vec![layer("qcow2", &[], SIZE), small("raw", SIZE - 512)]),
        ("vhd/raw", vec![small("vhd", SIZE), small("raw", SIZE + 4096)]),
        ("qcow2/vhd/vhd", vec![small("qcow2", SIZE), small("vhd", SIZE - 1024), small("vhd", SIZE)]),
        ("vhd/vhd/raw", vec![layer("vhd", &[], SIZE), small("vhd", SIZE / 2), small("raw", SIZE)]),
        ("qcow2/qcow2", vec![layer("qcow2", &[("extended_l2", "on")], SIZE), small("qcow2", SIZE / 2 + 512)]),
    ]
    .into_iter()
    .map(|(name, layers)| Case::new(name, layers))
    .collect()
}

/// A chain with random contents in its top, too, and what its disk holds.
fn filled(case: &Case, seed: u64) -> (Rig, Vec<u8>) {
    let rig = Rig::create(case, seed).unwrap();
    let mut model = rig.initial.clone();
    let volume = rig.open(true).unwrap();
    let mut rng = fastrand::Rng::with_seed(seed);
    rig.store.run(async {
        for _ in 0..10 {
            let start = rng.u64(..SIZE / 512) * 512;
            let len = (rng.u64(1..=100) * 512).min(SIZE - start);
            if rng.u8(..4) == 0 {
                volume.erase(start, len, Erase::Zero).await.unwrap();
                model[start as usize..(start + len) as usize].fill(0);
            } else {
                let bytes: Vec<u8> = (0..len).map(|_| rng.u8(1..)).collect();
                write(&volume, start, &bytes).await.unwrap();
                model[start as usize..(start + len) as usize].copy_from_slice(&bytes);
            }
        }
        volume.close().await.unwrap();
    });
    (rig, model)
}

fn budget() -> Rc<Budget> {
    Budget::new(256 << 10)
}

/// The images of a chain from `first` on, the first writable or not.
fn images(rig: &Rig, first: usize, writable: bool) -> Vec<LayerFiles> {
    let layers = rig.case.layers.iter().enumerate().skip(first);
    layers
        .map(|(index, layer)| {
            let open =
                |number: &usize| rig.store.open(*number, writable && index == first) as Rc<dyn ImageFile>;
            LayerFiles {
                format: layer.format,
                files: rig.files(index).iter().map(open).collect(),
                snapshot: None,
                key: None,
            }
        })
        .collect()
}

async fn contents(images: &[LayerFiles]) -> Vec<u8> {
    let volume = layers::open(images, false, &budget()).await.unwrap();
    read_all(&volume).await.unwrap()
}

/// An empty image in the store of `rig`.
async fn made(rig: &Rig, name: &'static str, size: u64) -> LayerFiles {
    let file = rig.store.add(&format!("mem/new.{name}"), Pages::empty());
    let format = format(name).unwrap();
    let create = Create { size: Some(size), backing: None, options: Vec::new(), key: None };
    format.create(file.clone(), Vec::new(), &create).await.unwrap();
    LayerFiles { format, files: vec![file], snapshot: None, key: None }
}

#[test]
fn a_copy_is_the_same_disk_and_a_changed_byte_is_found() {
    for (number, case) in cases().iter().enumerate() {
        for target in ["raw", "qcow2", "vhd"] {
            let (rig, model) = filled(case, number as u64);
            rig.store.run(async {
                let source = layers::open(&images(&rig, 0, false), false, &budget()).await.unwrap();
                let image = made(&rig, target, SIZE).await;
                let new = layers::open(std::slice::from_ref(&image), true, &budget()).await.unwrap();
                let copied =
                    copy((&source, Depth::Chain), 0..SIZE, (&new, Target::New), 0, &()).await.unwrap();
                layers::finish(&new).await.unwrap();
                let name = format!("{case:?} to {target}");
                assert_eq!(copied.data + copied.zero, SIZE, "{name}");
                assert!(contents(std::slice::from_ref(&image)).await == model, "{name}");

                let new = layers::open(&[image], true, &budget()).await.unwrap();
                assert_eq!(compare::compare(&source, &new, true, &()).await, Ok(None), "{name}");
                for at in [SIZE - 1, 1_234_567, 513] {
                    write(&new, at, &[model[at as usize] ^ 1]).await.unwrap();
                    let found = compare::compare(&new, &source, false, &()).await;
                    assert_eq!(found, Ok(Some(Difference::Byte(at))), "{name}");
                }
                new.close().await.unwrap();
            });
        }
    }
}

#[test]
fn a_part_of_a_used_disk_is_replaced_and_the_rest_is_not() {
    for (number, case) in cases().iter().enumerate() {
        let (rig, model) = filled(case, 100 + number as u64);
        let (start, end, to) = (4096, SIZE - 700 * 512, 1024);
        rig.store.run(async {
            let source = layers::open(&images(&rig, 0, false), false, &budget()).await.unwrap();
            for target in ["raw", "qcow2", "vhd"] {
                let image = made(&rig, target, SIZE).await;
                let used = layers::open(std::slice::from_ref(&image), true, &budget()).await.unwrap();
                write(&used, 0, &vec![0x77; SIZE as usize]).await.unwrap();
                copy((&source, Depth::Chain), start..end, (&used, Target::Used), to, &()).await.unwrap();
                layers::finish(&used).await.unwrap();
                let mut wanted = vec![0x77; SIZE as usize];
                wanted[to as usize..(to + end - start) as usize]
                    .copy_from_slice(&model[start as usize..end as usize]);
                assert!(contents(&[image]).await == wanted, "{case:?} to {target}");
                let beyond = copy((&source, Depth::Chain), 0..SIZE, (&used, Target::Used), 512, &()).await;
                assert!(beyond.unwrap_err().message.contains("do not fit"));
            }
        });
    }
}

/// One attempt of a tool on opened volumes.
async fn coalesce_once(rig: &Rig) -> Result<(), Error> {
    let parent = layers::open(&images(rig, 1, true), true, &budget()).await?;
    let child = &images(rig, 0, false)[0];
    let child = layers::open_alone(child, false, Some(parent.size()), &budget()).await?;
    coalesce::coalesce(&child, &parent, &()).await?;
    layers::finish(&parent).await
}

#[test]
fn a_coalesced_parent_is_the_disk_also_after_interruptions() {
    for (number, case) in cases().iter().filter(|case| case.layers.len() > 1).enumerate() {
        for polls in [1, 7, 40, 200] {
            let (rig, mut model) = filled(case, 200 + number as u64);
            rig.store.run(Abandon::after(polls, coalesce_once(&rig)));
            rig.store.settle();
            assert!(
                rig.store.run(contents(&images(&rig, 0, false))) == model,
                "{case:?}: through the child, {polls}"
            );
            rig.store.run(coalesce_once(&rig)).unwrap();
            let merged = rig.store.run(contents(&images(&rig, 1, false)));
            assert!(merged.len() as u64 >= SIZE, "{case:?}");
            // What the parent has behind the child's end is its own.
            model.extend_from_slice(&merged[SIZE as usize..]);
            assert!(merged == model, "{case:?}: the parent, {polls}");
            assert_eq!(rig.check(1, None).unwrap().corruptions_total, 0, "{case:?}");
        }
    }
}

async fn rebase_once(rig: &Rig, below: Option<&Volume>) -> Result<(), Error> {
    let image = layers::open(&images(rig, 0, true), true, &budget()).await?;
    rebase::rebase(&image, below, &()).await?;
    layers::finish(&image).await
}

#[test]
fn a_rebased_disk_reads_the_same_over_another_parent() {
    let cases = cases();
    let overlays = cases.iter().filter(|case| case.layers.len() > 1);
    for (number, case) in overlays.enumerate() {
        let (rig, model) = filled(case, 300 + number as u64);
        rig.store.run(async {
            // A parent of other contents and another size.
            let raw = made(&rig, "raw", SIZE - 4096).await;
            let below = layers::open(std::slice::from_ref(&raw), true, &budget()).await.unwrap();
            write(&below, 8192, &vec![0x55; 1 << 20]).await.unwrap();
            assert!(Abandon::after(30, rebase_once(&rig, Some(&below))).await.is_none());
            assert!(contents(&images(&rig, 0, false)).await == model, "{case:?}: over its old parent");
            rebase_once(&rig, Some(&below)).await.unwrap();

            let top = images(&rig, 0, true).remove(0);
            let link =
                Link { paths: vec!["new.raw".to_owned()], format: Some("raw".to_owned()), identity: None };
            top.format.set_backing(top.files[0].clone(), Some((link, SIZE - 4096))).await.unwrap();
            let described = top.format.describe(top.files[0].clone()).await.unwrap();
            let backing = described.backing.unwrap();
            assert_eq!(
                (&backing.paths[0][..], backing.format.as_deref()),
                ("new.raw", Some("raw")),
                "{case:?}"
            );
            let top = images(&rig, 0, false).remove(0);
            assert!(contents(&[top, raw]).await == model, "{case:?}: over its new parent");
        });
        rig.check_sound().unwrap();
    }
}

#[test]
fn without_a_parent_everything_is_copied_up() {
    for (number, case) in cases().iter().filter(|case| case.layers.len() > 1).enumerate() {
        let (rig, model) = filled(case, 400 + number as u64);
        rig.store.run(async {
            rebase_once(&rig, None).await.unwrap();
            let top = images(&rig, 0, true).remove(0);
            let changed = top.format.set_backing(top.files[0].clone(), None).await;
            match top.format.name() {
                "qcow2" | "qcow" => {
                    changed.unwrap();
                    assert!(contents(&images(&rig, 0, false)[..1]).await == model, "{case:?}");
                }
                _ => assert!(changed.unwrap_err().message.contains("convert it"), "{case:?}"),
            }
        });
    }
}

/// Paths of every kind of length, so that the name lies in, on and behind the first sector.
fn paths() -> Vec<String> {
    [1, 60, 130, 200, 250].into_iter().map(|len| format!("{}.raw", "p".repeat(len))).collect()
}

fn link_to(path: &str) -> (Link, u64) {
    (Link { paths: vec![path.to_owned()], format: Some("raw".to_owned()), identity: None }, SIZE)
}

#[test]
fn a_crash_leaves_the_old_parent_or_the_new_one() {
    let overlays: [(&str, &[(&str, &str)]); 7] = [
        ("qcow", &[]),
        ("qcow", &[("extended", "off")]),
        ("vhd", &[]),
        ("qcow2", &[]),
        ("qcow2", &[("cluster_size", "4096")]),
        ("qcow2", &[("compat", "0.10")]),
        ("qcow2", &[("cluster_size", "1024"), ("refcount_bits", "1")]),
    ];
    for (number, (name, options)) in overlays.into_iter().enumerate() {
        let case = Case::new(name, vec![layer(name, options, SIZE), small("raw", SIZE)]);
        let (mut rig, model) = filled(&case, 500 + number as u64);
        let top = case.layers[0].format;
        let mut old = "1.raw".to_owned();
        for (round, new) in paths().into_iter().chain(paths().into_iter().rev()).enumerate() {
            if options.contains(&("cluster_size", "1024")) && new.len() > 140 {
                // Old and new name do not fit into such a cluster together; that is refused, and tested below.
                continue;
            }
            rig.store.start_record();
            let file = rig.store.open(rig.files(0)[0], true);
            rig.store.run(top.set_backing(file, Some(link_to(&new)))).unwrap();
            let record = rig.store.take_record();
            crashes(&record, size_of_run("TOOLS_CRASH_STATES", 10) as usize, round as u64, |crash, seed| {
                let left = rig.with_files(crash.files.clone(), seed);
                let file = left.store.open(left.files(0)[0], false);
                let described = left.store.run(top.describe(file)).map_err(|error| error.message)?;
                let path = described.backing.map(|link| link.paths[0].clone()).unwrap_or_default();
                let found = left.store.run(contents(&images(&left, 0, false)));
                match (path == old || path == new, found == model) {
                    // A VHD may lack the footer at its end, which has a copy: repaired, nothing is wrong.
                    (true, true) => {
                        left.check(0, Some(Repair::All)).map_err(|error| error.message)?;
                        let sound = left.check_sound().map(drop);
                        let same = left.store.run(contents(&images(&left, 0, false))) == model;
                        if same {
                            sound
                        } else {
                            Err(format!("{old} to {new}: a repair changed the contents"))
                        }
                    }
                    (_, same) => {
                        Err(format!("{old} to {new}: the parent is {path:?}, contents the same: {same}"))
                    }
                }
            })
            .unwrap();
            old = new;
            rig = rig.after_death(round as u64).unwrap();
        }
    }
}

#[test]
fn a_name_without_room_changes_nothing() {
    let case = Case::new("1k", vec![layer("qcow2", &[("cluster_size", "1024")], SIZE), small("raw", SIZE)]);
    let (rig, model) = filled(&case, 600);
    let file = rig.store.open(rig.files(0)[0], true);
    let before = rig.store.pages(rig.files(0)[0]);
    for (path, word) in [
        ("p".repeat(900), "room"),
        ("p".repeat(1024), "1023"),
        (String::new(), "1023"),
        ("nbd://x".to_owned(), "protocol"),
    ] {
        let error =
            rig.store.run(case.layers[0].format.set_backing(file.clone(), Some(link_to(&path)))).unwrap_err();
        assert!(error.message.contains(word), "{error}");
        assert_eq!(rig.store.pages(rig.files(0)[0]).first_difference(&before), None);
    }
    assert!(rig.store.run(contents(&images(&rig, 0, false))) == model);
}

#[test]
fn measured_space_is_enough_and_not_much_more() {
    for (number, case) in cases().iter().enumerate() {
        let (rig, _) = filled(case, 700 + number as u64);
        for target in ["qcow2", "vhd"] {
            rig.store.run(async {
                let source = layers::open(&images(&rig, 0, false), false, &budget()).await.unwrap();
                let image = made(&rig, target, SIZE).await;
                let create = Create { size: None, backing: None, options: Vec::new(), key: None };
                let measured = measure::measure(image.format, &create, Some(&source)).await.unwrap();
                let new = layers::open(std::slice::from_ref(&image), true, &budget()).await.unwrap();
                copy((&source, Depth::Chain), 0..SIZE, (&new, Target::New), 0, &()).await.unwrap();
                layers::finish(&new).await.unwrap();
                let length = image.files[0].length();
                assert!(length <= measured.required, "{case:?} to {target}: {length}, {measured:?}");
                assert!(measured.required <= measured.full, "{measured:?}");
                // Units that hold only zeroes count, too; a driver's reserve may stay.
                assert!(measured.full <= SIZE + (3 << 20), "{case:?} to {target}: {measured:?}");
            });
        }
    }
}

#[test]
fn an_overlay_is_empty_until_it_is_written() {
    for case in cases().iter().filter(|case| case.layers.len() > 1) {
        let rig = Rig::create(case, 800).unwrap();
        let below = case.layers[1].size;
        rig.store.run(async {
            let alone = |writable| {
                let image = images(&rig, 0, writable).remove(0);
                async move { layers::open_alone(&image, writable, Some(below), &budget()).await.unwrap() }
            };
            assert_eq!(snapshot::is_empty(&alone(false).await).await, Ok(true), "{case:?}");
            let volume = layers::open(&images(&rig, 0, true), true, &budget()).await.unwrap();
            write(&volume, SIZE - 512, &[1; 512]).await.unwrap();
            layers::finish(&volume).await.unwrap();
            assert_eq!(snapshot::is_empty(&alone(false).await).await, Ok(false), "{case:?}");
        });
    }
}

#[test]
fn a_format_that_cannot_do_a_thing_refuses_by_its_name() {
    let rig = Rig::create(&Case::new("raw", vec![small("raw", SIZE)]), 900).unwrap();
    let raw: &dyn Format = format("raw").unwrap();
    let file = rig.store.open(0, true);
    let errors = [
        rig.store.run(raw.set_backing(file.clone(), None)).unwrap_err(),
        rig.store.run(raw.snapshots(file)).unwrap_err(),
    ];
    for error in errors {
        assert!(error.message.contains("the format raw"), "{error}");
    }
}
