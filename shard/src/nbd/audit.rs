//! What a connection really holds, added up from scratch: the other side of its counters. For tests.

use super::*;

/// Bytes of payload and bytes of pool buffers.
#[derive(Debug, Default)]
pub struct Holdings {
    pub held: u64,
    pub buffers: u64,
}

impl Holdings {
    fn add(&mut self, data: &Data) {
        self.held += data.len() as u64;
        if let Data::Pool(buf, _) = data {
            self.buffers += buf.capacity() as u64;
        }
    }
}

impl Conn {
    /// The counters.
    pub fn counted(&self) -> Holdings {
        Holdings { held: self.held, buffers: self.buffers }
    }

    /// What it has itself, beside its requests at the disk.
    pub fn count(&self) -> Holdings {
        let mut own = Holdings::default();
        let replies = self.out.iter().chain(&self.deferred).chain(&self.sending);
        replies.for_each(|reply| own.add(&reply.data));
        for (_, command) in &self.commands {
            let ready = command.ordered.iter().flat_map(|ordered| &ordered.ready);
            ready.for_each(|(_, data)| own.add(data));
        }
        if let Rx::Payload { data, .. } = &self.rx {
            own.add(data);
        }
        own
    }

    /// It has answered everything and only waits for the next request. `sent`: its last message has gone.
    pub fn is_idle_but_for_input(&self, sent: bool) -> bool {
        let unsent = self.send_op.is_some() || self.send_message.remaining() > 0 || !self.sending.is_empty();
        matches!(self.rx, Rx::Header)
            && self.commands.is_empty()
            && self.requests == 0
            && self.out.is_empty()
            && self.deferred.is_empty()
            && self.streaming.is_none()
            && (sent || !unsent)
            && self.closing.is_none()
    }
}
