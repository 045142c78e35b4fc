//! Who may do what on the control socket, from the kernel's word on the other end (SO_PEERCRED).
//!
//! root and the daemon's own user may do everything; members of the group [`READERS`] may read; others nothing.

use axum::extract::Request;
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use nix::unistd::{Gid, Uid, User};
use tokio::net::UnixStream;

use crate::problem::{Problem, ProblemKind};

/// Members of this group may read.
pub const READERS: &str = "blktapd-ro";

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everything.
    All,
    /// Look.
    Read,
    /// Nothing.
    Nothing,
}

/// A caller.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    uid: Uid,
    access: Access,
}

impl Peer {
    /// Asks the kernel who is on the other end, and the user database for the groups.
    pub async fn of(stream: &UnixStream) -> std::io::Result<Peer> {
        let credentials = stream.peer_cred()?;
        let (uid, gid) = (Uid::from_raw(credentials.uid()), Gid::from_raw(credentials.gid()));
        if uid.is_root() || uid == nix::unistd::geteuid() {
            return Ok(Peer { uid, access: Access::All });
        }
        // The database may be remote and slow.
        let reads = tokio::task::spawn_blocking(move || is_reader(uid, gid)).await.unwrap_or(false);
        Ok(Peer { uid, access: if reads { Access::Read } else { Access::Nothing } })
    }

    /// Whether the caller may use a method.
    fn may(&self, method: &Method) -> bool {
        match self.access {
            Access::All => true,
            Access::Read => matches!(*method, Method::GET | Method::HEAD),
            Access::Nothing => false,
        }
    }
}

fn is_reader(uid: Uid, gid: Gid) -> bool {
    let Ok(Some(readers)) = nix::unistd::Group::from_name(READERS) else { return false };
    if gid == readers.gid {
        return true;
    }
    let Ok(Some(user)) = User::from_uid(uid) else { return false };
    let Ok(name) = std::ffi::CString::new(user.name) else { return false };
    nix::unistd::getgrouplist(&name, gid).is_ok_and(|groups| groups.contains(&readers.gid))
}

/// Refuses what the caller may not do. A connection without a known peer may do nothing.
pub async fn authorize(request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>().copied();
    match peer {
        Some(peer) if peer.may(request.method()) => next.run(request).await,
        Some(Peer { uid, access }) => {
            let may = if access == Access::Read { "only read" } else { "do nothing" };
            Problem::new(
                ProblemKind::Forbidden,
                format!(
                    "user {uid} may {may} here: root and the daemon's user may do everything, members of the group {READERS} \
                     may read"
                ),
            )
            .into_response()
        }
        None => {
            Problem::new(ProblemKind::Forbidden, "the caller of this connection is unknown").into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    //! Goal: who may do what. Method: a table.

    use super::*;

    #[test]
    fn readers_read_and_nobody_else_does() {
        let peer = |access| Peer { uid: Uid::from_raw(1000), access };
        for (access, get, put, delete) in [
            (Access::All, true, true, true),
            (Access::Read, true, false, false),
            (Access::Nothing, false, false, false),
        ] {
            let peer = peer(access);
            assert_eq!(
                [peer.may(&Method::GET), peer.may(&Method::PUT), peer.may(&Method::DELETE)],
                [get, put, delete],
                "{access:?}"
            );
        }
        assert!(peer(Access::Read).may(&Method::HEAD) && !peer(Access::Read).may(&Method::POST));
    }
}
