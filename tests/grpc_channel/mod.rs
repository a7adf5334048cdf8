//! A connection to a gRPC server, as tonic's clients take it, and their stubs.
#![allow(dead_code)] // each test file uses a part

use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response, Uri};

/// Stubs of this crate's proto.
pub mod proto {
    #![allow(clippy::all)]
    tonic::include_proto!("tei.v1");
}

use proto::embed_client::EmbedClient;
use tonic_health::pb::health_client::HealthClient;

#[derive(Clone)]
pub struct Channel {
    requests: http2::SendRequest<Body>,
    socket: Arc<std::net::TcpStream>,
}

impl Channel {
    pub async fn open(address: SocketAddr) -> Self {
        Self::with_window(address, 1 << 20).await
    }

    /// One that takes `window` bytes of an answer before its reader does.
    pub async fn with_window(address: SocketAddr, window: u32) -> Self {
        let stream = std::net::TcpStream::connect(address).unwrap();
        let socket = Arc::new(stream.try_clone().unwrap());
        stream.set_nonblocking(true).unwrap();
        let stream = tokio::net::TcpStream::from_std(stream).unwrap();
        let mut client = http2::Builder::new(TokioExecutor::new());
        let (requests, connection) = client.initial_stream_window_size(window).handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self { requests, socket }
    }

    /// Goes away, whatever is under way.
    pub fn close(&self) {
        self.socket.shutdown(std::net::Shutdown::Both).unwrap();
    }

    pub fn embed(&self) -> EmbedClient<Self> {
        EmbedClient::with_origin(self.clone(), origin()).max_decoding_message_size(usize::MAX)
    }

    pub fn health(&self) -> HealthClient<Self> {
        HealthClient::with_origin(self.clone(), origin())
    }
}

pub fn origin() -> Uri {
    Uri::from_static("http://localhost")
}

impl tower::Service<Request<Body>> for Channel {
    type Response = Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.requests.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.requests.send_request(request))
    }
}

/// A request with metadata.
pub fn with<T>(message: T, metadata: &[(&'static str, &str)]) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    metadata.iter().for_each(|(name, value)| drop(request.metadata_mut().insert(*name, value.parse().unwrap())));
    request
}

/// For a text, with all else as it is where nothing is said.
pub fn text(inputs: &str) -> proto::EmbedRequest {
    proto::EmbedRequest { inputs: inputs.into(), ..Default::default() }
}

/// Code and message of a failure.
#[track_caller]
pub fn failed<T: std::fmt::Debug>(outcome: Result<T, Status>) -> (tonic::Code, String) {
    let status = outcome.unwrap_err();
    (status.code(), status.message().to_owned())
}
