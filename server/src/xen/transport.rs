//! The way to XenStore: the socket of xenstored, or the kernel's device where there is no such socket (a driver domain, a store in a
//! domain of its own).
//!
//! The device can be polled, and yet is not driven by the runtime: a write to it waits for the store's answer when it sets a watch
//! (on older kernels always), which would stop the whole control thread. So two small threads copy between the device and a socket
//! pair, and everything above sees a socket. They know three traps of the device: one `write` takes one message and drops what
//! follows it, header and payload share 4096 bytes, and a request that the kernel refuses is answered by the `write` alone.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::net::UnixStream;

use super::wire::{HEADER_BYTES, MESSAGE_MAX, Op, PAYLOAD_MAX};

/// The variable that names the socket, as libxenstore has it.
pub const SOCKET_VARIABLE: &str = "XENSTORED_PATH";

const SOCKETS: [&str; 2] = ["/run/xenstored/socket", "/var/run/xenstored/socket"];
const DEVICES: [&str; 2] = ["/dev/xen/xenbus", "/proc/xen/xenbus"];
const HYPERVISOR: &str = "/sys/hypervisor/type";

/// Where XenStore is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// Wherever this host has it; looked for again at each attempt.
    Auto,
    /// A Unix socket.
    Socket(PathBuf),
    /// A character device.
    Device(PathBuf),
}

impl Transport {
    /// Opens it. The error is a sentence for the operator.
    pub async fn open(&self) -> Result<UnixStream, String> {
        match self {
            Transport::Auto => Box::pin(find()?.open()).await,
            Transport::Socket(path) => UnixStream::connect(path).await.map_err(|error| match error.kind() {
                ErrorKind::PermissionDenied => format!(
                    "XenStore's socket {} may not be opened: run the daemon as root, or as a user whom that socket admits",
                    path.display()
                ),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                    format!("nobody answers at XenStore's socket {}: start xenstored", path.display())
                }
                _ => format!("XenStore's socket {} cannot be opened: {error}", path.display()),
            }),
            Transport::Device(path) => {
                let device = OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
                    format!(
                        "XenStore's device {} cannot be opened: {error}; run the daemon as root, in a domain that has a XenStore",
                        path.display()
                    )
                })?;
                bridge(device).map_err(|error| format!("XenStore's device {}: {error}", path.display()))
            }
        }
    }
}

/// The transport of this host, or why there is none.
fn find() -> Result<Transport, String> {
    let named = std::env::var_os(SOCKET_VARIABLE).map(PathBuf::from);
    choose(named, |path| path.exists(), std::fs::read_to_string(HYPERVISOR).ok())
}

fn choose(
    named: Option<PathBuf>,
    exists: impl Fn(&Path) -> bool,
    hypervisor: Option<String>,
) -> Result<Transport, String> {
    if let Some(path) = named {
        if !path.is_absolute() {
            return Err(format!("{SOCKET_VARIABLE} is {}: it has to be an absolute path", path.display()));
        }
        return Ok(Transport::Socket(path));
    }
    let first = |paths: [&str; 2]| paths.into_iter().map(PathBuf::from).find(|path| exists(path));
    if let Some(path) = first(SOCKETS) {
        return Ok(Transport::Socket(path));
    }
    if let Some(path) = first(DEVICES) {
        return Ok(Transport::Device(path));
    }
    Err(match hypervisor.as_deref().map(str::trim) {
        Some("xen") => format!(
            "this host runs Xen and there is neither {} nor {}: start xenstored, or load the kernel's xenfs",
            SOCKETS[0], DEVICES[0]
        ),
        _ => format!(
            "this host does not run Xen ({HYPERVISOR} does not say so, and there is no {}): disks are served without guests' rings",
            SOCKETS[0]
        ),
    })
}

