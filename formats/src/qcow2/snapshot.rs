//! The snapshot table: one entry of variable length for each internal snapshot.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | offset of its L1 table |
//! | 8 | 4 | entries of its L1 table |
//! | 12, 14 | 2 each | length of identifier and name |
//! | 16, 20 | 4 each | time, seconds and nanoseconds |
//! | 24 | 8 | clock of the machine, nanoseconds |
//! | 32 | 4 | bytes of machine state |
//! | 36 | 4 | length of the extra data |
//! | 40 | | extra data: machine state bytes (8), disk size (8), instruction count (8); identifier; name; padding to 8 |
//!
//! The table has no length: it ends with its last entry.

use std::rc::Rc;

use super::header::{Geometry, Header, L1_MAX_BYTES, TablePlace};
use crate::error::Error;
use crate::file::{Buf, ImageFile};

/// Bytes before the extra data.
const FIXED_BYTES: usize = 40;
/// Longest extra data that is kept.
const EXTRA_MAX_BYTES: u32 = 1024;
/// Largest table, as QEMU limits it.
const TABLE_MAX_BYTES: u64 = 64 << 20;
/// Bytes that are read at a time.
const CHUNK_BYTES: u64 = 1 << 20;

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Identifier: text, usually a number.
    pub id: String,
    /// Name that its maker gave.
    pub name: String,
    /// When it was made, seconds since 1970.
    pub seconds: u32,
    /// Nanoseconds of that second.
    pub nanoseconds: u32,
    /// Clock of the machine, in nanoseconds.
    pub clock_ns: u64,
    /// Bytes of machine state that lie behind the disk's end.
    pub state_bytes: u64,
    /// Bytes of the disk when it was made; `None` in old images that do not say.
    pub size: Option<u64>,
    /// Extra data as it lies in the file.
    pub(super) extra: Vec<u8>,
    /// The low 32 bits of `state_bytes`, as written.
    pub(super) state_bytes_low: u32,
    /// Its L1 table.
    pub(super) l1: TablePlace,
}

impl Snapshot {
    /// It is meant by `wanted`: identifier, or name.
    pub(super) fn is(&self, wanted: &str) -> bool {
        self.id == wanted || self.name == wanted
    }

    /// As it lies in the file.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out =
            Vec::with_capacity(FIXED_BYTES + self.extra.len() + self.id.len() + self.name.len() + 8);
        out.extend_from_slice(&self.l1.offset.to_be_bytes());
        out.extend_from_slice(&(self.l1.entries as u32).to_be_bytes());
        out.extend_from_slice(&(self.id.len() as u16).to_be_bytes());
        out.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&self.seconds.to_be_bytes());
        out.extend_from_slice(&self.nanoseconds.to_be_bytes());
        out.extend_from_slice(&self.clock_ns.to_be_bytes());
        out.extend_from_slice(&self.state_bytes_low.to_be_bytes());
        out.extend_from_slice(&(self.extra.len() as u32).to_be_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(self.id.as_bytes());
        out.extend_from_slice(self.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }
}

impl From<Snapshot> for crate::driver::Snapshot {
    fn from(one: Snapshot) -> crate::driver::Snapshot {
        crate::driver::Snapshot {
            id: one.id,
            name: one.name,
            size: one.size,
            created: one.seconds.into(),
            machine_bytes: one.state_bytes,
        }
    }
}

/// The snapshots of an image and the bytes of their table.
#[derive(Debug, Clone, Default)]
pub(super) struct SnapshotTable {
    /// In the order of the table.
    pub snapshots: Vec<Snapshot>,
    /// Bytes of the table in the file.
    pub bytes: u64,
}

impl SnapshotTable {
    /// The one that `wanted` means; an identifier wins over a name.
    pub fn find(&self, wanted: &str) -> Option<&Snapshot> {
        self.snapshots
            .iter()
            .find(|one| one.id == wanted)
            .or_else(|| self.snapshots.iter().find(|one| one.is(wanted)))
    }

