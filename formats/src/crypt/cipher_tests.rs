//! Goal: the ciphers are those of the standards, for any number of sectors and any sector. Method: published vectors (IEEE 1619-2007
//! annex B, NIST SP 800-38A), another implementation of XTS, CBC written block by block, and the kernel's definition of the vectors.

use proptest::prelude::*;

use super::*;

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn cipher(mode: Mode, vectors: Vectors, key: &[u8]) -> Rc<dyn SectorCipher> {
    Cipher { mode, vectors, key_bytes: key.len(), sector_bytes: 512 }.with_key(key).unwrap()
}

/// The bytes 0, 1, 2, … 255, 0, … of a sector.
fn counting() -> Vec<u8> {
    (0..512).map(|byte| byte as u8).collect()
}

#[test]
fn xts_is_that_of_the_standard() {
    // IEEE 1619-2007, vectors 4 (AES-128, data unit 0) and 10 (AES-256, data unit 0xff): the first two blocks of the unit.
    let (e, pi) = ("27182818284590452353602874713526", "31415926535897932384626433832795");
    let small = hex(&format!("{e}{pi}"));
    let large = hex(&format!("{e}62497757247093699959574966967627{pi}02884197169399375105820974944592"));
    for (key, number, first) in [
        (small, 0, "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c"),
        (large, 0xff, "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"),
    ] {
        let cipher = cipher(Mode::Xts, Vectors::Plain64, &key);
        let mut bytes = counting();
        cipher.encrypt(number, &mut bytes);
        assert_eq!(bytes[..32], hex(first));
        cipher.decrypt(number, &mut bytes);
        assert_eq!(bytes, counting());
    }
    // Vector 1 and 2 have units of 32 bytes, which are the start of any longer one with the same bytes.
    let zero = cipher(Mode::Xts, Vectors::Plain64, &[0; 32]);
    let mut bytes = vec![0; 512];
    zero.encrypt(0, &mut bytes);
    assert_eq!(bytes[..32], hex("917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e"));
    let key = hex("1111111111111111111111111111111122222222222222222222222222222222");
    let mut bytes = vec![0x44; 512];
    cipher(Mode::Xts, Vectors::Plain64, &key).encrypt(0x33_3333_3333, &mut bytes);
    assert_eq!(bytes[..32], hex("c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0"));
}

#[test]
fn cbc_is_that_of_the_standard() {
    // NIST SP 800-38A, F.2.1 and F.2.5: their vector is no number of a sector, so it is put into the first block.
    let vector = hex("000102030405060708090a0b0c0d0e0f");
    let text = hex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51");
    for (key, expected) in [
        (
            "2b7e151628aed2a6abf7158809cf4f3c",
            "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2",
        ),
        (
            "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
            "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d",
        ),
    ] {
        let cipher = cipher(Mode::Cbc, Vectors::Plain64, &hex(key));
        let mut bytes = vec![0; 512];
        bytes[..32].copy_from_slice(&text);
        xor(&mut bytes[..16], &vector);
        let plain = bytes.clone();
        cipher.encrypt(0, &mut bytes);
        assert_eq!(bytes[..32], hex(expected));
        cipher.decrypt(0, &mut bytes);
        assert_eq!(bytes, plain);
    }
}

/// XTS by another crate.
fn other_xts<C>(key: &[u8], number: u64, bytes: &mut [u8])
where
    C: KeyInit + BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16>,
{
    let (first, second) = key.split_at(key.len() / 2);
    let (first, second) = (C::new_from_slice(first).unwrap(), C::new_from_slice(second).unwrap());
    xts_mode::Xts128::new(first, second).encrypt_area(bytes, 512, number.into(), xts_mode::get_tweak_default);
}

/// CBC as it is written in the books.
fn plain_cbc(key: &[u8], vector: Block, sector: &mut [u8]) {
    let mut before = vector;
    for block in sector.chunks_exact_mut(16) {
        xor(block, &before);
        let block: &mut Block = block.try_into().unwrap();
        match key.len() {
            16 => aes::Aes128::new_from_slice(key).unwrap().encrypt_block(block),
            _ => aes::Aes256::new_from_slice(key).unwrap().encrypt_block(block),
        }
        before = *block;
    }
}

