//! Random requests of any alignment, one at a time, against a byte array; with resizes, re-opens and deaths of the process.

use super::Oracle;
use crate::driver::Erase;
use crate::error::ErrorKind;
use crate::testing::rig::{Case, Rig, read, read_all, write};
use crate::volume::Volume;

struct Model {
    rig: Rig,
    volume: Volume,
    bytes: Vec<u8>,
    rng: fastrand::Rng,
    died: bool,
}

/// Runs `steps` random requests on a case.
///
/// # Errors
/// What differs from the byte array, or what the checks found.
pub fn run(case: &Case, seed: u64, steps: usize, oracle: Option<Oracle<'_>>) -> Result<(), String> {
    let rig = Rig::create(case, seed).map_err(|error| error.to_string())?;
    exercise(rig, seed, steps, oracle)
}

/// The same on a chain that is there, and whose disk holds [`Rig::initial`].
///
/// # Errors
/// As [`run`].
pub fn exercise(rig: Rig, seed: u64, steps: usize, oracle: Option<Oracle<'_>>) -> Result<(), String> {
    let text = |error: crate::error::Error| error.to_string();
    let volume = rig.open(true).map_err(text)?;
    let bytes = rig.initial.clone();
    let mut model = Model { rig, volume, bytes, rng: fastrand::Rng::with_seed(seed), died: false };
    model.compare("new")?;
    for step in 0..steps {
        let mut deed = String::new();
        model.step(&mut deed).map_err(|error| format!("step {step}, {deed}: {error}"))?;
    }
    model.compare("at the end")?;
    model.close()?;
    if let Some(oracle) = oracle {
        oracle(&model.rig).map_err(|error| format!("oracle: {error}"))?;
    }
    model.volume = model.rig.open(false).map_err(text)?;
    model.compare("read-only")?;
    match model.rig.store.violations().first() {
        Some(violation) => Err(violation.clone()),
        None => Ok(()),
    }
}

impl Model {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// A range of any alignment, where something happened before, or anywhere.
    fn range(&mut self) -> (u64, u64) {
        let size = self.size();
        let start = match self.rng.u8(..4) {
            0 => self.rng.u64(..size),
            1 => size - self.rng.u64(1..=size.min(5000)),
            2 => (size / 4 * self.rng.u64(..4) + self.rng.u64(..3000)).min(size - 1),
            _ => self.rng.u64(..size.min(300_000)) & !4095,
        };
        let len = match self.rng.u8(..4) {
            0 => self.rng.u64(1..300_000) & !511,
            1 => 4096,
            _ => self.rng.u64(1..9000),
        };
        (start, len.clamp(1, size - start))
    }

    fn step(&mut self, deed: &mut String) -> Result<(), String> {
        let (start, len) = self.range();
        let range = start as usize..(start + len) as usize;
        let text = |error: crate::error::Error| error.to_string();
        match self.rng.u8(..32) {
            0..=11 => {
                *deed = format!("write of {len} at {start}");
                let mut data = vec![0; range.len()];
                self.rng.fill(&mut data);
                self.rig.store.run(write(&self.volume, start, &data)).map_err(text)?;
                self.bytes[range.clone()].copy_from_slice(&data);
            }
            12..=19 => *deed = format!("read of {len} at {start}"),
            20..=24 => {
                let how = [Erase::Zero, Erase::Discard, Erase::ZeroKeep][self.rng.usize(..3)];
                *deed = format!("{how:?} of {len} at {start}");
                self.rig.store.run(self.volume.erase(start, len, how)).map_err(text)?;
                if how == Erase::Discard {
                    self.adopt(range.clone())?;
                } else {
                    self.bytes[range.clone()].fill(0);
                }
            }
            25 => {
                *deed = "flush".to_string();
                self.rig.store.run(self.volume.flush()).map_err(text)?;
            }
            26 => {
                *deed = "tidy".to_string();
                self.rig.store.run(self.volume.tidy()).map_err(text)?;
            }
            27 => {
                *deed = "close and open".to_string();
                self.close()?;
                self.volume = self.rig.open(true).map_err(text)?;
            }
            28 => {
                *deed = "death of the process".to_string();
                self.rig = self.rig.after_death(self.rng.u64(..))?;
                self.died = true;
                self.volume = self.rig.open(true).map_err(text)?;
            }
            29 | 30 => {
                *deed = "resize".to_string();
                self.resize(deed)?;
            }
            _ => {
                *deed = "check of the whole disk".to_string();
                self.compare("whole")?;
            }
        }
        // What was touched, and some bytes around it.
        let (start, end) =
            (range.start.saturating_sub(700) as u64, (range.end as u64 + 700).min(self.size()));
        self.compare_range(start.min(end), end)
    }

    /// After a discard each byte is as it was, or zero.
    fn adopt(&mut self, range: std::ops::Range<usize>) -> Result<(), String> {
        let found = read(&self.volume, range.start as u64, range.len() as u64);
        let found = self.rig.store.run(found).map_err(|error| error.to_string())?;
        for (old, new) in self.bytes[range].iter_mut().zip(found.iter()) {
            if *new != *old && *new != 0 {
                return Err("a discarded byte is neither old nor zero".to_string());
            }
            *old = *new;
        }
        Ok(())
    }

    fn resize(&mut self, deed: &mut String) -> Result<(), String> {
        let old = self.size();
        let change = self.rng.u64(..=(old / 4).min(1 << 20)) & !511;
        let grows = self.rng.u8(..4) != 0;
        let size = if grows { old + change } else { old - change };
        *deed = format!("resize from {old} to {size}");
        match self.rig.store.run(self.volume.resize(size)) {
            Ok(()) => self.bytes.resize(size as usize, 0),
            // A refusal changes nothing.
            Err(error) if matches!(error.kind, ErrorKind::Invalid | ErrorKind::Unsupported) => {}
            Err(error) => return Err(error.to_string()),
        }
        if self.volume.size() == self.size() {
            return Ok(());
        }
        Err(format!("the size is {} then", self.volume.size()))
    }

    fn close(&mut self) -> Result<(), String> {
        self.rig.store.run(self.volume.close()).map_err(|error| format!("close: {error}"))?;
        if self.rig.log().is_some_and(|log| !log.is_empty()) {
            return Err("entries are left in the allocation log after a close".to_string());
        }
        let findings = self.rig.check_sound()?;
        if self.rig.case.closes_clean && !self.died && findings.leaks_total > 0 {
            return Err(format!("leaks after a close: {:?}", findings.leaks.first()));
        }
        Ok(())
    }

    fn compare_range(&mut self, start: u64, end: u64) -> Result<(), String> {
        let found =
            self.rig.store.run(read(&self.volume, start, end - start)).map_err(|error| error.to_string())?;
        differs(&self.bytes[start as usize..end as usize], &found, start)
    }

    fn compare(&mut self, when: &str) -> Result<(), String> {
        if self.volume.size() != self.size() {
            return Err(format!("{when}: {} bytes, expected {}", self.volume.size(), self.size()));
        }
        let found = self.rig.store.run(read_all(&self.volume)).map_err(|error| format!("{when}: {error}"))?;
        differs(&self.bytes, &found, 0).map_err(|error| format!("{when}: {error}"))
    }
}

fn differs(expected: &[u8], found: &[u8], start: u64) -> Result<(), String> {
    if expected == found {
        return Ok(());
    }
    let Some(at) = expected.iter().zip(found).position(|(expected, found)| expected != found) else {
        return Ok(());
    };
    let (expected, found) = (expected[at], found[at]);
    Err(format!("byte {} is {found:#x}, expected {expected:#x}", start + at as u64))
}
