//! Goal: a VHD is a disk. Method: random writes, reads, erases, flushes, resizes and reopenings through a volume, against an array
//! of bytes, for every kind of image, block size and layout; after each closing, `check` finds nothing.

use std::rc::Rc;

use super::store::{Bytes, Mem};
use super::*;
use crate::driver::Erase;
use crate::raw_driver::Raw;

/// An image under test: the file, what is below it, and what it holds.
struct Subject {
    file: Rc<dyn ImageFile>,
    below: Option<Rc<dyn ImageFile>>,
    bytes: Vec<u8>,
}

impl Subject {
    fn open(&self) -> Volume {
        let Some(below) = &self.below else { return volume(&self.file, true) };
        let open = Open { writable: false, ..open_of(below, false, None) };
        let driver = block_on(Raw.open(open)).unwrap();
        let size = driver.size();
        let top = layer(&self.file, true, Some(size)).unwrap();
        Volume::new(vec![top, Layer { driver, files: vec![below.clone()] }]).unwrap()
    }

    fn compare(&self, volume: &Volume) {
        assert_eq!(volume.size(), self.bytes.len() as u64);
        for at in (0..self.bytes.len()).step_by(65_536) {
            let len = (self.bytes.len() - at).min(65_536);
            let found = read(volume, at as u64, len as u64).unwrap();
            if let Some(wrong) = (0..len).find(|byte| found[*byte] != self.bytes[at + byte]) {
                panic!("byte {} is {:#x} and not {:#x}", at + wrong, found[wrong], self.bytes[at + wrong]);
            }
        }
    }

    /// Random operations; `resize` allows growing.
    fn exercise(&mut self, steps: u64, seed: u64, resize: bool) {
        let mut numbers = Numbers(seed);
        let mut volume = self.open();
        self.compare(&volume);
        for step in 0..steps {
            let size = self.bytes.len() as u64;
            // Now and then not in whole sectors.
            let unit = if numbers.below(8) == 0 { 1 } else { 512 };
            let offset = numbers.below(size / unit) * unit;
            let len = ((numbers.below(24) + 1) * unit * (1 + numbers.below(4) * numbers.below(4)))
                .min(size - offset);
            let range = offset as usize..(offset + len) as usize;
            match numbers.below(16) {
                0..=7 => {
                    let bytes = numbers.bytes(len);
                    write(&volume, offset, &bytes).unwrap();
                    self.bytes[range].copy_from_slice(&bytes);
                }
                8 | 9 => assert_eq!(read(&volume, offset, len).unwrap(), self.bytes[range]),
                10 => {
                    let how = [Erase::Zero, Erase::ZeroKeep][numbers.below(2) as usize];
                    let (from, to) = if numbers.below(2) == 0 {
                        (offset / 4096 * 4096, size)
                    } else {
                        (offset, offset + len)
                    };
                    block_on(volume.erase(from, to - from, how)).unwrap();
                    self.bytes[from as usize..to as usize].fill(0);
                }
                11 => {
                    block_on(volume.erase(offset, len, Erase::Discard)).unwrap();
                    // Sector by sector it is as before or zero.
                    let found = read(&volume, offset, len).unwrap();
                    for (at, byte) in range.zip(found) {
                        assert!(byte == 0 || byte == self.bytes[at]);
                        self.bytes[at] = byte;
                    }
                }
                12 => block_on(volume.flush()).unwrap(),
                13 => block_on(volume.tidy()).unwrap(),
                14 if resize && step % 5 == 0 => {
                    let size = size + numbers.below(200) * 512;
                    block_on(volume.resize(size)).unwrap();
                    self.bytes.resize(size as usize, 0);
                }
                _ if numbers.below(4) == 0 => {
                    block_on(volume.close()).unwrap();
                    drop(volume);
                    assert_clean(&self.file);
                    volume = self.open();
                }
                _ => {}
            }
        }
        self.compare(&volume);
        block_on(volume.close()).unwrap();
        assert_clean(&self.file);
        self.compare(&self.open());
    }
}

fn made(size: u64, options: &[(&str, &str)]) -> Subject {
    let file: Rc<dyn ImageFile> = Mem::new(Bytes::default());
    create(&file, Some(size), None, options);
    Subject { file, below: None, bytes: vec![0; size as usize] }
}

/// A differencing disk over `below` bytes of raw parent.
fn over_raw(size: u64, below: u64, options: &[(&str, &str)]) -> Subject {
    let parent = Numbers(below).bytes(below);
    let below_file: Rc<dyn ImageFile> = Rc::new(Mem { writable: false, ..Mem::plain(Bytes::of(&parent)) });
    let file: Rc<dyn ImageFile> = Mem::new(Bytes::default());
    let link = Link { paths: vec!["p.img".to_owned()], format: Some("raw".to_owned()), identity: None };
    create(&file, Some(size), Some((link, below)), options);
    let mut bytes = parent;
    bytes.resize(size as usize, 0);
    Subject { file, below: Some(below_file), bytes }
}

