//! Which device: domain and number, the paths of both ends, and the names of virtual disks (`xvda`).
//!
//! Invariant: every path is made of a domain's and a device's number. None is ever read from XenStore, where a guest could have
//! written it (advisories XSA-175 and 178).

use std::fmt;

/// A domain's number.
pub type Domid = u16;

/// Domain numbers from here on are special.
pub const DOMID_FIRST_RESERVED: Domid = 0x7ff0;

/// Who named the backend directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `backend/vbd3`: libxl's `tap`, XAPI, and what we make ourselves.
    Vbd3,
    /// `backend/vbd`: libxl's `phy`, which the kernel's blkback serves where it is loaded.
    Vbd,
}

impl Kind {
    /// Both.
    pub const ALL: [Kind; 2] = [Kind::Vbd3, Kind::Vbd];

    /// The name in paths.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Vbd3 => "vbd3",
            Kind::Vbd => "vbd",
        }
    }
}

/// One virtual disk of one domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId {
    /// The kind of backend.
    pub kind: Kind,
    /// The guest.
    pub domid: Domid,
    /// The number of the device, see [`devid_of`].
    pub devid: u32,
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind.name(), self.domid, self.devid)
    }
}

impl DeviceId {
    /// The device of `5/51712` below a backend directory, if it is written as toolstacks do.
    pub fn parse(kind: Kind, below: &str) -> Option<DeviceId> {
        let (domid, devid) = below.split_once('/')?;
        let domid = number(domid)?;
        let domid = Domid::try_from(domid).ok().filter(|domid| *domid < DOMID_FIRST_RESERVED)?;
        Some(DeviceId { kind, domid, devid: number(devid)? })
    }

    /// The device of the variable `XENBUS_PATH` of a script: `backend/vbd/5/51712`, with or without our own domain before it.
    pub fn from_xenbus_path(path: &str) -> Option<DeviceId> {
        let (_, below) = path.rsplit_once("backend/")?;
        let (kind, below) = below.split_once('/')?;
        let kind = Kind::ALL.into_iter().find(|known| known.name() == kind)?;
        DeviceId::parse(kind, below)
    }

    /// `/local/domain/0/backend/vbd3/5/51712`, when we are in domain `own`.
    pub fn backend(&self, own: Domid) -> String {
        format!("{}/{}/{}", backend_root(own, self.kind), self.domid, self.devid)
    }

    /// `/local/domain/5/device/vbd/51712`.
    pub fn frontend(&self) -> String {
        format!("/local/domain/{}/device/vbd/{}", self.domid, self.devid)
    }

    /// Where errors of this device are told, as drivers of the kernel do.
    pub fn error(&self, own: Domid) -> String {
        format!("/local/domain/{own}/error/backend/{}/{}/{}", self.kind.name(), self.domid, self.devid)
    }
}

/// The directory of all backends of a kind.
pub fn backend_root(own: Domid, kind: Kind) -> String {
    format!("/local/domain/{own}/backend/{}", kind.name())
}

/// A decimal number without sign, blank or leading zeros.
fn number(text: &str) -> Option<u32> {
    let plain = text.len() <= 10 && text.bytes().all(|byte| byte.is_ascii_digit());
    (plain && (text == "0" || !text.starts_with('0'))).then(|| text.parse().ok()).flatten()
}

/// Numbers of devices are below this.
const DEVID_END: u32 = 1 << 29;

/// A disk's bus, its major number, and the bits and bounds of its numbers: `docs/man/xen-vbd-interface.7`.
struct Bus {
    prefix: &'static str,
    base: u32,
    shift: u32,
    disks: std::ops::Range<u32>,
    /// The first disk of this row.
    first: u32,
}

const BUSES: [Bus; 5] = [
    Bus { prefix: "xvd", base: 202 << 8, shift: 4, disks: 0..16, first: 0 },
    Bus { prefix: "xvd", base: 1 << 28, shift: 8, disks: 0..(1 << 20), first: 0 },
    Bus { prefix: "sd", base: 8 << 8, shift: 4, disks: 0..16, first: 0 },
    Bus { prefix: "hd", base: 3 << 8, shift: 6, disks: 0..2, first: 0 },
    Bus { prefix: "hd", base: 22 << 8, shift: 6, disks: 2..4, first: 2 },
];

/// The number of a virtual disk: of `xvda`, `xvda1`, `sdb`, `hdc`, `d0`, `d0p1`, or of a number as such (`51712`, `0xca00`).
///
/// The error is a sentence.
pub fn devid_of(vdev: &str) -> Result<u32, String> {
    let wrong = || {
        format!(
            "the virtual device {:?} is none: expected xvda (xvdb, …, xvda1), sda, hda, d0p1, or a number as in XenStore",
            super::wire::shown(vdev.as_bytes())
        )
    };
    let plain = match vdev.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok().filter(|_| !hex.starts_with('+')),
        None => number(vdev),
    };
    if let Some(devid) = plain {
        return if devid < DEVID_END { Ok(devid) } else { Err(wrong()) };
    }
    if let Some(rest) = vdev.strip_prefix('d').filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
        let (disk, partition) = rest.split_once('p').unwrap_or((rest, "0"));
        let (disk, partition) = (number(disk).ok_or_else(wrong)?, number(partition).ok_or_else(wrong)?);
        return encode(&BUSES[..2], disk, partition).ok_or_else(wrong);
    }
    let prefix = ["xvd", "sd", "hd"].into_iter().find(|prefix| vdev.starts_with(prefix)).ok_or_else(wrong)?;
    let rest = &vdev[prefix.len()..];
    let letters = rest.bytes().take_while(u8::is_ascii_lowercase).count();
    let disk = disk_of_letters(&rest[..letters]).ok_or_else(wrong)?;
    let partition = match &rest[letters..] {
        "" => 0,
        text => number(text).filter(|partition| *partition > 0).ok_or_else(wrong)?,
    };
    let buses = BUSES.iter().position(|bus| bus.prefix == prefix).map_or(&[][..], |first| &BUSES[first..]);
    let end = buses.iter().take_while(|bus| bus.prefix == prefix).count();
    encode(&buses[..end], disk, partition).ok_or_else(wrong)
}

