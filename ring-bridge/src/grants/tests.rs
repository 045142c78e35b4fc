//! What concerns the interface as a whole.

use super::*;

// Goal: a machine without Xen is explained, not crashed on; the daemon serves its other disks.
// Method: open the devices where there is no Xen (elsewhere the message is of another kind, or it opens).
#[test]
fn a_machine_without_xen_is_explained() {
    if let Err(error) = Domains::open_xen() {
        let text = error.to_string();
        assert!(text.starts_with("cannot open /dev/xen/"), "{text}");
        assert!(!text.contains('\n'), "one sentence: {text}");
        if !std::path::Path::new("/sys/hypervisor/type").exists() && error.errno == nix::errno::Errno::ENOENT
        {
            assert!(text.contains("does not run under Xen"), "{text}");
        }
    }
}

// Goal: a shard can be made on one thread and run on another, and what it mapped can be dropped anywhere.
#[test]
fn what_a_shard_owns_can_be_sent() {
    fn is_send<T: Send>() {}
    is_send::<Domains>();
    is_send::<Pages>();
    is_send::<persistent::Cache<Pages>>();
    is_send::<persistent::Lease<Pages>>();
    is_send::<memfd::ClientMemory>();
}
