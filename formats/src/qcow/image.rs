//! An opened image: look-ups, plans, erases, sizes.
//!
//! | what is there | fill of a write | order of the entry |
//! |---|---|---|
//! | cluster | in place | none |
//! | nothing, nothing below | new cluster, `Kept` | any time: both read as zero |
//! | nothing, bytes below | new cluster, `Below` | after data |
//! | nothing, nothing below, in an encrypted image | new cluster, `Zeroes`: a place that reads as zero does not decrypt to it | after data |
//! | compressed cluster | new cluster, `Decoded`; its bytes stay in the file, which the format cannot help | after data |

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use super::entry::Entry;
use super::header::{self, Geometry, Header};
use crate::codec::{Decoded, Method};
use crate::crypt::{PayloadCipher, Spot};
use crate::driver::{
    Encoding, Erase, Erased, Extent, FileIndex, Fill, Order, Place, Plan, Under, push_extent,
};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile};
use crate::late::Late;
use crate::metadata::{SLICE_BYTES, Tables};
use crate::tail::Tail;
use crate::unsettled::Unsettled;

/// The image's own file.
const FILE: FileIndex = FileIndex(0);

/// A cluster of the disk that gets a place.
#[derive(Debug)]
struct Piece {
    guest: u64,
    table: u64,
    place: u64,
    order: Order,
}

/// See the module.
pub(super) struct Image {
    pub file: Rc<dyn ImageFile>,
    pub geometry: Geometry,
    pub header: Header,
    /// How clusters that are not compressed are encrypted.
    pub cipher: Option<PayloadCipher>,
    pub writable: bool,
    /// Bytes of the layer below; 0: there is none.
    pub below: u64,
    /// Bytes of the disk.
    pub size: Cell<u64>,
    /// Offset of the L1 table, and whether it is little-endian.
    l1: Cell<(u64, bool)>,
    pub maps: Rc<Tables>,
    decoded: Rc<Decoded>,
    late: Late,
    pub tail: Tail,
    unsettled: Unsettled,
    plans: RefCell<HashMap<u64, Vec<Piece>, foldhash::fast::FixedState>>,
    next_plan: Cell<u64>,
    /// Held by who adds L2 tables or moves the L1 table.
    tables_turn: async_lock::Mutex<()>,
    changed: Cell<bool>,
}

/// Places of a plan in the making, or of a commit: what is left of them goes back when this is dropped.
struct Draft<'a> {
    image: &'a Image,
    pieces: Vec<Piece>,
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        // Of the others a whole cluster may be on the way, also with bytes that no request has.
        for piece in self.pieces.iter().filter(|piece| piece.order == Order::Anytime) {
            self.image.tail.abandon(piece.guest, piece.place);
        }
    }
}

impl Image {
    pub fn new(
        open: &crate::driver::Open,
        file: Rc<dyn ImageFile>,
        header: Header,
        cipher: Option<PayloadCipher>,
    ) -> Image {
        let geometry = header.geometry;
        // Tables begin at multiples of a cluster, with the guest's data before and behind them.
        let slice = SLICE_BYTES.min(geometry.cluster() as usize);
        let data = vec![file.clone()];
        Image {
            maps: Tables::new(file.clone(), FILE, data, slice, &open.budget, open.log.clone()),
            decoded: Decoded::new(&open.budget),
            tail: Tail::new(file.clone(), geometry.cluster()),
            geometry,
            cipher,
            writable: open.writable,
            below: open.below_size.unwrap_or(0),
            size: Cell::new(header.size),
            l1: Cell::new((header.l1, header.swapped())),
            late: Late::default(),
            unsettled: Unsettled::default(),
            plans: RefCell::default(),
            next_plan: Cell::new(1),
            tables_turn: async_lock::Mutex::new(()),
            changed: Cell::new(false),
            header,
            file,
        }
    }

    fn damaged(&self, what: &str, guest: u64, why: &str) -> Error {
        let advice = "run a check; other ranges are served";
        Error::corrupt(
            self.file.name(),
            format!("the {what} entry for offset {guest} of the disk {why}: {advice}"),
        )
    }

