//! The Xen side of the control thread: what is said in XenStore, and to whom.
//!
//! ```text
//! wire        bytes of the protocol               transport   the socket, or the kernel's device
//! client      one connection, many callers        watches     what changed, as marks
//! batch       changes under conditions            device      numbers, paths, names of disks
//! spec        what the toolstack wrote            keys        what the frontend wrote
//! publish     what we tell the frontend           xenbus      the state machine, a pure function
//! backend     finding devices                     owner       one device's task
//! create      devices without a toolstack         host        who else serves disks here
//! ```
//! No ring, grant or event channel is touched here: [`backend::Disks`] is the way to the shards. What a guest wrote is copied once,
//! checked in [`keys`] and [`xenbus::XenbusState::parse`], and becomes numbers; nothing else of it gets further.

pub mod backend;
pub mod batch;
pub mod client;
pub mod create;
pub mod device;
pub mod host;
pub mod keys;
mod owner;
pub mod publish;
pub mod spec;
pub mod transport;
mod watches;
pub mod wire;
pub mod xenbus;

pub use watches::Changes;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod rig;
#[cfg(test)]
mod tests;
