//! What a toolstack wrote about a device, and whether the device is ours to serve.
//!
//! The backend directory belongs to the toolstack and to us; a guest cannot write it. Still nothing in it names a path in XenStore
//! that we follow: the frontend's path is checked against the one that the device's numbers give.

use super::device::{DeviceId, Domid, Kind};
use super::wire::shown;

/// The script whose devices are ours.
pub const SCRIPT: &str = "block-blktapd";

/// The node that marks a device that we made ourselves; its value is the disk's name.
pub const MARK: &str = "blktapd-disk";

/// The nodes that are read, below the backend directory.
pub const NAMES: [&str; 13] = [
    "state",
    "frontend",
    "frontend-id",
    "script",
    "params",
    "mode",
    "device-type",
    "removable",
    "discard-enable",
    "direct-io-safe",
    "specification",
    "type",
    MARK,
];

/// A disk for a guest, as somebody asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// For which device.
    pub id: DeviceId,
    /// The image, without a leading `aio:`: in the grammar of images if it begins with a known type, else a raw path. Empty when
    /// we made the device ourselves.
    pub params: String,
    /// The disk that `ctl attach` made the device for.
    pub disk: Option<String>,
    /// Its script is ours, and waits for the disk; see [`super::backend::Backend::claim`].
    pub by_script: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// The guest shall see a CD drive.
    pub cdrom: bool,
    /// The guest shall see a removable disk.
    pub removable: bool,
    /// The toolstack did not forbid discard.
    pub discard: bool,
    /// The toolstack permits I/O straight from the guest's pages.
    pub direct_io_safe: bool,
}

/// Whose device it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// Ours.
    Us(Wanted),
    /// Not ours, and why, for the operator.
    Other(String),
    /// The directory is gone, or not finished.
    Nobody,
}

/// Reads the values of [`NAMES`].
pub fn read(id: DeviceId, values: &[Option<Vec<u8>>]) -> Owner {
    let text = |name: &str| -> Option<String> {
        let at = NAMES.iter().position(|known| *known == name)?;
        Some(String::from_utf8_lossy(values.get(at)?.as_deref()?).into_owned())
    };
    let flag = |name: &str, otherwise: bool| text(name).map_or(otherwise, |value| value == "1");
    if text("state").is_none() {
        return Owner::Nobody;
    }
    let script = text("script");
    let script = script.as_deref().map(|path| path.rsplit('/').next().unwrap_or(path));
    let disk = text(MARK);
    let is_ours = match (id.kind, script) {
        _ if disk.is_some() => Ok(()),
        (_, Some(SCRIPT)) | (Kind::Vbd3, None) => Ok(()),
        (_, Some(other)) => {
            Err(format!("its script is {}: devices of blktapd have script={SCRIPT}", shown(other.as_bytes())))
        }
        (Kind::Vbd, None) => Err(format!("it has no script: devices of blktapd have script={SCRIPT}")),
    };
    if let Err(reason) = is_ours {
        return Owner::Other(reason);
    }
    if text("specification").is_some_and(|value| value != "xen") {
        return Owner::Other("its specification is virtio: blktapd serves Xen's own block protocol".into());
    }
    let domid = id.domid.to_string();
    for (name, expected) in [("frontend", &id.frontend()), ("frontend-id", &domid)] {
        match text(name) {
            Some(found) if found == *expected => {}
            found => {
                let found = found.map_or("missing".into(), |found| shown(found.as_bytes()));
                return Owner::Other(format!("its {name} is {found}; expected {expected}"));
            }
        }
    }
    let params = text("params").unwrap_or_default();
    if params.is_empty() && disk.is_none() {
        return Owner::Other("it has no params, so there is no image to serve".into());
    }
    Owner::Us(Wanted {
        id,
        params: params.strip_prefix("aio:").unwrap_or(&params).to_owned(),
        disk,
        by_script: script == Some(SCRIPT),
        // `w` and `w!` write; whatever else there may be does not.
        read_only: !text("mode").is_some_and(|mode| mode.starts_with('w')),
        cdrom: text("device-type").is_some_and(|value| value == "cdrom"),
        removable: flag("removable", false),
        discard: flag("discard-enable", true),
        direct_io_safe: flag("direct-io-safe", false),
    })
}

