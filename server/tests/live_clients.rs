//! Goal: the data path works with programs that we did not write: libnbd's tools, QEMU's, fio.
//! Method: a real daemon, real clients with deadlines, and their own verification; what they say of the disk is
//! compared with what the image file holds.

mod live_rig;

use live_rig::{Rig, raw, run};

const MIB: u64 = 1 << 20;

#[test]
fn nbdinfo_tells_what_the_disk_is() {
    let rig = Rig::start();
    let image = rig.image("d1.img", 64 * MIB);
    let uri = rig.attach("d1", &raw(&image), &[]);
    assert_eq!(run("nbdinfo", &["--size", &uri]).expect_ok().trim(), (64 * MIB).to_string());
}
