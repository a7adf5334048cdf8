//! What the hub or the network said, told with its cause and the next step.

use super::HubOptions;
use crate::Error;
use crate::model::HubId;
use hf_hub::HFError;

/// Whether the hub could not be asked at all (or is down), so that an older answer in the cache may serve.
pub(super) fn is_unreachable(error: &HFError) -> bool {
    match error {
        HFError::Request { .. } => true,
        HFError::Http { context } => context.status.is_server_error(),
        _ => false,
    }
}

/// `error` as this crate's error.
pub(super) fn explain(options: &HubOptions, id: &HubId, error: &HFError) -> Error {
    let endpoint = &options.endpoint;
    let (reason, next) = match error {
        HFError::Request { source, .. } => {
            let what = match source.is_connect() || source.is_timeout() {
                true => "cannot be reached",
                false => "broke off, or gave no hub's answer",
            };
            (
                format!("{endpoint} {what}: {}", root_cause(source)),
                "check the network, any proxy and HF_ENDPOINT, or give a folder that holds the model".to_owned(),
            )
        }
        HFError::AuthRequired { context } => (
            format!("{endpoint} says 401{}: no such repository, or a private or gated one", said(&context.server_message)),
            "check the name; for a private or gated model set HF_TOKEN to a token that may read it".to_owned(),
        ),
        HFError::Forbidden { context } => (
            format!("{endpoint} says 403{}: this token may not read it", said(&context.server_message)),
            format!("accept the model's licence at {endpoint}/{}, and set HF_TOKEN to a token of that account", id.repo()),
        ),
        HFError::RepoNotFound { context, .. } | HFError::RevisionNotFound { context, .. } => {
            let code = context.as_ref().and_then(|context| context.error_code.as_deref());
            let reason = match code {
                Some("RepoNotFound") => format!("{endpoint} says 404: no such repository"),
                Some("RevisionNotFound") => format!("{endpoint} says 404: no such revision"),
                _ => format!("{endpoint} says 404: no such repository or revision"),
            };
            let next = "check the spelling (there is no folder of this name here either); a revision is a branch, tag or commit";
            (reason, next.to_owned())
        }
        HFError::EntryNotFound { path, .. } => (
            format!("{endpoint} says 404 for {path}, which it has listed"),
            "run again; if it stays so, check HF_ENDPOINT".to_owned(),
        ),
        HFError::RateLimited { retry_after, .. } => {
            let wait = retry_after.map_or_else(String::new, |time| format!(" for {} s", time.as_secs()));
            (format!("{endpoint} says 429: too many requests"), format!("wait{wait}, or set HF_TOKEN, then run again"))
        }
        HFError::Http { context } => {
            let reason = format!("{endpoint} says {}{}", context.status, said(&context.server_message));
            (reason, "run again later, or give a folder that holds the model".to_owned())
        }
        HFError::Io(error) => (
            format!("cannot write to the cache {}: {error}", options.cache.display()),
            "free space there, or set HF_HUB_CACHE to another folder".to_owned(),
        ),
        HFError::Url(error) => {
            (format!("HF_ENDPOINT {endpoint} is no address: {error}"), "give one such as https://huggingface.co".to_owned())
        }
        other => (format!("{endpoint}: {other}"), "check HF_ENDPOINT: does a Hugging Face hub answer there?".to_owned()),
    };
    Error::Hub { repo: id.to_string(), reason, next }
}

fn said(message: &Option<String>) -> String {
    message.as_ref().map_or_else(String::new, |message| format!(" ({message})"))
}

/// The innermost cause: `connection refused` rather than `error sending request`.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
