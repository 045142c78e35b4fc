//! blkif, the block protocol of Xen guests: the backend's engine of one ring, over any memory, and both kinds of frontend.
//!
//! | file | is |
//! |---|---|
//! | [`wire`] | the bytes of requests and responses, in both layouts |
//! | [`request`] | what a request may ask, and its checks |
//! | [`inflight`] | the table of requests in flight, which outlives the process, and its recovery |
//! | [`ring`] | the backend's engine of one ring |
//! | [`frontend`] | a correct frontend, for tests and load |
//! | [`hostile`] | one that is not |
//! | [`client`] | one without Xen: memory, keys and queues |
//!
//! # One turn of a backend
//! ```text
//! event or completion ─▶ consume ─▶ Run(request)  ─▶ segments, grants, I/O ─▶ answer ─┐
//!                          ▲   └──▶ Fetch(grefs) ─▶ grant copy ─▶ supply ─▶ Run     │
//!                          │                                                        ▼
//!                          └──── true ── sleep ◀──── notify if it says so ◀──────── push
//! ```
//! A turn ends with [`push`](ring::Ring::push) and [`sleep`](ring::Ring::sleep); when `sleep` says true there is something to consume.
//! The engine makes no system call: grants and event channels are the caller's.
//!
//! # What a frontend can do to us
//! Nothing that it writes later changes what was checked: a request and its indirect segments are copied once, the copy is checked, stored in
//! the table and used. A wrong request is answered; a broken index stops this ring for good ([`ring::StopReason`]) and nothing else. The
//! engine reads only `req_prod` and `rsp_event` of the ring's header, never its own indices, and holds at most as many requests as the ring
//! has entries.
//!
//! Source: Xen's public headers `io/blkif.h`, `io/ring.h` and `io/protocols.h`; where they are silent, what Linux's drivers do.

pub mod client;
pub mod frontend;
pub mod hostile;
pub mod inflight;
pub mod request;
pub mod ring;
pub mod wire;