    /// Bytes that hold metadata whose place the header names.
    fn is_fixed(&self, offset: u64) -> bool {
        let l1 = self.l1.get().0;
        let l1 = l1..l1 + self.geometry.l1_entries(self.size.get()) * 8;
        offset < header::BYTES as u64 || l1.contains(&offset) || self.header.name.contains(&offset)
    }

    fn l1_at(&self, guest: u64) -> u64 {
        self.l1.get().0 + guest / self.geometry.l2_covers() * 8
    }

    /// Offset of the L2 table for an offset on the disk, 0 for none, if that is in memory.
    fn table(&self, guest: u64) -> Option<Result<u64, Error>> {
        let word = self.maps.get_u64(self.l1_at(guest))?;
        let table = if self.l1.get().1 { word.swap_bytes() } else { word };
        if table == 0 {
            return Some(Ok(0));
        }
        let end = table.checked_add(self.geometry.l2_bytes());
        let sound = table.is_multiple_of(self.geometry.cluster())
            && end.is_some_and(|end| end <= self.file.length().next_multiple_of(self.geometry.cluster()))
            && !self.is_fixed(table);
        Some(if sound { Ok(table) } else { Err(self.damaged("L1", guest, "names no place of a table")) })
    }

    async fn load_table(&self, guest: u64) -> Result<u64, Error> {
        loop {
            match self.table(guest) {
                Some(table) => return table,
                None => self.maps.load(self.l1_at(guest)).await?,
            }
        }
    }

    fn entry_at(&self, table: u64, guest: u64) -> u64 {
        table + ((guest % self.geometry.l2_covers()) >> self.geometry.cluster_bits) * 8
    }

    /// Checks an entry: its place is in the file, and on no metadata that we know of.
    fn checked(&self, word: u64, table: u64, guest: u64, length: u64) -> Result<Entry, Error> {
        let entry =
            Entry::decode(&self.geometry, word, length).map_err(|why| self.damaged("L2", guest, why))?;
        let own = table..table + self.geometry.l2_bytes();
        match entry {
            Entry::Data(at) | Entry::Compressed { offset: at, .. }
                if self.is_fixed(at) || own.contains(&at) =>
            {
                Err(self.damaged("L2", guest, "points to metadata"))
            }
            entry => Ok(entry),
        }
    }

    async fn load_entry(&self, table: u64, guest: u64) -> Result<Entry, Error> {
        let at = self.entry_at(table, guest);
        loop {
            match self.maps.get_u64(at) {
                Some(word) => return self.checked(word, table, guest, self.file.length()),
                None => self.maps.load(at).await?,
            }
        }
    }

    /// The entry of a cluster of the disk.
    async fn find(&self, guest: u64) -> Result<Entry, Error> {
        match self.load_table(guest).await? {
            0 => Ok(Entry::Absent),
            table => self.load_entry(table, guest).await,
        }
    }

    /// Starts of the clusters of a range of the disk.
    fn clusters(&self, range: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
        let cluster = self.geometry.cluster();
        (range.start & !(cluster - 1)..range.end).step_by(cluster as usize)
    }

    /// See [`crate::driver::Driver::map`].
    pub fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<u64, Error> {
        let (own, stop, length) = (out.len(), offset + len, self.file.length());
        let slice = SLICE_BYTES.min(self.geometry.cluster() as usize) as u64;
        let mut at = offset;
        while at < stop {
            let covers = self.geometry.l2_covers();
            let end = stop.min((at / covers + 1) * covers);
            let table = match self.table(at) {
                Some(Ok(0)) => {
                    push_extent(out, own, at, end - at, Place::Absent);
                    at = end;
                    continue;
                }
                Some(Ok(table)) => table,
                Some(Err(error)) if at == offset => return Err(error),
                Some(Err(_)) | None => break,
            };
            let entry_at = self.entry_at(table, at);
            let first = at & !(self.geometry.cluster() - 1);
            let entries =
                ((slice - entry_at % slice) / 8).min((end - first).div_ceil(self.geometry.cluster()));
            let walked = self.maps.get(entry_at, entries as usize * 8, |bytes| {
                for word in bytes.chunks_exact(8) {
                    let guest = at & !(self.geometry.cluster() - 1);
                    let to = end.min(guest + self.geometry.cluster());
                    let word = word.try_into().map(u64::from_be_bytes).unwrap_or_default();
                    let place = match self.checked(word, table, guest, length)? {
                        Entry::Absent => Place::Absent,
                        Entry::Compressed { .. } => Place::Encoded,
                        Entry::Data(host) => {
                            let settled = !self.unsettled.has(guest) && self.late.is_empty();
                            let in_place = self.writable && settled;
                            Place::Data { file: FILE, offset: host + (at - guest), in_place }
                        }
                    };
                    push_extent(out, own, at, to - at, place);
                    at = to;
                }
                Ok(())
            });
            match walked {
                Some(Ok(())) => {}
                Some(Err(error)) if at == offset => return Err(error),
                Some(Err(_)) | None => break,
            }
        }
        Ok(at - offset)
    }

