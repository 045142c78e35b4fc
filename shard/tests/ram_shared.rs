//! One RAM disk used by several threads at once, as several shards do.
//!
//! Goal: no reader ever sees parts of two writes in one 4 KiB block; memory and budget stay exact while others write, discard and
//! zero; every call returns and every lock is released.
//! Method: threads that write blocks of one value, and readers that look for a second value in a block. A call that
//! meets a rival is made again, as a shard does in its next turn.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

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

/// Whether all bytes are the same (one memcmp: a slow check would seldom meet the writers).
fn one_value(bytes: &[u8]) -> bool {
    bytes[1..] == bytes[..bytes.len() - 1]
}

/// A small generator of numbers, so that a thread's work is the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % bound
    }
}

/// Three writers, a discarder and two readers. Writers and readers use the blocks `hot`, the discarder ranges made of whole
/// `unit`s of blocks. All go on until each reader has met data and holes often; panics at a torn block.
fn rivals(disk: &RamDisk, hot: Range<usize>, unit: usize) {
    let units = disk.size_bytes() as usize / BLOCK / unit;
    let readers_left = AtomicUsize::new(2);
    let at_work = || readers_left.load(Ordering::Relaxed) > 0;
    let outcomes = std::thread::scope(|scope| {
        for writer in 1..=3u8 {
            let hot = hot.clone();
            scope.spawn(move || {
                let mut random = Random(writer.into());
                for round in (0..80u8).cycle().take_while(|_| at_work()) {
                    let count = 1 + random.below(4);
                    let first = hot.start + random.below(hot.len() - count);
                    let src = vec![writer + 3 * round; count * BLOCK];
                    all(|done| disk.write((first * BLOCK + done) as u64, &src[done..]));
                }
            });
        }
        scope.spawn(|| {
            let mut random = Random(99);
            for round in (0..16).cycle().take_while(|_| at_work()) {
                let count = 1 + random.below(units / 2);
                let (offset, len) = (random.below(units - count) * unit * BLOCK, count * unit * BLOCK);
                match round {
                    0..=4 => all(|done| disk.discard((offset + done) as u64, (len - done) as u64)),
                    5 => all(|done| disk.write_zeroes((offset + done) as u64, (len - done) as u64, false)),
                    _ => drop(disk.extents(offset as u64, len as u64, 64)),
                }
            }
        });
        let readers = [1000, 1001].map(|seed| {
            let (hot, readers_left) = (hot.clone(), &readers_left);
            scope.spawn(move || {
                let outcome = read_until_both_were_met(disk, hot, seed);
                readers_left.fetch_sub(1, Ordering::Relaxed);
                outcome
            })
        });
        readers.map(|reader| reader.join().expect("reader"))
    });
    assert_eq!(outcomes, [Ok(()), Ok(())]);
}

/// Reads blocks until a thousand with data and a thousand without were seen; says what a torn block looked like. Does not panic, since the
/// rivals work until it returns.
fn read_until_both_were_met(disk: &RamDisk, hot: Range<usize>, seed: u64) -> Result<(), String> {
    let (mut random, mut dst) = (Random(seed), vec![0u8; 3 * BLOCK]);
    let (mut holes, mut data) = (0, 0);
    for round in 0..5_000_000 {
        let first = hot.start + random.below(hot.len() - 3);
        all(|done| disk.read((first * BLOCK + done) as u64, &mut dst[done..]));
        for block in dst.chunks(BLOCK) {
            if !one_value(block) {
                return Err(format!("torn: {block:?}"));
            }
            *if block[0] == 0 { &mut holes } else { &mut data } += 1;
        }
        if holes.min(data) >= 1000 {
            return Ok(());
        }
        if round % 16 == 0 {
            std::thread::yield_now();
        }
    }
    Err(format!("the test has tested little: {holes} blocks without data, {data} with"))
}

