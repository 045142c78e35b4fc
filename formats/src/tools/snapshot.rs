//! What has to be known of an image before an overlay is put over it.

use super::walk::{Depth, State, Walk};
use crate::error::Error;
use crate::volume::Volume;

/// Whether the top layer has nothing of its own: the disk reads the same without it.
///
/// # Errors
/// Damaged tables, and what files answered.
pub async fn is_empty(volume: &Volume) -> Result<bool, Error> {
    let mut walk = Walk::new(volume, Depth::Top, 0..volume.size());
    while let Some(span) = walk.next().await? {
        if span.state != State::Absent {
            return Ok(false);
        }
    }
    Ok(true)
}
