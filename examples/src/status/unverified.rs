//! TLS to an application whose certificate nobody looks at, for HTTPS probes and for nothing else.
//!
//! The kubelet does not verify the certificate of what it probes, and neither does Istio's agent: a probe asks whether
//! something answers at the pod's own address, and its answer decides nothing but health. What it sends are the headers of
//! the probe and of whoever asks for it; to a place that a redirect names, only the former. So this type is private to the
//! status port. Requests of the mesh are secured by [`mesh_tls`], where a DestinationRule has to ask for
//! `insecureSkipVerify`.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Shakes hands with whoever answers. Offers HTTP/2 and HTTP/1.1, as Go's client does.
#[derive(Clone)]
pub(super) struct Unverified(TlsConnector);

impl Unverified {
    pub(super) fn new(provider: Arc<CryptoProvider>) -> Result<Self, String> {
        let anybody = Arc::new(Anybody(Arc::clone(&provider)));
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(anybody)
            .with_no_client_auth();
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }

    /// The stream, and whether HTTP/2 was agreed to. An address is no name, so none is asked for.
    pub(super) async fn connect(
        &self,
        ip: IpAddr,
        stream: TcpStream,
    ) -> Result<(TlsStream<TcpStream>, bool), String> {
        let stream = self.0.connect(ServerName::IpAddress(ip.into()), stream).await;
        let stream = stream.map_err(|error| format!("TLS: {error}"))?;
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        Ok((stream, http2))
    }
}

impl fmt::Debug for Unverified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Unverified").finish_non_exhaustive()
    }
}

/// Takes any certificate, and asks for no proof that its holder has the key: a certificate that nobody looks at proves
/// nothing by it, and some that applications make for themselves (of version 1, say) our verifier could not even read.
#[derive(Debug)]
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
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
