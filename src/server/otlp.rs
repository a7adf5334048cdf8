//! Traces: a span of each request, as OpenTelemetry's collectors take them (OTLP over HTTP, in JSON), under the trace that its client began.

use super::failure::Failure;
use super::work::Usage;
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, oneshot};

/// Spans that wait to be sent; more are dropped, for no request waits for a collector.
const MOST_WAITING: usize = 4096;
/// Spans of one request to the collector, and how long the first of them waits for others.
const MOST_AT_ONCE: usize = 512;
const LINGER: Duration = Duration::from_secs(1);
/// For a collector to answer, also while the server ends.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where spans are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collector {
    /// `host:port`.
    authority: String,
    path: String,
    service: String,
}

impl Collector {
    /// `endpoint` is `http://HOST[:PORT][/PATH]`; port 4318 and /v1/traces where not said. `service` is the name that spans come under.
    ///
    /// # Errors
    /// Other addresses.
    pub fn new(endpoint: &str, service: &str) -> Result<Self, String> {
        let refused = || {
            format!(
                "the collector's address \"{endpoint}\" is none of the form http://HOST[:PORT][/PATH]; spans are sent over HTTP without TLS"
            )
        };
        let rest = endpoint.strip_prefix("http://").ok_or_else(refused)?;
        let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let uri: axum::http::uri::Authority = host.parse().map_err(|_| refused())?;
        if uri.host().is_empty() {
            return Err(refused());
        }
        let authority = if uri.port().is_some() { host.to_owned() } else { format!("{host}:4318") };
        let path = if path.trim_end_matches('/').is_empty() { "/v1/traces" } else { path };
        Ok(Self { authority, path: path.to_owned(), service: service.to_owned() })
    }
}

/// Takes the spans of requests.
pub(super) struct Tracer {
    messages: mpsc::Sender<Message>,
    /// Different in each process.
    random: RandomState,
}

enum Message {
    Span(Value),
    /// Everything before it is to be sent, then this is told.
    Flush(oneshot::Sender<()>),
}

/// A request that a trace is told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    trace: String,
    parent: String,
    id: String,
    began: SystemTime,
}

impl Tracer {
    /// One whose spans [`Exporter::run`] sends.
    pub fn new(collector: Collector) -> (Self, Exporter) {
        let (messages, waiting) = mpsc::channel(MOST_WAITING);
        (Self { messages, random: RandomState::new() }, Exporter { collector, waiting })
    }

    /// The span of a request that begins; None where its client says that the trace is not kept.
    pub fn begin(&self, headers: &HeaderMap) -> Option<Span> {
        let given = headers.get("traceparent").and_then(|value| parent(value.to_str().ok()?));
        if given.is_some_and(|(.., kept)| !kept) {
            return None;
        }
        let began = SystemTime::now();
        // SipHash under a key that differs from process to process: as good as random.
        let random = |salt: u8| self.random.hash_one((began, Instant::now(), salt)).max(1);
        let id = format!("{:016x}", random(0));
        let (trace, parent) = match given {
            Some((trace, parent, _)) => (trace.to_owned(), parent.to_owned()),
            None => (format!("{:016x}{:016x}", random(1), random(2)), String::new()),
        };
        Some(Span { trace, parent, id, began })
    }

