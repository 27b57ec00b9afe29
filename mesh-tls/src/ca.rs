//! A certificate authority: signs the identities of workloads, in the process that asks or for others.
//!
//! The authority decides who a certificate is for. Of a signing request only the public key is taken, with the proof
//! that its holder has the private one; whatever else it asks for must agree with the decision or is refused. Who may
//! have which identity is the caller's decision, made before it comes here.
//!
//! An authority's own certificate ends, too: [`Authorities`] replaces it by another without anybody being refused. Who asks
//! for the first time has no certificate to prove itself with: [`BootstrapTokens`] says whose a secret is.
//!
//! Everything is a pure function of the authority, the request and `now`; keys and serial numbers come from the
//! operating system.

mod authorities;
mod tokens;

use std::fmt;
use std::time::{Duration, SystemTime};

use mesh_core::identity::{InvalidSpiffeId, SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertificateSigningRequestParams,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    PublicKeyData, RevocationReason, RevokedCertParams, SanType, SerialNumber,
};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer,
    ServerName,
};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer as _;

pub use self::authorities::{Authorities, CannotRotate, Rotation};
pub use self::tokens::{BootstrapToken, BootstrapTokens, InvalidTokens, TokenRefusal};

use crate::certificate::{Leaf, printable};
use crate::source::{Identity, InvalidIdentity};

/// How far clocks may differ: certificates begin this much before they are signed.
pub const CLOCK_SKEW: Duration = Duration::from_secs(120);

/// The last moment that a certificate can say: years have four digits.
fn last() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_799)
}

/// Signs for one trust domain.
#[derive(Debug)]
pub struct Authority {
    trust_domain: TrustDomain,
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    root_pem: String,
    not_after: SystemTime,
}

/// A certificate that was signed.
#[derive(Debug)]
#[non_exhaustive]
pub struct Signed {
    /// The chain, the workload's own certificate first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The same in PEM.
    pub chain_pem: String,
    /// When the workload's own certificate ends.
    pub not_after: SystemTime,
}

/// A certificate that was issued together with its key.
#[non_exhaustive]
pub struct Issued {
    /// The certificate.
    pub certificate: Signed,
    key: KeyPair,
}

/// Why an authority cannot be made, or does not sign.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaError {
    /// The certificate of the authority cannot be used as one.
    #[error("the authority's certificate and key cannot be used: {0}")]
    Authority(String),
    /// The identity is of another trust domain.
    #[error("{id} is not of the trust domain {trust_domain}")]
    TrustDomain {
        /// Who was to be signed for.
        id: SpiffeId,
        /// Whom the authority signs for.
        trust_domain: TrustDomain,
    },
    /// The identity has no path: it is the authority's own.
    #[error("{0} names no workload")]
    NoPath(SpiffeId),
    /// The request cannot be read, or is not signed by the key that it has.
    #[error("the signing request is not sound: {0}")]
    Request(rcgen::Error),
    /// The request asks for somebody else.
    #[error("the signing request asks for {asked}, and {id} may be had")]
    SomebodyElse {
        /// What the request names: escaped and cut, as a stranger wrote it.
        asked: String,
        /// Who the caller may be.
        id: SpiffeId,
    },
    /// The key of the request is of a kind that is not signed, or cannot be used.
    #[error("the key of the signing request cannot be used")]
    Key,
    /// A server's name is neither a DNS name nor an address.
    #[error("{0:?} is no name of a server")]
    ServerName(String),
    /// The authority's own certificate is over, or not begun.
    #[error("the authority's own certificate is not valid now")]
    NotValid,
    /// The clock and the life that was asked for make no time that a certificate can say.
    #[error("no certificate can live from {now:?} for {lifetime:?}")]
    Lifetime {
        /// What the clock says.
        now: SystemTime,
        /// How long it was to live.
        lifetime: Duration,
    },
    /// Signing failed.
    #[error("cannot sign: {0}")]
    Sign(rcgen::Error),
}

