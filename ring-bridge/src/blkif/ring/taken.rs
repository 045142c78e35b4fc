//! What the engine hands out: requests that were taken, by their tokens.

use crate::blkif::request::Body;
use crate::blkif::wire::{INDIRECT_PAGES_MAX, PAGE_BYTES};

/// A request that was taken: to be answered once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token {
    /// Its slot, below the ring's number of entries.
    pub slot: u16,
    /// Its ring index: tells later requests of the same slot apart.
    pub seq: u32,
}

/// A request that can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// To answer it by.
    pub token: Token,
    /// What it asks; its segments are had by [`segments`](super::Ring::segments).
    pub body: Body,
}

/// An indirect request whose segments the caller has to copy from the frontend's pages, read-only, and to hand to [`supply`](super::Ring::supply).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    /// To supply or refuse it by.
    pub token: Token,
    /// Bytes that are needed, 8 per segment; at most eight pages.
    pub len: usize,
    grefs: [u32; INDIRECT_PAGES_MAX],
}

impl Fetch {
    pub(super) fn new(token: Token, len: usize, grefs: [u32; INDIRECT_PAGES_MAX]) -> Fetch {
        Fetch { token, len, grefs }
    }

    /// The pages and the bytes to copy from the start of each; to be laid one behind the other.
    pub fn pieces(&self) -> impl Iterator<Item = (u32, usize)> {
        let len = self.len;
        self.grefs.into_iter().enumerate().map_while(move |(i, gref)| {
            let left = len.checked_sub(i * PAGE_BYTES)?;
            (left > 0).then_some((gref, left.min(PAGE_BYTES)))
        })
    }
}

/// What [`consume`](super::Ring::consume) hands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Can run.
    Run(Request),
    /// Needs its segments first.
    Fetch(Fetch),
}