#[test]
fn blocks_are_never_torn_and_memory_stays_exact() {
    let blocks = 48;
    let (file, budget, disk) = disk((blocks * BLOCK) as u64, PageSize::Base);
    rivals(&disk, 0..blocks, 1);
    let in_file = fstat(&file).expect("stat").st_blocks as u64 * 512;
    assert_eq!(disk.allocated_bytes(), in_file);
    assert_eq!(budget.used_bytes(), in_file);
    // Every lock is free: one call does all of it.
    assert_eq!(disk.write(0, &vec![1; blocks * BLOCK]), RamOutcome::Done);
    assert_eq!(disk.discard(0, (blocks * BLOCK) as u64), RamOutcome::Done);
    assert_eq!((disk.allocated_bytes(), budget.used_bytes()), (0, 0));
    assert_eq!(fstat(&file).expect("stat").st_blocks, 0);
}

// The same at close quarters: every access is to one block. One thread writes all of it, one zeroes its first half by a discard
// (which keeps the memory), one reads: each half is of one value, and the first is the second's or zero.
#[test]
fn one_block_under_fire() {
    let (_file, _budget, disk) = disk(2 * BLOCK as u64, PageSize::Base);
    let stop = AtomicBool::new(false);
    let values = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut value = 0u8;
            while !stop.load(Ordering::Relaxed) {
                value = value % 250 + 1;
                let src = [value; BLOCK];
                all(|done| disk.write(done as u64, &src[done..]));
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                all(|done| disk.discard(done as u64, (BLOCK / 2 - done) as u64));
            }
        });
        let (mut dst, mut seen) = ([0u8; BLOCK], [0u32; 2]);
        // The rivals may get their first turn late: read until both have often been met, within a bound.
        for round in 0..20_000_000 {
            if round % 64 == 0 {
                std::thread::yield_now();
            }
            if seen.iter().all(|&count| count >= 5_000) {
                break;
            }
            all(|done| disk.read(done as u64, &mut dst[done..]));
            let (first, second) = dst.split_at(BLOCK / 2);
            let whole = one_value(first) && one_value(second) && (first[0] == second[0] || first[0] == 0);
            if !whole {
                stop.store(true, Ordering::Relaxed); // before the panic, which waits for the rivals
                panic!("torn: {dst:?}");
            }
            seen[usize::from(first[0] == second[0])] += 1;
        }
        stop.store(true, Ordering::Relaxed);
        seen
    });
    assert!(values.iter().all(|&count| count >= 5_000), "a rival did nothing: {values:?}");
}

// The same with 2 MiB pages: a page comes and goes as a whole while others are at its blocks.
#[test]
fn huge_pages_come_and_go_whole() {
    let Some(_pool) = HugePages::reserve("3") else {
        println!("SKIPPED: cannot reserve three huge pages of 2 MiB");
        return;
    };
    let size = 3 * PageSize::HUGE_BYTES;
    let (file, budget, disk) = disk(size, PageSize::Huge2M);
    rivals(&disk, 500..524, 512); // on both sides of a border of pages
    let in_file = fstat(&file).expect("stat").st_blocks as u64 * 512;
    assert_eq!((disk.allocated_bytes(), budget.used_bytes()), (in_file, in_file));
    all(|done| disk.discard(done as u64, size - done as u64));
    assert_eq!((disk.allocated_bytes(), budget.used_bytes()), (0, 0));
    assert_eq!(fstat(&file).expect("stat").st_blocks, 0);
}

/// Huge pages reserved for one test; the former number comes back when dropped.
struct HugePages(String);

const HUGE_POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    fn reserve(pages: &str) -> Option<HugePages> {
        let guard = HugePages(std::fs::read_to_string(HUGE_POOL).ok()?);
        std::fs::write(HUGE_POOL, pages).ok()?;
        std::fs::read_to_string(HUGE_POOL).is_ok_and(|now| now.trim() == pages).then_some(guard)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(HUGE_POOL, self.0.trim());
    }
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