/// A socket that speaks for a device. Two threads end when the socket is closed.
fn bridge(device: File) -> std::io::Result<UnixStream> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let device = Arc::new(device);
    let (reader, writer) = (device.clone(), device);
    let (requests, hangup) = (theirs.try_clone()?, theirs.try_clone()?);
    // Replies of the device and refusals of its driver must not mix within a message.
    let replies = Arc::new(Mutex::new(theirs));
    let refusals = replies.clone();
    std::thread::Builder::new()
        .name("xenbus-read".into())
        .spawn(move || copy_replies(&reader, &hangup, &replies))?;
    std::thread::Builder::new()
        .name("xenbus-write".into())
        .spawn(move || copy_requests(requests, &writer, &refusals))?;
    UnixStream::from_std(ours)
}

fn copy_replies(mut device: &File, hangup: &StdUnixStream, replies: &Mutex<StdUnixStream>) {
    let mut partial: Vec<u8> = Vec::new();
    let mut chunk = [0u8; 16 * 1024];
    loop {
        let (mut on_device, mut on_socket) = (false, false);
        {
            // The socket is asked for nothing but its end, which poll always reports.
            let mut waits = [
                PollFd::new(device.as_fd(), PollFlags::POLLIN),
                PollFd::new(hangup.as_fd(), PollFlags::empty()),
            ];
            match poll(&mut waits, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => break,
            }
            on_device |= waits[0].any().unwrap_or(false);
            on_socket |= waits[1].any().unwrap_or(false);
        }
        if on_socket {
            break;
        }
        if !on_device {
            continue;
        }
        let count = match device.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => continue,
            Err(_) => break,
        };
        partial.extend_from_slice(&chunk[..count]);
        let whole = whole_messages(&partial);
        let mut socket = replies.lock().unwrap_or_else(PoisonError::into_inner);
        if socket.write_all(&partial[..whole]).is_err() {
            break;
        }
        partial.drain(..whole);
        // A payload beyond the protocol never becomes whole: the client is given the header to see that.
        if partial.len() > HEADER_BYTES + PAYLOAD_MAX {
            let _ = socket.write_all(&partial);
            break;
        }
    }
    let _ = hangup.shutdown(std::net::Shutdown::Both);
}

/// Bytes at the beginning that are whole messages.
fn whole_messages(bytes: &[u8]) -> usize {
    let mut end = 0;
    while let Some(header) = bytes.get(end..end + HEADER_BYTES) {
        let len = u32::from_ne_bytes([header[12], header[13], header[14], header[15]]) as usize;
        match end.checked_add(HEADER_BYTES).and_then(|start| start.checked_add(len)) {
            Some(next) if next <= bytes.len() => end = next,
            _ => break,
        }
    }
    end
}

fn copy_requests(mut requests: StdUnixStream, mut device: &File, refusals: &Mutex<StdUnixStream>) {
    let mut message = [0u8; MESSAGE_MAX];
    while requests.read_exact(&mut message[..HEADER_BYTES]).is_ok() {
        let len = u32::from_ne_bytes([message[12], message[13], message[14], message[15]]) as usize;
        let Some(payload) = message.get_mut(HEADER_BYTES..HEADER_BYTES + len) else { break };
        if requests.read_exact(payload).is_err() {
            break;
        }
        let Err(error) = device.write_all(&message[..HEADER_BYTES + len]) else { continue };
        let Some(errno) = error.raw_os_error() else { break };
        let name = format!("{:?}\0", Errno::from_raw(errno));
        let mut refusal = Vec::from((Op::Error as u32).to_ne_bytes());
        refusal.extend_from_slice(&message[4..12]);
        refusal.extend_from_slice(&(name.len() as u32).to_ne_bytes());
        refusal.extend_from_slice(name.as_bytes());
        if refusals.lock().unwrap_or_else(PoisonError::into_inner).write_all(&refusal).is_err() {
            break;
        }
    }
    let _ = requests.shutdown(std::net::Shutdown::Both);
}

