//! Message headers for sendmsg and recvmsg: a list of memory ranges at an address that stays.

/// Ranges of one message. Boxed parts keep their place when the owner moves.
#[derive(Debug)]
pub struct Message {
    header: Box<libc::msghdr>,
    ranges: Vec<libc::iovec>,
    /// Ranges before this one have been moved completely.
    first: usize,
}

impl Message {
    /// An empty message with room for `ranges` ranges.
    pub fn new(ranges: usize) -> Message {
        // SAFETY: all-zero is a valid msghdr (null pointers and zero lengths).
        let header = Box::new(unsafe { std::mem::zeroed::<libc::msghdr>() });
        Message { header, ranges: Vec::with_capacity(ranges), first: 0 }
    }

    /// Whether it has room for fewer than `ranges` ranges.
    pub fn is_small(&self, ranges: usize) -> bool {
        self.ranges.capacity() < ranges
    }

    /// Removes all ranges. No operation may be using them.
    pub fn clear(&mut self) {
        self.ranges.clear();
        self.first = 0;
    }

    /// Adds a range; false when there is no room.
    pub fn push(&mut self, addr: usize, len: usize) -> bool {
        if self.ranges.len() == self.ranges.capacity() {
            return false;
        }
        self.ranges.push(libc::iovec { iov_base: addr as *mut libc::c_void, iov_len: len });
        true
    }

    /// Bytes that are still to be moved.
    pub fn remaining(&self) -> usize {
        self.ranges[self.first..].iter().map(|range| range.iov_len).sum()
    }

    /// Marks the first `bytes` bytes as moved.
    pub fn advance(&mut self, mut bytes: usize) {
        while bytes > 0 && self.first < self.ranges.len() {
            let range = &mut self.ranges[self.first];
            let step = bytes.min(range.iov_len);
            range.iov_base = (range.iov_base as usize + step) as *mut libc::c_void;
            range.iov_len -= step;
            bytes -= step;
            if range.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// Address of the header for [`super::Op::SendMsg`] and [`super::Op::RecvMsg`]; valid until the message is changed.
    pub fn prepare(&mut self) -> usize {
        self.header.msg_iov = self.ranges[self.first..].as_mut_ptr();
        self.header.msg_iovlen = (self.ranges.len() - self.first) as _;
        std::ptr::from_mut::<libc::msghdr>(&mut self.header) as usize
    }
}

#[cfg(test)]
mod tests {
    //! Goal: a message that went out in parts goes on at the right byte. Method: advance over range borders.
    use super::*;

    #[test]
    fn advance_walks_over_ranges() {
        let mut message = Message::new(3);
        assert!(message.push(1000, 10) && message.push(2000, 5) && message.push(3000, 7));
        assert!(!message.push(4000, 1), "no room");
        message.advance(12);
        assert_eq!(message.remaining(), 10);
        assert_eq!(message.ranges[message.first].iov_base as usize, 2002);
        message.advance(10);
        assert_eq!(message.remaining(), 0);
    }
}
