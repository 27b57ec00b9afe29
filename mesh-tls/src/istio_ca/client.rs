//! Asks an authority to sign, over a connection of its own.
//!
//! The authority's server is known by its name and believed by the roots that are configured, and by the successors that
//! it named itself when it signed last, so that it may replace its root while we run. Only then is it told anything.
//! The file of roots has the last word while it can be read: successors count for as long as the file has everything that
//! it had when they were named, and what was in the file once and is there no more is not believed, whoever names it.
//!
//! Whoever asks shows what it has: its certificate, when it has one that is good, and its token, when it can be read. Any of
//! them is enough for istiod and for our own authority. An authority that has forgotten its own root cannot take our
//! certificate, and ends the connection: then the token is tried by itself.

use std::fmt;
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, TE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderName, HeaderValue, Request, StatusCode, Uri, Version};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::message::{CertificateRequest, CertificateResponse};
use super::{MAX_MESSAGE, PATH};
use crate::alpn;
use crate::bundle::{InvalidBundle, TrustBundle};
use crate::connector::Ours;
use crate::grpc::{APPLICATION_GRPC, Code, Status, frame, unframe};
use crate::source::{Identity, Material, Materials};
use crate::verifier::{PeerRule, PeerVerifier, in_words};

/// How long one question may take, from the first packet to the last, where nothing else is said.
const PATIENCE: Duration = Duration::from_secs(10);

/// The port of istiod's certificate service.
const DEFAULT_PORT: u16 = 15012;

/// The header by which istiod tells clusters from each other.
const CLUSTER_ID: HeaderName = HeaderName::from_static("clusterid");
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The longest token that is read, in bytes.
const MAX_TOKEN: u64 = 16 * 1024;

/// Signs requests: an authority somewhere, or one in a test.
pub trait Sign: Send + Sync + 'static {
    /// Asks for a certificate: certificates in PEM, the workload's own first and whom to believe last.
    ///
    /// # Errors
    /// When the authority is away, or does not sign.
    fn sign(&self, question: Question<'_>)
    -> impl Future<Output = Result<Vec<String>, CaClientError>> + Send;
}

/// What is asked of an authority.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Question<'a> {
    /// The signing request in PEM.
    pub csr: &'a str,
    /// For how long.
    pub validity: Duration,
    /// What we have: a certificate to prove ourselves with, and whom the authority named last.
    pub current: &'a Material,
}

impl<'a> Question<'a> {
    /// Asks to sign `csr`.
    #[must_use]
    pub const fn new(csr: &'a str, validity: Duration, current: &'a Material) -> Self {
        Self { csr, validity, current }
    }
}

/// The client of one authority. Clones share what the authority has named.
#[derive(Clone)]
pub struct IstioCa {
    authority: Authority,
    host: String,
    port: u16,
    token: PathBuf,
    roots: Roots,
    cluster_id: HeaderValue,
    patience: Duration,
    provider: Arc<CryptoProvider>,
    named: Arc<Mutex<Named>>,
}

/// What the authority named when it signed last, and what the file of roots had then.
#[derive(Default)]
struct Named {
    /// What came with the certificate.
    successors: Vec<CertificateDer<'static>>,
    under: Vec<CertificateDer<'static>>,
    /// What was in the file once and is not now.
    gone: Vec<CertificateDer<'static>>,
    /// What was in the file when it was read last.
    file: Vec<CertificateDer<'static>>,
}

impl Named {
    /// Of `roots` those that count beside a file that has `file` now.
    fn beside(
        &mut self,
        file: &[CertificateDer<'static>],
        roots: &[CertificateDer<'static>],
    ) -> Vec<CertificateDer<'static>> {
        let lost = std::mem::replace(&mut self.file, file.to_vec());
        self.gone.extend(lost);
        self.gone.retain(|root| !file.contains(root));
        if !self.under.iter().all(|root| file.contains(root)) {
            self.successors.clear();
        }
        let counts = |root: &&CertificateDer<'static>| {
            self.successors.contains(root) && !self.gone.contains(root) && !file.contains(root)
        };
        roots.iter().filter(counts).cloned().collect()
    }
}

