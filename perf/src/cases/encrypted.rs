//! `encrypted`: a LUKS disk (AES-256-XTS) beside our own raw file in the same rounds, and what the cipher alone does on the core of
//! the load: 4 KiB blocks in memory, encrypted and decrypted.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use formats::crypt::cipher::Cipher;

use super::single::{self, Contender, Lifetime, Plan, Subject};
use super::{Bench, formats as images};
use crate::files::ImageDir;
use crate::report::{Metric, Row, Values};
use crate::servers::{Aio, Disk, Frontend, Kind};

/// The case's name.
pub const CASE: &str = "encrypted";
/// The cipher alone: blocks of 4 KiB each second.
pub const IN_MEMORY: [&str; 2] = ["AES-256-XTS encrypt 4k in memory", "AES-256-XTS decrypt 4k in memory"];
/// One such block.
pub const BLOCK_BYTES: usize = 4096;

/// Our row.
pub fn subject() -> Row {
    Row::new(Kind::Blktapd, "luks")
}

/// Runs the case.
pub fn run(bench: &mut Bench) -> Result<()> {
    let Some(tool) = bench.image_tool_for(CASE) else { return Ok(()) };
    for round in 0..bench.settings.rounds {
        let seconds = Duration::from_secs(u64::from(bench.settings.seconds));
        for (point, decrypts) in IN_MEMORY.into_iter().zip([false, true]) {
            let rate = blocks_per_second(decrypts, seconds.min(Duration::from_secs(2)))?;
            bench.record(CASE, point, &subject(), round, Values::from([(Metric::Iops, rate)]));
        }
    }
    let size_bytes = bench.settings.file_bytes;
    let dir = ImageDir::new(&bench.settings.dir, 2 * size_bytes + (64 << 20))?;
    let key = dir.path("key");
    std::fs::write(&key, b"a passphrase for benches")?;
    let file = Disk::File(dir.file("disk.img", size_bytes)?);
    let luks = Disk::Luks { path: dir.path("disk.luks"), key };
    tool.convert(&file, &luks)?;
    let mut ours = Vec::new();
    for program in bench.programs.iter().filter(|program| program.kind == Kind::Blktapd) {
        for (row, disk) in [(subject(), &luks), (images::raw(), &file)] {
            let subject = Subject::Server { program: program.clone(), aio: Aio::IoUring, disk: disk.clone() };
            ours.push(Contender { row, subject });
        }
    }
    let plan = Plan {
        case: CASE,
        size_bytes,
        lifetime: Lifetime::Measurement,
        points: &single::POINTS,
        frontend: Frontend::Nbd,
        warm: true,
    };
    single::run(bench, plan, single::with_control(ours))
}

/// Blocks that the cipher of LUKS transforms in a second, on this core.
fn blocks_per_second(decrypts: bool, time: Duration) -> Result<f64> {
    let cipher = Cipher::named("aes", "xts-plain64", 64).and_then(|cipher| cipher.with_key(&[7; 64]));
    let cipher = cipher.map_err(|what| anyhow!(what))?;
    let mut memory = vec![0u8; 64 * BLOCK_BYTES];
    let (began, mut blocks) = (Instant::now(), 0u64);
    while began.elapsed() < time {
        for block in memory.chunks_exact_mut(BLOCK_BYTES) {
            match decrypts {
                true => cipher.decrypt(black_box(blocks * 8), block),
                false => cipher.encrypt(black_box(blocks * 8), block),
            }
            blocks += 1;
        }
        black_box(&mut memory);
    }
    Ok(blocks as f64 / began.elapsed().as_secs_f64())
}
