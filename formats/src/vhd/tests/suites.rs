//! Goal: the VHD driver keeps the contract of all drivers. Method: the conformance suites on every kind of image, alone and in
//! chains, with and without an allocation log.

use crate::raw_driver::Raw;
use crate::testing::conformance::all;
use crate::testing::rig::{Case, LayerCase};
use crate::vhd::Vhd;

const KIB: u64 = 1024;

fn vhd(options: &[(&str, &str)], size: u64) -> LayerCase {
    LayerCase::new(&Vhd, options, size)
}

fn raw(size: u64) -> LayerCase {
    LayerCase::new(&Raw, &[], size)
}

/// Runs the suites on the cases.
fn run(cases: Vec<Case>) {
    for case in cases {
        all(&case, None).unwrap();
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