impl From<InvalidSpiffeId> for CaError {
    fn from(error: InvalidSpiffeId) -> Self {
        Self::Authority(error.to_string())
    }
}

impl Authority {
    /// A new authority for `trust_domain`, with a root that lives for `lifetime`.
    ///
    /// # Errors
    /// When the system gives no key, or the root would end after the year 9999.
    pub fn new(trust_domain: TrustDomain, now: SystemTime, lifetime: Duration) -> Result<Self, CaError> {
        let key = KeyPair::generate().map_err(CaError::Sign)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
        // A name of its own: who knows another root is told so, and not that a signature is bad.
        params
            .distinguished_name
            .push(DnType::CommonName, format!("mesh root {:08x}", rand::random::<u32>()));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
        params.not_before = begin(now, lifetime)?.into();
        params.not_after = end(now, lifetime)?.into();
        params.serial_number = Some(serial());
        params.key_identifier_method = KeyIdMethod::Sha256;
        let root = params.self_signed(&key).map_err(CaError::Sign)?;
        Self::of(trust_domain, root.der().clone(), root.pem(), key)
    }

    /// The authority whose certificate and key these are, in PEM; intermediate ones are not supported.
    ///
    /// # Errors
    /// When they are no PEM, no authority's, not each other's, or say no trust domain that is this one.
    pub fn from_pem(trust_domain: TrustDomain, certificate: &str, key: &str) -> Result<Self, CaError> {
        let unusable = |error: &dyn fmt::Display| CaError::Authority(error.to_string());
        let root = CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(|e| unusable(&e))?;
        let key = KeyPair::from_pem(key).map_err(|e| unusable(&e))?;
        let leaf = Leaf::read(&root).map_err(|e| unusable(&e))?;
        if !leaf.is_ca || !leaf.signs {
            return Err(CaError::Authority("the certificate is not that of an authority".to_owned()));
        }
        if leaf.spki != key.subject_public_key_info() {
            return Err(CaError::Authority("the key is not that of the certificate".to_owned()));
        }
        Self::of(trust_domain, root, certificate.to_owned(), key)
    }

    fn of(
        trust_domain: TrustDomain,
        root: CertificateDer<'static>,
        root_pem: String,
        key: KeyPair,
    ) -> Result<Self, CaError> {
        let not_after = Leaf::read(&root).map_err(|error| CaError::Authority(error.to_string()))?.not_after;
        let issuer = Issuer::from_ca_cert_der(&root, key).map_err(|e| CaError::Authority(e.to_string()))?;
        Ok(Self { trust_domain, issuer, root, root_pem, not_after })
    }

