//! Puts what an overlay has into the image below it.
//!
//! The overlay is not changed, so whatever interrupts this, the disk reads as before through it, and the same command can be run
//! again: the parent keeps its identity. Others that are laid over the same parent are lost by its very nature.

use super::Progress;
use super::copy::{Copied, Target, copy};
use super::walk::Depth;
use crate::error::Error;
use crate::volume::Volume;

/// Copies what the top layer of `child` has to `parent`, which is opened writable over its own chain. A parent that is smaller is
/// grown first. Not yet durable.
///
/// # Errors
/// What reading and writing answered; a parent that cannot grow.
pub async fn coalesce(child: &Volume, parent: &Volume, progress: &dyn Progress) -> Result<Copied, Error> {
    parent.layers()[0].driver.keep_identity();
    if parent.size() < child.size() {
        parent
            .resize(child.size())
            .await
            .map_err(|error| error.context("the parent is smaller than the child and has to grow first"))?;
    }
    copy((child, Depth::Top), 0..child.size(), (parent, Target::Used), 0, progress).await
}
