//! The page for a browser under `/`: one file without anything from elsewhere, and the policy that keeps it so.

use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};
use std::sync::LazyLock;

const PAGE: &str = include_str!("page.html");

/// Only the page's own style and script run, by their hashes, and they speak to this server alone.
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let (style, script) = (hash("style"), hash("script"));
    let policy = format!(
        "default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    // It has nothing but printable ASCII; without a policy nothing would run at all.
    HeaderValue::from_str(&policy).unwrap_or(HeaderValue::from_static("default-src 'none'"))
});

/// What a Content-Security-Policy calls the text of the page's only `<element>`.
fn hash(element: &str) -> String {
    let text = PAGE.split_once(&format!("<{element}>")).and_then(|(_, rest)| rest.split_once(&format!("</{element}>")));
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text.map_or("", |(text, _)| text))))
}

/// Whether a browser asks: probes do not name HTML.
pub(super) fn is_wanted(headers: &HeaderMap) -> bool {
    headers.get_all(header::ACCEPT).iter().any(|accept| accept.to_str().is_ok_and(|accept| accept.contains("text/html")))
}

/// The page.
pub(super) fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::CONTENT_SECURITY_POLICY, POLICY.clone()),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        // What stands under the same address for probes is another answer.
        (header::VARY, HeaderValue::from_static("accept")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, PAGE).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_whole_and_alone() {
        // One element of each, or the hashes would be those of the first alone.
        for element in ["style", "script"] {
            assert_eq!(PAGE.matches(&format!("<{element}")).count(), 1, "{element}");
        }
        for elsewhere in ["http://", "https://", "src=", "@import", "url(", "style=", "onclick=", "innerHTML"] {
            assert!(!PAGE.contains(elsewhere), "{elsewhere}");
        }
        // printf %s '' | openssl dgst -sha256 -binary | base64: what is hashed must not be nothing.
        let policy = POLICY.to_str().unwrap();
        assert!(policy.contains("script-src 'sha256-") && !policy.contains("47DEQpj8HBSa"), "{policy}");
    }

    #[test]
    fn browsers_are_told_from_probes() {
        for (accept, wanted) in [("text/html,application/xhtml+xml,*/*;q=0.8", true), ("*/*", false), ("application/json", false)]
        {
            assert_eq!(
                is_wanted(&HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(accept))])),
                wanted,
                "{accept}"
            );
        }
        assert!(!is_wanted(&HeaderMap::new()));
    }
}
