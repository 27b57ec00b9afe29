//! Whether a peer is who it has to be.
//!
//! One [`PeerVerifier`] serves both sides. It builds the path with webpki (signatures, validity, the purpose of the
//! certificate, revocation), and then judges the certificate by its [`PeerRule`]. Whom it believes it reads from the
//! [`Materials`] of the process at each handshake, so that a rotated bundle counts at once.
//!
//! **SPIFFE** ([`PeerRule::Svid`]): exactly one URI name, in the form of SPIFFE-ID, with a path, of a trust domain that is
//! ours; not an authority, and with a key that signs no certificates (X509-SVID §5.2). Anything else is refused, however
//! well it is signed. **Names** ([`PeerRule::Named`]) is what a client asks of a server of the outside world, and
//! **chain** ([`PeerRule::Chain`]) what a gateway asks of its clients.
//!
//! What is refused is refused with a [`Refusal`] that says why, for the log; the peer learns only the alert.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_core::identity::SpiffeId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage, RevocationOptionsBuilder, UnknownStatusPolicy};

use crate::certificate::{Leaf, printable, sha256};
use crate::source::Materials;
#[cfg(any(feature = "istio-ca", feature = "spiffe"))]
use crate::source::{Identity, Material};

/// What a peer's certificate has to be, beyond a chain that holds.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PeerRule {
    /// The identity of a workload of one of these trust domains. With names, one of them.
    Svid {
        /// The names of the trust domains, where no name is no trust; `None` for those of the [`Material`].
        ///
        /// [`Material`]: crate::source::Material
        trust_domains: Option<Vec<String>>,
        /// The identities that are expected; empty for any.
        any_of: Vec<String>,
    },
    /// A server of this name, or with one of these alternative names when there are any.
    Named {
        /// The name of the server: a DNS name, for which a wildcard of the certificate may stand, or an address.
        host: String,
        /// The alternative names that are expected in its place, as written; empty for the host.
        any_of: Vec<String>,
    },
    /// A chain that holds. With names, one of them is among its alternative names; with hashes, one of them is that of
    /// the certificate or of its public key.
    Chain {
        /// The alternative names that are expected, as written; empty for any.
        any_of: Vec<String>,
        /// The SHA-256 of public keys and certificates that are expected; empty for any.
        pins: Vec<Pin>,
    },
}

/// A certificate that is expected, by a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pin {
    /// The SHA-256 of the public key with its algorithm, in DER.
    Spki([u8; 32]),
    /// The SHA-256 of the certificate in DER.
    Certificate([u8; 32]),
}

/// Why a certificate was refused whose chain may well have held.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It cannot be read.
    #[error("the certificate cannot be read")]
    Malformed,
    /// It is that of an authority, or its key signs certificates.
    #[error("the certificate is one that signs others")]
    Signs,
    /// It has no URI name, or several.
    #[error("the certificate has {0} URI names, not one")]
    UriNames(usize),
    /// Its URI name is no SPIFFE ID.
    #[error("{name:?} is no SPIFFE ID: {reason}")]
    NotSpiffe {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: mesh_core::identity::InvalidSpiffeId,
    },
    /// Its SPIFFE ID has no path: it is that of an authority.
    #[error("{0} names a trust domain and no workload")]
    NoPath(SpiffeId),
    /// Its trust domain is not one of ours.
    #[error("{0} is not of a trust domain that is trusted")]
    TrustDomain(SpiffeId),
    /// It is somebody else than was expected.
    #[error("the certificate is of {found}, expected was {expected}")]
    NotExpected {
        /// The names that it has.
        found: String,
        /// The names that were expected.
        expected: String,
    },
    /// Neither it nor its key is one that was expected.
    #[error("neither the certificate nor its key is one that is expected")]
    NotPinned,
    /// It has more certificates than a path may have.
    #[error("the peer sent {0} certificates")]
    TooManyCertificates(usize),
    /// Its chain does not hold.
    #[error("{0}")]
    Chain(webpki::Error),
}

/// The most certificates that a peer may send.
const MAX_CHAIN: usize = 8;

/// Judges certificates of peers, as client and as server.
#[derive(Clone)]
pub struct PeerVerifier {
    materials: Materials,
    provider: Arc<CryptoProvider>,
    rule: PeerRule,
    optional: bool,
}

impl PeerVerifier {
    /// Believes whom `materials` believes, and asks for what `rule` says.
    #[must_use]
    pub fn new(materials: Materials, provider: Arc<CryptoProvider>, rule: PeerRule) -> Self {
        Self { materials, provider, rule, optional: false }
    }

