//! One RAM disk used by several threads at once, as several shards do.
//!
//! Goal: no reader ever sees parts of two writes in one 4 KiB block; memory and budget stay exact while others write, discard and
//! zero; every call returns and every lock is released.
//! Method: threads that write blocks of one value, and readers that look for a second value in a block. A call that
//! meets a rival is made again, as a shard does in its next turn.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::stat::fstat;
use shard::ram::{PageSize, RamBudget, RamDisk, RamOutcome, anonymous_backing};

const BLOCK: usize = 4096;

fn disk(size: u64, page: PageSize) -> (OwnedFd, Arc<RamBudget>, Arc<RamDisk>) {
    let file = anonymous_backing("shared", size, page).expect("memfd");
    let budget = Arc::new(RamBudget::new(1 << 30));
    let disk = RamDisk::create(file.try_clone().expect("dup"), "shared", size, page, Arc::clone(&budget));
    (file, budget, disk.expect("create"))
}

/// Makes a request until it is done; the next "turn" gives others the processor.
fn all(mut call: impl FnMut(usize) -> RamOutcome) {
    let mut done = 0;
    loop {
        match call(done) {
            RamOutcome::Done => return,
            RamOutcome::Partial { done: more } => done += more as usize,
            other => panic!("{other:?}"),
        }
        std::thread::yield_now();
    }
}

/// A small generator of numbers, so that a thread's work is the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % bound
    }
}

