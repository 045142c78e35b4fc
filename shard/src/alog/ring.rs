//! The bytes of an allocation log: a header and a ring of entries, as words of eight bytes in the machine's order (the file never
//! leaves the host, and ends with its boot).
//!
//! | word | what |
//! |---|---|
//! | 0 | magic |
//! | 1 | version (low half), entries of the ring (high half) |
//! | 2, 3 | boot id of the host |
//! | 4 | size of the disk, bytes |
//! | 5 | digest of what the image says of itself |
//! | 6 | number of files |
//! | 7 | bytes of the image's path |
//! | 8 | checksum of words 0 to 7 and 16 to 511 |
//! | 9 | entries that were released: the only word of the header that changes |
//! | 16 … 79 | device and inode of each file, at most 32 |
//! | 80 … 511 | path of the image, for messages |
//! | 512 … | entries, four words each: number and checksum, place, old value, new value |
//!
//! Entry number `n` (from 0) is in slot `n mod entries`. Its first word has the low half of `n + 1` in its high half and a checksum
//! in its low half. It is stored last: a process that is killed between any two instructions leaves the entry whole or a slot
//! whose first word is of another number. Stores are in order as the machine sees them (release), and the reader is another
//! process on the same machine, so nothing has to be flushed. The log holds the entries from the released number on, up to the
//! first slot that does not have the number that follows. So entries that belong together are written from the last to the first:
//! they are in the log when the first one is. What a process that died in between has left behind the end is wiped before the next
//! entry is written ([`wipe_behind`]), or it would count when the numbers before it are used again.

use formats::allocation_log::LogEntry;
use formats::driver::FileIndex;

use super::LogIdentity;

const MAGIC: u64 = u64::from_be_bytes(*b"BLKTALOG");
const VERSION: u64 = 1;
/// Entries of a ring. A busy disk writes back when a quarter of it is used; an idle one never touches its pages.
pub const ENTRIES: u64 = 4096;
/// Words of the header: a page.
const HEADER_WORDS: usize = 512;
const ENTRY_WORDS: usize = 4;
/// Words of the whole log.
pub const WORDS: usize = HEADER_WORDS + ENTRIES as usize * ENTRY_WORDS;
const CHECKSUM: usize = 8;
const RELEASED: usize = 9;
const FILES: usize = 16;
/// Files that a log can name.
pub const FILES_MAX: usize = 32;
const PATH: usize = FILES + 2 * FILES_MAX;
/// Bytes of a path that a log can hold.
const PATH_BYTES_MAX: usize = (HEADER_WORDS - PATH) * 8;
/// The place of an entry: bits of the offset, above them the file.
const OFFSET_BITS: u32 = 56;

/// Memory that a log is in.
pub trait Words {
    /// Loads a word; what was stored before it is seen as well.
    fn load(&self, word: usize) -> u64;
    /// Stores a word, after everything that was stored before.
    fn store(&self, word: usize, value: u64);
}

