//! Which proxy a request goes through: what the environment says, as curl and Python read it.

use super::address::Address;
use super::failure::Failure;
use std::net::IpAddr;
use ureq::Proxy;

/// The proxy for `address`: `HTTPS_PROXY` or `HTTP_PROXY` by its scheme, else `ALL_PROXY`, each also in lower case; none for a host
/// that `NO_PROXY` names.
pub(super) fn of(address: &Address, env: &impl Fn(&str) -> Option<String>) -> Result<Option<Proxy>, Failure> {
    let set = |name: &str| env(name).filter(|value| !value.trim().is_empty());
    // A CGI program is told HTTP_PROXY by whoever sends it a header "Proxy" (CVE-2016-5385).
    let trusted = |name: &&str| *name != "HTTP_PROXY" || set("REQUEST_METHOD").is_none();
    let names = match address.is_https() {
        true => ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"],
        false => ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"],
    };
    let Some((variable, proxy)) = names.into_iter().filter(trusted).find_map(|name| Some((name, set(name)?))) else {
        return Ok(None);
    };
    let none = set("NO_PROXY").or_else(|| set("no_proxy")).unwrap_or_default();
    if none.split(',').any(|entry| names_host(entry.trim(), address.host())) {
        return Ok(None);
    }
    let proxy = Proxy::new(proxy.trim()).map_err(|error| Failure::Proxy { variable, reason: error.to_string() })?;
    Ok(Some(proxy))
}

/// Whether an entry of `NO_PROXY` names `host`: `*`, an IP address, a network such as `10.0.0.0/8`, or a domain with all below it.
fn names_host(entry: &str, host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if entry == "*" {
        return true;
    }
    if let Ok(ip) = host.parse::<IpAddr>() {
        return match entry.split_once('/') {
            Some((network, bits)) => {
                network.parse().is_ok_and(|network| bits.parse().is_ok_and(|bits| within(ip, network, bits)))
            }
            None => entry.parse() == Ok(ip),
        };
    }
    let (domain, host) = (entry.trim_start_matches("*.").trim_start_matches('.').to_ascii_lowercase(), host.to_ascii_lowercase());
    !domain.is_empty() && host.strip_suffix(&domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Whether the first `bits` bits of both addresses are the same.
fn within(ip: IpAddr, network: IpAddr, bits: u32) -> bool {
    let (a, b, all) = match (ip, network) {
        (IpAddr::V4(ip), IpAddr::V4(network)) => (u128::from(ip.to_bits()), u128::from(network.to_bits()), 32),
        (IpAddr::V6(ip), IpAddr::V6(network)) => (ip.to_bits(), network.to_bits(), 128),
        _ => return false,
    };
    bits <= all && (bits == 0 || (a ^ b) >> (all - bits) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(address: &str, set: &[(&str, &str)]) -> Option<String> {
        let env = |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        let found = of(&Address::endpoint(address).unwrap(), &env).unwrap();
        found.map(|proxy| format!("{}:{}", proxy.host(), proxy.port()))
    }

    #[test]
    fn the_scheme_chooses_the_variable() {
        let set = [("HTTPS_PROXY", "http://secure:1"), ("http_proxy", "plain:2"), ("ALL_PROXY", "socks5://all:3")];
        assert_eq!(proxy("https://hub", &set).unwrap(), "secure:1");
        assert_eq!(proxy("http://hub", &set).unwrap(), "plain:2");
        assert_eq!(proxy("http://hub", &set[2..]).unwrap(), "all:3");
        assert_eq!(proxy("https://hub", &[]), None);
        assert_eq!(proxy("https://hub", &[("HTTPS_PROXY", " ")]), None);
        let cgi = [("REQUEST_METHOD", "GET"), ("HTTP_PROXY", "http://attacker:1")];
        assert_eq!(proxy("http://hub", &cgi), None);
    }

    #[test]
    fn hosts_that_no_proxy_names_are_asked_directly() {
        let direct = |none: &str, address: &str| proxy(address, &[("ALL_PROXY", "http://p:1"), ("NO_PROXY", none)]).is_none();
        for (none, address) in [
            ("*", "http://hub"),
            ("localhost, hub.example", "http://hub.example"),
            ("hub.example", "http://HUB.example"),
            ("hub.example", "http://eu.hub.example"),
            (".hub.example", "http://hub.example"),
            ("*.hub.example", "http://eu.hub.example"),
            ("127.0.0.1", "http://127.0.0.1:8080"),
            ("10.0.0.0/8", "http://10.1.2.3"),
            ("::1", "http://[::1]:80"),
            ("fd00::/8", "http://[fd00::7]"),
        ] {
            assert!(direct(none, address), "{none} {address}");
        }
        for (none, address) in [
            ("", "http://hub"),
            ("ub.example", "http://hub.example"),
            ("hub.example", "http://hub.example.org"),
            ("10.0.0.0/8", "http://11.1.2.3"),
            ("10.0.0.0/33", "http://10.1.2.3"),
            ("10.0.0.0", "http://10.0.0.1"),
        ] {
            assert!(!direct(none, address), "{none} {address}");
        }
    }

    #[test]
    fn what_is_no_proxy_is_told_with_its_variable() {
        let env = |name: &str| (name == "HTTPS_PROXY").then(|| "gopher://p".to_owned());
        let failure = of(&Address::endpoint("https://hub").unwrap(), &env).unwrap_err();
        assert!(matches!(failure, Failure::Proxy { variable: "HTTPS_PROXY", .. }), "{failure:?}");
    }
}
