//! Encodes units of a disk on all cores. The caller waits: it is a tool, and its I/O goes on in the kernel meanwhile.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use formats::codec::encode;
use formats::driver::Encoding;
use formats::tools::encode::Encoder;

/// See the module.
#[derive(Debug)]
pub struct AllCores;

impl Encoder for AllCores {
    fn encode(&self, encoding: &Encoding, units: &[&[u8]]) -> Vec<Option<Vec<u8>>> {
        let threads = thread::available_parallelism().map_or(1, NonZero::get).min(units.len());
        // Each takes the next unit, since some take longer than others.
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            while let Some((number, unit)) = {
                let number = next.fetch_add(1, Ordering::Relaxed);
                units.get(number).map(|unit| (number, unit))
            } {
                done.push((number, encode(encoding.method, unit, encoding.encoded_max)));
            }
            done
        };
        let mut encoded = vec![None; units.len()];
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mine = work();
            // A thread that failed leaves its units as they are, which is right, too.
            let theirs = others.into_iter().filter_map(|thread| thread.join().ok()).flatten();
            for (number, one) in mine.into_iter().chain(theirs) {
                encoded[number] = one;
            }
        });
        encoded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use formats::codec::{Method, decode};

    /// Goal: every unit is encoded once and stands in its place. Method: units that differ, more and fewer than there are cores, with some
    /// that do not get shorter.
    #[test]
    fn units_stay_in_order() {
        let encoding = Encoding { method: Method::Zstd, unit: 4096, encoded_max: 4095 };
        for count in [0, 1, 2, 3, 500] {
            let units: Vec<Vec<u8>> = (0..count)
                .map(|number: usize| match number % 7 {
                    6 => (0..4096)
                        .map(|at| (at * at * 31 + at * 7 + number * 13) as u8 ^ (at >> 3) as u8)
                        .collect(),
                    _ => vec![number as u8; 4096],
                })
                .collect();
            let slices: Vec<&[u8]> = units.iter().map(Vec::as_slice).collect();
            let encoded = AllCores.encode(&encoding, &slices);
            assert_eq!(encoded.len(), count);
            for (unit, encoded) in units.iter().zip(encoded) {
                assert_eq!(encoded, encode(Method::Zstd, unit, 4095));
                assert!(encoded.is_none_or(|bytes| decode(Method::Zstd, &bytes, 4096).as_ref() == Ok(unit)));
            }
        }
    }
}
