//! Where the tables are that can be found without following one: the header, the snapshot table and the directory of bitmaps name
//! them. None may lie on another; what lies on another is not followed, so that all of them together are read as often as they
//! are in the file: once.

use std::ops::Range;

use super::{Place, Survey};
use crate::driver::Findings;
use crate::error::Error;
use crate::qcow2::bitmap;
use crate::qcow2::header::{self, TablePlace};

/// A table that the header, or a table next to it, names.
#[derive(Debug, Clone)]
pub(super) struct Fixed {
    pub(super) range: Range<u64>,
    /// In words.
    pub(super) name: String,
    pub(super) holds: Holds,
    /// It lies on another one of these: what it refers to is not known.
    pub(super) overlaps: bool,
}

/// What a [`Fixed`] table refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holds {
    /// Nothing, or what is read elsewhere.
    Other,
    /// L2 tables of the active state, or of a snapshot.
    L1 { active: bool },
    /// Bits of a bitmap.
    Bitmap,
}

impl Survey<'_> {
    /// Notes the places of all tables that can be found without following one.
    pub(super) async fn collect_places(&mut self) -> Result<(), Error> {
        let header = self.header;
        self.note_fixed(0, self.geometry().cluster(), "the header".into(), Holds::Other);
        let table = header.reftable;
        self.note_fixed(table.offset, table.entries * 8, "the refcount table".into(), Holds::Other);
        let bytes = self.snapshots.bytes;
        self.note_fixed(header.snapshots_offset, bytes, "the snapshot table".into(), Holds::Other);
        if let Some(area) = header.luks_area() {
            self.note_fixed(area.start, area.end - area.start, "the LUKS header".into(), Holds::Other);
        }
        self.note_l1(header.l1, "the active L1 table".into(), true);
        for one in &self.snapshots.snapshots {
            self.note_l1(one.l1, format!("the L1 table of snapshot {}", shown(&one.name)), false);
        }
        for l1 in self.extra.clone() {
            self.note_l1(l1, "the new L1 table".into(), false);
        }
        self.collect_bitmaps().await
    }

    fn note_fixed(&mut self, offset: u64, bytes: u64, name: String, holds: Holds) {
        // All of them were checked to lie in the file.
        let range = offset..offset.saturating_add(bytes);
        self.fixed.push(Fixed { range, name, holds, overlaps: false });
    }

    fn note_l1(&mut self, l1: TablePlace, name: String, active: bool) {
        self.note_fixed(l1.offset, l1.entries * 8, name, Holds::L1 { active });
    }

    /// Notes the places of bitmaps. They count also while they are inconsistent: their clusters are in use.
    async fn collect_bitmaps(&mut self) -> Result<(), Error> {
        let Some(place) = self.header.extensions.bitmaps else { return Ok(()) };
        if self.header.autoclear & header::BITMAPS == 0 {
            self.findings
                .remarks
                .push("its bitmaps are stale: a program that does not know them has written to it".into());
            return Ok(());
        }
        // Checks the place of the directory, and of every table that it names.
        let bitmaps = match bitmap::read(self.file, self.geometry(), place).await {
            Ok(bitmaps) => bitmaps,
            Err(error) => {
                self.blind = true;
                self.damage(error.message);
                return Ok(());
            }
        };
        let directory = "the bitmap directory".into();
        self.note_fixed(place.directory_offset, place.directory_bytes, directory, Holds::Other);
        for one in bitmaps {
            let name = shown(&one.name);
            let bytes = u64::from(one.table_entries) * 8;
            self.note_fixed(one.table, bytes, format!("the table of bitmap {name}"), Holds::Bitmap);
            if one.flags & bitmap::IN_USE != 0 && self.findings.remarks.len() < Findings::LINES_MAX {
                self.findings.remarks.push(format!("bitmap {name} was not saved and is not to be trusted"));
            }
        }
        Ok(())
    }

    /// Finds the tables noted so far that lie on each other. None of those is followed, and nothing is repaired: a repair of one would
    /// damage the other.
    pub(super) fn separate_fixed(&mut self) {
        let mut order: Vec<usize> =
            (0..self.fixed.len()).filter(|index| !self.fixed[*index].range.is_empty()).collect();
        order.sort_unstable_by_key(|index| self.fixed[*index].range.start);
        // The one of those before that reaches furthest.
        let mut before: Option<usize> = None;
        for index in order {
            // Tables own whole clusters.
            let end = |index: usize| self.geometry().round_up(self.fixed[index].range.end);
            if let Some(other) = before.filter(|other| end(*other) > self.fixed[index].range.start) {
                self.fixed[index].overlaps = true;
                self.fixed[other].overlaps = true;
                self.overlap(Place::Fixed(index), Place::Fixed(other));
            }
            let end = |index: usize| self.geometry().round_up(self.fixed[index].range.end);
            if before.is_none_or(|before| end(before) < end(index)) {
                before = Some(index);
            }
        }
    }
}

/// A name that an image gave something, for a message.
fn shown(name: &str) -> String {
    format!("{:?}", name.chars().take(200).collect::<String>())
}
