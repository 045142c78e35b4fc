//! TLS for NBD over memory buffers: ciphertext in, plaintext out, and back.
//!
//! A [`TlsAcceptor`] is made once from certificates or from a file of pre-shared keys; each connection gets a
//! [`TlsSession`], which owns no socket and can move between threads with its connection.
//!
//! TLS 1.2 with forward-secret AEAD suites and TLS 1.3; no renegotiation, no tickets and no session cache, so that a
//! session costs nothing beyond its connection. Memory per session is bounded by [`INPUT_BYTES_MAX`],
//! [`OUTPUT_BYTES_MAX`] and what OpenSSL holds for one record in each direction.
//!
//! Pre-shared keys use OpenSSL's PSK callback, which serves TLS 1.2 PSK suites and external PSKs of TLS 1.3 (with
//! SHA-256), as GnuTLS clients (libnbd, QEMU) speak them.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::pkey::PKey;
use openssl::ssl::{
    ErrorCode, Ssl, SslContext, SslContextBuilder, SslMethod, SslMode, SslOptions, SslSessionCacheMode,
    SslStream, SslVerifyMode, SslVersion,
};
use openssl::x509::X509;
use openssl::x509::store::X509StoreBuilder;

use super::psk::PskTable;

/// Received bytes that a session holds at most.
pub const INPUT_BYTES_MAX: usize = 64 << 10;
/// Encrypted bytes above which a session takes no more plaintext and reads no more records until they were sent.
pub const OUTPUT_BYTES_MAX: usize = 256 << 10;
/// Above this the session fails: what one input could make OpenSSL answer, and the record in work, fit in between.
const OUTPUT_BYTES_LIMIT: usize = OUTPUT_BYTES_MAX + 2 * INPUT_BYTES_MAX;
/// Plaintext of one record.
const RECORD_BYTES: usize = 16 << 10;

/// TLS 1.2 suites with certificates.
const CERTIFICATE_SUITES: &str = "ECDHE+AESGCM:ECDHE+CHACHA20:!aNULL:!PSK";
/// TLS 1.2 suites with pre-shared keys: the one of OpenSSL that is AEAD and forward-secret without DH parameters.
const PSK_SUITES: &str = "ECDHE-PSK-CHACHA20-POLY1305";
/// TLS 1.3 suites with pre-shared keys: OpenSSL binds an external key to SHA-256.
const PSK_SUITES_13: &str = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";

/// What can go wrong with TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of keys or certificates cannot be used.
    #[error("TLS file {}: {problem}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What was found and expected.
        problem: String,
    },
    /// OpenSSL refuses the configuration.
    #[error("TLS cannot be set up: {0}")]
    Setup(#[from] ErrorStack),
    /// The client could not agree with us, or is not who it should be.
    #[error("TLS handshake failed: {0}")]
    Handshake(String),
    /// The session is broken.
    #[error("TLS session failed: {0}")]
    Session(String),
}

fn file_error(path: &Path, problem: impl fmt::Display) -> TlsError {
    TlsError::File { path: path.to_owned(), problem: problem.to_string() }
}

fn read_file(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|error| file_error(path, error))
}

/// What a listener needs to speak TLS; cheap to clone.
#[derive(Clone)]
pub struct TlsAcceptor {
    context: SslContext,
}

impl fmt::Debug for TlsAcceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsAcceptor")
    }
}

