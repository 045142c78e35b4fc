//! qcow, version 1: the images of the first QEMU, and of blktap with its extended header.
//!
//! ```text
//!  header ─▶ L1 table ─▶ L2 tables ─▶ clusters of the disk, whole or compressed
//! ```
//! | file | what |
//! |---|---|
//! | `header`, `entry` | what lies in the file: pure codecs with their checks |
//! | `image` | an opened image |
//! | `create`, `check` | offline work |
//!
//! Source: QEMU's block/qcow.c and blktap's block-qcow.c for the layout; there is no specification.
//!
//! The format has no list of what is in use, and no way to call a cluster zero. So new places come from the end of the file
//! (`tail`), zeroes are written into the places that are there, a compressed cluster that was replaced stays in the file until
//! it is converted, and no look-up can see that two entries have one place, or that an entry of a crashed writer points to where
//! the file was to grow: a check does, and every image should have one that another program has not closed.
//!
//! Over a backing file QEMU and blktap do not copy what is around a write into a new cluster. We do; but an overlay that they shall
//! write to, too, must have clusters of 512 bytes, which is what `create` makes.
//!
//! The AES of encrypted images is weak ([`crate::crypt::legacy`]): they are read and written, and none are made.
//!
//! Refused by name: writing on a block device, which has no end to grow at; a smaller size.

use std::rc::Rc;

use crate::crypt::{PayloadCipher, Secret, legacy, options};
use crate::driver::{
    Create, Description, Driver, Encoding, Erase, Erased, Extent, Findings, Format, Link, Open, Plan, Repair,
    Space, Usage,
};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile, Pending};

mod check;
mod create;
mod entry;
mod header;
mod image;
#[cfg(test)]
mod tests;

use header::Header;
use image::Image;

/// The format.
#[derive(Debug)]
pub struct Qcow;

impl Format for Qcow {
    fn name(&self) -> &'static str {
        "qcow"
    }

    fn recognises(&self, head: &[u8], _tail: &[u8]) -> bool {
        head.starts_with(&header::MAGIC.to_be_bytes()) && head.get(4..8) == Some(&[0, 0, 0, 1])
    }

    fn describe(&self, file: Rc<dyn ImageFile>) -> Pending<'_, Description> {
        Box::pin(describe(file))
    }

    fn unlock<'a>(&'a self, file: Rc<dyn ImageFile>, passphrase: &'a Secret) -> Pending<'a, Secret> {
        Box::pin(async move {
            match Header::read(&file).await?.aes {
                true => legacy::unlock(passphrase),
                false => Err(Error::invalid(format!("{} is not encrypted: take its key away", file.name()))),
            }
        })
    }

    fn open(&self, open: Open) -> Pending<'_, Rc<dyn Driver>> {
        Box::pin(async { open_image(open).await.map(|image| Rc::new(image) as Rc<dyn Driver>) })
    }

    fn create<'a>(
        &'a self,
        file: Rc<dyn ImageFile>,
        _data_files: Vec<Rc<dyn ImageFile>>,
        create: &'a Create,
    ) -> Pending<'a, ()> {
        Box::pin(create::create(file, create))
    }

    fn check(&self, open: Open, repair: Option<Repair>) -> Pending<'_, Findings> {
        Box::pin(check::check(open, repair))
    }

    fn space(&self, create: &Create) -> Result<Space, Error> {
        create::space(create)
    }

    fn set_backing(&self, file: Rc<dyn ImageFile>, backing: Option<(Link, u64)>) -> Pending<'_, ()> {
        Box::pin(create::set_backing(file, backing))
    }
}