/// The paths of [`NAMES`].
pub fn paths(id: DeviceId, own: Domid) -> Vec<String> {
    let backend = id.backend(own);
    NAMES.iter().map(|name| format!("{backend}/{name}")).collect()
}

#[cfg(test)]
mod tests {
    //! Goal: which devices are ours, and what their nodes mean. Method: directories by hand.

    use super::*;

    const ID: DeviceId = DeviceId { kind: Kind::Vbd3, domid: 5, devid: 51712 };

    fn owner(kind: Kind, extra: &[(&str, &str)]) -> Owner {
        let mut nodes = vec![
            ("state", "1"),
            ("frontend", "/local/domain/5/device/vbd/51712"),
            ("frontend-id", "5"),
            ("params", "aio:/srv/a.img"),
            ("mode", "w"),
        ];
        nodes.retain(|(name, _)| !extra.iter().any(|(other, _)| other == name));
        nodes.extend(extra.iter().filter(|(_, value)| *value != "-"));
        let values: Vec<_> = NAMES
            .iter()
            .map(|name| {
                nodes.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_bytes().to_vec())
            })
            .collect();
        read(DeviceId { kind, ..ID }, &values)
    }

    fn ours(kind: Kind, extra: &[(&str, &str)]) -> Wanted {
        match owner(kind, extra) {
            Owner::Us(wanted) => wanted,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn scripts_decide() {
        ours(Kind::Vbd3, &[]);
        ours(Kind::Vbd3, &[("script", "/etc/xen/scripts/block-blktapd")]);
        ours(Kind::Vbd, &[("script", "block-blktapd")]);
        for (kind, script) in
            [(Kind::Vbd, "block"), (Kind::Vbd3, "/etc/xen/scripts/block-tap"), (Kind::Vbd, "-")]
        {
            assert!(
                matches!(owner(kind, &[("script", script)]), Owner::Other(why) if why.contains("script"))
            );
        }
        assert_eq!(owner(Kind::Vbd3, &[("state", "-")]), Owner::Nobody);
        let made = ours(Kind::Vbd3, &[(MARK, "web1"), ("params", "-")]);
        assert_eq!(made.disk.as_deref(), Some("web1"));
    }

    #[test]
    fn nodes_mean_what_toolstacks_mean() {
        let wanted = ours(Kind::Vbd3, &[]);
        assert_eq!((wanted.params.as_str(), wanted.read_only, wanted.discard), ("/srv/a.img", false, true));
        assert!(!wanted.direct_io_safe && !wanted.removable && !wanted.cdrom);
        let other = [
            ("mode", "r"),
            ("params", "vhd:/srv/a:b.vhd"),
            ("device-type", "cdrom"),
            ("removable", "1"),
            ("discard-enable", "0"),
            ("direct-io-safe", "1"),
        ];
        let wanted = ours(Kind::Vbd3, &other);
        assert_eq!(
            (wanted.params.as_str(), wanted.read_only, wanted.discard),
            ("vhd:/srv/a:b.vhd", true, false)
        );
        assert!(wanted.direct_io_safe && wanted.removable && wanted.cdrom);
        assert!(!ours(Kind::Vbd3, &[("mode", "w!")]).read_only);
        assert!(ours(Kind::Vbd3, &[("mode", "-")]).read_only);
        assert_eq!(ours(Kind::Vbd3, &[("params", "aio:aio:/x")]).params, "aio:/x");
    }

    #[test]
    fn a_frontend_elsewhere_is_refused_by_name() {
        for (name, value) in [
            ("frontend", "/local/domain/6/device/vbd/51712"),
            ("frontend", "-"),
            ("frontend-id", "6"),
            ("params", "-"),
            ("specification", "virtio"),
        ] {
            assert!(matches!(owner(Kind::Vbd3, &[(name, value)]), Owner::Other(why) if why.contains(name)));
        }
    }
}
