//! Arithmetic of raw images: which bytes of a disk are which bytes of a file, and what must be done around them.
//!
//! A raw image is the disk's bytes from offset 0. Three rules cover sizes that are no multiple of a sector or block:
//!
//! ```text
//!  0                                   direct_end      length    served size
//!  |------ whole physical blocks ------|---- tail ------|-- zero --|
//!   O_DIRECT, partial blocks by          buffered descriptor
//!   read-modify-write ([`cover`])
//! ```
//!
//! 1. The disk is the file's length rounded *up* to 512 bytes ([`served_size`]): no byte of the file is out of reach.
//!    Bytes behind the end of the file read as zero; a write to them extends the file, at most to the served size.
//! 2. O_DIRECT reaches whole physical blocks only, so bytes from [`direct_end`] on go through a buffered descriptor.
//!    The caller gives the larger of block and page as the alignment, so that no page is reached in both ways. The border is fixed when the image is opened and stays when the file grows: a byte is always reached in the same
//!    way, so that page cache and O_DIRECT never both hold it.
//! 3. A write of part of a physical block reads, changes and writes the whole block; [`cover`] names these blocks, so
//!    that the caller can serialise the work on each.

use std::ops::Range;

/// Unit of a disk's size, in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// The largest size of a disk, in bytes: the kernel's file offsets are signed 64-bit numbers.
pub const SIZE_MAX_BYTES: u64 = i64::MAX as u64 & !(SECTOR_BYTES - 1);

/// Bytes of the disk for a file of `length` bytes: rounded up to whole sectors. `None` above [`SIZE_MAX_BYTES`].
pub fn served_size(length: u64) -> Option<u64> {
    length.checked_next_multiple_of(SECTOR_BYTES).filter(|size| *size <= SIZE_MAX_BYTES)
}

/// Where O_DIRECT ends: `length` rounded down to whole blocks of `offset_align` bytes (a power of two, at least 1).
pub fn direct_end(length: u64, offset_align: u32) -> u64 {
    debug_assert!(offset_align.is_power_of_two());
    length & !(u64::from(offset_align) - 1)
}

/// The two ways to the bytes of one request; each may be empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// Bytes of the file to reach with O_DIRECT.
    pub direct: Range<u64>,
    /// Bytes of the file to reach with the buffered descriptor. A read of them that ends early met the end of the
    /// file: the rest is zero.
    pub tail: Range<u64>,
}

/// Splits `len` bytes at `offset` at the border `direct_end`. `offset + len` must be at most [`SIZE_MAX_BYTES`].
pub fn split(offset: u64, len: u64, direct_end: u64) -> Split {
    let end = offset + len;
    Split {
        direct: offset.min(direct_end)..end.min(direct_end),
        tail: offset.max(direct_end)..end.max(direct_end),
    }
}

/// The whole blocks that hold a piece, and which of them are not fully in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cover {
    /// Start of the first block.
    pub start: u64,
    /// End of the last block.
    pub end: u64,
    /// Start of the first block if only a part of it is in the piece.
    pub head: Option<u64>,
    /// Start of the last block if only a part of it is in the piece; `None` when that block is the head.
    pub tail: Option<u64>,
}

impl Cover {
    /// True when the piece is whole blocks: a write needs no read before it.
    pub fn is_aligned(&self) -> bool {
        self.head.is_none() && self.tail.is_none()
    }
}

/// Covers `len` bytes at `offset` by whole blocks of `align` bytes (a power of two, at least 1). When the piece ends
/// at or before [`direct_end`], so does the cover. An empty piece has an empty cover.
pub fn cover(offset: u64, len: u64, align: u32) -> Cover {
    debug_assert!(align.is_power_of_two());
    let align = u64::from(align);
    let round_down = |position: u64| position & !(align - 1);
    let (start, piece_end) = (round_down(offset), offset + len);
    if len == 0 {
        return Cover { start, end: start, head: None, tail: None };
    }
    let end = round_down(piece_end - 1) + align;
    let last = end - align;
    let one_block = last == start;
    let head = (start < offset || (one_block && piece_end < end)).then_some(start);
    let tail = (!one_block && piece_end < end).then_some(last);
    Cover { start, end, head, tail }
}