    /// See [`crate::driver::Driver::load`].
    pub async fn load(&self, offset: u64) -> Result<(), Error> {
        match self.load_table(offset).await? {
            0 => Ok(()),
            table => self.maps.load(self.entry_at(table, offset)).await,
        }
    }

    /// To be called before every change. Before the first one, what blktap's extension says is made true of what we do: it takes
    /// all clusters of a table for neighbours where that is noted, and older images have their L1 table in another order.
    async fn begin_changes(&self) -> Result<(), Error> {
        if !self.writable {
            let message = format!("{} was opened read-only", self.file.name());
            return Err(Error::new(ErrorKind::ReadOnly, message));
        }
        self.late.wait().await;
        if self.changed.get() {
            return Ok(());
        }
        let _turn = self.tables_turn.lock().await;
        if let (Some((_, _, flags)), false) = (self.header.extension, self.changed.get()) {
            if self.l1.get().1 {
                self.move_l1(self.size.get(), flags | header::L1_BIG_ENDIAN).await?;
            }
            self.maps.update(56, &1u32.to_be_bytes(), Order::Anytime).await?;
            self.maps.write_back().await?;
            self.file.flush().await?;
        }
        self.changed.set(true);
        Ok(())
    }

    /// Writes the L1 table, with room for `size` bytes, at the end of the file and lets the header point to it, all in one sector. The
    /// caller holds `tables_turn`.
    async fn move_l1(&self, size: u64, flags: u32) -> Result<(), Error> {
        let (old, swapped) = self.l1.get();
        let old_bytes = (self.geometry.l1_entries(self.size.get()) * 8) as usize;
        let bytes = self.geometry.l1_entries(size) * 8;
        self.maps.write_back().await?;
        let mut table = self.file.read(old, old_bytes).await?.to_vec();
        if swapped {
            table.chunks_exact_mut(8).for_each(<[u8]>::reverse);
        }
        let place = self.tail.take(bytes, 4096).await?;
        self.maps.forget(place..place + bytes.next_multiple_of(SLICE_BYTES as u64));
        self.file.write(place, Buf::copy_of(&table)).await?;
        self.file.flush().await?;
        self.tail.note_used(place + bytes);
        let mut sector = self.file.read(0, header::BYTES).await?;
        sector[24..32].copy_from_slice(&size.to_be_bytes());
        sector[40..48].copy_from_slice(&place.to_be_bytes());
        if self.header.extension.is_some() {
            sector[60..64].copy_from_slice(&flags.to_be_bytes());
        }
        // Where the L1 table is right behind the header they share a slice.
        self.maps.update(0, &sector, Order::Anytime).await?;
        // Before anything waits: what was noted is carried out, by us or from the log.
        self.l1.set((place, false));
        self.maps.write_back().await?;
        self.file.flush().await
    }

    /// Offset of the L2 table for an offset on the disk; makes one if need be.
    async fn own_table(&self, guest: u64) -> Result<u64, Error> {
        let table = self.load_table(guest).await?;
        if table != 0 {
            return Ok(table);
        }
        let _turn = self.tables_turn.lock().await;
        let table = self.load_table(guest).await?;
        if table != 0 {
            return Ok(table);
        }
        let bytes = self.geometry.l2_bytes();
        let table = self.tail.take(bytes, self.geometry.cluster()).await?;
        self.maps.forget(table..table + bytes);
        // All of it reads as zero, durably.
        self.tail.note_used(table + bytes);
        self.maps.update(self.l1_at(guest), &table.to_be_bytes(), Order::Anytime).await?;
        Ok(table)
    }

