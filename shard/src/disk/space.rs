//! Discard and write-zeroes on files and devices: real holes and zero ranges where the store has them, zeroes written one by one
//! where it has not.
//!
//! fallocate always runs on a kernel thread and holds the file's lock, so at most two are out per file; discards that wait and
//! touch each other become one. On a regular file it gets whole pages only: the kernel zeroes parts of a page in the page cache, which
//! O_DIRECT goes around (a discard is narrowed, zeroes are written one by one). What a store refuses once (EOPNOTSUPP) is not asked again.

use std::collections::VecDeque;

use super::{Action, Ctx, Disk, Mem, SideTarget, Target};
use crate::api::{Backend, CacheMode, FileKind};
use crate::request::{Kind, PIECE, Phase, ReqKey};
use crate::storage::pool::PAGE;
use crate::storage::side::SideCall;
use formats::raw;

const IN_FLIGHT_MAX: u32 = 2;

/// Space operations of one file.
#[derive(Debug, Default)]
pub(super) struct Space {
    in_flight: u32,
    waiting: VecDeque<(ReqKey, Call)>,
    /// Requests that one kernel operation serves.
    groups: slab::Slab<(Call, Vec<ReqKey>)>,
    no_punch: bool,
    no_zero_range: bool,
    no_discard: bool,
}

/// The kernel's call for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    /// fallocate with this mode.
    Fallocate(i32),
    /// BLKDISCARD.
    DiscardDevice,
}

/// What the file's kind makes of a request.
enum Way {
    /// The kernel does it.
    Call(Call),
    /// Zeroes, one by one.
    Fill,
    /// The store has no such thing and it was only a hint.
    Nothing,
    /// EOPNOTSUPP: only a fast way was wanted.
    Refuse,
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

impl Disk {
    fn way(&self, kind: Kind, offset: u64, len: u64) -> Way {
        let Backend::File(file) = &self.config.backend else { return Way::Nothing };
        let aligned = raw::cover(offset, len, self.align()).is_aligned();
        let pages = self.whole_pages(offset, offset + len);
        let in_pages = pages == (offset..offset + len);
        let (no_hole, fast) = match kind {
            Kind::WriteZeroes { no_hole, fast, .. } => (no_hole, fast),
            _ => {
                return match file.kind {
                    FileKind::Regular if !self.space.no_punch && !pages.is_empty() => {
                        Way::Call(Call::Fallocate(PUNCH))
                    }
                    FileKind::Block { discard: true } if aligned && !self.space.no_discard => {
                        Way::Call(Call::DiscardDevice)
                    }
                    _ => Way::Nothing,
                };
            }
        };
        let slow = if fast { Way::Refuse } else { Way::Fill };
        match file.kind {
            FileKind::Regular if !in_pages => slow,
            FileKind::Regular if !no_hole && !self.space.no_punch => Way::Call(Call::Fallocate(PUNCH)),
            FileKind::Regular if !self.space.no_zero_range => Way::Call(Call::Fallocate(ZERO)),
            // A device's punch zeroes by unmapping or fails; its zero range falls back to writing, which is not fast.
            FileKind::Block { .. } if aligned && !no_hole && !self.space.no_punch => {
                Way::Call(Call::Fallocate(PUNCH))
            }
            FileKind::Block { .. } if aligned && !fast && !self.space.no_zero_range => {
                Way::Call(Call::Fallocate(ZERO))
            }
            _ => slow,
        }
    }

    /// The pages of a regular file that lie in a range whole. What is reached through the page cache anyway counts as whole.
    fn whole_pages(&self, start: u64, end: u64) -> std::ops::Range<u64> {
        let page = match &self.config.backend {
            Backend::File(file) if file.kind == FileKind::Regular && file.cache == CacheMode::None => {
                PAGE as u64
            }
            _ => 1,
        };
        let border = self.direct_end();
        let start = if start >= border { start } else { start.next_multiple_of(page) };
        let end = if end >= border { end } else { end & !(page - 1) };
        start..end.max(start)
    }

    /// The store will write zeroes one by one.
    pub(super) fn fills(&self, kind: Kind, offset: u64, len: u64) -> bool {
        matches!(self.way(kind, offset, len), Way::Fill)
    }

    pub(super) fn start_space(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        let request = &mut ctx.requests[key];
        let (kind, offset, len) = (request.kind, request.offset, request.len);
        let cover = raw::cover(offset, len, self.align());
        // fallocate zeroes parts of blocks itself, so the request as a whole counts as aligned; it only keeps away from
        // blocks that are between read and write back.
        let whole = raw::Cover { head: None, tail: None, ..cover };
        if self.must_wait(ctx, key, &whole) {
            return self.block(ctx, key);
        }
        match self.way(kind, offset, len) {
            Way::Nothing => self.finish(ctx, key, 0),
            Way::Refuse => self.finish(ctx, key, libc::EOPNOTSUPP),
            Way::Fill => {
                let direct = raw::split(offset, len, self.direct_end()).direct;
                let cover = raw::cover(direct.start, direct.end - direct.start, self.align());
                if self.must_wait(ctx, key, &cover) {
                    return self.block(ctx, key);
                }
                self.hold_edges(key, &cover);
                ctx.requests[key].cursor = offset;
                self.zero_step(ctx, key);
            }
            Way::Call(call) => {
                ctx.requests[key].phase = Phase::Punch;
                self.space.waiting.push_back((key, call));
                self.launch_space(ctx);
            }
        }
    }

