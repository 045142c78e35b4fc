//! Who is on the other end of a connection, for messages.

use std::net::SocketAddr;

use tokio::net::UnixStream;

/// `unix pid 1234 (fio)`, as far as the kernel tells.
pub fn of_unix(stream: &UnixStream) -> String {
    let Some(pid) = stream.peer_cred().ok().and_then(|credentials| credentials.pid()) else {
        return "unix".into();
    };
    // A process may have a name of any bytes; control characters would forge lines of the log.
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => {
            let name: String = name.trim_end().chars().filter(|c| !c.is_control()).take(32).collect();
            format!("unix pid {pid} ({name})")
        }
        Err(_) => format!("unix pid {pid}"),
    }
}

/// `tcp 127.0.0.1:4711`.
pub fn of_tcp(address: SocketAddr) -> String {
    format!("tcp {address}")
}
