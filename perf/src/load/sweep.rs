//! A finite load: one request to each stride of a disk (a cluster, a block, a region), in a random order without repetition, with
//! a fixed number in flight. For writes the final flush belongs to it.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::client::{Client, Op};
use super::schedule::Random;
use crate::stop;

/// Without any reply for so long the server counts as hanging.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How often the user's wish to leave is looked at.
const POLL_MS: u16 = 500;
/// Replies are received through a buffer of this size.
const SCRATCH_BYTES: usize = 256 << 10;

/// One sweep.
#[derive(Debug, Clone, Copy)]
pub struct Sweep {
    /// Reads or writes.
    pub op: Op,
    /// Bytes of a request.
    pub block_bytes: u32,
    /// One request goes to each stride of so many bytes, to a random block inside of it.
    pub stride_bytes: u64,
    /// Strides, from the start of the disk.
    pub count: u64,
    /// Requests in flight.
    pub depth: u32,
    /// Equal seeds give equal requests: reads find what a sweep of writes with the same seed wrote.
    pub seed: u64,
}

impl Sweep {
    /// The offsets of all requests in their order.
    fn offsets(&self) -> Vec<u64> {
        let mut random = Random(self.seed);
        let blocks = (self.stride_bytes / u64::from(self.block_bytes)).max(1);
        let mut offsets: Vec<u64> = (0..self.count)
            .map(|stride| stride * self.stride_bytes + random.below(blocks) * u64::from(self.block_bytes))
            .collect();
        // Fisher and Yates.
        for index in (1..offsets.len()).rev() {
            offsets.swap(index, random.below(index as u64 + 1) as usize);
        }
        offsets
    }
}

/// Runs a sweep and returns how long it took, from the first request to the last reply (of the flush, for writes).
///
/// The connection is opened before, with the sweep's operation and block: a server may still be opening its image when its socket
/// answers, and what is measured around the sweep must not contain that.
pub fn run(mut client: Client, sweep: &Sweep) -> Result<Duration> {
    let offsets = sweep.offsets();
    ensure!(!offsets.is_empty() && sweep.depth > 0, "a sweep needs requests");
    let last = offsets.iter().max().copied().unwrap_or(0);
    ensure!(last + u64::from(sweep.block_bytes) <= client.size_bytes, "the sweep is larger than the disk");
    let mut payload = vec![0u8; sweep.block_bytes as usize];
    let mut random = Random(sweep.seed ^ 0x5eed);
    payload.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()[..word.len()]));
    let data: &[u8] = if sweep.op == Op::Write { &payload } else { &[] };

    let begin = Instant::now();
    let (mut sent, mut answered) = (0, 0);
    let mut scratch = vec![0; SCRATCH_BYTES];
    while answered < offsets.len() {
        while sent < offsets.len() && sent - answered < sweep.depth as usize {
            client.queue(sweep.op, sent as u64, offsets[sent], sweep.block_bytes, data);
            sent += 1;
        }
        answered += replies(&mut client, &mut scratch)?;
    }
    if sweep.op == Op::Write {
        client.queue_flush(u64::MAX);
        replies(&mut client, &mut scratch)?;
    }
    let elapsed = begin.elapsed();
    client.disconnect();
    Ok(elapsed)
}

/// Sends what is queued and waits for at least one reply; how many there were.
fn replies(client: &mut Client, scratch: &mut [u8]) -> Result<usize> {
    let begin = Instant::now();
    let mut count = 0;
    while count == 0 {
        stop::check()?;
        let mut flags = PollFlags::POLLIN;
        if !client.flush()? {
            flags |= PollFlags::POLLOUT;
        }
        poll(&mut [PollFd::new(client.socket().as_fd(), flags)], PollTimeout::from(POLL_MS))?;
        client.receive(scratch, |reply| {
            ensure!(reply.error == 0, "the server answered a request with error {}", reply.error);
            count += 1;
            Ok(())
        })?;
        if begin.elapsed() > SILENCE_MAX {
            bail!("the server answered nothing for {} s", SILENCE_MAX.as_secs());
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: each stride is visited exactly once, in no ascending order, at blocks inside of it. Method: a sweep of 100 strides.
    #[test]
    fn offsets_are_a_permutation_of_strides() {
        let sweep =
            Sweep { op: Op::Read, block_bytes: 4096, stride_bytes: 65_536, count: 100, depth: 1, seed: 3 };
        let offsets = sweep.offsets();
        assert_eq!(offsets, sweep.offsets());
        assert!(offsets.iter().all(|offset| offset % 4096 == 0));
        let mut strides: Vec<u64> = offsets.iter().map(|offset| offset / 65_536).collect();
        assert!(strides.windows(2).any(|pair| pair[0] > pair[1]));
        strides.sort_unstable();
        assert!(strides.into_iter().eq(0..100));
    }
}
