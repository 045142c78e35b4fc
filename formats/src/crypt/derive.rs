//! From passphrases to keys: hashes, PBKDF2 (RFC 8018) and the anti-forensic splitter of LUKS.
//!
//! The work that a header may ask for is bounded ([`ROUNDS_MAX`]): it is on the operator's time, and a header can be anybody's.

use std::time::{Duration, Instant};

use sha2::Digest;
use zeroize::Zeroizing;

/// Rounds of a hash (of SHA-512 half as many) that unlocking one image may take, all key slots together: over ten times what cryptsetup
/// and QEMU choose on machines of today for one slot, and less than a minute of a core that has instructions for SHA. A header that
/// asks for more is refused.
pub const ROUNDS_MAX: u64 = 100_000_000;
/// Least iterations that new key slots get, as cryptsetup has it.
pub const ITERATIONS_MIN: u32 = 1000;

/// A hash function of LUKS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Hash {
    /// The hash of a name in a header.
    ///
    /// # Errors
    /// It is none of ours: what to say.
    pub fn named(name: &str) -> Result<Hash, String> {
        match name {
            "sha1" => Ok(Hash::Sha1),
            "sha256" => Ok(Hash::Sha256),
            "sha512" => Ok(Hash::Sha512),
            other => Err(format!("its hash is {other:?}; there are sha1, sha256 and sha512")),
        }
    }

    /// Its name in a header.
    pub fn name(self) -> &'static str {
        match self {
            Hash::Sha1 => "sha1",
            Hash::Sha256 => "sha256",
            Hash::Sha512 => "sha512",
        }
    }

    /// Bytes of a digest.
    pub fn bytes(self) -> usize {
        match self {
            Hash::Sha1 => 20,
            Hash::Sha256 => 32,
            Hash::Sha512 => 64,
        }
    }

    /// The digest of some bytes behind a number.
    fn of(self, number: u32, bytes: &[u8]) -> Zeroizing<Vec<u8>> {
        fn run<D: Digest>(number: u32, bytes: &[u8]) -> Vec<u8> {
            D::new().chain_update(number.to_be_bytes()).chain_update(bytes).finalize().to_vec()
        }
        Zeroizing::new(match self {
            Hash::Sha1 => run::<sha1::Sha1>(number, bytes),
            Hash::Sha256 => run::<sha2::Sha256>(number, bytes),
            Hash::Sha512 => run::<sha2::Sha512>(number, bytes),
        })
    }

    /// A key of `len` bytes out of a passphrase.
    pub fn pbkdf2(self, passphrase: &[u8], salt: &[u8], iterations: u32, len: usize) -> Zeroizing<Vec<u8>> {
        let mut key = Zeroizing::new(vec![0; len]);
        match self {
            Hash::Sha1 => pbkdf2::pbkdf2_hmac::<sha1::Sha1>(passphrase, salt, iterations, &mut key),
            Hash::Sha256 => pbkdf2::pbkdf2_hmac::<sha2::Sha256>(passphrase, salt, iterations, &mut key),
            Hash::Sha512 => pbkdf2::pbkdf2_hmac::<sha2::Sha512>(passphrase, salt, iterations, &mut key),
        }
        key
    }

    /// Rounds that [`Hash::pbkdf2`] counts, for [`ROUNDS_MAX`]: one of SHA-512 takes about twice the time of the others.
    pub fn rounds(self, iterations: u32, len: usize) -> u64 {
        let weight = if self == Hash::Sha512 { 2 } else { 1 };
        u64::from(iterations) * len.div_ceil(self.bytes()) as u64 * weight
    }

    /// Iterations after which a key of `len` bytes has taken about `time` on this machine.
    pub fn iterations_in(self, time: Duration, len: usize) -> u32 {
        let mut tried = ITERATIONS_MIN;
        loop {
            let began = Instant::now();
            drop(self.pbkdf2(b"a passphrase", &[1; 32], tried, len));
            let took = began.elapsed();
            // Long enough to be measured.
            if took >= time.min(Duration::from_millis(50)) || tried >= 1 << 24 {
                let wanted = f64::from(tried) * time.as_secs_f64() / took.as_secs_f64().max(1e-6);
                let most = (ROUNDS_MAX / 16 / len.div_ceil(self.bytes()) as u64) as f64;
                return wanted.clamp(f64::from(ITERATIONS_MIN), most) as u32;
            }
            tried *= 4;
        }
    }
}

