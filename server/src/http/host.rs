//! Everything that is not one disk: groups, shards, events, the configuration, metrics, health, the description itself.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::extract::{Body, Name, Params};
use super::{Api, Errors};
use crate::daemon::deadline_after;
use crate::events::EVENTS_MAX;
use crate::limit_change::LimitChange;
use crate::model::{Deadline, Event, EventQuery, Group, Health, Reload, Shard, Version};
use crate::problem::{Problem, ProblemKind};

/// All groups.
#[utoipa::path(get, path = "/v1/groups", tag = "groups", responses((status = 200, body = Vec<Group>), Errors))]
pub async fn groups(State(api): State<Api>) -> Json<Vec<Group>> {
    Json(api.daemon.all_groups())
}

/// One group.
#[utoipa::path(get, path = "/v1/groups/{name}", tag = "groups",
    params(("name" = String, Path, description = "The group", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$")),
    responses((status = 200, body = Group), Errors))]
pub async fn group(State(api): State<Api>, Name(name): Name) -> Result<Json<Group>, Problem> {
    api.daemon.describe_group(&name).map(Json)
}

/// Change the limits of a group, live. A group that nobody has mentioned before is made.
#[utoipa::path(patch, path = "/v1/groups/{name}", tag = "groups", request_body = LimitChange,
    params(("name" = String, Path, description = "The group", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$")),
    responses((status = 200, body = Group), Errors))]
pub async fn group_qos(
    State(api): State<Api>,
    Name(name): Name,
    Body(change): Body<LimitChange>,
) -> Result<Json<Group>, Problem> {
    let daemon = api.daemon.clone();
    api.daemon.run(async move { daemon.set_group_limits(&name, &change).await }).await.map(Json)
}

/// Forget a group that no disk is in.
#[utoipa::path(delete, path = "/v1/groups/{name}", tag = "groups",
    params(("name" = String, Path, description = "The group", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$")),
    responses((status = 204), Errors))]
pub async fn delete_group(State(api): State<Api>, Name(name): Name) -> Result<StatusCode, Problem> {
    let daemon = api.daemon.clone();
    api.daemon.run(async move { daemon.delete_group(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// All shards.
#[utoipa::path(get, path = "/v1/shards", tag = "host", responses((status = 200, body = Vec<Shard>), Errors))]
pub async fn shards(State(api): State<Api>) -> Json<Vec<Shard>> {
    Json(api.daemon.shards())
}

/// Not in the description: only a daemon that was started for tests has this route.
pub async fn inject_panic(
    State(api): State<Api>,
    Path(index): Path<u16>,
    Params(query): Params<Deadline>,
) -> Result<Json<()>, Problem> {
    let deadline = deadline_after(query.timeout_s)?;
    let daemon = api.daemon.clone();
    api.daemon.run(async move { daemon.inject_shard_panic(index, deadline).await }).await.map(Json)
}

/// What happened lately, oldest first.
#[utoipa::path(get, path = "/v1/events", tag = "host", params(EventQuery),
    responses((status = 200, body = Vec<Event>), Errors))]
pub async fn events(
    State(api): State<Api>,
    Params(query): Params<EventQuery>,
) -> Result<Json<Vec<Event>>, Problem> {
    let limit = query.limit.map_or(EVENTS_MAX, |limit| limit as usize);
    if !(1..=EVENTS_MAX).contains(&limit) {
        let message = format!("limit is {limit}: expected 1 to {EVENTS_MAX}");
        return Err(Problem::new(ProblemKind::Malformed, message));
    }
    let after = query.after.unwrap_or(0);
    if after > i64::MAX as u64 {
        return Err(Problem::new(
            ProblemKind::Malformed,
            format!("after is {after}: expected at most {}", i64::MAX),
        ));
    }
    Ok(Json(api.daemon.events.after(after, limit)))
}

/// Read the configuration again.
#[utoipa::path(post, path = "/v1/reload", tag = "host", responses((status = 200, body = Reload), Errors))]
pub async fn reload(State(api): State<Api>) -> Result<Json<Reload>, Problem> {
    let daemon = api.daemon.clone();
    api.daemon.run(async move { crate::systemd::reloading(&daemon).await }).await.map(Json)
}

/// The program and its version.
#[utoipa::path(get, path = "/v1/version", tag = "host", responses((status = 200, body = Version), Errors))]
pub async fn version(State(api): State<Api>) -> Json<Version> {
    Json(Version {
        program: env!("CARGO_PKG_NAME").into(),
        version: env!("CARGO_PKG_VERSION").into(),
        api: "v1".into(),
        pid: std::process::id(),
        uptime_s: api.daemon.uptime_s(),
    })
}

/// This description.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "host",
    responses((status = 200, description = "An OpenAPI document.", body = serde_json::Value), Errors))]
pub async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(super::openapi())
}

/// Metrics for Prometheus, in its text format.
#[utoipa::path(get, path = "/metrics", tag = "host",
    responses((status = 200, description = "The metrics.", content(
        (String = "text/plain; version=0.0.4; charset=utf-8"))), Errors))]
pub async fn metrics(State(api): State<Api>) -> Result<Response, Problem> {
    api.daemon.measure();
    let text = api.metrics.scrape(api.daemon.clone()).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

/// Whether every shard turns.
#[utoipa::path(get, path = "/healthz", tag = "host",
    responses((status = 200, body = Health), (status = 503, description = "Something does not turn.", body = Health)))]
pub async fn healthz(State(api): State<Api>, _headers: HeaderMap) -> (StatusCode, Json<Health>) {
    let health = api.daemon.health();
    (if health.healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(health))
}
