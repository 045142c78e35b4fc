//! Goal: the VHD driver keeps the contract of all drivers. Method: the conformance suites on every kind of image, alone and in
//! chains, with and without an allocation log.

use crate::raw_driver::Raw;
use crate::testing::conformance::{all, concurrency, crash, doubt, enumerate, faults, for_seeds, model};
use crate::testing::rig::{Case, LayerCase};
use crate::testing::size_of_run;
use crate::vhd::Vhd;

const KIB: u64 = 1024;

fn vhd(options: &[(&str, &str)], size: u64) -> LayerCase {
    LayerCase::new(&Vhd, options, size)
}

fn raw(size: u64) -> LayerCase {
    LayerCase::new(&Raw, &[], size)
}

/// Runs a few seeds of the suites on the cases, so that it takes seconds; all suites in full with `VHD_SUITES_ALL=1`.
fn run(cases: Vec<Case>) {
    for case in cases {
        if size_of_run("VHD_SUITES_ALL", 0) > 0 {
            all(&case, None).unwrap();
            continue;
        }
        for_seeds(&case, "model", 1, |case, seed| model::run(case, seed, 120, None)).unwrap();
        for_seeds(&case, "concurrency", 2, concurrency::run).unwrap();
        for_seeds(&case, "faults", 1, |case, seed| faults::sweep(case, seed, 10)).unwrap();
        for_seeds(&case, "no space", 1, faults::no_space).unwrap();
        for_seeds(&case, "crash", 1, |case, seed| crash::run(case, seed, 20, None)).unwrap();
        for_seeds(&case, "doubt", 2, |case, seed| doubt::run(case, seed, 20)).unwrap();
        for_seeds(&case, "enumerate", 1, |case, seed| enumerate::run(case, seed, 1)).unwrap();
    }
}

#[test]
fn fixed() {
    let device = LayerCase { device_bytes: Some(4096 * KIB), ..vhd(&[("type", "fixed")], 200 * KIB) };
    run(vec![
        Case::new("fixed", vec![vhd(&[("type", "fixed")], 220 * KIB)]),
        Case::new("fixed device", vec![device]),
    ]);
}

#[test]
fn dynamic() {
    let blocks = [("block_size", "16k")];
    let device = LayerCase { device_bytes: Some(4096 * KIB), ..vhd(&blocks, 200 * KIB) };
    run(vec![
        Case::new("dynamic", vec![vhd(&blocks, 240 * KIB + 512)]),
        Case::new("dynamic", vec![vhd(&[("block_size", "4k")], 200 * KIB)]).logged(20).with_budget(8192),
        Case::new("dynamic", vec![vhd(&[], 200 * KIB)]).logged(1000),
        Case::new("dynamic device", vec![device]),
    ]);
}

#[test]
fn differencing() {
    let blocks = [("block_size", "16k")];
    run(vec![
        Case::new("differencing", vec![vhd(&blocks, 240 * KIB), raw(240 * KIB)]),
        Case::new("over a small one", vec![vhd(&blocks, 240 * KIB), raw(190 * KIB + 512)]).logged(30),
        Case::new("over a large one", vec![vhd(&blocks, 190 * KIB), raw(240 * KIB)]).with_budget(8192),
        Case::new("three deep", vec![vhd(&blocks, 200 * KIB), vhd(&[], 200 * KIB), raw(40 * KIB)])
            .logged(1000),
    ]);
}
