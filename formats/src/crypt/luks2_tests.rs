//! Goal: headers of version 2 open with their keys and no others, either copy will do, and what they ask for is bounded. Method: headers
//! made here by the specification, with every way to derive a key; changes of them; `cryptsetup` as a maker and judge where it is
//! installed (it needs no device mapper for this).

use std::path::Path;
use std::rc::Rc;

use futures_lite::future::block_on;

use super::*;
use crate::blocking::Blocking;
use crate::crypt::derive::split;
use crate::crypt::luks::Luks;
use crate::driver::{Budget, Format, Open};
use crate::file::ImageFile;
use crate::testing::rig::{read, write};
use crate::volume::{Layer, Volume};

const PASSPHRASE: &[u8] = b"correct horse";
const HEADER: u64 = 16 << 10;
const AREA: u64 = 32 << 10;
const DATA: u64 = 512 << 10;
const PBKDF2: &str = r#"{"type":"pbkdf2","hash":"sha512","iterations":10,"salt":"SALT"}"#;

/// The JSON text of a header with one slot.
fn json(kdf: &str, sector: usize, salt: &str, digest: &str) -> String {
    r#"{"keyslots":{"3":{"type":"luks2","key_size":64,"af":{"type":"luks1","stripes":4000,"hash":"sha256"},
    "area":{"type":"raw","offset":"32768","size":"258048","encryption":"aes-xts-plain64","key_size":64},"kdf":KDF}},"tokens":{},
    "segments":{"0":{"type":"crypt","offset":"524288","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64",
    "sector_size":SECTOR}},"digests":{"0":{"type":"pbkdf2","keyslots":["3"],"segments":["0"],"hash":"sha256","iterations":20,
    "salt":"SALT","digest":"DIGEST"}},"config":{"json_size":"12288","keyslots_size":"262144"}}"#
        .replace("KDF", kdf)
        .replace("SECTOR", &sector.to_string())
        .replace("SALT", salt)
        .replace("DIGEST", digest)
}

/// One copy of a header.
fn copy(offset: u64, sequence: u64, json: &str) -> Vec<u8> {
    let mut bytes = vec![0; HEADER as usize];
    bytes[..6].copy_from_slice(if offset == 0 { &luks1::MAGIC } else { &MAGIC_SECOND });
    bytes[6..8].copy_from_slice(&[0, 2]);
    bytes[8..16].copy_from_slice(&HEADER.to_be_bytes());
    bytes[16..24].copy_from_slice(&sequence.to_be_bytes());
    bytes[72..78].copy_from_slice(b"sha256");
    bytes[168..172].copy_from_slice(b"uuid");
    bytes[256..264].copy_from_slice(&offset.to_be_bytes());
    bytes[BINARY_BYTES..BINARY_BYTES + json.len()].copy_from_slice(json.as_bytes());
    let sum = sha2::Sha256::digest(&bytes);
    bytes[448..480].copy_from_slice(&sum);
    bytes
}

/// An image with one slot and a MiB of data, and its volume key.
fn image(kdf: &str, sector: usize) -> (Vec<u8>, String, Vec<u8>) {
    let volume_key: Vec<u8> = (100..164).collect();
    let salt = [9; 32];
    let digest = Hash::Sha256.pbkdf2(&volume_key, &salt, 20, 32);
    let text = json(kdf, sector, &Base64::encode_string(&salt), &Base64::encode_string(&digest));
    let metadata: Metadata = serde_json::from_str(&text).unwrap();
    let header = Header::new(&metadata, String::new(), DATA + (1 << 20)).unwrap();
    let slot = &header.slots[0];
    let mut stripes = split(slot.hash, &volume_key, STRIPES).unwrap();
    let key = slot.key(&Secret::new(PASSPHRASE.to_vec())).unwrap();
    slot.cipher.with_key(&key).unwrap().encrypt(0, &mut stripes);
    let mut bytes = vec![0; (DATA + (1 << 20)) as usize];
    bytes[..HEADER as usize].copy_from_slice(&copy(0, 5, &text));
    bytes[HEADER as usize..2 * HEADER as usize].copy_from_slice(&copy(HEADER, 5, &text));
    bytes[AREA as usize..AREA as usize + stripes.len()].copy_from_slice(&stripes);
    (bytes, text, volume_key)
}

fn file(folder: &tempfile::TempDir, bytes: &[u8]) -> Rc<dyn ImageFile> {
    let path = folder.path().join("image");
    std::fs::write(&path, bytes).unwrap();
    open_file(&path)
}

fn open_file(path: &Path) -> Rc<dyn ImageFile> {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    Blocking::new(file, "image", true).unwrap()
}

fn unlock(file: &Rc<dyn ImageFile>, passphrase: &[u8]) -> Result<Secret, Error> {
    block_on(Luks.unlock(file.clone(), &Secret::new(passphrase.to_vec())))
}