async fn describe(file: Rc<dyn ImageFile>) -> Result<Description, Error> {
    let header = Header::read(&file).await?;
    let backing = match &header.backing {
        None => None,
        Some((path, format)) => {
            let path = crate::qcow2::plain_path(file.name(), "backing file", path)?;
            Some(Link { paths: vec![path], format: format.clone(), identity: None })
        }
    };
    let yes = |set: bool| if set { "yes" } else { "no" }.to_owned();
    let mut properties = vec![
        ("cluster_size", header.geometry.cluster().to_string()),
        ("l2_entries", (1u64 << header.geometry.l2_bits).to_string()),
        ("extended_header", yes(header.extension.is_some())),
    ];
    if let Some((_, cluster_alloc, flags)) = header.extension {
        properties.push(("sparse", yes(flags & header::SPARSE != 0)));
        properties.push(("clusters_together", cluster_alloc.to_string()));
        properties.push(("l1_byte_order", if header.swapped() { "little" } else { "big" }.to_owned()));
    }
    let writable = match file.is_device() {
        true => Err("it lies on a block device, which has no end to grow at: convert it".to_owned()),
        false => Ok(()),
    };
    Ok(Description {
        size: header.size,
        backing,
        data_files: Vec::new(),
        identity: None,
        encryption: header.aes.then(legacy::in_words),
        writable,
        properties,
    })
}

async fn open_image(open: Open) -> Result<Image, Error> {
    let Some(file) = open.files.first().cloned() else {
        return Err(Error::invalid("a qcow image needs its file"));
    };
    let name = file.name();
    let header = Header::read(&file).await?;
    if let Some(snapshot) = &open.snapshot {
        return Err(Error::invalid(format!(
            "{name}: a qcow image has no snapshots inside, found {snapshot:?}"
        )));
    }
    if open.writable && (file.is_device() || !file.is_writable()) {
        let message = format!("{name} can be read only: it is a block device, or was opened so");
        return Err(Error::new(ErrorKind::ReadOnly, message));
    }
    if header.backing.is_some() && open.below_size.is_none() {
        return Err(Error::new(ErrorKind::Missing, format!("{name}: its backing file was not opened")));
    }
    let cipher = match (header.aes, &open.key) {
        (false, _) => None,
        (true, Some(key)) => Some(legacy::cipher(key)?),
        (true, None) => return Err(options::key_missing(name)),
    };
    Ok(Image::new(&open, file.clone(), header, cipher))
}

impl Driver for Image {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn granule(&self) -> u64 {
        self.geometry.cluster()
    }

    fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<u64, Error> {
        Image::map(self, offset, len, out)
    }

    fn load(&self, offset: u64, _len: u64) -> Pending<'_, ()> {
        Box::pin(Image::load(self, offset))
    }

    fn plan_write(&self, offset: u64, len: u64) -> Pending<'_, Plan> {
        Box::pin(Image::plan_write(self, offset, len))
    }

    fn commit(&self, plan: Plan) -> Pending<'_, ()> {
        Box::pin(async move { Image::commit(self, &plan).await })
    }

    fn abort(&self, plan: Plan) {
        Image::abort(self, &plan);
    }

    fn abort_at_rest(&self, plan: Plan) {
        Image::abort_at_rest(self, &plan);
    }

    fn erase(&self, range: std::ops::Range<u64>, how: Erase) -> Pending<'_, Erased> {
        Box::pin(Image::erase(self, range, how))
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(self.maps.write_back())
    }

    fn tidy(&self) -> Pending<'_, ()> {
        Box::pin(self.maps.write_back())
    }

    fn write_again(&self) -> Pending<'_, ()> {
        // The header's size is among them; where the L1 table moves to counts only behind a flush that succeeded.
        Box::pin(self.maps.write_again())
    }

    fn resize(&self, size: u64) -> Pending<'_, ()> {
        Box::pin(Image::resize(self, size))
    }

    fn close(&self) -> Pending<'_, ()> {
        Box::pin(Image::close(self))
    }

    fn decode(&self, range: std::ops::Range<u64>) -> Pending<'_, Buf> {
        Box::pin(Image::decode(self, range))
    }

    fn cipher(&self) -> Option<&PayloadCipher> {
        self.cipher.as_ref()
    }

    fn encoding(&self) -> Option<Encoding> {
        Image::encoding(self)
    }

    fn write_encoded(&self, units: Vec<(u64, Vec<u8>)>) -> Pending<'_, ()> {
        Box::pin(Image::write_encoded(self, units))
    }

    fn usage(&self) -> Usage {
        self.maps.usage()
    }
}
