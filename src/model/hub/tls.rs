//! Which certificate authorities HTTPS trusts: the system's, or those that the environment names instead.

use super::failure::Failure;
use std::error::Error;
use std::path::{Path, PathBuf};
use ureq::tls::{Certificate, RootCerts};

/// OpenSSL's names, which Python's huggingface_hub reads too.
const CERT_FILE: &str = "SSL_CERT_FILE";
const CERT_DIR: &str = "SSL_CERT_DIR";

/// A file or folder that older versions of huggingface_hub and curl read; the first one set counts, where OpenSSL's are not set.
const BUNDLES: [&str; 2] = ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"];

/// The certificates that the environment names, else the system's, of which there must be some where they are `needed`.
pub(super) fn authorities(needed: bool) -> Result<RootCerts, Failure> {
    let Some(places) = Places::from(&|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)) else {
        let found = rustls_native_certs::load_native_certs();
        if needed && found.certs.is_empty() {
            let reason = found.errors.first().map_or_else(|| "there are none".to_owned(), |error| root_cause(error));
            return Err(Failure::NoAuthorities(reason));
        }
        return Ok(RootCerts::new_with_certs(
            &found.certs.iter().map(|der| Certificate::from_der(der).to_owned()).collect::<Vec<_>>(),
        ));
    };
    let mut authorities = Vec::new();
    for (variable, path) in &places.0 {
        let (file, folder) = if path.is_dir() { (None, Some(path.as_path())) } else { (Some(path.as_path()), None) };
        let found = rustls_native_certs::load_certs_from_paths(file, folder);
        let unusable = |reason: String| Failure::Authorities { variable, path: path.clone(), reason };
        // A folder may hold other files too.
        if let Some(error) = found.errors.first().filter(|_| file.is_some() || found.certs.is_empty()) {
            return Err(unusable(root_cause(error)));
        }
        if found.certs.is_empty() {
            return Err(unusable("it holds no certificate in PEM form".to_owned()));
        }
        authorities.extend(found.certs.iter().map(|der| Certificate::from_der(der).to_owned()));
    }
    Ok(RootCerts::new_with_certs(&authorities))
}

/// Files and folders of certificates, with the variable that names each.
#[derive(Debug, PartialEq, Eq)]
struct Places(Vec<(&'static str, PathBuf)>);

impl Places {
    fn from(env: &impl Fn(&str) -> Option<PathBuf>) -> Option<Self> {
        let mut places: Vec<_> = env(CERT_FILE).map(|file| (CERT_FILE, file)).into_iter().collect();
        let folders = env(CERT_DIR).unwrap_or_default();
        // A folder that is not there is passed over, as OpenSSL does with its list.
        places.extend(std::env::split_paths(&folders).filter(|folder| folder.is_dir()).map(|folder| (CERT_DIR, folder)));
        if places.is_empty() {
            places.extend(BUNDLES.into_iter().find_map(|name| Some((name, env(name)?))));
        }
        (!places.is_empty()).then_some(Self(places))
    }
}

/// The variables of this file that are set, for a message: `SSL_CERT_FILE is /path`.
pub(super) fn set_in_env() -> Option<String> {
    let set = [CERT_FILE, CERT_DIR].into_iter().chain(BUNDLES).find_map(|name| Some((name, std::env::var(name).ok()?)));
    set.filter(|(_, value)| !value.is_empty()).map(|(name, value)| format!("{name} is {}", Path::new(&value).display()))
}

/// Whether a certificate was refused.
pub(super) fn is_certificate_fault(error: &ureq::Error) -> bool {
    cause(error).contains("certificate")
}

/// The innermost cause of a request's failure.
pub(super) fn cause(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) => root_cause(error),
        ureq::Error::Rustls(error) => root_cause(error),
        other => other.to_string(),
    }
}

/// The innermost cause: `connection refused` rather than `error sending request`.
pub(super) fn root_cause(error: &dyn Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openssls_variables_come_before_the_bundles() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().to_str().unwrap();
        let places = |set: &[(&str, &str)]| {
            let env = |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| PathBuf::from(value));
            Places::from(&env).map(|places| places.0)
        };
        assert_eq!(places(&[]), None);
        let bundles = [("CURL_CA_BUNDLE", "/curl.pem"), ("REQUESTS_CA_BUNDLE", "/requests.pem")];
        assert_eq!(places(&bundles), Some(vec![("REQUESTS_CA_BUNDLE", PathBuf::from("/requests.pem"))]));
        assert_eq!(places(&bundles[..1]), Some(vec![("CURL_CA_BUNDLE", PathBuf::from("/curl.pem"))]));
        let folders = std::env::join_paths([there, "/no/such/folder"]).unwrap();
        assert_eq!(
            places(&[bundles[0], ("SSL_CERT_FILE", "/ssl.pem"), ("SSL_CERT_DIR", folders.to_str().unwrap())]),
            Some(vec![("SSL_CERT_FILE", PathBuf::from("/ssl.pem")), ("SSL_CERT_DIR", PathBuf::from(there))])
        );
    }
}
