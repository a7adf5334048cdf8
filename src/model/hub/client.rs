//! Requests to the hub: the token, tries, redirects, time limits.

use super::failure::{Failure, Refusal};
use super::{HubOptions, tls};
use reqwest::blocking::Response;
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderValue, LOCATION};
use reqwest::{Method, StatusCode, Url};
use std::time::Duration;

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
    http: reqwest::blocking::Client,
    endpoint: Url,
    token: Option<HeaderValue>,
}

impl Client {
    pub fn new(options: &HubOptions, token: Option<&str>) -> Result<Self, Failure> {
        let endpoint = Url::parse(&options.endpoint).map_err(|error| Failure::Address(error.to_string()))?;
        if !matches!(endpoint.scheme(), "http" | "https") || !endpoint.has_host() {
            return Err(Failure::Address("it does not begin with https:// or http:// and a host".to_owned()));
        }
        let mut http = reqwest::blocking::Client::builder()
            .user_agent(concat!("trt-embed/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            // Of each operation: the answer's beginning, then each piece of its body.
            .timeout(SILENCE_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none());
        if let Some(authorities) = tls::authorities_from_env()? {
            http = http.tls_certs_only(authorities);
        }
        let token = token.map(|token| HeaderValue::from_str(&format!("Bearer {token}"))).transpose();
        let mut token = token.map_err(|_| Failure::Token)?;
        if let Some(token) = &mut token {
            token.set_sensitive(true);
        }
        Ok(Self { http: http.build().map_err(Failure::Request)?, endpoint, token })
    }

    /// What the hub says below `path`; the segments are encoded.
    pub fn get(&self, path: &[&str], query: Option<&str>) -> Result<Response, Failure> {
        let mut url = self.url(path)?;
        url.set_query(query);
        ok(self.send(&Method::GET, url, Follow::WithinHub)?, None)
    }

    /// The head of `file`'s answer: a success, or the redirect that carries the metadata of a file in LFS.
    pub fn head_of_file(&self, path: &[&str], file: &str) -> Result<Response, Failure> {
        let response = self.send(&Method::HEAD, self.url(path)?, Follow::UpToMetadata)?;
        if response.status().is_redirection() && has_metadata(&response) { Ok(response) } else { ok(response, Some(file)) }
    }

    /// The content of `file`, from wherever the hub keeps it.
    pub fn get_file(&self, path: &[&str], file: &str) -> Result<Response, Failure> {
        ok(self.send(&Method::GET, self.url(path)?, Follow::Anywhere)?, Some(file))
    }

    fn url(&self, path: &[&str]) -> Result<Url, Failure> {
        let mut url = self.endpoint.clone();
        url.path_segments_mut().map_err(|()| Failure::Address("it has no path".to_owned()))?.pop_if_empty().extend(path);
        Ok(url)
    }

    /// The first answer that is no redirect to be followed.
    fn send(&self, method: &Method, url: Url, follow: Follow) -> Result<Response, Failure> {
        let (mut url, mut within_hub) = (url, true);
        for _ in 0..=MAX_REDIRECTS {
            // A token is for the hub alone, and whoever was asked in its place must not send it back there either.
            let response = self.try_to_send(method, &url, self.token.as_ref().filter(|_| within_hub))?;
            let Some(target) = redirect_target(&url, &response)? else { return Ok(response) };
            within_hub &= target.origin() == self.endpoint.origin();
            match follow {
                Follow::Anywhere => {}
                Follow::UpToMetadata if has_metadata(&response) => return Ok(response),
                Follow::WithinHub | Follow::UpToMetadata if !within_hub => {
                    let server = target.origin().ascii_serialization();
                    return Err(Failure::Redirect { from: without_query(&url), to: without_query(&target), server });
                }
                Follow::WithinHub | Follow::UpToMetadata => {}
            }
            url = target;
        }
        Err(Failure::Answer(format!("more than {MAX_REDIRECTS} redirects, the last to {}", without_query(&url))))
    }

    fn try_to_send(&self, method: &Method, url: &Url, token: Option<&HeaderValue>) -> Result<Response, Failure> {
        let mut wait = FIRST_WAIT;
        for _ in 1..ATTEMPTS {
            match self.send_once(method, url, token) {
                Ok(response) if !PASSING.contains(&response.status()) => return Ok(response),
                Err(error) if !may_pass(&error) => return Err(Failure::Request(error)),
                Ok(_) | Err(_) => std::thread::sleep(wait),
            }
            wait *= 2;
        }
        self.send_once(method, url, token).map_err(Failure::Request)
    }

    fn send_once(&self, method: &Method, url: &Url, token: Option<&HeaderValue>) -> reqwest::Result<Response> {
        // Sizes and hashes are those of the file, not of a compressed form.
        let mut request = self.http.request(method.clone(), url.clone()).header(ACCEPT_ENCODING, "identity");
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, token);
        }
        request.send()
    }
}

/// Whether another try may end otherwise. Nobody there within the time for a connection, or a certificate that is not valid: no.
fn may_pass(error: &reqwest::Error) -> bool {
    if error.is_connect() {
        !error.is_timeout() && !tls::is_certificate_fault(error)
    } else {
        error.is_timeout() || error.is_request()
    }
}

/// Whether the answer says itself what a file in LFS is, so that its redirect need not be followed to learn it.
fn has_metadata(response: &Response) -> bool {
    header(response, "x-linked-etag").is_some() && header(response, "x-repo-commit").is_some()
}

/// Where `response`, the answer for `url`, leads; `None` when it is no redirect.
fn redirect_target(url: &Url, response: &Response) -> Result<Option<Url>, Failure> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let location = header(response, LOCATION.as_str());
    let target =
        location.and_then(|location| url.join(location).ok()).filter(|target| matches!(target.scheme(), "http" | "https"));
    let status = response.status().as_u16();
    let lost = || Failure::Answer(format!("{status} for {} leads nowhere (Location: {location:?})", without_query(url)));
    target.map(Some).ok_or_else(lost)
}

/// The value of a header, where there is one that is not empty.
pub(super) fn header<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::trim).filter(|value| !value.is_empty())
}

/// `url` without its query, which may hold a signature.
fn without_query(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.into()
}

/// `response` if it is a whole answer (200).
fn ok(response: Response, file: Option<&str>) -> Result<Response, Failure> {
    if response.status() == StatusCode::OK {
        return Ok(response);
    }
    Err(Failure::Refused(Refusal::read(response, file)))
}