    /// All entries as they lie in the file.
    pub fn encode(&self) -> Vec<u8> {
        self.snapshots.iter().flat_map(Snapshot::encode).collect()
    }
}

/// A window of the file that follows an ascending reader.
struct Reader<'a> {
    file: &'a Rc<dyn ImageFile>,
    start: u64,
    window: Buf,
}

impl Reader<'_> {
    async fn bytes(&mut self, offset: u64, len: usize) -> Result<&[u8], Error> {
        let inside = offset >= self.start && offset + len as u64 <= self.start + self.window.len() as u64;
        if !inside {
            let left =
                self.file.length().saturating_sub(offset).clamp(len as u64, CHUNK_BYTES.max(len as u64));
            self.window = self.file.read(offset, left as usize).await?;
            self.start = offset;
        }
        let at = (offset - self.start) as usize;
        Ok(&self.window[at..at + len])
    }
}

/// Reads and checks the table.
pub(super) async fn read(file: &Rc<dyn ImageFile>, header: &Header) -> Result<SnapshotTable, Error> {
    let mut table = SnapshotTable::default();
    let mut reader = Reader { file, start: 0, window: Buf::zeroed(0) };
    let mut offset = header.snapshots_offset;
    for number in 0..header.snapshots {
        let corrupt = |what: String| {
            Error::corrupt(file.name(), format!("entry {number} of its snapshot table {what}"))
        };
        let end = offset + FIXED_BYTES as u64;
        if end > file.length() || end - header.snapshots_offset > TABLE_MAX_BYTES {
            return Err(corrupt("lies behind the end of the file".into()));
        }
        let fixed: [u8; FIXED_BYTES] =
            reader.bytes(offset, FIXED_BYTES).await?.try_into().map_err(|_| corrupt("is cut off".into()))?;
        let be16 = |at: usize| usize::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
        let be32 = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|index| fixed[at + index]));
        let be64 = |at: usize| u64::from(be32(at)) << 32 | u64::from(be32(at + 4));
        let (id_len, name_len, extra_len) = (be16(12), be16(14), be32(36));
        if extra_len > EXTRA_MAX_BYTES {
            return Err(corrupt(format!(
                "has {extra_len} bytes of extra data; at most {EXTRA_MAX_BYTES} are read"
            )));
        }
        let len = FIXED_BYTES + extra_len as usize + id_len + name_len;
        if offset + len as u64 > header.geometry.round_up(file.length()) {
            return Err(corrupt("lies behind the end of the file".into()));
        }
        let entry = reader.bytes(offset, len).await?;
        let extra = entry[FIXED_BYTES..FIXED_BYTES + extra_len as usize].to_vec();
        let texts = &entry[FIXED_BYTES + extra_len as usize..];
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let extra64 = |at: usize| Some(u64::from_be_bytes(extra.get(at..at + 8)?.try_into().ok()?));
        let l1 = TablePlace { offset: be64(0), entries: u64::from(be32(8)) };
        check_l1(&header.geometry, l1, file.length()).map_err(corrupt)?;
        table.snapshots.push(Snapshot {
            id: text(&texts[..id_len]),
            name: text(&texts[id_len..]),
            seconds: be32(16),
            nanoseconds: be32(20),
            clock_ns: be64(24),
            state_bytes: extra64(0).unwrap_or(u64::from(be32(32))),
            size: extra64(8),
            state_bytes_low: be32(32),
            extra,
            l1,
        });
        offset += len.next_multiple_of(8) as u64;
    }
    table.bytes = offset - header.snapshots_offset;
    Ok(table)
}

fn check_l1(geometry: &Geometry, l1: TablePlace, file_len: u64) -> Result<(), String> {
    let fits = l1.offset.checked_add(l1.entries * 8).is_some_and(|end| end <= geometry.round_up(file_len));
    if l1.entries * 8 > L1_MAX_BYTES
        || !geometry.is_aligned(l1.offset)
        || !fits
        || (l1.entries > 0 && l1.offset == 0)
    {
        return Err(format!("has an L1 table of {} entries at {}, which cannot be", l1.entries, l1.offset));
    }
    Ok(())
}
