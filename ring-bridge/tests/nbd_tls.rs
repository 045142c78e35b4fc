//! Goal: a TLS session over memory buffers carries bytes both ways whatever the pieces, holds a bounded amount, and refuses
//! by name. Method: OpenSSL's client over the same kind of buffers, certificates made here; real clients are in
//! `nbd_clients`.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use openssl::asn1::Asn1Time;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{ErrorCode, Ssl, SslContext, SslMethod, SslStream, SslVerifyMode, SslVersion};
use openssl::symm::Cipher;
use openssl::x509::{X509, X509NameBuilder};
use ring_bridge::nbd::tls::{INPUT_BYTES_MAX, OUTPUT_BYTES_MAX};
use ring_bridge::nbd::{Handshake, PlainRead, TlsAcceptor, TlsError, TlsSession};
use tempfile::TempDir;

const KEY: &str = "000102030405060708090a0b0c0d0e0f";

fn key() -> PKey<Private> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).expect("group");
    PKey::from_ec_key(EcKey::generate(&group).expect("key")).expect("key")
}

fn certificate(key: &PKey<Private>, name: &str) -> X509 {
    let mut subject = X509NameBuilder::new().expect("name");
    subject.append_entry_by_text("CN", name).expect("name");
    let subject = subject.build();
    let mut builder = X509::builder().expect("builder");
    builder.set_version(2).expect("version");
    builder.set_subject_name(&subject).expect("subject");
    builder.set_issuer_name(&subject).expect("issuer");
    builder.set_pubkey(key).expect("key");
    builder.set_not_before(&Asn1Time::days_from_now(0).expect("time")).expect("time");
    builder.set_not_after(&Asn1Time::days_from_now(2).expect("time")).expect("time");
    builder.sign(key, MessageDigest::sha256()).expect("sign");
    builder.build()
}

/// Files of a server, and its certificate.
struct Files {
    directory: TempDir,
    certificate: X509,
    key: PKey<Private>,
}

impl Files {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let key = key();
        let certificate = certificate(&key, "lab");
        let files = Self { directory, certificate, key };
        files.write("cert.pem", &files.certificate.to_pem().expect("pem"));
        files.write("key.pem", &files.key.private_key_to_pem_pkcs8().expect("pem"));
        files.write("keys.psk", format!("alice:{KEY}\n").as_bytes());
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).expect("write");
    }

    fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::with_certificates(&self.path("cert.pem"), &self.path("key.pem"), None).expect("acceptor")
    }

    fn psk_acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::with_psk_file(&self.path("keys.psk")).expect("acceptor")
    }
}

/// The client's transport.
#[derive(Default)]
struct Pipe {
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.input.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = buffer.len().min(self.input.len());
        buffer[..count].copy_from_slice(&self.input[..count]);
        self.input.drain(..count);
        Ok(count)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Client = SslStream<Pipe>;

fn client(version: SslVersion, identity: Option<&'static str>) -> Client {
    let mut builder = SslContext::builder(SslMethod::tls_client()).expect("builder");
    builder.set_min_proto_version(Some(version)).expect("version");
    builder.set_max_proto_version(Some(version)).expect("version");
    builder.set_verify(SslVerifyMode::NONE);
    if let Some(identity) = identity {
        builder.set_cipher_list("PSK").expect("suites");
        builder.set_psk_client_callback(move |_, _, name, room| {
            name[..identity.len()].copy_from_slice(identity.as_bytes());
            name[identity.len()] = 0;
            let key: Vec<u8> = (0..16).collect();
            room[..16].copy_from_slice(&key);
            Ok(16)
        });
    }
    SslStream::new(Ssl::new(&builder.build()).expect("ssl"), Pipe::default()).expect("stream")
}

/// Moves what both have to say, in pieces.
fn exchange(client: &mut Client, server: &mut TlsSession, piece: usize) -> Result<(), TlsError> {
    client.get_mut().input.extend(server.take_output());
    let said = std::mem::take(&mut client.get_mut().output);
    for bytes in said.chunks(piece) {
        assert_eq!(server.feed(bytes), bytes.len());
        server.handshake()?;
    }
    Ok(())
}

/// The handshake, in pieces.
fn connect(client: &mut Client, server: &mut TlsSession, piece: usize) -> Result<(), TlsError> {
    for _ in 0..10 {
        let connected = client.connect();
        exchange(client, server, piece)?;
        if server.handshake()? == Handshake::Done && connected.is_ok() {
            return Ok(());
        }
    }
    panic!("the handshake does not end");
}

fn read(server: &mut TlsSession) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), [0; 1000]);
    loop {
        match server.read_plain(&mut buffer).expect("read") {
            PlainRead::Bytes(count) => all.extend(&buffer[..count]),
            PlainRead::WouldBlock | PlainRead::Closed => return all,
        }
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 % 251) as u8).collect()
}

