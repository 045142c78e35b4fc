//! Goal: what is encoded is decoded, also by programs with a small window; and whatever else is given to the decoder, it ends with an
//! error, within the memory of a unit. Method: bytes of all kinds there and back; vectors of other programs; bombs, lying lengths,
//! pieces and mutations of sound streams; and for the cache a store that counts what is read.

use std::cell::Cell;
use std::io::Write;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use proptest::prelude::*;

use super::*;
use crate::error::Error;
use crate::file::Buf;
use crate::metadata::Budget;

const METHODS: [Method; 3] = [Method::Deflate, Method::Zlib, Method::Zstd];

/// Bytes that compress by about a half, with matches near and far.
fn text(len: usize, seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let words: Vec<Vec<u8>> =
        (0..200).map(|_| (0..rng.usize(2..12)).map(|_| rng.u8(97..123)).collect()).collect();
    let mut bytes = Vec::with_capacity(len + 16);
    while bytes.len() < len {
        bytes.extend_from_slice(&words[rng.usize(..words.len())]);
        bytes.push(rng.u8(..));
    }
    bytes.truncate(len);
    bytes
}

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fastrand::Rng::with_seed(7).fill(&mut bytes);
    bytes
}

fn encoded(method: Method, bytes: &[u8]) -> Vec<u8> {
    encode(method, bytes, encoded_max(bytes.len()))
        .unwrap_or_else(|| panic!("{method:?}, {} bytes", bytes.len()))
}

#[test]
fn units_of_all_sizes_come_back() {
    for method in METHODS {
        for len in [1, 511, 512, 4096, 65536, 100_000] {
            for bytes in [vec![0; len], text(len, 1), noise(len)] {
                let mut packed = encoded(method, &bytes);
                assert!(packed.len() <= encoded_max(len), "{method:?} {len}");
                assert_eq!(decode(method, &packed, len).unwrap(), bytes, "{method:?} {len}");
                // Lengths may be told in sectors, with anything in the rest of the last one.
                let stream = packed.len();
                packed.extend_from_slice(&noise(511));
                assert_eq!(decode(method, &packed, len).unwrap(), bytes, "{method:?} {len}, with a tail");
                // What does not fit is not given.
                for room in [0, 1, stream / 2, stream - 1, stream] {
                    assert!(encode(method, &bytes, room).is_none_or(|again| again.len() <= room));
                }
                assert_eq!(encode(method, &bytes, stream / 2), None, "{method:?} {len}");
            }
        }
    }
}

/// Readers of qcow keep a window of 4 KiB: streams with longer matches are errors to them.
#[test]
fn deflate_is_readable_with_a_small_window() {
    for seed in 0..20 {
        let bytes = [text(40_000, seed), text(20_000, seed + 1), text(40_000, seed)].concat();
        let packed = encoded(Method::Deflate, &bytes);
        let mut small = flate2::Decompress::new_with_window_bits(false, 12);
        // In small steps, since matches within one output buffer are found there whatever the window.
        let (mut out, mut piece) = (Vec::new(), [0; 512]);
        loop {
            let (read, before) = (small.total_in() as usize, small.total_out());
            let status = small.decompress(&packed[read..], &mut piece, FlushDecompress::None).unwrap();
            out.extend_from_slice(&piece[..(small.total_out() - before) as usize]);
            if status == Status::StreamEnd {
                break;
            }
        }
        assert!(out == bytes, "seed {seed}");
    }
}

#[test]
fn streams_of_other_programs_are_read() {
    let bytes = b"abc".repeat(32);
    let zlib = [120, 156, 75, 76, 74, 78, 164, 37, 2, 0, 246, 218, 36, 193];
    assert_eq!(decode(Method::Zlib, &zlib, 96).unwrap(), bytes);
    assert_eq!(decode(Method::Deflate, &zlib[2..], 96).unwrap(), bytes);
    // The zstd program: no length in the header, a checksum behind.
    let zstd = [
        0x28, 0xb5, 0x2f, 0xfd, 0x04, 0x58, 0x4d, 0x00, 0x00, 0x18, 0x61, 0x62, 0x63, 0x01, 0x00, 0xea, 0xe4,
        0x86, 0xfc, 0x17, 0xa4, 0xfb,
    ];
    assert_eq!(decode(Method::Zstd, &zstd, 96).unwrap(), bytes);
    assert_eq!(decode_up_to(Method::Zstd, &zstd, 4096).unwrap(), bytes);
    // A unit in several frames, with one to be skipped between them.
    let halves = text(8192, 3);
    let skipped = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
    let frames =
        [encoded(Method::Zstd, &halves[..4096]), skipped.to_vec(), encoded(Method::Zstd, &halves[4096..])];
    assert_eq!(decode(Method::Zstd, &frames.concat(), 8192).unwrap(), halves);
}

