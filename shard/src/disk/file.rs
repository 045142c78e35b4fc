//! Reads and writes of a raw image: O_DIRECT for whole physical blocks, read-modify-write for parts of them, a buffered descriptor
//! for the bytes behind the last whole block (`formats::raw` has the arithmetic).
//!
//! Read-modify-write is serialised per physical block: while a block is between its read and its write back, no other change of
//! that block starts, and it does not start before changes of that block that are in flight have finished. So two clients
//! that write different sectors of one block never undo each other. Requests that wait stand in one queue and are not
//! overtaken by later ones that overlap them.

use std::collections::VecDeque;

use formats::raw::{self, Cover};

use super::{Action, Ctx, Disk, IoResult, Mem, Target};
use crate::api::Backend;
use crate::request::{Kind, PIECE, Phase, ReqKey, Request};
use crate::storage::pool::PAGE;

/// Blocks that are between read and write back, and who waits for them.
#[derive(Debug)]
pub(super) struct Edges {
    /// Block size; 1 when every offset will do.
    align: u32,
    /// Alignment of memory.
    memory_align: u32,
    /// Where O_DIRECT ends.
    direct_end: u64,
    /// Bytes of the file when it was opened.
    length: u64,
    /// Start of each held block, with its holder.
    held: Vec<(u64, ReqKey)>,
    blocked: VecDeque<ReqKey>,
    /// Requests that change data and have been started: at most as many as may be started.
    changing: Vec<ReqKey>,
    /// `retry_blocked` is at work, and whether it shall look again.
    retrying: bool,
    retry_again: bool,
}

impl Edges {
    pub(super) fn new(backend: &Backend) -> Edges {
        let (align, direct_end) = match backend {
            Backend::File(file) if file.tail.is_some() => {
                // A page, not a block: the page cache of the tail must not hold bytes that O_DIRECT reaches.
                (file.offset_align, raw::direct_end(file.length, file.offset_align.max(PAGE as u32)))
            }
            Backend::File(file) => (file.offset_align, u64::MAX),
            Backend::Ram(_) | Backend::Null | Backend::Image(_) => (1, u64::MAX),
        };
        let memory_align = if let Backend::File(file) = backend { file.memory_align.max(1) } else { 1 };
        let length = if let Backend::File(file) = backend { file.length } else { u64::MAX };
        Edges {
            align: align.max(1),
            memory_align,
            direct_end,
            length,
            held: Vec::new(),
            blocked: VecDeque::new(),
            changing: Vec::new(),
            retrying: false,
            retry_again: false,
        }
    }

    fn split(&self, offset: u64, len: u64) -> raw::Split {
        raw::split(offset, len, self.direct_end)
    }
}

fn edges(cover: &Cover) -> impl Iterator<Item = u64> {
    cover.head.into_iter().chain(cover.tail)
}

impl Disk {
    pub(super) fn direct_end(&self) -> u64 {
        self.file.direct_end
    }

    pub(super) fn align(&self) -> u32 {
        self.file.align
    }

    pub(super) fn start_read(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        let request = &mut ctx.requests[key];
        debug_assert!(request.len <= u64::from(PIECE));
        let (offset, len) = (request.offset, request.len);
        let split = self.file.split(offset, len);
        let direct_len = (split.direct.end - split.direct.start) as u32;
        let cover = raw::cover(split.direct.start, u64::from(direct_len), self.file.align);
        request.phase = Phase::Transfer;
        if direct_len > 0 && !cover.is_aligned() {
            request.phase = Phase::BounceRead;
            let size = (cover.end - cover.start) as u32;
            let mem = Mem::Bounce { at: 0, size };
            self.push_io(ctx, key, false, Target::Direct, cover.start, size, mem);
        } else if direct_len > 0 {
            self.push_io(ctx, key, false, Target::Direct, offset, direct_len, Mem::Payload(0));
        }
        if !split.tail.is_empty() {
            let tail_len = (split.tail.end - split.tail.start) as u32;
            self.push_io(ctx, key, false, Target::Tail, split.tail.start, tail_len, Mem::Payload(direct_len));
        }
    }

