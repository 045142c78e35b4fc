//! From files to a disk: opens the layers of a chain, the lowest first, since a driver wants to know how large the layer below is.

use std::rc::Rc;

use crate::driver::{Format, Open};
use crate::error::{Error, ErrorKind};
use crate::file::ImageFile;
use crate::metadata::Budget;
use crate::volume::{Layer, Volume};

/// Memory for tables that a tool takes, in bytes.
pub const BUDGET_BYTES: usize = 64 << 20;

/// An image of a chain, to be opened.
#[derive(Clone)]
pub struct LayerFiles {
    /// Its format.
    pub format: &'static dyn Format,
    /// Its file, then its further files.
    pub files: Vec<Rc<dyn ImageFile>>,
    /// A snapshot inside it instead of its active state.
    pub snapshot: Option<String>,
}

impl LayerFiles {
    /// How a driver of it is opened over a layer of `below_size` bytes.
    pub fn how(&self, writable: bool, below_size: Option<u64>, budget: &Rc<Budget>) -> Open {
        Open {
            files: self.files.clone(),
            writable,
            below_size,
            budget: budget.clone(),
            log: None,
            snapshot: self.snapshot.clone(),
        }
    }
}

/// Opens a chain, the first image on top, as one disk; only the top is writable, if anything is.
///
/// # Errors
/// Those of the drivers, and of [`Volume::new`]. Layers that were opened are closed again as far as that goes.
pub async fn open(images: &[LayerFiles], writable: bool, budget: &Rc<Budget>) -> Result<Volume, Error> {
    let mut layers: Vec<Layer> = Vec::new();
    for (index, image) in images.iter().enumerate().rev() {
        let below_size = layers.last().map(|below| below.driver.size());
        let how = image.how(writable && index == 0, below_size, budget);
        let driver = image.format.open(how).await?;
        let size = driver.size();
        if !size.is_multiple_of(512) {
            let name = image.files.first().map_or("", |file| file.name());
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{name}: a disk of {size} bytes, which is no multiple of 512"),
            ));
        }
        layers.push(Layer { driver, files: image.files.clone() });
    }
    layers.reverse();
    Volume::new(layers)
}

/// Opens one image of a chain without what is below it, which has `below_size` bytes: to look at what it has itself. Where it has
/// nothing, reading is not to be believed.
///
/// # Errors
/// Those of the driver.
pub async fn open_alone(
    image: &LayerFiles,
    writable: bool,
    below_size: Option<u64>,
    budget: &Rc<Budget>,
) -> Result<Volume, Error> {
    let driver = image.format.open(image.how(writable, below_size, budget)).await?;
    Volume::new(vec![Layer { driver, files: image.files.clone() }])
}

/// Ends the use of a disk that was written: what a tool reports as done is durable.
///
/// # Errors
/// Those of the drivers and files. The disk is closed anyway.
pub async fn finish(volume: &Volume) -> Result<(), Error> {
    let flushed = volume.flush().await;
    flushed.and(volume.close().await)
}