    /// Whom it signs for.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Its own certificate, which a bundle of those who believe it has.
    #[must_use]
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// Its own certificate in PEM.
    #[must_use]
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// Its key in PEM. A secret.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// When its own certificate ends.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Signs the key of a request for `id`: the chain, the workload's own certificate first. It does not outlive the
    /// authority's own.
    ///
    /// # Errors
    /// When the request is not sound or asks for somebody else, `id` is of another trust domain or names no workload, or
    /// the authority's own certificate is over.
    pub fn sign(
        &self,
        request: &CertificateSigningRequestDer<'_>,
        id: &SpiffeId,
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<Signed, CaError> {
        let asked_for = public_key(request).ok_or(CaError::Key)?;
        let request = CertificateSigningRequestParams::from_der(request).map_err(CaError::Request)?;
        for name in &request.params.subject_alt_names {
            let same = matches!(name, SanType::URI(asked) if asked.as_str() == id.as_str());
            if !same {
                let asked = match name {
                    SanType::URI(name) | SanType::DnsName(name) => printable(name.as_str()),
                    other => printable(&format!("{other:?}")),
                };
                return Err(CaError::SomebodyElse { asked, id: id.clone() });
            }
        }
        let params = self.params(id, now, lifetime)?;
        let signed = params.signed_by(&request.public_key, &self.issuer).map_err(CaError::Sign)?;
        // The kind of the key is taken from how the request is signed, and the key itself may be of another kind.
        let leaf = Leaf::read(signed.der()).map_err(|_| CaError::Key)?;
        if leaf.spki != asked_for {
            return Err(CaError::Key);
        }
        Signed::of(&signed)
    }

    /// Makes a key for `id` and signs it.
    ///
    /// # Errors
    /// As [`Authority::sign`].
    pub fn issue(&self, id: &SpiffeId, now: SystemTime, lifetime: Duration) -> Result<Issued, CaError> {
        let key = KeyPair::generate().map_err(CaError::Sign)?;
        let params = self.params(id, now, lifetime)?;
        let signed = params.signed_by(&key, &self.issuer).map_err(CaError::Sign)?;
        Ok(Issued { certificate: Signed::of(&signed)?, key })
    }

    /// Makes a key for a server that is known by names and addresses, as the authority's own is, and signs it. It has no
    /// SPIFFE ID: in the mesh it is nobody.
    ///
    /// # Errors
    /// When the authority's own certificate is over, or signing fails.
    pub fn issue_server(
        &self,
        names: &[ServerName<'_>],
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<Issued, CaError> {
        let name = |name: &ServerName<'_>| match name {
            ServerName::DnsName(name) => {
                Ok(SanType::DnsName(name.as_ref().try_into().map_err(CaError::Sign)?))
            }
            ServerName::IpAddress(address) => Ok(SanType::IpAddress((*address).into())),
            other => Err(CaError::ServerName(format!("{other:?}"))),
        };
        let mut params = self.leaf(now, lifetime)?;
        params.subject_alt_names = names.iter().map(name).collect::<Result<_, _>>()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().map_err(CaError::Sign)?;
        let signed = params.signed_by(&key, &self.issuer).map_err(CaError::Sign)?;
        Ok(Issued { certificate: Signed::of(&signed)?, key })
    }

    /// The list of revoked certificates, by serial number, until `lifetime` from now.
    ///
    /// # Errors
    /// When signing fails, or the list would end after the year 9999.
    pub fn revoke(
        &self,
        serials: &[Vec<u8>],
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<CertificateRevocationListDer<'static>, CaError> {
        let revoked = |serial: &Vec<u8>| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: now.into(),
            reason_code: Some(RevocationReason::KeyCompromise),
            invalidity_date: None,
        };
        let number = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let list = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: end(now, lifetime)?.into(),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).map(Into::into).map_err(CaError::Sign)
    }

    /// A leaf of X509-SVID: one URI name, a key that signs handshakes and nothing else, both purposes.
    fn params(
        &self,
        id: &SpiffeId,
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<CertificateParams, CaError> {
        if id.trust_domain() != self.trust_domain.as_str() {
            return Err(CaError::TrustDomain { id: id.clone(), trust_domain: self.trust_domain.clone() });
        }
        if id.path().is_empty() {
            return Err(CaError::NoPath(id.clone()));
        }
        let mut params = self.leaf(now, lifetime)?;
        params.subject_alt_names = vec![uri(id.as_str())?];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params)
    }

    /// What all leaves have in common.
    fn leaf(&self, now: SystemTime, lifetime: Duration) -> Result<CertificateParams, CaError> {
        if now >= self.not_after {
            return Err(CaError::NotValid);
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, self.trust_domain.as_str());
        params.is_ca = IsCa::ExplicitNoCa;
        params.not_before = begin(now, lifetime)?.into();
        params.not_after = end(now, lifetime).map_or(self.not_after, |end| end.min(self.not_after)).into();
        params.serial_number = Some(serial());
        params.use_authority_key_identifier_extension = true;
        params.key_identifier_method = KeyIdMethod::Sha256;
        Ok(params)
    }
}

