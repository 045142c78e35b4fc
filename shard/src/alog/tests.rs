//! Goal: a log holds exactly the entries whose last store was made, wherever the process dies, over any number of laps of the ring;
//! and a file of a log is used only for the image and the boot that it is of. Method: the memory is copied at each store and
//! scanned; files are made, found, damaged and taken for others.

use std::cell::RefCell;
use std::os::unix::fs::FileExt;

use formats::driver::FileIndex;
use proptest::prelude::*;

use super::*;

/// Words in memory, with a copy of them after each store.
struct Watched {
    words: RefCell<Vec<u64>>,
    states: RefCell<Vec<Vec<u64>>>,
    watches: Cell<bool>,
}

impl Words for Watched {
    fn load(&self, word: usize) -> u64 {
        self.words.borrow()[word]
    }

    fn store(&self, word: usize, value: u64) {
        self.words.borrow_mut()[word] = value;
        if self.watches.get() {
            self.states.borrow_mut().push(self.words.borrow().clone());
        }
    }
}

fn entry(number: u64) -> LogEntry {
    LogEntry {
        file: FileIndex((number % 3) as u16),
        offset: number * 8,
        old: number.to_be_bytes(),
        new: (number + 1).to_be_bytes(),
    }
}

fn identity() -> LogIdentity {
    LogIdentity {
        files: vec![(1, 2), (3, 4)],
        size: 1 << 30,
        digest: 5,
        path: "/images/ä disk.qcow2".to_owned(),
    }
}

/// A log that has had `released` entries, all of them released.
fn watched(released: u64) -> Watched {
    let mut words = ring::header(&identity(), [6, 7]);
    words.resize(ring::WORDS, 0);
    let log = Watched { words: RefCell::new(words), states: RefCell::default(), watches: Cell::new(false) };
    // The last lap is what slots can still show.
    for number in released.saturating_sub(ring::ENTRIES)..released {
        ring::append(&log, number, &entry(number));
    }
    ring::release(&log, released);
    log.watches.set(true);
    log
}

/// Steps that a log takes from here, and what it held before and after each store of them.
fn entries_are_whole_or_absent(released: u64, steps: &[bool]) {
    let log = watched(released);
    let (mut first, mut next) = (released, released);
    for &appends in steps {
        let before: Vec<LogEntry> = (first..next).map(entry).collect();
        if appends {
            ring::append(&log, next, &entry(next));
            next += 1;
        } else {
            first = first.max(next.saturating_sub(1));
            ring::release(&log, first);
        }
        let after: Vec<LogEntry> = (first..next).map(entry).collect();
        let states = std::mem::take(&mut *log.states.borrow_mut());
        let last = states.len() - 1;
        for (number, state) in states.into_iter().enumerate() {
            let expected = if number == last { &after } else { &before };
            assert_eq!(&ring::scan(&Copied(state)).1, expected, "after store {number}");
        }
    }
}

#[test]
fn wherever_it_dies_an_entry_is_whole_or_absent() {
    let steps = [true, true, false, true, true, true, false, false, true];
    // An empty ring, its end, later laps, and the end of the halves of numbers that slots keep.
    for released in [0, 1, ring::ENTRIES - 2, ring::ENTRIES, 5 * ring::ENTRIES - 3, (1 << 32) - 4] {
        entries_are_whole_or_absent(released, &steps);
    }
}