#[derive(Clone)]
enum Roots {
    File(PathBuf),
    Fixed(Arc<TrustBundle>),
}

/// An address is not one of an authority.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidAddress {
    /// It would send a token in plaintext.
    #[error("an authority is asked over TLS alone: write https://HOST:PORT")]
    Plaintext,
    /// It is no `https://HOST:PORT`.
    #[error("expected https://HOST:PORT")]
    Form,
    /// The name of the cluster cannot be sent.
    #[error("the name of the cluster has bytes that no header has")]
    ClusterId,
}

/// Why an authority did not sign, in words for whoever has to mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaClientError {
    /// There is neither a certificate nor a token to prove ourselves with.
    #[error("the token {}: {reason}", .path.display())]
    Token {
        /// Where it was looked for.
        path: PathBuf,
        /// What is wrong with it; nothing of it is quoted.
        reason: String,
    },
    /// Nobody is known whom the authority's server could be believed by.
    #[error("the authority's roots {}: {reason}", .path.display())]
    Roots {
        /// Where they were looked for.
        path: PathBuf,
        /// What is wrong with them.
        reason: String,
    },
    /// There is no connection.
    #[error("cannot connect to {address}: {error}")]
    Connect {
        /// The authority's.
        address: String,
        /// Why.
        error: io::Error,
    },
    /// The server is not whom it has to be, or does not take our certificate.
    #[error("the TLS handshake with {address} failed: {error}")]
    Handshake {
        /// The authority's.
        address: String,
        /// Why.
        error: io::Error,
    },
    /// The connection broke off.
    #[error("the connection to {address} broke off: {reason}")]
    Broken {
        /// The authority's.
        address: String,
        /// Why.
        reason: String,
    },
    /// There was no answer in time.
    #[error("{address} did not answer within {patience:?}")]
    TooLate {
        /// The authority's.
        address: String,
        /// How long it was waited for.
        patience: Duration,
    },
    /// The authority refuses.
    #[error("the authority refuses: {0}")]
    Refused(Status),
    /// What came is no answer, or not to what was asked.
    #[error("the authority's answer is not taken: {0}")]
    Answer(String),
}

impl CaClientError {
    /// What kind of error it is, in words that name no file and no address.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Token { .. } => "there is no token that can be read",
            Self::Roots { .. } => "there are no roots that can be read",
            Self::Connect { .. } => "cannot connect to the authority",
            Self::Handshake { .. } => "the TLS handshake with the authority failed",
            Self::Broken { .. } => "the connection to the authority broke off",
            Self::TooLate { .. } => "the authority did not answer in time",
            Self::Refused(_) => "the authority refuses",
            Self::Answer(_) => "the authority's answer is not taken",
        }
    }

    /// Whether the connection failed before there was an answer.
    fn is_of_connection(&self) -> bool {
        matches!(self, Self::Handshake { .. } | Self::Broken { .. })
    }
}

