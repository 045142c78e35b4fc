//! Another parent of a differencing disk, switched by one write of one sector.
//!
//! The dynamic header has two sectors and no copy, so it is not changed where it is. New locators and a new header are written
//! behind the end of the file, and behind them the footer that names the new header: until that footer is whole, the copy at offset
//! 0 counts, and with it the old header. The old header, locators and footer are lost space (some 4 KiB).

use std::rc::Rc;

use zerocopy::FromZeros;
use zerocopy::big_endian::U64;

use super::create::write_locators;
use super::footer::{DiskType, SECTOR};
use super::header::{HEADER_BYTES, Header, LocatorEntry};
use super::layout::Layout;
use crate::driver::Link;
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile};

/// See [`crate::driver::Format::set_backing`].
pub(super) async fn set(file: Rc<dyn ImageFile>, backing: Option<(Link, u64)>) -> Result<(), Error> {
    let name = file.name();
    let layout = Layout::read(&file).await?;
    let refuse = |what: &str| Err(Error::new(ErrorKind::Unsupported, format!("{name}: {what}")));
    let (Some(old), Some((link, _))) = (&layout.header, backing) else {
        return refuse("a differencing VHD cannot do without a parent: convert it to one that has none");
    };
    if layout.disk_type != DiskType::Differencing {
        return refuse("only a differencing VHD has a parent: make one over the new parent");
    }
    if file.is_device() {
        return refuse("on a device there is no room behind its end for another parent's name: convert it");
    }
    if layout.footers.copy.is_err() || layout.footers.differ {
        return refuse("its footer and the copy at its start differ or are damaged: repair it first");
    }
    let mut header = Header { parent_uuid: [0; 16], parent_timestamp: 0.into(), ..old.clone() };
    header.parent_name = [0; 512];
    header.locators = [LocatorEntry::new_zeroed(); 8];
    let start = file.length().next_multiple_of(SECTOR);
    let header_at = write_locators(&file, &mut header, &link, start).await?;
    file.write(header_at, Buf::copy_of(&header.to_bytes())).await?;
    file.flush().await?;
    let mut footer = layout.footer.clone();
    footer.data_offset = U64::new(header_at);
    let footer = footer.to_bytes();
    file.write(header_at + HEADER_BYTES, Buf::copy_of(&footer)).await?;
    file.flush().await?;
    file.write(0, Buf::copy_of(&footer)).await?;
    file.flush().await
}
