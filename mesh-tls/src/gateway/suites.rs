//! Cipher suites by OpenSSL's names, and the little of its list syntax that Envoy's BoringSSL takes: `ALL`, `[A|B]` for
//! suites of one rank, `-A` and `!A` to leave one out. They are about TLS 1.2; those of 1.3 are not to be chosen.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::{CipherSuite, SupportedCipherSuite};

/// `provider` with the suites of TLS 1.2 that are listed, in that order. What is not known is left out, which whoever
/// compiled the list has said. Empty for all.
pub(super) fn restricted(provider: &Arc<CryptoProvider>, listed: &[String]) -> Arc<CryptoProvider> {
    if listed.is_empty() {
        return Arc::clone(provider);
    }
    let all = &provider.cipher_suites;
    let mut chosen: Vec<SupportedCipherSuite> = Vec::new();
    let older = |suite: &&SupportedCipherSuite| suite.tls13().is_none();
    for item in listed {
        let (leave_out, names) = match item.strip_prefix(['-', '!']) {
            Some(name) => (true, name),
            None => (false, item.trim_start_matches('[').trim_end_matches(']')),
        };
        for name in names.split('|') {
            let named: Vec<_> =
                all.iter().filter(older).filter(|suite| name == "ALL" || is(suite, name)).copied().collect();
            chosen.retain(|suite| !named.contains(suite));
            if !leave_out {
                chosen.extend(named);
            }
        }
    }
    let cipher_suites = all.iter().filter(|suite| !older(suite)).copied().chain(chosen).collect();
    Arc::new(CryptoProvider { cipher_suites, ..CryptoProvider::clone(provider) })
}

fn is(suite: &SupportedCipherSuite, name: &str) -> bool {
    let suite = suite.suite();
    match name {
        "ECDHE-ECDSA-AES256-GCM-SHA384" => suite == CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        "ECDHE-ECDSA-AES128-GCM-SHA256" => suite == CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        "ECDHE-ECDSA-CHACHA20-POLY1305" => {
            suite == CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
        }
        "ECDHE-RSA-AES256-GCM-SHA384" => suite == CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        "ECDHE-RSA-AES128-GCM-SHA256" => suite == CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        "ECDHE-RSA-CHACHA20-POLY1305" => suite == CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(listed: &[&str]) -> Vec<CipherSuite> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let listed: Vec<_> = listed.iter().map(|name| (*name).to_owned()).collect();
        let restricted = restricted(&provider, &listed);
        restricted
            .cipher_suites
            .iter()
            .filter(|suite| suite.tls13().is_none())
            .map(|suite| suite.suite())
            .collect()
    }

    #[test]
    fn gw_06_cipher_suites_by_their_names() {
        use CipherSuite as Suite;
        assert_eq!(names(&[]).len(), 6);
        assert_eq!(names(&["ALL"]).len(), 6);
        assert_eq!(
            names(&["ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "AES128-SHA"]),
            [Suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, Suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384]
        );
        assert_eq!(names(&["[ECDHE-RSA-AES128-GCM-SHA256|ECDHE-RSA-CHACHA20-POLY1305]"]).len(), 2);
        assert_eq!(names(&["ALL", "!ECDHE-RSA-AES128-GCM-SHA256"]).len(), 5);
        assert!(names(&["NONE-SUCH"]).is_empty());
    }
}
