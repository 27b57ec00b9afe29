//! Takes what the agent says for as long as it holds (PA-05, D10).
//!
//! Each message has all that holds from then on, and is taken or left as a whole: handshakes from then on have the new
//! certificate and the new authorities. No connection is dropped for a new certificate; authorities and revocation lists that
//! change reach those that are open, too. A message that says what was there before changes nothing.
//!
//! What comes is judged before it is taken, and by more than its signatures: the key is that of the certificate, the
//! certificate has one URI name, which is the identity that the message says, of our own trust domain, and peers that
//! believe the same as we do would believe it. What does not hold is logged, and what was there before stays.
//!
//! When the agent ends the call or is away, whatever it says for it, it is asked again with growing pauses that no two
//! workloads have alike, and the certificate is kept until its real end. Then there is none: whoever demands one is refused
//! by us, with a reason in our log, and not by its peer.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::identity::{SpiffeId, TrustDomain};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use tokio::sync::watch;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use super::client::{WorkloadApi, WorkloadApiError};
use super::message::{X509Svid, X509SvidResponse};
use crate::bundle::TrustBundle;
use crate::clock::WallClock;
use crate::rotate::pause;
use crate::source::{CertSource, CertState, Identity, Material, Materials};
use crate::verifier::believable;

/// The longest pause between two questions while there is no certificate at all.
const LONGEST_WITHOUT: Duration = Duration::from_secs(15);

/// Asks an agent: one on this machine, or one in a test.
pub trait Subscribe: Send + Sync + 'static {
    /// What it says.
    type Updates: Updates;

    /// Begins to listen.
    ///
    /// # Errors
    /// When the agent is away, or refuses.
    fn subscribe(&self) -> impl Future<Output = Result<Self::Updates, WorkloadApiError>> + Send;
}

/// What an agent says, message by message.
pub trait Updates: Send + 'static {
    /// Waits for the next message; `None` when there is none any more. Dropped before it is ready, it loses nothing.
    ///
    /// # Errors
    /// When the connection breaks off, or what comes is no such message. There is nothing after that.
    fn next(&mut self) -> impl Future<Output = Result<Option<X509SvidResponse>, WorkloadApiError>> + Send;
}

/// Which of the identities that a workload has is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SvidChoice {
    /// The first, which is the default one (Workload API §5.3).
    #[default]
    First,
    /// The first with this hint of the operator.
    Hint(String),
    /// The one of this name.
    Id(SpiffeId),
}

/// Certificates from the Workload API.
#[derive(Debug)]
pub struct SpiffeSource<S = WorkloadApi> {
    api: S,
    choice: SvidChoice,
    trust_domain: Option<TrustDomain>,
    provider: Arc<CryptoProvider>,
    clock: WallClock,
    chance: StdRng,
    state: watch::Sender<CertState>,
    held: Option<Held>,
    left_out: BTreeSet<String>,
}

/// What came from here last; another's is not ours to take away.
#[derive(Debug)]
struct Held {
    material: Material,
    end: SystemTime,
}

/// What becomes of the call.
enum Event<U> {
    Begun(Result<U, WorkloadApiError>),
    Said(Result<Option<X509SvidResponse>, WorkloadApiError>),
    Expired,
}

impl<S: Subscribe> SpiffeSource<S> {
    /// Takes the first identity that `api` gives.
    #[must_use]
    pub fn new(api: S, provider: Arc<CryptoProvider>) -> Self {
        Self {
            api,
            choice: SvidChoice::First,
            trust_domain: None,
            provider,
            clock: WallClock::default(),
            chance: StdRng::seed_from_u64(rand::random()),
            state: watch::Sender::default(),
            held: None,
            left_out: BTreeSet::new(),
        }
    }

    /// Takes another identity than the first.
    #[must_use]
    pub fn choose(mut self, choice: SvidChoice) -> Self {
        self.choice = choice;
        self
    }

