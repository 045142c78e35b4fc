//! The one error of the control side: what went wrong, small enough to match and long enough to act on.
//!
//! A [`Problem`] is at once the error of every flow, the body of every failing HTTP answer and the source of the exit
//! code of `blktapd ctl`; the three mappings live here and nowhere else.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use shard::api::{ShardError, ShardErrorKind};
use utoipa::ToSchema;

/// What kind of thing went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// The request is not what the description of the API says: JSON that does not parse, an unknown field, a wrong type.
    Malformed,
    /// The request is well formed and cannot be right: a name, an image, a value, an option.
    Invalid,
    /// No such disk, group, shard or route.
    NotFound,
    /// The thing exists and is different, or belongs to somebody else.
    Conflict,
    /// The disk is in use, or its state does not allow it now.
    Busy,
    /// The deadline passed first.
    TimedOut,
    /// The caller may not do this.
    Forbidden,
    /// The image could not be opened or does not fit.
    Image,
    /// The method is not one of this route.
    Method,
    /// The body is larger than the daemon reads.
    TooLarge,
    /// The body is not `application/json`.
    MediaType,
    /// A limit of the daemon was reached, or it is going down: later may be better.
    Unavailable,
    /// The daemon, the kernel or the store failed.
    Failed,
}

/// An error for the operator: it names the thing, what was found, what was expected and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize, ToSchema)]
#[error("{message}")]
pub struct Problem {
    /// For programs.
    pub kind: ProblemKind,
    /// For people.
    pub message: String,
}

impl Problem {
    /// A problem of a kind.
    pub fn new(kind: ProblemKind, message: impl Into<String>) -> Problem {
        Problem { kind, message: message.into() }
    }

    /// The request cannot be right.
    pub fn invalid(message: impl Into<String>) -> Problem {
        Problem::new(ProblemKind::Invalid, message)
    }

    /// Something failed that the caller could not know.
    pub fn failed(message: impl Into<String>) -> Problem {
        Problem::new(ProblemKind::Failed, message)
    }

    /// The same problem with words before its message.
    pub fn context(self, what: &str) -> Problem {
        Problem { kind: self.kind, message: format!("{what}: {}", self.message) }
    }

    /// The status of the HTTP answer.
    pub fn status(&self) -> StatusCode {
        match self.kind {
            ProblemKind::Malformed => StatusCode::BAD_REQUEST,
            ProblemKind::NotFound => StatusCode::NOT_FOUND,
            ProblemKind::Conflict | ProblemKind::Busy => StatusCode::CONFLICT,
            ProblemKind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            ProblemKind::Forbidden => StatusCode::FORBIDDEN,
            ProblemKind::Invalid | ProblemKind::Image => StatusCode::UNPROCESSABLE_ENTITY,
            ProblemKind::Method => StatusCode::METHOD_NOT_ALLOWED,
            ProblemKind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ProblemKind::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ProblemKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            ProblemKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The exit code of `blktapd ctl` (5, no daemon, is the client's own).
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            ProblemKind::Malformed
            | ProblemKind::Invalid
            | ProblemKind::Method
            | ProblemKind::TooLarge
            | ProblemKind::MediaType => 2,
            ProblemKind::NotFound => 3,
            ProblemKind::Conflict | ProblemKind::Busy => 4,
            ProblemKind::TimedOut => 6,
            ProblemKind::Forbidden | ProblemKind::Image | ProblemKind::Unavailable | ProblemKind::Failed => 1,
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        (self.status(), Json(self)).into_response()
    }
}

impl From<ShardError> for Problem {
    fn from(error: ShardError) -> Problem {
        let kind = match error.kind {
            ShardErrorKind::NoSuchDisk => ProblemKind::NotFound,
            ShardErrorKind::WrongState | ShardErrorKind::Interrupted | ShardErrorKind::DataInDoubt => {
                ProblemKind::Busy
            }
            ShardErrorKind::Guest => ProblemKind::Invalid,
            ShardErrorKind::Limit => ProblemKind::Unavailable,
            ShardErrorKind::Failed => ProblemKind::Failed,
        };
        Problem::new(kind, error.message)
    }
}

impl From<formats::spec::SpecError> for Problem {
    fn from(error: formats::spec::SpecError) -> Problem {
        Problem::invalid(error.to_string())
    }
}