#[cfg(test)]
mod tests {
    //! Goal: the right transport, a sentence where there is none, and a device that is written one message at a time.
    //! Method: made-up hosts; a packet socket as the device, which keeps the boundaries of writes as the device does.

    use std::os::fd::OwnedFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::wire::Request;
    use super::*;

    #[test]
    fn the_socket_comes_before_the_device() {
        let has = |names: &'static [&'static str]| {
            move |path: &Path| names.iter().any(|name| Path::new(name) == path)
        };
        let all: &[&str] = &["/run/xenstored/socket", "/dev/xen/xenbus"];
        assert_eq!(choose(None, has(all), None).unwrap(), Transport::Socket("/run/xenstored/socket".into()));
        let device = choose(None, has(&["/proc/xen/xenbus"]), Some("xen\n".into())).unwrap();
        assert_eq!(device, Transport::Device("/proc/xen/xenbus".into()));
        assert_eq!(choose(Some("/x".into()), has(all), None).unwrap(), Transport::Socket("/x".into()));
        assert!(choose(Some("x".into()), has(all), None).unwrap_err().contains("absolute"));
    }

    #[test]
    fn a_host_without_xen_is_told_apart_from_one_without_a_store() {
        assert!(choose(None, |_| false, None).unwrap_err().starts_with("this host does not run Xen"));
        assert!(choose(None, |_| false, Some("kvm".into())).unwrap_err().starts_with("this host does not"));
        assert!(choose(None, |_| false, Some("xen\n".into())).unwrap_err().contains("start xenstored"));
    }

    #[tokio::test]
    async fn the_device_gets_whole_messages_and_its_refusals_become_replies() {
        let (device, kernel) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::empty()).unwrap();
        let mut client = bridge(File::from(device)).unwrap();
        let first = Request::Read("domid".into()).encode(1, 0).unwrap();
        let second = Request::Read("name".into()).encode(2, 0).unwrap();
        // Both at once, and the second in two pieces.
        let mut both = first.clone();
        both.extend_from_slice(&second[..20]);
        client.write_all(&both).await.unwrap();
        client.write_all(&second[20..]).await.unwrap();
        let kernel: OwnedFd = kernel;
        let kernel = tokio::task::spawn_blocking(move || {
            let mut kernel = File::from(kernel);
            let mut buffer = [0u8; 8192];
            for expected in [&first, &second] {
                let count = kernel.read(&mut buffer).unwrap();
                assert_eq!(&buffer[..count], &expected[..]);
            }
            // An answer that comes in pieces.
            let mut reply: Vec<u8> = [2u32, 1, 0, 1].iter().flat_map(|word| word.to_ne_bytes()).collect();
            reply.push(b'0');
            kernel.write_all(&reply[..5]).unwrap();
            kernel.write_all(&reply[5..]).unwrap();
            kernel
        })
        .await
        .unwrap();
        let mut reply = [0u8; 17];
        client.read_exact(&mut reply).await.unwrap();
        assert_eq!(reply[16], b'0');
        // The other end of the device is gone: a write fails, or the reader sees the end. Either way the client learns of it.
        drop(kernel);
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
    }

    #[test]
    fn a_refused_write_is_answered_with_its_own_number() {
        // A file that is open for reading only refuses writes as the kernel's driver does: by errno, and with no reply.
        let device = File::open("/dev/null").unwrap();
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let replies = Mutex::new(theirs.try_clone().unwrap());
        let mut client = ours;
        client.write_all(&Request::Watch("a".into(), "t".into()).encode(77, 0).unwrap()).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        copy_requests(theirs, &device, &replies);
        let mut reply = Vec::new();
        client.read_to_end(&mut reply).unwrap();
        assert_eq!(reply[..4], 16u32.to_ne_bytes());
        assert_eq!(reply[4..8], 77u32.to_ne_bytes());
        assert_eq!(&reply[16..], b"EBADF\0");
    }
}
