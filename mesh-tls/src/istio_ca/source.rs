//! Gets a certificate, and another one in time, for ever (PA-05, D10).
//!
//! Each certificate has a key of its own, P-256 as Istio's agent makes them when it is told to use elliptic curves, which
//! never leaves the process. It is renewed when half of its life is over, earlier by chance; its life is counted from when
//! it came, as Istio's agent does, since authorities date certificates back for clocks that differ. A new one is taken as
//! a whole with whom to believe, so no connection is dropped and no handshake sees half of it.
//!
//! While the authority is away, it is asked again with growing pauses, and the certificate is kept until its real end.
//! Then there is none: whoever demands one is refused by us, with a reason in our log, and not by its peer.
//!
//! What comes is judged before it is taken: the chain holds, is of our key, and says who we are.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::identity::SpiffeId;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;

use super::client::{CaClientError, IstioCa, Question, Sign};
use crate::bundle::TrustBundle;
use crate::certificate::Leaf;
use crate::clock::WallClock;
use crate::rotate::{pause, renew_at};
use crate::source::{CertSource, CertState, Identity, Material, Materials};
use crate::verifier::believable;

/// For how long certificates are asked for, as Istio's `SECRET_TTL`.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// The longest pause between two questions while there is no certificate at all.
const LONGEST_WITHOUT: Duration = Duration::from_secs(15);

/// The shortest pause between two certificates, however short they live.
const SHORTEST: Duration = Duration::from_millis(100);

/// Certificates from an authority.
#[derive(Debug)]
pub struct IstioCaSource<S = IstioCa> {
    signer: S,
    id: SpiffeId,
    lifetime: Duration,
    provider: Arc<CryptoProvider>,
    clock: WallClock,
    chance: StdRng,
    state: watch::Sender<CertState>,
}

impl<S: Sign> IstioCaSource<S> {
    /// Asks `signer` for certificates of `id`.
    #[must_use]
    pub fn new(signer: S, id: SpiffeId, provider: Arc<CryptoProvider>) -> Self {
        Self {
            signer,
            id,
            lifetime: LIFETIME,
            provider,
            clock: WallClock::default(),
            chance: StdRng::seed_from_u64(rand::random()),
            state: watch::Sender::default(),
        }
    }

    /// Asks for certificates that live so long; an authority may give shorter ones. Default 24 h, as Istio.
    #[must_use]
    pub const fn lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// Reads the time here, and draws chances from this seed. Default the system's.
    #[must_use]
    pub fn simulated(mut self, clock: WallClock, seed: u64) -> Self {
        self.clock = clock;
        self.chance = StdRng::seed_from_u64(seed);
        self
    }

