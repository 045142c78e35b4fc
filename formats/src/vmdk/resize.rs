//! Making a disk larger while it is in use: its last extent grows. The volume keeps everybody else away meanwhile.
//!
//! Order for a sparse extent: new directories, with tables of zeroes behind the last one, are durable; one write of the header's sector
//! makes them the ones that count; then the descriptor says the new size. A crash before that leaves the old size: what the descriptor
//! says counts, and a header that says more is in order.

use super::descriptor;
use super::header::{DIRECTORY_ENTRIES_MAX, SECTOR};
use super::image::{Image, Kind};
use super::sparse::Sparse;
use crate::driver::Order;
use crate::error::{Error, ErrorKind};
use crate::file::Buf;
use crate::metadata::{Tables, address};

/// Most bytes of an extent of a disk that is split for file systems that can no more.
const SPLIT_BYTES_MAX: u64 = 2 << 30;

impl Image {
    pub(super) async fn grow(&self, size: u64) -> Result<(), Error> {
        let (name, old) = (self.name(), crate::driver::Driver::size(self));
        if !self.writable {
            return Err(Error::new(ErrorKind::ReadOnly, format!("{name} was opened read-only")));
        }
        if size == old {
            return Ok(());
        }
        let refuse = |what: String| Err(Error::unsupported(name, what));
        if size < old {
            return refuse(format!(
                "making a VMDK smaller ({old} to {size} bytes): convert it into a new image of that size"
            ));
        }
        let Some(part) = self.parts.last().filter(|_| size.is_multiple_of(SECTOR)) else {
            return Err(Error::invalid(format!(
                "{name}: a size of {size} bytes: a multiple of 512 is expected"
            )));
        };
        if self.below > old {
            return refuse(
                "growing over a larger parent, whose bytes would come to light: convert it".to_owned(),
            );
        }
        let (bytes, text) = (size - part.start, self.descriptor.borrow().with_last_size(size - part.start));
        let split = self.descriptor.borrow().create_type.to_ascii_lowercase().contains("gbmaxextent");
        if split && bytes > SPLIT_BYTES_MAX {
            return refuse(format!(
                "growing its last extent to {bytes} bytes: it is split into extents of up to 2 GiB; convert it"
            ));
        }
        self.begin_changes().await?;
        self.late.wait().await;
        // Before anything is changed: is it possible?
        descriptor::check(&self.files[0], &self.descriptor_place, &self.descriptor.borrow().text, &text)?;
        match &part.kind {
            Kind::Zero => return refuse("growing an extent of type ZERO".to_owned()),
            Kind::Flat(file, offset) => {
                let shared =
                    self.parts.iter().filter(|other| matches!(other.kind, Kind::Flat(of, _) if of == *file));
                if shared.count() > 1 {
                    return refuse("growing an extent whose file has others".to_owned());
                }
                let file = &self.files[usize::from(file.0)];
                file.extend(offset + bytes).await?;
                let new = offset + (old - part.start)..offset + bytes;
                self.late.finish(file.zero(new)).await?;
                file.flush().await?;
            }
            Kind::Sparse(sparse) => {
                let grain = sparse.shape.grain;
                let tail = old - part.start;
                if !tail.is_multiple_of(grain)
                    && let super::directory::Place::At(at) =
                        sparse.place_of(&self.tables, tail / grain).await?
                {
                    let zeroes = at + tail % grain..at + (bytes - tail / grain * grain).min(grain);
                    self.late.finish(sparse.file.zero(zeroes)).await?;
                }
                sparse.grow(&self.tables, tail, bytes, &self.late).await?;
            }
        }
        let old_text = self.descriptor.borrow().text.clone();
        if !text.is_empty() {
            descriptor::write(&self.files[0], &self.descriptor_place, &old_text, text.clone()).await?;
            self.files[0].flush().await?;
            *self.descriptor.borrow_mut() = descriptor::Descriptor::parse(name, &text)?;
        }
        part.end.set(part.start + bytes);
        Ok(())
    }
}

impl Sparse {
    /// Makes room for `bytes` bytes of the disk, of which `old` are in use. Durable when it is done.
    async fn grow(
        &self,
        tables: &Tables,
        old: u64,
        bytes: u64,
        late: &crate::late::Late,
    ) -> Result<(), Error> {
        let name = self.file.name();
        let shape = &self.shape;
        let grown = super::header::Shape {
            capacity: std::cell::Cell::new(bytes.max(shape.capacity.get())),
            ..shape.clone()
        };
        if shape.cowd || shape.stream || grown.tables() > DIRECTORY_ENTRIES_MAX {
            let what =
                format!("growing this sparse extent to {bytes} bytes: convert the disk into a new image");
            return Err(Error::unsupported(name, what));
        }
        self.mark().await?;
        // Entries behind the end may hold anything; those that become a part of the disk shall say that nothing is there.
        let (first, table_end) = (old.div_ceil(shape.grain), shape.tables() * shape.entries);
        for grain in first..table_end.min(bytes.div_ceil(shape.grain)) {
            if self.entry_addresses(grain)?.is_some() {
                self.set(tables, grain, 0, Order::Anytime).await?;
            }
        }
        tables.write_back().await?;
        self.file.flush().await?;
        let mut directory = self.directory.borrow().clone();
        let added = grown.tables() - shape.tables();
        if added > 0 {
            let copies = if shape.redundant.get().is_some() { 2 } else { 1 };
            let directory_bytes = grown.directory_bytes();
            let len =
                (copies * (directory_bytes + added * shape.table_bytes())).next_multiple_of(shape.grain);
            let place = self.take_clean(tables, len).await?;
            self.note_used(place + len);
            tables.forget(address(self.tables_file, place)..address(self.tables_file, place + len));
            let mut at = place + copies * directory_bytes;
            for (copy, list) in
                [&mut directory.first, &mut directory.copy].into_iter().take(copies as usize).enumerate()
            {
                for _ in 0..added {
                    list.push((at / SECTOR) as u32);
                    at += shape.table_bytes();
                }
                let start = place + copy as u64 * directory_bytes;
                let entries: Vec<u8> = list.iter().flat_map(|sector| sector.to_le_bytes()).collect();
                self.file.write(start, Buf::copy_of(&entries)).await?;
                if copy == 0 { grown.directory.set(start) } else { grown.redundant.set(Some(start)) }
            }
            self.file.flush().await?;
        }
        let mut header = self.file.read(0, SECTOR as usize).await?;
        let numbers = [
            (12, grown.capacity.get()),
            (48, grown.redundant.get().unwrap_or(0)),
            (56, grown.directory.get()),
        ];
        for (at, number) in numbers.into_iter().filter(|(at, _)| *at != 48 || grown.redundant.get().is_some())
        {
            header[at..at + 8].copy_from_slice(&(number / SECTOR).to_le_bytes());
        }
        late.finish(self.file.write(0, header)).await?;
        self.file.flush().await?;
        shape.capacity.set(grown.capacity.get());
        shape.directory.set(grown.directory.get());
        shape.redundant.set(grown.redundant.get());
        *self.directory.borrow_mut() = directory;
        Ok(())
    }
}
