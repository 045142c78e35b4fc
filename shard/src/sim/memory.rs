//! The simulated kernel's access to memory that operations name by address: the one unsafe place of the simulator.
//!
//! It stands in for Linux, which follows the same addresses. Their validity is the invariant of the module `storage` (memory
//! of an operation stays in place until its completion is taken); the simulator checks beforehand that file I/O is inside
//! of the shard's buffers.
#![allow(unsafe_code)]

/// Copies `bytes` to `addr`.
pub fn store(addr: usize, bytes: &[u8]) {
    // SAFETY: see the module: `addr` names at least `bytes.len()` writable bytes of an operation in flight, which nobody
    // else uses and which `bytes` (the simulator's own) does not overlap.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), addr as *mut u8, bytes.len()) }
}

/// Copies from `addr`, to fill `bytes`.
pub fn load(addr: usize, bytes: &mut [u8]) {
    // SAFETY: as in `store`, readable.
    unsafe { std::ptr::copy_nonoverlapping(addr as *const u8, bytes.as_mut_ptr(), bytes.len()) }
}

/// The ranges (address, length) of a message header.
pub fn ranges(header: usize) -> Vec<(usize, usize)> {
    // SAFETY: the address of a msghdr that its connection keeps in place while the operation is in flight; its vector of
    // ranges likewise.
    unsafe {
        let header = &*(header as *const libc::msghdr);
        let list = std::slice::from_raw_parts(header.msg_iov, header.msg_iovlen);
        list.iter().map(|range| (range.iov_base as usize, range.iov_len)).collect()
    }
}
