//! What goes wrong with a request: its status, and its body in the dialect of the route.

use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

/// Seconds after which a client that came at a bad time should try again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// What is wrong, as clients tell it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The body is not JSON in UTF-8.
    Malformed,
    /// There is nothing to embed.
    Empty,
    /// The key is missing or wrong.
    Unauthorized,
    /// No model has that name.
    UnknownModel,
    /// No route has that path.
    UnknownRoute,
    /// The route does not answer that method.
    Method,
    /// The body did not arrive in time.
    Timeout,
    /// The body is too long.
    TooLarge,
    /// The body is not declared as JSON.
    MediaType,
    /// The request asks for what cannot be given.
    Validation,
    /// A text cannot be tokenised.
    Tokenizer,
    /// The executor failed.
    Backend,
    /// What the admin asks for cannot be beside what there is, or what is being done.
    Conflict,
    /// Too much is under way.
    Overloaded,
    /// A model is loading or failing, or the server ends.
    Unhealthy,
}

/// A request that cannot be answered.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub(super) struct Failure {
    pub kind: Kind,
    /// Which of the kind's causes, for the metrics.
    pub reason: &'static str,
    pub message: String,
    /// The key of the body that is at fault.
    pub param: Option<&'static str>,
}

impl Kind {
    pub fn status(self) -> StatusCode {
        match self {
            Self::Malformed | Self::Empty => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::UnknownModel | Self::UnknownRoute => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Timeout => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Validation | Self::Tokenizer => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Backend => StatusCode::FAILED_DEPENDENCY,
            Self::Conflict => StatusCode::CONFLICT,
            Self::Overloaded => StatusCode::TOO_MANY_REQUESTS,
            Self::Unhealthy => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// TEI's `error_type`; TEI has none for faults of HTTP itself, which it answers with bare text.
    fn error_type(self) -> &'static str {
        match self {
            Self::Empty => "Empty",
            Self::Tokenizer => "Tokenizer",
            Self::Backend => "Backend",
            Self::Conflict => "Conflict",
            Self::Overloaded => "Overloaded",
            Self::Unhealthy => "Unhealthy",
            Self::Unauthorized => "Unauthorized",
            _ => "Validation",
        }
    }

    /// OpenAI's `type` and `code`.
    fn openai(self) -> (&'static str, &'static str) {
        match self {
            Self::Malformed => ("invalid_request_error", "invalid_json"),
            Self::Empty => ("invalid_request_error", "empty_input"),
            Self::Unauthorized => ("invalid_request_error", "invalid_api_key"),
            Self::UnknownModel => ("invalid_request_error", "model_not_found"),
            Self::UnknownRoute => ("invalid_request_error", "unknown_url"),
            Self::Method => ("invalid_request_error", "method_not_supported"),
            Self::Timeout => ("invalid_request_error", "request_timeout"),
            Self::TooLarge => ("invalid_request_error", "payload_too_large"),
            Self::MediaType => ("invalid_request_error", "unsupported_media_type"),
            Self::Validation => ("invalid_request_error", "invalid_value"),
            Self::Tokenizer => ("invalid_request_error", "tokenizer"),
            Self::Backend => ("server_error", "backend"),
            Self::Conflict => ("invalid_request_error", "conflict"),
            Self::Overloaded => ("rate_limit_error", "rate_limit_exceeded"),
            Self::Unhealthy => ("server_error", "unhealthy"),
        }
    }
}

impl Failure {
    pub fn new(kind: Kind, reason: &'static str, message: impl Into<String>) -> Self {
        Self { kind, reason, message: message.into(), param: None }
    }