/// FNV-1a over words.
pub fn checksum(words: impl IntoIterator<Item = u64>) -> u64 {
    let bytes = words.into_iter().flat_map(u64::to_le_bytes);
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The header of a new log, in words; the entries behind it are zero.
pub fn header(identity: &LogIdentity, boot: [u64; 2]) -> Vec<u64> {
    let mut words = vec![0; HEADER_WORDS];
    let path = &identity.path.as_bytes()[..identity.path.len().min(PATH_BYTES_MAX)];
    words[0] = MAGIC;
    words[1] = VERSION | ENTRIES << 32;
    words[2..4].copy_from_slice(&boot);
    words[4] = identity.size;
    words[5] = identity.digest;
    words[6] = identity.files.len() as u64;
    words[7] = path.len() as u64;
    for (pair, (device, inode)) in words[FILES..PATH].chunks_exact_mut(2).zip(&identity.files) {
        pair.copy_from_slice(&[*device, *inode]);
    }
    for (word, bytes) in words[PATH..].iter_mut().zip(path.chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(whole);
    }
    words[CHECKSUM] = header_sum(&|word| words[word]);
    words
}

fn header_sum(load: &dyn Fn(usize) -> u64) -> u64 {
    checksum((0..CHECKSUM).chain(FILES..HEADER_WORDS).map(load))
}

/// What a log says of itself: the boot, and the image. `None`: it is no log of this version, or damaged.
pub fn read_header(words: &impl Words) -> Option<([u64; 2], LogIdentity)> {
    let load = |word| words.load(word);
    if load(0) != MAGIC || load(1) != VERSION | ENTRIES << 32 || load(CHECKSUM) != header_sum(&load) {
        return None;
    }
    let files = usize::try_from(load(6)).ok().filter(|files| *files <= FILES_MAX)?;
    let path_bytes = usize::try_from(load(7)).ok().filter(|bytes| *bytes <= PATH_BYTES_MAX)?;
    let path: Vec<u8> =
        (PATH..HEADER_WORDS).flat_map(|word| load(word).to_ne_bytes()).take(path_bytes).collect();
    let identity = LogIdentity {
        files: (0..files).map(|file| (load(FILES + 2 * file), load(FILES + 2 * file + 1))).collect(),
        size: load(4),
        digest: load(5),
        path: String::from_utf8_lossy(&path).into_owned(),
    };
    Some(([load(2), load(3)], identity))
}

fn slot(number: u64) -> usize {
    HEADER_WORDS + (number % ENTRIES) as usize * ENTRY_WORDS
}

/// The first word of an entry.
fn seal(number: u64, rest: [u64; 3]) -> u64 {
    let sum = checksum([number].into_iter().chain(rest));
    u64::from((number + 1) as u32) << 32 | u64::from(sum as u32 ^ (sum >> 32) as u32)
}

/// Writes an entry. The caller has made sure that its slot is free.
pub fn append(words: &impl Words, number: u64, entry: &LogEntry) {
    assert!(entry.offset >> OFFSET_BITS == 0 && entry.file.0 <= 0xff, "no log has a place for {entry:?}");
    let place = u64::from(entry.file.0) << OFFSET_BITS | entry.offset;
    let rest = [place, u64::from_ne_bytes(entry.old), u64::from_ne_bytes(entry.new)];
    let at = slot(number);
    for (word, value) in (at + 1..).zip(rest) {
        words.store(word, value);
    }
    words.store(at, seal(number, rest));
}

/// Writes entries of which all are in the log or none, however the process ends. The caller has made sure that their slots are free.
pub fn append_all(words: &impl Words, first: u64, entries: &[LogEntry]) {
    for (index, entry) in entries.iter().enumerate().rev() {
        append(words, first + index as u64, entry);
    }
}

/// Takes entries away that a process left behind the end of the log: `end` is the number of the next entry.
pub fn wipe_behind(words: &impl Words, first: u64, end: u64) {
    for number in end..first.saturating_add(ENTRIES) {
        let at = slot(number);
        if words.load(at) >> 32 == u64::from((number + 1) as u32) {
            words.store(at, 0);
        }
    }
}

/// Gives up all entries before `number`.
pub fn release(words: &impl Words, number: u64) {
    words.store(RELEASED, number);
}

/// Entries that are in the log, and the number of the first.
pub fn scan(words: &impl Words) -> (u64, Vec<LogEntry>) {
    let first = words.load(RELEASED);
    let mut entries = Vec::new();
    for number in first..first.saturating_add(ENTRIES) {
        let at = slot(number);
        let rest = [words.load(at + 1), words.load(at + 2), words.load(at + 3)];
        if words.load(at) != seal(number, rest) {
            break;
        }
        entries.push(LogEntry {
            file: FileIndex((rest[0] >> OFFSET_BITS) as u16),
            offset: rest[0] & ((1 << OFFSET_BITS) - 1),
            old: rest[1].to_ne_bytes(),
            new: rest[2].to_ne_bytes(),
        });
    }
    (first, entries)
}
