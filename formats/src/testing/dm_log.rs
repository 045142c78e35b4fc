//! The log format of dm-log-writes (Linux `Documentation/admin-guide/device-mapper/log-writes.rst`), by which other tools can judge
//! us and we others: what `replay-log` replays and QEMU's `blklogwrites` writes.
//!
//! | sector | holds (little-endian) |
//! |---|---|
//! | 0 | magic [`MAGIC`], version 1, number of entries (8 bytes each), bytes of a sector (4 bytes) |
//! | then, per entry | sector, number of sectors, flags, length of a mark's text (8 bytes each), in a sector of its own |
//! | behind a write | its data |
//!
//! A log is of one file. It knows neither lengths nor unaligned writes: a write is widened to whole sectors with what the file held
//! then, a truncation is a discard, growth is nothing. Entries are in the order of completion.

use std::ops::Range;

use super::pages::Pages;
use super::record::{Change, Event, Record};

/// The first eight bytes of a log.
pub const MAGIC: u64 = 0x6a_7366_7773_6872;
/// Bytes of a sector.
pub const SECTOR_BYTES: u64 = 512;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// Sectors of an entry's data that [`parse`] takes at most.
const DATA_MAX_SECTORS: u64 = 1 << 20;

fn sector_of(words: &[u64]) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize(SECTOR_BYTES as usize, 0);
    bytes
}

fn widen(range: Range<u64>) -> Range<u64> {
    range.start / SECTOR_BYTES * SECTOR_BYTES..range.end.next_multiple_of(SECTOR_BYTES)
}

/// Ranges that a change touches, in whole sectors: discarded (true) or written.
fn touched(change: &Change, length: u64) -> Vec<(bool, Range<u64>)> {
    let written = |offset: &u64, data: &[u8]| (false, widen(*offset..*offset + data.len() as u64));
    match change {
        Change::Write { offset, data } => vec![written(offset, data)],
        Change::Pieces(pieces) => pieces.iter().map(|(offset, data)| written(offset, data)).collect(),
        Change::Zero(range) => vec![(widen(range.clone()) == *range, widen(range.clone()))],
        // The sector that the file ends in then, and those behind it.
        Change::Truncate(to) => {
            let whole = to.next_multiple_of(SECTOR_BYTES);
            vec![(false, widen(*to..whole)), (true, whole..length.next_multiple_of(SECTOR_BYTES))]
        }
        Change::Extend(_) | Change::Flush => Vec::new(),
    }
}

/// The log of what a record did to the file number `file`.
pub fn export(record: &Record, file: usize) -> Vec<u8> {
    let mut contents = record.initial[file].clone();
    let mut open = std::collections::HashMap::new();
    let (mut entries, mut count) = (Vec::new(), 0);
    let mut entry = |start: u64, len: u64, flags: u64, data: &[u8]| {
        entries.extend(sector_of(&[start / SECTOR_BYTES, len / SECTOR_BYTES, flags, 0]));
        entries.extend_from_slice(data);
        count += 1;
    };
    for event in &record.events {
        match event {
            Event::Submit { op, file: of, change } if *of == file => {
                open.insert(*op, change);
            }
            Event::Complete { op, ok, landed } => {
                let Some(change) = open.remove(op) else { continue };
                let change = landed.as_ref().unwrap_or(change);
                let ranges = touched(change, contents.length());
                change.apply(&mut contents);
                for (discards, range) in ranges.into_iter().filter(|(_, range)| !range.is_empty()) {
                    let len = range.end - range.start;
                    match discards {
                        true => entry(range.start, len, DISCARD, &[]),
                        false => entry(range.start, len, 0, &contents.bytes(range)),
                    }
                }
                if *change == Change::Flush && *ok {
                    entry(0, 0, FLUSH, &[]);
                }
            }
            _ => {}
        }
    }
    let mut log = sector_of(&[MAGIC, 1, count, SECTOR_BYTES]);
    log.append(&mut entries);
    log
}

