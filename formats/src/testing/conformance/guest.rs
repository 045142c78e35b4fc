//! A guest of a volume that remembers what it did, in whole blocks.

use std::cell::RefCell;
use std::ops::Range;

use super::super::history::{BLOCK_BYTES, Deed, History};
use super::super::rig::{read, write};
use crate::driver::Erase;
use crate::error::{Error, ErrorKind};
use crate::volume::Volume;

/// See the module. Several futures of one guest may run at a time.
#[derive(Debug)]
pub struct Guest<'a> {
    /// Its disk.
    pub volume: &'a Volume,
    /// What it did.
    pub history: &'a History,
    /// The first thing that it read and that it must not have read.
    wrong: RefCell<Option<String>>,
}

const BLOCK: u64 = BLOCK_BYTES as u64;

impl<'a> Guest<'a> {
    /// Of this disk.
    pub fn new(volume: &'a Volume, history: &'a History) -> Guest<'a> {
        Guest { volume, history, wrong: RefCell::new(None) }
    }

    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.volume.size() / BLOCK
    }

    /// Writes stamps.
    pub async fn write(&self, blocks: Range<u64>) -> Result<(), Error> {
        let number = self.history.begin(Deed::Write, blocks.clone());
        let result = write(self.volume, blocks.start * BLOCK, &self.history.data(number)).await;
        self.history.end(number, result.is_ok());
        result
    }

    /// Erases.
    pub async fn erase(&self, blocks: Range<u64>, how: Erase) -> Result<(), Error> {
        let deed = if how == Erase::Discard { Deed::Discard } else { Deed::Zero };
        let number = self.history.begin(deed, blocks.clone());
        let len = (blocks.end - blocks.start) * BLOCK;
        let result = self.volume.erase(blocks.start * BLOCK, len, how).await;
        self.history.end(number, result.is_ok());
        result
    }

    /// Makes the disk larger, by about a third. A format or a device that cannot do that leaves it as it is.
    pub async fn grow(&self) -> Result<(), Error> {
        let bytes = self.volume.size() + self.volume.size() / 3 / BLOCK * BLOCK;
        let number = self.history.begin_resize(bytes);
        let result = self.volume.resize(bytes).await;
        self.history.end_resize(number, result.is_ok());
        match result {
            Err(error) if matches!(error.kind, ErrorKind::Unsupported | ErrorKind::Invalid) => Ok(()),
            Err(error) if error.kind == ErrorKind::NoSpace && self.is_on_device() => Ok(()),
            other => other,
        }
    }

    fn is_on_device(&self) -> bool {
        self.volume.layers()[0].files.iter().any(|file| file.is_device())
    }

    /// Flushes.
    pub async fn flush(&self) -> Result<(), Error> {
        let number = self.history.begin_flush();
        let result = self.volume.flush().await;
        self.history.end_flush(number, result.is_ok());
        result
    }

    /// Reads, and judges what it finds.
    pub async fn read(&self, blocks: Range<u64>) -> Result<(), Error> {
        let began = self.history.moment();
        let bytes = read(self.volume, blocks.start * BLOCK, (blocks.end - blocks.start) * BLOCK).await?;
        if let Err(wrong) = self.history.judge_read(began, blocks.start, &bytes) {
            self.wrong.borrow_mut().get_or_insert(format!("a read found that {wrong}"));
        }
        Ok(())
    }

    /// Reads everything.
    pub async fn read_all(&self) -> Result<(), Error> {
        let (mut at, end) = (0, self.blocks());
        while at < end {
            let stop = end.min(at + 2048);
            self.read(at..stop).await?;
            at = stop;
        }
        Ok(())
    }

    /// What was wrong so far.
    ///
    /// # Errors
    /// The first thing that was.
    pub fn verdict(&self) -> Result<(), String> {
        self.wrong.borrow().clone().map_or(Ok(()), Err)
    }

    /// A random request, in one of a few hot areas: mostly small writes.
    pub async fn random(&self, rng: &mut fastrand::Rng) -> Result<(), Error> {
        let blocks = random_blocks(rng, self.blocks());
        match rng.u8(..20) {
            0..=10 => self.write(blocks).await,
            11..=13 => self.read(blocks).await,
            14 => self.erase(blocks, Erase::Zero).await,
            15 => self.erase(blocks, Erase::Discard).await,
            16 => self.erase(blocks, Erase::ZeroKeep).await,
            17 => self.volume.tidy().await,
            _ => self.flush().await,
        }
    }
}

/// A range of blocks: near one of a few places (the begin, the middle, the end), mostly short, sometimes of whole clusters.
pub fn random_blocks(rng: &mut fastrand::Rng, disk: u64) -> Range<u64> {
    let anchors = [0, (disk / 3) & !255, (disk / 2) & !127, disk.saturating_sub(256)];
    let anchor = anchors[rng.usize(..anchors.len())];
    let (start, len) = match rng.u8(..4) {
        0 => (anchor + (rng.u64(..4) * 128), 128),
        1 => (anchor + rng.u64(..256), rng.u64(1..=160)),
        _ => (anchor + rng.u64(..256), rng.u64(1..=16)),
    };
    let start = start.min(disk - 1);
    start..(start + len).min(disk)
}
