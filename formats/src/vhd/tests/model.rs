//! Goal: a VHD is a disk, whoever laid it out. Method: the conformance suite of models (random requests against an array of bytes) on
//! all block sizes, on layouts of other programs, and on a footer without its last byte; places of new blocks looked at.
//! What every format passes is in `suites`.

use super::*;
use crate::driver::Erase;
use crate::raw_driver::Raw;
use crate::testing::conformance::model;
use crate::testing::rig::{Case, LayerCase, Rig};

/// Random requests on new images.
fn exercise(layers: Vec<LayerCase>, steps: usize, seed: u64) {
    model::run(&Case::new("vhd", layers), seed, steps, None)
        .unwrap_or_else(|error| panic!("SEED={seed}: {error}"));
}

fn vhd(size: u64, options: &[(&str, &str)]) -> LayerCase {
    LayerCase::new(&Vhd, options, size)
}

#[test]
fn dynamic_of_all_block_sizes() {
    for (block, seed) in [("512", 1), ("4096", 2), ("8192", 3), ("65536", 4), ("2M", 5), ("16M", 6)] {
        exercise(vec![vhd(3 * 512 + (600 << 10), &[("block_size", block)])], 200, seed);
    }
}

#[test]
fn dynamic_of_several_large_blocks() {
    exercise(vec![vhd(7 << 20, &[])], 150, 11);
}

#[test]
fn differencing_over_parents_of_all_sizes() {
    for (block, below, seed) in
        [("4096", 200u64 << 10, 31), ("512", 150 << 10, 32), ("65536", 100 << 10, 33), ("2M", 300 << 10, 34)]
    {
        let below = LayerCase::new(&Raw, &[], below);
        exercise(vec![vhd(200 << 10, &[("block_size", block)]), below], 200, seed);
    }
}

/// A dynamic image as QEMU lays it out: the block table at 1536, blocks of bitmap and data back to back, nothing aligned to 4 KiB.
fn foreign(
    block: u32,
    blocks: u32,
    creator: &[u8; 4],
    version: u32,
    low_bits_first: bool,
) -> (Pages, Vec<u8>) {
    use crate::vhd::{bitmap, footer::*, header::Header};
    let size = u64::from(block) * u64::from(blocks) - 512;
    let mut footer = Footer::new(DiskType::Dynamic, size, [9; 16], 1_700_000_000);
    footer.creator_app = *creator;
    footer.creator_version = version.into();
    let header = Header::new(1536, blocks, block);
    let mut file = Pages::empty();
    file.write(0, &footer.to_bytes());
    file.write(512, &header.to_bytes());
    let table: Vec<u8> = vec![0xff; header.table_bytes() as usize];
    file.write(1536, &table);
    let mut end = 1536 + header.table_bytes();
    let (bitmap_bytes, mut bytes) = ((block / 512).div_ceil(8).next_multiple_of(512), vec![0; size as usize]);
    let mut rng = fastrand::Rng::with_seed(u64::from(block));
    // Blocks in a strange order, bits in strange places; data behind clear bits is a former owner's.
    for number in (0..blocks).rev().step_by(2) {
        let mut bits = vec![0; bitmap_bytes as usize];
        let data = nonzero(&mut rng, u64::from(block));
        for sector in 0..u64::from(block / 512) {
            let at = (u64::from(number) * u64::from(block) + sector * 512) as usize;
            if rng.u8(..3) > 0 && at < bytes.len() {
                bitmap::set(&mut bits, 0, sector, sector + 1, low_bits_first);
                bytes[at..at + 512].copy_from_slice(&data[sector as usize * 512..][..512]);
            }
        }
        file.write(1536 + u64::from(number) * 4, &((end / 512) as u32).to_be_bytes());
        file.write(end, &bits);
        file.write(end + u64::from(bitmap_bytes), &data);
        end += u64::from(bitmap_bytes + block);
    }
    file.write(end, &footer.to_bytes());
    (file, bytes)
}

/// Random requests on an image that is there.
fn exercise_made((file, bytes): (Pages, Vec<u8>), seed: u64) {
    let case = Case::new("vhd", vec![vhd(bytes.len() as u64, &[])]);
    let made = Rig::create(&case, seed).unwrap();
    let mut rig = made.with_files(vec![file], seed);
    rig.initial = bytes;
    model::exercise(rig, seed, 150, None).unwrap_or_else(|error| panic!("SEED={seed}: {error}"));
}

#[test]
fn images_of_other_layouts() {
    exercise_made(foreign(4096, 40, b"win ", 0x6_0001, false), 51);
    exercise_made(foreign(65536, 9, b"vbox", 0x4_0003, false), 52);
    exercise_made(foreign(8192, 30, b"tap\0", 1, true), 53);
}

#[test]
fn a_footer_without_its_last_byte() {
    let (file, bytes) = foreign(4096, 12, b"win ", 0x6_0001, false);
    let cut = Pages::of(&file.bytes(0..file.length() - 1));
    exercise_made((cut, bytes), 61);
}

#[test]
fn new_blocks_lie_on_pages() {
    let file = empty();
    create(&file, Some(8 << 20), None, &[]);
    let volume = volume(&file, true);
    for block in [3u64, 0, 2] {
        write(&volume, block << 21, &[1; 512]).unwrap();
        let mut extents = Vec::new();
        volume.layers()[0].driver.map(block << 21, 512, &mut extents).unwrap();
        let crate::driver::Place::Data { offset, .. } = extents[0].place else { panic!("{extents:?}") };
        assert_eq!(offset % 4096, 0);
    }
}

#[test]
fn erased_space_is_used_again() {
    let file = empty();
    create(&file, Some(64 << 20), None, &[("block_size", "65536")]);
    let volume = volume(&file, true);
    for round in 0..6 {
        for block in 0..200u64 {
            write(&volume, block << 16, &[round + 1; 512]).unwrap();
        }
        block_on(volume.erase(0, 200 << 16, Erase::Discard)).unwrap();
        assert_eq!(read(&volume, 5 << 16, 512).unwrap(), [0; 512]);
    }
    write(&volume, 0, &[9; 512]).unwrap();
    assert_eq!(read(&volume, 0, 1024).unwrap(), [[9; 512], [0; 512]].concat());
    block_on(volume.close()).unwrap();
    // Six rounds of 200 blocks and never more than 200 in use: 13 MiB, and what a growth has too much.
    assert!(file.length() < 40 << 20, "{}", file.length());
}
