//! A RAM disk against a byte vector.
//!
//! Goal: any sequence of reads, writes, discards and zeroes answers as a plain array of bytes would; holes, memory and
//! budget agree with each other and with the file; a disk made again on the same file holds the same bytes.
//! Method: random operations (proptest) on a disk of odd size, large enough that requests exceed one call's share.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::sys::stat::fstat;
use proptest::prelude::*;
use shard::ram::{PageSize, RamBudget, RamDisk, RamOutcome, anonymous_backing};

const SIZE: usize = (5 << 20) + 512;

#[derive(Debug, Clone)]
enum Op {
    Read { offset: usize, len: usize },
    Write { offset: usize, len: usize, value: u8 },
    Discard { offset: usize, len: usize },
    Zero { offset: usize, len: usize, may_unmap: bool },
    Extents { offset: usize, len: usize },
    Reopen,
}

/// Ranges of all kinds: sectors anywhere, whole blocks, a few bytes across a border, and megabytes; all inside the disk.
fn range() -> impl Strategy<Value = (usize, usize)> {
    let sectors = (0..SIZE / 512, 1..64usize).prop_map(|(s, n)| (s * 512, n * 512));
    let blocks = (0..SIZE / 4096, 1..40usize).prop_map(|(b, n)| (b * 4096, n * 4096));
    let bytes = (0..SIZE, 0..9000usize);
    let large = (0..SIZE, 0..SIZE);
    prop_oneof![4 => sectors, 4 => blocks, 2 => bytes, 1 => large].prop_map(|(o, n)| (o, n.min(SIZE - o)))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => range().prop_map(|(offset, len)| Op::Read { offset, len }),
        6 => (range(), any::<u8>()).prop_map(|((offset, len), value)| Op::Write { offset, len, value }),
        4 => range().prop_map(|(offset, len)| Op::Discard { offset, len }),
        2 => (range(), any::<bool>()).prop_map(|((offset, len), may_unmap)| Op::Zero { offset, len, may_unmap }),
        2 => range().prop_map(|(offset, len)| Op::Extents { offset, len }),
        1 => Just(Op::Reopen),
    ]
}

/// Calls until all of the request is done; alone on the disk every call must get on.
fn all(len: usize, mut call: impl FnMut(usize) -> RamOutcome) {
    let mut done = 0;
    loop {
        match call(done) {
            RamOutcome::Done => return,
            RamOutcome::Partial { done: more } => {
                assert!(more > 0, "stuck at {done} of {len} without a rival");
                done += more as usize;
                assert!(done < len, "all is done, yet the call said there is more");
            }
            other => panic!("{other:?} at {done} of {len}"),
        }
    }
}

struct Bench {
    file: OwnedFd,
    disk: Arc<RamDisk>,
    budget: Arc<RamBudget>,
    model: Vec<u8>,
}

impl Bench {
    fn new() -> Bench {
        let file = anonymous_backing("model", SIZE as u64, PageSize::Base).expect("memfd");
        let budget = Arc::new(RamBudget::new(64 << 20));
        let disk = open(&file, &budget);
        Bench { file, disk, budget, model: vec![0; SIZE] }
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut seen = vec![0xa5; len];
        all(len, |done| self.disk.read((offset + done) as u64, &mut seen[done..]));
        seen
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::Read { offset, len } => {
                assert!(self.read(offset, len) == self.model[offset..offset + len], "{op:?}");
            }
            Op::Write { offset, len, value } => {
                let src: Vec<u8> = (0..len).map(|i| value.wrapping_add((i / 97) as u8)).collect();
                all(len, |done| self.disk.write((offset + done) as u64, &src[done..]));
                self.model[offset..offset + len].copy_from_slice(&src);
            }
            Op::Discard { offset, len } => {
                all(len, |done| self.disk.discard((offset + done) as u64, (len - done) as u64));
                self.model[offset..offset + len].fill(0);
                self.whole_blocks_are_holes(offset, len);
            }
            Op::Zero { offset, len, may_unmap } => {
                all(len, |done| {
                    self.disk.write_zeroes((offset + done) as u64, (len - done) as u64, may_unmap)
                });
                self.model[offset..offset + len].fill(0);
                if !may_unmap {
                    let extents = self.disk.extents(offset as u64, len as u64, usize::MAX);
                    assert!(extents.iter().all(|extent| !extent.hole), "{op:?} left a hole");
                }
            }
            Op::Extents { offset, len } => self.check_extents(offset, len),
            Op::Reopen => {
                let before = self.disk.allocated_bytes();
                self.disk = open(&self.file, &self.budget);
                assert!(self.disk.allocated_bytes() <= before, "memory appeared from nowhere");
            }
        }
        let in_file = fstat(&self.file).expect("stat").st_blocks as u64 * 512;
        assert_eq!(self.disk.allocated_bytes(), in_file, "after {op:?}");
        assert_eq!(self.budget.used_bytes(), in_file, "after {op:?}");
    }

    fn whole_blocks_are_holes(&self, offset: usize, len: usize) {
        let (first, mut end) = (offset.next_multiple_of(4096), (offset + len) / 4096 * 4096);
        if offset + len == SIZE {
            end = SIZE;
        }
        if first < end {
            let extents = self.disk.extents(first as u64, (end - first) as u64, usize::MAX);
            assert!(extents.iter().all(|extent| extent.hole), "memory was kept in {first}..{end}");
        }
    }

    fn check_extents(&self, offset: usize, len: usize) {
        let extents = self.disk.extents(offset as u64, len as u64, usize::MAX);
        assert_eq!(extents.iter().map(|e| e.len).sum::<u64>(), len as u64);
        assert!(extents.windows(2).all(|pair| pair[0].hole != pair[1].hole), "neighbours are merged");
        let mut at = offset;
        for extent in &extents {
            let end = at + extent.len as usize;
            assert!(!extent.hole || self.model[at..end].iter().all(|&byte| byte == 0), "data in a hole");
            at = end;
        }
        let one = self.disk.extents(offset as u64, len as u64, 1);
        assert_eq!(one.as_slice(), &extents[..extents.len().min(1)], "at most as many as asked for");
    }
}

