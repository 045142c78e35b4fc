//! One request to the daemon over its Unix socket.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{Failure, NO_DAEMON};
use crate::problem::Problem;

/// Largest answer that is read, in bytes: thousands of disks.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// How much longer than its deadline an answer may take: the daemon keeps deadlines itself, and explains.
const GRACE: Duration = Duration::from_secs(5);

/// Where the daemon is, and how long it may take.
#[derive(Debug, Clone)]
pub struct Connection {
    /// Its control socket.
    pub socket: PathBuf,
    /// `--timeout`.
    pub timeout_s: u32,
}

/// What a request sends.
pub const NO_BODY: Option<&()> = None;

impl Connection {
    /// Asks for something.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.request(Method::GET, path, NO_BODY).await
    }

    /// Sends a request that has a deadline of its own; `path` has no query yet, or ends with one.
    pub async fn change<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Failure> {
        let separator = if path.contains('?') { '&' } else { '?' };
        self.request(method, &format!("{path}{separator}timeout_s={}", self.timeout_s), body).await
    }

    /// Sends a request and reads its answer.
    pub async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Failure> {
        let limit = Duration::from_secs(self.timeout_s.into()) + GRACE;
        match tokio::time::timeout(limit, self.exchange(method, path, body)).await {
            Ok(result) => result,
            Err(_) => Err(Failure {
                message: format!(
                    "the daemon at {} has not answered within {} s: it may be stopped or overloaded; see its log",
                    self.socket.display(),
                    limit.as_secs()
                ),
                exit_code: 6,
            }),
        }
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Failure> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.no_daemon(&error))?;
        let broken = |error: &dyn std::fmt::Display| Failure {
            message: format!(
                "the daemon at {} ended the connection: {error}; see its log",
                self.socket.display()
            ),
            exit_code: NO_DAEMON,
        };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(&error))?;
        tokio::spawn(connection);
        let bytes = match body {
            Some(body) => serde_json::to_vec(body).map_err(|error| failed(&error))?,
            None => Vec::new(),
        };
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "localhost");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(Bytes::from(bytes))).map_err(|error| failed(&error))?;
        let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
        let status = response.status();
        let answer =
            Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await.map_err(|e| broken(&e))?;
        let answer = answer.to_bytes();
        if status.is_success() {
            let answer: &[u8] = if answer.is_empty() { b"null" } else { &answer };
            return serde_json::from_slice(answer).map_err(|error| failed(&error));
        }
        match serde_json::from_slice::<Problem>(&answer) {
            Ok(problem) => Err(problem.into()),
            Err(_) => Err(Failure {
                message: format!("the daemon answered {status}: {}", String::from_utf8_lossy(&answer)),
                exit_code: 1,
            }),
        }
    }

    fn no_daemon(&self, error: &std::io::Error) -> Failure {
        use std::io::ErrorKind;
        let socket = self.socket.display();
        let (message, exit_code) = match error.kind() {
            ErrorKind::NotFound => (
                format!(
                    "no daemon: there is no socket {socket}; start `blktapd serve`, or name its socket with --ctl or BLKTAPD_CTL"
                ),
                NO_DAEMON,
            ),
            ErrorKind::ConnectionRefused => {
                (format!("no daemon: nobody answers at {socket}; start `blktapd serve`"), NO_DAEMON)
            }
            ErrorKind::PermissionDenied => (
                format!(
                    "the socket {socket} may not be used: {error}; become root or a member of the group blktapd-ro"
                ),
                1,
            ),
            ErrorKind::InvalidInput => (format!("the socket {socket} cannot be: {error}"), 2),
            _ => (format!("no daemon: {socket}: {error}"), NO_DAEMON),
        };
        Failure { message, exit_code }
    }
}

fn failed(error: &dyn std::fmt::Display) -> Failure {
    Failure {
        message: format!("the daemon's answer is not understood: {error}; is it of another version?"),
        exit_code: 1,
    }
}