    /// As a server, does without the certificate of a client that has none. One that is shown is judged all the same.
    #[must_use]
    pub fn optional(mut self) -> Self {
        self.optional = true;
        self
    }

    /// Whether a client whose certificates, its own first, were taken once would be taken now. That they have ended since
    /// does not count: they are judged as of `now` or the last moment of the first of them, whichever is earlier.
    ///
    /// # Errors
    /// When they would not.
    pub fn judge_client_again<C: AsRef<[u8]>>(&self, chain: &[C], now: SystemTime) -> Result<(), Refusal> {
        self.judge_again(chain, now, KeyUsage::client_auth())
    }

    /// [`judge_client_again`](Self::judge_client_again), of a server.
    ///
    /// # Errors
    /// When they would not.
    pub fn judge_server_again<C: AsRef<[u8]>>(&self, chain: &[C], now: SystemTime) -> Result<(), Refusal> {
        self.judge_again(chain, now, KeyUsage::server_auth())
    }

    fn judge_again<C: AsRef<[u8]>>(
        &self,
        chain: &[C],
        now: SystemTime,
        usage: KeyUsage,
    ) -> Result<(), Refusal> {
        let chain: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_ref())).collect();
        let (own, intermediates) = chain.split_first().ok_or(Refusal::Malformed)?;
        let leaf = Leaf::read(own).map_err(|_| Refusal::Malformed)?;
        let at = now.min(leaf.not_after).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.judge(own, intermediates, UnixTime::since_unix_epoch(at), usage)
    }

    /// Judges a chain as of `now`.
    pub(crate) fn judge(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), Refusal> {
        if intermediates.len() >= MAX_CHAIN {
            return Err(Refusal::TooManyCertificates(intermediates.len() + 1));
        }
        let end_entity = EndEntityCert::try_from(certificate).map_err(Refusal::Chain)?;
        let material = self.materials.load();
        let crls = material.bundle.crls();
        let revocation = RevocationOptionsBuilder::new(&crls)
            .ok()
            .map(|options| options.with_status_policy(UnknownStatusPolicy::Allow).build());
        end_entity
            .verify_for_usage(
                self.provider.signature_verification_algorithms.all,
                material.bundle.anchors(),
                intermediates,
                now,
                usage,
                revocation,
                None,
            )
            .map_err(Refusal::Chain)?;
        let leaf = Leaf::read(certificate).map_err(|_| Refusal::Malformed)?;
        match &self.rule {
            PeerRule::Svid { trust_domains, any_of } => {
                svid(&leaf, trust_domains.as_deref().unwrap_or(&self.materials.trust_domains()), any_of)
            }
            PeerRule::Named { host, any_of } if any_of.is_empty() => {
                let name = ServerName::try_from(host.as_str()).ok();
                let holds =
                    name.is_some_and(|name| end_entity.verify_is_valid_for_subject_name(&name).is_ok());
                if holds {
                    return Ok(());
                }
                Err(Refusal::NotExpected { found: names(&leaf), expected: host.clone() })
            }
            PeerRule::Named { any_of, .. } => expected(&leaf, any_of),
            PeerRule::Chain { any_of, pins } => {
                if !any_of.is_empty() {
                    expected(&leaf, any_of)?;
                }
                if pins.is_empty() || self.is_pinned(certificate, &leaf, pins) {
                    Ok(())
                } else {
                    Err(Refusal::NotPinned)
                }
            }
        }
    }

    fn is_pinned(&self, certificate: &CertificateDer<'_>, leaf: &Leaf, pins: &[Pin]) -> bool {
        pins.iter().any(|pin| match pin {
            Pin::Spki(hash) => sha256(&leaf.spki, &self.provider).as_ref() == Some(hash),
            Pin::Certificate(hash) => sha256(certificate, &self.provider).as_ref() == Some(hash),
        })
    }
}

/// Whether peers that believe the same as we do would believe us, as server and as client.
#[cfg(any(feature = "istio-ca", feature = "spiffe"))]
pub(crate) fn believable(
    material: &Material,
    id: &SpiffeId,
    now: SystemTime,
    provider: &Arc<CryptoProvider>,
) -> Result<(), Refusal> {
    let rule = PeerRule::Svid {
        trust_domains: Some(vec![id.trust_domain().to_owned()]),
        any_of: vec![id.as_str().to_owned()],
    };
    let verifier = PeerVerifier::new(Materials::new(material.clone()), Arc::clone(provider), rule);
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let chain = material.identity.as_ref().map(Identity::chain).unwrap_or_default();
    let [own, intermediates @ ..] = chain else { return Err(Refusal::Malformed) };
    for usage in [KeyUsage::server_auth(), KeyUsage::client_auth()] {
        verifier.judge(own, intermediates, UnixTime::since_unix_epoch(now), usage)?;
    }
    Ok(())
}

