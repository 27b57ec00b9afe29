//! What a connection to a server stands on: the server's certificates, and our own name, by what is trusted now (D9).
//!
//! All connections to one server share one [`Met`], so that its certificates are judged once for each change of trust, by
//! whoever asks first; everybody else compares two integers.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use mesh_core::identity::SpiffeId;
use mesh_core::{ClientTls, Standing};
use rustls::pki_types::CertificateDer;

use crate::source::{Identity, Materials};
use crate::verifier::PeerVerifier;

/// The bit of a verdict that says no.
const FALLEN: u64 = 1 << 63;

/// A server that was met, as whom, and by which rule.
pub(crate) struct Met {
    own: Materials,
    /// As whom we met it.
    name: Option<SpiffeId>,
    chain: Vec<CertificateDer<'static>>,
    verifier: Option<PeerVerifier>,
    /// The generation of trust that it was judged by, and whether it fell.
    verdict: AtomicU64,
}

impl Standing for Met {
    fn holds(&self) -> bool {
        let trust = self.own.trust_generation();
        let verdict = self.verdict.load(Ordering::Relaxed);
        if verdict & !FALLEN == trust {
            return verdict & FALLEN == 0;
        }
        let fallen = self.judge();
        if let Err(reason) = &fallen {
            tracing::info!("connections to a server are given up: {reason}");
        }
        self.verdict.store(trust | if fallen.is_err() { FALLEN } else { 0 }, Ordering::Relaxed);
        fallen.is_ok()
    }

    fn is_judged(&self) -> bool {
        self.verdict.load(Ordering::Relaxed) & !FALLEN == self.own.trust_generation()
    }
}

impl Met {
    fn judge(&self) -> Result<(), String> {
        if name(&self.own) != self.name {
            return Err("they were made under another name".to_owned());
        }
        let Some(verifier) = &self.verifier else { return Ok(()) };
        verifier.judge_server_again(&self.chain, SystemTime::now()).map_err(|refusal| refusal.to_string())
    }
}

impl fmt::Debug for Met {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Met").field("name", &self.name).finish_non_exhaustive()
    }
}

fn name(own: &Materials) -> Option<SpiffeId> {
    own.load().identity.as_ref().and_then(Identity::spiffe_id).cloned()
}

/// A handshake that is about to begin: as whom, and by what trust.
pub(crate) struct Begun {
    own: Materials,
    name: Option<SpiffeId>,
    trust: u64,
}

impl Begun {
    pub(crate) fn with(own: &Materials) -> Self {
        // Trust first: what changes from here on makes what is met be judged again.
        let trust = own.trust_generation();
        Self { own: own.clone(), name: name(own), trust }
    }
}

/// The servers that there are connections to.
#[derive(Default)]
pub(crate) struct Acquaintances(Mutex<Servers>);

#[derive(Default)]
struct Servers {
    known: HashMap<Key, Weak<Met>>,
    /// How many there may be before those that are gone are looked for.
    most: usize,
}

type Key = (ClientTls, Option<SpiffeId>, Vec<CertificateDer<'static>>);

impl Acquaintances {
    /// The server that was met by `tls` and showed `chain`, which `verifier` judged; `None` asked nothing of it.
    pub(crate) fn meet(
        &self,
        begun: Begun,
        tls: &ClientTls,
        chain: Vec<CertificateDer<'static>>,
        verifier: Option<PeerVerifier>,
    ) -> Arc<Met> {
        let key = (tls.clone(), begun.name.clone(), chain);
        let mut servers = self.lock();
        // Files that are named anew are other materials under the same name.
        let known = servers.known.get(&key).and_then(Weak::upgrade).filter(|met| met.own.is(&begun.own));
        if let Some(met) = known {
            return met;
        }
        if servers.known.len() >= servers.most {
            servers.known.retain(|_, met| met.strong_count() > 0);
            servers.most = (servers.known.len() * 2).max(64);
        }
        let met = Arc::new(Met {
            own: begun.own,
            name: begun.name,
            chain: key.2.clone(),
            verifier,
            verdict: AtomicU64::new(begun.trust),
        });
        servers.known.insert(key, Arc::downgrade(&met));
        met
    }

    fn lock(&self) -> MutexGuard<'_, Servers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::TrustBundle;
    use crate::ca::Authority;
    use crate::source::Material;
    use crate::verifier::PeerRule;

    const HOUR: Duration = Duration::from_secs(3600);

    fn authority() -> Authority {
        Authority::new("cluster.local".parse().unwrap(), SystemTime::now(), 24 * HOUR).unwrap()
    }

    fn material(ca: &Authority, name: &str, roots: &[&Authority]) -> Material {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let id = format!("spiffe://cluster.local/ns/a/sa/{name}").parse().unwrap();
        let identity = ca.issue(&id, SystemTime::now(), HOUR).unwrap().identity(&provider).unwrap();
        let bundle = TrustBundle::new(roots.iter().map(|ca| ca.root().clone())).unwrap();
        Material { identity: Some(identity), bundle: Arc::new(bundle) }
    }

    #[test]
    fn d9_a_server_is_judged_once_for_each_change_of_trust() {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let (a, b) = (authority(), authority());
        let own = Materials::new(material(&a, "me", &[&a]));
        let issued =
            a.issue(&"spiffe://cluster.local/ns/a/sa/server".parse().unwrap(), SystemTime::now(), HOUR);
        let chain = issued.unwrap().certificate.chain;
        let verifier = || {
            let rule = PeerRule::Svid { trust_domains: None, any_of: Vec::new() };
            Some(PeerVerifier::new(own.clone(), Arc::clone(&provider), rule))
        };
        let servers = Acquaintances::default();
        let tls = ClientTls::default();
        let meet = || servers.meet(Begun::with(&own), &tls, chain.clone(), verifier());
        let (met, again) = (meet(), meet());
        assert!(Arc::ptr_eq(&met, &again), "one for all connections to it");
        assert!(met.is_judged() && met.holds());
        // A renewed certificate of our own changes nothing.
        own.store(material(&a, "me", &[&a]));
        assert!(met.is_judged());
        own.store(material(&a, "me", &[&a, &b]));
        assert!(!met.is_judged() && met.holds() && met.is_judged());
        own.store(material(&b, "me", &[&b]));
        assert!(!again.holds() && !again.holds() && again.is_judged());
        // Whoever is trusted again is.
        own.store(material(&a, "me", &[&a]));
        assert!(met.holds());
        // Under another name it would be another connection.
        own.store(material(&a, "other", &[&a]));
        assert!(!met.holds());
        assert!(!Arc::ptr_eq(&met, &meet()) && meet().holds());
    }
}