impl Signed {
    fn of(certificate: &rcgen::Certificate) -> Result<Self, CaError> {
        let leaf = Leaf::read(certificate.der()).map_err(|_| CaError::Key)?;
        Ok(Self {
            chain: vec![certificate.der().clone()],
            chain_pem: certificate.pem(),
            not_after: leaf.not_after,
        })
    }
}

impl Issued {
    /// The key in PEM. A secret.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// As what peers are shown.
    ///
    /// # Errors
    /// When the provider cannot use such a key.
    pub fn identity(self, provider: &CryptoProvider) -> Result<Identity, InvalidIdentity> {
        let key = PrivatePkcs8KeyDer::from(self.key.serialize_der());
        Identity::new(self.certificate.chain, key.into(), provider)
    }
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// When a certificate begins that is signed now.
fn begin(now: SystemTime, lifetime: Duration) -> Result<SystemTime, CaError> {
    // X.509 has years from 1950 on; nothing is signed for the time before the epoch.
    let begin = now.checked_sub(CLOCK_SKEW).filter(|begin| (SystemTime::UNIX_EPOCH..last()).contains(begin));
    begin.ok_or(CaError::Lifetime { now, lifetime })
}

/// When it ends.
fn end(now: SystemTime, lifetime: Duration) -> Result<SystemTime, CaError> {
    let end = now.checked_add(lifetime).filter(|end| *end <= last());
    end.ok_or(CaError::Lifetime { now, lifetime })
}

fn uri(text: &str) -> Result<SanType, CaError> {
    Ok(SanType::URI(text.try_into().map_err(CaError::Sign)?))
}

/// The public key of a request with its algorithm, in DER.
fn public_key(request: &CertificateSigningRequestDer<'_>) -> Option<Vec<u8>> {
    let (rest, request) = X509CertificationRequest::from_der(request).ok()?;
    rest.is_empty().then(|| request.certification_request_info.subject_pki.raw.to_vec())
}

/// 127 random bits: positive, and of one length.
fn serial() -> SerialNumber {
    let mut bytes = rand::random::<u128>().to_be_bytes();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn authority() -> Authority {
        Authority::new("cluster.local".parse().unwrap(), SystemTime::now(), HOUR).unwrap()
    }

    #[test]
    fn bug_a_name_that_was_asked_for_wrote_lines_of_its_own_into_the_log() {
        let forged = format!("spiffe://x\n2026-01-01 INFO signed id=root\u{1b}[31m{}", "x".repeat(10_000));
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(forged.as_str().try_into().unwrap())];
        let request = params.serialize_request(&KeyPair::generate().unwrap()).unwrap();
        let id = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
        let error = authority().sign(request.der(), &id, SystemTime::now(), HOUR).unwrap_err().to_string();
        assert!(error.contains("signed id=root") && error.len() < 1000, "{error}");
        assert!(!error.contains(char::is_control), "{error:?}");
    }

    #[test]
    fn bug_a_life_without_end_was_a_panic() {
        let (now, domain) = (SystemTime::now(), "cluster.local".parse::<TrustDomain>().unwrap());
        for lifetime in [Duration::MAX, Duration::from_secs(400_000_000_000)] {
            let root = Authority::new(domain.clone(), now, lifetime);
            assert!(matches!(root, Err(CaError::Lifetime { .. })), "{root:?}");
            let authority = authority();
            assert!(matches!(authority.revoke(&[], now, lifetime), Err(CaError::Lifetime { .. })));
            // A leaf ends with its authority in any case.
            let issued = authority.issue(&"spiffe://cluster.local/ns/a/sa/b".parse().unwrap(), now, lifetime);
            assert_eq!(issued.unwrap().certificate.not_after, authority.not_after());
        }
        let before = authority().issue_server(&[], SystemTime::UNIX_EPOCH, HOUR);
        assert!(matches!(before, Err(CaError::Lifetime { .. })));
    }
}