#[test]
fn bombs_and_lying_lengths_are_errors() {
    for method in METHODS {
        let bomb = encoded(method, &vec![0; UNIT_MAX]);
        assert!(bomb.len() < 8192, "{method:?}: {} bytes", bomb.len());
        for len in [1, 512, 65536, UNIT_MAX - 1] {
            assert_eq!(decode(method, &bomb, len), Err(Damaged::TooMuch(len)), "{method:?} {len}");
        }
        let short = encoded(method, &[5; 1000]);
        assert_eq!(decode(method, &short, 1001), Err(Damaged::TooLittle { found: 1000, expected: 1001 }));
        assert_eq!(decode_up_to(method, &short, 1001).unwrap(), [5; 1000]);
        assert_eq!(decode(method, &short, UNIT_MAX + 1), Err(Damaged::TooLarge(UNIT_MAX + 1)));
        // A decoder that met an error decodes the next unit.
        assert_eq!(decode(method, &short, 1000).unwrap(), [5; 1000]);
    }
    // A frame that wants a window of many gigabytes: none is needed.
    let mut stream = zstd::Encoder::new(Vec::new(), 1).unwrap();
    stream.window_log(27).unwrap();
    stream.write_all(&[9; 4096]).unwrap();
    let wide = stream.finish().unwrap();
    assert_eq!(decode(Method::Zstd, &wide, 4096).unwrap(), [9; 4096]);
    // Frames without an end that hold nothing.
    let nothing = [0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0].repeat(100_000);
    assert!(matches!(decode(Method::Zstd, &nothing, 512), Err(Damaged::TooLittle { found: 0, .. })));
    // Stored blocks of deflate without bytes, likewise.
    let nothing = [0, 0, 0, 0xff, 0xff].repeat(100_000);
    assert_eq!(decode(Method::Deflate, &nothing, 512), Err(Damaged::CutOff));
}

#[test]
fn a_stream_that_is_cut_off_is_an_error_wherever_that_is() {
    for method in METHODS {
        let bytes = text(3000, 9);
        let packed = encoded(method, &bytes);
        for len in 0..packed.len() {
            assert!(decode(method, &packed[..len], 3000).is_err(), "{method:?}, {len} of {}", packed.len());
        }
    }
}

proptest! {
    #[test]
    fn whatever_is_decoded_ends_within_its_length(
        junk in prop::collection::vec(any::<u8>(), 0..400),
        at in any::<prop::sample::Index>(),
        seed in any::<u64>(),
    ) {
        for method in METHODS {
            let _ = decode(method, &junk, 700);
            let mut packed = encoded(method, &text(700, seed));
            let at = at.index(packed.len());
            for (byte, junk) in packed[at..].iter_mut().zip(&junk) {
                *byte ^= junk;
            }
            if let Ok(bytes) = decode_up_to(method, &packed, 700) {
                prop_assert!(bytes.len() <= 700);
            }
            // Whatever a state has seen, the next unit is right.
            prop_assert_eq!(encode(method, &noise(700), 600), None);
            let sound = text(700, seed ^ 1);
            prop_assert_eq!(decode(method, &encoded(method, &sound), 700).unwrap(), sound);
        }
    }
}

/// A file of encoded units that counts how often it is read.
struct Source {
    method: Method,
    reads: Rc<Cell<u32>>,
}

impl Source {
    fn new(method: Method) -> Source {
        Source { method, reads: Rc::default() }
    }

    fn bytes(&self, place: u64, len: usize) -> Vec<u8> {
        text(len, place)
    }

    async fn get(&self, decoded: &Decoded, place: u64, len: usize) -> Result<Rc<[u8]>, Error> {
        let read = || -> crate::file::Pending<'static, Buf> {
            self.reads.set(self.reads.get() + 1);
            let mut packed = encoded(self.method, &self.bytes(place, len));
            if place == 666 {
                packed.truncate(100);
            }
            Box::pin(async move {
                yield_now().await;
                Ok(Buf::copy_of(&packed))
            })
        };
        decoded.get(place, self.method, len, read, |why| Error::corrupt("a", why)).await
    }
}

use futures_lite::future::{block_on, yield_now};

#[test]
fn one_unit_is_decoded_once_for_all_who_ask() {
    let budget = Budget::new(1 << 20);
    let (decoded, source) = (Decoded::new(&budget), Source::new(Method::Zstd));
    block_on(async {
        let all: Vec<_> = (0..50).map(|number| source.get(&decoded, number % 5, 4096)).collect();
        for (number, bytes) in futures_util::future::join_all(all).await.into_iter().enumerate() {
            assert!(*bytes.unwrap() == *source.bytes(number as u64 % 5, 4096));
        }
        assert_eq!(source.reads.get(), 5);
        // What is at a place may change.
        decoded.forget(3);
        decoded.forget(77);
        source.get(&decoded, 3, 4096).await.unwrap();
        source.get(&decoded, 4, 4096).await.unwrap();
        assert_eq!(source.reads.get(), 6);
        // A damaged one is an error for those who ask for it, each time, and for nobody else.
        for _ in 0..2 {
            let error = source.get(&decoded, 666, 4096).await.unwrap_err();
            assert!(error.message.contains("a is damaged"), "{error}");
        }
        assert_eq!(source.reads.get(), 8);
    });
    assert!(budget.used_bytes() >= 5 * 4096);
    drop(decoded);
    assert_eq!(budget.used_bytes(), 0);
}

