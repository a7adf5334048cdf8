//! The front door: who may come in, how many at a time, and what is said, counted and logged of every request.

use super::failure::{Failure, Kind};
use super::state::{Phase, State};
use super::work::{Call, Usage};
use crate::Class;
use axum::extract::{Request, State as Shared};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Names a request in logs; taken from the client where it gives one.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// `interactive` or `bulk`.
const PRIORITY: HeaderName = HeaderName::from_static("x-priority");
/// Characters of a client's own id that are kept.
const LONGEST_ID: usize = 128;

/// Requests since the start, which makes ids differ.
static COUNT: AtomicU64 = AtomicU64::new(0);

/// Lets a request in or turns it away, and tells what came of it.
pub(super) async fn front_door(Shared(state): Shared<Arc<State>>, mut request: Request, next: Next) -> Response {
    let arrived = Instant::now();
    let id = request_id(request.headers(), state.started);
    let mut open = Open::new(&state, arrived, &request, &id);
    let tracer = state.tracer.as_ref().filter(|_| !is_public(&open.method, open.uri.path()));
    let span = tracer.and_then(|tracer| tracer.begin(request.headers()));
    let mut response = match admit(&state, &request, arrived) {
        Err(failure) => failure.into_response(),
        Ok(admitted) => {
            request.extensions_mut().insert(admitted.call.clone());
            let response = next.run(request).await;
            drop(admitted);
            response
        }
    };
    let failure = response.extensions_mut().remove::<Failure>();
    if let Some(failure) = &failure {
        response = failure.response(&open.uri);
    }
    let usage = response.extensions_mut().remove::<Usage>();
    if let Some(usage) = &usage {
        tell(response.headers_mut(), usage, arrived);
    }
    tell_id(response.headers_mut(), &id);
    if state.phase() == Phase::Draining {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if let (Some(tracer), Some(span)) = (tracer, span) {
        // Names are few: what is no route is not in them.
        let known = response.status() != StatusCode::NOT_FOUND;
        let name = if known { format!("{} {}", open.method, open.uri.path()) } else { open.method.to_string() };
        tracer.end(span, &name, response.status(), failure.as_ref(), usage.as_ref());
    }
    open.end(response.status(), failure.as_ref(), usage.as_ref());
    response
}

/// A request that may be worked on.
pub(super) struct Admitted {
    pub call: Call,
    /// Given back when the request has its answer, or its client has gone.
    _permit: Option<tokio::sync::OwnedSemaphorePermit>,
    _active: Option<Active>,
}

/// Counted while it lives.
struct Active(prometheus::IntGauge);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// # Errors
/// Why a request is turned away.
pub(super) fn admit(state: &State, request: &Request, arrived: Instant) -> Result<Admitted, Failure> {
    if !is_public(request.method(), request.uri().path()) && !state.admits(key(request.headers())) {
        let message = "a key is needed: `Authorization: Bearer KEY`, with one that this server knows";
        return Err(Failure::new(Kind::Unauthorized, "unauthorized", message));
    }
    let class = class(request.headers())?;
    let call = Call { arrived, deadline: arrived + state.settings.request_timeout, class, streamed: false };
    // What tells of the server is always answered.
    if request.method() != Method::POST {
        return Ok(Admitted { call, _permit: None, _active: None });
    }
    if state.phase() == Phase::Draining {
        return Err(draining());
    }
    let permit = state.requests.clone().try_acquire_owned().map_err(|_| {
        let most = state.settings.max_concurrent_requests;
        Failure::new(
            Kind::Overloaded,
            "concurrent_requests",
            format!("{most} requests are under way, as many as may be; try again later"),
        )
    })?;
    state.metrics.active.inc();
    Ok(Admitted { call, _permit: Some(permit), _active: Some(Active(state.metrics.active.clone())) })
}

/// What is asked of a server that ends.
pub(super) fn draining() -> Failure {
    Failure::new(Kind::Unhealthy, "draining", "the server is shutting down; another one takes requests")
}

/// Whether no key is needed: what probes, scrapers and browsers ask for.
fn is_public(method: &Method, path: &str) -> bool {
    let read = method == Method::GET || method == Method::HEAD;
    read && matches!(
        path,
        "/" | "/health"
            | "/health/live"
            | "/health/ready"
            | "/ping"
            | "/metrics"
            | "/docs"
            | "/openapi.json"
            | "/api-doc/openapi.json"
    )
}

/// The key that a request brings; also without `Bearer`, as some clients of TEI send it.
pub(super) fn key(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    match value.split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => Some(key.trim_ascii()),
        _ => Some(value),
    }
}

fn class(headers: &HeaderMap) -> Result<Option<Class>, Failure> {
    match headers.get(PRIORITY).map(HeaderValue::as_bytes) {
        None => Ok(None),
        Some(b"interactive") => Ok(Some(Class::Interactive)),
        Some(b"bulk") => Ok(Some(Class::Bulk)),
        Some(other) => {
            let message = format!("x-priority is \"{}\"; interactive and bulk are known", other.escape_ascii());
            Err(Failure::new(Kind::Validation, "validation", message))
        }
    }
}

