//! Addresses on the hub, and where its redirects lead.

use iri_string::types::{UriReferenceStr, UriStr};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use ureq::http::Uri;

/// What is encoded in a segment of a path: all that is no `pchar` of RFC 3986, and `%` itself.
const SEGMENT: &AsciiSet = &NOT_IN_ADDRESSES.add(b'#').add(b'/').add(b'?').add(b'%').add(b'[').add(b']');

/// What no address holds as it is. Some servers send it in `Location` all the same.
const NOT_IN_ADDRESSES: &AsciiSet =
    &CONTROLS.add(b' ').add(b'"').add(b'<').add(b'>').add(b'\\').add(b'^').add(b'`').add(b'{').add(b'|').add(b'}');

/// An address with http or https and a host, without a fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address(Uri);

impl Address {
    /// What `HF_ENDPOINT` names, or why it is none.
    pub fn endpoint(text: &str) -> Result<Self, String> {
        let uri: Uri = text.parse().map_err(|error: ureq::http::uri::InvalidUri| error.to_string())?;
        Self::of(uri).ok_or_else(|| "it does not begin with https:// or http:// and a host".to_owned())
    }

    fn of(uri: Uri) -> Option<Self> {
        let known = matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty());
        known.then_some(Self(uri))
    }

    /// The address of `segments`, which are encoded, below this one.
    pub fn below(&self, segments: &[&str], query: Option<&str>) -> Result<Self, String> {
        let mut path = self.0.path().trim_end_matches('/').to_owned();
        for segment in segments {
            if matches!(*segment, "" | "." | "..") {
                return Err(format!("\"{}\" is no path on a hub", segments.join("/")));
            }
            path.push('/');
            path.extend(utf8_percent_encode(segment, SEGMENT));
        }
        if let Some(query) = query {
            path = format!("{path}?{query}");
        }
        let authority = self.0.authority().map_or("", |authority| authority.as_str());
        let address = format!("{}://{authority}{path}", self.scheme());
        address.parse().map(Self).map_err(|error: ureq::http::uri::InvalidUri| format!("{address}: {error}"))
    }

    /// Where `location`, an absolute or relative reference seen from here, leads; `None` for what is no address of a hub.
    pub fn join(&self, location: &str) -> Option<Self> {
        let location = utf8_percent_encode(location, NOT_IN_ADDRESSES).to_string();
        let base = self.0.to_string();
        let base = UriStr::new(&base).ok()?;
        let joined = UriReferenceStr::new(&location).ok()?.resolve_against(base.to_absolute().as_ref()).to_string();
        let without_fragment = joined.split('#').next().unwrap_or_default();
        Self::of(without_fragment.parse().ok()?)
    }

    /// Scheme, host and port, as in `https://huggingface.co`: two addresses with the same one have the same server.
    pub fn origin(&self) -> String {
        let (scheme, host) = (self.scheme(), self.host().to_ascii_lowercase());
        match self.0.port_u16().filter(|&port| port != if self.is_https() { 443 } else { 80 }) {
            Some(port) => format!("{scheme}://{host}:{port}"),
            None => format!("{scheme}://{host}"),
        }
    }

    /// The address without its query, which may hold a signature.
    pub fn without_query(&self) -> String {
        format!("{}{}", self.origin(), self.0.path())
    }

    pub fn is_https(&self) -> bool {
        self.scheme() == "https"
    }

    pub fn scheme(&self) -> &str {
        self.0.scheme_str().unwrap_or_default()
    }

    /// The host, an IPv6 address in brackets.
    pub fn host(&self) -> &str {
        self.0.host().unwrap_or_default()
    }

    pub fn uri(&self) -> &Uri {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        Address::endpoint(text).unwrap()
    }

    #[test]
    fn endpoints_have_a_scheme_and_a_host() {
        for refused in ["", "huggingface.co", "ftp://huggingface.co", "file:///tmp", "http://", "https:/x", "http://a b/"] {
            assert!(Address::endpoint(refused).is_err(), "{refused}");
        }
        for (given, origin) in [
            ("https://huggingface.co", "https://huggingface.co"),
            ("HTTPS://HuggingFace.co:443/", "https://huggingface.co"),
            ("http://127.0.0.1:80", "http://127.0.0.1"),
            ("http://[::1]:8080/hub", "http://[::1]:8080"),
            ("https://hub:80", "https://hub:80"),
        ] {
            assert_eq!(address(given).origin(), origin);
        }
    }

    #[test]
    fn paths_are_encoded_below_the_endpoint() {
        let below =
            |endpoint: &str, segments: &[&str], query| address(endpoint).below(segments, query).map(|a| a.uri().to_string());
        assert_eq!(below("http://h/mirror/", &["a b", "c#d?e%f"], None).unwrap(), "http://h/mirror/a%20b/c%23d%3Fe%25f");
        assert_eq!(below("http://h", &["api", "ü"], Some("blobs=true")).unwrap(), "http://h/api/%C3%BC?blobs=true");
        for outside in ["..", ".", ""] {
            assert!(below("http://h", &["models", outside], None).is_err());
        }
    }

    #[test]
    fn redirects_lead_where_rfc_3986_says() {
        let from = address("https://hub.example/org/name?x=1");
        for (location, to) in [
            ("https://cdn.example/f?Signature=a%2Fb", "https://cdn.example/f?Signature=a%2Fb"),
            ("//cdn.example/f", "https://cdn.example/f"),
            ("/api/f", "https://hub.example/api/f"),
            ("other", "https://hub.example/org/other"),
            ("../other?y=2#part", "https://hub.example/other?y=2"),
            ("/f?name=\"a b\"", "https://hub.example/f?name=%22a%20b%22"),
        ] {
            assert_eq!(from.join(location).unwrap().uri().to_string(), to, "{location}");
        }
        for nowhere in ["ftp://hub.example/f", "mailto:a@b", "http://", "https://[::1"] {
            assert_eq!(from.join(nowhere), None, "{nowhere}");
        }
    }

    #[test]
    fn a_message_shows_no_signature() {
        assert_eq!(address("http://h:8080/f?Signature=secret").without_query(), "http://h:8080/f");
    }
}
