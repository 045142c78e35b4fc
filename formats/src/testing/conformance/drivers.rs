//! Goal: the drivers of the registry keep the promise, over their options and in mixed chains. Method: all suites on a table of
//! cases, with `qemu-img` and the rule for the footers of VHDs as further judges.

use super::{Case, all};
use crate::crypt::luks::Luks;
use crate::qcow::Qcow;
use crate::qcow2::Qcow2;
use crate::raw_driver::Raw;
use crate::testing::oracle;
use crate::testing::rig::LayerCase;
use crate::vhd::Vhd;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

fn raw(size: u64) -> LayerCase {
    LayerCase::new(&Raw, &[], size)
}

fn qcow2(size: u64, options: &[(&str, &str)]) -> LayerCase {
    LayerCase::new(&Qcow2, options, size)
}

fn qcow(size: u64, options: &[(&str, &str)]) -> LayerCase {
    LayerCase::new(&Qcow, options, size)
}

fn vhd(size: u64, options: &[(&str, &str)]) -> LayerCase {
    LayerCase::new(&Vhd, options, size)
}

/// Made with little work for who has the passphrase: it is known.
fn luks(size: u64) -> LayerCase {
    LayerCase::new(&Luks, &[("iter-time", "1")], size).encrypted()
}

fn encrypted(size: u64, options: &[(&str, &str)]) -> LayerCase {
    let options = [&[("encrypt.format", "luks"), ("encrypt.iter-time", "1")], options].concat();
    qcow2(size, &options).encrypted()
}

fn with_data_file(size: u64, options: &[(&str, &str)]) -> LayerCase {
    let mut options = options.to_vec();
    options.push(("data_file", "0-data0.qcow2"));
    LayerCase { data_files: 1, ..qcow2(size, &options) }
}

fn passes(name: &str, layers: Vec<LayerCase>, adapt: &[fn(Case) -> Case]) {
    let case = adapt.iter().fold(Case::new(name, layers), |case, adapt| adapt(case));
    if let Err(error) = all(&case, Some(&oracle::judge)) {
        panic!("{error}");
    }
}

