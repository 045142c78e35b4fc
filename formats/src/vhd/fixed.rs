//! The driver of fixed disks: byte N of the disk is byte N of the file, and the footer follows.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use super::footer::{Footer, SECTOR};
use super::geometry::disk_size;
use super::layout::Layout;
use crate::driver::{Driver, Erase, Erased, Extent, FileIndex, Fill, Place, Plan, Under, Usage};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile, Pending};

/// A fixed disk.
#[derive(Debug)]
pub struct Fixed {
    file: Rc<dyn ImageFile>,
    writable: bool,
    size: Cell<u64>,
    footer: RefCell<Footer>,
    /// Where the footer is.
    footer_at: Cell<u64>,
    /// It was written.
    moved: Cell<bool>,
}

/// The file of the image itself.
const FILE: FileIndex = FileIndex(0);

impl Fixed {
    /// The driver of an image with this layout.
    pub fn new(file: Rc<dyn ImageFile>, layout: Layout, writable: bool) -> Fixed {
        Fixed {
            file,
            writable,
            size: Cell::new(layout.size),
            footer_at: Cell::new(layout.data_end),
            moved: Cell::new(false),
            footer: RefCell::new(layout.footer),
        }
    }

    async fn grow(&self, size: u64) -> Result<(), Error> {
        let name = self.file.name();
        check_resize(name, &self.footer.borrow(), self.writable, self.size.get(), size)?;
        if size == self.size.get() {
            return Ok(());
        }
        self.moved.set(true);
        let (old, new) = (self.footer_at.get(), size.max(self.footer_at.get()));
        let mut footer = self.footer.borrow().clone();
        if self.file.is_device() && size > old {
            let what = format!("the device has room for a disk of {old} bytes");
            return Err(Error::new(ErrorKind::NoSpace, format!("{name}: {what}")));
        }
        if new > old {
            // The old footer becomes a part of the disk, where it must not be seen: there is one with the old size at the new end
            // first, then zeroes at the old place, then one with the new size.
            self.file.write(new, Buf::copy_of(&footer.to_bytes())).await?;
            self.file.flush().await?;
            self.footer_at.set(new);
        }
        self.file.zero(self.size.get()..size.min(old + SECTOR).max(self.size.get())).await?;
        self.file.flush().await?;
        set_size(&mut footer, size);
        self.file.write(new, Buf::copy_of(&footer.to_bytes())).await?;
        self.file.flush().await?;
        *self.footer.borrow_mut() = footer;
        self.size.set(size);
        Ok(())
    }
}

/// Changes the size that a footer says, so that [`disk_size`] gives it back: a creator whose geometry is the size
/// becomes one whose size is exact when no geometry fits.
pub fn set_size(footer: &mut Footer, size: u64) {
    footer.set_size(size);
    if disk_size(footer, u64::MAX) != size {
        footer.creator_app = *b"qem2";
    }
}

/// What every resize of a VHD has to keep.
pub fn check_resize(name: &str, footer: &Footer, writable: bool, old: u64, new: u64) -> Result<(), Error> {
    if !writable {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{name} is opened read-only: it cannot be resized"),
        ));
    }
    if footer.saved_state != 0 {
        let what =
            "it belongs to the saved state of a machine, which must be resumed or discarded before a resize";
        return Err(Error::unsupported(name, what));
    }
    if new < old {
        let what = format!(
            "making a VHD smaller ({old} to {new} bytes): convert what is to be kept into a new image of that size"
        );
        return Err(Error::unsupported(name, what));
    }
    if !new.is_multiple_of(SECTOR) || new > super::header::SIZE_MAX {
        return Err(Error::invalid(format!(
            "{name}: a size of {new} bytes: a VHD has a multiple of 512 bytes up to 2040 GiB"
        )));
    }
    Ok(())
}

impl Driver for Fixed {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn granule(&self) -> u64 {
        SECTOR
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<u64, Error> {
        let place = Place::Data { file: FILE, offset, in_place: self.writable };
        out.push(Extent { start: offset, len, place });
        Ok(len)
    }

    fn load(&self, _offset: u64, _len: u64) -> Pending<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn plan_write(&self, offset: u64, len: u64) -> Pending<'_, Plan> {
        let fill = Fill { range: offset..offset + len, file: FILE, offset, under: Under::Kept };
        Box::pin(std::future::ready(Ok(Plan { id: 0, fills: vec![fill] })))
    }

    fn commit(&self, _plan: Plan) -> Pending<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn abort(&self, _plan: Plan) {}

    fn erase(&self, range: Range<u64>, how: Erase) -> Pending<'_, Erased> {
        Box::pin(async move {
            if how == Erase::ZeroKeep {
                return Ok(Erased::WriteZeroes);
            }
            self.file.zero(range.start..range.end.min(self.size.get())).await?;
            Ok(Erased::Done)
        })
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn tidy(&self) -> Pending<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn write_again(&self) -> Pending<'_, ()> {
        // A resize: its footer, of the size that counts, where it is.
        let footer = Buf::copy_of(&self.footer.borrow().to_bytes());
        if self.writable && self.moved.get() {
            self.file.write(self.footer_at.get(), footer)
        } else {
            Box::pin(std::future::ready(Ok(())))
        }
    }

    fn resize(&self, size: u64) -> Pending<'_, ()> {
        Box::pin(self.grow(size))
    }

    fn close(&self) -> Pending<'_, ()> {
        Box::pin(async move { if self.writable { self.file.flush().await } else { Ok(()) } })
    }

    fn usage(&self) -> Usage {
        Usage::default()
    }
}
