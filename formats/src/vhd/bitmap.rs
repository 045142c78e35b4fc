//! Sector bitmaps: the bits before each block's data that say which of its sectors the file has.
//!
//! Bits count from the highest of each byte (from the lowest in images of XenServer's version 0.1). A sector whose bit is
//! clear is the parent's in a differencing disk, and zero in a dynamic one, *whatever the data behind it holds*: on a block device
//! that is what the last owner left there. The specification says the same ("never modified"), QEMU sets all bits of a block when
//! it writes to it, and so does this driver for new blocks of disks without a parent.

/// The mask of a sector's bit in its byte.
fn mask(sector: u64, low_bits_first: bool) -> u8 {
    if low_bits_first { 1 << (sector % 8) } else { 0x80 >> (sector % 8) }
}

/// Whether a sector's bit is set; `bytes` begin with the bit of sector `first`, a multiple of 8.
pub fn is_set(bytes: &[u8], first: u64, sector: u64, low_bits_first: bool) -> bool {
    let byte = bytes.get(((sector - first) / 8) as usize).copied().unwrap_or(0);
    byte & mask(sector, low_bits_first) != 0
}

/// How many sectors from `from` on, before `to`, have the same bit as `from`, and that bit; `bytes` as in [`is_set`].
pub fn run(bytes: &[u8], first: u64, from: u64, to: u64, low_bits_first: bool) -> (u64, bool) {
    let bit = is_set(bytes, first, from, low_bits_first);
    let whole = if bit { 0xff } else { 0 };
    let mut at = from + 1;
    while at < to {
        if at.is_multiple_of(8) && at + 8 <= to && bytes.get(((at - first) / 8) as usize) == Some(&whole) {
            at += 8;
        } else if is_set(bytes, first, at, low_bits_first) == bit {
            at += 1;
        } else {
            break;
        }
    }
    (at.min(to) - from, bit)
}

/// Sets the bits of sectors `from..to`; `bytes` as in [`is_set`]. Returns whether one was clear.
pub fn set(bytes: &mut [u8], first: u64, from: u64, to: u64, low_bits_first: bool) -> bool {
    let mut changed = false;
    let mut at = from;
    while at < to {
        let Some(byte) = bytes.get_mut(((at - first) / 8) as usize) else { break };
        let (bits, next) = if at.is_multiple_of(8) && at + 8 <= to {
            (0xff, at + 8)
        } else {
            (mask(at, low_bits_first), at + 1)
        };
        changed |= *byte & bits != bits;
        *byte |= bits;
        at = next;
    }
    changed
}

#[cfg(test)]
mod tests {
    //! Goal: runs and changes are those of the bits one by one, in both orders. Method: random bitmaps against a list of bools.

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bits_count_from_the_highest() {
        assert!(is_set(&[0x80], 0, 0, false) && !is_set(&[0x80], 0, 7, false));
        assert!(is_set(&[0x80], 0, 7, true) && is_set(&[0, 1], 8, 23, false));
    }

    proptest! {
        #[test]
        fn as_a_list(
            bytes in proptest::collection::vec(prop_oneof![Just(0u8), Just(0xff), any::<u8>()], 1..20),
            from in 0u64..150, len in 1u64..100, low: bool,
        ) {
            let mut bytes = bytes;
            let total = bytes.len() as u64 * 8;
            let (from, to) = (from.min(total - 1), (from + len).min(total).max(from.min(total - 1) + 1));
            let list = |bytes: &[u8]| (0..total).map(|at| is_set(bytes, 0, at, low)).collect::<Vec<_>>();
            let before = list(&bytes);
            let (count, bit) = run(&bytes, 0, from, to, low);
            let slice = &before[from as usize..to as usize];
            let expected = slice.iter().take_while(|other| **other == slice[0]).count() as u64;
            prop_assert_eq!((count, bit), (expected, slice[0]));
            let changed = set(&mut bytes, 0, from, to, low);
            prop_assert_eq!(changed, slice.contains(&false));
            for (at, bit) in list(&bytes).into_iter().enumerate() {
                prop_assert_eq!(bit, before[at] || (from..to).contains(&(at as u64)));
            }
        }
    }
}
