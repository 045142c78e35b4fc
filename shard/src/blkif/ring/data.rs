//! Data of a ring's requests: between the guest's pages and buffers of the pool.

use super::*;

/// Data of a read that is to be copied to the guest.
#[derive(Debug)]
pub struct Outgoing {
    pub(super) command: u16,
    /// Byte of the command.
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) buf: Buf,
}

/// How far data have come on their way between a guest and a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// They are there.
    Done,
    /// They come with the batch of the turn.
    Planned,
    /// They cannot be had.
    Failed,
}

impl GuestRing {
    /// Copies the segments of an indirect request to a buffer, or plans to.
    pub fn fetch_in(
        &mut self,
        fetch: &Fetch,
        buf: &Buf,
        pool: &mut Pool,
        host: &mut Opened,
        owner: u32,
        now: Nanos,
    ) -> Transfer {
        self.granted.clear();
        // At most a page each.
        self.granted.extend(fetch.pieces().map(|(gref, len)| Granted { gref, offset: 0, len: len as u16 }));
        self.transfer(buf, pool, host, Direction::FromDomain, owner, now)
    }

    /// Hands fetched segments over; `None` when they could not be had.
    pub fn supply(&mut self, fetch: &Fetch, bytes: Option<&[u8]>) {
        if self.broken.is_some() {
            return;
        }
        let request = match bytes {
            Some(bytes) => self.engine.supply(fetch.token, bytes),
            None => {
                self.counters.segment_faults.add(1);
                self.engine.refuse(fetch.token, Reason::IndirectPage).map(|()| None)
            }
        };
        if let Some(Some(request)) = self.note(request) {
            self.enter(request);
        }
    }

    /// Copies the data of a write from the guest, or plans to.
    pub fn copy_in(
        &mut self,
        piece: &Piece,
        pool: &mut Pool,
        host: &mut Opened,
        owner: u32,
        now: Nanos,
    ) -> Transfer {
        let Some(buf) = piece.request.payload.as_ref().filter(|_| piece.guests_data) else {
            return Transfer::Done;
        };
        match self.select(piece.command, piece.at, piece.request.len) {
            true => self.transfer(buf, pool, host, Direction::FromDomain, owner, now),
            false => Transfer::Failed,
        }
    }

    /// Ends a piece whose data could not be had.
    pub fn refuse(&mut self, pool: &mut Pool, piece: Piece) {
        self.counters.segment_faults.add(1);
        let mut request = piece.request;
        request.errno = libc::EFAULT;
        self.on_answer(pool, u32::from(piece.command), request);
    }

    /// Finds the segments of a command from byte `at` on.
    fn select(&mut self, slot: u16, at: u64, len: u64) -> bool {
        let Some(token) = self.commands[usize::from(slot)].as_ref().map(|command| command.token) else {
            return false;
        };
        if self.broken.is_some() {
            return false;
        }
        let mut segments = std::mem::take(&mut self.segments);
        let found = self.engine.segments(token, &mut segments);
        let found = self.note(found).is_some();
        cut(&segments, at, len, &mut self.granted);
        self.segments = segments;
        found
    }

    /// Moves what `granted` names between the guest and the buffer: at once through mappings, or with the batch.
    fn transfer(
        &mut self,
        buf: &Buf,
        pool: &mut Pool,
        host: &mut Opened,
        direction: Direction,
        owner: u32,
        now: Nanos,
    ) -> Transfer {
        self.places.clear();
        if let Some(cache) = &mut self.cache {
            self.grefs.clear();
            self.grefs.extend(self.granted.iter().map(|granted| granted.gref));
            if cache.find(&mut host.domains, &self.grefs, now, &mut self.places).is_ok() {
                self.counters.segments_mapped.add(self.granted.len() as u64);
                let good = self.copy_mapped(pool.bytes_mut(buf), direction).is_some();
                return if good { Transfer::Done } else { Transfer::Failed };
            }
        }
        self.counters.segments_copied.add(self.granted.len() as u64);
        let (mut at, domid) = (0, self.domid);
        let good = self.granted.iter().all(|&granted| {
            let planned = host.batch.plan(pool, (buf, at), domid, granted, direction, owner);
            at += usize::from(granted.len);
            planned
        });
        if good { Transfer::Planned } else { Transfer::Failed }
    }

