//! When the requests of an open loop are due, and where requests go. Pure functions of a seed.

use super::Pattern;

/// A small generator (SplitMix64: Steele, Lea, Flood, OOPSLA 2014), so that a seed means the same requests everywhere.
#[derive(Debug, Clone)]
pub(super) struct Random(pub u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not zero.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// The due times of all connections as one ordered sequence: every connection sends once per period, at its own phase.
#[derive(Debug)]
pub(super) struct Schedule {
    period_ns: f64,
    /// (phase, connection), ordered by phase.
    phases: Vec<(u64, usize)>,
    next: u64,
}

impl Schedule {
    /// `per_second` is positive; there is at least one connection.
    pub(super) fn new(connections: usize, per_second: f64, random: &mut Random) -> Self {
        let period_ns = 1e9 / per_second;
        let mut phases: Vec<(u64, usize)> = (0..connections)
            .map(|connection| (random.below((period_ns as u64).max(1)), connection))
            .collect();
        phases.sort_unstable();
        Self { period_ns, phases, next: 0 }
    }

    /// The next request: when it is due (nanoseconds from the start) and on which connection.
    pub(super) fn peek(&self) -> (u64, usize) {
        let connections = self.phases.len() as u64;
        let (phase, connection) = self.phases[(self.next % connections) as usize];
        (((self.next / connections) as f64 * self.period_ns) as u64 + phase, connection)
    }

    /// Goes on to the request after [`Schedule::peek`].
    pub(super) fn advance(&mut self) {
        self.next += 1;
    }
}

/// Where the next request of one connection goes.
#[derive(Debug)]
pub(super) struct Offsets {
    pattern: Pattern,
    block_bytes: u64,
    blocks: u64,
    position: u64,
}

impl Offsets {
    /// The disk holds at least one block.
    pub(super) fn new(pattern: Pattern, size_bytes: u64, block_bytes: u32) -> Self {
        let block_bytes = u64::from(block_bytes);
        Self { pattern, block_bytes, blocks: (size_bytes / block_bytes).max(1), position: 0 }
    }

    pub(super) fn next(&mut self, random: &mut Random) -> u64 {
        let block = match self.pattern {
            Pattern::Random => random.below(self.blocks),
            Pattern::Sequential => {
                self.position = (self.position + 1) % self.blocks;
                self.position
            }
        };
        block * self.block_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: every connection is due exactly once per period and the sequence is ordered. Method: walk ten periods.
    #[test]
    fn each_connection_once_per_period() {
        let mut schedule = Schedule::new(7, 50.0, &mut Random(3));
        let mut last = 0;
        let mut due = vec![Vec::new(); 7];
        for _ in 0..70 {
            let (at, connection) = schedule.peek();
            schedule.advance();
            assert!(at >= last);
            last = at;
            due[connection].push(at);
        }
        for times in due {
            assert_eq!(times.len(), 10);
            assert!(times.windows(2).all(|pair| pair[1] - pair[0] == 20_000_000), "{times:?}");
        }
    }

    // Goal: offsets stay inside the disk and on block boundaries, and sequential ones wrap. Method: a disk of 3.5 blocks.
    #[test]
    fn offsets_stay_inside() {
        let mut random = Random(1);
        let mut offsets = Offsets::new(Pattern::Random, 14_336, 4096);
        assert!((0..1000).map(|_| offsets.next(&mut random)).all(|o| o % 4096 == 0 && o + 4096 <= 14_336));
        let mut offsets = Offsets::new(Pattern::Sequential, 14_336, 4096);
        let first: Vec<u64> = (0..4).map(|_| offsets.next(&mut random)).collect();
        assert_eq!(first, [4096, 8192, 0, 4096]);
    }
}