/// One test per line: name, layers (the first on top), and what else is special of the case. More layouts of each format are in the
/// suites of its own folder; here are those that meet other formats, or other judges.
macro_rules! cases {
    ($($(#[$attribute:meta])* $name:ident: [$($layer:expr),+] $(, $adapt:expr)?;)+) => {
        $(#[test]
        $(#[$attribute])*
        fn $name() {
            passes(stringify!($name), vec![$($layer),+], &[$($adapt)?]);
        })+
    };
}

cases! {
    qcow2_64k: [qcow2(3 * MIB + 512, &[])];
    qcow2_64k_log: [qcow2(3 * MIB, &[])], |case| case.logged(1000);
    qcow2_512_small_memory: [qcow2(600 * KIB, &[("cluster_size", "512")])], |case| case.with_budget(16 << 10);
    qcow2_refcount_1: [qcow2(MIB, &[("cluster_size", "4k"), ("refcount_bits", "1")])];
    qcow2_lazy: [qcow2(MIB, &[("cluster_size", "4k"), ("lazy_refcounts", "on")])];
    qcow2_data_file_log: [with_data_file(2 * MIB, &[])], |case| case.logged(1000);
    qcow2_extended_on_raw: [qcow2(MIB, &[("extended_l2", "on"), ("cluster_size", "16k")]), raw(900 * KIB)];
    qcow2_on_raw: [qcow2(2 * MIB, &[]), raw(2 * MIB)];
    qcow2_on_raw_log: [qcow2(2 * MIB, &[("cluster_size", "16k")]), raw(2 * MIB)], |case| case.logged(1000);
    qcow2_v2_on_small_raw: [qcow2(MIB, &[("compat", "0.10"), ("cluster_size", "4k")]), raw(500 * KIB + 512)];
    qcow2_on_qcow2_on_vhd: [qcow2(MIB, &[]), qcow2(2 * MIB, &[("cluster_size", "4k")]), vhd(3 * MIB, &[])],
        |case| case.logged(1000);
    qcow2_on_device: [LayerCase { device_bytes: Some(8 * MIB), ..qcow2(2 * MIB, &[]) }];
    qcow2_compressed: [qcow2(3 * MIB + 512, &[]).encoded()];
    qcow2_compressed_512_log: [qcow2(600 * KIB, &[("cluster_size", "512")]).encoded()], |case| case.logged(1000);
    qcow2_compressed_zstd_extended: [qcow2(2 * MIB, &[("compression_type", "zstd"), ("extended_l2", "on")]).encoded()];
    qcow2_compressed_v2_on_raw:
        [qcow2(MIB, &[("compat", "0.10"), ("cluster_size", "16k")]).encoded(), raw(900 * KIB)];
    qcow2_on_compressed_log:
        [qcow2(MIB, &[("cluster_size", "4k")]), qcow2(MIB, &[("compression_type", "zstd"), ("refcount_bits", "1")]).encoded()],
        |case| case.logged(1000);
    luks_alone: [luks(MIB)];
    luks_of_old: [LayerCase { options: vec![("cipher".into(), "aes-cbc-essiv:sha256".into()), ("key-bits".into(), "256".into()),
        ("iter-time".into(), "1".into())], ..luks(MIB) }];
    qcow2_luks: [encrypted(2 * MIB + 512, &[])];
    qcow2_luks_log: [encrypted(2 * MIB, &[])], |case| case.logged(1000);
    qcow2_luks_512: [encrypted(600 * KIB, &[("cluster_size", "512")])];
    qcow2_luks_v2: [encrypted(MIB, &[("cluster_size", "4k"), ("compat", "0.10")])];
    qcow2_luks_metadata: [encrypted(MIB, &[("cluster_size", "4k"), ("preallocation", "metadata")])];
    qcow2_luks_extended_on_raw: [encrypted(MIB, &[("extended_l2", "on"), ("cluster_size", "16k")]), raw(900 * KIB)];
    qcow2_luks_extended_log: [encrypted(MIB, &[("extended_l2", "on")])], |case| case.logged(1000);
    qcow2_luks_on_luks_log: [encrypted(MIB, &[("cluster_size", "16k")]), luks(MIB)], |case| case.logged(1000);
    qcow2_on_qcow2_luks: [qcow2(MIB, &[]), encrypted(MIB, &[("cluster_size", "4k")])], |case| case.logged(1000);
    qcow_4k: [qcow(3 * MIB + 512, &[])];
    qcow_4k_log: [qcow(3 * MIB, &[])], |case| case.logged(1000);
    qcow_512_small_memory: [qcow(600 * KIB, &[("cluster_size", "512")])], |case| case.with_budget(16 << 10);
    qcow_plain_64k: [qcow(3 * MIB, &[("cluster_size", "64k"), ("extended", "off")])];
    qcow_compressed: [qcow(MIB + 512, &[]).encoded()];
    qcow_compressed_on_raw_log: [qcow(MIB, &[("cluster_size", "16k")]).encoded(), raw(900 * KIB)], |case| case.logged(1000);
    qcow_on_raw: [qcow(MIB, &[]), raw(MIB)];
    qcow_8k_on_raw_log: [qcow(2 * MIB, &[("cluster_size", "8k")]), raw(2 * MIB)], |case| case.logged(1000);
    qcow_on_qcow_on_qcow2:
        [qcow(MIB, &[("cluster_size", "512")]), qcow(MIB, &[("extended", "off")]).encoded(), qcow2(900 * KIB, &[])],
        |case| case.logged(1000);
    qcow2_on_qcow: [qcow2(MIB, &[]), qcow(2 * MIB, &[]).encoded()];
    vhd_dynamic_64k_log: [vhd(2 * MIB, &[("block_size", "64k")])], |case| case.logged(1000);
    vhd_on_raw: [vhd(5 * MIB, &[]), raw(5 * MIB)];
    vhd_on_raw_log: [vhd(5 * MIB, &[]), raw(5 * MIB)], |case| case.logged(1000);
    vhd_on_vhd_on_raw: [vhd(3 * MIB, &[]), vhd(2 * MIB, &[("block_size", "128k")]), raw(4 * MIB)],
        |case| case.logged(1000);
    vhd_on_small_vhd: [vhd(2 * MIB, &[("block_size", "32k")]), vhd(MIB, &[("type", "fixed")])],
        |case| case.logged(1000);
}
