//! TLS: the certificate of the server, read anew when its files change, and handshakes within a time.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert, ServerConfig};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::server::TlsStream;

/// How often, at most, it is looked whether the files have changed.
const LOOK: Duration = Duration::from_secs(1);

/// Where the server's certificate lies, as PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and those between it and the authority's, in this order.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Begins TLS on connections.
#[derive(Clone)]
pub(super) struct Tls(TlsAcceptor);

impl Tls {
    /// For HTTP/1.1 by the certificate of `files`.
    ///
    /// # Errors
    /// Files that cannot be read, or that hold no certificate with its key.
    pub fn new(files: &TlsFiles) -> Result<Self, String> {
        let provider = Arc::new(ring::default_provider());
        let certificate = Arc::new(Certificate::read(files.clone(), provider.clone())?);
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(|error| format!("TLS: {error}"))?;
        let mut config = config.with_no_client_auth().with_cert_resolver(certificate);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    /// The same for HTTP/2, which is what gRPC speaks.
    pub fn for_http2(&self) -> Self {
        let mut config = ServerConfig::clone(self.0.config());
        config.alpn_protocols = vec![b"h2".to_vec()];
        Self(TlsAcceptor::from(Arc::new(config)))
    }

    /// The stream within `stream`, once its client has shaken hands.
    ///
    /// # Errors
    /// A client that speaks no TLS, or does not within `patience`.
    pub async fn begin<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S, patience: Duration) -> io::Result<TlsStream<S>> {
        tokio::time::timeout(patience, self.0.accept(stream)).await?
    }
}

/// The certificate as it was last read.
#[derive(Debug)]
struct Certificate {
    files: TlsFiles,
    provider: Arc<CryptoProvider>,
    state: Mutex<Read>,
}

#[derive(Debug)]
struct Read {
    key: Arc<CertifiedKey>,
    version: Version,
    looked: Instant,
}

/// What tells whether the files have changed: length and time of each.
type Version = [Option<(u64, SystemTime)>; 2];

impl Certificate {
    fn read(files: TlsFiles, provider: Arc<CryptoProvider>) -> Result<Self, String> {
        // Before they are read: a change while they are is seen at the next look.
        let version = version(&files);
        let key = Arc::new(key_of(&files, &provider)?);
        Ok(Self { files, provider, state: Mutex::new(Read { key, version, looked: Instant::now() }) })
    }

    /// The newest whole certificate.
    fn current(&self) -> Arc<CertifiedKey> {
        // Whole after any panic: each field is set at once.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() < LOOK {
            return state.key.clone();
        }
        state.looked = Instant::now();
        let now = version(&self.files);
        if now != state.version {
            // What is not whole is said once, not at every look.
            state.version = now;
            match key_of(&self.files, &self.provider) {
                Ok(key) => {
                    state.key = Arc::new(key);
                    log::info!("the certificate was read anew from {}", self.files.certificate.display());
                }
                Err(reason) => log::error!("the certificate has changed and cannot be used, the earlier one stays: {reason}"),
            }
        }
        state.key.clone()
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

fn version(files: &TlsFiles) -> Version {
    let of = |path: &Path| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.len(), found.modified().ok()?))
    };
    [of(&files.certificate), of(&files.key)]
}

fn key_of(files: &TlsFiles, provider: &CryptoProvider) -> Result<CertifiedKey, String> {
    let TlsFiles { certificate, key } = files;
    let of_certificate = |error| format!("{}: {error}; a PEM file with the certificate is needed", certificate.display());
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_file_iter(certificate).map_err(of_certificate)?.collect::<Result<_, _>>().map_err(of_certificate)?;
    if chain.is_empty() {
        return Err(format!("{} has no certificate in it; a PEM file with one is needed", certificate.display()));
    }
    let secret = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| format!("{}: {error}; a PEM file with the private key is needed", key.display()))?;
    CertifiedKey::from_der(chain, secret, provider)
        .map_err(|error| format!("the key of {} does not go with {}: {error}", key.display(), certificate.display()))
}
