//! The first contents of a RAM disk, loaded by the control side before the disk is served.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::blocks::BLOCK_BYTES;
use super::{RamDisk, RamError, RamErrorKind, RamOutcome};

/// Bytes read at once.
const STEP_BYTES: usize = 1 << 20;

impl RamDisk {
    /// Copies `source` (a regular file or block device) to the start of the disk; what is behind its end reads as zeroes. Blocks of
    /// zeroes and holes of the file take no memory. The disk must be new and not yet served. Blocks: control side only.
    ///
    /// # Errors
    /// `Invalid` when the source is larger than the disk, `NoSpace`, `Io`. The disk then holds a part of the contents and must
    /// not be used.
    pub fn load_initial(&self, source: &File) -> Result<(), RamError> {
        let name = self.name();
        let io = |what: &str, error: &dyn std::fmt::Display| {
            RamError::new(
                RamErrorKind::Io,
                format!("RAM disk {name}: cannot {what} its initial contents: {error}"),
            )
        };
        // Works for block devices too, whose stat has no length.
        let source_bytes = lseek(source, 0, Whence::SeekEnd).map_err(|e| io("size", &e))? as u64;
        if source_bytes > self.size_bytes() {
            return Err(RamError::new(
                RamErrorKind::Invalid,
                format!(
                    "RAM disk {name} has {} bytes, its initial contents have {source_bytes}; give a size of at least that",
                    self.size_bytes()
                ),
            ));
        }
        let mut buffer = vec![0u8; STEP_BYTES];
        let mut at = 0;
        while at < source_bytes {
            at = match lseek(source, at as i64, Whence::SeekData) {
                // Stay on block borders, so that blocks are seen whole below.
                Ok(data) => at.max(data as u64 / BLOCK_BYTES * BLOCK_BYTES),
                Err(Errno::ENXIO) => break,
                Err(_) => at, // a file system or device that does not know holes
            };
            let step = STEP_BYTES.min((source_bytes - at) as usize);
            source.read_exact_at(&mut buffer[..step], at).map_err(|e| io("read", &e))?;
            self.load_blocks(at, &buffer[..step])?;
            at += step as u64;
        }
        Ok(())
    }

    /// Writes those blocks of `bytes` that are not all zeroes.
    fn load_blocks(&self, offset: u64, bytes: &[u8]) -> Result<(), RamError> {
        for (index, block) in bytes.chunks(BLOCK_BYTES as usize).enumerate() {
            if block.iter().all(|&byte| byte == 0) {
                continue;
            }
            match self.write(offset + index as u64 * BLOCK_BYTES, block) {
                RamOutcome::Done => {}
                RamOutcome::NoSpace => return Err(self.load_no_space()),
                other => {
                    let message =
                        format!("RAM disk {}: cannot write its initial contents: {other:?}", self.name());
                    return Err(RamError::new(RamErrorKind::Io, message));
                }
            }
        }
        Ok(())
    }

    fn load_no_space(&self) -> RamError {
        RamError::new(
            RamErrorKind::NoSpace,
            format!(
                "RAM disk {}: no memory left for its initial contents: RAM disks use {} of {} bytes, or the RAM directory's file \
                 system is full",
                self.name(),
                self.budget.used_bytes(),
                self.budget.limit_bytes()
            ),
        )
    }
}