#[test]
fn dynamic_of_all_block_sizes() {
    for (block, seed) in [("512", 1), ("4096", 2), ("8192", 3), ("65536", 4), ("2M", 5), ("16M", 6)] {
        made(3 * 512 + (600 << 10), &[("block_size", block)]).exercise(400, seed, true);
    }
}

#[test]
fn dynamic_of_several_large_blocks() {
    made(7 << 20, &[]).exercise(300, 11, true);
}

#[test]
fn fixed() {
    made(300 << 10, &[("type", "fixed")]).exercise(400, 21, true);
}

#[test]
fn differencing_over_parents_of_all_sizes() {
    for (block, below, seed) in
        [("4096", 200u64 << 10, 31), ("512", 150 << 10, 32), ("65536", 100 << 10, 33), ("2M", 300 << 10, 34)]
    {
        over_raw(200 << 10, below, &[("block_size", block)]).exercise(400, seed, true);
    }
}

#[test]
fn block_devices() {
    // A device holds junk before it is an image, and its footer stays at its end.
    for type_of in ["dynamic", "fixed"] {
        let junk = Numbers(5).bytes(3 << 20);
        let file: Rc<dyn ImageFile> = Rc::new(Mem { device: true, ..Mem::plain(Bytes::of(&junk)) });
        let size = 512 << 10;
        create(&file, Some(size), None, &[("type", type_of), ("block_size", "8192")]);
        let mut subject = Subject { file, below: None, bytes: vec![0; size as usize] };
        subject.exercise(300, 41, false);
        assert_eq!(subject.file.length(), 3 << 20);
    }
}

/// A dynamic image as QEMU lays it out: the block table at 1536, blocks of bitmap and data back to back, nothing aligned to 4 KiB.
fn foreign(block: u32, blocks: u32, creator: &[u8; 4], version: u32, low_bits_first: bool) -> Subject {
    use crate::vhd::{bitmap, footer::*, header::Header};
    let size = u64::from(block) * u64::from(blocks) - 512;
    let mut footer = Footer::new(DiskType::Dynamic, size, [9; 16], 1_700_000_000);
    footer.creator_app = *creator;
    footer.creator_version = version.into();
    let header = Header::new(1536, blocks, block);
    let mut file = Bytes::default();
    file.write(0, &footer.to_bytes());
    file.write(512, &header.to_bytes());
    let table: Vec<u8> = vec![0xff; header.table_bytes() as usize];
    file.write(1536, &table);
    let mut end = 1536 + header.table_bytes();
    let (bitmap_bytes, mut bytes) = ((block / 512).div_ceil(8).next_multiple_of(512), vec![0; size as usize]);
    let mut numbers = Numbers(u64::from(block));
    // Blocks in a strange order, bits in strange places; data behind clear bits is a former owner's.
    for number in (0..blocks).rev().step_by(2) {
        let mut bits = vec![0; bitmap_bytes as usize];
        let data = numbers.bytes(u64::from(block));
        for sector in 0..u64::from(block / 512) {
            let at = (u64::from(number) * u64::from(block) + sector * 512) as usize;
            if numbers.below(3) > 0 && at < bytes.len() {
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
    Subject { file: Mem::new(file), below: None, bytes }
}

#[test]
fn images_of_other_layouts() {
    foreign(4096, 40, b"win ", 0x6_0001, false).exercise(300, 51, false);
    foreign(65536, 9, b"vbox", 0x4_0003, false).exercise(300, 52, false);
    foreign(8192, 30, b"tap\0", 1, true).exercise(300, 53, false);
}

#[test]
fn a_footer_without_its_last_byte() {
    let subject = foreign(4096, 12, b"win ", 0x6_0001, false);
    let mut bytes = Bytes::default();
    let length = subject.file.length();
    bytes.write(0, &block_on(subject.file.read(0, length as usize - 1)).unwrap());
    let mut subject = Subject { file: Mem::new(bytes), ..subject };
    subject.exercise(200, 61, false);
}

#[test]
fn new_blocks_lie_on_pages() {
    let subject = made(8 << 20, &[]);
    let volume = subject.open();
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
    let subject = made(64 << 20, &[("block_size", "65536")]);
    let volume = subject.open();
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
    assert!(subject.file.length() < 40 << 20, "{}", subject.file.length());
}
