//! Disks: attach, look, change, detach.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::extract::{Body, Name, Params};
use super::{Api, Errors};
use crate::daemon::deadline_after;
use crate::model::{
    AttachRequest, Deadline, DetachQuery, Disk, DiskStats, MoveRequest, PauseQuery, QosRequest,
    ResizeRequest, ResumeRequest, SnapshotRequest,
};
use crate::problem::Problem;

/// All disks, by name.
#[utoipa::path(get, path = "/v1/disks", tag = "disks", responses((status = 200, body = Vec<Disk>), Errors))]
pub async fn list(State(api): State<Api>) -> Json<Vec<Disk>> {
    Json(api.daemon.list())
}

/// One disk with its connections.
#[utoipa::path(get, path = "/v1/disks/{name}", tag = "disks",
    params(("name" = String, Path, description = "The disk", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$")),
    responses((status = 200, body = Disk), Errors))]
pub async fn show(State(api): State<Api>, Name(name): Name) -> Result<Json<Disk>, Problem> {
    api.daemon.show(&name).await.map(Json)
}

/// Serve an image as a disk. Repeating it with equal arguments succeeds (200), with different ones it is a conflict.
#[utoipa::path(put, path = "/v1/disks/{name}", tag = "disks", request_body = AttachRequest,
    params(("name" = String, Path, description = "The disk", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"), Deadline),
    responses((status = 201, description = "It is served now.", body = Disk),
              (status = 200, description = "It was served already.", body = Disk), Errors))]
pub async fn attach(
    State(api): State<Api>,
    Name(name): Name,
    Params(query): Params<Deadline>,
    Body(request): Body<AttachRequest>,
) -> Result<(StatusCode, Json<Disk>), Problem> {
    let deadline = deadline_after(query.timeout_s)?;
    let daemon = api.daemon.clone();
    let flow = async move { daemon.attach(&name, request, deadline).await };
    let (disk, new) = api.daemon.run(flow).await?;
    Ok((if new { StatusCode::CREATED } else { StatusCode::OK }, Json(disk)))
}

/// Stop serving a disk when its clients have gone; with force at once. What is left of it, if the kernel still works on it, is
/// the answer.
#[utoipa::path(delete, path = "/v1/disks/{name}", tag = "disks",
    params(("name" = String, Path, description = "The disk", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"), DetachQuery),
    responses((status = 200, description = "Gone (null), or a zombie.", body = Option<Disk>), Errors))]
pub async fn detach(
    State(api): State<Api>,
    Name(name): Name,
    Params(query): Params<DetachQuery>,
) -> Result<Json<Option<Disk>>, Problem> {
    let deadline = deadline_after(query.timeout_s)?;
    let daemon = api.daemon.clone();
    let flow = async move { daemon.detach(&name, query.force.unwrap_or(false), deadline).await };
    api.daemon.run(flow).await.map(Json)
}

/// Counters and latencies of one disk.
#[utoipa::path(get, path = "/v1/disks/{name}/stats", tag = "disks",
    params(("name" = String, Path, description = "The disk", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$")),
    responses((status = 200, body = DiskStats), Errors))]
pub async fn disk_stats(State(api): State<Api>, Name(name): Name) -> Result<Json<DiskStats>, Problem> {
    let disk = api.daemon.disk(&name)?;
    Ok(Json(api.daemon.stats(&disk).await))
}

/// Counters and latencies of all disks.
#[utoipa::path(get, path = "/v1/stats", tag = "disks", responses((status = 200, body = Vec<DiskStats>), Errors))]
pub async fn all_stats(State(api): State<Api>) -> Json<Vec<DiskStats>> {
    Json(api.daemon.all_stats().await)
}

/// Change limits and groups of a disk, live.
#[utoipa::path(patch, path = "/v1/disks/{name}/qos", tag = "disks", request_body = QosRequest,
    params(("name" = String, Path, description = "The disk", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"), Deadline),
    responses((status = 200, body = Disk), Errors))]
pub async fn qos(
    State(api): State<Api>,
    Name(name): Name,
    Params(query): Params<Deadline>,
    Body(request): Body<QosRequest>,
) -> Result<Json<Disk>, Problem> {
    let deadline = deadline_after(query.timeout_s)?;
    let daemon = api.daemon.clone();
    api.daemon.run(async move { daemon.set_disk_limits(&name, request, deadline).await }).await.map(Json)
}

/// Hold a disk's requests. A disk that cannot be quiet in time runs on.
#[utoipa::path(post, path = "/v1/disks/{name}/pause", tag = "disks",
    params(("name" = String, Path, description = "The disk", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"), PauseQuery),
    responses((status = 200, body = Disk), Errors))]