impl TlsAcceptor {
    /// Reads PEM files: the server's certificate with its chain, its key without a passphrase, and, if clients have to
    /// show a certificate, the authorities that they are checked against.
    ///
    /// Blocks on the files: for start-up and reload.
    ///
    /// # Errors
    /// [`TlsError::File`] names the file and what is wrong with it.
    pub fn with_certificates(chain: &Path, key: &Path, client_ca: Option<&Path>) -> Result<Self, TlsError> {
        let mut builder = context_builder()?;
        builder.set_cipher_list(CERTIFICATE_SUITES)?;

        let mut certificates = read_certificates(chain)?.into_iter();
        if let Some(leaf) = certificates.next() {
            builder.set_certificate(&leaf).map_err(|error| file_error(chain, error))?;
        }
        for issuer in certificates {
            builder.add_extra_chain_cert(issuer)?;
        }

        // The callback keeps OpenSSL from asking for a passphrase on a terminal.
        let private = PKey::private_key_from_pem_callback(&read_file(key)?, |_| Ok(0)).map_err(|error| {
            file_error(key, format_args!("no usable private key (PEM without passphrase): {error}"))
        })?;
        builder.set_private_key(&private).and_then(|()| builder.check_private_key()).map_err(|error| {
            file_error(key, format_args!("the key does not belong to {}: {error}", chain.display()))
        })?;

        if let Some(path) = client_ca {
            let mut store = X509StoreBuilder::new()?;
            for authority in read_certificates(path)? {
                builder.add_client_ca(&authority)?;
                store.add_cert(authority).map_err(|error| file_error(path, error))?;
            }
            builder.set_verify_cert_store(store.build())?;
            builder.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
        }
        Ok(Self { context: builder.build() })
    }

    /// Reads pre-shared keys: lines `identity:hexkey`, as `psktool` writes them. Blocks on the file.
    ///
    /// # Errors
    /// [`TlsError::File`] names the file, the line and the problem.
    pub fn with_psk_file(path: &Path) -> Result<Self, TlsError> {
        let text = String::from_utf8(read_file(path)?).map_err(|_| file_error(path, "it is not text"))?;
        let table = Arc::new(PskTable::parse(&text).map_err(|problem| file_error(path, problem))?);
        let mut builder = context_builder()?;
        builder.set_cipher_list(PSK_SUITES)?;
        builder.set_ciphersuites(PSK_SUITES_13)?;
        let index = psk_identity_index()?;
        builder.set_psk_server_callback(move |ssl, identity, room| {
            // No key is a key of no bytes: OpenSSL refuses the client.
            let Some(name) = identity else { return Ok(0) };
            let key = table.key(name).filter(|key| key.len() <= room.len()).unwrap_or_default();
            room[..key.len()].copy_from_slice(key);
            ssl.set_ex_data(index, PskIdentity { name: name.to_vec(), known: !key.is_empty() });
            Ok(key.len())
        });
        Ok(Self { context: builder.build() })
    }

    /// A session for a new connection.
    ///
    /// # Errors
    /// [`TlsError::Setup`] when OpenSSL has no memory.
    pub fn session(&self) -> Result<TlsSession, TlsError> {
        let ssl = Ssl::new(&self.context)?;
        Ok(TlsSession { stream: SslStream::new(ssl, Memory::default())?, established: false })
    }
}

/// The identity that a client gave.
struct PskIdentity {
    name: Vec<u8>,
    known: bool,
}

/// Where a session keeps the identity that its client gave: OpenSSL forgets it with TLS 1.3.
fn psk_identity_index() -> Result<Index<Ssl, PskIdentity>, ErrorStack> {
    static INDEX: OnceLock<Index<Ssl, PskIdentity>> = OnceLock::new();
    match INDEX.get() {
        Some(index) => Ok(*index),
        None => {
            let index = Ssl::new_ex_index()?;
            Ok(*INDEX.get_or_init(|| index))
        }
    }
}

fn context_builder() -> Result<SslContextBuilder, ErrorStack> {
    let mut builder = SslContext::builder(SslMethod::tls_server())?;
    builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    builder.set_options(
        SslOptions::NO_RENEGOTIATION
            | SslOptions::NO_COMPRESSION
            | SslOptions::NO_TICKET
            | SslOptions::CIPHER_SERVER_PREFERENCE,
    );
    builder.set_num_tickets(0)?;
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    builder.set_session_id_context(b"blktapd")?;
    builder.set_mode(SslMode::RELEASE_BUFFERS);
    Ok(builder)
}

