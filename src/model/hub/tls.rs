//! Which certificate authorities HTTPS trusts: the system's, or those that the environment names instead.

use super::failure::Failure;
use reqwest::Certificate;
use std::error::Error;
use std::path::{Path, PathBuf};

/// OpenSSL's names, which Python's huggingface_hub reads too.
const CERT_FILE: &str = "SSL_CERT_FILE";
const CERT_DIR: &str = "SSL_CERT_DIR";

/// A file or folder that older versions of huggingface_hub and curl read; the first one set counts, where OpenSSL's are not set.
const BUNDLES: [&str; 2] = ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"];

/// The certificates that the environment names instead of the system's; `None` where it names none.
pub(super) fn authorities_from_env() -> Result<Option<Vec<Certificate>>, Failure> {
    let Some(places) = Places::from(&|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)) else {
        return Ok(None);
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
        for certificate in found.certs {
            authorities.push(Certificate::from_der(&certificate).map_err(|error| unusable(root_cause(&error)))?);
        }
    }
    Ok(Some(authorities))
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
pub(super) fn is_certificate_fault(error: &dyn Error) -> bool {
    root_cause(error).contains("certificate")
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