#[test]
fn the_units_of_an_image_take_a_part_of_the_budget() {
    let budget = Budget::new(1 << 20);
    let (decoded, other) = (Decoded::new(&budget), Decoded::new(&budget));
    let source = Source::new(Method::Deflate);
    block_on(async {
        for place in 0..200 {
            source.get(&decoded, place, 4096).await.unwrap();
            assert!(budget.used_bytes() <= 1 << 18, "{}", budget.used_bytes());
        }
        // The last ones are there, the first ones are not.
        let reads = source.reads.get();
        source.get(&decoded, 199, 4096).await.unwrap();
        assert_eq!(source.reads.get(), reads);
        source.get(&decoded, 0, 4096).await.unwrap();
        assert_eq!(source.reads.get(), reads + 1);
        // A unit that is larger than the part is decoded for each who asks.
        for _ in 0..2 {
            assert_eq!(source.get(&other, 5, 300_000).await.unwrap().len(), 300_000);
        }
        assert_eq!(source.reads.get(), reads + 3);
        assert!(budget.used_bytes() <= 1 << 18);
    });
}

/// Goal: tables get the memory that decoded units have. Method: units first, then more slices of a table than fit beside them.
#[test]
fn tables_take_the_memory_of_units() {
    use crate::driver::FileIndex;
    use crate::metadata::{SLICE_BYTES, Tables};
    let budget = Budget::new(64 << 10);
    let (decoded, source) = (Decoded::new(&budget), Source::new(Method::Zstd));
    let store = crate::testing::Store::new(1);
    let file: Rc<dyn crate::file::ImageFile> = store.add("a", crate::testing::Pages::of(&[1; 1 << 20]));
    let tables: Vec<_> = (0..3)
        .map(|_| Tables::new(file.clone(), FileIndex(0), Vec::new(), SLICE_BYTES, &budget, None))
        .collect();
    for place in 0..3 {
        block_on(source.get(&decoded, place, 4096)).unwrap();
    }
    let with_units = budget.used_bytes();
    assert!(with_units > 3 * 4096);
    for number in 0..48 {
        store.run(tables[number % 3].load((number * SLICE_BYTES) as u64)).unwrap();
        assert!(budget.used_bytes() <= 64 << 10, "{} bytes", budget.used_bytes());
    }
    // And the other way round: what was pushed out is decoded again, and nothing is counted twice.
    let reads = source.reads.get();
    for place in 0..3 {
        block_on(source.get(&decoded, place, 4096)).unwrap();
    }
    assert!(source.reads.get() > reads, "no unit gave way to a table");
    drop((decoded, tables));
    assert_eq!(budget.used_bytes(), 0);
}

/// Goal: whoever decodes much lets others go first. Method: polls of one future are counted; none decodes more than a turn's bytes and
/// one unit.
#[test]
fn no_turn_decodes_much() {
    let budget = Budget::new(1 << 20);
    let (decoded, source) = (Decoded::new(&budget), Source::new(Method::Zstd));
    let work = async {
        for place in 0..64 {
            // Behind the wait for the read of `Source`.
            source.get(&decoded, place * 512, 32 << 10).await.unwrap();
        }
    };
    let mut work = std::pin::pin!(work);
    let mut polls = 1;
    let mut context = Context::from_waker(Waker::noop());
    while work.as_mut().poll(&mut context) == Poll::Pending {
        polls += 1;
    }
    // One for each read, and one more for every two units of 32 KiB.
    assert!(polls >= 64 + 31, "{polls} polls for 2 MiB");
    // Many at a time share the turns, and one that goes away leaves them to the others.
    let many: Vec<_> =
        (100..164).map(|place| Box::pin(source.get(&decoded, place * 512, 32 << 10))).collect();
    let mut many = many;
    let mut done = 0;
    let mut rounds = 0;
    while !many.is_empty() {
        rounds += 1;
        let before = done;
        many.retain_mut(|one| {
            let ready = one.as_mut().poll(&mut context).is_ready();
            done += usize::from(ready);
            !ready
        });
        assert!(done - before <= 4, "{} units of 32 KiB in one round", done - before);
        if rounds % 5 == 0 {
            many.pop();
        }
        assert!(rounds < 1000);
    }
}
