//! Guests: their devices, and what toolstacks' scripts ask for.

use axum::Json;
use axum::extract::State;

use super::extract::{Body, Params};
use super::{Api, Errors};
use crate::daemon::deadline_after;
use crate::guests;
use crate::model::{ClaimRequest, Deadline, Disk, GuestDevice};
use crate::problem::Problem;

/// All devices of guests that were found in XenStore, and the clients of `--blkif` sockets whose rings are connected.
#[utoipa::path(get, path = "/v1/guests", tag = "guests", responses((status = 200, body = Vec<GuestDevice>), Errors))]
pub async fn list(State(api): State<Api>) -> Json<Vec<GuestDevice>> {
    Json(guests::all(&api.daemon).into_iter().map(|(device, _)| device).collect())
}

/// Take a device over whose toolstack runs a script for it; answers with its disk when that is ready.
#[utoipa::path(post, path = "/v1/guests/claim", tag = "guests", request_body = ClaimRequest, params(Deadline),
    responses((status = 200, body = Disk), Errors))]
pub async fn claim(
    State(api): State<Api>,
    Params(query): Params<Deadline>,
    Body(request): Body<ClaimRequest>,
) -> Result<Json<Disk>, Problem> {
    let deadline = deadline_after(query.timeout_s)?;
    let daemon = api.daemon.clone();
    let flow = async move {
        let name = daemon.guests()?.claim(&request.xenbus_path, deadline).await?;
        Ok(daemon.describe(&*daemon.disk(&name)?))
    };
    api.daemon.run(flow).await.map(Json)
}