/// Goal: bytes arrive in both directions, for both versions and both kinds of credentials, from any piece size; the session
/// moves between threads; the client is named. Method: 300 KB each way.
#[test]
fn carries_bytes_both_ways() {
    let files = Files::new();
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        for (identity, piece) in [(None, 1), (None, 5000), (Some("alice"), 3), (Some("alice"), 5000)] {
            let acceptor = if identity.is_some() { files.psk_acceptor() } else { files.acceptor() };
            let mut client = client(version, identity);
            let mut server = acceptor.session().expect("session");
            connect(&mut client, &mut server, piece).expect("handshake");
            assert_eq!(server.client_identity().as_deref(), identity);
            let expected = if version == SslVersion::TLS1_2 { "TLSv1.2" } else { "TLSv1.3" };
            assert!(server.protocol().starts_with(expected), "{}", server.protocol());

            let data = pattern(300_000);
            client.write_all(&data).expect("write");
            let said = std::mem::take(&mut client.get_mut().output);
            let mut server = std::thread::spawn(move || server).join().expect("moves");
            let mut got = Vec::new();
            for bytes in said.chunks(piece) {
                assert_eq!(server.feed(bytes), bytes.len());
                got.extend(read(&mut server));
            }
            assert!(got == data);

            let (mut sent, mut spare, mut back) = (0, Vec::new(), vec![0; data.len()]);
            while sent < data.len() {
                sent += server.write_plain(&data[sent..]).expect("write");
                server.swap_output(&mut spare);
                client.get_mut().input.extend(&spare);
            }
            client.read_exact(&mut back).expect("read");
            assert!(back == data);

            server.close();
            client.get_mut().input.extend(server.take_output());
            let ended = client.ssl_read(&mut [0; 10]).expect_err("end");
            assert_eq!(ended.code(), ErrorCode::ZERO_RETURN);
            client.shutdown().expect("shutdown");
            exchange(&mut client, &mut server, 100).expect("end");
            assert_eq!(server.read_plain(&mut [0; 10]).expect("end"), PlainRead::Closed);
        }
    }
}

/// Goal: neither side makes a session hold more than its bounds. Method: writes without sending, feeds without reading, and
/// reads while the output is full.
#[test]
fn holds_a_bounded_amount() {
    let files = Files::new();
    let (mut client, mut server) =
        (client(SslVersion::TLS1_3, None), files.acceptor().session().expect("session"));
    connect(&mut client, &mut server, 1000).expect("handshake");
    let data = pattern(4 << 20);
    let taken = server.write_plain(&data).expect("write");
    assert!((OUTPUT_BYTES_MAX - 4096..OUTPUT_BYTES_MAX + (32 << 10)).contains(&taken), "{taken}");
    assert!(server.output_len() < OUTPUT_BYTES_MAX + (32 << 10));
    assert_eq!(server.write_plain(&data).expect("write"), 0);

    client.write_all(&data).expect("write");
    let said = std::mem::take(&mut client.get_mut().output);
    let fed = server.feed(&said);
    assert_eq!(fed, INPUT_BYTES_MAX);
    assert_eq!(server.feed(&said[fed..]), 0);
    assert_eq!(server.read_plain(&mut [0; 100]).expect("read"), PlainRead::WouldBlock, "output first");
    server.take_output();
    let got = read(&mut server);
    assert!(got.len() > INPUT_BYTES_MAX - (20 << 10) && data.starts_with(&got), "{}", got.len());
    assert!(server.feed(&said[fed..]) > 0);
}

