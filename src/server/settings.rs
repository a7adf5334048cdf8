//! What an operator can set of the server; the defaults are TEI's where TEI has the setting.

use super::admin::Admin;
use super::otlp::Collector;
use super::tls::TlsFiles;
use std::num::NonZeroUsize;
use std::time::Duration;

/// Limits and manners of a [`Server`](super::Server).
#[derive(Clone)]
#[non_exhaustive]
pub struct Settings {
    /// Most inputs of one request (32), and messages of one gRPC stream that are under way.
    pub max_client_batch_size: usize,
    /// Most requests under way at a time, from their headers to their answer (512); others are answered 429 at once.
    pub max_concurrent_requests: usize,
    /// Most tokens that wait for one model (262,144); requests beyond it are answered 429 at once. A token takes 4 bytes.
    pub max_queue_tokens: usize,
    /// Most bytes of a body (2,000,000).
    pub payload_limit: usize,
    /// Most numbers in an answer of /embed_all (8,388,608): about 100 MB of JSON.
    pub max_response_values: usize,
    /// Most connections at a time (2048); others are told so and closed.
    pub max_connections: usize,
    /// Whether texts that are too long are cut where the request does not say (true).
    pub auto_truncate: bool,
    /// Keys of which a request must have one; none asks for none.
    pub api_keys: Vec<String>,
    /// What operators may do while the server serves; none for nothing.
    pub admin: Option<Admin>,
    /// Origins whose pages may read answers; none named means all, as in TEI.
    pub cors_allow_origin: Vec<String>,
    /// The certificate of TCP listeners; none for HTTP without TLS.
    pub tls: Option<TlsFiles>,
    /// Where a span of each request is sent; none for no traces.
    pub traces: Option<Collector>,
    /// Texts over which the ranges of int8 and uint8 vectors are taken, for each model when it is loaded; none refuses those encodings.
    pub calibration_texts: Vec<String>,
    /// Long texts that are tokenised at a time (as many as cores).
    pub tokenization_workers: Option<NonZeroUsize>,
    /// Most time for the headers of a request to arrive, and for a connection to be idle (30 s).
    pub header_timeout: Duration,
    /// Most time for a body to arrive (30 s).
    pub body_timeout: Duration,
    /// Most time for which a client may not read anything of its answer (30 s).
    pub write_timeout: Duration,
    /// What has not begun to run so long after its request came is given up and answered 429 (60 s).
    pub request_timeout: Duration,
    /// Most time to end what is under way when the server is asked to stop (30 s).
    pub shutdown_timeout: Duration,
    /// A model that does not answer its watchdog for so long is taken for dead (10 s).
    pub health_timeout: Duration,
    /// A model whose executor has failed for so long is loaded anew (3 s).
    pub recovery_delay: Duration,
    /// A server one of whose models has not come back so long after that ends (120 s).
    pub recovery_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_client_batch_size: 32,
            max_concurrent_requests: 512,
            max_queue_tokens: 1 << 18,
            payload_limit: 2_000_000,
            max_response_values: 1 << 23,
            max_connections: 2048,
            auto_truncate: true,
            api_keys: Vec::new(),
            admin: None,
            cors_allow_origin: Vec::new(),
            tls: None,
            traces: None,
            calibration_texts: Vec::new(),
            tokenization_workers: None,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(60),
            shutdown_timeout: Duration::from_secs(30),
            health_timeout: Duration::from_secs(10),
            recovery_delay: Duration::from_secs(3),
            recovery_timeout: Duration::from_secs(120),
        }
    }
}

/// The keys stay out of logs.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { max_client_batch_size, max_concurrent_requests, max_queue_tokens, payload_limit, api_keys, .. } = self;
        f.debug_struct("Settings")
            .field("max_client_batch_size", max_client_batch_size)
            .field("max_concurrent_requests", max_concurrent_requests)
            .field("max_queue_tokens", max_queue_tokens)
            .field("payload_limit", payload_limit)
            .field("api_keys", &api_keys.len())
            .finish_non_exhaustive()
    }
}