fn volume(file: Rc<dyn ImageFile>, key: Secret) -> Volume {
    let open = Open {
        files: vec![file.clone()],
        writable: true,
        below_size: None,
        budget: Budget::new(1 << 20),
        log: None,
        snapshot: None,
        key: Some(key),
    };
    let driver = block_on(Luks.open(open)).unwrap();
    Volume::new(vec![Layer { driver, files: vec![file] }]).unwrap()
}

#[test]
fn every_derivation_opens() {
    let folder = tempfile::tempdir().unwrap();
    for kdf in [
        PBKDF2,
        r#"{"type":"argon2id","time":1,"memory":64,"cpus":2,"salt":"SALT"}"#,
        r#"{"type":"argon2i","time":2,"memory":32,"cpus":1,"salt":"SALT"}"#,
    ] {
        let (bytes, _, key) = image(kdf, 512);
        let file = file(&folder, &bytes);
        assert_eq!(unlock(&file, PASSPHRASE).unwrap().bytes(), key);
        let wrong = unlock(&file, b"wrong horse").unwrap_err();
        assert!(wrong.kind == ErrorKind::Invalid && wrong.message.contains("opens none of its 1"), "{wrong}");
        let description = block_on(Luks.describe(file)).unwrap();
        assert_eq!(description.size, 1 << 20);
        assert_eq!(description.encryption.unwrap().words, "LUKS2 aes-xts-plain64, a key of 512 bits");
    }
}

#[test]
fn large_sectors_are_merged() {
    let folder = tempfile::tempdir().unwrap();
    let (bytes, _, key) = image(PBKDF2, 4096);
    let file = file(&folder, &bytes);
    let volume = volume(file.clone(), unlock(&file, PASSPHRASE).unwrap());
    assert_eq!(volume.granule(), 4096);
    let data: Vec<u8> = (0..10_000).map(|at| (at / 7) as u8).collect();
    block_on(write(&volume, 0, &[5; 40_960])).unwrap();
    block_on(write(&volume, 5123, &data)).unwrap();
    assert_eq!(block_on(read(&volume, 5123, 10_000)).unwrap()[..], data);
    assert!(block_on(read(&volume, 0, 5123)).unwrap().iter().all(|byte| *byte == 5));
    assert!(block_on(read(&volume, 15_123, 25_837)).unwrap().iter().all(|byte| *byte == 5));
    // One unit of 4096 bytes, the number of which counts sectors of 512.
    let half = |at: usize| <aes::Aes256 as aes::cipher::KeyInit>::new_from_slice(&key[at..at + 32]).unwrap();
    let mut expected = vec![5; 4096];
    xts_mode::Xts128::new(half(0), half(32)).encrypt_sector(&mut expected, xts_mode::get_tweak_default(64));
    assert_eq!(block_on(file.read(DATA + 32_768, 4096)).unwrap()[..], expected);
}

#[test]
fn either_copy_will_do() {
    let folder = tempfile::tempdir().unwrap();
    let (bytes, text, key) = image(PBKDF2, 512);
    let mut first_gone = bytes.clone();
    first_gone[..4096].fill(0xff);
    let mut second_gone = bytes.clone();
    second_gone[HEADER as usize + 5000] ^= 1;
    for damaged in [&first_gone, &second_gone] {
        assert_eq!(unlock(&file(&folder, damaged), PASSPHRASE).unwrap().bytes(), key);
    }
    let mut both = first_gone;
    both[HEADER as usize + 5000] ^= 1;
    assert!(unlock(&file(&folder, &both), PASSPHRASE).is_err());
    let mut first_damaged = bytes.clone();
    first_damaged[5000] ^= 1;
    first_damaged[HEADER as usize + 5000] ^= 1;
    let error = unlock(&file(&folder, &first_damaged), PASSPHRASE).unwrap_err();
    assert!(error.kind == ErrorKind::Corrupt && error.message.contains("neither copy"), "{error}");
    // The newer one counts.
    let mut newer = bytes;
    let other = text.replace("\"hash\":\"sha256\",\"iterations\":20", "\"hash\":\"sha1\",\"iterations\":20");
    newer[HEADER as usize..2 * HEADER as usize].copy_from_slice(&copy(HEADER, 6, &other));
    let described = block_on(Luks.describe(file(&folder, &newer))).unwrap();
    assert!(described.properties.contains(&("hash", "sha1".to_owned())) || other == text, "{described:?}");
}

