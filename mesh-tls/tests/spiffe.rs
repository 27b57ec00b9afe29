//! What SPIFFE-ID and X509-SVID demand (MUST), one row for each, by document and section.
//!
//! Where the documents are at hand, the rows are counted against them: none is missing. What concerns formats that are
//! neither read nor written here is a row too, with the reason.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod peers;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_core::identity::{InvalidSpiffeId, SpiffeId, TrustDomain};
use mesh_tls::certificate::Leaf;
use mesh_tls::{Material, Materials, PeerRule, PeerVerifier, Refusal, TrustBundle};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use x509_parser::extensions::{ExtendedKeyUsage, KeyUsage};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use peers::{Ca, DAY, HOUR, Peer, authority, leaf, material, provider, spiffe};

const ID: &str = "SPIFFE-ID";
const SVID: &str = "X509-SVID";

/// One demand.
struct Row {
    document: &'static str,
    section: &'static str,
    what: &'static str,
    shown: Shown,
}

enum Shown {
    By(fn()),
    /// The demand is on what is neither read nor written here.
    NotHere(&'static str),
}

const fn row(document: &'static str, section: &'static str, what: &'static str, by: fn()) -> Row {
    Row { document, section, what, shown: Shown::By(by) }
}

const fn not_here(section: &'static str, what: &'static str) -> Row {
    let why = "bundles are read and written as PEM, not as JWK sets";
    Row { document: SVID, section, what, shown: Shown::NotHere(why) }
}

const ROWS: &[Row] = &[
    row(ID, "2.", "scheme and trust domain", scheme_and_trust_domain),
    row(ID, "2.", "no query and no fragment", no_query_and_no_fragment),
    row(ID, "2.1.", "the host is not empty", host_is_not_empty),
    row(ID, "2.1.", "neither user nor port", neither_user_nor_port),
    row(ID, "2.1.", "the host is in lower case", host_is_in_lower_case),
    row(ID, "2.1.", "the characters of a host", characters_of_a_host),
    row(ID, "2.1.", "no escapes in a host", no_escapes_in_a_host),
    row(ID, "2.1.", "addresses are names like others", addresses_are_names),
    row(ID, "2.2.", "no escapes in a path", no_escapes_in_a_path),
    row(ID, "2.2.", "no empty or relative segment", no_empty_or_relative_segment),
    row(ID, "2.2.", "no slash at the end", no_slash_at_the_end),
    row(ID, "2.2.", "the characters of a segment", characters_of_a_segment),
    row(ID, "2.3.", "2048 bytes are supported", two_kibibytes_are_supported),
    row(ID, "3.1.", "a trust domain has an authority that signs", an_authority_that_signs),
    row(ID, "3.1.", "the authority has an SVID", the_authority_has_an_svid),
    row(ID, "3.2.", "identity and key are signed", identity_and_key_are_signed),
    row(ID, "3.3.", "a document of a known type", a_document_of_a_known_type),
    row(SVID, "2.", "exactly one URI name", exactly_one_uri_name),
    row(SVID, "2.", "several URI names are refused", several_uri_names_are_refused),
    row(SVID, "3.1.", "a leaf has a path", a_leaf_has_a_path),
    row(SVID, "3.1.", "critical names without a subject", critical_names_without_a_subject),
    row(SVID, "3.2.", "the ID of an authority has no path", authority_has_no_path),
    row(SVID, "3.2.", "an authority does not authenticate", authority_does_not_authenticate),
    row(SVID, "4.1.", "cA of an authority is true", authority_is_ca),
    row(SVID, "4.1.", "cA of a leaf is false", leaf_is_no_ca),
    row(SVID, "4.2.", "name constraints hold for IDs", name_constraints_hold),
    row(SVID, "4.3.", "there is a key usage", there_is_a_key_usage),
    row(SVID, "4.3.", "the key usage is critical", key_usage_is_critical),
    row(SVID, "4.3.", "an authority may sign certificates", authority_may_sign),
    row(SVID, "4.3.", "a leaf may sign", leaf_may_sign),
    row(SVID, "4.3.", "a leaf signs neither certificates nor lists", leaf_signs_no_certificates),
    row(SVID, "4.4.", "both purposes", both_purposes),
    row(SVID, "5.1.", "paths are validated as RFC 5280 says", paths_are_validated),
    row(SVID, "5.2.", "a leaf that may sign certificates is refused", leaf_that_signs_is_refused),
    row(SVID, "5.2.", "a leaf of another scheme is refused", leaf_of_another_scheme_is_refused),
    row(SVID, "5.2.", "a leaf without a path is refused", leaf_without_a_path_is_refused),
    row(SVID, "5.2.", "a leaf with several URI names is refused", several_uri_names_are_refused),
    not_here("6.1.", "use"),
    not_here("6.1.", "kid"),
    not_here("6.1.", "x5c"),
    not_here("6.1.", "one certificate"),
    not_here("6.2.", "entries without x5c"),
    not_here("6.2.", "further values of x5c"),
];

#[test]
fn every_must_of_spiffe_id_and_x509_svid() {
    let mut failed = Vec::new();
    for Row { document, section, what, shown } in ROWS {
        match shown {
            Shown::By(test) => {
                if std::panic::catch_unwind(test).is_err() {
                    failed.push(format!("{document} §{section} {what}"));
                }
            }
            Shown::NotHere(why) => eprintln!("{document} §{section} {what}: {why}"),
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn no_must_is_missing() {
    let Some(folder) = mesh_testkit::shared_data("no_must_is_missing", "spiffe") else { return };
    for document in [ID, SVID] {
        let text = std::fs::read_to_string(folder.join(format!("{document}.md"))).unwrap();
        let (mut section, mut demanded) = (String::new(), BTreeMap::new());
        for line in text.lines() {
            if let Some(title) = line.strip_prefix('#') {
                let number = title.trim_start_matches(['#', ' ']).split(' ').next().unwrap_or_default();
                section = number.to_owned();
            }
            let count = line.matches("MUST").count();
            if count > 0 {
                *demanded.entry(section.clone()).or_insert(0) += count;
            }
        }
        let mut rows = BTreeMap::new();
        for row in ROWS.iter().filter(|row| row.document == document) {
            *rows.entry(row.section.to_owned()).or_insert(0) += 1;
        }
        assert_eq!(rows, demanded, "{document}");
    }
}

fn parse(text: &str) -> Result<SpiffeId, InvalidSpiffeId> {
    text.parse()
}

fn scheme_and_trust_domain() {
    assert_eq!(parse("spiffe://td/a").unwrap().trust_domain(), "td");
    for text in ["https://td/a", "SPIFFE://td/a", "td/a", "//td/a", "spiffe:td/a", "spiffe:/td/a"] {
        assert_eq!(parse(text), Err(InvalidSpiffeId::Scheme), "{text}");
    }
    assert_eq!(parse("spiffe://"), Err(InvalidSpiffeId::MissingTrustDomain));
}

fn no_query_and_no_fragment() {
    for text in ["spiffe://td?a", "spiffe://td/?a", "spiffe://td/a?b=c", "spiffe://td#a", "spiffe://td/a#b"] {
        assert!(parse(text).is_err(), "{text}");
    }
}

fn host_is_not_empty() {
    assert_eq!(parse("spiffe:///a"), Err(InvalidSpiffeId::MissingTrustDomain));
    assert_eq!("".parse::<TrustDomain>(), Err(InvalidSpiffeId::MissingTrustDomain));
}

fn neither_user_nor_port() {
    for domain in ["user@td", "user:secret@td", "@td", "td:80", "td:"] {
        assert!(parse(&format!("spiffe://{domain}/a")).is_err(), "{domain}");
        assert!(domain.parse::<TrustDomain>().is_err(), "{domain}");
    }
}

fn host_is_in_lower_case() {
    for domain in ["Td", "TD", "tD.example"] {
        assert!(parse(&format!("spiffe://{domain}/a")).is_err(), "{domain}");
    }
}

fn characters_of_a_host() {
    for byte in 0..=127_u8 {
        let allowed = byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
        // A slash ends the host.
        let is_one = parse(&format!("spiffe://a{}z/p", char::from(byte))).is_ok_and(|id| id.path() == "/p");
        assert_eq!(is_one, allowed, "{byte:#x}");
    }
    for domain in ["tä", "日本"] {
        assert!(parse(&format!("spiffe://{domain}/a")).is_err(), "{domain}");
    }
}

fn no_escapes_in_a_host() {
    for domain in ["t%64", "%74d", "td%2f", "%"] {
        assert!(parse(&format!("spiffe://{domain}/a")).is_err(), "{domain}");
    }
}

fn addresses_are_names() {
    for domain in ["10.0.0.1", "10.0.0.01", "999.0.0.1", "1.2.3", "a..b", "-a", "example.org"] {
        let id = parse(&format!("spiffe://{domain}/a")).unwrap();
        assert_eq!((id.trust_domain(), id.path()), (domain, "/a"));
    }
    assert!(parse("spiffe://[::1]/a").is_err());
}

fn no_escapes_in_a_path() {
    for path in ["/%61", "/a%2fb", "/%", "/a/%2e%2e"] {
        assert!(parse(&format!("spiffe://td{path}")).is_err(), "{path}");
    }
}

fn no_empty_or_relative_segment() {
    for path in ["//", "//a", "/a//b", "/.", "/..", "/a/./b", "/a/../b"] {
        assert!(parse(&format!("spiffe://td{path}")).is_err(), "{path}");
    }
    for path in ["/...", "/.a", "/a.", "/..a"] {
        assert!(parse(&format!("spiffe://td{path}")).is_ok(), "{path}");
    }
}

fn no_slash_at_the_end() {
    for path in ["/", "/a/", "/a/b/"] {
        assert_eq!(parse(&format!("spiffe://td{path}")), Err(InvalidSpiffeId::TrailingSlash), "{path}");
    }
}

fn characters_of_a_segment() {
    for byte in 0..=127_u8 {
        let allowed = byte.is_ascii_alphanumeric() || b".-_/".contains(&byte);
        assert_eq!(parse(&format!("spiffe://td/a{}z", char::from(byte))).is_ok(), allowed, "{byte:#x}");
    }
    assert!(parse("spiffe://td/ä").is_err());
}

fn two_kibibytes_are_supported() {
    let of = |length: usize| format!("spiffe://td/{}", "a".repeat(length - "spiffe://td/".len()));
    let id = parse(&of(2048)).unwrap();
    assert_eq!(id.as_str().len(), 2048);
    assert!(parse(&of(2049)).is_err());
    let ca = authority("td");
    let issued = ca.0.issue(&id, SystemTime::now(), HOUR).unwrap();
    assert_eq!(verifier(&ca).judge_client_again(&issued.certificate.chain, SystemTime::now()), Ok(()));
}

fn ca() -> Ca {
    authority("cluster.local")
}

/// Who judges as a workload of this authority does.
fn verifier(ca: &Ca) -> PeerVerifier {
    believing(ca.bundle(), ca.0.trust_domain().as_str())
}

fn believing(bundle: Arc<TrustBundle>, trust_domain: &str) -> PeerVerifier {
    let own = Materials::new(Material { identity: None, bundle });
    let rule = PeerRule::Svid { trust_domains: Some(vec![trust_domain.to_owned()]), any_of: Vec::new() };
    PeerVerifier::new(own, provider(), rule)
}

fn judged(ca: &Ca, peer: &Peer) -> Result<(), Refusal> {
    let now = SystemTime::now();
    let (client, server) = (
        verifier(ca).judge_client_again(&peer.chain(), now),
        verifier(ca).judge_server_again(&peer.chain(), now),
    );
    assert_eq!(client.is_ok(), server.is_ok(), "both sides judge alike");
    client
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// A certificate as ours are issued.
fn issued(ca: &Ca) -> CertificateDer<'static> {
    let id = spiffe("spiffe://cluster.local/ns/default/sa/a");
    ca.0.issue(&id, SystemTime::now(), HOUR).unwrap().certificate.chain.remove(0)
}

fn parsed<T>(der: &CertificateDer<'_>, ask: impl FnOnce(&X509Certificate<'_>) -> T) -> T {
    ask(&X509Certificate::from_der(der).unwrap().1)
}

fn an_authority_that_signs() {
    let ca = ca();
    let id = spiffe("spiffe://cluster.local/ns/a/sa/b");
    let chain = ca.0.issue(&id, SystemTime::now(), HOUR).unwrap().certificate.chain;
    assert_eq!(verifier(&ca).judge_client_again(&chain, SystemTime::now()), Ok(()));
    // And it signs for its own trust domain alone.
    assert!(ca.0.issue(&spiffe("spiffe://other/ns/a/sa/b"), SystemTime::now(), HOUR).is_err());
}

fn the_authority_has_an_svid() {
    assert_eq!(Leaf::read(ca().0.root()).unwrap().uri_sans, ["spiffe://cluster.local"]);
}

fn identity_and_key_are_signed() {
    let ca = ca();
    let good = issued(&ca);
    assert_eq!(verifier(&ca).judge_client_again(&[&good], SystemTime::now()), Ok(()));
    let find = |wanted: &[u8]| good.windows(wanted.len()).position(|window| window == wanted).unwrap();
    let spki = Leaf::read(&good).unwrap().spki;
    for at in [find(b"/sa/a") + 4, find(&spki) + spki.len() - 1] {
        let mut forged = good.to_vec();
        forged[at] ^= 1;
        let refusal = verifier(&ca).judge_client_again(&[forged], SystemTime::now());
        assert!(matches!(refusal, Err(Refusal::Chain(_))), "{refusal:?}");
    }
}

fn a_document_of_a_known_type() {
    let ca = ca();
    for other in [&b""[..], b"eyJhbGciOiJFUzI1NiJ9.e30.c2ln", b"spiffe://cluster.local/ns/default/sa/a"] {
        assert!(verifier(&ca).judge_client_again(&[other], SystemTime::now()).is_err());
    }
}

fn exactly_one_uri_name() {
    let ca = ca();
    assert_eq!(Leaf::read(&issued(&ca)).unwrap().uri_sans, ["spiffe://cluster.local/ns/default/sa/a"]);
    let none = leaf(&ca, |params| {
        params.subject_alt_names = vec![SanType::DnsName("a.cluster.local".try_into().unwrap())];
    });
    assert_eq!(judged(&ca, &none), Err(Refusal::UriNames(0)));
    let beside = leaf(&ca, |params| {
        params.subject_alt_names.push(SanType::DnsName("a.cluster.local".try_into().unwrap()));
    });
    assert_eq!(judged(&ca, &beside), Ok(()), "names of other kinds may stand beside it");
}

fn several_uri_names_are_refused() {
    let ca = ca();
    for other in ["spiffe://cluster.local/ns/default/sa/b", "https://example.org/"] {
        let two = leaf(&ca, |params| params.subject_alt_names.push(uri(other)));
        assert_eq!(judged(&ca, &two), Err(Refusal::UriNames(2)), "{other}");
    }
}

fn a_leaf_has_a_path() {
    let ca = ca();
    assert!(ca.0.issue(&spiffe("spiffe://cluster.local"), SystemTime::now(), HOUR).is_err());
}

fn critical_names_without_a_subject() {
    parsed(&issued(&ca()), |certificate| {
        let names = certificate.subject_alternative_name().unwrap().unwrap();
        assert!(names.critical || certificate.subject().iter().next().is_some());
    });
}

fn authority_has_no_path() {
    let root = Leaf::read(ca().0.root()).unwrap();
    assert_eq!(parse(&root.uri_sans[0]).unwrap().path(), "");
}

fn authority_does_not_authenticate() {
    let ca = ca();
    let now = SystemTime::now();
    let refused = verifier(&ca).judge_client_again(&[ca.0.root()], now);
    assert!(refused.is_err(), "the root itself");
    let as_authority = leaf(&ca, |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert!(judged(&ca, &as_authority).is_err());
}

fn authority_is_ca() {
    parsed(ca().0.root(), |certificate| assert!(certificate.is_ca()));
    // One that says nothing of it has signed nothing.
    let root = KeyPair::generate().unwrap();
    let params = CertificateParams::default();
    let own = params.self_signed(&root).unwrap().der().clone();
    let signed = leaf_by(&Issuer::new(params, root));
    let anchor = believing(Arc::new(TrustBundle::new([issued(&ca())]).unwrap()), "cluster.local");
    assert!(anchor.judge_client_again(&[signed, own], SystemTime::now()).is_err());
}

fn leaf_is_no_ca() {
    parsed(&issued(&ca()), |certificate| assert!(!certificate.is_ca()));
}

/// A root without limits, an authority below it that is limited to a trust domain, and one of its leaves.
fn constrained(domain: &str, id: &str) -> (CertificateDer<'static>, Vec<CertificateDer<'static>>) {
    // SEQUENCE { permitted [0] { SEQUENCE { base [6] domain } } }, as RFC 5280 §4.2.1.10 has it for URIs.
    let tlv = |tag: u8, body: &[u8]| [&[tag, u8::try_from(body.len()).unwrap()], body].concat();
    let constraints = tlv(0x30, &tlv(0xa0, &tlv(0x30, &tlv(0x86, domain.as_bytes()))));
    let mut extension = CustomExtension::from_oid_content(&[2, 5, 29, 30], constraints);
    extension.set_criticality(true);
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let (root, below) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let anchor = params.self_signed(&root).unwrap().der().clone();
    let mut limited = params.clone();
    limited.custom_extensions = vec![extension];
    let own = limited.signed_by(&below, &Issuer::new(params, root)).unwrap().der().clone();
    let leaf = leaf_named(&Issuer::new(limited, below), id);
    (anchor, vec![leaf, own])
}

fn leaf_by(issuer: &Issuer<'_, KeyPair>) -> CertificateDer<'static> {
    leaf_named(issuer, "spiffe://cluster.local/ns/default/sa/a")
}

fn leaf_named(issuer: &Issuer<'_, KeyPair>, id: &str) -> CertificateDer<'static> {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![uri(id)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.signed_by(&KeyPair::generate().unwrap(), issuer).unwrap().der().clone()
}

fn name_constraints_hold() {
    let id = "spiffe://evil.example/ns/default/sa/a";
    let (root, chain) = constrained("cluster.local", id);
    let verifier = believing(Arc::new(TrustBundle::new([root]).unwrap()), "evil.example");
    let refusal = verifier.judge_client_again(&chain, SystemTime::now());
    assert!(matches!(refusal, Err(Refusal::Chain(_))), "{refusal:?}");
}

fn key_usage<T>(der: &CertificateDer<'_>, ask: impl FnOnce(bool, &KeyUsage) -> T) -> T {
    parsed(der, |certificate| {
        let usage = certificate.key_usage().unwrap().expect("a key usage");
        ask(usage.critical, usage.value)
    })
}

fn there_is_a_key_usage() {
    let ca = ca();
    for certificate in [&issued(&ca), ca.0.root()] {
        assert_ne!(key_usage(certificate, |_, usage| usage.flags), 0);
    }
}

fn key_usage_is_critical() {
    let ca = ca();
    for certificate in [&issued(&ca), ca.0.root()] {
        assert!(key_usage(certificate, |critical, _| critical));
    }
}

fn authority_may_sign() {
    assert!(key_usage(ca().0.root(), |_, usage| usage.key_cert_sign()));
}

fn leaf_may_sign() {
    assert!(key_usage(&issued(&ca()), |_, usage| usage.digital_signature()));
}

fn leaf_signs_no_certificates() {
    assert!(key_usage(&issued(&ca()), |_, usage| !usage.key_cert_sign() && !usage.crl_sign()));
}

fn both_purposes() {
    parsed(&issued(&ca()), |certificate| {
        let purposes: &ExtendedKeyUsage<'_> = certificate.extended_key_usage().unwrap().unwrap().value;
        assert!(purposes.client_auth && purposes.server_auth);
    });
    let ca = ca();
    let one = leaf(&ca, |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]);
    let now = SystemTime::now();
    assert_eq!(verifier(&ca).judge_client_again(&one.chain(), now), Ok(()));
    assert!(verifier(&ca).judge_server_again(&one.chain(), now).is_err());
}

fn paths_are_validated() {
    let (ca, now) = (ca(), SystemTime::now());
    assert_eq!(judged(&ca, &leaf(&ca, |_| {})), Ok(()));
    let strange = leaf(&authority("cluster.local"), |_| {});
    assert!(matches!(judged(&ca, &strange), Err(Refusal::Chain(_))));
    // Not yet valid; the end of validity is that of `d3_` and `d4_`.
    let early = leaf(&ca, |params| params.not_before = (now + DAY).into());
    assert!(matches!(judged(&ca, &early), Err(Refusal::Chain(_))));
    // The authority may have nobody between it and its leaves.
    let own = material(&ca, "spiffe://cluster.local/ns/default/sa/a");
    assert!(own.load().identity.as_ref().is_some_and(|identity| identity.chain().len() == 1));
    parsed(ca.0.root(), |root| {
        assert_eq!(root.basic_constraints().unwrap().unwrap().value.path_len_constraint, Some(0));
    });
}

fn leaf_that_signs_is_refused() {
    let ca = ca();
    for usage in [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign] {
        let signs = leaf(&ca, |params| params.key_usages.push(usage));
        assert_eq!(judged(&ca, &signs), Err(Refusal::Signs), "{usage:?}");
    }
    authority_does_not_authenticate();
}

fn leaf_of_another_scheme_is_refused() {
    let ca = ca();
    for name in ["https://cluster.local/ns/default/sa/a", "spiffes://cluster.local/ns/default/sa/a", "urn:a"]
    {
        let other = leaf(&ca, |params| params.subject_alt_names = vec![uri(name)]);
        assert!(matches!(judged(&ca, &other), Err(Refusal::NotSpiffe { .. })), "{name}");
    }
}

fn leaf_without_a_path_is_refused() {
    let ca = ca();
    let none = leaf(&ca, |params| params.subject_alt_names = vec![uri("spiffe://cluster.local")]);
    assert!(matches!(judged(&ca, &none), Err(Refusal::NoPath(_))));
    let slash = leaf(&ca, |params| params.subject_alt_names = vec![uri("spiffe://cluster.local/")]);
    assert!(matches!(judged(&ca, &slash), Err(Refusal::NotSpiffe { .. })));
}
