//! The data of options and of their replies: parsing bounded by what arrived, writing into the connection's output.

use super::export::{BlockSizes, ExportInfo};
use super::proto::{OPTION_REPLY_MAGIC, STRING_BYTES_MAX, info, option, reply};

/// Why an option's data cannot be parsed: reply type and message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed {
    pub reply: u32,
    pub message: &'static str,
}

const fn invalid<T>(message: &'static str) -> Result<T, Malformed> {
    Err(Malformed { reply: reply::ERR_INVALID, message })
}

/// Reads an option's data front to back.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let Some((head, rest)) = self.0.split_first_chunk::<N>() else {
            return invalid("the option's data end too early");
        };
        self.0 = rest;
        Ok(*head)
    }

    pub fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// A 32-bit length and that many bytes.
    pub fn counted_bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let length = self.u32()? as usize;
        if length > STRING_BYTES_MAX {
            return Err(Malformed {
                reply: reply::ERR_TOO_BIG,
                message: "a string is longer than 4096 bytes",
            });
        }
        let Some((bytes, rest)) = self.0.split_at_checked(length) else {
            return invalid("a string is longer than the option's data");
        };
        self.0 = rest;
        Ok(bytes)
    }

    pub fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { invalid("the option has more data than it should") }
    }
}

/// An export name as a client wrote it.
pub(super) fn name(bytes: &[u8]) -> Result<&str, Malformed> {
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(name),
        _ => invalid("an export name is UTF-8 without NUL"),
    }
}

/// Data of INFO and GO.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InfoRequest<'a> {
    pub name: &'a str,
    pub wants_name: bool,
    pub wants_description: bool,
    pub wants_block_size: bool,
}

impl<'a> InfoRequest<'a> {
    pub fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(data);
        let name = name(reader.counted_bytes()?)?;
        let mut wants = Self { name, wants_name: false, wants_description: false, wants_block_size: false };
        for _ in 0..reader.u16()? {
            match reader.u16()? {
                info::NAME => wants.wants_name = true,
                info::DESCRIPTION => wants.wants_description = true,
                info::BLOCK_SIZE => wants.wants_block_size = true,
                // EXPORT is always sent; unknown ones are to be ignored.
                _ => {}
            }
        }
        reader.end()?;
        Ok(wants)
    }
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MetaContextRequest<'a> {
    pub name: &'a str,
    /// `base:allocation` matches.
    pub base_allocation: bool,
}

impl<'a> MetaContextRequest<'a> {
    /// `number` is the option's: a list without queries, or of the whole namespace `base:`, means every context; a
    /// selection names each one. Other namespaces and leaf names are to be ignored.
    pub fn parse(number: u32, data: &'a [u8]) -> Result<Self, Malformed> {
        let list = number == option::LIST_META_CONTEXT;
        let mut reader = Reader::new(data);
        let name = name(reader.counted_bytes()?)?;
        let queries = reader.u32()?;
        let mut base_allocation = list && queries == 0;
        // Each query takes at least four bytes, so that the data bound this loop.
        for _ in 0..queries {
            match reader.counted_bytes()? {
                b"base:allocation" => base_allocation = true,
                b"base:" => base_allocation |= list,
                _ => {}
            }
        }
        reader.end()?;
        Ok(Self { name, base_allocation })
    }
}

/// Appends replies to options to a connection's output.
pub(super) struct Replies<'a> {
    out: &'a mut Vec<u8>,
    option: u32,
}

impl<'a> Replies<'a> {
    pub fn new(out: &'a mut Vec<u8>, option: u32) -> Self {
        Self { out, option }
    }

    fn put(&mut self, kind: u32, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        self.out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        self.out.extend_from_slice(&self.option.to_be_bytes());
        self.out.extend_from_slice(&kind.to_be_bytes());
        self.out.extend_from_slice(&(length as u32).to_be_bytes());
        for part in parts {
            self.out.extend_from_slice(part);
        }
    }

    pub fn ack(&mut self) {
        self.put(reply::ACK, &[]);
    }

    /// An error and a message for people, cut at 4096 bytes.
    pub fn error(&mut self, kind: u32, message: &str) {
        self.put(kind, &[string(message)]);
    }

    pub fn server(&mut self, name: &str, description: &str) {
        let name = string(name);
        self.put(reply::SERVER, &[&(name.len() as u32).to_be_bytes(), name, string(description)]);
    }

    pub fn meta_context(&mut self, id: u32, name: &str) {
        self.put(reply::META_CONTEXT, &[&id.to_be_bytes(), string(name)]);
    }

    /// What INFO and GO answer before their ACK.
    pub fn info(&mut self, export: &ExportInfo, flags: u16, wants: &InfoRequest<'_>) {
        if wants.wants_name {
            self.put(reply::INFO, &[&info::NAME.to_be_bytes(), string(&export.name)]);
        }
        if wants.wants_description && !export.description.is_empty() {
            self.put(reply::INFO, &[&info::DESCRIPTION.to_be_bytes(), string(&export.description)]);
        }
        if wants.wants_block_size {
            let BlockSizes { minimum, preferred, maximum } = export.block_sizes;
            let kind = info::BLOCK_SIZE.to_be_bytes();
            let sizes = [minimum.to_be_bytes(), preferred.to_be_bytes(), maximum.to_be_bytes()];
            self.put(reply::INFO, &[&kind, sizes.as_flattened()]);
        }
        let kind = info::EXPORT.to_be_bytes();
        self.put(reply::INFO, &[&kind, &export.size_bytes.to_be_bytes(), &flags.to_be_bytes()]);
    }
}

/// A string of at most 4096 bytes, cut at a character.
fn string(text: &str) -> &[u8] {
    let mut end = text.len().min(STRING_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text.as_bytes()[..end]
}