    /// See [`crate::driver::Driver::plan_write`].
    pub async fn plan_write(&self, offset: u64, len: u64) -> Result<Plan, Error> {
        self.begin_changes().await?;
        let cluster = self.geometry.cluster();
        let mut draft = Draft { image: self, pieces: Vec::new() };
        let mut fills: Vec<Fill> = Vec::new();
        for guest in self.clusters(&(offset..offset + len)) {
            let table = self.own_table(guest).await?;
            let (under, order) = match self.load_entry(table, guest).await? {
                Entry::Data(place) => {
                    fills.push(Fill {
                        range: guest..guest + cluster,
                        file: FILE,
                        offset: place,
                        under: Under::Kept,
                    });
                    continue;
                }
                Entry::Absent if guest < self.below => (Under::Below, Order::AfterData),
                Entry::Absent if self.cipher.is_some() => (Under::Zeroes, Order::AfterData),
                Entry::Absent => (Under::Kept, Order::Anytime),
                Entry::Compressed { .. } => (Under::Decoded, Order::AfterData),
            };
            let place = match self.tail.take_again(&self.late, guest, cluster).await? {
                Some(place) => place,
                None => self.tail.take(cluster, cluster).await?,
            };
            draft.pieces.push(Piece { guest, table, place, order });
            fills.push(Fill { range: guest..guest + cluster, file: FILE, offset: place, under });
        }
        let id = self.next_plan.get();
        self.next_plan.set(id + 1);
        self.plans.borrow_mut().insert(id, std::mem::take(&mut draft.pieces));
        Ok(Plan { id, fills: joined(fills) })
    }

    /// See [`crate::driver::Driver::abort`].
    pub fn abort(&self, plan: &Plan) {
        let pieces = self.plans.borrow_mut().remove(&plan.id).unwrap_or_default();
        drop(Draft { image: self, pieces });
    }

    /// See [`crate::driver::Driver::abort_at_rest`].
    pub fn abort_at_rest(&self, plan: &Plan) {
        let pieces = self.plans.borrow_mut().remove(&plan.id).unwrap_or_default();
        for piece in pieces {
            self.tail.abandon(piece.guest, piece.place);
        }
    }

    /// See [`crate::driver::Driver::commit`].
    pub async fn commit(&self, plan: &Plan) -> Result<(), Error> {
        let Some(pieces) = self.plans.borrow_mut().remove(&plan.id) else {
            return Err(Error::invalid(format!("{}: there is no plan {}", self.file.name(), plan.id)));
        };
        let unsettled = self.unsettled.begin(pieces.iter().map(|piece| piece.guest).collect());
        let mut left = Draft { image: self, pieces };
        while let Some(piece) = left.pieces.last() {
            let word = Entry::Data(piece.place).encode(&self.geometry);
            self.maps
                .update(self.entry_at(piece.table, piece.guest), &word.to_be_bytes(), piece.order)
                .await?;
            self.tail.note_used(piece.place + self.geometry.cluster());
            left.pieces.pop();
        }
        self.maps.settle().await?;
        unsettled.settled();
        Ok(())
    }

    /// See [`crate::driver::Driver::erase`]. The format has no way to call a cluster zero: the bytes of those that are there are
    /// zeroed in their places, which gives their space back to the store.
    pub async fn erase(&self, range: Range<u64>, how: Erase) -> Result<Erased, Error> {
        self.begin_changes().await?;
        // Zeroes in a place do not read as zero when they are decrypted.
        if how == Erase::ZeroKeep || self.cipher.is_some() {
            return Ok(Erased::WriteZeroes);
        }
        let cluster = self.geometry.cluster();
        let mut zeroed: Vec<Range<u64>> = Vec::new();
        for guest in self.clusters(&range) {
            match self.find(guest).await? {
                Entry::Data(place) => {
                    let bytes = place..place + (range.end - guest).min(cluster);
                    match zeroed.last_mut() {
                        Some(last) if last.end == bytes.start => last.end = bytes.end,
                        _ => zeroed.push(bytes),
                    }
                }
                Entry::Absent if guest >= self.below => {}
                _ if how == Erase::Discard => {}
                _ => return Ok(Erased::WriteZeroes),
            }
        }
        for bytes in zeroed {
            self.late.finish(self.file.zero(bytes)).await?;
        }
        Ok(Erased::Done)
    }

