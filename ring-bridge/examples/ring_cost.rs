//! What the ring costs the backend per request: nanoseconds of consume, segments, answer, push and sleep, without grants and I/O. One thread plays both
//! sides, so nothing waits for another core's cache; a batch of 1 carries the clock's own cost (some 40 ns) as well.
//!
//! `cargo run --release -p ring-bridge --example ring_cost`

use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use ring_bridge::blkif::frontend::{self, Frontend};
use ring_bridge::blkif::inflight::{Identity, table_bytes};
use ring_bridge::blkif::request::{INDIRECT_SEGMENTS_DEFAULT, Limits, Status};
use ring_bridge::blkif::ring::{Ring, Taken};
use ring_bridge::blkif::wire::{Abi, WireSegment};
use ring_bridge::memory::SharedRegion;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    println!("{:>10} {:>9} {:>12}", "segments", "batch", "ns/request");
    for segments in [1, 11, 256] {
        for batch in [1, 8, 32] {
            let mut best = f64::INFINITY;
            for _ in 0..20 {
                best = best.min(cost_ns(segments, batch)?);
            }
            println!("{segments:>10} {batch:>9} {best:>12.1}");
        }
    }
    Ok(())
}

/// Backend time per request of `segments` segments that come `batch` at a time.
fn cost_ns(segments: u16, batch: usize) -> Result<f64, Failure> {
    let ring = memory(4096)?;
    let table = memory(table_bytes(32, INDIRECT_SEGMENTS_DEFAULT))?;
    let identity = Identity {
        domid: 1,
        devid: 51712,
        queue: 0,
        abi: Abi::X86_64,
        pages: 1,
        grefs: [0; 16],
        port: 1,
        segments_max: INDIRECT_SEGMENTS_DEFAULT,
    };
    let limits = Limits {
        sectors: 1 << 30,
        block_bytes: 512,
        read_only: false,
        flush: true,
        barrier: true,
        discard: true,
        secure_discard: false,
        indirect_segments_max: INDIRECT_SEGMENTS_DEFAULT,
    };
    let mut front = Frontend::create(&ring, Abi::X86_64, 1, 0)?;
    let mut back = Ring::attach(&ring, table, identity, limits)?;
    let wire = vec![WireSegment { gref: 8, first: 0, last: 7 }; usize::from(segments)];
    let bytes = frontend::pack(&wire);
    let indirect = wire.len() > 11;
    let message =
        if indirect { frontend::indirect(false, 0, segments, &[1]) } else { frontend::read(0, &wire) };
    let (mut taken, mut list, mut completions) = (Vec::new(), Vec::new(), Vec::new());
    let (mut spent, mut requests) = (Duration::ZERO, 0u32);
    while spent < Duration::from_millis(10) {
        for _ in 0..batch {
            front.submit(message, &wire)?;
        }
        front.publish()?;
        let begin = Instant::now();
        back.consume(batch, &mut taken)?;
        for taken in taken.drain(..) {
            let token = match taken {
                Taken::Run(request) => request.token,
                Taken::Fetch(fetch) => {
                    back.supply(fetch.token, &bytes)?;
                    fetch.token
                }
            };
            back.segments(token, &mut list)?;
            back.answer(token, Status::Okay)?;
        }
        back.push()?;
        back.sleep(1)?;
        spent += begin.elapsed();
        requests += batch as u32;
        completions.clear();
        front.poll(&mut completions)?;
    }
    Ok(spent.as_nanos() as f64 / f64::from(requests))
}

fn memory(bytes: usize) -> Result<SharedRegion, Failure> {
    let fd = memfd_create(c"ring_cost", MFdFlags::MFD_CLOEXEC)?;
    ftruncate(&fd, bytes as i64)?;
    Ok(SharedRegion::map(&fd, bytes)?)
}
