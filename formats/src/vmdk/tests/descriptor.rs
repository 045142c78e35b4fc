//! Goal: a descriptor means what it says or is refused with its line; a change touches nothing else. Method: texts of VMware, QEMU and ESX,
//! each spoilt in one place.

use super::super::descriptor::{Access, Descriptor, Kind, New, compose};

const SPLIT: &str = "# Disk DescriptorFile\r
version=1\r
encoding=\"UTF-8\"\r
CID=123abc\r
parentCID=ffffffff\r
isNativeSnapshot=\"no\"\r
createType=\"2GbMaxExtentSparse\"\r
\r
# Extent description\r
RW 4192256 SPARSE \"a disk=1-s001.vmdk\"\r
RW 2048 FLAT \"b.vmdk\" 128\r
RDONLY 512 ZERO \r
RW 63 VMFS \"esx-flat.vmdk\"\r
\r
# The Disk Data Base \r
#DDB\r
\r
ddb.adapterType = \"lsilogic\"\r
ddb.virtualHWVersion = \"7\"\r
ddb.geometry.heads = \"255\"\r
";

fn parse(text: &str) -> Result<Descriptor, String> {
    Descriptor::parse("d.vmdk", text.as_bytes()).map_err(|error| error.message)
}

#[test]
fn what_others_write_is_understood() {
    let parsed = parse(SPLIT).unwrap();
    assert_eq!(
        parsed.cid.as_ref().map(|(cid, at)| (*cid, &SPLIT[at.clone()])),
        Some((0x0012_3abc, "123abc"))
    );
    assert_eq!((parsed.parent_cid, parsed.create_type.as_str()), (None, "2GbMaxExtentSparse"));
    assert_eq!((parsed.adapter.as_deref(), parsed.hardware.as_deref()), (Some("lsilogic"), Some("7")));
    let extents: Vec<_> = parsed
        .extents
        .iter()
        .map(|extent| {
            (extent.access, extent.bytes / 512, extent.kind, extent.file.as_str(), extent.offset / 512)
        })
        .collect();
    use Access::{ReadOnly, ReadWrite};
    assert_eq!(
        extents,
        [
            (ReadWrite, 4_192_256, Kind::Sparse, "a disk=1-s001.vmdk", 0),
            (ReadWrite, 2048, Kind::Flat, "b.vmdk", 128),
            (ReadOnly, 512, Kind::Zero, "", 0),
            (ReadWrite, 63, Kind::Flat, "esx-flat.vmdk", 0),
        ]
    );
    // What is behind a NUL is padding.
    let padded = [SPLIT.as_bytes(), &[0; 100], b"junk"].concat();
    assert_eq!(Descriptor::parse("d", &padded).unwrap(), parsed);
}

/// Each line: what is replaced, by what, and what is said.
#[test]
fn what_is_wrong_is_said_with_its_line() {
    let many = "RW 1 FLAT \"a\" 0\n".repeat(1025);
    let table: &[(&str, &str, &str)] = &[
        ("CID=123abc", "CID=xyz", "line 4"),
        ("CID=123abc", "CID=+1", "hexadecimal"),
        ("CID=123abc", "CID=123456789", "8 hexadecimal digits"),
        ("isNativeSnapshot=\"no\"", "CID=1", "again"),
        ("isNativeSnapshot=\"no\"", "what is this", "line 6"),
        ("isNativeSnapshot=\"no\"", "encryption.keySafe = \"x\"", "encrypted"),
        ("isNativeSnapshot=\"no\"", "ddb.iofilters = \"vmwarevmcrypt\"", "vmwarevmcrypt"),
        ("version=1", "version=4", "version"),
        ("2GbMaxExtentSparse", "fullDevice", "fullDevice"),
        ("2GbMaxExtentSparse", "seSparse", "seSparse"),
        ("createType", "type", "createType"),
        ("RW 4192256", "RW 0", "sectors"),
        ("RW 4192256", "RW -1", "sectors"),
        ("RW 4192256", "RW 36028797018963968", "sectors"),
        ("RW 4192256", "RW 18446744073709551615", "sectors"),
        ("RW 4192256", "NOACCESS 4192256", "NOACCESS"),
        ("SPARSE", "SESPARSE", "SESPARSE"),
        ("SPARSE", "VMFSRDM", "VMFSRDM"),
        ("\"a disk=1-s001.vmdk\"", "\"a disk", "quotes"),
        ("\"a disk=1-s001.vmdk\"", "\"\"", "no name"),
        ("\" 128", "\" x", "place"),
        ("\" 128", "\" 36028797018963968", "place"),
        ("RW 2048", &many, "1024 extents"),
    ];
    for (from, to, words) in table {
        let spoilt = SPLIT.replacen(from, to, 1);
        assert_ne!(spoilt, SPLIT, "{from}");
        let said = parse(&spoilt).unwrap_err();
        assert!(said.contains(words) && said.contains("d.vmdk"), "{to}: {said}");
    }
    let latin =
        SPLIT.as_bytes().iter().map(|byte| if *byte == b'b' { 0xe9 } else { *byte }).collect::<Vec<_>>();
    assert!(Descriptor::parse("d", &latin).unwrap_err().message.contains("UTF-8"));
}

#[test]
fn changes_leave_the_rest_where_it_is() {
    let extents = ["RW 2048 SPARSE \"a.vmdk\"".to_owned()];
    let database = [("adapterType", "ide".to_owned())];
    let new =
        New { cid: 7, parent: None, create_type: "monolithicSparse", extents: &extents, database: &database };
    let text = compose(&new).unwrap();
    let first = Descriptor::parse("d", &text).unwrap();
    assert_eq!((first.cid.clone().map(|cid| cid.0), first.size()), (Some(7), 1 << 20));
    let with_parent = first.with_parent(Some((0xabc, "../p q.vmdk"))).unwrap();
    let second = Descriptor::parse("d", &with_parent).unwrap();
    assert_eq!((second.parent_cid, second.parent_hint.as_deref()), (Some(0xabc), Some("../p q.vmdk")));
    assert_eq!((with_parent.len(), &with_parent[512..]), (text.len(), &text[512..]), "only the first sector");
    let without = second.with_parent(None).unwrap();
    let third = Descriptor::parse("d", &without).unwrap();
    assert_eq!((third.parent_cid, third.parent_hint, &without[..]), (None, None, &text[..]));
    let grown = Descriptor::parse("d", &first.with_last_size(123 << 30)).unwrap();
    assert_eq!((grown.size(), grown.extents[0].file.as_str()), (123 << 30, "a.vmdk"));
    // QEMU drops what is between the two identities.
    let lines: Vec<&str> = std::str::from_utf8(&with_parent).unwrap().lines().collect();
    let at = lines.iter().position(|line| line.starts_with("CID=")).unwrap();
    assert!(lines[at + 1].starts_with("parentCID="), "{lines:?}");
    // A text of others, without room: everything else stays.
    let other = parse(SPLIT).unwrap();
    let changed = parse(std::str::from_utf8(&other.with_parent(Some((1, "x"))).unwrap()).unwrap()).unwrap();
    assert_eq!(
        (changed.extents.len(), changed.parent_cid, changed.cid.map(|cid| cid.0)),
        (4, Some(1), Some(0x0012_3abc))
    );
}
