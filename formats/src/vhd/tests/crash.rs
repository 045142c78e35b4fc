//! Goal: whatever instant the machine dies at, the image opens, shows what was flushed, and nothing that was never written there.
//! Method: every change of the file is recorded while a workload runs; from the record states are made that power loss may leave. Each is opened, checked and read. Flushed data has to be
//! there; other bytes are old, new, or both in pieces of 512. The disk grows once: it has the old size or the new one.

use std::rc::Rc;

use super::*;
use crate::driver::Erase;
use crate::testing::Record;
use crate::testing::replay::{Cause, Replayer};
use crate::vhd::layout::Layout;

const SIZE: u64 = 96 << 10;
/// What it grows to in the middle of the workload, within a block.
const GROWN: u64 = SIZE + (28 << 10) + 512;
/// The step that does that.
const GROWTH_STEP: usize = 30;

/// What may be in each sector: the last flushed value, and what was written since. A value is the byte that fills it.
type Legal = Vec<Vec<u8>>;

/// An instant of the workload: events of the record that had happened, and what was legal, for each sector of the disk.
struct Instant {
    at: usize,
    legal: Legal,
}

/// Runs a workload and returns the record and the instants.
fn workload(differencing: bool, seed: u64) -> (Record, Vec<Instant>) {
    let mem = mem(&Pages::empty(), true);
    let file: Rc<dyn ImageFile> = mem.clone();
    let link = Link { paths: vec!["p".to_owned()], format: Some("raw".to_owned()), identity: None };
    let backing = differencing.then_some((link, SIZE));
    create(&file, Some(SIZE), backing, &[("block_size", "8192")]);
    mem.store().start_record();
    let disk = open(&file, differencing).unwrap();
    let mut rng = fastrand::Rng::with_seed(seed);
    let below = if differencing { 0xbb } else { 0 };
    let mut legal: Legal = vec![vec![below]; (SIZE / 512) as usize];
    let mut instants = Vec::new();
    let mut value = 1;
    for step in 0..70 {
        let sectors = legal.len();
        let from = rng.usize(..sectors);
        let len = rng.usize(1..=20).min(sectors - from);
        let (offset, bytes) = (from as u64 * 512, len * 512);
        match rng.u8(..12) {
            _ if step == GROWTH_STEP => {
                block_on(disk.resize(GROWN)).unwrap();
                legal.resize((GROWN / 512) as usize, vec![0]);
            }
            0 | 1 => {
                block_on(disk.flush()).unwrap();
                for sector in &mut legal {
                    sector.drain(..sector.len() - 1);
                }
            }
            2 => {
                let (from, to) = (from / 16 * 16, sectors.min((from + len).next_multiple_of(16)));
                block_on(disk.erase(from as u64 * 512, (to - from) as u64 * 512, Erase::Zero)).unwrap();
                legal[from..to].iter_mut().for_each(|sector| sector.push(0));
            }
            3 => block_on(disk.tidy()).unwrap(),
            _ => {
                value = value % 180 + 1;
                write(&disk, offset, &vec![value; bytes]).unwrap();
                legal[from..from + len].iter_mut().for_each(|sector| sector.push(value));
            }
        }
        instants.push(Instant { at: mem.store().mark(), legal: legal.clone() });
    }
    block_on(disk.close()).unwrap();
    for sector in &mut legal {
        sector.drain(..sector.len() - 1);
    }
    instants.push(Instant { at: mem.store().mark(), legal });
    (mem.store().take_record(), instants)
}

fn open(file: &Rc<dyn ImageFile>, differencing: bool) -> Result<Volume, Error> {
    if !differencing {
        return Volume::new(vec![layer(file, file.is_writable(), None)?]);
    }
    let parent: Rc<dyn ImageFile> = MemFile::alone("p", Pages::of(&vec![0xbb; SIZE as usize]), false);
    at_once::open_files(&[("vhd", vec![file.clone()]), ("raw", vec![parent])], file.is_writable(), None)
}