/// Writers, a discarder and readers on `blocks` blocks; the discarder's ranges are made of whole `unit`s of blocks. Returns how
/// many blocks were read with data in them.
fn rivals(disk: &RamDisk, blocks: usize, unit: usize, rounds: usize) -> usize {
    let saw_data = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for writer in 1..=3u8 {
            scope.spawn(move || {
                let mut random = Random(writer.into());
                for round in 0..rounds {
                    let count = 1 + random.below(4);
                    let first = random.below(blocks - count);
                    let value = writer + 3 * (round % 80) as u8;
                    let src = vec![value; count * BLOCK];
                    all(|done| disk.write((first * BLOCK + done) as u64, &src[done..]));
                }
            });
        }
        scope.spawn(|| {
            let mut random = Random(99);
            for round in 0..rounds {
                let units = 1 + random.below(blocks / unit / 2);
                let first = random.below(blocks / unit - units) * unit;
                let count = units * unit;
                let (offset, len) = ((first * BLOCK) as u64, (count * BLOCK) as u64);
                match round % 8 {
                    0..=4 => all(|done| disk.discard(offset + done as u64, len - done as u64)),
                    5 => all(|done| disk.write_zeroes(offset + done as u64, len - done as u64, false)),
                    _ => drop(disk.extents(offset, len, 64)),
                }
            }
        });
        for reader in 0..2u64 {
            let saw_data = &saw_data;
            scope.spawn(move || {
                let mut random = Random(1000 + reader);
                let mut dst = vec![0u8; 3 * BLOCK];
                for _ in 0..rounds {
                    let first = random.below(blocks - 3);
                    all(|done| disk.read((first * BLOCK + done) as u64, &mut dst[done..]));
                    for block in dst.chunks(BLOCK) {
                        let value = block[0];
                        let torn = block.iter().position(|&byte| byte != value);
                        assert_eq!(torn, None, "a block begins with {value} and changes inside");
                        saw_data.fetch_add(usize::from(value != 0), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    saw_data.into_inner()
}

#[test]
fn blocks_are_never_torn_and_memory_stays_exact() {
    let blocks = 48;
    let (file, budget, disk) = disk((blocks * BLOCK) as u64, PageSize::Base);
    let saw_data = rivals(&disk, blocks, 1, 6000);
    assert!(saw_data > 0, "the readers saw only holes: the test has tested nothing");
    let in_file = fstat(&file).expect("stat").st_blocks as u64 * 512;
    assert_eq!(disk.allocated_bytes(), in_file);
    assert_eq!(budget.used_bytes(), in_file);
    // Every lock is free: one call does all of it.
    assert_eq!(disk.write(0, &vec![1; blocks * BLOCK]), RamOutcome::Done);
    assert_eq!(disk.discard(0, (blocks * BLOCK) as u64), RamOutcome::Done);
    assert_eq!((disk.allocated_bytes(), budget.used_bytes()), (0, 0));
    assert_eq!(fstat(&file).expect("stat").st_blocks, 0);
}

// The same with 2 MiB pages: a page comes and goes as a whole while others are at its blocks.
#[test]
fn huge_pages_come_and_go_whole() {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    let before = std::fs::read_to_string(POOL).unwrap_or_default();
    let reserved =
        std::fs::write(POOL, "3").is_ok() && std::fs::read_to_string(POOL).is_ok_and(|n| n.trim() == "3");
    if reserved {
        let size = 3 * PageSize::HUGE_BYTES;
        let (file, budget, disk) = disk(size, PageSize::Huge2M);
        let saw_data = rivals(&disk, size as usize / BLOCK, 512, 1500);
        assert!(saw_data > 0, "the readers saw only holes: the test has tested nothing");
        let in_file = fstat(&file).expect("stat").st_blocks as u64 * 512;
        assert_eq!((disk.allocated_bytes(), budget.used_bytes()), (in_file, in_file));
        all(|done| disk.discard(done as u64, size - done as u64));
        assert_eq!((disk.allocated_bytes(), budget.used_bytes()), (0, 0));
        assert_eq!(fstat(&file).expect("stat").st_blocks, 0);
    } else {
        println!("SKIPPED: cannot reserve three huge pages of 2 MiB");
    }
    let _ = std::fs::write(POOL, before.trim());
}

// Goal: writes of less than a block by several threads into one block are all kept.
// Method: each thread owns one 512-byte sector of every block and counts in it; at the end each sector holds the last count.
#[test]
fn sectors_of_one_block_do_not_lose_writes() {
    let (_file, _budget, disk) = disk(64 << 10, PageSize::Base);
    let rounds = 3000u32;
    std::thread::scope(|scope| {
        for sector in 0..4usize {
            let disk = &disk;
            scope.spawn(move || {
                for round in 0..=rounds {
                    let src = round.to_le_bytes().repeat(128);
                    for block in 0..3 {
                        let offset = block * BLOCK + sector * 512;
                        all(|done| disk.write((offset + done) as u64, &src[done..]));
                    }
                }
            });
        }
    });
    let expected = rounds.to_le_bytes().repeat(512);
    for block in 0..3u64 {
        let mut seen = vec![0; 2048];
        assert_eq!(disk.read(block * BLOCK as u64, &mut seen), RamOutcome::Done);
        assert_eq!(seen, expected);
    }
}

// Goal: many threads that write into a full budget neither exceed it nor lose any of it.
// Method: four threads fill a disk four times as large as the limit; what failed has no memory, what succeeded reads back.
#[test]
fn rivals_do_not_exceed_the_budget() {
    let size = 1u64 << 20;
    let file = anonymous_backing("full", size, PageSize::Base).expect("memfd");
    let limit = size / 4 + 4096;
    let budget = Arc::new(RamBudget::new(limit));
    let disk =
        RamDisk::create(file.try_clone().expect("dup"), "full", size, PageSize::Base, Arc::clone(&budget))
            .expect("create");
    let written = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (disk, budget, written) = (&disk, &budget, &written);
            scope.spawn(move || {
                for block in (thread..size / BLOCK as u64).step_by(4) {
                    loop {
                        match disk.write(block * BLOCK as u64, &[block as u8; BLOCK]) {
                            RamOutcome::Done => {
                                written.fetch_add(1, Ordering::Relaxed);
                                break;
                            }
                            RamOutcome::NoSpace => break,
                            RamOutcome::Partial { done: 0 } => std::thread::yield_now(),
                            other => panic!("{other:?}"),
                        }
                    }
                    assert!(budget.used_bytes() <= limit);
                }
            });
        }
    });
    assert_eq!(budget.used_bytes(), limit, "all of the limit was used");
    assert_eq!(disk.allocated_bytes(), limit);
    assert_eq!(fstat(&file).expect("stat").st_blocks as u64 * 512, limit);
    assert!(written.into_inner() as u64 * BLOCK as u64 <= limit);
}
