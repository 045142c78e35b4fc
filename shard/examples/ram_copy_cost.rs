//! What a 4 KiB request to a RAM disk costs beside a bare copy of the same bytes. Prints nanoseconds per operation; run it in
//! release mode: `cargo run --release -p shard --example ram_copy_cost`.
//!
//! Three sizes: one that stays in the nearest caches, one in the last level, one in memory. Blocks are visited in a scattered
//! order, as a random load does. Rows are measured in turn, several rounds, and the best of each is shown.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use shard::ram::{PageSize, RamBudget, RamDisk, RamOutcome, anonymous_backing};

const BLOCK: usize = 4096;
const OPERATIONS: usize = 100_000;
const ROUNDS: usize = 5;

fn main() {
    println!(
        "{:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>10}",
        "size", "copy to", "read", "copy fr", "write", "hole", "atomic u64"
    );
    for size in [256 << 10, 8 << 20, 512 << 20] {
        measure(size);
    }
    first_touch();
}

fn measure(size: usize) {
    let budget = Arc::new(RamBudget::new(4 << 30));
    let file = anonymous_backing("cost", size as u64, PageSize::Base).expect("memfd");
    let disk =
        RamDisk::create(file, "cost", size as u64, PageSize::Base, Arc::clone(&budget)).expect("create");
    let file = anonymous_backing("hole", size as u64, PageSize::Base).expect("memfd");
    let hole = RamDisk::create(file, "hole", size as u64, PageSize::Base, budget).expect("create");
    let mut plain = vec![1u8; size];
    let words: Vec<AtomicU64> = (0..size / 8).map(|i| AtomicU64::new(i as u64)).collect();
    let mut buffer = vec![2u8; BLOCK];
    for block in 0..size / BLOCK {
        assert_eq!(disk.write((block * BLOCK) as u64, &buffer), RamOutcome::Done);
    }
    let mut best = [f64::MAX; 6];
    for _ in 0..ROUNDS {
        let mut row = |index: usize, work: &mut dyn FnMut(usize)| {
            best[index] = best[index].min(per_operation(size / BLOCK, work));
        };
        row(0, &mut |at| buffer.copy_from_slice(black_box(&plain[at..at + BLOCK])));
        row(1, &mut |at| assert_eq!(disk.read(at as u64, &mut buffer), RamOutcome::Done));
        row(2, &mut |at| plain[at..at + BLOCK].copy_from_slice(black_box(&buffer)));
        row(3, &mut |at| assert_eq!(disk.write(at as u64, &buffer), RamOutcome::Done));
        row(4, &mut |at| assert_eq!(hole.read(at as u64, &mut buffer), RamOutcome::Done));
        row(5, &mut |at| {
            for (word, to) in words[at / 8..(at + BLOCK) / 8].iter().zip(buffer.chunks_exact_mut(8)) {
                to.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
            }
            black_box(&mut buffer);
        });
    }
    let [copy_to, read, copy_from, write, hole, atomic] = best;
    let kib = size >> 10;
    println!(
        "{kib:>5}KiB {copy_to:>8.0} {read:>8.0} {copy_from:>8.0} {write:>8.0} {hole:>8.0} {atomic:>10.0}"
    );
}

/// Nanoseconds per call of `work` with the offset of a block.
fn per_operation(blocks: usize, work: &mut dyn FnMut(usize)) -> f64 {
    let start = Instant::now();
    let mut block = 0;
    for _ in 0..OPERATIONS {
        // A step that shares no factor with a power of two visits every block.
        block = (block + 7919) % blocks;
        work(block * BLOCK);
    }
    start.elapsed().as_nanos() as f64 / OPERATIONS as f64
}

/// The first write to each block of an empty disk, in order and scattered, and giving all of it back.
fn first_touch() {
    let size = 64usize << 20;
    for (what, step) in [("in order", 1), ("scattered", 7919)] {
        let file = anonymous_backing("first", size as u64, PageSize::Base).expect("memfd");
        let budget = Arc::new(RamBudget::new(1 << 30));
        let disk = RamDisk::create(file, "first", size as u64, PageSize::Base, budget).expect("create");
        let (blocks, buffer) = (size / BLOCK, vec![1u8; BLOCK]);
        let start = Instant::now();
        for index in 0..blocks {
            let at = index * step % blocks * BLOCK;
            assert_eq!(disk.write(at as u64, &buffer), RamOutcome::Done);
        }
        let write = start.elapsed().as_nanos() as usize / blocks;
        let (start, mut done, mut calls) = (Instant::now(), 0, 0u32);
        while let RamOutcome::Partial { done: more } = disk.discard(done, size as u64 - done) {
            done += more;
            calls += 1;
        }
        let discard = start.elapsed().as_nanos() as usize;
        println!(
            "first write {what}: {write} ns per block; discard: {} ns per block, {} us per call",
            discard / blocks,
            discard / 1000 / (calls + 1) as usize
        );
    }
}