    fn launch_space(&mut self, ctx: &mut Ctx<'_>) {
        while self.space.in_flight < IN_FLIGHT_MAX
            && let Some((key, call)) = self.space.waiting.pop_front()
        {
            let request = &ctx.requests[key];
            let (mut start, mut end) = (request.offset, request.end());
            let mut members = vec![key];
            if matches!(request.kind, Kind::Discard { .. }) {
                // Neighbours among the waiting discards go along.
                self.space.waiting.retain(|&(other_key, other_call)| {
                    let other = &ctx.requests[other_key];
                    let joins = matches!(other.kind, Kind::Discard { .. })
                        && other_call == call
                        && other.offset <= end
                        && start <= other.end();
                    if joins {
                        start = start.min(other.offset);
                        end = end.max(other.end());
                        members.push(other_key);
                    }
                    !joins
                });
            }
            let group = self.space.groups.insert((call, members)) as u32;
            self.space.in_flight += 1;
            let range = match call {
                Call::Fallocate(_) => self.whole_pages(start, end),
                Call::DiscardDevice => start..end,
            };
            let (offset, len) = (range.start, range.end - range.start);
            ctx.out.push(match call {
                Call::Fallocate(mode) => Action::Fallocate { group, mode, offset, len },
                Call::DiscardDevice => Action::Side {
                    target: SideTarget::Group(group),
                    call: SideCall::DiscardDevice { offset, len },
                },
            });
        }
    }

    /// An [`Action::Fallocate`] or device discard is done: 0 or an errno.
    pub fn on_space(&mut self, ctx: &mut Ctx<'_>, group: u32, errno: i32) {
        self.space.in_flight -= 1;
        let (call, members) = self.space.groups.remove(group as usize);
        let unsupported = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY);
        match call {
            Call::Fallocate(PUNCH) => self.space.no_punch |= unsupported,
            Call::Fallocate(_) => self.space.no_zero_range |= unsupported,
            Call::DiscardDevice => self.space.no_discard |= unsupported,
        }
        for key in members {
            let kind = ctx.requests[key].kind;
            match (errno, kind) {
                (0, _) => self.data_done(ctx, key),
                (_, Kind::Discard { .. }) if unsupported => self.finish(ctx, key, 0),
                // The next way down: zero range, then writing.
                (_, Kind::WriteZeroes { .. }) if unsupported => {
                    // It begins anew, so it must not be what others wait for while it waits for them.
                    ctx.requests[key].phase = Phase::Waiting;
                    self.retry_blocked(ctx, key);
                    self.start_space(ctx, key);
                }
                _ => self.failed_io(ctx, key, errno),
            }
        }
        self.launch_space(ctx);
    }

    /// Writes the next run of zeroes of a request, from its cursor on.
    pub(super) fn zero_step(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        let request = &mut ctx.requests[key];
        let (cursor, end) = (request.cursor, request.end());
        if cursor >= end {
            return self.data_done(ctx, key);
        }
        request.phase = Phase::ZeroFill;
        let align = u64::from(self.align());
        let run = (end - cursor).min(u64::from(PIECE));
        let split = raw::split(cursor, run, self.direct_end());
        if split.direct.is_empty() {
            ctx.requests[key].cursor = cursor + run;
            return self.push_io(ctx, key, true, Target::Tail, cursor, run as u32, Mem::Zeroes);
        }
        let whole = (split.direct.end - cursor) & !(align - 1);
        if cursor.is_multiple_of(align) && whole > 0 {
            ctx.requests[key].cursor = cursor + whole;
            return self.push_io(ctx, key, true, Target::Direct, cursor, whole as u32, Mem::Zeroes);
        }
        // A part of one block, which is held from the start.
        let block_end = (cursor & !(align - 1)) + align;
        let cover = raw::cover(cursor, block_end.min(split.direct.end) - cursor, self.align());
        self.read_edges(ctx, key, &cover);
    }

    /// The block around the cursor was read: zeroes its part and writes it back.
    pub(super) fn merge_zeroes(&mut self, ctx: &mut Ctx<'_>, key: ReqKey) {
        let align = u64::from(self.align());
        let request = &mut ctx.requests[key];
        let block = request.cursor & !(align - 1);
        let stop = request.end().min(block + align);
        let (at, len) = ((request.cursor - block) as u32, (stop - request.cursor) as u32);
        request.cursor = stop;
        request.phase = Phase::EdgeWrite;
        ctx.out.push(Action::ZeroBounce { req: key, at, len });
        let mem = Mem::Bounce { at: 0, size: align as u32 };
        self.push_io(ctx, key, true, Target::Direct, block, align as u32, mem);
    }
}
