//! Goal: differencing disks name their parents as others expect, and are refused when something is missing. Method: images of
//! ours, described and opened again; a chain of three in a model; options of `create`.

use super::*;
use crate::driver::Identity;
use crate::error::ErrorKind;
use crate::vhd::footer::Footer;

#[test]
fn a_parent_is_recorded_in_all_ways() {
    let (parent, child) = (empty(), empty());
    create(&parent, Some(10 << 20), None, &[("uuid", "00112233-4455-6677-8899-aabbccddeeff")]);
    let (mut link, size) = link_to(&parent, &["../base é.vhd", "/srv/base é.vhd"]);
    let uuid: [u8; 16] = std::array::from_fn(|at| at as u8 * 0x11);
    assert_eq!(link.identity, Some(Identity { uuid, modified: None }));
    link.identity = Some(Identity { uuid, modified: Some(1_700_000_000) });
    create(&child, None, Some((link.clone(), size)), &[]);
    let found = describe(&child);
    assert_eq!(found.size, 10 << 20);
    let backing = found.backing.unwrap();
    assert_eq!((backing.identity, backing.format.as_deref()), (link.identity, Some("vhd")));
    assert_eq!(backing.paths, ["../base é.vhd", "/srv/base é.vhd", "base é.vhd"]);
    assert_clean(&child);
    // Three locators with the platforms of XenServer's tools, each in whole sectors behind the tables.
    let header = crate::vhd::header::Header::parse(&block_on(child.read(512, 1024)).unwrap()).unwrap();
    let codes: Vec<[u8; 4]> = header.locators.iter().map(|entry| entry.platform).take(4).collect();
    assert_eq!(codes, [*b"MacX", *b"W2ku", *b"W2ru", [0; 4]]);
    assert_eq!(&header.parent_name[..8], [0, b'b', 0, b'a', 0, b's', 0, b'e']);
}

#[test]
fn raw_parents_have_no_uuid() {
    let child = empty();
    let link = Link { paths: vec!["base.img".to_owned()], format: Some("raw".to_owned()), identity: None };
    create(&child, None, Some((link, 3 << 20)), &[]);
    let found = describe(&child);
    let backing = found.backing.unwrap();
    assert_eq!((found.size, backing.format.as_deref(), backing.identity), (3 << 20, Some("raw"), None));
    assert_clean(&child);
}

#[test]
fn a_chain_is_refused_without_its_parent() {
    let (parent, child) = (empty(), empty());
    create(&parent, Some(1 << 20), None, &[]);
    create(&child, None, Some(link_to(&parent, &["p.vhd"])), &[]);
    assert_eq!(layer(&child, false, None).err().map(|error| error.kind), Some(ErrorKind::Missing));
    assert_eq!(layer(&parent, false, Some(1 << 20)).err().map(|error| error.kind), Some(ErrorKind::Invalid));
    let qcow2 = Link { paths: vec!["p".to_owned()], format: Some("qcow2".to_owned()), identity: None };
    let error = try_create(&empty(), None, Some((qcow2, 1 << 20)), &[]).unwrap_err();
    assert!(error.message.contains("qcow2") && error.message.contains("vhd and raw"), "{error}");
    let nameless = Link { paths: vec![], format: Some("raw".to_owned()), identity: None };
    assert_eq!(try_create(&empty(), None, Some((nameless, 512)), &[]).unwrap_err().kind, ErrorKind::Invalid);
}