#[test]
fn vectors_are_those_of_the_kernel() {
    let key = [7; 32];
    for number in [0, 1, u64::from(u32::MAX), 1 << 32, (1 << 40) + 5] {
        let plain = VectorMaker::Plain.of(number);
        assert_eq!((&plain[..4], &plain[4..]), (&(number as u32).to_le_bytes()[..], &[0; 12][..]));
        let plain64 = VectorMaker::Plain64.of(number);
        assert_eq!((&plain64[..8], &plain64[8..]), (&number.to_le_bytes()[..], &[0; 8][..]));
        let spec =
            Cipher { mode: Mode::Cbc, vectors: Vectors::EssivSha256, key_bytes: 32, sector_bytes: 512 };
        let mut expected = plain64;
        aes::Aes256::new_from_slice(&sha2::Sha256::digest(key)).unwrap().encrypt_block(&mut expected);
        assert_eq!(spec.vector_maker(&key).of(number), expected);
    }
}

#[test]
fn names_and_keys() {
    for (mode, key_bytes) in [
        ("xts-plain64", 32),
        ("xts-plain64", 64),
        ("xts-plain", 64),
        ("cbc-plain64", 16),
        ("cbc-plain", 32),
        ("cbc-essiv:sha256", 32),
    ] {
        let cipher = Cipher::named("aes", mode, key_bytes).unwrap();
        assert_eq!(cipher.to_string(), format!("aes-{mode}"));
        assert!(cipher.with_key(&vec![1; key_bytes]).is_ok());
        assert!(cipher.with_key(&vec![1; key_bytes + 16]).is_err_and(|why| why.contains("needs")));
    }
    for (name, mode, key_bytes, word) in [
        ("twofish", "xts-plain64", 64, "twofish"),
        ("aes", "ecb", 32, "ecb"),
        ("aes", "xts-plain64", 48, "48 bytes"),
        ("aes", "cbc-plain64", 64, "64 bytes"),
        ("aes", "cbc-plain64", 0, "0 bytes"),
    ] {
        assert!(Cipher::named(name, mode, key_bytes).is_err_and(|why| why.contains(word)));
    }
}

proptest! {
    #[test]
    fn any_number_of_sectors_is_what_others_make_of_it(
        seed: u64, sectors in 1usize..40, large: bool, number in prop_oneof![Just(0u64), any::<u32>().prop_map(u64::from)],
        mode in 0..3,
    ) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut bytes = vec![0; sectors * 512];
        rng.fill(&mut bytes);
        let mut key = vec![0; match (mode, large) { (0, false) => 32, (0, true) => 64, (_, false) => 16, _ => 32 }];
        rng.fill(&mut key);
        let plain = bytes.clone();
        let mut expected = bytes.clone();
        let (mode, vectors) = match mode {
            0 => (Mode::Xts, Vectors::Plain64),
            1 => (Mode::Cbc, Vectors::Plain64),
            _ => (Mode::Cbc, Vectors::EssivSha256),
        };
        let spec = Cipher { mode, vectors, key_bytes: key.len(), sector_bytes: 512 };
        match (mode, large) {
            (Mode::Xts, false) => other_xts::<aes::Aes128>(&key, number, &mut expected),
            (Mode::Xts, true) => other_xts::<aes::Aes256>(&key, number, &mut expected),
            _ => for (index, sector) in expected.chunks_exact_mut(512).enumerate() {
                plain_cbc(&key, spec.vector_maker(&key).of(number + index as u64), sector);
            }
        }
        let cipher = spec.with_key(&key).unwrap();
        cipher.encrypt(number, &mut bytes);
        prop_assert_eq!(&bytes, &expected);
        cipher.decrypt(number, &mut bytes);
        prop_assert_eq!(&bytes, &plain);
    }

    #[test]
    fn large_sectors_are_one_unit_each(seed: u64, sectors in 1usize..20, number in 0u64..1 << 40) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut bytes = vec![0; sectors * 4096];
        rng.fill(&mut bytes);
        let key = [9; 64];
        let (plain, mut expected) = (bytes.clone(), bytes.clone());
        let half = |at: usize| aes::Aes256::new_from_slice(&key[at..at + 32]).unwrap();
        let other = xts_mode::Xts128::new(half(0), half(32));
        for (index, sector) in expected.chunks_exact_mut(4096).enumerate() {
            other.encrypt_sector(sector, xts_mode::get_tweak_default(u128::from(number) + index as u128 * 8));
        }
        let cipher = Cipher { mode: Mode::Xts, vectors: Vectors::Plain64, key_bytes: 64, sector_bytes: 4096 };
        let cipher = cipher.with_key(&key).unwrap();
        cipher.encrypt(number, &mut bytes);
        prop_assert_eq!(&bytes, &expected);
        cipher.decrypt(number, &mut bytes);
        prop_assert_eq!(&bytes, &plain);
    }
}