impl IstioCa {
    /// The authority at `address`: `https://HOST:PORT`, or `HOST:PORT` as Istio's `CA_ADDR` has it; the port is 15012 when
    /// there is none. Its server is believed when `roots`, a PEM file, believes it, or a successor that the authority named
    /// since with a certificate. A root that is taken out of the file is believed no more from the next question on, nor
    /// are successors that were named while it was in. A file that cannot be read leaves what the authority named last. The
    /// token is in the file `token`. Both files are read anew for each question.
    ///
    /// # Errors
    /// When the address is not one of these.
    pub fn new(
        address: &str,
        token: PathBuf,
        roots: PathBuf,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, InvalidAddress> {
        let authority = match address.split_once("://") {
            None => address.to_owned(),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => {
                rest.strip_suffix('/').unwrap_or(rest).to_owned()
            }
            Some((scheme, _)) if scheme.eq_ignore_ascii_case("http") => {
                return Err(InvalidAddress::Plaintext);
            }
            Some(_) => return Err(InvalidAddress::Form),
        };
        let authority: Authority = authority.parse().map_err(|_| InvalidAddress::Form)?;
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        // A port that is none is no port to `http`.
        let port = match authority.as_str().strip_prefix(authority.host()) {
            Some("") => DEFAULT_PORT,
            _ => authority.port_u16().filter(|port| *port != 0).ok_or(InvalidAddress::Form)?,
        };
        if authority.as_str().contains('@') || ServerName::try_from(host.as_str()).is_err() {
            return Err(InvalidAddress::Form);
        }
        let cluster_id = HeaderValue::from_static("Kubernetes");
        let (roots, named) = (Roots::File(roots), Arc::default());
        Ok(Self { authority, host, port, token, roots, cluster_id, patience: PATIENCE, provider, named })
    }

    /// Believes these in the place of a file: those of the system, for an authority that is known to all.
    #[must_use]
    pub fn fixed_roots(mut self, roots: Arc<TrustBundle>) -> Self {
        self.roots = Roots::Fixed(roots);
        self
    }

    /// The name of our cluster, which istiod asks for tokens' issuers by. Default `Kubernetes`, as Istio.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn cluster_id(mut self, name: &str) -> Result<Self, InvalidAddress> {
        self.cluster_id = HeaderValue::from_str(name).map_err(|_| InvalidAddress::ClusterId)?;
        Ok(self)
    }

    /// How long one question may take, from the first packet to the last. Default 10 s.
    #[must_use]
    pub const fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    fn address(&self) -> String {
        match self.host.parse::<Ipv6Addr>() {
            Ok(host) => format!("[{host}]:{}", self.port),
            Err(_) => format!("{}:{}", self.host, self.port),
        }
    }

    /// Whom the authority's server is believed by.
    async fn trust(&self, named: &TrustBundle) -> Result<TrustBundle, CaClientError> {
        let (mut roots, failed) = match &self.roots {
            Roots::Fixed(bundle) => (bundle.roots().to_vec(), None),
            Roots::File(path) => match read_roots(path).await {
                Ok(bundle) => {
                    let mut roots = bundle.roots().to_vec();
                    let beside = self.named().beside(&roots, named.roots());
                    roots.extend(beside);
                    (roots, None)
                }
                Err(reason) => (Vec::new(), Some(CaClientError::Roots { path: path.clone(), reason })),
            },
        };
        if failed.is_some() || matches!(self.roots, Roots::Fixed(_)) {
            let known = self.named();
            let counts =
                |root: &&CertificateDer<'static>| !roots.contains(root) && !known.gone.contains(root);
            let more: Vec<_> = named.roots().iter().filter(counts).cloned().collect();
            roots.extend(more);
        }
        match (TrustBundle::new(roots), failed) {
            (Ok(bundle), _) => Ok(bundle),
            (Err(InvalidBundle::Empty), Some(failed)) => Err(failed),
            (Err(error), _) => Err(CaClientError::Answer(error.to_string())),
        }
    }

    /// Remembers whom the authority names, and that it did so under the file as it was for this question.
    fn remember(&self, answer: &[String]) {
        let named = answer.iter().flat_map(|pem| CertificateDer::pem_slice_iter(pem.as_bytes())).flatten();
        let mut known = self.named();
        known.under = known.file.clone();
        known.successors = named.collect();
    }