    /// Hands a span whose request has been answered to the exporter.
    pub fn end(&self, span: Span, name: &str, status: StatusCode, failure: Option<&Failure>, usage: Option<&Usage>) {
        let mut attributes =
            vec![json!({ "key": "http.response.status_code", "value": { "intValue": status.as_u16().to_string() } })];
        let mut add = |key: &str, value: Value| attributes.push(json!({ "key": key, "value": value }));
        if let Some(usage) = usage {
            add("trt_embed.model", json!({ "stringValue": usage.model }));
            for (key, count) in [("inputs", usage.inputs), ("tokens", usage.tokens)] {
                add(&format!("trt_embed.{key}"), json!({ "intValue": count.to_string() }));
            }
            for (key, time) in [("tokenization", usage.tokenization), ("queue", usage.queue), ("inference", usage.inference)] {
                add(&format!("trt_embed.{key}_seconds"), json!({ "doubleValue": time.as_secs_f64() }));
            }
        }
        // Of OpenTelemetry's conventions for servers: what a client did wrong is no error of the server.
        let status = match failure {
            Some(failure) if status.is_server_error() || status == StatusCode::FAILED_DEPENDENCY => {
                json!({ "code": 2, "message": failure.message })
            }
            _ => json!({}),
        };
        let nanoseconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string();
        let span = json!({
            "traceId": span.trace, "spanId": span.id, "parentSpanId": span.parent, "name": name, "kind": 2,
            "startTimeUnixNano": nanoseconds(span.began), "endTimeUnixNano": nanoseconds(SystemTime::now()),
            "attributes": attributes, "status": status,
        });
        let _ = self.messages.try_send(Message::Span(span));
    }

    /// Waits until what was handed over is sent, or the collector has been given up.
    pub async fn flush(&self) {
        let (tell, told) = oneshot::channel();
        if self.messages.send(Message::Flush(tell)).await.is_ok() {
            let _ = tokio::time::timeout(PATIENCE, told).await;
        }
    }
}

/// Trace, span and whether it is kept, of the header `traceparent` (W3C Trace Context, 3.2).
fn parent(value: &str) -> Option<(&str, &str, bool)> {
    let mut parts = value.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, length| text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let known = hex(version, 2) && version != "ff" && (version != "00" || parts.next().is_none());
    let whole = known && hex(trace, 32) && hex(span, 16) && hex(flags, 2);
    let named = whole && trace.bytes().any(|byte| byte != b'0') && span.bytes().any(|byte| byte != b'0');
    named.then(|| (trace, span, u8::from_str_radix(flags, 16).is_ok_and(|flags| flags & 1 == 1)))
}

/// Sends the spans of a [`Tracer`].
pub(super) struct Exporter {
    collector: Collector,
    waiting: mpsc::Receiver<Message>,
}

impl Exporter {
    /// Runs for as long as there is a tracer.
    pub async fn run(mut self) {
        let mut failing = false;
        while let Some(first) = self.waiting.recv().await {
            let (mut spans, mut told) = (Vec::new(), Vec::new());
            let until = tokio::time::Instant::now() + LINGER;
            let mut next = Some(first);
            while let Some(message) = next {
                match message {
                    Message::Span(span) => spans.push(span),
                    Message::Flush(tell) => told.push(tell),
                }
                next = if spans.len() >= MOST_AT_ONCE || !told.is_empty() {
                    None
                } else {
                    tokio::time::timeout_at(until, self.waiting.recv()).await.ok().flatten()
                };
            }
            if !spans.is_empty() {
                let count = spans.len();
                let sent = tokio::time::timeout(PATIENCE, send(&self.collector, spans)).await;
                let sent = sent.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}")));
                match &sent {
                    // Said once, not every second.
                    Err(reason) if !failing => {
                        log::warn!(
                            "traces: {count} spans could not be sent to {}: {reason}; others may follow",
                            self.collector.authority
                        );
                    }
                    Ok(()) if failing => log::info!("traces: the collector takes spans again"),
                    _ => {}
                }
                failing = sent.is_err();
            }
            told.into_iter().for_each(|tell: oneshot::Sender<()>| {
                let _ = tell.send(());
            });
        }
    }
}

