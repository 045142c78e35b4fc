//! What is exported: the description that negotiation hands to a client, and where it comes from.

use super::proto::{PAYLOAD_BYTES_MAX, transmission};

/// Block sizes that an export announces, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths must be multiples of this; a power of two up to 64 KiB, 1 for none.
    pub minimum: u32,
    /// Requests of this size and alignment are served best; a power of two, at least 512 and `minimum`.
    pub preferred: u32,
    /// Longest READ and WRITE; a multiple of `minimum`, at most [`PAYLOAD_BYTES_MAX`].
    pub maximum: u32,
}

impl Default for BlockSizes {
    fn default() -> Self {
        Self { minimum: 1, preferred: 4096, maximum: PAYLOAD_BYTES_MAX }
    }
}

/// What an export can do; becomes the transmission flags.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features {
    /// FLUSH.
    pub flush: bool,
    /// FUA.
    pub fua: bool,
    /// TRIM; not offered on a read-only export.
    pub trim: bool,
    /// WRITE_ZEROES and NO_HOLE; not offered on a read-only export.
    pub write_zeroes: bool,
    /// FAST_ZERO; not offered without `write_zeroes`.
    pub fast_zero: bool,
    /// CACHE.
    pub cache: bool,
    /// A flush on one connection covers all.
    pub multi_conn: bool,
    /// Unfragmented structured reads; offered only with structured replies.
    pub df: bool,
    /// The store seeks.
    pub rotational: bool,
}

impl Features {
    /// Everything but `rotational`.
    pub const ALL: Self = Self {
        flush: true,
        fua: true,
        trim: true,
        write_zeroes: true,
        fast_zero: true,
        cache: true,
        multi_conn: true,
        df: true,
        rotational: false,
    };
}

/// One export as clients see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its own name, at most 4096 bytes.
    pub name: String,
    /// A sentence for people; empty for none, at most 4096 bytes.
    pub description: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Changes are refused.
    pub read_only: bool,
    /// What it can do.
    pub features: Features,
    /// Announced block sizes.
    pub block_sizes: BlockSizes,
}

impl ExportInfo {
    /// The transmission flags, given whether replies are structured (or extended).
    pub fn transmission_flags(&self, structured: bool) -> u16 {
        let f = &self.features;
        let writable = !self.read_only;
        let zeroes = writable && f.write_zeroes;
        [
            (true, transmission::HAS_FLAGS),
            (self.read_only, transmission::READ_ONLY),
            (f.flush, transmission::SEND_FLUSH),
            (f.fua, transmission::SEND_FUA),
            (f.rotational, transmission::ROTATIONAL),
            (writable && f.trim, transmission::SEND_TRIM),
            (zeroes, transmission::SEND_WRITE_ZEROES),
            (zeroes && f.fast_zero, transmission::SEND_FAST_ZERO),
            (f.cache, transmission::SEND_CACHE),
            (f.multi_conn, transmission::CAN_MULTI_CONN),
            (f.df && structured, transmission::SEND_DF),
        ]
        .into_iter()
        .filter(|(on, _)| *on)
        .fold(0, |flags, (_, bit)| flags | bit)
    }
}

/// Why a name leads to no export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoExport {
    /// There is none of that name.
    Unknown,
    /// There is one, and it cannot be used now: a sentence for the client.
    Refused(String),
    /// The server is going down.
    ShuttingDown,
}

/// The exports of a listener.
pub trait Exports {
    /// The export of a name as a client wrote it. The empty name means the default export, if there is one.
    fn find(&self, name: &str) -> Result<ExportInfo, NoExport>;

    /// Name and description of every export.
    fn list(&self) -> Vec<(String, String)>;
}

/// A listener that is bound to one export (a disk's own socket): its name and the empty name mean it.
#[derive(Debug, Clone)]
pub struct OneExport(pub ExportInfo);

impl Exports for OneExport {
    fn find(&self, name: &str) -> Result<ExportInfo, NoExport> {
        if name.is_empty() || name == self.0.name { Ok(self.0.clone()) } else { Err(NoExport::Unknown) }
    }

    fn list(&self) -> Vec<(String, String)> {
        vec![(self.0.name.clone(), self.0.description.clone())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(read_only: bool, features: Features) -> ExportInfo {
        ExportInfo {
            name: "d1".into(),
            description: String::new(),
            size_bytes: 1 << 20,
            read_only,
            features,
            block_sizes: BlockSizes::default(),
        }
    }

    /// Goal: flags that depend on another are never sent without it. Method: the four combinations that matter.
    #[test]
    fn dependent_flags() {
        assert_eq!(export(false, Features::ALL).transmission_flags(true), 0xded);
        assert_eq!(export(false, Features::ALL).transmission_flags(false) & transmission::SEND_DF, 0);
        let read_only = export(true, Features::ALL).transmission_flags(true);
        assert_eq!(read_only, 0x58f, "no trim, zeroes, fast zero");
        let no_zeroes =
            export(false, Features { write_zeroes: false, ..Features::ALL }).transmission_flags(true);
        assert_eq!(no_zeroes & transmission::SEND_FAST_ZERO, 0);
    }
}
