//! Which mount a path is on, found without touching the mount: by text, from `/proc/self/mountinfo`
//! (proc(5)).
//!
//! Asking the kernel about the path itself (stat, statfs, realpath) would hang on a dead mount; that is the
//! very thing to be found out. The text is right when the path has no symbolic links; [`super::opener`]
//! removes them one mount at a time.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `MAJOR:MINOR` of the file system: the same for all places where it is mounted.
    pub device: String,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Type of the file system: `ext4`, `nfs4`.
    pub fs_type: String,
    /// What is mounted: `/dev/sda1`, `server:/export`.
    pub source: String,
}

/// All mounts that this process sees, at one instant.
#[derive(Debug, Clone, Default)]
pub struct Mounts(Vec<Arc<Mount>>);

impl Mounts {
    /// Reads `/proc/self/mountinfo`.
    pub fn read() -> io::Result<Mounts> {
        let mut mounts = Mounts::parse(&std::fs::read("/proc/self/mountinfo")?);
        if mounts.of(Path::new("/")).is_none() {
            mounts.add_root(nix::sys::stat::stat("/")?.st_dev);
        }
        Ok(mounts)
    }

    /// In a chroot `/` may be a plain directory, and the kernel then leaves out the mount that it lies on. What no line covers
    /// is on that file system; its number is all that can be known of it. Asking for it is safe: were `/` on a mount that
    /// hangs, this process would not run.
    fn add_root(&mut self, device: u64) {
        use nix::sys::stat::{major, minor};
        self.0.push(Arc::new(Mount {
            device: format!("{}:{}", major(device), minor(device)),
            point: "/".into(),
            fs_type: "the file system of /".into(),
            source: "an unlisted mount".into(),
        }));
    }

    /// Parses mountinfo text; a line that is not understood is left out.
    pub fn parse(text: &[u8]) -> Mounts {
        Mounts(text.split(|&b| b == b'\n').filter_map(parse_line).map(Arc::new).collect())
    }

    /// The mount of an absolute path without symbolic links and `..`: the longest mount point that is a
    /// prefix of it, and of several mounted on one point the last, which hides the others.
    pub fn of(&self, path: &Path) -> Option<Arc<Mount>> {
        let on_path = self.0.iter().filter(|mount| path.starts_with(&mount.point));
        on_path.max_by_key(|mount| mount.point.components().count()).cloned()
    }

    /// Where the block device `major:minor` is mounted; `name` is its node, for file systems that hide the
    /// number (btrfs).
    pub fn of_device(&self, major_minor: &str, name: &Path) -> Option<Arc<Mount>> {
        self.0.iter().find(|mount| mount.device == major_minor || Path::new(&mount.source) == name).cloned()
    }
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let device = fields.nth(2)?;
    let point = fields.nth(1)?;
    // Optional fields end with a lone "-"; then type and source.
    fields.find(|field| *field == b"-")?;
    let fs_type = fields.next()?;
    let source = fields.next()?;
    Some(Mount {
        device: String::from_utf8(device.to_vec()).ok()?,
        point: PathBuf::from(OsString::from_vec(unescape(point))),
        fs_type: String::from_utf8_lossy(fs_type).into_owned(),
        source: String::from_utf8_lossy(&unescape(source)).into_owned(),
    })
}

/// The kernel writes space, tab, newline and backslash as three octal digits behind a backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let code = tail.get(..3).filter(|_| byte == b'\\').and_then(|digits| {
            let text = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(text, 8).ok()
        });
        match code {
            Some(code) => {
                out.push(code);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"27 1 254:0 / / rw - ext4 /dev/root rw\n\
        30 27 0:39 / /mnt rw,relatime shared:7 master:1 - nfs4 srv:/x rw\n\
        31 27 0:40 / /mnt rw - tmpfs none rw\n\
        32 31 8:1 / /mnt/with\\040space rw - xfs /dev/sda1 rw\n\
        broken line\n";

    /// Goal: the mount that really holds a path is found from the text alone, component by component.
    /// Method: a text with stacked mounts, escapes, optional fields and rubbish.
    #[test]
    fn longest_prefix_and_last_mounted_wins() {
        let mounts = Mounts::parse(TEXT);
        let fs_type = |path: &str| mounts.of(Path::new(path)).map(|m| m.fs_type.clone()).unwrap_or_default();
        assert_eq!(fs_type("/etc/passwd"), "ext4");
        assert_eq!(fs_type("/mnt/disk.img"), "tmpfs");
        assert_eq!(fs_type("/mntx"), "ext4", "a prefix of the text that is no component does not count");
        assert_eq!(fs_type("/mnt/with space/a"), "xfs");
        assert_eq!(mounts.0.len(), 4);
    }

    /// Goal: in a chroot, where `/` is no mount, a path has a lane all the same: that of the root's device; mounts inside keep
    /// theirs. Method: a text without `/`.
    #[test]
    fn what_no_mount_covers_is_on_the_root() {
        let chroot = b"30 27 0:39 / /proc rw - proc proc rw\n31 27 0:40 / /images rw - nfs4 srv:/x rw\n";
        let mut mounts = Mounts::parse(chroot);
        assert_eq!(mounts.of(Path::new("/srv/disk.img")), None);
        mounts.add_root(nix::sys::stat::makedev(254, 1));
        let of =
            |path: &str| mounts.of(Path::new(path)).map(|mount| (mount.device.clone(), mount.point.clone()));
        assert_eq!(of("/srv/disk.img"), Some(("254:1".into(), "/".into())));
        assert_eq!(of("/"), Some(("254:1".into(), "/".into())));
        assert_eq!(of("/images/disk.img"), Some(("0:40".into(), "/images".into())));
        assert_eq!(of("/imagesx"), Some(("254:1".into(), "/".into())));
        assert!(Mounts::read().expect("readable").of(Path::new("/no/such/thing")).is_some());
    }

    /// Goal: the user of a device is found by number and by node name. Method: the same text.
    #[test]
    fn device_is_found_by_number_or_name() {
        let mounts = Mounts::parse(TEXT);
        assert!(mounts.of_device("8:1", Path::new("/dev/none")).is_some());
        assert!(mounts.of_device("9:9", Path::new("/dev/sda1")).is_some());
        assert!(mounts.of_device("9:9", Path::new("/dev/sdb")).is_none());
    }
}
