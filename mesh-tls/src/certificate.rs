//! What a certificate says, read once for each handshake.
//!
//! Path building and signatures are webpki's; it has no names of the kind URI, so the alternative names are read here.
//! Reading judges nothing: a [`Leaf`] is only what is written, and the [`verifier`](crate::verifier) decides.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::identity::PeerInfo;
use rustls::SupportedCipherSuite;
use rustls::crypto::CryptoProvider;
use rustls::crypto::hash::HashAlgorithm;
use rustls::pki_types::CertificateDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer as _;

/// A certificate cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the certificate cannot be read")]
pub struct Malformed;

/// What the certificate of a peer says, as written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Leaf {
    /// URI names.
    pub uri_sans: Vec<String>,
    /// DNS names.
    pub dns_sans: Vec<String>,
    /// Addresses.
    pub ip_sans: Vec<IpAddr>,
    /// E-mail addresses.
    pub email_sans: Vec<String>,
    /// Whether it is the certificate of an authority.
    pub is_ca: bool,
    /// Whether its key may sign certificates or lists of revoked ones.
    pub signs: bool,
    /// Whether its issuer has its own name, as that of a root has.
    pub is_self_issued: bool,
    /// Its subject in the form of RFC 4514; empty when it has none.
    pub subject: String,
    /// Its serial number as X.509 encodes it.
    pub serial: Vec<u8>,
    /// Its public key with its algorithm, in DER.
    pub spki: Vec<u8>,
    /// When it begins.
    pub not_before: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
}

impl Leaf {
    /// Reads a certificate.
    ///
    /// # Errors
    /// [`Malformed`] when it, one of its extensions, or one of its names cannot be read. A name that is skipped is one
    /// that nobody judges.
    pub fn read(certificate: &CertificateDer<'_>) -> Result<Self, Malformed> {
        let (rest, parsed) = X509Certificate::from_der(certificate).map_err(|_| Malformed)?;
        if !rest.is_empty() {
            return Err(Malformed);
        }
        let mut leaf = Self {
            uri_sans: Vec::new(),
            dns_sans: Vec::new(),
            ip_sans: Vec::new(),
            email_sans: Vec::new(),
            is_ca: false,
            signs: false,
            is_self_issued: parsed.subject().as_raw() == parsed.issuer().as_raw(),
            subject: parsed.subject().to_string(),
            serial: parsed.raw_serial().to_vec(),
            spki: parsed.public_key().raw.to_vec(),
            not_before: time(parsed.validity().not_before.timestamp()),
            not_after: time(parsed.validity().not_after.timestamp()),
        };
        for extension in parsed.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(names) => leaf.read_names(&names.general_names)?,
                ParsedExtension::BasicConstraints(constraints) => leaf.is_ca = constraints.ca,
                ParsedExtension::KeyUsage(usage) => leaf.signs = usage.key_cert_sign() || usage.crl_sign(),
                ParsedExtension::ParseError { .. } => return Err(Malformed),
                _ => {}
            }
        }
        Ok(leaf)
    }

    fn read_names(&mut self, names: &[GeneralName<'_>]) -> Result<(), Malformed> {
        for name in names {
            match name {
                GeneralName::URI(uri) => self.uri_sans.push((*uri).to_owned()),
                GeneralName::DNSName(name) => self.dns_sans.push((*name).to_owned()),
                GeneralName::RFC822Name(name) => self.email_sans.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => self.ip_sans.push(address(bytes).ok_or(Malformed)?),
                GeneralName::Invalid(..) => return Err(Malformed),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether one of its names is written like this: a URI, a DNS name in any case, an address, an e-mail address.
    #[must_use]
    pub fn has_name(&self, name: &str) -> bool {
        self.uri_sans.iter().any(|san| san == name)
            || self.dns_sans.iter().any(|san| san.eq_ignore_ascii_case(name))
            || self.email_sans.iter().any(|san| san == name)
            || name.parse::<IpAddr>().is_ok_and(|address| self.ip_sans.contains(&address))
    }
}

/// What a stranger wrote, for a log: bounded, and without control characters.
pub(crate) fn printable(name: &str) -> String {
    name.chars().take(256).flat_map(char::escape_debug).collect()
}

/// What is known of a peer whose chain was verified. Only its one URI name can be its identity.
///
/// # Errors
/// [`Malformed`] when there is no certificate, or it cannot be read.
pub fn peer_info(chain: &[CertificateDer<'_>], provider: &CryptoProvider) -> Result<PeerInfo, Malformed> {
    let own = chain.first().ok_or(Malformed)?;
    let leaf = Leaf::read(own)?;
    let spiffe_id = match leaf.uri_sans.as_slice() {
        [one] => one.parse().ok(),
        _ => None,
    };
    let mut info = PeerInfo::new(spiffe_id, leaf.not_after);
    info.fingerprint = sha256(own, provider).ok_or(Malformed)?;
    info.uri_sans = leaf.uri_sans;
    info.dns_sans = leaf.dns_sans;
    info.subject = leaf.subject;
    info.serial = leaf.serial;
    info.chain = chain.iter().map(|certificate| certificate.to_vec()).collect::<Arc<[_]>>();
    Ok(info)
}

/// The SHA-256 of `data`, by the hash of a cipher suite; `None` from a provider without such a suite.
#[must_use]
pub fn sha256(data: &[u8], provider: &CryptoProvider) -> Option<[u8; 32]> {
    let hash = provider.cipher_suites.iter().find_map(|suite| {
        let hash = match suite {
            SupportedCipherSuite::Tls12(suite) => suite.common.hash_provider,
            SupportedCipherSuite::Tls13(suite) => suite.common.hash_provider,
        };
        (hash.algorithm() == HashAlgorithm::SHA256).then_some(hash)
    })?;
    hash.hash(data).as_ref().try_into().ok()
}

fn time(seconds: i64) -> SystemTime {
    match u64::try_from(seconds) {
        Ok(seconds) => SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
        Err(_) => SystemTime::UNIX_EPOCH,
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(Into::into)
}
