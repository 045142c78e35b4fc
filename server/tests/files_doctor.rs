//! What `blktapd doctor` says of file systems and of a process that may do little.

mod files_rig;

use std::path::PathBuf;

use blktapd::files::doctor::{Report, Verdict, examine};
use files_rig::{Mounted, Rig, has_program, run, skip, takes_direct_io};

fn verdict(report: &Report, subject: &str) -> Verdict {
    let found = report.checks.iter().find(|check| check.subject == subject);
    found.unwrap_or_else(|| panic!("{subject} is not in\n{report}")).verdict
}

/// Goal: what a file system cannot do is said where it is known: tmpfs cannot zero ranges, ramfs has no
/// direct I/O. Method: mount both.
#[tokio::test]
async fn file_systems_differ() {
    let rig = Rig::new().await;
    let mount = |name: &str| Mounted::new(&rig.path(name), name, "none");
    let (tmpfs, ramfs) = match (mount("tmpfs"), mount("ramfs")) {
        (Ok(tmpfs), Ok(ramfs)) => (tmpfs, ramfs),
        (Err(why), _) | (_, Err(why)) => return skip("file_systems_differ", &why),
    };
    let of_tmpfs = if takes_direct_io(&tmpfs.point) { Verdict::Ok } else { Verdict::Warning };
    let report = examine(&[tmpfs.point.clone(), ramfs.point.clone()]);
    let of =
        |mounted: &Mounted, part: &str| verdict(&report, &format!("{}: {part}", mounted.point.display()));
    assert_eq!(of(&tmpfs, "holes"), Verdict::Warning, "{report}");
    assert_eq!(of(&tmpfs, "direct I/O"), of_tmpfs, "{report}");
    assert_eq!(of(&tmpfs, "locks"), Verdict::Ok, "{report}");
    assert_eq!(of(&ramfs, "direct I/O"), Verdict::Warning, "{report}");
    assert!(report.to_string().contains("?cache=writeback"), "{report}");
    for mounted in [&tmpfs, &ramfs] {
        assert_eq!(std::fs::read_dir(&mounted.point).expect("read").count(), 0, "nothing is left behind");
    }
}

const CHILD: &str = "BLKTAPD_TEST_DOCTOR";

/// Not a test: the process that `poor_process_is_told` starts.
#[test]
fn child_that_asks_the_doctor() {
    if std::env::var_os(CHILD).is_some() {
        println!("{}", examine(&[PathBuf::from("/proc/self")]));
    }
}

/// Goal: limits that are too low and a directory that takes no files are named, with what to set. Method: the
/// checks in a process without capabilities, with 64 KiB to lock and 128 descriptors.
#[tokio::test]
async fn poor_process_is_told() {
    if !has_program("capsh") {
        return skip("poor_process_is_told", "capsh is not installed");
    }
    let _rig = Rig::new().await;
    let program = std::env::current_exe().expect("this program");
    let script = format!(
        "ulimit -l 64; ulimit -n 128; {CHILD}=1 exec '{}' --exact child_that_asks_the_doctor --nocapture",
        program.display()
    );
    let (done, said) = run("capsh", &["--drop=cap_ipc_lock,cap_sys_resource", "--", "-c", &script]);
    if said.contains("ermission denied") {
        return skip("poor_process_is_told", &said);
    }
    assert!(done, "{said}");
    for part in [
        "64 KiB, without CAP_IPC_LOCK",
        "LimitMEMLOCK=",
        "128 (at most 128)",
        "LimitNOFILE=",
        "no file can be made in it",
        "blktapd cannot work here as it should",
    ] {
        assert!(said.contains(part), "{part:?} is missing in\n{said}");
    }
}
