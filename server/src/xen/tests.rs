//! Goal: the client, the devices and their making work over the real protocol, with a store that fails in every way it can, and with
//! guests and toolstacks of all kinds.
//! Method: a store in memory behind a Unix socket ([`super::fake`]); disks that note any call out of order ([`super::rig`]).

mod clients;
mod devices;
mod lives;
mod made;
