//! Tests of the qcow2 driver against QEMU, against a model, and with damaged images.

mod compressed;
mod conformance;
mod damaged;
mod model;
mod offline;
mod peers;
mod rig;
mod subclusters;
