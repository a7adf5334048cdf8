//! What the hub or the network said, told with its cause and the next step.

use super::HubOptions;
use super::client::{Response, header};
use super::tls::{self, cause, root_cause};
use crate::Error;
use crate::model::HubId;
use std::io::{ErrorKind, Read};
use std::path::PathBuf;

/// The most bytes of a refusal's body that are read for its reason, and the most characters of it that are shown.
const MAX_BODY: u64 = 4096;
const MAX_SHOWN: usize = 200;

/// Why the hub did not give what was asked for.
#[derive(Debug)]
pub(super) enum Failure {
    /// `HF_ENDPOINT` is no address.
    Address(String),
    /// The token is not one that a header can carry.
    Token,
    /// What `variable` names holds no certificates.
    Authorities { variable: &'static str, path: PathBuf, reason: String },
    /// This machine has no certificates.
    NoAuthorities(String),
    /// What `variable` names is no proxy.
    Proxy { variable: &'static str, reason: String },
    /// No answer.
    Request(ureq::Error),
    /// The body of `file` broke off.
    BrokenOff { file: String, source: std::io::Error },
    /// A status that is no success.
    Refused(Refusal),
    /// The hub names another server as the one to ask.
    Redirect { from: String, to: String, server: String },
    /// An answer that no hub gives.
    Answer(String),
}

/// An answer whose status is no success.
#[derive(Debug)]
pub(super) struct Refusal {
    status: u16,
    /// The file that was asked for; none when it was the repository.
    file: Option<String>,
    /// The hub's own names for the reason.
    code: Option<String>,
    message: Option<String>,
    /// How long to wait, in the hub's words: seconds, or a date.
    retry_after: Option<String>,
}

impl Refusal {
    pub fn read(response: Response, file: Option<&str>) -> Self {
        let text = |name| header(&response, name).map(str::to_owned);
        let (code, said, retry_after) = (text("x-error-code"), text("x-error-message"), text("retry-after"));
        let status = response.status().as_u16();
        Self { status, file: file.map(str::to_owned), code, message: said.or_else(|| read_reason(response)), retry_after }
    }
}

/// `error` of a JSON body, where it has one.
fn read_reason(response: Response) -> Option<String> {
    let mut body = Vec::new();
    // Whatever fails here, the status has been told.
    response.into_body().into_reader().take(MAX_BODY).read_to_end(&mut body).ok()?;
    let json: serde_json::Value = serde_json::from_slice(&body).ok()?;
    Some(json.get("error")?.as_str()?.chars().filter(|c| !c.is_control()).take(MAX_SHOWN).collect())
}

/// Whether the hub could not be asked at all (or is down), so that an older answer in the cache may serve.
pub(super) fn is_unreachable(failure: &Failure) -> bool {
    match failure {
        Failure::Request(error) => !matches!(error, ureq::Error::BadUri(_) | ureq::Error::Http(_)),
        Failure::Refused(refusal) => refusal.status >= 500,
        _ => false,
    }
}

/// `failure` as this crate's error.
pub(super) fn explain(options: &HubOptions, id: &HubId, failure: &Failure) -> Error {
    let endpoint = &options.endpoint;
    let (reason, next) = match failure {
        Failure::Address(reason) => {
            (format!("HF_ENDPOINT {endpoint} is no address: {reason}"), "give one such as https://huggingface.co".to_owned())
        }
        Failure::Token => (
            "the token holds characters that no token has".to_owned(),
            "check HF_TOKEN, or the file of HF_TOKEN_PATH (`token` in HF_HOME)".to_owned(),
        ),
        Failure::Authorities { variable, path, reason } => (
            format!("{variable} {} cannot be used: {reason}", path.display()),
            format!("set {variable} to certificates in PEM form, or unset it to use the system's"),
        ),
        Failure::NoAuthorities(reason) => (
            format!("{endpoint} cannot be trusted: no certificates are found on this machine: {reason}"),
            "install the system's certificates (package ca-certificates), or set SSL_CERT_FILE to a file of them (PEM)"
                .to_owned(),
        ),
        Failure::Proxy { variable, reason } => (
            format!("{variable} is no proxy's address: {reason}"),
            format!("set {variable} to one such as http://host:port, or unset it"),
        ),
        Failure::Request(error) if tls::is_certificate_fault(error) => certificate_fault(endpoint, error),
        Failure::Request(error) => {
            let what = match is_silence(error) {
                true => "cannot be reached",
                false => "broke off, or gave no hub's answer",
            };
            (
                format!("{endpoint} {what}: {}", cause(error)),
                "check the network, any proxy and HF_ENDPOINT, or give a folder that holds the model".to_owned(),
            )
        }
        Failure::BrokenOff { file, source } => (
            format!("{endpoint} broke off while it sent {file}: {}", root_cause(source)),
            "run again; what is downloaded already is kept".to_owned(),
        ),
        Failure::Refused(refusal) => refused(endpoint, id, refusal),
        Failure::Redirect { from, to, server } => (
            format!("{from} leads to another server: {to}"),
            format!("if you trust that one, set HF_ENDPOINT={server} (HF_TOKEN is sent there then)"),
        ),
        Failure::Answer(what) => (format!("{endpoint}: {what}"), NOT_A_HUB.to_owned()),
    };
    Error::Hub { repo: id.to_string(), reason, next }
}

/// What to do about an answer that no hub gives.
const NOT_A_HUB: &str = "check HF_ENDPOINT and any proxy: does a Hugging Face hub answer there?";

/// Whether nobody answered at all.
fn is_silence(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::Timeout(_)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::ConnectProxyFailed(_) => true,
        ureq::Error::Io(error) => matches!(
            error.kind(),
            ErrorKind::ConnectionRefused
                | ErrorKind::HostUnreachable
                | ErrorKind::NetworkUnreachable
                | ErrorKind::NetworkDown
                | ErrorKind::AddrNotAvailable
                | ErrorKind::TimedOut
        ),
        _ => false,
    }
}

fn certificate_fault(endpoint: &str, error: &ureq::Error) -> (String, String) {
    let cause = cause(error);
    let set = tls::set_in_env();
    let next = if !cause.contains("UnknownIssuer") {
        "check this machine's clock, any proxy and HF_ENDPOINT".to_owned()
    } else {
        let now = set.map_or_else(|| "the system's certificates do not hold it".to_owned(), |set| format!("now {set}"));
        format!(
            "the authority that signed the server's certificate is not known here, as where a company's proxy opens connections; \
             set SSL_CERT_FILE to a file with that authority's certificate in PEM form ({now})"
        )
    };
    (format!("{endpoint} cannot be trusted: {cause}"), next)
}

fn refused(endpoint: &str, id: &HubId, refusal: &Refusal) -> (String, String) {
    let Refusal { status, file, code, message, retry_after } = refusal;
    let said = message.as_ref().map_or_else(String::new, |message| format!(" ({message})"));
    let of_file = file.as_ref().map_or_else(String::new, |file| format!(" for {file}"));
    match (status, file) {
        (401, _) => (
            format!("{endpoint} says 401{of_file}{said}: no such repository, or a private or gated one"),
            "check the name; for a private or gated model set HF_TOKEN to a token that may read it".to_owned(),
        ),
        (403, _) => (
            format!("{endpoint} says 403{of_file}{said}: this token may not read it"),
            format!("accept the model's licence at {endpoint}/{}, and set HF_TOKEN to a token of that account", id.repo()),
        ),
        (404, None) => {
            let reason = match code.as_deref() {
                Some("RepoNotFound") => format!("{endpoint} says 404: no such repository"),
                Some("RevisionNotFound") => format!("{endpoint} says 404: no such revision"),
                _ => format!("{endpoint} says 404: no such repository or revision"),
            };
            let next = "check the spelling (there is no folder of this name here either); a revision is a branch, tag or commit";
            (reason, next.to_owned())
        }
        (404, Some(file)) => (
            format!("{endpoint} says 404 for {file}, which it has listed"),
            "run again; if it stays so, check HF_ENDPOINT".to_owned(),
        ),
        (429, _) => {
            let wait = match retry_after.as_deref() {
                None => String::new(),
                Some(time) if time.bytes().all(|byte| byte.is_ascii_digit()) => format!(" for {time} s"),
                Some(date) => format!(" until {date}"),
            };
            (format!("{endpoint} says 429: too many requests"), format!("wait{wait}, or set HF_TOKEN, then run again"))
        }
        (200..=299, _) => (format!("{endpoint} says {status}{of_file}, where 200 is expected"), NOT_A_HUB.to_owned()),
        _ => (
            format!("{endpoint} says {status}{of_file}{said}"),
            "run again later, or give a folder that holds the model".to_owned(),
        ),
    }
}
