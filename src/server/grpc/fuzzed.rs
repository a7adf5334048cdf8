//! What a fuzz target and a test of many seeded calls check of every call over gRPC: its messages are taken or refused as the format says, with a status of
//! gRPC, however its body is cut into pieces.

use super::super::metrics::Metrics;
use super::super::registry::Slot;
use super::super::settings::Settings;
use super::super::state::State;
use super::proto::{DecodeRequest, EmbedAllRequest, EmbedRequest, EncodeRequest, InfoRequest};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, Request, StatusCode, header};
use http_body_util::BodyExt;
use prost::Message;
use std::sync::Arc;
use tonic::Code;
use tower::ServiceExt;

/// Bytes of a message beyond which it is refused.
const LIMIT: usize = 64;

/// Whether bytes are a message.
type IsMessage = fn(&[u8]) -> bool;

/// Routes, and whether a message is one that they take.
const ROUTES: [(&str, IsMessage); 9] = [
    ("/tei.v1.Info/Info", is::<InfoRequest>),
    ("/tei.v1.Embed/Embed", is::<EmbedRequest>),
    ("/tei.v1.Embed/EmbedAll", is::<EmbedAllRequest>),
    ("/tei.v1.Tokenize/Tokenize", is::<EncodeRequest>),
    ("/tei.v1.Tokenize/Decode", is::<DecodeRequest>),
    ("/tei.v1.Embed/EmbedStream", is::<EmbedRequest>),
    ("/tei.v1.Embed/EmbedAllStream", is::<EmbedAllRequest>),
    ("/tei.v1.Tokenize/TokenizeStream", is::<EncodeRequest>),
    ("/tei.v1.Tokenize/DecodeStream", is::<DecodeRequest>),
];

fn is<M: Message + Default>(bytes: &[u8]) -> bool {
    M::decode(bytes).is_ok()
}

/// A server whose model is never loaded: a call that is whole comes as far as asking for it.
struct Service {
    router: Router,
    runtime: tokio::runtime::Runtime,
}

thread_local! {
    static SERVICE: Service = Service::new();
}