    /// Copies what `granted` names at its `places` to or from bytes of ours; `None` when that is not possible.
    fn copy_mapped(&self, bytes: &mut [u8], direction: Direction) -> Option<()> {
        let cache = self.cache.as_ref()?;
        let mut at = 0;
        for (granted, &place) in self.granted.iter().zip(&self.places) {
            let (mapped, page) = cache.page(place)?;
            let offset = page * PAGE_BYTES + usize::from(granted.offset);
            let len = usize::from(granted.len);
            let bytes = bytes.get_mut(at..at + len)?;
            match direction {
                Direction::FromDomain => mapped.copy_out(offset, bytes),
                Direction::ToDomain => mapped.copy_in(offset, bytes),
            }
            .ok()?;
            at += len;
        }
        Some(())
    }

    /// Data that is to be copied to the guest.
    pub fn take_outgoing(&mut self) -> Vec<Outgoing> {
        std::mem::take(&mut self.outgoing)
    }

    /// Gives the vector back, to be used again.
    pub fn give_outgoing(&mut self, empty: Vec<Outgoing>) {
        if self.outgoing.is_empty() {
            self.outgoing = empty;
        }
    }

    /// Copies data to the guest, or plans to.
    pub fn copy_out(
        &mut self,
        outgoing: &Outgoing,
        pool: &mut Pool,
        host: &mut Opened,
        owner: u32,
        now: Nanos,
    ) -> Transfer {
        match self.select(outgoing.command, outgoing.at, outgoing.len) {
            true => self.transfer(&outgoing.buf, pool, host, Direction::ToDomain, owner, now),
            false => Transfer::Failed,
        }
    }

    /// Data has been copied to the guest, or could not be.
    pub fn on_copied(&mut self, pool: &mut Pool, outgoing: Outgoing, good: bool) {
        self.held -= outgoing.len;
        self.give(pool, outgoing.buf);
        if !good {
            self.counters.segment_faults.add(1);
        }
        if let Some(command) = self.commands[usize::from(outgoing.command)].as_mut() {
            command.left -= 1;
            if !good && command.errno == 0 {
                command.errno = libc::EFAULT;
            }
        }
        self.settle(outgoing.command);
    }
}

/// The parts of segments that bytes `at..at + len` of their request are in.
fn cut(segments: &[Segment], at: u64, len: u64, out: &mut Vec<Granted>) {
    out.clear();
    let (mut from, end) = (0u64, at + len);
    for segment in segments {
        let to = from + u64::from(segment.len);
        let (first, last) = (at.max(from), end.min(to));
        if first < last {
            // Both are inside of the segment, so the differences are smaller than a page.
            let offset = segment.offset + (first - from) as u16;
            out.push(Granted { gref: segment.gref, offset, len: (last - first) as u16 });
        }
        from = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(gref: u32, offset: u16, len: u16) -> Segment {
        Segment { gref, offset, len }
    }

    // Goal: pieces of a request take exactly the bytes of theirs from its segments, and together all of them, in order.
    // Method: segments of every length in sectors, cut at every pair of borders; the bytes are numbered and compared.
    #[test]
    fn segments_are_cut_where_pieces_end() {
        let segments: Vec<_> =
            (0..9u32).map(|i| segment(i, (i as u16 % 8) * 512, (8 - i as u16 % 8) * 512)).collect();
        let sector = |gref: u32, byte: u16| (gref, byte / 512);
        let expand = |gref: u32, offset: u16, len: u16| {
            (0..len / 512).map(move |n| sector(gref, offset + n * 512)).collect::<Vec<_>>()
        };
        let all: Vec<_> = segments.iter().flat_map(|s| expand(s.gref, s.offset, s.len)).collect();
        let mut out = Vec::new();
        for from in 0..all.len() {
            for to in from + 1..=all.len() {
                cut(&segments, from as u64 * 512, (to - from) as u64 * 512, &mut out);
                let found: Vec<_> = out.iter().flat_map(|g| expand(g.gref, g.offset, g.len)).collect();
                assert_eq!(found, all[from..to]);
                assert!(out.iter().all(|g| g.len > 0 && g.offset + g.len <= 4096));
            }
        }
    }
}
