//! The HTTP API: versioned JSON on the control socket, described by OpenAPI from the code itself.
//!
//! A handler turns a request into one call of the daemon, and nothing else. Who may call is decided in [`peer`], how much and
//! how long in [`serve`]; every failing answer is a [`Problem`].

mod disks;
mod extract;
mod guests;
mod host;
pub mod peer;
pub mod serve;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use utoipa::openapi::{OpenApi, RefOr, Response};
use utoipa::{IntoResponses, OpenApi as _, PartialSchema, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::daemon::Daemon;
use crate::metrics::Metrics;
use crate::problem::{Problem, ProblemKind};

/// Largest body that is read, in bytes: an attach with the longest path is smaller.
const BODY_BYTES_MAX: usize = 64 << 10;

/// What handlers share.
#[derive(Clone)]
pub struct Api {
    /// The daemon.
    pub daemon: Arc<Daemon>,
    /// Its metrics.
    pub metrics: Arc<Metrics>,
}

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "blktapd",
        description = "Control of the block server blktapd, on its control socket. Changes are idempotent by name.",
        license(name = "MIT OR Apache-2.0")
    ),
    servers((url = "http://localhost", description = "over the Unix socket RUN_DIR/ctl.sock")),
    components(schemas(crate::model::Image, Problem))
)]
struct Document;

/// Every way in which a call can fail, for the description.
struct Errors;

impl IntoResponses for Errors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let problem = utoipa::openapi::ContentBuilder::new()
            .schema(Some(utoipa::openapi::Ref::from_schema_name(Problem::name())))
            .build();
        let statuses = [
            ("400", "The request is not what this description says."),
            ("403", "The caller may not do this."),
            ("404", "No such disk, group or route."),
            ("405", "The method is not one of this route."),
            ("409", "The thing is different, in use, or not in a state that allows this."),
            ("413", "The body is too large."),
            ("415", "The body is not application/json."),
            ("422", "The request cannot be right, or the image could not be opened."),
            ("500", "The daemon, the kernel or the store failed."),
            ("503", "A limit of the daemon was reached, or it is stopping."),
            ("504", "The deadline passed first."),
        ];
        statuses
            .into_iter()
            .map(|(status, description)| {
                let response = utoipa::openapi::ResponseBuilder::new()
                    .description(description)
                    .content("application/json", problem.clone())
                    .build();
                (status.to_owned(), RefOr::T(response))
            })
            .collect()
    }
}

fn api() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(disks::list))
        .routes(routes!(disks::show, disks::attach, disks::detach))
        .routes(routes!(disks::disk_stats))
        .routes(routes!(disks::all_stats))
        .routes(routes!(disks::qos))
        .routes(routes!(disks::pause))
        .routes(routes!(disks::resume))
        .routes(routes!(disks::snapshot))
        .routes(routes!(disks::resize))
        .routes(routes!(disks::fail))
        .routes(routes!(disks::move_disk))
        .routes(routes!(guests::list))
        .routes(routes!(guests::claim))
        .routes(routes!(host::groups))
        .routes(routes!(host::group, host::group_qos, host::delete_group))
        .routes(routes!(host::shards))
        .routes(routes!(host::events))
        .routes(routes!(host::reload))
        .routes(routes!(host::version))
        .routes(routes!(host::openapi))
        .routes(routes!(host::metrics))
        .routes(routes!(host::healthz))
}

/// The description of the API.
pub fn openapi() -> OpenApi {
    let mut document = api().into_openapi();
    // A schema that is only referred to by hand-written parts.
    if let Some(components) = &mut document.components {
        components.schemas.entry(Problem::name().into_owned()).or_insert_with(Problem::schema);
    }
    document
}

/// The routes of the control socket.
pub fn control_router(api_state: Api) -> Router {
    let (mut router, _) = api().split_for_parts();
    if api_state.daemon.settings().fault_commands {
        router = router
            .route("/v1/disks/{name}/inject-panic", axum::routing::post(disks::inject_panic))
            .route("/v1/shards/{index}/inject-panic", axum::routing::post(host::inject_panic));
    }
    finish(router.with_state(api_state))
}

/// The routes of the metrics listener.
pub fn metrics_router(api_state: Api) -> Router {
    let router: Router<Api> = Router::new()
        .route("/metrics", axum::routing::get(host::metrics))
        .route("/healthz", axum::routing::get(host::healthz));
    finish(router.with_state(api_state))
}

fn finish(router: Router) -> Router {
    router
        .fallback(async |uri: axum::http::Uri| {
            let path: String = uri.path().chars().take(200).collect();
            Problem::new(
                ProblemKind::NotFound,
                format!("there is nothing at {path:?}: GET /v1/openapi.json on the control socket describes the API"),
            )
        })
        .method_not_allowed_fallback(async |method: axum::http::Method, uri: axum::http::Uri| {
            let path: String = uri.path().chars().take(200).collect();
            Problem::new(
                ProblemKind::Method,
                format!("{path:?} does not take {method}: the header Allow has the methods, GET /v1/openapi.json the API"),
            )
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
}