#[cfg(test)]
mod tests {
    //! Goal: every byte of every request is reached exactly once, by the right descriptor, with every partial block
    //! named. Method: property tests against a model that looks at single bytes.

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        assert_eq!(served_size(0), Some(0));
        assert_eq!(served_size(1), Some(512));
        assert_eq!(served_size(512), Some(512));
        assert_eq!(served_size(513), Some(1024));
        assert_eq!(served_size(SIZE_MAX_BYTES), Some(SIZE_MAX_BYTES));
        assert_eq!(served_size(SIZE_MAX_BYTES + 1), None);
        assert_eq!(served_size(u64::MAX), None);
        assert_eq!(direct_end(10_000, 4096), 8192);
        assert_eq!(direct_end(10_000, 1), 10_000);
        assert_eq!(direct_end(4095, 4096), 0);
    }

    #[test]
    fn largest_request_does_not_overflow() {
        let at = SIZE_MAX_BYTES - 512;
        assert_eq!(split(at, 512, direct_end(SIZE_MAX_BYTES, 4096)).tail, at..SIZE_MAX_BYTES);
        assert_eq!(cover(at, 512, 4096).end, 1 << 63);
    }

    proptest! {
        #[test]
        fn split_reaches_each_byte_once(length in 0u64..5000, offset in 0u64..6000, len in 0u64..3000, align in 0u32..13) {
            let border = direct_end(length, 1 << align);
            let parts = split(offset, len, border);
            for byte in 0..10_000 {
                let wanted = byte >= offset && byte < offset + len;
                let aligned_block_in_file = (byte >> align << align) + (1 << align) <= length;
                prop_assert_eq!(parts.direct.contains(&byte), wanted && aligned_block_in_file);
                prop_assert_eq!(parts.tail.contains(&byte), wanted && !aligned_block_in_file);
            }
        }

        #[test]
        fn cover_names_all_partial_blocks(offset in 0u64..6000, len in 0u64..5000, align in 0u32..13) {
            let block = 1u64 << align;
            let plan = cover(offset, len, 1 << align);
            let wanted = |byte: u64| byte >= offset && byte < offset + len;
            let touched = |start: u64| (start..start + block).any(wanted);
            let full = |start: u64| (start..start + block).all(wanted);
            for start in (0..12_000 / block).map(|number| number * block) {
                prop_assert_eq!(start >= plan.start && start < plan.end, touched(start));
                let named = plan.head == Some(start) || plan.tail == Some(start);
                prop_assert_eq!(named, touched(start) && !full(start));
            }
            prop_assert!(plan.head.is_none() || plan.head != plan.tail);
            prop_assert_eq!(plan.is_aligned(), offset % block == 0 && len % block == 0 || len == 0);
        }

        #[test]
        fn cover_of_a_direct_piece_stays_direct(length in 0u64..20_000, offset in 0u64..20_000, len in 0u64..9000, align in 0u32..13) {
            let border = direct_end(length, 1 << align);
            let direct = split(offset, len, border).direct;
            prop_assert!(cover(direct.start, direct.end - direct.start, 1 << align).end <= border);
        }

        #[test]
        fn read_and_write_through_the_plan_equal_a_byte_model(
            length in 0usize..3000, align in prop::sample::select(vec![1u32, 512, 1024]),
            operations in prop::collection::vec((0usize..3000, 1usize..1500, any::<u8>()), 1..12),
        ) {
            let size = served_size(length as u64).unwrap() as usize;
            let mut file: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
            let mut model = file.clone();
            model.resize(size, 0);
            let border = direct_end(length as u64, align);
            for (offset, len, fill) in operations {
                let offset = offset.min(size);
                let len = len.min(size - offset);
                model[offset..offset + len].fill(fill);
                let parts = split(offset as u64, len as u64, border);
                // Direct: whole blocks are read, changed and written; they must lie in the file as it was opened.
                let plan = cover(parts.direct.start, parts.direct.end - parts.direct.start, align);
                let mut blocks = file[plan.start as usize..plan.end as usize].to_vec();
                blocks[(parts.direct.start - plan.start) as usize..(parts.direct.end - plan.start) as usize].fill(fill);
                file[plan.start as usize..plan.end as usize].copy_from_slice(&blocks);
                // Tail: a plain write, which extends the file.
                if !parts.tail.is_empty() {
                    let end = file.len().max(parts.tail.end as usize);
                    file.resize(end, 0);
                    file[parts.tail.start as usize..parts.tail.end as usize].fill(fill);
                }
                prop_assert!(file.len() <= size);
                let mut read = file.clone();
                read.resize(size, 0);
                prop_assert_eq!(&read, &model);
            }
        }
    }
}