/// The rules of X509-SVID §5.2, then ours.
fn svid(leaf: &Leaf, trust_domains: &[String], any_of: &[String]) -> Result<(), Refusal> {
    if leaf.is_ca || leaf.signs {
        return Err(Refusal::Signs);
    }
    let [name] = leaf.uri_sans.as_slice() else { return Err(Refusal::UriNames(leaf.uri_sans.len())) };
    let id: SpiffeId = name.parse().map_err(|reason| Refusal::NotSpiffe { name: printable(name), reason })?;
    if id.path().is_empty() {
        return Err(Refusal::NoPath(id));
    }
    if !trust_domains.iter().any(|domain| domain == id.trust_domain()) {
        return Err(Refusal::TrustDomain(id));
    }
    if any_of.is_empty() || any_of.iter().any(|expected| expected == id.as_str()) {
        return Ok(());
    }
    Err(Refusal::NotExpected { found: id.to_string(), expected: any_of.join(", ") })
}

fn expected(leaf: &Leaf, any_of: &[String]) -> Result<(), Refusal> {
    if any_of.iter().any(|name| leaf.has_name(name)) {
        return Ok(());
    }
    Err(Refusal::NotExpected { found: names(leaf), expected: any_of.join(", ") })
}

/// The most characters of a peer's names that a log has.
const MAX_NAMES: usize = 1024;

fn names(leaf: &Leaf) -> String {
    let addresses = leaf.ip_sans.iter().map(ToString::to_string);
    let all: Vec<_> = leaf
        .uri_sans
        .iter()
        .chain(&leaf.dns_sans)
        .chain(&leaf.email_sans)
        .map(|name| printable(name))
        .chain(addresses)
        .collect();
    if all.is_empty() { "nobody".to_owned() } else { all.join(", ").chars().take(MAX_NAMES).collect() }
}

impl From<Refusal> for rustls::Error {
    fn from(refusal: Refusal) -> Self {
        use webpki::Error as Chain;
        // So that the peer gets the alert that fits; the log gets the words.
        Self::InvalidCertificate(match &refusal {
            Refusal::Chain(Chain::CertExpired { .. }) => CertificateError::Expired,
            Refusal::Chain(Chain::CertNotValidYet { .. }) => CertificateError::NotValidYet,
            Refusal::Chain(Chain::CertRevoked) => CertificateError::Revoked,
            Refusal::Chain(Chain::UnknownIssuer) => CertificateError::UnknownIssuer,
            Refusal::Chain(Chain::InvalidSignatureForPublicKey) => CertificateError::BadSignature,
            Refusal::Chain(
                Chain::RequiredEkuNotFoundContext(_) | Chain::EmptyEkuExtension | Chain::CaUsedAsEndEntity,
            ) => CertificateError::InvalidPurpose,
            Refusal::Chain(Chain::BadDer | Chain::BadDerTime) | Refusal::Malformed => {
                CertificateError::BadEncoding
            }
            _ => CertificateError::Other(OtherError(Arc::new(refusal))),
        })
    }
}

/// The reason of a failed handshake in words for a log, where it is that of a certificate.
pub(crate) fn in_words(error: io::Error) -> io::Error {
    let Some(rustls::Error::InvalidCertificate(reason)) =
        error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>())
    else {
        return error;
    };
    let words = match reason {
        CertificateError::Other(OtherError(refusal)) => refusal.to_string(),
        CertificateError::Expired => "the certificate has expired".to_owned(),
        CertificateError::NotValidYet => "the certificate is not valid yet".to_owned(),
        CertificateError::Revoked => "the certificate was revoked".to_owned(),
        CertificateError::UnknownIssuer => {
            "the certificate is not of an authority that is trusted".to_owned()
        }
        CertificateError::BadSignature => "a signature does not hold".to_owned(),
        CertificateError::InvalidPurpose => "the certificate is not for this side of a connection".to_owned(),
        CertificateError::BadEncoding => "the certificate cannot be read".to_owned(),
        other => other.to_string(),
    };
    io::Error::new(error.kind(), words)
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, now, KeyUsage::server_auth())?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn client_auth_mandatory(&self) -> bool {
        !self.optional
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A client of a mesh has one certificate to show, and a bundle changes; no hint is as good.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, now, KeyUsage::client_auth())?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for PeerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerVerifier")
            .field("rule", &self.rule)
            .field("optional", &self.optional)
            .finish_non_exhaustive()
    }
}
