//! qcow2, versions 2 and 3.
//!
//! ```text
//!  header ─▶ L1 table ─▶ L2 tables ─▶ clusters of the disk          header ─▶ refcount table ─▶ refcount blocks
//!     └────▶ snapshot table ─▶ an L1 table each                        └────▶ bitmap directory ─▶ bitmaps
//! ```
//! | file | what |
//! |---|---|
//! | `header`, `extensions`, `l1`, `l2`, `refcount`, `snapshot`, `bitmap` | what lies in the file: pure codecs with their checks |
//! | `image` | an opened image: look-ups, map, the first change |
//! | `clusters`, `growth` | free clusters, the reserve, refcounts while the image is in use |
//! | `plan`, `erase`, `resize` | changes |
//! | `encoded` | compressed clusters |
//! | `crypt` | encrypted payload |
//! | `driver` | the interface |
//! | `create`, `check`, `repair`, `snapshots` | offline work |
//!
//! Invariants: a cluster that any table in the file refers to has a durable refcount that is not too low; a mapping in the file
//! refers to bytes that are durable or read as zero durably. Order is kept by `clusters` (flush ahead) and by
//! [`crate::metadata::Tables`] (payload before mapping).
//!
//! Refused by name: unknown incompatible features.

use std::rc::Rc;

use crate::crypt::Secret;
use crate::driver::{
    Create, Description, Driver, Findings, Format, Link, Open, Repair, SnapshotChange, Space,
};
use crate::error::Error;
use crate::file::{ImageFile, Pending};

mod backing;
mod bitmap;
mod check;
mod clusters;
mod create;
mod crypt;
mod driver;
mod encoded;
mod erase;
mod extensions;
mod growth;
mod header;
mod image;
mod l1;
mod l2;
mod plan;
mod refcount;
mod repair;
mod resize;
mod snapshot;
mod snapshots;
#[cfg(test)]
pub(crate) mod tests;

pub use resize::shrink;
pub use snapshot::Snapshot;
pub use snapshots::{apply_snapshot, create_snapshot, delete_snapshot, list_snapshots};

use header::Header;

/// The format.
#[derive(Debug)]
pub struct Qcow2;

impl Format for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn has_snapshots(&self) -> bool {
        true
    }

    fn recognises(&self, head: &[u8], _tail: &[u8]) -> bool {
        // Version 1 has the same magic number and is another format.
        head.starts_with(&header::MAGIC.to_be_bytes()) && matches!(head.get(4..8), Some([0, 0, 0, 2 | 3]))
    }

    fn describe(&self, file: Rc<dyn ImageFile>) -> Pending<'_, Description> {
        Box::pin(describe(file))
    }

    fn unlock<'a>(&'a self, file: Rc<dyn ImageFile>, passphrase: &'a Secret) -> Pending<'a, Secret> {
        Box::pin(crypt::unlock(file, passphrase))
    }

    fn open(&self, open: Open) -> Pending<'_, Rc<dyn Driver>> {
        Box::pin(async { driver::open(open).await.map(|driver| driver as Rc<dyn Driver>) })
    }

    fn create<'a>(
        &'a self,
        file: Rc<dyn ImageFile>,
        data_files: Vec<Rc<dyn ImageFile>>,
        create: &'a Create,
    ) -> Pending<'a, ()> {
        Box::pin(create::create(file, data_files, create))
    }

    fn check(&self, open: Open, repair: Option<Repair>) -> Pending<'_, Findings> {
        Box::pin(repair::check(open, repair))
    }

    fn data_files(&self, create: &Create) -> Result<Vec<String>, Error> {
        create::data_files(create)
    }

    fn space(&self, create: &Create) -> Result<Space, Error> {
        create::space(create)
    }

    fn set_backing(&self, file: Rc<dyn ImageFile>, backing: Option<(Link, u64)>) -> Pending<'_, ()> {
        Box::pin(backing::set(file, backing))
    }

    fn shrink(&self, open: Open, size: u64) -> Pending<'_, ()> {
        Box::pin(resize::shrink(open, size))
    }

    fn snapshots(&self, file: Rc<dyn ImageFile>) -> Pending<'_, Vec<crate::driver::Snapshot>> {
        Box::pin(async move {
            let found = snapshots::list_snapshots(file).await?;
            Ok(found.into_iter().map(Into::into).collect())
        })
    }

    fn change_snapshots<'a>(&'a self, open: Open, change: &'a SnapshotChange) -> Pending<'a, ()> {
        Box::pin(async move {
            match change {
                SnapshotChange::Create(name) => snapshots::create_snapshot(open, name).await.map(drop),
                SnapshotChange::Apply(wanted) => snapshots::apply_snapshot(open, wanted).await,
                SnapshotChange::Delete(wanted) => snapshots::delete_snapshot(open, wanted).await,
            }
        })
    }
}

