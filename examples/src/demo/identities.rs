//! Who the demo's workloads are: an authority that lives as long as the process, and a certificate for each.
//!
//! It does what `mesh-ca` and istiod do for real meshes, without a wire: short certificates, renewed when half of their life
//! is over, while connections live on. Nothing of it is ever written anywhere.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::identity::{SpiffeId, TrustDomain};
use mesh_tls::ca::Authority;
use mesh_tls::{Identity, Material, Materials, TrustBundle, rotate};
use rustls::crypto::CryptoProvider;

/// How long a certificate of the demo lives.
const LIFETIME: Duration = Duration::from_secs(60 * 60);

/// How long the authority does: longer than anybody watches a demo.
const AUTHORITY: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Whose service account is whose.
#[derive(Debug)]
pub struct Identities {
    authority: Authority,
    bundle: Arc<TrustBundle>,
    provider: Arc<CryptoProvider>,
    namespace: String,
    accounts: BTreeMap<String, Materials>,
}

impl Identities {
    /// An authority of `trust_domain`, and a first certificate for each of the service accounts of `namespace`.
    ///
    /// # Errors
    /// When a name is none of SPIFFE's, or the system gives no key; the words are for the user.
    pub fn new<'n>(
        trust_domain: &str,
        namespace: &str,
        accounts: impl IntoIterator<Item = &'n str>,
    ) -> Result<Self, String> {
        let domain: TrustDomain =
            trust_domain.parse().map_err(|error| format!("trust domain {trust_domain:?}: {error}"))?;
        let authority =
            Authority::new(domain, SystemTime::now(), AUTHORITY).map_err(|error| error.to_string())?;
        let bundle = TrustBundle::new([authority.root().clone()]).map_err(|error| error.to_string())?;
        let mut identities = Self {
            authority,
            bundle: Arc::new(bundle),
            provider: Arc::new(rustls::crypto::aws_lc_rs::default_provider()),
            namespace: namespace.to_owned(),
            accounts: BTreeMap::new(),
        };
        for account in accounts {
            let first = identities.issue(account)?;
            identities.accounts.insert(account.to_owned(), Materials::new(first));
        }
        Ok(identities)
    }

    /// What handshakes of a service account need; `None` for one that there is not.
    #[must_use]
    pub fn of(&self, account: &str) -> Option<&Materials> {
        self.accounts.get(account)
    }

    /// Renews every certificate in time, for ever.
    pub async fn renew(self: Arc<Self>) {
        loop {
            let next = self.accounts.iter().filter_map(|(account, materials)| {
                let material = materials.load();
                let identity = material.identity.as_ref()?;
                let at = rotate::renew_at(identity.not_before(), identity.not_after(), rand::random());
                Some((at, account, materials))
            });
            let Some((at, account, materials)) = next.min_by_key(|(at, ..)| *at) else { return };
            tokio::time::sleep(at.duration_since(SystemTime::now()).unwrap_or_default()).await;
            match self.issue(account) {
                Ok(material) => materials.store(material),
                Err(error) => {
                    tracing::error!(account, "the demo's authority: {error}");
                    tokio::time::sleep(rotate::LONGEST_PAUSE).await;
                }
            }
        }
    }

    fn issue(&self, account: &str) -> Result<Material, String> {
        let id = SpiffeId::workload(self.authority.trust_domain(), &self.namespace, account)
            .map_err(|error| format!("service account {account:?}: {error}"))?;
        let issued =
            self.authority.issue(&id, SystemTime::now(), LIFETIME).map_err(|error| error.to_string())?;
        let identity: Identity = issued.identity(&self.provider).map_err(|error| error.to_string())?;
        Ok(Material { identity: Some(identity), bundle: Arc::clone(&self.bundle) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn every_account_has_a_certificate_of_its_own_that_is_renewed() {
        let identities = Arc::new(Identities::new("cluster.local", "default", ["a", "b"]).unwrap());
        let id = |account: &str| {
            let material = identities.of(account).unwrap().load();
            let identity = material.identity.clone().unwrap();
            (identity.spiffe_id().unwrap().to_string(), identity.chain()[0].clone())
        };
        let (a, b) = (id("a"), id("b"));
        assert_eq!(a.0, "spiffe://cluster.local/ns/default/sa/a");
        assert_eq!(b.0, "spiffe://cluster.local/ns/default/sa/b");
        assert!(identities.of("c").is_none());
        let mut changes = identities.of("a").unwrap().changes();
        let trust = identities.of("a").unwrap().trust_generation();
        tokio::spawn(Arc::clone(&identities).renew());
        changes.changed().await.unwrap();
        let renewed = id("a");
        assert_eq!(renewed.0, a.0);
        assert_ne!(renewed.1, a.1);
        assert_eq!(identities.of("a").unwrap().trust_generation(), trust);
    }
}