#[test]
fn three_deep() {
    let files = [empty(), empty(), empty()];
    create(&files[0], Some(4 << 20), None, &[]);
    let mut model = vec![0u8; 4 << 20];
    let mut rng = fastrand::Rng::with_seed(3);
    for depth in 0..3 {
        if depth > 0 {
            create(&files[depth], None, Some(link_to(&files[depth - 1], &["p.vhd"])), &[]);
        }
        let open = |writable| {
            let layers = (0..=depth)
                .rev()
                .map(|at| layer(&files[at], writable && at == depth, (at > 0).then_some(4 << 20)).unwrap());
            Volume::new(layers.collect()).unwrap()
        };
        let volume = open(true);
        for _ in 0..60 {
            let offset = rng.u64(..8000) * 512;
            let sectors = 1 + rng.u64(..8);
            let bytes = nonzero(&mut rng, 512 * sectors);
            write(&volume, offset, &bytes).unwrap();
            model[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
        }
        block_on(volume.close()).unwrap();
        drop(volume);
        assert_clean(&files[depth]);
        assert_eq!(read(&open(false), 0, 4 << 20).unwrap(), model);
    }
}

#[test]
fn options_of_create() {
    for (options, creator, size) in [
        (&[][..], "tap 1.3", 10_000_384u64),
        (&[("block_size", "1M")], "qem2 5.3", 10_000_384),
        (&[("creator", "vpc")], "vpc 5.3", 10_000_896 / 34816 * 34816 + 34816),
        (&[("creator", "vpc"), ("force_size", "on")], "qem2 5.3", 10_000_384),
        (&[("creator", "vbox"), ("hidden", "on")], "vbox 4.3", 10_000_384),
        (&[("reserve", "on")], "tap 1.3", 10_000_384),
    ] {
        let file = empty();
        create(&file, Some(10_000_000), None, options);
        let found = describe(&file);
        let creators: Vec<_> = found.properties.iter().filter(|(name, _)| *name == "creator").collect();
        assert_eq!((creators[0].1.as_str(), found.size), (creator, size), "{options:?}");
        assert_clean(&file);
    }
    for (options, part) in [
        (&[("blocksize", "1M")][..], "blocksize"),
        (&[("block_size", "3M")], "power of two"),
        (&[("type", "differencing")], "dynamic or fixed"),
        (&[("creator", "tap"), ("block_size", "1M")], "blocks of 2M"),
        (&[("max_size", "1M")], "max_size"),
        (&[("uuid", "x")], "UUID"),
    ] {
        let error = try_create(&empty(), Some(10 << 20), None, options).unwrap_err();
        assert!(error.kind == ErrorKind::Invalid && error.message.contains(part), "{error}");
    }
    for (size, block) in [(2040 << 30, "2M"), (2040 << 30, "256k"), (32 << 20, "512")] {
        let file = empty();
        create(&file, Some(size), None, &[("block_size", block)]);
        let volume = volume(&file, true);
        write(&volume, size - 512, &[3; 512]).unwrap();
        assert_eq!(read(&volume, size - 1024, 1024).unwrap(), [[0; 512], [3; 512]].concat());
    }
    for (size, block) in [((2040 << 30) + 512, "2M"), (0, "2M"), (2040 << 30, "4096")] {
        assert!(try_create(&empty(), Some(size), None, &[("block_size", block)]).is_err(), "{size}");
    }
}

#[test]
fn growing_has_its_limits() {
    let file = empty();
    create(&file, Some(4 << 20), None, &[("max_size", "8M")]);
    let disk = volume(&file, true);
    assert!(block_on(disk.resize(2 << 20)).unwrap_err().message.contains("smaller"));
    let error = block_on(disk.resize(10 << 20)).unwrap_err();
    assert!(error.message.contains("8388608") && error.message.contains("max_size"), "{error}");
    block_on(disk.resize(8 << 20)).unwrap();
    write(&disk, (8 << 20) - 512, &[1; 512]).unwrap();
    block_on(disk.close()).unwrap();
    assert_eq!(describe(&file).size, 8 << 20);
    // A saved state forbids it.
    let mut footer = Footer::parse(&block_on(file.read(0, 512)).unwrap()).unwrap();
    footer.saved_state = 1;
    let bytes = Buf::copy_of(&footer.to_bytes());
    block_on(file.write(0, bytes.clone())).unwrap();
    block_on(file.write(file.length() - 512, bytes)).unwrap();
    assert!(block_on(volume(&file, true).resize(8 << 20)).unwrap_err().message.contains("saved state"));
}
