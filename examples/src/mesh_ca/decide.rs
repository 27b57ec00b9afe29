//! Who gets what: pure, of the call, of what is known, and of the time.
//!
//! A caller is who its certificate says, or else who its token says; istiod as well asks in this order and is content with
//! either. Nothing of the
//! signing request is looked at before that is known. What it names has to be the caller, and nothing else.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::identity::{PeerInfo, SpiffeId, TrustDomain};
use mesh_tls::ca::{Authorities, BootstrapTokens, CaError};
use mesh_tls::istio_ca::{Call, Code, Status};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject as _;

/// What holds for every call.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) trust_domain: TrustDomain,
    /// The longest life of a certificate.
    pub(super) leaf_ttl: Duration,
    pub(super) provider: Arc<CryptoProvider>,
}

/// A certificate.
#[derive(Debug)]
pub(super) struct Granted {
    pub(super) id: SpiffeId,
    /// What proved who the caller is.
    pub(super) proof: &'static str,
    pub(super) not_after: SystemTime,
    /// In PEM, whom to believe last.
    pub(super) chain: Vec<String>,
}

pub(super) fn decide(
    call: &Call,
    peer: Option<&PeerInfo>,
    tokens: Option<&BootstrapTokens>,
    authorities: &Authorities,
    rules: &Rules,
    now: SystemTime,
) -> Result<Granted, Status> {
    let (id, proof) = caller(call.token.as_deref(), peer, tokens, rules, now)?;
    let request = CertificateSigningRequestDer::from_pem_slice(call.request.csr.as_bytes())
        .map_err(|_| Status::new(Code::InvalidArgument, "csr is no PEM of a CERTIFICATE REQUEST"))?;
    let life = match u64::try_from(call.request.validity_duration) {
        Ok(seconds @ 1..) => rules.leaf_ttl.min(Duration::from_secs(seconds)),
        _ => rules.leaf_ttl,
    };
    let signed = authorities.signing(now).sign(&request, &id, now, life).map_err(|error| {
        let code = match error {
            CaError::SomebodyElse { .. } | CaError::TrustDomain { .. } => Code::PermissionDenied,
            CaError::Request(_) | CaError::Key => Code::InvalidArgument,
            CaError::NotValid => Code::Unavailable,
            _ => Code::Internal,
        };
        Status::new(code, error.to_string())
    })?;
    let chain = vec![signed.chain_pem, authorities.roots_pem()];
    Ok(Granted { id, proof, not_after: signed.not_after, chain })
}

/// `tokens` is none while the list cannot be read.
fn caller(
    token: Option<&str>,
    peer: Option<&PeerInfo>,
    tokens: Option<&BootstrapTokens>,
    rules: &Rules,
    now: SystemTime,
) -> Result<(SpiffeId, &'static str), Status> {
    // A connection may have outlived the certificate that it began with.
    let id = peer.filter(|peer| now < peer.not_after).and_then(|peer| peer.spiffe_id.clone());
    if let Some(id) = id.filter(|id| id.trust_domain() == rules.trust_domain.as_str()) {
        return Ok((id, "certificate"));
    }
    let refused = match (token, tokens) {
        (Some(token), Some(tokens)) => match tokens.find(token, &rules.trust_domain, now, &rules.provider) {
            Ok(id) => return Ok((id, "token")),
            Err(refusal) => refusal.to_string(),
        },
        (Some(_), None) => {
            let words = "bootstrap tokens prove nothing while their list cannot be read";
            return Err(Status::new(Code::Unavailable, words));
        }
        (None, _) => "there is no bootstrap token".to_owned(),
    };
    Err(Status::new(Code::Unauthenticated, format!("{refused}, and no valid client certificate")))
}

#[cfg(test)]
mod tests {
    use mesh_tls::ca::{Authority, BootstrapToken};
    use mesh_tls::istio_ca::CertificateRequest;
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const REVIEWS: &str = "spiffe://cluster.local/ns/default/sa/reviews";

    struct Known {
        token: BootstrapToken,
        tokens: BootstrapTokens,
        authorities: Authorities,
        rules: Rules,
        now: SystemTime,
    }

    impl Known {
        fn new() -> Self {
            let (provider, now) =
                (Arc::new(rustls::crypto::aws_lc_rs::default_provider()), SystemTime::now());
            let trust_domain: TrustDomain = "cluster.local".parse().unwrap();
            let token = BootstrapToken::new(&provider).unwrap();
            let line = token.line("default", "reviews", now + HOUR, &provider).unwrap();
            let authority = Authority::new(trust_domain.clone(), now, 1000 * HOUR).unwrap();
            Self {
                token,
                tokens: BootstrapTokens::parse(&line).unwrap(),
                authorities: Authorities::new(authority, 24 * HOUR),
                rules: Rules { trust_domain, leaf_ttl: 24 * HOUR, provider },
                now,
            }
        }

