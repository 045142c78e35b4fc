//! Tests of the qcow2 driver against QEMU, against a model, and with damaged images.

pub(crate) mod compressed;
mod conformance;
mod damaged;
mod model;
mod offline;
mod peers;
pub(crate) mod rig;
mod subclusters;
