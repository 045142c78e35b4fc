//! Sets of blocks, one bit each, in pieces that exist only where something is in them.

/// Blocks per piece.
const PIECE: usize = 4096;

/// A set of block numbers below a limit. At most one bit for each, and one pointer for every 4096.
#[derive(Debug, Default)]
pub struct BlockSet {
    pieces: Vec<Option<Box<[u64; PIECE / 64]>>>,
    count: u32,
}

impl BlockSet {
    /// The empty set of blocks below `blocks`.
    pub fn new(blocks: u32) -> BlockSet {
        let mut set = BlockSet::default();
        set.grow(blocks);
        set
    }

    /// Takes blocks below `blocks`, too.
    pub fn grow(&mut self, blocks: u32) {
        let pieces = (blocks as usize).div_ceil(PIECE).max(self.pieces.len());
        self.pieces.resize_with(pieces, || None);
    }

    /// How many are in it.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whether a block is in it.
    pub fn contains(&self, block: u32) -> bool {
        let at = block as usize % PIECE;
        match self.pieces.get(block as usize / PIECE) {
            Some(Some(piece)) => piece[at / 64] & (1 << (at % 64)) != 0,
            _ => false,
        }
    }

    /// Adds a block; one at or above the limit is not kept.
    pub fn insert(&mut self, block: u32) {
        let at = block as usize % PIECE;
        let Some(piece) = self.pieces.get_mut(block as usize / PIECE) else { return };
        let word = &mut piece.get_or_insert_with(|| Box::new([0; PIECE / 64]))[at / 64];
        self.count += u32::from(*word & (1 << (at % 64)) == 0);
        *word |= 1 << (at % 64);
    }

    /// Takes a block out.
    pub fn remove(&mut self, block: u32) {
        let at = block as usize % PIECE;
        if let Some(Some(piece)) = self.pieces.get_mut(block as usize / PIECE) {
            let word = &mut piece[at / 64];
            self.count -= u32::from(*word & (1 << (at % 64)) != 0);
            *word &= !(1 << (at % 64));
        }
    }
}

#[cfg(test)]
mod tests {
    //! Goal: a set is a set. Method: random changes against the standard library's.

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn as_a_set(changes in proptest::collection::vec((0u32..10_000, any::<bool>()), 0..200)) {
            let mut set = BlockSet::new(10_000);
            let mut model = std::collections::BTreeSet::new();
            for (block, add) in changes {
                if add {
                    set.insert(block);
                    model.insert(block);
                } else {
                    set.remove(block);
                    model.remove(&block);
                }
                prop_assert_eq!(set.count() as usize, model.len());
            }
            prop_assert!((0..20_000).all(|block| set.contains(block) == model.contains(&block)));
        }
    }
}