    fn named(&self) -> std::sync::MutexGuard<'_, Named> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn token(&self) -> Result<HeaderValue, CaClientError> {
        let unusable = |reason: String| CaClientError::Token { path: self.token.clone(), reason };
        let text = read_token(&self.token).await.map_err(|error| unusable(error.to_string()))?;
        let text = text.trim();
        if text.is_empty() {
            return Err(unusable("it is empty".to_owned()));
        }
        let value = HeaderValue::from_str(&format!("Bearer {text}"));
        let mut value =
            value.map_err(|_| unusable("it is no token: it has more than one line".to_owned()))?;
        value.set_sensitive(true);
        Ok(value)
    }

    async fn ask(
        &self,
        trust: &TrustBundle,
        identity: Option<&Identity>,
        token: Option<&HeaderValue>,
        message: &[u8],
    ) -> Result<Vec<String>, CaClientError> {
        let asked = async {
            let stream = self.connect(trust, identity).await?;
            self.exchange(stream, token, message).await
        };
        let (address, patience) = (self.address(), self.patience);
        let asked = tokio::time::timeout(patience, asked).await;
        asked.unwrap_or(Err(CaClientError::TooLate { address, patience }))
    }

    async fn connect(
        &self,
        trust: &TrustBundle,
        identity: Option<&Identity>,
    ) -> Result<TlsStream<TcpStream>, CaClientError> {
        let stream = TcpStream::connect((self.host.as_str(), self.port))
            .await
            .map_err(|error| CaClientError::Connect { address: self.address(), error })?;
        let failed = |error| CaClientError::Handshake { address: self.address(), error };
        let bundle =
            TrustBundle::new(trust.roots().iter().cloned()).map_err(io::Error::other).map_err(failed)?;
        let materials = Materials::new(Material { identity: identity.cloned(), bundle: Arc::new(bundle) });
        let rule = PeerRule::Named { host: self.host.clone(), any_of: Vec::new() };
        let verifier = PeerVerifier::new(materials.clone(), Arc::clone(&self.provider), rule);
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)
            .map_err(failed)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(Ours(materials)));
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![alpn::H2.to_vec()];
        let name = ServerName::try_from(self.host.clone()).map_err(io::Error::other).map_err(failed)?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(in_words).map_err(failed)
    }

    async fn exchange(
        &self,
        stream: TlsStream<TcpStream>,
        token: Option<&HeaderValue>,
        message: &[u8],
    ) -> Result<Vec<String>, CaClientError> {
        let broken = |error: &dyn fmt::Display| CaClientError::Broken {
            address: self.address(),
            reason: error.to_string(),
        };
        let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        let (mut sender, connection) =
            builder.handshake(TokioIo::new(stream)).await.map_err(|error| broken(&in_full(&error)))?;
        let request = self.request(token, message)?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(|error| broken(&in_full(&error)))?;
            let (head, body) = response.into_parts();
            if head.status != StatusCode::OK {
                return Err(CaClientError::Answer(format!("it is HTTP status {}", head.status)));
            }
            if let Some(status) = Status::read(&head.headers).filter(|status| status.code != Code::Ok) {
                return Err(CaClientError::Refused(status));
            }
            let body = Limited::new(body, MAX_MESSAGE).collect().await.map_err(|error| broken(&error))?;
            match body.trailers().and_then(Status::read) {
                Some(status) if status.code == Code::Ok => {}
                Some(status) => return Err(CaClientError::Refused(status)),
                None => return Err(CaClientError::Answer("it has no status".to_owned())),
            }
            let bytes = body.to_bytes();
            let answer = |error: String| CaClientError::Answer(error);
            let message = unframe(&bytes).map_err(|status| answer(status.message))?;
            let response = CertificateResponse::decode(message).map_err(|error| answer(error.to_string()))?;
            Ok(response.cert_chain)
        };
        let (mut exchange, connection) = (pin!(exchange), pin!(connection));
        tokio::select! {
            biased;
            answer = &mut exchange => answer,
            // What the connection read before its end is still there for the exchange.
            _ = connection => exchange.await,
        }
    }

    fn request(
        &self,
        token: Option<&HeaderValue>,
        message: &[u8],
    ) -> Result<Request<Full<Bytes>>, CaClientError> {
        let mut request = Request::post(Uri::default());
        request = request.version(Version::HTTP_2).header(CONTENT_TYPE, APPLICATION_GRPC);
        request = request
            .header(TE, HeaderValue::from_static("trailers"))
            .header(GRPC_TIMEOUT, format!("{}m", self.patience.as_millis().min(99_999_999)))
            .header(CLUSTER_ID, &self.cluster_id);
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, token);
        }
        let uri = Uri::builder()
            .scheme(Scheme::HTTPS)
            .authority(self.authority.clone())
            .path_and_query(PathAndQuery::from_static(PATH))
            .build();
        request
            .uri(uri.unwrap_or_default())
            .body(Full::new(frame(message)))
            .map_err(|error| CaClientError::Answer(error.to_string()))
    }
}