        fn ask(
            &self,
            csr: &str,
            seconds: i64,
            token: Option<&str>,
            peer: Option<&str>,
        ) -> Result<Granted, Status> {
            let peer = peer.map(|id| PeerInfo::new(Some(id.parse().unwrap()), self.now + HOUR));
            self.ask_at(self.now, csr, seconds, token, peer.as_ref())
        }

        fn ask_at(
            &self,
            now: SystemTime,
            csr: &str,
            seconds: i64,
            token: Option<&str>,
            peer: Option<&PeerInfo>,
        ) -> Result<Granted, Status> {
            let request = CertificateRequest::new(csr.to_owned(), seconds);
            let call = Call::new(request, token.map(str::to_owned));
            decide(&call, peer, Some(&self.tokens), &self.authorities, &self.rules, now)
        }
    }

    fn csr(names: &[&str]) -> String {
        let mut params = CertificateParams::default();
        params.subject_alt_names =
            names.iter().map(|name| SanType::URI((*name).try_into().unwrap())).collect();
        params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
    }

    #[test]
    fn pa_05_a_token_or_a_certificate_is_proof() {
        let known = Known::new();
        let token = Some(known.token.expose());
        for csr in [csr(&[REVIEWS]), csr(&[])] {
            let granted = known.ask(&csr, 0, token, None).unwrap();
            assert_eq!((granted.id.as_str(), granted.proof, granted.chain.len()), (REVIEWS, "token", 2));
            assert_eq!(known.ask(&csr, 0, None, Some(REVIEWS)).unwrap().proof, "certificate");
            // A token that is over does no harm beside a certificate.
            assert_eq!(known.ask(&csr, 0, Some("old"), Some(REVIEWS)).unwrap().proof, "certificate");
        }
    }

    #[test]
    fn bug_a_token_of_another_account_beat_a_valid_certificate() {
        let known = Known::new();
        let ratings = "spiffe://cluster.local/ns/default/sa/ratings";
        let granted = known.ask(&csr(&[]), 0, Some(known.token.expose()), Some(ratings)).unwrap();
        assert_eq!((granted.id.as_str(), granted.proof), (ratings, "certificate"));
    }

    #[test]
    fn bug_a_list_that_could_not_be_read_left_tokens_as_proof() {
        let known = Known::new();
        let decide = |peer: Option<&PeerInfo>| {
            let token = Some(known.token.expose().to_owned());
            let call = Call::new(CertificateRequest::new(csr(&[]), 0), token);
            decide(&call, peer, None, &known.authorities, &known.rules, known.now)
        };
        assert_eq!(decide(None).unwrap_err().code, Code::Unavailable);
        let peer = PeerInfo::new(Some(REVIEWS.parse().unwrap()), known.now + HOUR);
        assert_eq!(decide(Some(&peer)).unwrap().proof, "certificate");
    }

    #[test]
    fn nobody_gets_another_identity() {
        let known = Known::new();
        let token = Some(known.token.expose());
        let code = |csr: &str, token, peer| known.ask(csr, 0, token, peer).unwrap_err().code;
        for names in [
            &["spiffe://cluster.local/ns/default/sa/ratings"][..],
            &["spiffe://cluster.local/ns/other/sa/reviews"],
            &["spiffe://example.org/ns/default/sa/reviews"],
            &[REVIEWS, "spiffe://cluster.local/ns/default/sa/ratings"],
        ] {
            assert_eq!(code(&csr(names), token, None), Code::PermissionDenied, "{names:?}");
            assert_eq!(code(&csr(names), None, Some(REVIEWS)), Code::PermissionDenied, "{names:?}");
        }
        let mut dns = CertificateParams::new(["istiod.istio-system.svc".to_owned()]).unwrap();
        dns.subject_alt_names.push(SanType::URI(REVIEWS.try_into().unwrap()));
        let dns = dns.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        assert_eq!(code(&dns, token, None), Code::PermissionDenied);
        assert_eq!(
            code(&csr(&[]), None, Some("spiffe://example.org/ns/default/sa/reviews")),
            Code::Unauthenticated
        );
    }