#[test]
fn what_is_greedy_or_unknown_is_refused() {
    let (_, text, _) = image(PBKDF2, 512);
    let parse = |text: &str| {
        let metadata = serde_json::from_str::<Metadata>(text).map_err(|error| error.to_string())?;
        Header::new(&metadata, String::new(), DATA + (1 << 20)).map(drop)
    };
    assert_eq!(parse(&text), Ok(()));
    let argon2 = |time: u64, memory: u64, cpus: u64| {
        format!(
            r#"{{"type":"argon2id","time":{time},"memory":{memory},"cpus":{cpus},"salt":"AAAAAAAAAAAAAAAA"}}"#
        )
    };
    let kdf = text.find("\"kdf\":").unwrap() + 6..text.find("}},\"tokens\"").unwrap();
    let with_kdf = |kdf_text: &str| [&text[..kdf.start], kdf_text, &text[kdf.end..]].concat();
    assert_eq!(parse(&with_kdf(&argon2(4, 1 << 20, 4))), Ok(()));
    for (changed, word) in [
        (with_kdf(&argon2(1, (1 << 20) + 8, 1)), "memory"),
        (with_kdf(&argon2(1000, 1 << 20, 1)), "limits"),
        (with_kdf(&argon2(4_000_000_000, 64, 1)), "limits"),
        (with_kdf(&argon2(1, 64, 1000)), "processors"),
        (with_kdf(&argon2(0, 64, 1)), "Argon2"),
        (with_kdf(r#"{"type":"scrypt","salt":"AAAA"}"#), "scrypt"),
        (text.replace("\"iterations\":10", "\"iterations\":4000000000"), "limits"),
        (text.replace("\"iterations\":20", "\"iterations\":0"), "digest"),
        (text.replace("\"stripes\":4000", "\"stripes\":400000000"), "stripes"),
        (text.replace("\"offset\":\"32768\"", "\"offset\":\"18446744073709551615\""), "outside"),
        (text.replace("\"offset\":\"524288\"", "\"offset\":\"99999999999\""), "no data"),
        (text.replace("\"offset\":\"524288\"", "\"offset\":\"x\""), "no number"),
        (text.replace("\"sector_size\":512", "\"sector_size\":100"), "sectors"),
        (text.replace("\"iv_tweak\":\"0\"", "\"iv_tweak\":\"8\""), "vectors"),
        (
            text.replace(
                "\"encryption\":\"aes-xts-plain64\",\n",
                "\"encryption\":\"serpent-xts-plain64\",\n",
            ),
            "serpent",
        ),
        (text.replace("\"type\":\"crypt\"", "\"type\":\"linear\""), "not encrypted"),
        (text.replace("\"keyslots\":[\"3\"]", "\"keyslots\":[]"), "key slots"),
        (
            text.replace(
                "\"config\":{",
                "\"config\":{\"requirements\":{\"mandatory\":[\"online-reencrypt\"]},",
            ),
            "online-reencrypt",
        ),
        (text.replace("\"key_size\":64", "\"key_size\":6400000"), "key"),
        (text.replace('}', ""), "EOF"),
    ] {
        let said = parse(&changed).unwrap_err();
        assert!(said.contains(word), "{word}: {said}");
    }
}

/// Runs cryptsetup; `None` where it is not installed.
fn cryptsetup(arguments: &[&str]) -> Option<String> {
    let mut command = std::process::Command::new("timeout");
    let output =
        command.args(["-s", "KILL", "60", "cryptsetup", "--batch-mode"]).args(arguments).output().unwrap();
    if output.status.code() == Some(127) {
        return None;
    }
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&text));
    Some(String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn cryptsetup_and_we_mean_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (path, key) = (folder.path().join("image"), folder.path().join("key"));
    std::fs::write(&key, PASSPHRASE).unwrap();
    let (image, key) = (path.display().to_string(), key.display().to_string());
    let light = ["--key-file", &key, "--pbkdf-force-iterations"];
    for options in [
        &[
            "--type",
            "luks2",
            light[0],
            light[1],
            light[2],
            "4",
            "--pbkdf",
            "argon2id",
            "--pbkdf-memory",
            "1024",
        ][..],
        &[
            "--type",
            "luks2",
            light[0],
            light[1],
            light[2],
            "1000",
            "--pbkdf",
            "pbkdf2",
            "--sector-size",
            "4096",
        ],
        &["--type", "luks1", light[0], light[1], light[2], "1000", "--hash", "sha512"],
        &[
            "--type",
            "luks1",
            light[0],
            light[1],
            light[2],
            "1000",
            "--cipher",
            "aes-cbc-essiv:sha256",
            "--key-size",
            "256",
        ],
    ] {
        std::fs::write(&path, vec![0; 20 << 20]).unwrap();
        if cryptsetup(&[&["luksFormat"], options, &[&image]].concat()).is_none() {
            return println!("skipped: cryptsetup is not installed (package cryptsetup-bin)");
        }
        let dumped = cryptsetup(&["luksDump", "--dump-volume-key", "--key-file", &key, &image]).unwrap();
        let hex = dumped.split("MK dump:").nth(1).unwrap();
        let hex: String = hex.chars().filter(char::is_ascii_hexdigit).collect();
        let ours = unlock(&open_file(&path), PASSPHRASE).unwrap();
        let ours: String = ours.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(hex.starts_with(&ours), "{options:?}");
    }
    // And it opens what we make.
    let create = crate::driver::Create {
        size: Some(1 << 20),
        backing: None,
        options: vec![("iter-time".into(), "1".into())],
        key: Some(Secret::new(PASSPHRASE.to_vec())),
    };
    std::fs::write(&path, []).unwrap();
    block_on(Luks.create(open_file(&path), Vec::new(), &create)).unwrap();
    cryptsetup(&["open", "--test-passphrase", "--key-file", &key, &image]).unwrap();
}