pub(super) fn request_id(headers: &HeaderMap, started: u64) -> String {
    let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(|id| (1..=LONGEST_ID).contains(&id.len()));
    given.map_or_else(|| format!("{started:x}-{:x}", COUNT.fetch_add(1, Ordering::Relaxed)), str::to_owned)
}

/// The name of the request, in its answer.
pub(super) fn tell_id(headers: &mut HeaderMap, id: &str) {
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(REQUEST_ID, id);
    }
}

/// TEI's headers; times in milliseconds.
pub(super) fn tell(headers: &mut HeaderMap, usage: &Usage, arrived: Instant) {
    let total = arrived.elapsed().as_millis();
    headers.insert("x-compute-type", HeaderValue::from_static(if usage.on_gpu { "gpu" } else { "cpu" }));
    for (name, value) in [
        ("x-compute-time", total),
        ("x-compute-characters", usage.characters as u128),
        ("x-compute-tokens", usage.tokens as u128),
        ("x-total-time", total),
        ("x-tokenization-time", usage.tokenization.as_millis()),
        ("x-queue-time", usage.queue.as_millis()),
        ("x-inference-time", usage.inference.as_millis()),
    ] {
        headers.insert(name, HeaderValue::from(u64::try_from(value).unwrap_or(u64::MAX)));
    }
}

/// A request that has no answer yet. Dropped before it has one, its client has gone.
pub(super) struct Open {
    state: Arc<State>,
    arrived: Instant,
    method: Method,
    uri: Uri,
    id: String,
    /// Whether its failure is one of the service's.
    counted: bool,
    ended: bool,
}

impl Open {
    pub fn new(state: &Arc<State>, arrived: Instant, request: &Request, id: &str) -> Self {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        Self { state: state.clone(), arrived, method, uri, id: id.to_owned(), counted: true, ended: false }
    }

    /// One whose failures stand in the log alone.
    pub fn uncounted(mut self) -> Self {
        self.counted = false;
        self
    }

    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Counts and logs the answer.
    pub fn end(&mut self, status: StatusCode, failure: Option<&Failure>, usage: Option<&Usage>) {
        self.ended = true;
        let metrics = &self.state.metrics;
        if let Some(usage) = usage {
            metrics.request_duration.observe(self.arrived.elapsed().as_secs_f64());
            metrics.tokenization_duration.observe(usage.tokenization.as_secs_f64());
            metrics.queue_duration.observe(usage.queue.as_secs_f64());
            metrics.inference_duration.observe(usage.inference.as_secs_f64());
        }
        if let Some(failure) = failure {
            self.count_failure(failure.reason);
            if matches!(failure.kind, Kind::Overloaded | Kind::Unhealthy | Kind::TooLarge | Kind::Timeout) && self.counts() {
                metrics.rejected.with_label_values(&[failure.reason]).inc();
            }
        }
        self.log(status.as_u16(), failure.map(|failure| failure.message.as_str()), usage);
    }

    fn counts(&self) -> bool {
        self.counted && self.method == Method::POST
    }

    fn count_failure(&self, reason: &str) {
        if self.counts() {
            self.state.metrics.request_failure.with_label_values(&[reason]).inc();
        }
    }

    /// The access log: fields for machines, and the same in words.
    fn log(&self, status: u16, error: Option<&str>, usage: Option<&Usage>) {
        // Probes come every few seconds.
        let level = if is_public(&self.method, self.uri.path()) && status < 400 { log::Level::Debug } else { log::Level::Info };
        let milliseconds = self.arrived.elapsed().as_secs_f64() * 1e3;
        let none = Usage::default();
        let usage = usage.unwrap_or(&none);
        // A path may be as long as all headers together.
        let path: String = self.uri.path().chars().take(200).collect();
        let error = error.unwrap_or_default();
        let colon = if error.is_empty() { "" } else { ": " };
        log::log!(
            target: "trt_embed::access", level,
            request_id = self.id.as_str(), method = self.method.as_str(), path = path.as_str(), status = status, milliseconds = milliseconds,
            model = usage.model.as_str(), inputs = usage.inputs, tokens = usage.tokens, error = error;
            "{} {} {status} in {milliseconds:.1} ms, {} inputs, {} tokens, request {}{colon}{error}",
            self.method, path, usage.inputs, usage.tokens, self.id
        );
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if !self.ended {
            self.count_failure("client_gone");
            // 499: what nginx logs for it; nobody is left to be answered.
            self.log(499, Some("the client went away"), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_with_and_without_their_scheme() {
        for (value, expected) in [("Bearer k1", "k1"), ("bearer  k1 ", "k1"), ("k1", "k1"), ("Basic k1", "Basic k1"), ("", "")] {
            let headers = HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static(value))]);
            assert_eq!(key(&headers), Some(expected.as_bytes()), "{value:?}");
        }
        assert_eq!(key(&HeaderMap::new()), None);
    }
}
