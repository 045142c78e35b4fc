//! From files to a disk: opens the layers of a chain, the lowest first, since a driver wants to know how large the layer below is.

use std::rc::Rc;

use crate::driver::{Driver, Format, Open};
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
    /// Its key, if it is encrypted.
    pub key: Option<crate::crypt::Secret>,
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
            key: self.key.clone(),
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
        match open_layer(image, writable && index == 0, below_size, budget).await {
            Ok(layer) => layers.push(layer),
            Err(error) => {
                close(layers.iter().map(|layer| &layer.driver)).await;
                return Err(error);
            }
        }
    }
    layers.reverse();
    volume(layers).await
}

/// One layer, over one of `below_size` bytes.
async fn open_layer(
    image: &LayerFiles,
    writable: bool,
    below_size: Option<u64>,
    budget: &Rc<Budget>,
) -> Result<Layer, Error> {
    let driver = image.format.open(image.how(writable, below_size, budget)).await?;
    let size = driver.size();
    if !size.is_multiple_of(512) {
        close([&driver]).await;
        let name = image.files.first().map_or("", |file| file.name());
        let message = format!("{name}: a disk of {size} bytes, which is no multiple of 512");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Ok(Layer { driver, files: image.files.clone() })
}

async fn volume(layers: Vec<Layer>) -> Result<Volume, Error> {
    let drivers: Vec<_> = layers.iter().map(|layer| layer.driver.clone()).collect();
    match Volume::new(layers) {
        Ok(volume) => Ok(volume),
        Err(error) => {
            close(&drivers).await;
            Err(error)
        }
    }
}

/// Closes drivers whose disk does not come to be. What they say does not matter any more: the first error is the reason.
async fn close<'a>(drivers: impl IntoIterator<Item = &'a Rc<dyn Driver>>) {
    for driver in drivers {
        let _ = driver.close().await;
    }
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
    volume(vec![open_layer(image, writable, below_size, budget).await?]).await
}

/// Ends the use of a disk that was written: what a tool reports as done is durable.
///
/// # Errors
/// Those of the drivers and files. The disk is closed anyway.
pub async fn finish(volume: &Volume) -> Result<(), Error> {
    let flushed = volume.flush().await;
    flushed.and(volume.close().await)
}

#[cfg(test)]
mod tests {
    //! Goal: a driver that was opened is closed, whatever fails after it. Method: drivers of raw files that count their closes, under
    //! and as layers that cannot be opened.

    use std::ops::Range;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::driver::{Create, Description, Erase, Erased, Extent, Findings, Plan, Repair, Usage};
    use crate::file::Pending;
    use crate::registry::format;
    use crate::testing::{Pages, Store};
    use crate::volume::DEPTH_MAX;

    /// What becomes of an image that is opened.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Fate {
        Good,
        /// It has a size that no disk can have.
        Odd,
        /// It cannot be opened.
        Refused,
    }

    #[derive(Debug)]
    struct Watched {
        fate: Fate,
        closes: &'static AtomicUsize,
    }

    struct WatchedDriver {
        driver: Rc<dyn Driver>,
        fate: Fate,
        closes: &'static AtomicUsize,
    }

    fn raw() -> &'static dyn Format {
        format("raw").unwrap()
    }

    impl Format for Watched {
        fn name(&self) -> &'static str {
            "watched"
        }

        fn recognises(&self, head: &[u8], tail: &[u8]) -> bool {
            raw().recognises(head, tail)
        }

        fn describe(&self, file: Rc<dyn ImageFile>) -> Pending<'_, Description> {
            raw().describe(file)
        }

        fn open(&self, open: Open) -> Pending<'_, Rc<dyn Driver>> {
            Box::pin(async move {
                if self.fate == Fate::Refused {
                    return Err(Error::invalid("it is refused"));
                }
                let driver = raw().open(open).await?;
                Ok(Rc::new(WatchedDriver { driver, fate: self.fate, closes: self.closes }) as Rc<dyn Driver>)
            })
        }

        fn create<'a>(
            &'a self,
            file: Rc<dyn ImageFile>,
            data_files: Vec<Rc<dyn ImageFile>>,
            create: &'a Create,
        ) -> Pending<'a, ()> {
            raw().create(file, data_files, create)
        }

        fn check(&self, open: Open, repair: Option<Repair>) -> Pending<'_, Findings> {
            raw().check(open, repair)
        }
    }

    impl Driver for WatchedDriver {
        fn size(&self) -> u64 {
            self.driver.size() + u64::from(self.fate == Fate::Odd)
        }

        fn granule(&self) -> u64 {
            self.driver.granule()
        }

        fn map(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<u64, Error> {
            self.driver.map(offset, len, out)
        }

        fn load(&self, offset: u64, len: u64) -> Pending<'_, ()> {
            self.driver.load(offset, len)
        }

        fn plan_write(&self, offset: u64, len: u64) -> Pending<'_, Plan> {
            self.driver.plan_write(offset, len)
        }

        fn commit(&self, plan: Plan) -> Pending<'_, ()> {
            self.driver.commit(plan)
        }

        fn abort(&self, plan: Plan) {
            self.driver.abort(plan);
        }

        fn erase(&self, range: Range<u64>, how: Erase) -> Pending<'_, Erased> {
            self.driver.erase(range, how)
        }

        fn flush(&self) -> Pending<'_, ()> {
            self.driver.flush()
        }

        fn tidy(&self) -> Pending<'_, ()> {
            self.driver.tidy()
        }

        fn resize(&self, size: u64) -> Pending<'_, ()> {
            self.driver.resize(size)
        }

        fn close(&self) -> Pending<'_, ()> {
            self.closes.fetch_add(1, Ordering::Relaxed);
            self.driver.close()
        }

        fn usage(&self) -> Usage {
            self.driver.usage()
        }
    }

    #[test]
    fn what_was_opened_is_closed_when_the_disk_does_not_come_to_be() {
        use Fate::{Good, Odd, Refused};
        for (fates, opened) in [
            (vec![Odd], 1),
            (vec![Odd, Good], 2),
            (vec![Refused, Good, Good], 2),
            (vec![Good, Refused, Good], 1),
            (vec![Good; DEPTH_MAX + 1], DEPTH_MAX + 1),
        ] {
            let closes: &'static AtomicUsize = Box::leak(Box::default());
            let store = Store::new(1);
            let image = |(number, fate): (usize, &Fate)| {
                let file = store.add(&format!("image-{number}"), Pages::of(&[0; 512]));
                let format = Box::leak(Box::new(Watched { fate: *fate, closes }));
                LayerFiles { format, files: vec![file], snapshot: None, key: None }
            };
            let images: Vec<_> = fates.iter().enumerate().map(image).collect();
            let budget = Budget::new(1 << 20);
            store.run(async {
                assert!(open(&images, true, &budget).await.is_err(), "{fates:?}");
                assert_eq!(closes.load(Ordering::Relaxed), opened, "{fates:?}");
                if fates == [Odd] {
                    assert!(open_alone(&images[0], true, None, &budget).await.is_err());
                    assert_eq!(closes.load(Ordering::Relaxed), 2);
                }
            });
        }
    }
}
