//! Goal: the driver keeps the contract of all drivers. Method: the suites of [`crate::testing::conformance`] over layouts and
//! chains; `qemu-img check` as a second judge of crashed images.

use super::rig::have_qemu;
use crate::qcow2::Qcow2;
use crate::raw_driver::Raw;
use crate::testing::conformance;
use crate::testing::oracle;
use crate::testing::rig::{Case, LayerCase};
use crate::testing::size_of_run;

const KIB: u64 = 1024;

fn layer(options: &[(&str, &str)], size: u64) -> LayerCase {
    LayerCase::new(&Qcow2, options, size)
}

fn raw(size: u64) -> LayerCase {
    LayerCase::new(&Raw, &[], size)
}

/// All suites, smaller than their own defaults: there are many cases. The environment variables of the suites make it larger.
fn passes(case: Case) {
    let run = || {
        let seeds = size_of_run("MODEL_SEEDS", 1);
        conformance::for_seeds(&case, "model", seeds, |case, seed| {
            conformance::model::run(case, seed, 100, None)
        })?;
        let seeds = size_of_run("CONCURRENCY_SEEDS", 3);
        conformance::for_seeds(&case, "concurrency", seeds, conformance::concurrency::run)?;
        let points = size_of_run("FAULT_POINTS", 8);
        conformance::for_seeds(&case, "faults", 1, |case, seed| {
            conformance::faults::sweep(case, seed, points)
        })?;
        conformance::for_seeds(&case, "no space", 1, conformance::faults::no_space)?;
        let (seeds, states) = (size_of_run("CRASH_SEEDS", 1), size_of_run("REPLAY_STATES", 30) as usize);
        conformance::for_seeds(&case, "crash", seeds, |case, seed| {
            conformance::crash::run(case, seed, states, None)
        })?;
        let length = size_of_run("ENUMERATE_LENGTH", 1);
        conformance::for_seeds(&case, "enumerate", 1, |case, seed| {
            conformance::enumerate::run(case, seed, length)
        })
    };
    run().unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn alone() {
    passes(Case::new("qcow2", vec![layer(&[], 700 * KIB + 512)]));
}

#[test]
fn small_clusters_with_a_log() {
    passes(Case::new("qcow2 of 512", vec![layer(&[("cluster_size", "512")], 700 * KIB)]).logged(30));
}

#[test]
fn subclusters_on_raw() {
    let options = [("extended_l2", "on"), ("cluster_size", "16k")];
    passes(
        Case::new("subclusters on raw", vec![layer(&options, 600 * KIB), raw(400 * KIB + 512)]).logged(1000),
    );
}

#[test]
fn subclusters_with_a_log_that_is_always_full() {
    let options = [("extended_l2", "on"), ("cluster_size", "16k")];
    passes(Case::new("subclusters", vec![layer(&options, 600 * KIB)]).logged(3));
}

#[test]
fn on_qcow2_on_raw() {
    let case = Case::new(
        "qcow2 on qcow2 on raw",
        vec![
            layer(&[("cluster_size", "4k")], 500 * KIB),
            layer(&[("compat", "0.10")], 600 * KIB),
            raw(300 * KIB),
        ],
    );
    passes(case.with_budget(32 << 10));
}

#[test]
fn data_files() {
    let mut one = layer(&[("data_file", "data"), ("cluster_size", "4k")], 500 * KIB);
    one.data_files = 1;
    passes(Case::new("data file", vec![one.clone()]).logged(100));
    one.options.push(("data_file_raw".into(), "on".into()));
    passes(Case::new("raw data file", vec![one]));
}

#[test]
fn on_a_device() {
    let mut one = layer(&[("cluster_size", "4k")], 500 * KIB);
    one.device_bytes = Some(2 << 20);
    passes(Case::new("qcow2 on a device", vec![one]).logged(100));
}

#[test]
fn qemu_judges_crashes() {
    if !have_qemu() {
        return;
    }
    let case = Case::new("qcow2", vec![layer(&[("cluster_size", "4k")], 300 * KIB)]).logged(100);
    conformance::for_seeds(&case, "crash", 1, |case, seed| {
        conformance::crash::run(case, seed, 25, Some(&oracle::judge))
    })
    .unwrap_or_else(|error| panic!("{error}"));
}
