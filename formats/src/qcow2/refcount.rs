//! Refcounts as numbers in blocks: entries of 1 to 64 bits; those below a byte are packed from the least significant bit on.

/// Bits of an offset in the refcount table.
pub(super) const TABLE_OFFSET_MASK: u64 = 0xffff_ffff_ffff_fe00;

/// The refcount number `index` of a block (or of a part of one that begins with number 0).
pub(super) fn get(block: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let bits = 1usize << order;
        let per_byte = 8 / bits;
        let value = block[index / per_byte] >> (index % per_byte * bits);
        return u64::from(value) & ((1 << bits) - 1);
    }
    let bytes = 1usize << (order - 3);
    block[index * bytes..(index + 1) * bytes].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Sets the refcount number `index`. `value` must fit.
pub(super) fn set(block: &mut [u8], order: u32, index: usize, value: u64) {
    if order < 3 {
        let bits = 1usize << order;
        let per_byte = 8 / bits;
        let shift = index % per_byte * bits;
        let mask = (((1u16 << bits) - 1) as u8) << shift;
        let byte = &mut block[index / per_byte];
        *byte = *byte & !mask | ((value as u8) << shift) & mask;
        return;
    }
    let bytes = 1usize << (order - 3);
    block[index * bytes..(index + 1) * bytes].copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
}

#[cfg(test)]
mod tests {
    //! Goal: every width keeps every number, and neighbours stay. Method: random sets against a vector of numbers.

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_width_keeps_numbers(order in 0u32..7, sets in prop::collection::vec((0usize..64, any::<u64>()), 1..60)) {
            let bits = 1u32 << order;
            let mut block = vec![0u8; 512];
            let mut model = [0u64; 64];
            for (index, value) in sets {
                let value = value & (u64::MAX >> (64 - bits));
                set(&mut block, order, index, value);
                model[index] = value;
            }
            for (index, value) in model.iter().enumerate() {
                prop_assert_eq!(get(&block, order, index), *value);
            }
        }
    }
}
