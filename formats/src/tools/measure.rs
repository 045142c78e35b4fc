//! How large an image would be that holds what a disk holds.

use super::walk::{Depth, Walk};
use crate::driver::{Create, Format, Space};
use crate::error::Error;
use crate::volume::Volume;

/// Sizes of a file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// With what the disk has now.
    pub required: u64,
    /// With every byte of the disk.
    pub full: u64,
}

/// Measures an image of `format`, made as `create` says, for the contents of `source`; an empty one without.
///
/// # Errors
/// Options that make no sense, a format that cannot tell, and what reading the tables of the source answered.
pub async fn measure(
    format: &dyn Format,
    create: &Create,
    source: Option<&Volume>,
) -> Result<Measured, Error> {
    let mut create = create.clone();
    create.size = create.size.or(source.map(Volume::size));
    let size = create.size.ok_or_else(|| Error::invalid("neither a size nor an image to measure"))?;
    let Space { unit, unit_space, overhead } = format.space(&create)?;
    let units = match source {
        Some(source) => used_units(source, unit).await?,
        None => 0,
    };
    let space = |units: u64| {
        let bytes = units.checked_mul(unit_space).and_then(|bytes| bytes.checked_add(overhead));
        bytes.ok_or_else(|| Error::invalid(format!("an image of {size} bytes is larger than a file can be")))
    };
    Ok(Measured { required: space(units)?, full: space(size.div_ceil(unit))? })
}

/// Units of a disk that hold bytes.
async fn used_units(volume: &Volume, unit: u64) -> Result<u64, Error> {
    let mut walk = Walk::new(volume, Depth::Chain, 0..volume.size());
    let (mut units, mut counted) = (0, 0);
    while let Some(span) = walk.next().await? {
        if span.is_data() {
            let first = (span.start / unit).max(counted);
            let end = span.end().div_ceil(unit);
            units += end.saturating_sub(first);
            counted = counted.max(end);
        }
    }
    Ok(units)
}