    /// See [`crate::driver::Driver::resize`].
    pub async fn resize(&self, size: u64) -> Result<(), Error> {
        let old = self.size.get();
        let refuse = |what: String| Err(Error::unsupported(self.file.name(), what));
        if size == old {
            return Ok(());
        }
        if size < old {
            return refuse(format!(
                "a disk of {old} bytes cannot be made smaller in this format: convert a part of it with `image dd`"
            ));
        }
        if !size.is_multiple_of(512) || self.geometry.l1_entries(size) * 8 > header::L1_MAX_BYTES {
            let most = header::L1_MAX_BYTES / 8 * self.geometry.l2_covers();
            let name = self.file.name();
            return Err(Error::invalid(format!(
                "{name}: take a multiple of 512 up to {most} instead of {size} bytes"
            )));
        }
        if self.below > old {
            return refuse(
                "its parent is longer than the disk, and the format has no way to hide what is there".into(),
            );
        }
        self.begin_changes().await?;
        self.clear_behind(old).await?;
        let _turn = self.tables_turn.lock().await;
        if self.geometry.l1_entries(size) > self.geometry.l1_entries(old) {
            self.move_l1(
                size,
                self.header.extension.map_or(0, |(_, _, flags)| flags | header::L1_BIG_ENDIAN),
            )
            .await?;
        } else {
            self.maps.update(24, &size.to_be_bytes(), Order::Anytime).await?;
            self.maps.write_back().await?;
            self.file.flush().await?;
        }
        self.size.set(size);
        Ok(())
    }

    /// Makes what the last table maps behind the end of the disk read as zero.
    async fn clear_behind(&self, old: u64) -> Result<(), Error> {
        let cluster = self.geometry.cluster();
        let covered = old.next_multiple_of(self.geometry.l2_covers());
        if covered == old || self.load_table(old).await? == 0 {
            return Ok(());
        }
        for guest in self.clusters(&(old..covered)) {
            let kept = old.saturating_sub(guest).min(cluster) as usize;
            match self.find(guest).await? {
                Entry::Absent => {}
                Entry::Data(place) => {
                    let spot = Spot { disk: guest, file: place }.after(kept as u64);
                    self.late.finish(self.clear(spot, cluster - kept as u64)).await?;
                }
                entry @ Entry::Compressed { .. } => {
                    let mut bytes = Buf::copy_of(&self.decode_cluster(entry, guest).await?);
                    if bytes[kept..].iter().any(|byte| *byte != 0) {
                        bytes[kept..].fill(0);
                        self.replace(guest, bytes).await?;
                    }
                }
            }
        }
        self.maps.write_back().await?;
        self.file.flush().await
    }