/// The first row that has room for both numbers.
fn encode(buses: &[Bus], disk: u32, partition: u32) -> Option<u32> {
    let bus = buses.iter().find(|bus| bus.disks.contains(&disk) && partition < 1 << bus.shift)?;
    Some(bus.base | (disk - bus.first) << bus.shift | partition)
}

/// `a` is 0, `z` 25, `aa` 26.
fn disk_of_letters(letters: &str) -> Option<u32> {
    if letters.is_empty() || letters.len() > 5 {
        return None;
    }
    Some(letters.bytes().fold(0u32, |sum, letter| sum * 26 + u32::from(letter - b'a') + 1) - 1)
}

/// The name of a number, as Linux guests call it; the number itself where it has none.
pub fn vdev_of(devid: u32) -> String {
    for bus in &BUSES {
        let bits = devid ^ bus.base;
        let disk = bus.first + (bits >> bus.shift);
        if bus.disks.contains(&disk)
            && encode(std::slice::from_ref(bus), disk, bits & ((1 << bus.shift) - 1)) == Some(devid)
        {
            let partition = bits & ((1 << bus.shift) - 1);
            let suffix = if partition == 0 { String::new() } else { partition.to_string() };
            return format!("{}{}{suffix}", bus.prefix, letters_of_disk(disk));
        }
    }
    devid.to_string()
}

fn letters_of_disk(disk: u32) -> String {
    let mut letters = Vec::new();
    let mut rest = disk + 1;
    while rest > 0 {
        letters.push((b'a' + ((rest - 1) % 26) as u8) as char);
        rest = (rest - 1) / 26;
    }
    letters.iter().rev().collect()
}

#[cfg(test)]
mod tests {
    //! Goal: names and numbers are those of the manual page, both ways; paths come of numbers only.
    //! Method: numbers worked out by hand from the formulas, and a round trip over all disks.

    use super::*;

    #[test]
    fn numbers_are_those_of_the_manual() {
        for (name, devid) in [
            ("xvda", 51712),
            ("xvda1", 51713),
            ("xvdb", 51728),
            ("xvdp15", 51967),
            ("xvda16", 1 << 28 | 16),
            ("xvdq", 1 << 28 | 16 << 8),
            ("xvdaa", 1 << 28 | 26 << 8),
            ("sda", 2048),
            ("sdb3", 2067),
            ("hda", 768),
            ("hdb", 832),
            ("hdc", 5632),
            ("hdd", 5696),
            ("hdd63", 5759),
            ("d0", 51712),
            ("d0p1", 51713),
            ("d16", 1 << 28 | 16 << 8),
            ("51712", 51712),
            ("0xca00", 51712),
        ] {
            assert_eq!(devid_of(name), Ok(devid), "{name}");
        }
    }

    #[test]
    fn rubbish_is_refused_by_name() {
        for name in [
            "",
            "xvd",
            "xvdA",
            "xvda0",
            "xvda01",
            "sdq",
            "sda16",
            "hde",
            "hda64",
            "vda",
            "d",
            "dx",
            "d0p",
            "0x",
            "-1",
            "+5",
            "4294967296",
            "536870912",
            "xvdaaaaaa",
            "xvda256",
            "xvd\u{e4}",
            "0x+5",
            "a\x1b",
        ] {
            assert!(devid_of(name).unwrap_err().contains("expected xvda"), "{name}");
        }
    }

    #[test]
    fn names_come_back() {
        let wide = (0..2000).map(|disk| if disk < 16 { 202 << 8 | disk << 4 } else { 1 << 28 | disk << 8 });
        for devid in wide.chain([768, 832, 5632, 5696, 2048, 51713, 1 << 28 | 16]) {
            assert_eq!(devid_of(&vdev_of(devid)), Ok(devid), "{}", vdev_of(devid));
        }
        assert_eq!(vdev_of(51712), "xvda");
        assert_eq!(vdev_of(5632), "hdc");
        assert_eq!(vdev_of(99), "99");
    }

    #[test]
    fn devices_are_parsed_strictly() {
        let id = DeviceId { kind: Kind::Vbd3, domid: 5, devid: 51712 };
        assert_eq!(DeviceId::parse(Kind::Vbd3, "5/51712"), Some(id));
        for text in
            ["5", "5/", "/5", "5/x", "05/1", "5/1/2", "5/-1", "32752/1", "65541/51712", "5/4294967296"]
        {
            assert_eq!(DeviceId::parse(Kind::Vbd3, text), None, "{text}");
        }
        assert_eq!(id.backend(0), "/local/domain/0/backend/vbd3/5/51712");
        assert_eq!(id.frontend(), "/local/domain/5/device/vbd/51712");
        for path in ["backend/vbd3/5/51712", "/local/domain/0/backend/vbd3/5/51712"] {
            assert_eq!(DeviceId::from_xenbus_path(path), Some(id));
        }
        assert_eq!(DeviceId::from_xenbus_path("backend/vif/5/0"), None);
    }
}
