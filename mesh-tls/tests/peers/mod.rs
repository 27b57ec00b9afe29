//! Workloads, good and bad.
#![allow(dead_code, reason = "each test file has a use for another part")]

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::identity::SpiffeId;
use mesh_tls::ca::Authority;
use mesh_tls::certificate::Leaf;
use mesh_tls::{Connector, Identity, Material, Materials, PeerRule, PeerVerifier, TrustBundle};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

pub(crate) const HOUR: Duration = Duration::from_secs(3600);
pub(crate) const DAY: Duration = Duration::from_secs(24 * 3600);

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// An authority, also for certificates that it would not sign itself.
pub(crate) struct Ca(pub(crate) Authority);

pub(crate) fn authority(trust_domain: &str) -> Ca {
    Ca(Authority::new(trust_domain.parse().unwrap(), SystemTime::now(), DAY).unwrap())
}

impl Ca {
    fn issuer(&self) -> Issuer<'static, KeyPair> {
        let key = KeyPair::from_pem(&self.0.key_pem()).unwrap();
        Issuer::from_ca_cert_der(self.0.root(), key).unwrap()
    }

    pub(crate) fn bundle(&self) -> Arc<TrustBundle> {
        Arc::new(TrustBundle::new([self.0.root().clone()]).unwrap())
    }
}

pub(crate) fn spiffe(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

/// What a workload of this identity has.
pub(crate) fn material(ca: &Ca, id: &str) -> Materials {
    let issued = ca.0.issue(&spiffe(id), SystemTime::now(), HOUR).unwrap();
    Materials::new(Material { identity: Some(issued.identity(&provider()).unwrap()), bundle: ca.bundle() })
}

/// A certificate with its key, whoever signed it and whatever it says.
pub(crate) struct Peer {
    chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
}

impl Peer {
    pub(crate) fn serial(&self) -> Vec<u8> {
        Leaf::read(&self.chain[0]).unwrap().serial
    }

    /// What it is as the certificate of a server.
    pub(crate) fn identity(&self) -> Identity {
        Identity::new(self.chain.clone(), self.key(), &provider()).unwrap()
    }

    pub(crate) fn der(&self) -> &CertificateDer<'static> {
        &self.chain[0]
    }

    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.chain.clone()
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }

    /// A client that shows the certificate, and believes the mesh.
    pub(crate) fn connector(&self, ca: &Ca) -> Connector {
        let identity = Identity::new(self.chain.clone(), self.key(), &provider()).unwrap();
        let materials = Materials::new(Material { identity: Some(identity), bundle: ca.bundle() });
        materials.set_trust_domains(vec!["cluster.local".to_owned()]);
        Connector::new(materials, provider())
    }

    /// A client of rustls as it comes, which would resume a session.
    pub(crate) fn client_config(
        &self,
        ca: &Ca,
        version: &'static rustls::SupportedProtocolVersion,
    ) -> rustls::ClientConfig {
        let rule =
            PeerRule::Svid { trust_domains: Some(vec!["cluster.local".to_owned()]), any_of: Vec::new() };
        let believes = Materials::new(Material { identity: None, bundle: ca.bundle() });
        rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[version])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(PeerVerifier::new(believes, provider(), rule)))
            .with_client_auth_cert(self.chain.clone(), self.key())
            .unwrap()
    }

    /// A server that asks for no certificate.
    pub(crate) fn server_config(&self) -> rustls::ServerConfig {
        rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), self.key())
            .unwrap()
    }
}

/// What a good workload's certificate says.
fn params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![uri("spiffe://cluster.local/ns/default/sa/productpage")];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = (SystemTime::now() - HOUR).into();
    params.not_after = (SystemTime::now() + HOUR).into();
    params
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// A workload that differs from a good one by this.
pub(crate) fn leaf(ca: &Ca, differs: impl FnOnce(&mut CertificateParams)) -> Peer {
    leaf_of(ca, &KeyPair::generate().unwrap(), differs)
}

/// [`leaf`], with a key of one's own.
pub(crate) fn leaf_of(ca: &Ca, key: &KeyPair, differs: impl FnOnce(&mut CertificateParams)) -> Peer {
    let mut params = params();
    differs(&mut params);
    let signed = params.signed_by(key, &ca.issuer()).unwrap();
    Peer { chain: vec![signed.der().clone()], key: key.serialize_der() }
}

fn self_signed() -> Peer {
    let key = KeyPair::generate().unwrap();
    let signed = params().self_signed(&key).unwrap();
    Peer { chain: vec![signed.der().clone()], key: key.serialize_der() }
}

/// A workload below so many intermediate authorities, of a root that nobody believes.
fn deep(depth: usize) -> Peer {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let mut chain = Vec::new();
    let mut issuer = Issuer::new(authority.clone(), KeyPair::generate().unwrap());
    for _ in 0..depth {
        let key = KeyPair::generate().unwrap();
        chain.insert(0, authority.signed_by(&key, &issuer).unwrap().der().clone());
        issuer = Issuer::new(authority.clone(), key);
    }
    let own = KeyPair::generate().unwrap();
    chain.insert(0, params().signed_by(&own, &issuer).unwrap().der().clone());
    Peer { chain, key: own.serialize_der() }
}

/// Peers that must not be let in: what they are, and a word of the reason.
pub(crate) fn bad(ca: &Ca, revoked: Peer) -> Vec<(&'static str, Peer, &'static str)> {
    let sans = |names: Vec<SanType>| leaf(ca, move |params| params.subject_alt_names = names);
    let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
    let ours = "spiffe://cluster.local/ns/default/sa/productpage";
    let minute = Duration::from_secs(60);
    vec![
        ("self-signed", self_signed(), "authority that is trusted"),
        ("of another authority", leaf(&authority("cluster.local"), |_| {}), "authority that is trusted"),
        (
            "of another trust domain",
            sans(vec![uri("spiffe://evil.example/ns/a/sa/b")]),
            "not of a trust domain that is trusted",
        ),
        ("expired", leaf(ca, |params| params.not_after = (SystemTime::now() - minute).into()), "has expired"),
        (
            "of the future",
            leaf(ca, |params| params.not_before = (SystemTime::now() + minute).into()),
            "not valid yet",
        ),
        ("revoked", revoked, "was revoked"),
        ("with two URI names", sans(vec![uri(ours), uri("spiffe://cluster.local/b")]), "2 URI names"),
        ("with a DNS name only", sans(vec![dns("productpage.default")]), "0 URI names"),
        ("a wildcard", sans(vec![uri("spiffe://cluster.local/ns/*/sa/*")]), "no SPIFFE ID"),
        ("a trust domain", sans(vec![uri("spiffe://cluster.local")]), "names a trust domain"),
        ("not of SPIFFE", sans(vec![uri("https://cluster.local/ns/default/sa/a")]), "no SPIFFE ID"),
        (
            "for servers only",
            leaf(ca, |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
            "not for this side",
        ),
        (
            "an authority",
            leaf(ca, |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            "not for this side",
        ),
        (
            "one that signs",
            leaf(ca, |params| params.key_usages.push(KeyUsagePurpose::KeyCertSign)),
            "signs others",
        ),
        ("below nine authorities", deep(9), "10 certificates"),
        ("below three unknown authorities", deep(3), "authority that is trusted"),
    ]
}
