//! Connections of the API: accepted, bounded in number, time and size, and served.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tower::ServiceExt;
use tower_http::timeout::{RequestBodyTimeoutLayer, TimeoutLayer};

use super::peer::{Peer, authorize};

/// Connections at a time; more wait in the backlog.
const CONNECTIONS_MAX: usize = 256;
/// Time for the head of a request, counted also while a kept connection is idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest pause inside a request's body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest that a request may take: the longest `timeout_s`, and a little for the answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(620);
/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 32 << 10;
/// Pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves the control socket.
pub async fn control(listener: UnixListener, router: Router) {
    let router = bounded(router.layer(axum::middleware::from_fn(authorize)));
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    match Peer::of(&stream).await {
                        Ok(peer) => connection(stream, router.layer(axum::Extension(peer))).await,
                        Err(error) => tracing::warn!("a caller of the control socket is unknown: {error}"),
                    }
                    drop(place);
                });
            }
            Err(error) => accept_failed("control socket", &error).await,
        }
    }
}

/// Serves metrics on TCP.
pub async fn metrics_tcp(listener: TcpListener, router: Router) {
    let router = bounded(router);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    connection(stream, router).await;
                    drop(place);
                });
            }
            Err(error) => accept_failed("metrics listener", &error).await,
        }
    }
}

/// Serves metrics on a Unix socket, whose permissions say who may read them.
pub async fn metrics_unix(listener: UnixListener, router: Router) {
    let router = bounded(router);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    connection(stream, router).await;
                    drop(place);
                });
            }
            Err(error) => accept_failed("metrics socket", &error).await,
        }
    }
}

/// Limits on the time of a request and of its body.
pub fn bounded(router: Router) -> Router {
    router
        .layer(RequestBodyTimeoutLayer::new(BODY_TIMEOUT))
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, REQUEST_TIMEOUT))
}

async fn accept_failed(what: &str, error: &std::io::Error) {
    tracing::warn!("{what}: a connection cannot be accepted: {error}; raise LimitNOFILE if descriptors lack");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

async fn connection<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(stream: S, router: Router) {
    let service = TowerToHyperService::new(
        router.map_request(|request: Request<Incoming>| request.map(axum::body::Body::new)),
    );
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!("a connection of the API ended: {error}");
    }
}
