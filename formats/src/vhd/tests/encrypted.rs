//! Goal: encrypted VHDs of tapdisk are read and written as tapdisk does it, keep the promise of durability, and take their own key only.
//! Method: new images get the key hash that XenServer's tools would write; the conformance suite; sectors in the file compared with
//! another implementation of XTS.

use std::rc::Rc;

use aes::cipher::KeyInit;
use sha2::Digest;
use zerocopy::IntoBytes;

use crate::crypt::Secret;
use crate::driver::{Create, Description, Driver, Findings, Format, Open, Repair};
use crate::error::{Error, ErrorKind};
use crate::file::{Buf, ImageFile, Pending};
use crate::testing::conformance::all;
use crate::testing::oracle;
use crate::testing::rig::{Case, LayerCase, Rig, read_all, write};
use crate::vhd::Vhd;
use crate::vhd::batmap::{BatmapHeader, KeyHash, header_offset};
use crate::vhd::layout::Layout;

const MIB: u64 = 1 << 20;

/// VHDs that are encrypted from the start.
#[derive(Debug)]
struct Encrypted;

async fn set_key_hash(file: &Rc<dyn ImageFile>, method: u8, key: &[u8]) -> Result<(), Error> {
    let layout = Layout::read(file).await?;
    let at = header_offset(layout.header.as_ref().unwrap());
    let mut header = BatmapHeader::of(&file.read(at, 512).await?).unwrap();
    let nonce = [5; 32];
    let hash = sha2::Sha256::new().chain_update(nonce).chain_update(key).finalize().into();
    header.key_hash = KeyHash { method, nonce, hash };
    file.write(at, Buf::copy_of(header.as_bytes())).await?;
    file.flush().await
}

impl Format for Encrypted {
    fn name(&self) -> &'static str {
        "vhd"
    }
    fn recognises(&self, head: &[u8], tail: &[u8]) -> bool {
        Vhd.recognises(head, tail)
    }
    fn describe(&self, file: Rc<dyn ImageFile>) -> Pending<'_, Description> {
        Vhd.describe(file)
    }
    fn unlock<'a>(&'a self, file: Rc<dyn ImageFile>, key: &'a Secret) -> Pending<'a, Secret> {
        Vhd.unlock(file, key)
    }
    fn open(&self, open: Open) -> Pending<'_, Rc<dyn Driver>> {
        Vhd.open(open)
    }
    fn create<'a>(
        &'a self,
        file: Rc<dyn ImageFile>,
        data_files: Vec<Rc<dyn ImageFile>>,
        create: &'a Create,
    ) -> Pending<'a, ()> {
        Box::pin(async move {
            Vhd.create(file.clone(), data_files, create).await?;
            set_key_hash(&file, 1, create.key.as_ref().unwrap().bytes()).await
        })
    }
    fn check(&self, open: Open, repair: Option<Repair>) -> Pending<'_, Findings> {
        Vhd.check(open, repair)
    }
}

fn layer(size: u64, key_bytes: u8) -> LayerCase {
    let key = Some(Secret::new((0..key_bytes).collect()));
    LayerCase { key, ..LayerCase::new(&Encrypted, &[], size) }
}

fn passes(case: Case) {
    if let Err(error) = all(&case, Some(&oracle::judge)) {
        panic!("{error}");
    }
}

#[test]
fn encrypted_dynamic_disks_keep_the_promise() {
    passes(Case::new("vhd_encrypted", vec![layer(5 * MIB, 64)]));
}

#[test]
fn encrypted_dynamic_disks_keep_the_promise_with_a_log() {
    passes(Case::new("vhd_encrypted", vec![layer(5 * MIB, 32)]).logged(1000));
}

#[test]
fn encrypted_differencing_disks_keep_the_promise() {
    let below = LayerCase::new(&crate::raw_driver::Raw, &[], 3 * MIB);
    passes(Case::new("vhd_encrypted_on_raw", vec![layer(3 * MIB, 64), below]).logged(1000));
}

#[test]
fn sectors_are_those_of_tapdisk() {
    let rig = Rig::create(&Case::new("encrypted", vec![layer(5 * MIB, 64)]), 1).unwrap();
    let volume = rig.open(true).unwrap();
    let plain: Vec<u8> = (0..1024).map(|at| (at / 3) as u8).collect();
    let at = 2 * MIB + 7 * 512;
    rig.store.run(write(&volume, at, &plain)).unwrap();
    rig.store.run(volume.close()).unwrap();
    let key: Vec<u8> = (0..64).collect();
    let half = |from: usize| aes::Aes256::new_from_slice(&key[from..from + 32]).unwrap();
    let other = xts_mode::Xts128::new(half(0), half(32));
    let mut expected = plain.clone();
    other.encrypt_area(&mut expected, 512, (at / 512).into(), xts_mode::get_tweak_default);
    let file = rig.store.pages(0);
    let bytes = file.bytes(0..file.length());
    assert!(bytes.windows(1024).any(|part| part == expected), "they are in the file");
    assert!(!bytes.windows(100).any(|part| part == &plain[..100]));
    let volume = rig.open(false).unwrap();
    let disk = rig.store.run(read_all(&volume)).unwrap();
    assert_eq!(disk[at as usize..][..1024], plain);
    assert!(disk[..at as usize].iter().all(|byte| *byte == 0), "sectors that nobody wrote are zero");
}

#[test]
fn a_key_is_checked_and_a_repair_keeps_its_hash() {
    let rig = Rig::create(&Case::new("encrypted", vec![layer(MIB, 32)]), 1).unwrap();
    let file: Rc<dyn ImageFile> = rig.store.open(0, true);
    let unlock = |key: Vec<u8>| rig.store.run(Vhd.unlock(file.clone(), &Secret::new(key)));
    assert!(unlock((0..32).collect()).is_ok());
    for (key, word) in [(vec![1; 32], "right one"), (vec![1; 16], "16 bytes"), (vec![1; 64], "right one")] {
        let error = unlock(key).unwrap_err();
        assert!(error.kind == ErrorKind::Invalid && error.message.contains(word), "{error}");
    }
    let open = |key| Open { key, ..super::open_of(&file, true, None) };
    let error = rig.store.run(Vhd.open(open(None))).err().unwrap();
    assert!(error.message.contains("key-file="), "{error}");
    // A damaged batmap is made anew, and the disk is encrypted all the same.
    let layout = rig.store.run(Layout::read(&file)).unwrap();
    let at = header_offset(layout.header.as_ref().unwrap());
    rig.store.run(file.write(at + 24, Buf::copy_of(&[0; 4]))).unwrap();
    assert!(rig.store.run(Vhd.check(open(None), Some(Repair::All))).unwrap().repaired_total > 0);
    let described = rig.store.run(Vhd.describe(file.clone())).unwrap();
    assert!(described.encryption.is_some() && unlock((0..32).collect()).is_ok());
    rig.store.run(set_key_hash(&file, 9, &[1; 32])).unwrap();
    let error = rig.store.run(Vhd.describe(file.clone())).unwrap_err();
    assert!(error.kind == ErrorKind::Unsupported && error.message.contains("method 9"), "{error}");
}