/// A record of one file, which held `initial`, from a log: each entry is submitted and answered before the next one.
///
/// # Errors
/// The first thing that is not as the format says.
pub fn parse(log: &[u8], initial: Pages) -> Result<Record, String> {
    let word = |at: u64| {
        let bytes =
            log.get(at as usize..at as usize + 8).ok_or_else(|| format!("it ends before byte {}", at + 8))?;
        Ok::<u64, String>(u64::from_le_bytes(std::array::from_fn(|byte| bytes[byte])))
    };
    let (magic, version, count, sector) = (word(0)?, word(8)?, word(16)?, word(24)? & 0xffff_ffff);
    if magic != MAGIC || version != 1 || !(512..=4096).contains(&sector) || !sector.is_power_of_two() {
        return Err(format!(
            "magic {magic:#x}, version {version}, sectors of {sector} bytes: no log of version 1"
        ));
    }
    let mut record = Record { initial: vec![initial], ..Record::default() };
    let mut at = sector;
    for op in 0..count {
        let (start, sectors, flags) = (word(at)?, word(at + 8)?, word(at + 16)?);
        at += sector;
        let has_data = flags & (MARK | DISCARD) == 0;
        if start.max(sectors) > (1 << 50) || (has_data && sectors > DATA_MAX_SECTORS) {
            return Err(format!("entry {op} says {sectors} sectors at {start}"));
        }
        let change = if flags & MARK != 0 {
            Change::Extend(0)
        } else if flags & DISCARD != 0 {
            Change::Zero(start * sector..(start + sectors) * sector)
        } else if sectors == 0 {
            Change::Flush
        } else {
            let len = sectors * sector;
            let data = log.get(at as usize..(at + len) as usize).ok_or("it ends in the middle of a write")?;
            at += len;
            Change::Write { offset: start * sector, data: data.into() }
        };
        // A write may ask for a flush before it.
        if flags & FLUSH != 0 && change != Change::Flush {
            push(&mut record, 2 * op, Change::Flush);
        }
        push(&mut record, 2 * op + 1, change);
    }
    Ok(record)
}

fn push(record: &mut Record, op: u64, change: Change) {
    record.events.push(Event::Submit { op, file: 0, change });
    record.events.push(Event::Complete { op, ok: true, landed: None });
}

#[cfg(test)]
mod tests {
    //! Goal: a log tells the same story as the record, and the format is the one that others write. Method: export and parse a random
    //! run; parse a log that QEMU wrote, and compare the outcome with the image that QEMU wrote at the same time.

    use super::*;
    use crate::file::{Buf, ImageFile};
    use crate::testing::Store;
    use crate::testing::replay::{Cause, Replayer};

    fn outcome(record: &Record) -> Pages {
        let mut replayer = Replayer::new(record);
        replayer.advance(usize::MAX);
        replayer.crash(Cause::ProcessDeath, &mut fastrand::Rng::with_seed(1)).files.remove(0)
    }

    #[test]
    fn the_log_gives_the_same_contents() {
        for seed in 0..10 {
            let store = Store::new(seed);
            let file = store.add("a", Pages::of(&[9; 10_000]));
            store.start_record();
            let mut rng = fastrand::Rng::with_seed(seed);
            store
                .run(async {
                    for _ in 0..40 {
                        let start = rng.u64(..30_000);
                        match rng.u8(..6) {
                            0 => file.zero(start..start + rng.u64(1..9000)).await?,
                            1 => file.truncate(start).await?,
                            2 => file.flush().await?,
                            _ => {
                                file.write(start, Buf::copy_of(&vec![rng.u8(..); rng.usize(1..3000)])).await?
                            }
                        }
                    }
                    Ok::<(), crate::error::Error>(())
                })
                .unwrap();
            let record = store.take_record();
            let log = export(&record, 0);
            let parsed = parse(&log, record.initial[0].clone()).unwrap();
            let (theirs, ours) = (outcome(&parsed), store.pages(0));
            // The log knows no length.
            assert!(theirs.bytes(0..60_000) == ours.bytes(0..60_000), "seed {seed}");
            assert_eq!(parsed.count(|c| *c == Change::Flush), record.count(|c| *c == Change::Flush));
        }
    }

    #[test]
    fn damaged_logs_are_refused() {
        let good = export(&Record { initial: vec![Pages::empty()], ..Record::default() }, 0);
        parse(&good, Pages::empty()).unwrap();
        for (at, value) in [(0, 0), (8, 2), (16, 5), (24, 3)] {
            let mut bad = good.clone();
            bad[at] = value;
            parse(&bad, Pages::empty()).unwrap_err();
        }
    }

    #[test]
    fn a_log_of_qemu_is_understood() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("disk"), vec![0u8; 1 << 20]).unwrap();
        std::fs::write(path("log"), b"").unwrap();
        let node = format!(
            "driver=blklogwrites,file.driver=file,file.filename={},log.driver=file,log.filename={}",
            path("disk").display(),
            path("log").display()
        );
        let mut command = std::process::Command::new("timeout");
        command.args(["-s", "KILL", "60", "qemu-io", "--image-opts", &node]);
        command.args([
            "-c",
            "write -P 7 4096 8192",
            "-c",
            "flush",
            "-c",
            "write -P 8 512 512",
            "-c",
            "flush",
        ]);
        let output = command.output().unwrap();
        if output.status.code() == Some(127) {
            println!("skipped: this host has no qemu-io");
            return;
        }
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let record = parse(&std::fs::read(path("log")).unwrap(), Pages::of(&vec![0; 1 << 20])).unwrap();
        assert!(record.flush_ends().len() >= 2);
        let written = Pages::load(&path("disk")).unwrap();
        assert!(outcome(&record).bytes(0..1 << 20) == written.bytes(0..1 << 20));
    }
}