/// Mixes a stripe: every bit of it depends on its whole block.
fn diffuse(hash: Hash, stripe: &mut [u8]) {
    for (number, block) in (0..).zip(stripe.chunks_mut(hash.bytes())) {
        let digest = hash.of(number, block);
        block.copy_from_slice(&digest[..block.len()]);
    }
}

fn xor(bytes: &mut [u8], other: &[u8]) {
    bytes.iter_mut().zip(other).for_each(|(byte, other)| *byte ^= other);
}

/// The key out of its stripes, each as long as the key.
pub fn merge(hash: Hash, stripes: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; len]);
    let count = stripes.len() / len;
    for (number, stripe) in stripes.chunks_exact(len).enumerate() {
        xor(&mut key, stripe);
        if number + 1 < count {
            diffuse(hash, &mut key);
        }
    }
    key
}

/// A key as `count` stripes of its length, of which every single one is needed to have it again.
///
/// # Errors
/// The kernel gives no random bytes.
pub fn split(hash: Hash, key: &[u8], count: usize) -> Result<Zeroizing<Vec<u8>>, crate::error::Error> {
    let mut stripes = Zeroizing::new(vec![0; key.len() * count]);
    let (random, last) = stripes.split_at_mut(key.len() * (count - 1));
    super::secret::random(random)?;
    let mut mixed = Zeroizing::new(vec![0; key.len()]);
    for stripe in random.chunks_exact(key.len()) {
        xor(&mut mixed, stripe);
        diffuse(hash, &mut mixed);
    }
    last.copy_from_slice(key);
    xor(last, &mixed);
    Ok(stripes)
}

#[cfg(test)]
mod tests {
    //! Goal: PBKDF2 is that of the RFC, and what was split can be merged. Method: published vectors; random keys. (That stripes are those of
    //! others is shown by their images.)

    use super::*;

    #[test]
    fn pbkdf2_is_that_of_the_rfcs() {
        // RFC 6070 for SHA-1, RFC 7914 section 11 for SHA-256.
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let sha1 = Hash::Sha1.pbkdf2(b"password", b"salt", 4096, 20);
        assert_eq!(hex(&sha1), "4b007901b765489abead49d926f721d065a429c1");
        let sha256 = Hash::Sha256.pbkdf2(b"passwd", b"salt", 1, 64);
        assert!(hex(&sha256).starts_with("55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"));
        assert_eq!(Hash::Sha256.rounds(1000, 64), 2000);
        assert_eq!(Hash::Sha1.rounds(10, 64), 40);
    }

    #[test]
    fn split_keys_are_merged() {
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
            for len in [16, 32, 64] {
                let key = Secret::random(len);
                let key = key.unwrap();
                let stripes = split(hash, key.bytes(), 50).unwrap();
                assert_eq!(*merge(hash, &stripes, len), key.bytes());
                let mut damaged = stripes.clone();
                damaged[7] ^= 1;
                assert_ne!(*merge(hash, &damaged, len), key.bytes());
            }
        }
    }

    use super::super::secret::Secret;

    #[test]
    fn new_slots_get_iterations_within_bounds() {
        let few = Hash::Sha256.iterations_in(Duration::ZERO, 64);
        let many = Hash::Sha256.iterations_in(Duration::from_secs(1_000_000), 64);
        assert_eq!((few, u64::from(many)), (ITERATIONS_MIN, ROUNDS_MAX / 16 / 2));
    }
}