/// # Errors
/// A collector that cannot be reached, or that refuses them.
async fn send(collector: &Collector, spans: Vec<Value>) -> Result<(), String> {
    let said = |error: &dyn std::error::Error| error.to_string();
    let resource = [("service.name", collector.service.as_str()), ("service.version", env!("CARGO_PKG_VERSION"))]
        .map(|(key, value)| json!({ "key": key, "value": { "stringValue": value } }));
    let body = json!({ "resourceSpans": [{
        "resource": { "attributes": resource },
        "scopeSpans": [{ "scope": { "name": "trt-embed" }, "spans": spans }],
    }] });
    let stream = tokio::net::TcpStream::connect(&collector.authority).await.map_err(|error| said(&error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| said(&error))?;
    let request = hyper::Request::post(&collector.path)
        .header(header::HOST, &collector.authority)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONNECTION, "close")
        .body(Full::new(bytes::Bytes::from(body.to_string())));
    let request = request.map_err(|error| said(&error))?;
    let driver = tokio::spawn(connection);
    let answer = sender.send_request(request).await.map_err(|error| said(&error));
    driver.abort();
    match answer?.status() {
        status if status.is_success() => Ok(()),
        status => Err(format!("it answers {status}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

    #[test]
    fn parents_are_read_as_the_standard_says() {
        let read = |value: &str| parent(value).map(|(trace, span, kept)| (trace.to_owned(), span.to_owned(), kept));
        let found = |kept| Some((TRACE.to_owned(), "b7ad6b7169203331".to_owned(), kept));
        assert_eq!(read(&format!("00-{TRACE}-b7ad6b7169203331-01")), found(true));
        assert_eq!(read(&format!("00-{TRACE}-b7ad6b7169203331-00")), found(false));
        // A later version may say more.
        assert_eq!(read(&format!("cc-{TRACE}-b7ad6b7169203331-01-what")), found(true));
        for wrong in [
            "",
            "00",
            &format!("00-{TRACE}-b7ad6b7169203331"),
            &format!("00-{TRACE}-b7ad6b7169203331-01-what"),
            &format!("ff-{TRACE}-b7ad6b7169203331-01"),
            &format!("00-{}-b7ad6b7169203331-01", TRACE.to_uppercase()),
            &format!("00-{}-b7ad6b7169203331-01", "0".repeat(32)),
            &format!("00-{TRACE}-0000000000000000-01"),
            &format!("00-{TRACE}-b7ad6b716920333-01"),
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn spans_go_under_their_clients_trace_or_begin_one() {
        let (tracer, _exporter) = Tracer::new(Collector::new("http://localhost", "s").unwrap());
        let with = |value: &str| HeaderMap::from_iter([("traceparent".parse().unwrap(), HeaderValue::from_str(value).unwrap())]);
        let span = tracer.begin(&with(&format!("00-{TRACE}-b7ad6b7169203331-01"))).unwrap();
        assert_eq!((span.trace.as_str(), span.parent.as_str(), span.id.len()), (TRACE, "b7ad6b7169203331", 16));
        assert_eq!(tracer.begin(&with(&format!("00-{TRACE}-b7ad6b7169203331-00"))), None);
        let (first, second) = (tracer.begin(&HeaderMap::new()).unwrap(), tracer.begin(&with("rubbish")).unwrap());
        assert!(first.parent.is_empty() && second.parent.is_empty() && first.trace.len() == 32);
        assert!(first.trace != second.trace && first.id != second.id);
    }

    #[test]
    fn collectors_have_http_addresses() {
        for (endpoint, authority, path) in [
            ("http://localhost", "localhost:4318", "/v1/traces"),
            ("http://otel:9000/", "otel:9000", "/v1/traces"),
            ("http://[::1]:1/in/traces", "[::1]:1", "/in/traces"),
        ] {
            let collector = Collector::new(endpoint, "s").unwrap();
            assert_eq!((collector.authority.as_str(), collector.path.as_str()), (authority, path), "{endpoint}");
        }
        for endpoint in ["", "localhost:4317", "https://otel:4318", "http://", "http:///x", "http://a b"] {
            assert!(Collector::new(endpoint, "s").unwrap_err().contains("http://HOST"), "{endpoint}");
        }
    }
}