impl Service {
    fn new() -> Self {
        let settings = Settings { payload_limit: LIMIT, ..Settings::default() };
        let slot = Slot::new(vec!["never".into()], Arc::new(|| unreachable!("nobody loads it")));
        let metrics = Metrics::new().unwrap_or_else(|error| panic!("metrics: {error}"));
        let state = Arc::new(State::new(settings, vec![slot], metrics, None));
        let router = super::router(&state).unwrap_or_else(|error| panic!("{error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        Self { router, runtime: runtime.unwrap_or_else(|error| panic!("no runtime: {error}")) }
    }

    /// The status of a call whose body comes in pieces of `piece` bytes.
    fn call(&self, path: &str, timeout: Option<HeaderValue>, body: &[u8], piece: usize) -> Code {
        let pieces: Vec<Bytes> = body.chunks(piece).map(Bytes::copy_from_slice).collect();
        let pieces = futures_util::stream::iter(pieces.into_iter().map(Ok::<_, std::convert::Infallible>));
        let mut request = Request::post(path).header(header::CONTENT_TYPE, "application/grpc").header(header::TE, "trailers");
        if let Some(timeout) = timeout {
            request = request.header("grpc-timeout", timeout);
        }
        let request = request.body(Body::from_stream(pieces)).unwrap_or_else(|error| panic!("{error}"));
        let answered = async {
            let Ok(response) = self.router.clone().oneshot(request).await;
            let (head, mut body) = response.into_parts();
            assert_eq!(head.status, StatusCode::OK, "gRPC says what is wrong in its own status");
            let mut said = head.headers.get("grpc-status").cloned();
            // As HTTP/2 does it: what would come behind the trailers is not asked for.
            while said.is_none() {
                let frame = body.frame().await.unwrap_or_else(|| panic!("a call without a status"));
                let frame = frame.unwrap_or_else(|error| panic!("{error}"));
                said = frame.trailers_ref().map(|trailers| trailers["grpc-status"].clone());
            }
            said.map_or(Code::Unknown, |said| Code::from_bytes(said.as_bytes()))
        };
        self.runtime.block_on(answered)
    }
}

/// Any bytes as a call: its route, the size of the pieces that it comes in, its `grpc-timeout`, and its body.
///
/// # Panics
/// Where something else comes of it than the format says.
pub fn check(bytes: &[u8]) {
    let [route, piece, length, rest @ ..] = bytes else { return };
    let (path, is_message) = ROUTES[usize::from(*route) % ROUTES.len()];
    let (timeout, body) = rest.split_at(usize::from(length % 12).min(rest.len()));
    let header = HeaderValue::from_bytes(timeout).ok().filter(|_| !timeout.is_empty());
    let code = SERVICE.with(|service| service.call(path, header.clone(), body, usize::from(*piece).max(1)));
    let streamed = path.ends_with("Stream");
    let expected: &[Code] = match messages(body, is_message) {
        _ if header.is_some_and(|header| !is_timeout(header.as_bytes())) => &[Code::InvalidArgument],
        // There is no model.
        Messages { whole: 1.., broken: false } => &[Code::Unavailable],
        Messages { whole: 1.., broken: true } if streamed => &[Code::Unavailable],
        Messages { whole: 0, broken: false } if streamed => &[Code::Ok],
        Messages { whole: 0, broken: true } if streamed => &[Code::InvalidArgument, Code::OutOfRange],
        _ => &[Code::Internal, Code::OutOfRange],
    };
    assert!(expected.contains(&code), "{path} {timeout:?} {body:?}: {code:?}, and not {expected:?}");
}

/// What a body holds.
struct Messages {
    /// Before the first that is broken.
    whole: usize,
    broken: bool,
}

/// Frames by the words of gRPC's description: a byte that says whether the message is packed (no call here says how, so that none may be), four bytes of
/// length, highest first, and the message.
fn messages(mut body: &[u8], is_message: IsMessage) -> Messages {
    let mut whole = 0;
    while let [packed, a, b, c, d, rest @ ..] = body {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        // tonic takes a body that ends right behind a frame's head for one that has ended.
        if rest.is_empty() && *packed == 0 && (1..=LIMIT).contains(&length) {
            return Messages { whole, broken: false };
        }
        let message = rest.get(..length).filter(|message| *packed == 0 && length <= LIMIT && is_message(message));
        let Some(message) = message else { return Messages { whole, broken: true } };
        whole += 1;
        body = &rest[message.len()..];
    }
    Messages { whole, broken: !body.is_empty() }
}

/// At most eight digits and a unit.
fn is_timeout(value: &[u8]) -> bool {
    let Some((unit, digits)) = value.split_last() else { return false };
    b"HMSmun".contains(unit) && (1..=8).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What bodies are made of: whole frames, and their parts.
    fn part(which: usize) -> Vec<u8> {
        let frame = |message: &[u8]| [&[0, 0, 0, 0, message.len() as u8], message].concat();
        match which {
            0 => {
                frame(&EmbedRequest { inputs: "the cat".into(), dimensions: Some(3), ..EmbedRequest::default() }.encode_to_vec())
            }
            1 => frame(&DecodeRequest { ids: vec![1, 300, u32::MAX], skip_special_tokens: true }.encode_to_vec()),
            2 => frame(&[]),
            // A field that nobody knows.
            3 => frame(&[0x7a, 1, b'x']),
            // A text that is no UTF-8, a number without an end, a field that ends too early.
            4 => frame(&[0x0a, 1, 0xff]),
            5 => frame(&[0x10, 0xff]),
            6 => frame(&[0x0a, 9, b'x']),
            7 => vec![1, 0, 0, 0, 0],
            8 => vec![0, 0, 0, 0, 65],
            9 => vec![0, 0xff, 0xff, 0xff, 0xff],
            10 => vec![0; 65],
            11 => vec![0, 0, 0, 0, 58],
            _ => vec![0],
        }
    }

    #[test]
    fn seeded_calls_are_answered_as_the_format_says() {
        let mut next = crate::server::fuzzed::seeded(17);
        let mut whole = 0;
        for _ in 0..10_000 {
            let timeout: &[u8] = [&b""[..], b"5S", b"12345678m", b"123456789m", b"5", b"S5", b"-5S"][next(20).min(6) % 7];
            let timeout = if next(3) == 0 { timeout } else { b"" };
            let mut call = vec![next(256) as u8, next(20) as u8, timeout.len() as u8];
            call.extend_from_slice(timeout);
            let body: Vec<u8> = (0..next(4)).flat_map(|_| part(next(20).min(if next(2) == 0 { 3 } else { 12 }))).collect();
            whole += usize::from(messages(&body, is::<EmbedRequest>).whole > 0);
            call.extend_from_slice(&body);
            if next(4) == 0 {
                let place = next(call.len());
                call[place] = next(256) as u8;
            }
            check(&call);
        }
        assert!(whole > 1000, "only {whole} have a message");
    }
}