    #[test]
    fn without_proof_nothing_is_read() {
        let known = Known::new();
        for token in [None, Some("guess")] {
            let refused = known.ask("no request at all", 0, token, None).unwrap_err();
            assert_eq!(refused.code, Code::Unauthenticated);
            assert!(!refused.message.contains("guess"), "{refused}");
        }
        let expired = known.ask_at(known.now + HOUR, &csr(&[]), 0, Some(known.token.expose()), None);
        assert!(expired.unwrap_err().message.contains("the bootstrap token has expired"));
        let over = PeerInfo::new(Some(REVIEWS.parse().unwrap()), known.now);
        let refused = known.ask_at(known.now, &csr(&[]), 0, None, Some(&over)).unwrap_err();
        assert_eq!(refused.code, Code::Unauthenticated);
    }

    #[test]
    fn what_is_no_sound_request_is_refused_and_lives_are_capped() {
        let known = Known::new();
        let token = Some(known.token.expose());
        let pem = csr(&[REVIEWS]);
        // One bit of the signature.
        let broken = {
            let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).unwrap();
            let mut der = der.to_vec();
            *der.last_mut().unwrap() ^= 1;
            pem_of(&der)
        };
        let certificate = known.authorities.old().root_pem().to_owned();
        for csr in ["", "no PEM", &certificate, &broken, RSA_1024, P384_SIGNED_AS_P256] {
            let refused = known.ask(csr, 0, token, None).unwrap_err();
            assert_eq!(refused.code, Code::InvalidArgument, "{csr}: {refused}");
        }
        let life = |seconds| {
            let granted = known.ask(&pem, seconds, token, None).unwrap();
            granted.not_after.duration_since(known.now).unwrap_or_default().as_secs().next_multiple_of(3600)
        };
        let day = 24 * 3600;
        for (seconds, expected) in
            [(3600, 3600), (0, day), (-1, day), (day as i64 * 365, day), (i64::MAX, day)]
        {
            assert_eq!(life(seconds), expected, "{seconds}");
        }
    }

    fn pem_of(der: &[u8]) -> String {
        use base64::Engine as _;
        let text = base64::engine::general_purpose::STANDARD.encode(der);
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n")
    }

    /// `openssl req -new -newkey rsa:1024 -sha256 -nodes -subj /O=x`
    const RSA_1024: &str = "-----BEGIN CERTIFICATE REQUEST-----
MIIBSzCBtQIBADAMMQowCAYDVQQKDAF4MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCB
iQKBgQDOi4go5RCzdlNhAkuSRdqrr1mn3TiMIdLZO85mE/e/WCRf/ZrIh1vjv/AC
BYIMaSvU6nkd2bozpkW0tO9WZW9kfiBBcxv2+pJIhGvX6Wl5zyw4MvSTRDLgsg45
BFo4uZkQcDLOP4e65Hwq01azJixSIDu5jXtZIQFRdyJnxrq2kwIDAQABoAAwDQYJ
KoZIhvcNAQELBQADgYEAmvIi+EI91RuZPCn8OgAg8WmkqtwBmd+aU7wEJcZ7AYZ4
QuKnXfwemQFLsov+ncA5SNlo1XZxPf6vX8iGLWrOARDMNCy0UBYpp9NLm7aXxnjo
j2ac3XCLjfzVFacwlw7ZmBvyZKU9MERSzelRPFHubcQceD43lhk1n2KtLVtQ3K8=
-----END CERTIFICATE REQUEST-----
";

    /// `openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-384 -sha256 -nodes -subj /O=x`: its algorithm is that of
    /// P-256 keys, and its key is another.
    const P384_SIGNED_AS_P256: &str = "-----BEGIN CERTIFICATE REQUEST-----
MIIBBDCBiwIBADAMMQowCAYDVQQKDAF4MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAE
m/0QEw2omN2w+1NSRbQ/GRKA7a6qbSXKSpz+ul/afM6ItTuG5LVEPGaBesWbMP1O
Xkjw9eo/FkaH0d/k3lk22wVdZfh2IQwQBNcPv9ItUGZUtir9o1NdBmR0ex9hmJK9
oAAwCgYIKoZIzj0EAwIDaAAwZQIwdxlvLad+aYzLV6wfc/vs/zliXQ8cS6HNq6id
LZjvAPRB+bGy2Wim2+PXhH1BJrWbAjEA9V+ClkhmHjRTb5jC3m6oxFHFK5JY5W0U
n2gyxKFHNdH8cMRSzWbIQQmzzE4f/KuU
-----END CERTIFICATE REQUEST-----
";
}
