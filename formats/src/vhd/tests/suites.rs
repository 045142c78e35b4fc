//! Goal: the VHD driver keeps the contract of all drivers. Method: the conformance suites on every kind of image, alone and in
//! chains, with and without an allocation log.

use crate::raw::driver::Raw;
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
    let device = LayerCase { device_bytes: Some(800 * KIB), ..vhd(&[("type", "fixed")], 512 * KIB) };
    run(vec![
        Case::new("fixed", vec![vhd(&[("type", "fixed")], 600 * KIB)]),
        Case::new("fixed device", vec![device]),
    ]);
}

#[test]
fn dynamic() {
    let device = LayerCase { device_bytes: Some(4096 * KIB), ..vhd(&[("block_size", "64k")], 512 * KIB) };
    run(vec![
        Case::new("dynamic", vec![vhd(&[("block_size", "16k")], 600 * KIB + 512)]),
        Case::new("dynamic", vec![vhd(&[("block_size", "4k")], 300 * KIB)]).logged(20).with_budget(8192),
        Case::new("dynamic device", vec![device]),
    ]);
}

#[test]
fn dynamic_of_the_usual_block_size() {
    run(vec![Case::new("dynamic 2M", vec![vhd(&[], 5000 * KIB)]).logged(1000)]);
}

#[test]
fn differencing() {
    let blocks = [("block_size", "16k")];
    run(vec![
        Case::new("differencing", vec![vhd(&blocks, 600 * KIB), raw(600 * KIB)]),
        Case::new("over a small one", vec![vhd(&blocks, 600 * KIB), raw(300 * KIB + 512)]).logged(30),
        Case::new("over a large one", vec![vhd(&blocks, 300 * KIB), raw(600 * KIB)]).with_budget(8192),
        Case::new("three deep", vec![vhd(&blocks, 400 * KIB), vhd(&[], 400 * KIB), raw(200 * KIB)])
            .logged(1000),
    ]);
}