fn open(file: &OwnedFd, budget: &Arc<RamBudget>) -> Arc<RamDisk> {
    let file = file.try_clone().expect("dup");
    RamDisk::create(file, "model", SIZE as u64, PageSize::Base, Arc::clone(budget)).expect("create")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn behaves_as_an_array_of_bytes(ops in prop::collection::vec(op(), 1..60)) {
        let mut bench = Bench::new();
        for op in &ops {
            // The old disk goes before the new one counts the same memory.
            if matches!(op, Op::Reopen) {
                let budget = Arc::new(RamBudget::new(64 << 20));
                bench.budget = Arc::clone(&budget);
            }
            bench.run(op);
        }
        prop_assert!(bench.read(0, SIZE) == bench.model);
        let budget = Arc::clone(&bench.budget);
        drop(bench);
        prop_assert_eq!(budget.used_bytes(), 0, "a dropped disk gives its budget back");
    }
}

// Goal: a request outside the disk fails with EINVAL and changes nothing, whatever the numbers.
#[test]
fn outside_the_disk_is_an_error() {
    let bench = Bench::new();
    let size = SIZE as u64;
    for (offset, len) in [(size, 1u64), (size - 1, 2), (0, size + 1), (u64::MAX, 1), (u64::MAX - 1, 2)] {
        let mut buffer = vec![1u8; len as usize];
        assert_eq!(bench.disk.read(offset, &mut buffer), RamOutcome::Failed(libc::EINVAL));
        assert!(buffer.iter().all(|&byte| byte == 1));
        assert_eq!(bench.disk.write(offset, &buffer), RamOutcome::Failed(libc::EINVAL));
        assert_eq!(bench.disk.discard(offset, len), RamOutcome::Failed(libc::EINVAL));
        assert_eq!(bench.disk.write_zeroes(offset, len, false), RamOutcome::Failed(libc::EINVAL));
        assert_eq!(bench.disk.write_zeroes(offset, len, true), RamOutcome::Failed(libc::EINVAL));
        assert!(bench.disk.extents(offset, len, 10).is_empty());
    }
    assert_eq!(bench.disk.discard(1, u64::MAX), RamOutcome::Failed(libc::EINVAL));
    assert_eq!(bench.disk.allocated_bytes(), 0);
    assert_eq!(bench.disk.read(size, &mut []), RamOutcome::Done, "nothing at the end is inside");
}

// Goal: a sparse disk of 16 TiB costs nothing, and requests over all of it are bounded per call.
#[test]
fn a_huge_sparse_disk_is_cheap() {
    let size = 16u64 << 40;
    let file = anonymous_backing("large", size, PageSize::Base).expect("memfd");
    let disk = RamDisk::create(file, "large", size, PageSize::Base, Arc::new(RamBudget::new(1 << 20)))
        .expect("create");
    assert_eq!(disk.write(size - 512, &[7; 512]), RamOutcome::Done);
    let RamOutcome::Partial { done } = disk.discard(0, size) else {
        panic!("one call cannot look at it all")
    };
    assert!(done > 0 && done.is_multiple_of(4096));
    let extents = disk.extents(0, size, 100);
    assert!(extents.len() == 1 && extents[0].hole && extents[0].len < size);
    let last = disk.extents(size - 4096, 4096, 100);
    assert!(last.len() == 1 && !last[0].hole);
    assert!(disk.allocated_bytes() <= 64 << 10);
}
