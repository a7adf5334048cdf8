//! The front door of gRPC: as that of HTTP, in metadata and statuses. Health and reflection need no key, as in TEI, and are not counted.

use super::super::access::{self, Admitted, Open};
use super::super::failure::{Failure, Kind};
use super::super::state::State;
use super::super::work::{Call, Usage};
use super::streams::Tally;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State as Shared};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::body::{Frame, SizeHint};
use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::time::Sleep;
use tonic::Status;

/// What the metadata of a request say.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub call: Call,
    /// The client's own deadline, of all messages together.
    pub until: Option<Instant>,
    model: Option<Arc<str>>,
}

impl Asked {
    /// # Errors
    /// A request that did not come through the front door.
    pub fn of<T>(request: &tonic::Request<T>) -> Result<Self, Status> {
        request.extensions().get().cloned().ok_or_else(|| Status::internal("the request did not come through the front door"))
    }

    /// The name of the model, where one is asked for.
    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }
}

/// Lets a request in or turns it away, and tells what came of it.
pub(in super::super) async fn door(Shared(state): Shared<Arc<State>>, mut request: Request, next: Next) -> Response {
    if !request.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        return StatusCode::UNSUPPORTED_MEDIA_TYPE.into_response();
    }
    if !request.uri().path().starts_with("/tei.v1.") {
        return next.run(request).await;
    }
    let arrived = Instant::now();
    let id = access::request_id(request.headers(), state.started);
    let mut open = Open::new(&state, arrived, &request, &id);
    let mut response = match admit(&state, &request, arrived) {
        Err(failure) => Status::from(failure).into_http(),
        Ok((asked, admitted)) => {
            // A stream has its time for each message.
            if !request.uri().path().ends_with("Stream") {
                request = request.map(|body| Body::new(Timed::new(body, state.settings.body_timeout)));
            }
            request.extensions_mut().insert(asked);
            let mut response = next.run(request).await;
            if let Some(tally) = response.extensions_mut().remove::<Tally>() {
                access::tell_id(response.headers_mut(), &id);
                return response.map(|body| Body::new(Ending { body, open, tally, _admitted: admitted }));
            }
            response
        }
    };
    access::tell_id(response.headers_mut(), &id);
    let usage = response.extensions_mut().remove::<Usage>();
    if let Some(usage) = &usage {
        access::tell(response.headers_mut(), usage, arrived);
    }
    let failure = response.extensions_mut().remove::<Status>().map(failure_of);
    let status = failure.as_ref().map_or(StatusCode::OK, |failure| failure.kind.status());
    open.end(status, failure.as_ref(), usage.as_ref());
    response
}

fn admit(state: &State, request: &Request, arrived: Instant) -> Result<(Asked, Admitted), Failure> {
    if request.method() != Method::POST {
        return Err(Failure::new(Kind::Method, "method", "gRPC asks by POST"));
    }
    let mut admitted = access::admit(state, request, arrived)?;
    let until = timeout(request.headers())?.and_then(|timeout| arrived.checked_add(timeout));
    let deadline = &mut admitted.call.deadline;
    *deadline = until.map_or(*deadline, |until| until.min(*deadline));
    let model = request.headers().get("x-model").map(|name| String::from_utf8_lossy(name.as_bytes()).into());
    Ok((Asked { call: admitted.call.clone(), until, model }, admitted))
}

/// `grpc-timeout`: at most eight digits and a unit.
///
/// # Errors
/// What is none.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Failure> {
    let Some(value) = headers.get("grpc-timeout").map(HeaderValue::as_bytes) else { return Ok(None) };
    let parse = || {
        let (unit, digits) = value.split_last()?;
        let number: u64 = std::str::from_utf8(digits).ok().filter(|_| digits.iter().all(u8::is_ascii_digit))?.parse().ok()?;
        Some(match unit {
            _ if digits.len() > 8 => return None,
            b'H' => Duration::from_secs(number * 3600),
            b'M' => Duration::from_secs(number * 60),
            b'S' => Duration::from_secs(number),
            b'm' => Duration::from_millis(number),
            b'u' => Duration::from_micros(number),
            b'n' => Duration::from_nanos(number),
            _ => return None,
        })
    };
    let refused = || {
        let message = format!("grpc-timeout is \"{}\"; it is at most 8 digits and one of H, M, S, m, u, n", value.escape_ascii());
        Failure::new(Kind::Validation, "validation", message)
    };
    parse().map(Some).ok_or_else(refused)
}

/// What a status tells, as the metrics and the log count it.
pub(super) fn failure_of(status: Status) -> Failure {
    if let Some(failure) = status.source().and_then(|source| source.downcast_ref::<Failure>()) {
        return failure.clone();
    }
    // Of tonic itself: what cannot be decoded, or is too long.
    let kind = match status.code() {
        tonic::Code::Unimplemented => Kind::UnknownRoute,
        tonic::Code::OutOfRange | tonic::Code::ResourceExhausted => Kind::TooLarge,
        tonic::Code::DeadlineExceeded => Kind::Timeout,
        _ => Kind::Malformed,
    };
    Failure::new(kind, "grpc", status.message())
}

/// A body that must be there in time.
struct Timed {
    body: Body,
    patience: Duration,
    until: Pin<Box<Sleep>>,
}

impl Timed {
    fn new(body: Body, patience: Duration) -> Self {
        Self { body, patience, until: Box::pin(tokio::time::sleep(patience)) }
    }
}

impl HttpBody for Timed {
    type Data = Bytes;
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let patience = self.patience;
        self.until.as_mut().poll(context).map(|()| {
            let message = format!("the message did not arrive within {patience:?}");
            Some(Err(Status::from(Failure::new(Kind::Timeout, "body_timeout", message)).into()))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The answers of a stream: it is under way until they end, or its client goes away.
struct Ending {
    body: Body,
    open: Open,
    tally: Tally,
    _admitted: Admitted,
}

impl HttpBody for Ending {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        // The status comes as trailers, behind all messages.
        if let Poll::Ready(Some(Ok(last))) = &frame
            && last.is_trailers()
        {
            let (usage, failure) = self.tally.ended();
            let status = failure.as_ref().map_or(StatusCode::OK, |failure| failure.kind.status());
            self.open.end(status, failure.as_ref(), usage.as_ref());
        }
        frame
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_of_grpc_are_read() {
        let read = |value: &'static str| {
            timeout(&HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), HeaderValue::from_static(value))]))
        };
        for (value, expected) in [
            ("2H", Duration::from_secs(7200)),
            ("3M", Duration::from_secs(180)),
            ("99999999S", Duration::from_secs(99_999_999)),
            ("5m", Duration::from_millis(5)),
            ("7u", Duration::from_micros(7)),
            ("0n", Duration::ZERO),
        ] {
            assert_eq!(read(value).unwrap(), Some(expected), "{value}");
        }
        for value in ["", "S", "1", "-1S", "+1S", "1s", "1.5S", "100000000S", "1 S"] {
            assert!(read(value).unwrap_err().message.contains("grpc-timeout"), "{value:?}");
        }
        assert_eq!(timeout(&HeaderMap::new()).unwrap(), None);
    }
}