pub async fn pause(
    State(api): State<Api>,
    Name(name): Name,
    Params(query): Params<PauseQuery>,
) -> Result<Json<Disk>, Problem> {
    let deadline = deadline_after(query.timeout_s)?;
    let daemon = api.daemon.clone();
    let release = query.release.unwrap_or(false);
    api.daemon.run(async move { daemon.pause(&name, release, deadline).await }).await.map(Json)
}

/// Run a paused disk, run held requests of a disk in storage-error again, or try a failed disk now.
#[utoipa::path(post, path = "/v1/disks/{name}/resume", tag = "disks", request_body = ResumeRequest,
    params(("name" = String, Path, description = "The disk", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"), Deadline),
    responses((status = 200, body = Disk), Errors))]
pub async fn resume(
    State(api): State<Api>,
    Name(name): Name,
    Params(query): Params<Deadline>,
    Body(request): Body<ResumeRequest>,
) -> Result<Json<Disk>, Problem> {
    let deadline = deadline_after(query.timeout_s)?;
    let daemon = api.daemon.clone();
    api.daemon.run(async move { daemon.resume(&name, request, deadline).await }).await.map(Json)
}

/// Put new overlays over disks at one instant, all or none; what they hold then stays in their images.
#[utoipa::path(post, path = "/v1/snapshot", tag = "disks", request_body = SnapshotRequest, params(Deadline),
    responses((status = 200, body = Vec<Disk>), Errors))]
pub async fn snapshot(
    State(api): State<Api>,
    Params(query): Params<Deadline>,
    Body(request): Body<SnapshotRequest>,
) -> Result<Json<Vec<Disk>>, Problem> {
    let deadline = deadline_after(query.timeout_s)?;
    let daemon = api.daemon.clone();
    api.daemon.run(async move { daemon.snapshot(request.disks, deadline).await }).await.map(Json)
}

/// Make a disk larger while it runs; clients see it when they connect again.
#[utoipa::path(post, path = "/v1/disks/{name}/resize", tag = "disks", request_body = ResizeRequest,
    params(("name" = String, Path, description = "The disk", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"), Deadline),
    responses((status = 200, body = Disk), Errors))]
pub async fn resize(
    State(api): State<Api>,
    Name(name): Name,
    Params(query): Params<Deadline>,
    Body(request): Body<ResizeRequest>,
) -> Result<Json<Disk>, Problem> {
    let deadline = deadline_after(query.timeout_s)?;
    let daemon = api.daemon.clone();
    api.daemon.run(async move { daemon.resize(&name, request.size_bytes, deadline).await }).await.map(Json)
}

/// Give a disk up: its requests are answered with errors until it is detached, over restarts as well.
#[utoipa::path(post, path = "/v1/disks/{name}/fail", tag = "disks",
    params(("name" = String, Path, description = "The disk", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"), Deadline),
    responses((status = 200, body = Disk), Errors))]
pub async fn fail(
    State(api): State<Api>,
    Name(name): Name,
    Params(query): Params<Deadline>,
) -> Result<Json<Disk>, Problem> {
    let deadline = deadline_after(query.timeout_s)?;
    let daemon = api.daemon.clone();
    api.daemon.run(async move { daemon.fail(&name, deadline).await }).await.map(Json)
}

/// Not in the description: only a daemon that was started for tests has this route.
pub async fn inject_panic(
    State(api): State<Api>,
    Name(name): Name,
    Params(query): Params<Deadline>,
) -> Result<Json<()>, Problem> {
    let deadline = deadline_after(query.timeout_s)?;
    let daemon = api.daemon.clone();
    api.daemon.run(async move { daemon.inject_panic(&name, deadline).await }).await.map(Json)
}

/// Move a disk with its clients to another shard, live.
#[utoipa::path(post, path = "/v1/disks/{name}/move", tag = "disks", request_body = MoveRequest,
    params(("name" = String, Path, description = "The disk", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"), Deadline),
    responses((status = 200, body = Disk), Errors))]
pub async fn move_disk(
    State(api): State<Api>,
    Name(name): Name,
    Params(query): Params<Deadline>,
    Body(request): Body<MoveRequest>,
) -> Result<Json<Disk>, Problem> {
    let deadline = deadline_after(query.timeout_s)?;
    let daemon = api.daemon.clone();
    api.daemon.run(async move { daemon.move_disk(&name, request.shard, deadline).await }).await.map(Json)
}