#[test]
fn entries_that_belong_together_are_all_there_or_none_is() {
    for released in [0, ring::ENTRIES - 2, 5 * ring::ENTRIES - 3, (1 << 32) - 4] {
        let log = watched(released);
        let entries: Vec<LogEntry> = (released..released + 5).map(entry).collect();
        ring::append_all(&log, released, &entries);
        let mut states = log.states.take();
        let whole = states.pop().unwrap();
        assert_eq!(ring::scan(&Copied(whole)), (released, entries));
        for state in states {
            let words = RefCell::new(state);
            let half = Watched { words, states: RefCell::default(), watches: Cell::new(false) };
            assert_eq!(ring::scan(&half), (released, Vec::new()), "{released}");
            // Who goes on there does not find the rest of it behind what he writes.
            ring::wipe_behind(&half, released, released);
            ring::append(&half, released, &entry(released));
            assert_eq!(ring::scan(&half), (released, vec![entry(released)]), "{released}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn any_history(released in 0u64..20_000, steps in proptest::collection::vec(any::<bool>(), 1..20)) {
        entries_are_whole_or_absent(released, &steps);
    }

    #[test]
    fn scans_of_anything_end(words in proptest::collection::vec(any::<u64>(), 600), released: u64) {
        let mut words = words;
        words.resize(ring::WORDS, 3);
        words[9] = released;
        let words = Copied(words);
        prop_assert!(ring::scan(&words).1.len() <= ring::ENTRIES as usize);
        prop_assert!(ring::read_header(&words).is_none());
    }
}

#[test]
fn headers_say_what_they_were_told() {
    let words = ring::header(&identity(), [6, 7]);
    assert_eq!(ring::read_header(&Copied(words.clone())), Some(([6, 7], identity())));
    for word in (0..9).chain(16..512) {
        let mut damaged = words.clone();
        damaged[word] ^= 1 << 17;
        assert_eq!(ring::read_header(&Copied(damaged)), None, "word {word}");
    }
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("1-2.alog");
    (dir, path)
}

#[test]
fn a_log_outlives_who_wrote_it() {
    let (_dir, path) = folder();
    assert_eq!(live(&path).unwrap(), None, "there is none");
    let file = Arc::new(LogFile::open(&path, &identity()).unwrap());
    assert_eq!(live(&path).unwrap(), None, "an empty one");
    let (log, found) = Log::new(file.clone());
    assert_eq!(found, Vec::new());
    for number in 0..10 {
        log.append(entry(number)).unwrap();
    }
    log.release(4);
    let expected: Vec<LogEntry> = (4..10).map(entry).collect();
    let image = identity().path;
    assert_eq!(live(&path).unwrap(), Some(LiveLog { path: path.clone(), image, entries: 6 }));
    assert!(!file.remove_if_empty().unwrap(), "it holds something");
    // The first is forgotten as by a kill: nothing of it is closed.
    std::mem::forget((log, file));
    let grown = LogIdentity { size: 2 << 30, ..identity() };
    let file = Arc::new(LogFile::open(&path, &grown).unwrap());
    let (log, found) = Log::new(file.clone());
    assert_eq!((found, log.position(), log.room()), (expected, 10, ENTRIES - 6));
    log.release(log.position());
    assert_eq!(live(&path).unwrap(), None);
    assert!(file.remove_if_empty().unwrap() && !path.exists());
    assert!(file.remove_if_empty().unwrap(), "it is gone");
}

#[test]
fn a_full_log_takes_nothing_until_something_is_released() {
    let (_dir, path) = folder();
    let (log, _) = Log::new(Arc::new(LogFile::open(&path, &identity()).unwrap()));
    for number in 0..ring::ENTRIES {
        log.append(entry(number)).unwrap();
    }
    assert_eq!((log.append(entry(1)), log.room()), (Err(LogFull), 0));
    log.release(2);
    log.append(entry(ring::ENTRIES)).unwrap();
    log.append(entry(ring::ENTRIES + 1)).unwrap();
    assert_eq!(log.append(entry(1)), Err(LogFull));
    let expected: Vec<LogEntry> = (2..ring::ENTRIES + 2).map(entry).collect();
    assert_eq!(log.file.entries(), expected);
}

#[test]
fn a_log_of_another_image_is_refused_and_kept() {
    let (_dir, path) = folder();
    let (log, _) = Log::new(Arc::new(LogFile::open(&path, &identity()).unwrap()));
    log.append(entry(0)).unwrap();
    let others = [
        (LogIdentity { files: vec![(1, 2)], ..identity() }, "its files are"),
        (LogIdentity { digest: 6, ..identity() }, "its header"),
        (LogIdentity { size: 4096, ..identity() }, "its disk has 4096 bytes"),
    ];
    for (other, part) in &others {
        let error = LogFile::open(&path, other).unwrap_err().to_string();
        for part in [part, "/images/ä disk.qcow2", "mv ", "1-2.alog"] {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(log.file.entries(), [entry(0)]);
    }
    // One without entries is nobody's.
    log.release(1);
    for (other, _) in &others {
        assert_eq!(LogFile::open(&path, other).unwrap().entries(), []);
    }
}

#[test]
fn a_log_of_another_boot_is_void() {
    let (_dir, path) = folder();
    let (log, _) = Log::new(Arc::new(LogFile::open(&path, &identity()).unwrap()));
    log.append(entry(0)).unwrap();
    let header: Vec<u8> =
        ring::header(&identity(), [6, 7]).iter().flat_map(|word| word.to_ne_bytes()).collect();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&header[..72], 0).unwrap();
    assert_eq!(live(&path).unwrap(), None);
    assert_eq!(LogFile::open(&path, &LogIdentity { digest: 9, ..identity() }).unwrap().entries(), []);
}

#[test]
fn what_is_no_log_is_neither_used_nor_overwritten() {
    for bytes in [Vec::new(), b"a letter".to_vec(), vec![0; BYTES]] {
        let (_dir, path) = folder();
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(LogFile::open(&path, &identity()), Err(LogError::Mismatch { .. })));
        assert!(live(&path).unwrap().is_some(), "it may be one");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
}

#[test]
fn a_log_that_cannot_be_made_leaves_nothing() {
    let (dir, _) = folder();
    let missing = dir.path().join("none").join("1-2.alog");
    assert!(matches!(LogFile::open(&missing, &identity()), Err(LogError::Unavailable { .. })));
    let path = dir.path().join("3-4.alog");
    let many = LogIdentity { files: vec![(1, 2); LogIdentity::FILES_MAX + 1], ..identity() };
    assert!(matches!(LogFile::open(&path, &many), Err(LogError::Unavailable { .. })));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