/// What the header says. Backing files that are not plain paths are refused here.
async fn describe(file: Rc<dyn ImageFile>) -> Result<Description, Error> {
    let header = Header::read(&file).await?;
    let geometry = &header.geometry;
    let backing = match &header.backing {
        None => None,
        Some(path) => Some(Link {
            paths: vec![plain_path(file.name(), "backing file", path)?],
            format: header
                .extensions
                .backing_format
                .as_deref()
                .map(|name| extensions::our_name(name).to_owned()),
            identity: None,
        }),
    };
    let data_files = match (geometry.data_file, &header.extensions.data_file) {
        (false, _) => Vec::new(),
        (true, None) => return Err(Error::corrupt(file.name(), "it has a data file and does not name it")),
        (true, Some(path)) => vec![Link {
            paths: vec![plain_path(file.name(), "data file", path)?],
            format: Some("raw".into()),
            identity: None,
        }],
    };
    let writable = match header.incompatible & header::CORRUPT {
        0 => Ok(()),
        _ => Err("it is marked corrupt: read it, or repair it with `image repair`".to_owned()),
    };
    let yes = |set: bool| if set { "yes" } else { "no" }.to_owned();
    let compat = if geometry.version >= 3 { "1.1" } else { "0.10" };
    let mut properties = vec![
        ("compat", compat.to_owned()),
        ("cluster_size", geometry.cluster().to_string()),
        ("refcount_bits", (1u32 << geometry.refcount_order).to_string()),
        ("lazy_refcounts", yes(header.compatible & header::LAZY_REFCOUNTS != 0)),
        ("extended_l2", yes(geometry.extended_l2)),
        ("compression_type", header::compression_name(header.compression).to_owned()),
        ("dirty", yes(header.incompatible & header::DIRTY != 0)),
        ("corrupt", yes(header.incompatible & header::CORRUPT != 0)),
        ("snapshots", header.snapshots.to_string()),
        ("bitmaps", header.extensions.bitmaps.map_or(0, |place| place.count).to_string()),
    ];
    let (encryption, of_encryption) = crypt::describe(&file, &header).await?;
    properties.extend(of_encryption);
    if geometry.data_file {
        properties.push(("data_file_raw", yes(header.data_file_raw())));
    }
    Ok(Description {
        size: header.size.next_multiple_of(512),
        backing,
        data_files,
        identity: None,
        writable,
        encryption,
        properties,
    })
}

/// A path as it is. Names that QEMU gives another meaning (`json:`, `nbd://`, anything with a protocol) are refused.
pub(crate) fn plain_path(name: &str, what: &str, path: &str) -> Result<String, Error> {
    let protocol =
        path.split('/').next().and_then(|first| first.split_once(':')).map(|(protocol, _)| protocol);
    match protocol {
        None => Ok(path.to_owned()),
        Some("json") => {
            let what =
                format!("its {what} is a json: description; give it a plain path with `qemu-img rebase -u`");
            Err(Error::unsupported(name, what))
        }
        Some(_) => {
            let shown: String = path.chars().take(200).collect();
            let what =
                format!("its {what} is {shown:?}, which names a protocol; only plain paths are opened");
            Err(Error::unsupported(name, what))
        }
    }
}
