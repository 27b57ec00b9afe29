//! What a secret of Kubernetes has for handshakes (GW-05).
//!
//! Istio takes two forms: that of `kubernetes.io/tls` (`tls.crt`, `tls.key`, `ca.crt`) and a generic one (`cert`, `key`,
//! `cacert`), which comes first. Authorities may stand in a secret of their own, `NAME-cacert`, which then counts alone;
//! `ca.crl`, what they revoked, stands beside them. Whether it comes from a document or from a directory of files is the
//! caller's business. Nothing here is ever printed.

use std::fmt;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;

use crate::bundle::{InvalidBundle, TrustBundle};
use crate::source::{Identity, InvalidIdentity, Material};

/// The values of a secret that handshakes need, in PEM.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SecretData {
    certificate: Option<Vec<u8>>,
    key: Option<Vec<u8>>,
    roots: Option<Vec<u8>>,
    revoked: Option<Vec<u8>>,
}

impl SecretData {
    /// The keys of a secret that are read.
    pub const KEYS: [&str; 7] = ["cert", "key", "cacert", "tls.crt", "tls.key", "ca.crt", "ca.crl"];

    /// The name of the secret with the authorities for another.
    #[must_use]
    pub fn authorities_of(name: &str) -> String {
        format!("{name}-cacert")
    }

    /// Reads a secret by `own`, and the one with its authorities by `authorities`; either may have nothing.
    #[must_use]
    pub fn read(
        own: impl Fn(&str) -> Option<Vec<u8>>,
        authorities: impl Fn(&str) -> Option<Vec<u8>>,
    ) -> Self {
        let (certificate, key) = match (own("cert"), own("key")) {
            (None, None) => (own("tls.crt"), own("tls.key")),
            generic => generic,
        };
        let apart = authorities("cacert").or_else(|| authorities("ca.crt"));
        let revoked = if apart.is_some() { authorities("ca.crl") } else { own("ca.crl") };
        let roots = apart.or_else(|| own("cacert")).or_else(|| own("ca.crt"));
        Self { certificate, key, roots, revoked }
    }

    /// What it is to handshakes. A secret may have authorities alone.
    ///
    /// # Errors
    /// When its parts cannot be read or do not go together, in words that quote nothing of it.
    pub fn material(&self, provider: &CryptoProvider) -> Result<Material, String> {
        self.read_material(provider).map_err(|error| match error {
            InvalidIdentity::Pem(_) => "the certificate or the key is no PEM".to_owned(),
            InvalidIdentity::Bundle(InvalidBundle::Pem(_)) => "the authorities are no PEM".to_owned(),
            other => other.to_string(),
        })
    }

    fn read_material(&self, provider: &CryptoProvider) -> Result<Material, InvalidIdentity> {
        let identity = match (&self.certificate, &self.key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some(Identity::from_pem(certificate, key, provider)?),
            _ => return Err(InvalidIdentity::Half),
        };
        let mut bundle = match &self.roots {
            None => TrustBundle::default(),
            Some(roots) => TrustBundle::from_pem(roots)?,
        };
        if let Some(revoked) = &self.revoked {
            bundle = bundle.with_crl_pem(revoked)?;
        }
        Ok(Material { identity, bundle: Arc::new(bundle) })
    }
}

impl fmt::Debug for SecretData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretData").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(value: &Option<Vec<u8>>) -> Option<&str> {
        value.as_deref().map(|value| std::str::from_utf8(value).unwrap())
    }

    fn read(own: &[&str], authorities: &[&str]) -> SecretData {
        let of = |keys: &[&str], prefix: &str, key: &str| {
            keys.contains(&key).then(|| format!("{prefix}/{key}").into_bytes())
        };
        SecretData::read(|key| of(own, "own", key), |key| of(authorities, "ca", key))
    }

    #[test]
    fn gw_05_the_keys_of_secrets() {
        let all = SecretData::KEYS;
        let data = read(&all, &[]);
        assert_eq!((text(&data.certificate), text(&data.key)), (Some("own/cert"), Some("own/key")));
        assert_eq!((text(&data.roots), text(&data.revoked)), (Some("own/cacert"), Some("own/ca.crl")));
        let tls = read(&["tls.crt", "tls.key", "ca.crt"], &[]);
        assert_eq!((text(&tls.certificate), text(&tls.key)), (Some("own/tls.crt"), Some("own/tls.key")));
        assert_eq!((text(&tls.roots), text(&tls.revoked)), (Some("own/ca.crt"), None));
        // Authorities of their own count alone, with what they revoked.
        let apart = read(&all, &["ca.crt"]);
        assert_eq!((text(&apart.roots), text(&apart.revoked)), (Some("ca/ca.crt"), None));
    }

    #[test]
    fn nothing_of_a_secret_is_printed() {
        let data = read(&SecretData::KEYS, &[]);
        assert_eq!(format!("{data:?}"), "SecretData { .. }");
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let broken = SecretData::read(|key| Some(format!("hunter2 {key}").into_bytes()), |_| None);
        let words = broken.material(&provider).unwrap_err();
        assert!(!words.contains("hunter2"), "{words}");
        assert!(read(&["tls.crt"], &[]).material(&provider).unwrap_err().contains("needs its key"));
        assert!(read(&[], &[]).material(&provider).unwrap().identity.is_none());
    }
}