    /// Takes identities of this trust domain alone. Default that of the first one that is taken.
    #[must_use]
    pub fn trust_domain(mut self, trust_domain: TrustDomain) -> Self {
        self.trust_domain = Some(trust_domain);
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

    /// What an answer is to handshakes, and whose it is.
    fn judge(&self, answer: X509SvidResponse) -> Result<(Held, SpiffeId), String> {
        let ids: Vec<_> = answer.svids.iter().map(|svid| printable(&svid.spiffe_id)).collect();
        let svid = answer.svids.into_iter().find(|svid| self.choice.is(svid)).ok_or_else(|| {
            let ids = if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
            format!("{}; there are: {ids}", self.choice.is_missing())
        })?;
        let named = printable(&svid.spiffe_id);
        let id: SpiffeId =
            svid.spiffe_id.parse().map_err(|error| format!("{named} is no SPIFFE ID: {error}"))?;
        if let Some(ours) = self.trust_domain.as_ref().filter(|ours| ours.as_str() != id.trust_domain()) {
            return Err(format!("{id} is not of the trust domain {ours}"));
        }
        let wrong = |what: &str, error: &dyn fmt::Display| format!("{what} of {id}: {error}");
        let chain = certificates(&svid.chain).map_err(|error| wrong("the certificate", &error))?;
        let identity = Identity::new(chain, svid.key.into(), &self.provider)
            .map_err(|error| wrong("the certificate", &error))?;
        let end = identity.not_after();
        let crls = answer.crls.into_iter().map(CertificateRevocationListDer::from);
        let bundle = certificates(&svid.bundle)
            .and_then(|roots| TrustBundle::new(roots).map_err(|error| error.to_string()))
            .and_then(|bundle| bundle.with_crls(crls).map_err(|error| error.to_string()))
            .map_err(|error| wrong("whom to believe", &error))?;
        let material = Material { identity: Some(identity), bundle: Arc::new(bundle) };
        believable(&material, &id, self.clock.now(), &self.provider)
            .map_err(|refusal| wrong("the certificate", &refusal))?;
        Ok((Held { material, end }, id))
    }

    /// Takes what holds from now on.
    fn take(&mut self, held: Held, id: &SpiffeId, materials: &Materials) {
        if self.trust_domain.is_none() {
            // What was read as the trust domain of an identity is one.
            self.trust_domain = id.trust_domain().parse().ok();
        }
        let left = held.end.duration_since(self.clock.now()).unwrap_or_default();
        let end = Some(held.end);
        let is_new = self.held.as_ref().is_none_or(|before| !before.is_same(&held));
        if is_new {
            let domains = materials.trust_domains();
            if !domains.iter().any(|domain| domain == id.trust_domain()) {
                let own = id.trust_domain().to_owned();
                materials.set_trust_domains(domains.iter().cloned().chain([own]).collect());
            }
            materials.store(held.material.clone());
            self.held = Some(held);
            tracing::info!(%id, lives = ?left, "a certificate came from the Workload API");
        }
        self.state.send_modify(|state| {
            let received = state.received + u64::from(is_new);
            *state = CertState { held_until: end, received, ..CertState::default() };
        });
    }

    /// Says once of each trust domain that its bundle is left out.
    fn leave_out(&mut self, foreign: impl Iterator<Item = String>) {
        for domain in foreign.map(|domain| printable(&domain)) {
            if self.left_out.len() < 1000 && self.left_out.insert(domain.clone()) {
                tracing::warn!(
                    trust_domain = domain,
                    "the federated bundle is left out: workloads of other trust domains are not believed"
                );
            }
        }
    }

    /// Notes that there is nothing that can be taken, and says how long to wait before the agent is asked again.
    fn fail(&mut self, error: &WorkloadApiError) -> Duration {
        let mut failures = 0;
        self.state.send_modify(|state| {
            state.failures = state.failures.saturating_add(1);
            state.last_error = Some(error.to_string());
            state.last_reason = Some("the Workload API gives no identity");
            failures = state.failures;
        });
        let end = self.held.as_ref().map(|held| held.end);
        let left = end.and_then(|end| end.duration_since(self.clock.now()).ok()).unwrap_or_default();
        let wait = pause(failures, left, self.chance.random());
        if left.is_zero() {
            tracing::error!(failures, "no certificate, and whatever needs one is refused: {error}");
            return wait.min(LONGEST_WITHOUT);
        }
        tracing::warn!(failures, lives = ?left, "the certificate that there is stays: {error}");
        wait
    }

    /// The certificate is over, and there is no other.
    fn withdraw(&mut self, materials: &Materials) {
        self.held = None;
        tracing::error!("the certificate has expired: whatever needs one is refused");
        materials.store(Material { identity: None, bundle: Arc::clone(&materials.load().bundle) });
        self.state.send_modify(|state| state.held_until = None);
    }

    async fn event(&self, updates: &mut Option<S::Updates>, next: SystemTime) -> Event<S::Updates> {
        let said = async {
            match updates {
                Some(updates) => Event::Said(updates.next().await),
                None => {
                    self.clock.wait_until(next).await;
                    Event::Begun(self.api.subscribe().await)
                }
            }
        };
        let expired = async {
            match &self.held {
                Some(held) => self.clock.wait_until(held.end).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            said = said => said,
            () = expired => Event::Expired,
        }
    }
}

impl<S: Subscribe> CertSource for SpiffeSource<S> {
    async fn run(mut self, materials: Materials) {
        let mut updates = None;
        let mut next = self.clock.now();
        loop {
            let failed = match self.event(&mut updates, next).await {
                Event::Begun(Ok(begun)) => {
                    updates = Some(begun);
                    continue;
                }
                Event::Said(Ok(Some(mut answer))) => {
                    let foreign = std::mem::take(&mut answer.federated_bundles);
                    match self.judge(answer) {
                        Ok((held, id)) => {
                            self.take(held, &id, &materials);
                            self.leave_out(foreign.into_keys());
                        }
                        // The agent is there, and its next message may be better.
                        Err(reason) => drop(self.fail(&WorkloadApiError::Answer(reason))),
                    }
                    continue;
                }
                Event::Expired => {
                    self.withdraw(&materials);
                    continue;
                }
                Event::Said(Ok(None)) => WorkloadApiError::Answer("it has ended".to_owned()),
                Event::Begun(Err(error)) | Event::Said(Err(error)) => error,
            };
            updates = None;
            let wait = self.fail(&failed);
            next = self.clock.now() + wait;
        }
    }
}

impl SvidChoice {
    fn is(&self, svid: &X509Svid) -> bool {
        match self {
            Self::First => true,
            Self::Hint(hint) => *hint == svid.hint,
            Self::Id(id) => id.as_str() == svid.spiffe_id,
        }
    }

    /// That there is none of it.
    fn is_missing(&self) -> String {
        match self {
            Self::First => "there is no identity".to_owned(),
            Self::Hint(hint) => format!("no identity has the hint {hint:?}"),
            Self::Id(id) => format!("{id} is not among the identities"),
        }
    }
}

impl Held {
    fn is_same(&self, other: &Self) -> bool {
        let chain = |held: &Self| held.material.identity.as_ref().map(|identity| identity.chain().to_vec());
        chain(self) == chain(other) && self.material.bundle.is_same(&other.material.bundle)
    }
}

/// Certificates in DER that stand one after the other.
fn certificates(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut all = Vec::new();
    while !der.is_empty() {
        let (rest, _) = X509Certificate::from_der(der).map_err(|_| "it cannot be read".to_owned())?;
        all.push(CertificateDer::from(der[..der.len() - rest.len()].to_vec()));
        der = rest;
    }
    Ok(all)
}

/// What the agent wrote, for a log: bounded, and without control characters.
fn printable(text: &str) -> String {
    text.chars().take(256).flat_map(char::escape_debug).collect()
}