#[test]
fn power_loss_at_any_instant() {
    let (mut states, mut by_copy, mut during) = (0, 0, [0, 0]);
    // More: VHD_CRASH_RUNS=1000.
    let runs = std::env::var("VHD_CRASH_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(1);
    for (differencing, seed) in (0..runs).flat_map(|run| [(false, 2 * run), (true, 2 * run + 1)]) {
        let (record, instants) = workload(differencing, seed);
        let mut replayer = Replayer::new(&record);
        let mut rng = fastrand::Rng::with_seed(seed + 100);
        for (index, instant) in instants.iter().enumerate() {
            // In the middle of the step after this instant, too: what it writes is legal then.
            let until = instants.get(index + 1).map_or(instant.at, |next| next.at);
            let states_here = if index + 1 == GROWTH_STEP { 40 } else { 2 };
            let mut moments: Vec<usize> = (0..states_here).map(|_| rng.usize(instant.at..=until)).collect();
            moments.sort_unstable();
            for at in moments {
                replayer.advance(at);
                let state = replayer.crash(Cause::PowerLoss, &mut rng);
                let also = instants.get(index + 1).map_or(&instant.legal, |next| &next.legal);
                let (copy, size) = judge(&state.files[0], differencing, &[&instant.legal, also]);
                by_copy += u64::from(copy);
                states += 1;
                // A resize is durable when it is answered.
                let resizing = instant.legal.len() != also.len();
                during[usize::from(size == GROWN)] += u64::from(resizing);
            }
        }
    }
    println!(
        "{states} crash states, during a resize {} of the old size and {} of the new one",
        during[0], during[1]
    );
    assert!(during[0] > 0 && during[1] > 0, "the resize is not looked at: {during:?}");
    assert_eq!(by_copy, 0, "states without a footer at the end");
}

/// Opens, checks and reads a state. Returns whether the footer at its end was missing, and the size of the disk.
fn judge(state: &Pages, differencing: bool, legal: &[&Legal]) -> (bool, u64) {
    let file: Rc<dyn ImageFile> = mem(state, false);
    let layout = block_on(Layout::read(&file)).unwrap();
    let by_copy = layout.footers.trailing.is_err();
    assert!(layout.footers.copy.is_ok(), "the copy is the way out");
    let findings = check(&file, None);
    assert_eq!(findings.corruptions, Vec::<String>::new());
    let disk = open(&file, differencing).unwrap();
    let size = disk.size();
    assert!(legal.iter().any(|legal| legal.len() as u64 * 512 == size), "{size} bytes");
    let is_legal = |sector: usize, value: u8| {
        legal.iter().any(|legal| legal.get(sector).is_some_and(|legal| legal.contains(&value)))
    };
    for sector in 0..(size / 512) as usize {
        let found = read(&disk, sector as u64 * 512, 512).unwrap();
        let uniform = found.iter().all(|byte| *byte == found[0]);
        assert!(uniform && is_legal(sector, found[0]), "sector {sector} holds {}", found[0]);
    }
    // It can be written again, and is clean then.
    let file: Rc<dyn ImageFile> = mem(state, true);
    let disk = open(&file, differencing).unwrap();
    for block in 0..size / 8192 {
        write(&disk, block * 8192 + 512, &[0xdd; 512]).unwrap();
        let found = read(&disk, block * 8192, 512).unwrap();
        assert!(is_legal(block as usize * 16, found[0]));
    }
    block_on(disk.close()).unwrap();
    drop(disk);
    // Without a new block nobody touches the end of the file: what the dead one left may be there still.
    let findings = check(&file, Some(crate::driver::Repair::Leaks));
    assert_eq!((findings.corruptions, findings.leaks_total), (Vec::new(), findings.repaired_total));
    assert_clean(&file);
    (by_copy, size)
}