    /// Makes a part of a cluster read as zero.
    fn clear(&self, spot: Spot, len: u64) -> crate::file::Pending<'static, ()> {
        match &self.cipher {
            None => self.file.zero(spot.file..spot.file + len),
            Some(cipher) => {
                let mut zeroes = Buf::zeroed(len as usize);
                cipher.encrypt(spot, &mut zeroes);
                self.file.write(spot.file, zeroes)
            }
        }
    }

    /// Gives a cluster a new place with these bytes.
    async fn replace(&self, guest: u64, mut bytes: Buf) -> Result<(), Error> {
        let plan = self.plan_write(guest, self.geometry.cluster()).await?;
        let written = match plan.fills.first() {
            Some(fill) => {
                if let Some(cipher) = &self.cipher {
                    cipher.encrypt(Spot { disk: guest, file: fill.offset }, &mut bytes);
                }
                self.file.write(fill.offset, bytes).await
            }
            None => Ok(()),
        };
        match written {
            Ok(()) => self.commit(&plan).await,
            Err(error) => {
                self.abort(&plan);
                Err(error)
            }
        }
    }

    async fn decode_cluster(&self, entry: Entry, guest: u64) -> Result<Rc<[u8]>, Error> {
        let Entry::Compressed { offset, len } = entry else {
            return Err(Error::invalid(format!("nothing at {guest} is encoded")));
        };
        let damaged = |why| {
            let what =
                format!("the compressed cluster for offset {guest} of the disk ({len} bytes at {offset})");
            Error::corrupt(self.file.name(), format!("{what}: {why}; other ranges are served"))
        };
        let read = || self.file.read(offset, len as usize);
        let cluster = self.geometry.cluster() as usize;
        self.decoded.get(offset, Method::Deflate, cluster, read, damaged).await
    }

    /// See [`crate::driver::Driver::decode`].
    pub async fn decode(&self, range: Range<u64>) -> Result<Buf, Error> {
        let cluster = self.geometry.cluster();
        let guest = range.start & !(cluster - 1);
        let end = range.end.min(guest + cluster);
        let bytes = self.decode_cluster(self.find(guest).await?, guest).await?;
        Ok(Buf::copy_of(&bytes[(range.start - guest) as usize..(end - guest) as usize]))
    }

    /// See [`crate::driver::Driver::encoding`].
    pub fn encoding(&self) -> Option<Encoding> {
        let unit = self.geometry.cluster();
        // Compressed clusters are never encrypted.
        (self.writable && self.cipher.is_none()).then_some(Encoding {
            method: Method::Deflate,
            unit,
            encoded_max: unit as usize - 1,
        })
    }

    /// See [`crate::driver::Driver::write_encoded`].
    pub async fn write_encoded(&self, units: Vec<(u64, Vec<u8>)>) -> Result<(), Error> {
        self.begin_changes().await?;
        let total: u64 = units.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let place = self.tail.take(total, self.geometry.cluster()).await?;
        let mut run = Vec::with_capacity(total as usize);
        let mut entries = Vec::with_capacity(units.len());
        for (guest, bytes) in &units {
            let entry = Entry::Compressed { offset: place + run.len() as u64, len: bytes.len() as u64 };
            if bytes.is_empty()
                || bytes.len() as u64 >= self.geometry.cluster()
                || !entry.fits(&self.geometry)
            {
                let message = format!(
                    "{}: {} bytes for offset {guest} do not fit an entry",
                    self.file.name(),
                    bytes.len()
                );
                return Err(Error::invalid(message));
            }
            entries.push((self.own_table(*guest).await?, *guest, entry));
            run.extend_from_slice(bytes);
        }
        self.file.write(place, Buf::copy_of(&run)).await?;
        self.tail.note_used(place + total);
        for (table, guest, entry) in entries {
            let word = entry.encode(&self.geometry);
            self.maps.update(self.entry_at(table, guest), &word.to_be_bytes(), Order::AfterData).await?;
        }
        self.maps.settle().await
    }

    /// See [`crate::driver::Driver::close`].
    pub async fn close(&self) -> Result<(), Error> {
        if !self.writable {
            return Ok(());
        }
        let lost: Vec<u64> = self.plans.borrow().keys().copied().collect();
        lost.into_iter().for_each(|id| self.abort(&Plan { id, fills: Vec::new() }));
        self.late.wait().await;
        self.maps.write_back().await?;
        if self.header.extension.is_some() && self.changed.get() {
            let bytes = self.geometry.l1_entries(self.size.get()) * 8;
            let table = self.file.read(self.l1.get().0, bytes as usize).await?;
            self.maps.update(52, &header::checksum(&table).to_be_bytes(), Order::Anytime).await?;
            self.maps.write_back().await?;
        }
        self.file.flush().await?;
        self.tail.close().await?;
        self.file.flush().await
    }
}

/// Fills that continue each other as one.
fn joined(fills: Vec<Fill>) -> Vec<Fill> {
    let mut out: Vec<Fill> = Vec::with_capacity(fills.len());
    for fill in fills {
        match out.last_mut() {
            Some(last)
                if last.under == fill.under
                    && last.offset + (last.range.end - last.range.start) == fill.offset =>
            {
                last.range.end = fill.range.end;
            }
            _ => out.push(fill),
        }
    }
    out
}
