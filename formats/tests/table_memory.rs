//! Goal: tables take the memory that their budget counts, also with the smallest slices. Method: in a process of its own, many slices of
//! 512 bytes are loaded and the resident memory of the process is compared with what the budget says.

#![allow(clippy::unwrap_used)] // a failed test is what an unwrap in it is for

use std::ops::Range;
use std::rc::Rc;

use formats::blocking::wait;
use formats::driver::FileIndex;
use formats::error::Error;
use formats::file::{Buf, ImageFile, Pending};
use formats::metadata::{Budget, Tables};

const SLICE: usize = 512;
const SLICES: usize = 32 << 10;

/// A file without an end that holds zeroes.
#[derive(Debug)]
struct Zeroes;

fn refused<T: 'static>() -> Pending<'static, T> {
    Box::pin(std::future::ready(Err(Error::invalid("it is read only"))))
}

impl ImageFile for Zeroes {
    fn name(&self) -> &str {
        "zeroes"
    }

    fn length(&self) -> u64 {
        u64::MAX
    }

    fn is_device(&self) -> bool {
        false
    }

    fn is_writable(&self) -> bool {
        false
    }

    fn read(&self, _offset: u64, len: usize) -> Pending<'static, Buf> {
        Box::pin(std::future::ready(Ok(Buf::zeroed(len))))
    }

    fn write(&self, _offset: u64, _data: Buf) -> Pending<'static, ()> {
        refused()
    }

    fn flush(&self) -> Pending<'static, ()> {
        refused()
    }

    fn extend(&self, _length: u64) -> Pending<'static, ()> {
        refused()
    }

    fn truncate(&self, _length: u64) -> Pending<'static, ()> {
        refused()
    }

    fn zero(&self, _range: Range<u64>) -> Pending<'static, ()> {
        refused()
    }
}

/// Resident memory of this process, in bytes.
fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

#[test]
fn small_slices_take_what_the_budget_counts() {
    let budget = Budget::new(4 * SLICE * SLICES);
    let file: Rc<dyn ImageFile> = Rc::new(Zeroes);
    let tables = Tables::new(file.clone(), FileIndex(0), vec![file], SLICE, &budget, None);
    let before = resident_bytes();
    for number in 0..SLICES {
        wait(tables.load((number * SLICE) as u64)).unwrap();
    }
    let (counted, taken) = (budget.used_bytes(), resident_bytes() - before);
    assert_eq!(counted, SLICE * SLICES, "nothing was pushed out");
    // What finds the slices takes some as well.
    assert!(taken < 3 * counted, "{taken} bytes of memory for {counted} that were counted");
}
