//! Bodies of requests, read within a limit and a time, and answers in JSON.

use super::failure::{Failure, Kind};
use super::state::State;
use super::work::{self, Usage};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;

/// Numbers of an answer beyond which it is written beside the runtime's threads: some milliseconds' work.
const MANY: usize = 1 << 15;

/// A body of JSON. Keys that are not known are passed over, as TEI does.
pub(super) struct Json<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Arc<State>> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &Arc<State>) -> Result<Self, Failure> {
        check_type(request.headers())?;
        let limit = state.settings.payload_limit;
        let too_large = || {
            Failure::new(
                Kind::TooLarge,
                "payload_limit",
                format!("the body has more than {limit} bytes; send fewer inputs at a time"),
            )
        };
        let announced =
            request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|length| length > limit as u64) {
            return Err(too_large());
        }
        let patience = state.settings.body_timeout;
        let body = tokio::time::timeout(patience, Limited::new(request.into_body(), limit).collect()).await;
        let body = body
            .map_err(|_| Failure::new(Kind::Timeout, "body_timeout", format!("the body did not arrive within {patience:?}")))?
            .map_err(|error| match error.downcast_ref::<LengthLimitError>() {
                Some(_) => too_large(),
                None => malformed(format!("the body broke off: {error}")),
            })?;
        let bytes = body.to_bytes();
        let text = std::str::from_utf8(&bytes).map_err(|error| malformed(format!("the body is not UTF-8: {error}")))?;
        parse(text).map(Self)
    }
}

/// What a key that is not there says, where that is true.
pub(super) fn yes() -> bool {
    true
}

/// # Errors
/// What is no JSON, and JSON of another form.
pub(super) fn parse<T: DeserializeOwned>(text: &str) -> Result<T, Failure> {
    serde_json::from_str(text).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => {
            Failure::new(Kind::Validation, "validation", format!("the body is not what this route takes: {error}"))
        }
        _ => malformed(format!("the body is not JSON: {error}")),
    })
}

fn malformed(message: String) -> Failure {
    Failure::new(Kind::Malformed, "malformed", message)
}

/// Whether a body is said to be JSON, and nothing around it.
fn check_type(headers: &HeaderMap) -> Result<(), Failure> {
    let refused = |message: String| Err(Failure::new(Kind::MediaType, "media_type", message));
    let said = |name| headers.get(name).map_or("", |value: &HeaderValue| value.to_str().unwrap_or("?"));
    let essence = said(header::CONTENT_TYPE).split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence != "application/json" && !(essence.starts_with("application/") && essence.ends_with("+json")) {
        return refused(format!("the body must be sent with `Content-Type: application/json`, not \"{essence}\""));
    }
    let encoding = said(header::CONTENT_ENCODING);
    if !(encoding.is_empty() || encoding.eq_ignore_ascii_case("identity")) {
        return refused(format!("`Content-Encoding: {encoding}` is not supported; send the body as it is"));
    }
    Ok(())
}

/// An answer of some `numbers` numbers.
///
/// # Errors
/// A value that JSON cannot hold: there is none.
pub(super) async fn answer<T: Serialize + Send + 'static>(
    state: &State,
    value: T,
    numbers: usize,
    usage: Option<Usage>,
) -> Result<Response, Failure> {
    let write = move || serde_json::to_vec(&value);
    let written = if numbers > MANY { work::aside(&state.helpers, write).await? } else { write() };
    let bytes =
        written.map_err(|error| Failure::new(Kind::Backend, "backend", format!("the answer cannot be written: {error}")))?;
    let mut response = ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], bytes).into_response();
    if let Some(usage) = usage {
        response.extensions_mut().insert(usage);
    }
    Ok(response)
}