    pub(super) fn start_write(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        let request = &mut ctx.requests[key];
        debug_assert!(request.len <= u64::from(PIECE));
        request.phase = Phase::Transfer;
        let (offset, len) = (request.offset, request.len);
        let split = self.file.split(offset, len);
        let direct_len = (split.direct.end - split.direct.start) as u32;
        let cover = raw::cover(split.direct.start, u64::from(direct_len), self.file.align);
        if self.must_wait(ctx, key, &cover) {
            return self.block(ctx, key);
        }
        if direct_len > 0 && !cover.is_aligned() {
            self.hold_edges(key, &cover);
            self.read_edges(ctx, key, &cover);
        } else if direct_len > 0 {
            self.push_io(ctx, key, true, Target::Direct, offset, direct_len, Mem::Payload(0));
        }
        if !split.tail.is_empty() {
            let tail_len = (split.tail.end - split.tail.start) as u32;
            self.push_io(ctx, key, true, Target::Tail, split.tail.start, tail_len, Mem::Payload(direct_len));
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one operation has these seven properties")]
    pub(super) fn push_io(
        &mut self,
        ctx: &mut Ctx<'_>,
        req: ReqKey,
        write: bool,
        target: Target,
        offset: u64,
        len: u32,
        mem: Mem,
    ) {
        ctx.requests[req].pending += 1;
        ctx.out.push(Action::Io { req, write, target, offset, len, mem });
    }

    /// Takes the partial blocks of a range, until [`Disk::release_edges`]: no other change of them starts.
    pub(super) fn hold_edges(&mut self, key: ReqKey, cover: &Cover) {
        self.file.held.extend(edges(cover).map(|block| (block, key)));
    }

    /// Reads the partial blocks of a range, which the request holds; [`Phase::EdgeWrite`] follows.
    pub(super) fn read_edges(&mut self, ctx: &mut Ctx<'_>, key: ReqKey, cover: &Cover) {
        ctx.requests[key].phase = Phase::EdgeRead;
        let size = (cover.end - cover.start) as u32;
        // Memory may have to be aligned more strictly than blocks are large: then the whole range is read.
        let place = |block: u64| (block - cover.start) as u32;
        if !edges(cover).all(|block| place(block).is_multiple_of(self.file.memory_align)) {
            let mem = Mem::Bounce { at: 0, size };
            return self.push_io(ctx, key, false, Target::Direct, cover.start, size, mem);
        }
        for block in edges(cover) {
            let mem = Mem::Bounce { at: place(block), size };
            self.push_io(ctx, key, false, Target::Direct, block, self.file.align, mem);
        }
    }

    /// Whether a change of the blocks of `cover` has to wait for a read-modify-write, or is one and has to wait for changes.
    pub(super) fn must_wait(&self, ctx: &Ctx<'_>, key: ReqKey, cover: &Cover) -> bool {
        let overlaps = |start: u64, end: u64| start < cover.end && cover.start < end;
        let align = u64::from(self.file.align);
        if self.file.held.iter().any(|&(block, holder)| holder != key && overlaps(block, block + align)) {
            return true;
        }
        let earlier = self.file.blocked.iter().take_while(|&&other| other != key);
        if earlier.map(|&other| &ctx.requests[other]).any(|other| overlaps(other.offset, other.end())) {
            return true;
        }
        if cover.is_aligned() {
            return false;
        }
        let touches_edge =
            |other: &Request| edges(cover).any(|block| other.offset < block + align && block < other.end());
        self.file.changing.iter().any(|&other_key| {
            let other = &ctx.requests[other_key];
            other_key != key
                && !matches!(other.phase, Phase::Waiting | Phase::Blocked | Phase::Sync)
                && touches_edge(other)
        })
    }

    /// Queues a request behind a read-modify-write.
    pub(super) fn block(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        ctx.requests[key].phase = Phase::Blocked;
        self.file.blocked.push_back(key);
    }

    /// A request ends its changes: its blocks are free, and who waited is looked at again.
    pub(super) fn release_edges(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        ctx.requests[key].phase = Phase::Waiting;
        if let Some(index) = self.file.changing.iter().position(|&other| other == key) {
            self.file.changing.swap_remove(index);
        }
        self.file.retry_again = true;
        self.retry_blocked(ctx, key);
    }

    /// A request that changes data starts.
    pub(super) fn note_change(&mut self, key: ReqKey) {
        if self.file.align > 1 {
            self.file.changing.push(key);
        }
    }

    /// Frees the blocks of a request and looks at all that waits for blocks, in order.
    pub(super) fn retry_blocked(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        let before = self.file.held.len();
        self.file.held.retain(|&(_, holder)| holder != key);
        self.file.retry_again |= self.file.held.len() < before;
        if self.file.retrying {
            // One that was looked at ended or let go at once: the loop below looks again, not we from inside of it.
            return;
        }
        self.file.retrying = true;
        loop {
            self.file.retry_again = false;
            for waiter in std::mem::take(&mut self.file.blocked) {
                // Queues it again, in order, if it still has to wait.
                match ctx.requests[waiter].kind {
                    Kind::Write { .. } => self.start_write(ctx, waiter),
                    _ => self.start_space(ctx, waiter),
                }
            }
            if !self.file.retry_again || self.file.blocked.is_empty() {
                break;
            }
        }
        self.file.retrying = false;
    }

    /// An [`Action::Io`] is done.
    pub fn on_io(&mut self, ctx: &mut Ctx<'_>, key: ReqKey, mem: Mem, len: u32, result: IoResult) {
        let request = &mut ctx.requests[key];
        request.pending -= 1;
        let align = u64::from(self.file.align);
        let errno = match (result, mem) {
            (IoResult::Done, _) => 0,
            (IoResult::Failed(errno), _) => errno,
            // Behind the end of the file there are zeroes.
            (IoResult::Short(done), Mem::Payload(at))
                if request.kind == Kind::Read
                    && request.offset + u64::from(at + done) >= self.file.length =>
            {
                ctx.out.push(Action::ZeroPayload { req: key, at: at + done, len: len - done });
                0
            }
            // The same, of a read that takes whole blocks.
            (IoResult::Short(done), Mem::Bounce { at, .. })
                if request.phase == Phase::BounceRead
                    && request.offset / align * align + u64::from(at + done) >= self.file.length =>
            {
                ctx.out.push(Action::ZeroBounce { req: key, at: at + done, len: len - done });
                0
            }
            // Somebody made the file shorter while it was attached: what was there is lost, and must not read as zeroes.
            (IoResult::Short(_), _) => libc::EIO,
        };
        let request = &mut ctx.requests[key];
        if request.errno == 0 {
            request.errno = errno;
        }
        if request.pending > 0 {
            return;
        }
        match request.errno {
            0 => self.advance(ctx, key),
            errno => self.failed_io(ctx, key, errno),
        }
    }

    /// All operations of a request's phase have succeeded.
    fn advance(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        let request = &mut ctx.requests[key];
        let (offset, len) = (request.offset, request.len);
        match request.phase {
            Phase::BounceRead => {
                let direct = self.file.split(offset, len).direct;
                let bounce_at =
                    (offset - raw::cover(offset, direct.end - offset, self.file.align).start) as u32;
                let len = (direct.end - direct.start) as u32;
                ctx.out.push(Action::Copy { req: key, to_bounce: false, bounce_at, payload_at: 0, len });
                self.finish(ctx, key, 0);
            }
            Phase::EdgeRead if matches!(request.kind, Kind::WriteZeroes { .. }) => {
                self.merge_zeroes(ctx, key)
            }
            Phase::EdgeRead => {
                let direct = self.file.split(offset, len).direct;
                let direct_len = (direct.end - direct.start) as u32;
                let cover = raw::cover(offset, u64::from(direct_len), self.file.align);
                let bounce_at = (offset - cover.start) as u32;
                request.phase = Phase::EdgeWrite;
                ctx.out.push(Action::Copy {
                    req: key,
                    to_bounce: true,
                    bounce_at,
                    payload_at: 0,
                    len: direct_len,
                });
                let size = (cover.end - cover.start) as u32;
                let mem = Mem::Bounce { at: 0, size };
                self.push_io(ctx, key, true, Target::Direct, cover.start, size, mem);
            }
            Phase::ZeroFill | Phase::EdgeWrite if matches!(request.kind, Kind::WriteZeroes { .. }) => {
                self.zero_step(ctx, key);
            }
            _ => self.data_done(ctx, key),
        }
    }

    /// The data of a request is where it belongs; makes it durable if that was asked for.
    pub(super) fn data_done(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        let request = &ctx.requests[key];
        let changes = !matches!(request.kind, Kind::Read);
        if request.kind.fua() || (changes && self.writes_through()) {
            self.release_edges(ctx, key);
            ctx.out.push(Action::DropBounce { req: key });
            self.join_sync(ctx, key);
        } else {
            self.finish(ctx, key, 0);
        }
    }
}