impl Sign for IstioCa {
    async fn sign(&self, question: Question<'_>) -> Result<Vec<String>, CaClientError> {
        let trust = self.trust(&question.current.bundle).await?;
        let identity = question.current.identity.as_ref();
        let token = match (self.token().await, identity) {
            (Ok(token), _) => Some(token),
            // A certificate is proof enough.
            (Err(error), Some(_)) => {
                tracing::debug!("{error}; the certificate is shown alone");
                None
            }
            (Err(error), None) => return Err(error),
        };
        let seconds = i64::try_from(question.validity.as_secs()).unwrap_or(i64::MAX);
        let message = CertificateRequest::new(question.csr.to_owned(), seconds).encode();
        let answer = self.ask(&trust, identity, token.as_ref(), &message).await;
        let answer = match answer {
            Err(error) if error.is_of_connection() && identity.is_some() && token.is_some() => {
                tracing::debug!("{error}; the token is shown alone");
                self.ask(&trust, None, token.as_ref(), &message).await
            }
            answer => answer,
        };
        if let Ok(answer) = &answer {
            self.remember(answer);
        }
        answer
    }
}

impl fmt::Debug for IstioCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IstioCa").field("address", &self.address()).finish_non_exhaustive()
    }
}

async fn read_roots(path: &Path) -> Result<TrustBundle, String> {
    let pem = tokio::fs::read(path).await.map_err(|error| error.to_string())?;
    TrustBundle::from_pem(&pem).map_err(|error| error.to_string())
}

async fn read_token(path: &Path) -> io::Result<String> {
    use tokio::io::AsyncReadExt as _;
    let mut text = String::new();
    tokio::fs::File::open(path).await?.take(MAX_TOKEN + 1).read_to_string(&mut text).await?;
    if text.len() as u64 > MAX_TOKEN {
        return Err(io::Error::other(format!("it is longer than {MAX_TOKEN} bytes")));
    }
    Ok(text)
}

/// An error of hyper with its cause, which it does not say itself.
fn in_full(error: &hyper::Error) -> String {
    use std::error::Error as _;
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(address: &str) -> Result<String, InvalidAddress> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        IstioCa::new(address, "token".into(), "root".into(), provider).map(|ca| ca.address())
    }

    #[test]
    fn pa_05_addresses_of_authorities() {
        for (address, means) in [
            ("https://istiod.istio-system.svc:15012", "istiod.istio-system.svc:15012"),
            ("https://istiod.istio-system.svc/", "istiod.istio-system.svc:15012"),
            ("istiod.istio-system.svc:15010", "istiod.istio-system.svc:15010"),
            ("HTTPS://127.0.0.1:1", "127.0.0.1:1"),
            ("https://[::1]:1", "[::1]:1"),
            ("ca", "ca:15012"),
        ] {
            assert_eq!(new(address).as_deref(), Ok(means), "{address}");
        }
        assert_eq!(new("http://ca:1"), Err(InvalidAddress::Plaintext));
        for address in
            ["", "https://", "unix:///ca", "https://u:p@ca:1", "https://ca:0", "https://ca:70000", "ca/x"]
        {
            assert_eq!(new(address), Err(InvalidAddress::Form), "{address}");
        }
    }
}
