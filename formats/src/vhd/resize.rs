//! Growing dynamic and differencing disks while they are in use. The volume keeps everybody else away meanwhile.
//!
//! The block table must have entries for the new size; images of this program have room for twice the first size at least. Order:
//! what the new part would show is zeroed or hidden, entries are made unused, all of that is durable, then the footers
//! say the new size, the one at the end first. A crash before that leaves the old size.

use std::ops::Range;

use super::bat::{self, UNUSED};
use super::fixed::{check_resize, set_size};
use super::footer::SECTOR;
use super::sparse::{Found, Sparse};
use crate::error::Error;

/// Bytes that are hidden at a time when the parent is larger than the disk.
const HIDE_BYTES: u64 = 64 << 20;

impl Sparse {
    /// Makes the disk larger.
    pub(super) async fn grow(&self, size: u64) -> Result<(), Error> {
        let (name, old) = (self.file.name(), self.size.get());
        check_resize(name, &self.footer.borrow(), self.writable, old, size)?;
        if size == old {
            return Ok(());
        }
        if self.cipher.is_some() {
            let what = "an encrypted VHD cannot grow: convert it into a new image that is larger";
            return Err(Error::unsupported(name, what));
        }
        let (old_blocks, blocks) = (self.shape.blocks(old), self.shape.blocks(size));
        let entries = self.header.borrow().entries.get();
        if blocks > entries {
            let room = u64::from(entries) * self.shape.block;
            return Err(Error::unsupported(
                name,
                format!(
                    "growing to {size} bytes: its block table has room for {room}; convert it into a new image with \
                     -o max_size={size} or more"
                ),
            ));
        }
        self.late.wait().await;
        self.clear_entries(old_blocks..blocks).await?;
        let last = old_blocks.saturating_sub(1);
        let tail = old..size.min(u64::from(old_blocks) * self.shape.block);
        if let (false, Found::At(start)) = (tail.is_empty(), self.look_up(last).await?) {
            let data = self.shape.data_offset(start, tail.start);
            self.late.finish(self.file.zero(data..data + (tail.end - tail.start))).await?;
        }
        {
            let mut full = self.full.borrow_mut();
            full.grow(blocks);
            full.remove(last);
        }
        if let Some(below) = self.below_size {
            self.hide(old..size.min(below)).await?;
        }
        self.tables.write_back().await?;
        self.file.flush().await?;
        set_size(&mut self.footer.borrow_mut(), size);
        self.reserve.rewrite_footers().await?;
        self.size.set(size);
        Ok(())
    }

    /// Makes a range read as zero although the parent has other bytes there.
    async fn hide(&self, range: Range<u64>) -> Result<(), Error> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.next_multiple_of(SECTOR).min(at + HIDE_BYTES);
            self.zero_with_space(at..end).await?;
            at = end;
        }
        Ok(())
    }

    /// Entries behind the end of the disk may hold anything; those that become part of it shall be unused.
    async fn clear_entries(&self, blocks: Range<u32>) -> Result<(), Error> {
        let mut used = Vec::new();
        bat::for_each_piece(&self.file, &self.shape, blocks, |first, entries| {
            let piece = entries.enumerate().filter(|(_, entry)| *entry != UNUSED);
            used.extend(piece.map(|(index, _)| first + index as u32));
        })
        .await?;
        for block in used {
            self.set_entry(block, UNUSED).await?;
        }
        Ok(())
    }
}