fn read_certificates(path: &Path) -> Result<Vec<X509>, TlsError> {
    let certificates = X509::stack_from_pem(&read_file(path)?).map_err(|error| file_error(path, error))?;
    if certificates.is_empty() {
        return Err(file_error(path, "no certificate in it, expected PEM (BEGIN CERTIFICATE)"));
    }
    Ok(certificates)
}

/// The transport that OpenSSL reads from and writes to.
#[derive(Debug, Default)]
struct Memory {
    input: Vec<u8>,
    /// Bytes at the front of `input` that were read.
    consumed: usize,
    output: Vec<u8>,
}

impl Read for Memory {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let unread = self.input.get(self.consumed..).unwrap_or_default();
        if unread.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = unread.len().min(buffer.len());
        buffer[..count].copy_from_slice(&unread[..count]);
        self.consumed += count;
        if self.consumed == self.input.len() {
            self.input.clear();
            self.consumed = 0;
        }
        Ok(count)
    }
}

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.output.len() + bytes.len() > OUTPUT_BYTES_LIMIT {
            return Err(io::Error::other("the client makes us answer more than it receives"));
        }
        self.output.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a handshake is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handshake {
    /// Send the output, receive, feed, and go on.
    NeedInput,
    /// Plaintext can flow. The output may hold the last bytes of the handshake.
    Done,
}

/// What a read of plaintext gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlainRead {
    /// So many bytes, above zero.
    Bytes(usize),
    /// Send the output, receive and feed first.
    WouldBlock,
    /// The client ended the session properly; nothing follows.
    Closed,
}

/// TLS of one connection, without its socket.
pub struct TlsSession {
    stream: SslStream<Memory>,
    established: bool,
}

impl fmt::Debug for TlsSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Memory { input, consumed, output } = self.stream.get_ref();
        f.debug_struct("TlsSession")
            .field("established", &self.established)
            .field("input_bytes", &(input.len() - consumed))
            .field("output_bytes", &output.len())
            .finish()
    }
}

impl TlsSession {
    /// Adds received ciphertext. Returns how many bytes were taken: all, unless [`INPUT_BYTES_MAX`] are waiting to be
    /// read; the caller keeps the rest and stops receiving.
    #[must_use = "bytes that were not taken have to be fed again"]
    pub fn feed(&mut self, bytes: &[u8]) -> usize {
        let memory = self.stream.get_mut();
        let waiting = memory.input.len() - memory.consumed;
        let taken = bytes.len().min(INPUT_BYTES_MAX.saturating_sub(waiting));
        memory.input.drain(..memory.consumed);
        memory.consumed = 0;
        memory.input.extend_from_slice(&bytes[..taken]);
        taken
    }

    /// Goes on with the handshake.
    ///
    /// # Errors
    /// [`TlsError::Handshake`]: send the output (it holds an alert that tells the client why) and close.
    pub fn handshake(&mut self) -> Result<Handshake, TlsError> {
        if self.established {
            return Ok(Handshake::Done);
        }
        match self.stream.accept() {
            Ok(()) => {
                self.established = true;
                Ok(Handshake::Done)
            }
            Err(error) if error.code() == ErrorCode::WANT_READ => Ok(Handshake::NeedInput),
            Err(error) => {
                let mut reason = self.reason(&error);
                // OpenSSL's own reason is that no certificate is configured.
                if let Some(PskIdentity { name, known: false }) = self.psk_identity() {
                    reason = format!("no key for the identity {:?} ({reason})", printable(name));
                }
                Err(TlsError::Handshake(reason))
            }
        }
    }