/// Goal: who cannot prove anything is refused with a reason, and told. Method: noise, old versions, no key, a plaintext
/// option behind STARTTLS.
#[test]
fn refuses_handshakes() {
    let files = Files::new();
    let refused = |acceptor: &TlsAcceptor, client: &mut Client| {
        let mut server = acceptor.session().expect("session");
        let error = connect(client, &mut server, 1000).expect_err("refused");
        assert!(matches!(error, TlsError::Handshake(_)));
        assert!(server.output_len() > 0, "an alert");
        assert_eq!(server.client_identity(), None);
        error.to_string()
    };
    for noise in [&b"IHAVEOPT\0\0\0\x07\0\0\0\0"[..], &[0xff; 400], &[0x16, 3, 1, 0xff, 0xff, 1]] {
        let mut server = files.acceptor().session().expect("session");
        assert_eq!(server.feed(noise), noise.len());
        assert!(server.handshake().is_err(), "{noise:?}");
    }
    let unknown = refused(&files.psk_acceptor(), &mut client(SslVersion::TLS1_3, Some("mallory")));
    assert!(unknown.contains("no key for the identity \"mallory\""), "{unknown}");
    refused(&files.psk_acceptor(), &mut client(SslVersion::TLS1_2, Some("mallory")));
    refused(&files.psk_acceptor(), &mut client(SslVersion::TLS1_3, None));
    refused(&files.acceptor(), &mut client(SslVersion::TLS1_2, Some("alice")));

    files.write("ca.pem", &certificate(&key(), "authority").to_pem().expect("pem"));
    let checking = TlsAcceptor::with_certificates(
        &files.path("cert.pem"),
        &files.path("key.pem"),
        Some(&files.path("ca.pem")),
    );
    let error = refused(&checking.expect("acceptor"), &mut client(SslVersion::TLS1_3, None));
    assert!(error.contains("did not return a certificate"), "{error}");
}

/// Goal: a file that cannot be used is named, with the problem. Method: one broken file at a time.
#[test]
fn bad_files_are_named() {
    let files = Files::new();
    files.write("empty", b"");
    files.write("binary", &[0xff; 64]);
    files.write("other-key.pem", &key().private_key_to_pem_pkcs8().expect("pem"));
    let locked =
        files.key.private_key_to_pem_pkcs8_passphrase(Cipher::aes_128_cbc(), b"secret").expect("pem");
    files.write("locked.pem", &locked);
    let with = |chain: &str, key: &str, ca: Option<&str>| {
        let ca = ca.map(|name| files.path(name));
        TlsAcceptor::with_certificates(&files.path(chain), &files.path(key), ca.as_deref())
    };
    for (result, file, problem) in [
        (with("nothing", "key.pem", None), "nothing", "No such file"),
        (with("empty", "key.pem", None), "empty", "no certificate in it"),
        (with("binary", "key.pem", None), "binary", "no certificate in it"),
        (with("cert.pem", "empty", None), "empty", "no usable private key"),
        (with("cert.pem", "locked.pem", None), "locked.pem", "without passphrase"),
        (with("cert.pem", "other-key.pem", None), "other-key.pem", "the key does not belong to"),
        (with("cert.pem", "key.pem", Some("empty")), "empty", "no certificate in it"),
        (TlsAcceptor::with_psk_file(&files.path("empty")), "empty", "it holds no key"),
        (TlsAcceptor::with_psk_file(&files.path("binary")), "binary", "it is not text"),
        (TlsAcceptor::with_psk_file(Path::new("/nonexistent")), "/nonexistent", "No such file"),
    ] {
        let error = result.expect_err(problem).to_string();
        assert!(error.contains(file) && error.contains(problem), "{file}, {problem}: {error}");
    }
}