    /// How it stands, now and later.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<CertState> {
        self.state.subscribe()
    }

    async fn renew(&self, current: &Material) -> Result<Material, CaClientError> {
        let internal =
            |error: rcgen::Error| CaClientError::Answer(format!("no request can be made: {error}"));
        let key = KeyPair::generate().map_err(internal)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(self.id.as_str().try_into().map_err(internal)?)];
        let csr = params.serialize_request(&key).and_then(|request| request.pem()).map_err(internal)?;
        let chain = self.signer.sign(Question::new(&csr, self.lifetime, current)).await?;
        self.judge(&chain, &key).map_err(CaClientError::Answer)
    }

    /// What an answer is to handshakes.
    fn judge(&self, answer: &[String], key: &KeyPair) -> Result<Material, String> {
        let [chain @ .., roots] = answer else { return Err("it is empty".to_owned()) };
        let certificates = |pem: &str| {
            CertificateDer::pem_slice_iter(pem.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|_| "it is no PEM".to_owned())
        };
        let mut roots = certificates(roots)?;
        let mut own = Vec::new();
        for certificate in chain.iter().map(|pem| certificates(pem)).collect::<Result<Vec<_>, _>>()?.concat()
        {
            let leaf = Leaf::read(&certificate).map_err(|error| error.to_string())?;
            // istiod writes each certificate by itself, so that of several roots only one is the last.
            let list = if leaf.is_ca && leaf.is_self_issued { &mut roots } else { &mut own };
            list.push(certificate);
        }
        let der = PrivatePkcs8KeyDer::from(key.serialize_der());
        let identity = Identity::new(own, der.into(), &self.provider).map_err(|error| error.to_string())?;
        if identity.spiffe_id() != Some(&self.id) {
            let found = identity.spiffe_id().map_or("nobody's", SpiffeId::as_str);
            return Err(format!(
                "the certificate is {found}, asked was for {}; trust domain, namespace and service account must be those \
                 of the token",
                self.id
            ));
        }
        let bundle = TrustBundle::new(roots).map_err(|error| format!("whom to believe: {error}"))?;
        let material = Material { identity: Some(identity), bundle: Arc::new(bundle) };
        believable(&material, &self.id, self.clock.now(), &self.provider)
            .map_err(|refusal| refusal.to_string())?;
        Ok(material)
    }

    /// Takes a certificate, and says when it has to be renewed.
    fn take(&mut self, material: Material, materials: &Materials) -> SystemTime {
        let now = self.clock.now();
        let ends = |identity: &Identity| (identity.not_before(), identity.not_after());
        let (begin, end) = material.identity.as_ref().map_or((now, now), ends);
        let next = renew_at(begin.max(now), end, self.chance.random()).max(now + SHORTEST);
        tracing::info!(
            id = %self.id,
            lives = ?end.duration_since(now).unwrap_or_default(),
            renewed_in = ?next.duration_since(now).unwrap_or_default(),
            "a certificate came from the authority"
        );
        materials.store(material);
        self.state.send_modify(|state| {
            *state =
                CertState { held_until: Some(end), received: state.received + 1, ..CertState::default() };
        });
        next
    }

    /// Notes that there was no answer, and says when to ask again.
    fn fail(&mut self, error: &CaClientError, end: Option<SystemTime>) -> SystemTime {
        let now = self.clock.now();
        let mut failures = 0;
        self.state.send_modify(|state| {
            state.failures = state.failures.saturating_add(1);
            state.last_error = Some(error.to_string());
            state.last_reason = Some(error.reason());
            failures = state.failures;
        });
        let left = end.and_then(|end| end.duration_since(now).ok()).unwrap_or_default();
        let mut wait = pause(failures, left, self.chance.random());
        if left.is_zero() {
            wait = wait.min(LONGEST_WITHOUT);
            tracing::error!(
                id = %self.id, failures, again_in = ?wait,
                "no certificate, and whatever needs one is refused: {error}"
            );
        } else {
            tracing::warn!(
                id = %self.id, failures, again_in = ?wait, lives = ?left,
                "the certificate is not renewed and stays: {error}"
            );
        }
        now + wait
    }

    /// The certificate is over, and there is no other.
    fn withdraw(&self, materials: &Materials) {
        tracing::error!(id = %self.id, "the certificate has expired: whatever needs one is refused");
        materials.store(Material { identity: None, bundle: Arc::clone(&materials.load().bundle) });
        self.state.send_modify(|state| state.held_until = None);
    }
}

impl<S: Sign> CertSource for IstioCaSource<S> {
    async fn run(mut self, materials: Materials) {
        // The end of the certificate that came from here; another's is not ours to take away.
        let mut end: Option<SystemTime> = None;
        loop {
            let current = materials.load();
            let asked = tokio::select! {
                biased;
                asked = self.renew(&current) => Some(asked),
                () = async {
                    match end {
                        Some(end) => self.clock.wait_until(end).await,
                        None => std::future::pending().await,
                    }
                } => None,
            };
            let next = match asked {
                Some(Ok(material)) => {
                    end = material.identity.as_ref().map(Identity::not_after);
                    self.take(material, &materials)
                }
                Some(Err(error)) => self.fail(&error, end),
                // It expired while the authority let us wait.
                None => self.clock.now(),
            };
            if let Some(over) = end.filter(|end| *end <= next) {
                self.clock.wait_until(over).await;
                self.withdraw(&materials);
                end = None;
            }
            self.clock.wait_until(next).await;
        }
    }
}
