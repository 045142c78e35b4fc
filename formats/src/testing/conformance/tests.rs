//! Goal: the suites pass what is right and catch what is wrong. Method: raw images and the toy format pass, alone and in mixed
//! chains; each mistake that the toy format can make is caught by the suite that is there for it.

use super::*;
use crate::raw_driver::Raw;
use crate::testing::rig::LayerCase;
use crate::testing::toy::{Bug, Toy};

static TOY: Toy = Toy(None);
const KIB: u64 = 1024;

fn toy(size: u64) -> LayerCase {
    LayerCase::new(&TOY, &[], size)
}

fn raw(size: u64) -> LayerCase {
    LayerCase::new(&Raw, &[], size)
}

#[test]
fn raw_passes() {
    all(&Case::new("raw", vec![raw(600 * KIB)]), None).unwrap();
}

#[test]
fn toy_passes() {
    all(&Case::new("toy", vec![toy(700 * KIB + 512)]).leaking(), None).unwrap();
    all(&Case::new("toy", vec![toy(700 * KIB)]).leaking().logged(10), None).unwrap();
}

#[test]
fn encrypted_toy_passes() {
    all(&Case::new("encrypted toy", vec![toy(700 * KIB + 512).encrypted()]).leaking(), None).unwrap();
    let layers = vec![toy(300 * KIB).encrypted(), toy(500 * KIB), raw(600 * KIB)];
    all(&Case::new("encrypted toy on toy on raw", layers).leaking().logged(1000), None).unwrap();
}

#[test]
fn toy_on_raw_passes() {
    let small = vec![toy(800 * KIB), raw(300 * KIB + 512)];
    all(&Case::new("toy on small raw", small).leaking().logged(1000), None).unwrap();
    all(&Case::new("toy on raw", vec![toy(600 * KIB), raw(600 * KIB)]).leaking().with_budget(8192), None)
        .unwrap();
}

#[test]
fn toy_on_toy_on_raw_passes() {
    let layers = vec![toy(300 * KIB), toy(500 * KIB), raw(600 * KIB)];
    all(&Case::new("toy on toy on large raw", layers).leaking().logged(1000), None).unwrap();
}

/// Runs a suite on a toy with a bug, for up to 30 seeds, and answers with the error that it gave.
fn caught(bug: Bug, backed: bool, run: impl Fn(&Case, u64) -> Result<(), String>) -> String {
    let format: &'static Toy = Box::leak(Box::new(Toy(Some(bug))));
    let mut layers = vec![LayerCase::new(format, &[], 600 * KIB)];
    if backed {
        layers.push(raw(600 * KIB));
    }
    let case = Case::new("toy", layers).leaking();
    (1..=30).find_map(|seed| run(&case, seed).err()).unwrap_or_else(|| panic!("{bug:?} was not caught"))
}

#[test]
fn crash_replay_catches_mappings_before_their_payload() {
    let error = caught(Bug::EarlyMapping, true, |case, seed| crash::run(case, seed, 60, None));
    assert!(error.contains("PowerLoss") && error.contains("holds zeroes"), "{error}");
}

#[test]
fn crash_replay_catches_growth_that_was_not_flushed() {
    caught(Bug::UnflushedGrowth, true, |case, seed| crash::run(case, seed, 300, None));
}

#[test]
fn crash_replay_catches_the_reuse_of_freed_places() {
    caught(Bug::EarlyReuse, false, |case, seed| crash::run(case, seed, 60, None));
}

#[test]
fn crash_replay_catches_answers_before_the_mapping() {
    let error = caught(Bug::EarlyAnswer, false, |case, seed| crash::run(case, seed, 60, None));
    assert!(error.contains("ProcessDeath"), "{error}");
}

#[test]
fn enumeration_catches_a_flush_that_writes_nothing() {
    // Without a log every answer has its mapping in the file, so only a log makes a lazy flush visible.
    let error =
        caught(Bug::LazyFlush, false, |case, seed| enumerate::run(&case.clone().logged(100), seed, 2));
    assert!(error.contains("PowerLoss"), "{error}");
}

#[test]
fn concurrency_catches_a_place_that_two_plans_share() {
    caught(Bug::SharedPlace, false, concurrency::run);
}

#[test]
fn concurrency_catches_places_of_aborted_plans_that_are_not_zero() {
    caught(Bug::DirtyAbort, false, |case, seed| concurrency::run(case, 2 * seed + 1));
}

#[test]
fn the_fault_sweep_catches_places_of_aborted_plans_that_are_not_zero() {
    caught(Bug::DirtyAbort, false, |case, seed| faults::sweep(case, seed, 1000));
}
