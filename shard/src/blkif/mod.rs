//! Guests' blkif rings, served by the shard of their disk.
//!
//! ```text
//! event ─▶ take ─▶ [fetch segments] ─▶ pieces ─▶ [copy in] ─▶ Request ─▶ disk ─▶ answer ─▶ [copy out] ─▶ response ─▶ push, notify
//!          engine      one call         pool      one call                                 one call      engine
//! ```
//! A guest's device is the front of one disk with 1 to 8 rings, all on the disk's shard. Data never leaves or enters the kernel from guests'
//! pages: it is copied to and from buffers of the pool, by one call of the hypervisor for all rings of a turn, or through mappings that persist if
//! the guest offers these. So a guest that vanishes takes no memory from an operation that is under way, and what is written is what was
//! checked, encrypted or compressed.
//!
//! | file | is |
//! |---|---|
//! | [`connect`] | what is handed over when a guest connects, and what travels in a move |
//! | [`domains`] | the shard's access to guests' pages and ports |
//! | `ring` | one ring: from its engine's requests to those of the disk, and back |
//! | [`counters`] | metrics of a device |
//!
//! The reactor's share (which ring is looked at when, commands) is in `reactor::guests` and `reactor::rings`.
//!
//! # Rules
//! * One turn takes a bounded number of requests from a ring and starts a bounded number of bytes of a disk; the pool's half belongs to others;
//!   a ring without any buffer may always have one, so every ring gets on.
//! * A segment that cannot be copied is an ERROR of its request.
//! * A flush without data, once offered, is never answered ERROR: guests would take it for "no flush needed" from then on. One that fails is
//!   held until the disk is resumed or the guest goes. Of a flush or barrier with data, the data's failure is answered.
//! * A ring that its guest broke is stopped, and nothing else.

pub mod connect;
pub mod counters;
pub mod domains;
pub(crate) mod ring;

pub use connect::{GuestConnect, GuestInUse, Offer, QueueConnect, Realm, Transport};
pub use counters::{GuestCounters, GuestOp};
pub use domains::GrantAccounts;