    /// Decrypts into `buffer` as much as is there and fits. After `Bytes` there may be more: only `WouldBlock` means that
    /// the socket is next.
    ///
    /// With [`OUTPUT_BYTES_MAX`] waiting to be sent it gives `WouldBlock`: a client that does not receive is not read.
    ///
    /// # Errors
    /// [`TlsError::Session`]: close.
    pub fn read_plain(&mut self, buffer: &mut [u8]) -> Result<PlainRead, TlsError> {
        let mut filled = 0;
        while filled < buffer.len() && self.output_len() < OUTPUT_BYTES_MAX {
            match self.stream.ssl_read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                // What ended the session comes again with the next read.
                Err(_) if filled > 0 => break,
                Err(error) => match error.code() {
                    ErrorCode::WANT_READ => break,
                    ErrorCode::ZERO_RETURN => return Ok(PlainRead::Closed),
                    _ => return Err(TlsError::Session(self.reason(&error))),
                },
            }
        }
        Ok(if filled > 0 { PlainRead::Bytes(filled) } else { PlainRead::WouldBlock })
    }

    /// Encrypts plaintext into the output. Returns how many bytes were taken; fewer than all when the output is full.
    ///
    /// # Errors
    /// [`TlsError::Session`]: close.
    pub fn write_plain(&mut self, bytes: &[u8]) -> Result<usize, TlsError> {
        let mut taken = 0;
        for record in bytes.chunks(RECORD_BYTES) {
            if self.output_len() >= OUTPUT_BYTES_MAX {
                break;
            }
            match self.stream.ssl_write(record) {
                Ok(count) => taken += count,
                Err(error) => return Err(TlsError::Session(self.reason(&error))),
            }
        }
        Ok(taken)
    }

    /// Puts the end of the session (close_notify) into the output: the last thing to send after NBD's DISC.
    pub fn close(&mut self) {
        if self.established {
            // A session that is broken already needs no goodbye.
            let _ = self.stream.shutdown();
        }
    }

    /// Bytes to be sent.
    pub fn output_len(&self) -> usize {
        self.stream.get_ref().output.len()
    }

    /// Takes the bytes to be sent.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.stream.get_mut().output)
    }

    /// Exchanges the bytes to be sent for `spare`, which is emptied: sending without an allocation per turn.
    pub fn swap_output(&mut self, spare: &mut Vec<u8>) {
        spare.clear();
        std::mem::swap(spare, &mut self.stream.get_mut().output);
    }

    /// Who the client proved to be, for messages: the subject of its certificate or its PSK identity. Cut at 64
    /// characters, without control characters.
    pub fn client_identity(&self) -> Option<String> {
        if !self.established {
            return None;
        }
        match self.stream.ssl().peer_certificate() {
            Some(certificate) => {
                let name = certificate.subject_name().entries().last()?.data().to_string().ok()?;
                Some(printable(name.as_bytes()))
            }
            None => self.psk_identity().map(|identity| printable(&identity.name)),
        }
    }

    fn psk_identity(&self) -> Option<&PskIdentity> {
        self.stream.ssl().ex_data(psk_identity_index().ok()?)
    }

    /// Version and suite, for messages: `TLSv1.3 TLS_AES_128_GCM_SHA256`.
    pub fn protocol(&self) -> String {
        let ssl = self.stream.ssl();
        let suite = ssl.current_cipher().map_or("no cipher", |cipher| cipher.name());
        format!("{} {suite}", ssl.version_str())
    }

    /// OpenSSL's reasons without file and line of its sources.
    fn reason(&self, error: &openssl::ssl::Error) -> String {
        let Some(stack) = error.ssl_error() else {
            return match error.io_error() {
                Some(error) => error.to_string(),
                None => format!("OpenSSL wants something unexpected ({:?})", error.code()),
            };
        };
        let reasons: Vec<&str> = stack.errors().iter().filter_map(|error| error.reason()).collect();
        if reasons.is_empty() { stack.to_string() } else { reasons.join("; ") }
    }
}

/// What a client calls itself, for messages.
fn printable(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().filter(|c| !c.is_control()).take(64).collect()
}
