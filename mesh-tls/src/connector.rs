//! The client's side: shakes hands with servers, as a cluster or a program says.
//!
//! A [`Connector`] is the [`Originate`] of pools, and as well for itself in a hyper client. What a handshake needs is put
//! together for each connection, from the credentials of the moment: that costs microseconds beside the handshake's half
//! millisecond, and there is nothing that a rotation would have to rebuild. Sessions are never resumed.
//!
//! The server of a workload is known by its identity and not by a name (ISTIO_MUTUAL); any other by the names that
//! are expected, or by its host.

use std::fmt;
use std::io;
use std::sync::Arc;

use mesh_core::{ClientTls, Credential, Originate, Originated, Originating, Spoken};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::alpn;
use crate::source::{Identity, Materials};
use crate::standing::{Acquaintances, Begun};
use crate::verifier::{PeerRule, PeerVerifier, in_words};

/// Finds the materials of credentials that are not the mesh's own.
pub trait Credentials: fmt::Debug + Send + Sync {
    /// The materials of a credential; `None` when there is none of this name, and no connection is made.
    fn find(&self, credential: &Credential) -> Option<Materials>;
}

/// Shakes hands as a client. Cloning shares it.
#[derive(Clone)]
pub struct Connector {
    mesh: Materials,
    others: Option<Arc<dyn Credentials>>,
    provider: Arc<CryptoProvider>,
    met: Arc<Acquaintances>,
}

/// What a handshake needs.
struct Prepared {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    begun: Begun,
    verifier: Option<PeerVerifier>,
}

impl Connector {
    /// Shows the identity that `mesh` has, and believes whom it believes. Credentials that are not the mesh's are not
    /// known.
    #[must_use]
    pub fn new(mesh: Materials, provider: Arc<CryptoProvider>) -> Self {
        Self { mesh, others: None, provider, met: Arc::default() }
    }

    /// Finds other credentials here.
    #[must_use]
    pub fn credentials(mut self, others: Arc<dyn Credentials>) -> Self {
        self.others = Some(others);
        self
    }

    /// Shakes hands over `io`. The time that it may take is the caller's to bound.
    ///
    /// # Errors
    /// When there is no such credential, the server is not who it has to be, or it does not agree to what is spoken.
    pub async fn connect<IO>(&self, io: IO, tls: &ClientTls, spoken: Spoken) -> io::Result<TlsStream<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let Prepared { config, name, .. } = self.prepare(tls, spoken)?;
        let stream = TlsConnector::from(config).connect(name, io).await.map_err(in_words)?;
        agreed(stream.get_ref().1.alpn_protocol(), spoken)?;
        Ok(stream)
    }

    fn prepare(&self, tls: &ClientTls, spoken: Spoken) -> io::Result<Prepared> {
        let is_mesh = tls.credential == Credential::Mesh;
        let materials = match (&tls.credential, &self.others) {
            (Credential::Mesh, _) => Some(self.mesh.clone()),
            (credential, Some(others)) => others.find(credential),
            (_, None) => None,
        };
        let materials = materials.ok_or_else(|| missing("there are no such credentials"))?;
        let begun = Begun::with(&materials);
        if is_mesh && materials.load().identity.is_none() {
            return Err(missing("mutual TLS is demanded, and this workload has no identity"));
        }
        let rule = if is_mesh {
            PeerRule::Svid { trust_domains: None, any_of: tls.subject_alt_names.clone() }
        } else {
            PeerRule::Named { host: tls.host.clone(), any_of: tls.subject_alt_names.clone() }
        };
        let verifier = (!tls.insecure_skip_verify)
            .then(|| PeerVerifier::new(materials.clone(), Arc::clone(&self.provider), rule));
        let judge: Arc<dyn ServerCertVerifier> = match &verifier {
            Some(verifier) => Arc::new(verifier.clone()),
            None => Arc::new(Anybody(Arc::clone(&self.provider))),
        };
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(judge)
            .with_client_cert_resolver(Arc::new(Ours(materials)));
        config.resumption = Resumption::disabled();
        config.enable_sni = tls.sni.is_some();
        config.alpn_protocols = offers(is_mesh, spoken);
        Ok(Prepared { config: Arc::new(config), name: server_name(tls)?, begun, verifier })
    }
}

/// What we are ready to speak. Beside it, `istio` says that this is mutual TLS of the mesh.
fn offers(is_mesh: bool, spoken: Spoken) -> Vec<Vec<u8>> {
    let http: &[&[u8]] = match spoken {
        Spoken::Http1 => &[alpn::HTTP_11],
        Spoken::Http2 => &[alpn::H2],
        Spoken::Bytes => &[],
    };
    let istio = is_mesh.then_some(alpn::ISTIO);
    istio.into_iter().chain(http.iter().copied()).map(<[u8]>::to_vec).collect()
}

/// A server that agreed to another HTTP would read ours as garbage.
fn agreed(name: Option<&[u8]>, spoken: Spoken) -> io::Result<()> {
    use mesh_core::server::Protocol;
    match (name.and_then(alpn::http), spoken) {
        (Some(Protocol::Http2), Spoken::Http1) | (Some(Protocol::Http1), Spoken::Http2) => {
            Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the server agreed to another protocol than is spoken",
            ))
        }
        _ => Ok(()),
    }
}

/// What rustls asks for as SNI. It would verify the same name, but that is our verifier's to do.
fn server_name(tls: &ClientTls) -> io::Result<ServerName<'static>> {
    let name = tls.sni.as_deref().unwrap_or(&tls.host);
    ServerName::try_from(name.to_owned())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is no server name")))
}

fn missing(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, what)
}

impl Originate for Connector {
    fn originate(&self, stream: TcpStream, tls: &ClientTls, spoken: Spoken) -> Originating {
        let prepared = self.prepare(tls, spoken);
        let (met, tls) = (Arc::clone(&self.met), tls.clone());
        Box::pin(async move {
            let Prepared { config, name, begun, verifier } = prepared?;
            let stream = TlsConnector::from(config).connect(name, stream).await.map_err(in_words)?;
            let connection = stream.get_ref().1;
            agreed(connection.alpn_protocol(), spoken)?;
            let shown = connection.peer_certificates().unwrap_or_default();
            let chain = shown.iter().map(|certificate| certificate.clone().into_owned()).collect();
            let standing = met.meet(begun, &tls, chain, verifier);
            Ok(Originated { io: Box::new(stream), standing: Some(standing) })
        })
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("mesh", &self.mesh).finish_non_exhaustive()
    }
}

/// Shows the identity of the moment, where there is one.
pub(crate) struct Ours(pub(crate) Materials);

impl ResolvesClientCert for Ours {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.load().identity.as_ref().map(Identity::key)
    }

    fn has_certs(&self) -> bool {
        self.0.load().identity.is_some()
    }
}

impl fmt::Debug for Ours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ours").finish_non_exhaustive()
    }
}

/// Takes any certificate, for a cluster that says `insecureSkipVerify`. That its holder has the key is still proved.
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for Anybody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Anybody").finish_non_exhaustive()
    }
}