    pub fn validation(param: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param), ..Self::new(Kind::Validation, "validation", message) }
    }

    pub fn empty(param: &'static str) -> Self {
        Self { param: Some(param), ..Self::new(Kind::Empty, "empty", format!("`{param}` cannot be empty")) }
    }

    /// The answer to a request for `uri`.
    pub fn response(&self, uri: &Uri) -> Response {
        let body = if is_openai(uri.path()) {
            let (kind, code) = self.kind.openai();
            json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": code } })
        } else {
            json!({ "error": self.message, "error_type": self.kind.error_type() })
        };
        let mut response = (self.kind.status(), axum::Json(body)).into_response();
        match self.kind {
            Kind::Overloaded | Kind::Unhealthy => {
                response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
            }
            Kind::Unauthorized => {
                response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // What is left of the body is not read.
            Kind::TooLarge | Kind::Timeout => {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}

/// Whether errors of the route at `path` have OpenAI's form.
fn is_openai(path: &str) -> bool {
    path == "/embeddings" || path == "/v1" || path.starts_with("/v1/")
}

/// A response without a body that carries the failure to [`super::access`], which knows the route and writes the body.
impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = self.kind.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<crate::Error> for Failure {
    fn from(error: crate::Error) -> Self {
        use crate::{Error, Setting};
        let message = error.to_string();
        match error {
            Error::Text { .. } => Self::new(Kind::Tokenizer, "tokenizer", message),
            Error::TokenId { .. } => Self::validation("input", message),
            Error::Setting { setting: Setting::PromptName, .. } => Self::validation("prompt_name", message),
            Error::Setting { .. } => Self::validation("input", message),
            Error::Overloaded { tokens, limit, .. } if tokens > limit => {
                let message =
                    format!("the request has {tokens} tokens, and at most {limit} may wait; send fewer texts at a time");
                Self { reason: "queue_tokens", ..Self::validation("input", message) }
            }
            Error::Overloaded { waiting, limit, .. } => {
                let message = format!("{waiting} tokens wait already, at most {limit} may; try again later");
                Self::new(Kind::Overloaded, "queue_tokens", message)
            }
            Error::DeadlineExceeded { .. } => Self::new(Kind::Overloaded, "deadline", message),
            Error::Cancelled { .. } => Self::new(Kind::Unhealthy, "cancelled", message),
            // Of texts that were sent together all fail with the same words.
            Error::Batch { source, .. } => Self::new(Kind::Backend, "backend", source.to_string()),
            _ => Self::new(Kind::Backend, "backend", message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use serde_json::Value;

    const KINDS: [Kind; 15] = [
        Kind::Malformed,
        Kind::Empty,
        Kind::Unauthorized,
        Kind::UnknownModel,
        Kind::UnknownRoute,
        Kind::Method,
        Kind::Timeout,
        Kind::TooLarge,
        Kind::MediaType,
        Kind::Validation,
        Kind::Tokenizer,
        Kind::Backend,
        Kind::Conflict,
        Kind::Overloaded,
        Kind::Unhealthy,
    ];

    /// Status, `Retry-After` and body of the answer of a route.
    async fn answer(failure: &Failure, path: &str) -> (u16, bool, Value) {
        let response = failure.response(&path.parse().unwrap());
        let (status, retry) = (response.status().as_u16(), response.headers().contains_key(header::RETRY_AFTER));
        (status, retry, serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap())
    }

    /// The table of docs/server.md is what is answered, in both forms.
    #[tokio::test]
    async fn every_failure_is_answered_as_the_documentation_says() {
        let (_, table) = include_str!("../../docs/server.md").split_once("## Errors").unwrap();
        let (table, _) = table.split_once("\n## ").unwrap();
        let rows: Vec<Vec<&str>> =
            table.lines().filter(|line| line.starts_with('|')).map(|line| line.split('|').map(str::trim).collect()).collect();
        let mut told = std::collections::BTreeSet::new();
        for kind in KINDS {
            let failure = Failure { param: Some("input"), ..Failure::new(kind, "test", "what is wrong") };
            let (status, retry, native) = answer(&failure, "/embed").await;
            assert_eq!(native["error"], "what is wrong");
            for path in ["/v1/embeddings", "/embeddings"] {
                let (same, _, openai) = answer(&failure, path).await;
                let error = &openai["error"];
                assert_eq!((same, &error["message"], &error["param"]), (status, &native["error"], &"input".into()), "{kind:?}");
                let code = error["code"].as_str().unwrap();
                let is_row = |row: &Vec<&str>| {
                    // What the admin alone says has no other form.
                    let codes =
                        if kind == Kind::Conflict { row[3].is_empty() } else { row[3].split(", ").any(|known| known == code) };
                    row[1] == status.to_string() && Some(row[2]) == native["error_type"].as_str() && codes
                };
                let row = rows.iter().position(is_row).unwrap_or_else(|| panic!("{kind:?}: {status} {native} {code}"));
                told.insert(row);
                assert_eq!(retry, rows[row][4].contains("`Retry-After`"), "{kind:?}");
            }
        }
        // All but the head of the table and its line.
        assert_eq!(told.len(), rows.len() - 2, "{rows:?}");
    }
}
