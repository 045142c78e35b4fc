//! Where the bytes of a disk are, for people and programs.

use std::ops::Range;

use super::walk::{Depth, Span, Walk};
use crate::error::Error;
use crate::volume::Volume;

/// Gives each span of a range to `show`, in order, neighbours that continue each other as one.
///
/// # Errors
/// Damaged tables, and what files or `show` answered.
pub async fn map(
    volume: &Volume,
    range: Range<u64>,
    show: &mut dyn FnMut(&Span) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut walk = Walk::new(volume, Depth::Chain, range);
    let mut last: Option<Span> = None;
    while let Some(span) = walk.next().await? {
        if last.as_mut().is_some_and(|last| last.join(&span)) {
            continue;
        }
        if let Some(span) = last.replace(span) {
            show(&span)?;
        }
    }
    last.map_or(Ok(()), |span| show(&span))
}
