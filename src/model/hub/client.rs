//! Requests to the hub: the token, tries, redirects, time limits.

use super::address::Address;
use super::failure::{Failure, Refusal};
use super::{HubOptions, proxy, tls};
use std::time::Duration;
use ureq::http::header::{ACCEPT_ENCODING, AUTHORIZATION, LOCATION};
use ureq::http::{HeaderValue, Method, Request, StatusCode};
use ureq::tls::TlsConfig;
use ureq::{Agent, Body, Timeout};

/// The hub's answer, its body not read yet.
pub(super) type Response = ureq::http::Response<Body>;

/// How long a connection may take to come about: as Python's huggingface_hub waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may be silent.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a request is tried in all, and the wait before the second time; it doubles from then on.
const ATTEMPTS: u32 = 3;
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// The most redirects that one request follows.
const MAX_REDIRECTS: usize = 10;

/// Answers that another try may change.
const PASSING: [StatusCode; 5] = [
    StatusCode::REQUEST_TIMEOUT,
    StatusCode::INTERNAL_SERVER_ERROR,
    StatusCode::BAD_GATEWAY,
    StatusCode::SERVICE_UNAVAILABLE,
    StatusCode::GATEWAY_TIMEOUT,
];

/// Whose redirects are followed. `HF_ENDPOINT` names the server whose word about commits, sizes and hashes counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Follow {
    /// Those to the hub's own scheme, host and port.
    WithinHub,
    /// Those within the hub, up to the one that says what a file in LFS is.
    UpToMetadata,
    /// All: bodies lie on other hosts.
    Anywhere,
}

/// The hub.
pub(super) struct Client {
    http: Agent,
    endpoint: Address,
    token: Option<HeaderValue>,
}

impl Client {
    pub fn new(options: &HubOptions, token: Option<&str>) -> Result<Self, Failure> {
        let endpoint = Address::endpoint(&options.endpoint).map_err(Failure::Address)?;
        let authorities = tls::authorities(endpoint.is_https())?;
        let http = Agent::config_builder()
            .user_agent(concat!("trt-embed/", env!("CARGO_PKG_VERSION")))
            .tls_config(TlsConfig::builder().root_certs(authorities).build())
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            // Of each operation: the answer's beginning, then each piece of its body.
            .timeout_per_read(Some(SILENCE_TIMEOUT))
            .timeout_per_write(Some(SILENCE_TIMEOUT))
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .proxy(None) // chosen for each request
            .build()
            .new_agent();
        let token = token.map(|token| HeaderValue::from_str(&format!("Bearer {token}"))).transpose();
        let mut token = token.map_err(|_| Failure::Token)?;
        if let Some(token) = &mut token {
            token.set_sensitive(true);
        }
        Ok(Self { http, endpoint, token })
    }

    /// What the hub says below `path`; the segments are encoded.
    pub fn get(&self, path: &[&str], query: Option<&str>) -> Result<Response, Failure> {
        let address = self.endpoint.below(path, query).map_err(Failure::Address)?;
        ok(self.send(&Method::GET, address, Follow::WithinHub)?, None)
    }

    /// The head of `file`'s answer: a success, or the redirect that carries the metadata of a file in LFS.
    pub fn head_of_file(&self, path: &[&str], file: &str) -> Result<Response, Failure> {
        let address = self.endpoint.below(path, None).map_err(Failure::Address)?;
        let response = self.send(&Method::HEAD, address, Follow::UpToMetadata)?;
        if response.status().is_redirection() && has_metadata(&response) { Ok(response) } else { ok(response, Some(file)) }
    }

    /// The content of `file`, from wherever the hub keeps it.
    pub fn get_file(&self, path: &[&str], file: &str) -> Result<Response, Failure> {
        let address = self.endpoint.below(path, None).map_err(Failure::Address)?;
        ok(self.send(&Method::GET, address, Follow::Anywhere)?, Some(file))
    }

    /// The first answer that is no redirect to be followed.
    fn send(&self, method: &Method, address: Address, follow: Follow) -> Result<Response, Failure> {
        let (mut address, mut within_hub) = (address, true);
        for _ in 0..=MAX_REDIRECTS {
            // A token is for the hub alone, and whoever was asked in its place must not send it back there either.
            let response = self.try_to_send(method, &address, self.token.as_ref().filter(|_| within_hub))?;
            let Some(target) = redirect_target(&address, &response)? else { return Ok(response) };
            within_hub &= target.origin() == self.endpoint.origin();
            match follow {
                Follow::Anywhere => {}
                Follow::UpToMetadata if has_metadata(&response) => return Ok(response),
                Follow::WithinHub | Follow::UpToMetadata if !within_hub => {
                    let (from, to, server) = (address.without_query(), target.without_query(), target.origin());
                    return Err(Failure::Redirect { from, to, server });
                }
                Follow::WithinHub | Follow::UpToMetadata => {}
            }
            address = target;
        }
        Err(Failure::Answer(format!("more than {MAX_REDIRECTS} redirects, the last to {}", address.without_query())))
    }

    fn try_to_send(&self, method: &Method, address: &Address, token: Option<&HeaderValue>) -> Result<Response, Failure> {
        let mut wait = FIRST_WAIT;
        for _ in 1..ATTEMPTS {
            match self.send_once(method, address, token) {
                Ok(response) if !PASSING.contains(&response.status()) => return Ok(response),
                Err(Failure::Request(error)) if may_pass(&error) => std::thread::sleep(wait),
                Err(failure) => return Err(failure),
                Ok(_) => std::thread::sleep(wait),
            }
            wait *= 2;
        }
        self.send_once(method, address, token)
    }

    fn send_once(&self, method: &Method, address: &Address, token: Option<&HeaderValue>) -> Result<Response, Failure> {
        let proxy = proxy::of(address, &|name| std::env::var(name).ok())?;
        // Sizes and hashes are those of the file, not of a compressed form.
        let mut request = Request::builder().method(method).uri(address.uri()).header(ACCEPT_ENCODING, "identity");
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, token);
        }
        let request = request.body(()).map_err(|error| Failure::Request(error.into()))?;
        let request = self.http.configure_request(request).proxy(proxy).build();
        self.http.run(request).map_err(Failure::Request)
    }
}

/// Whether another try may end otherwise. Nobody there within the time for a connection, or a certificate that is not valid: no.
fn may_pass(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => false,
        ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => false,
        other => !tls::is_certificate_fault(other),
    }
}

/// Whether the answer says itself what a file in LFS is, so that its redirect need not be followed to learn it.
fn has_metadata(response: &Response) -> bool {
    header(response, "x-linked-etag").is_some() && header(response, "x-repo-commit").is_some()
}

/// Where `response`, the answer for `address`, leads; `None` when it is no redirect.
fn redirect_target(address: &Address, response: &Response) -> Result<Option<Address>, Failure> {
    let status = response.status().as_u16();
    if !matches!(status, 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let location = header(response, LOCATION.as_str());
    let lost = || Failure::Answer(format!("{status} for {} leads nowhere (Location: {location:?})", address.without_query()));
    location.and_then(|location| address.join(location)).map(Some).ok_or_else(lost)
}

/// The value of a header, where there is one that is not empty.
pub(super) fn header<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::trim).filter(|value| !value.is_empty())
}

/// `response` if it is a whole answer (200).
fn ok(response: Response, file: Option<&str>) -> Result<Response, Failure> {
    if response.status() == StatusCode::OK {
        return Ok(response);
    }
    Err(Failure::Refused(Refusal::read(response, file)))
}
