//! Where certificates come from, and how they change without a connection being dropped.
//!
//! Everything that a handshake needs of the outside is one [`Material`]: our certificate with its key, and whom to
//! believe. It lives in a [`Materials`], which whoever rotates it swaps as a whole; a handshake reads it once, when it
//! needs it. So a rotation rebuilds no configuration of rustls, new connections have the new certificate, and old ones
//! live on. There is no session to resume, so nothing verified under an old bundle is believed under a new one.
//!
//! A change of *trust* is another thing than a renewed certificate: other authorities, revocations, or trust domains, or
//! another name of our own. It is counted by itself ([`Materials::trust_generation`]), and makes open connections be
//! judged again; a certificate that is renewed every minute does not.

#[cfg(feature = "files")]
mod files;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use mesh_core::identity::SpiffeId;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;

use crate::bundle::{InvalidBundle, TrustBundle};
use crate::certificate::Leaf;

#[cfg(feature = "files")]
pub use self::files::{FilesError, Following, IdentityFiles, SecretFiles};

/// A certificate of our own with its key.
#[derive(Clone, Debug)]
pub struct Identity {
    key: Arc<CertifiedKey>,
    spiffe_id: Option<SpiffeId>,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// What handshakes need of the outside, as of one moment.
#[derive(Clone, Debug, Default)]
pub struct Material {
    /// Who we are; `None` when nothing says it yet.
    pub identity: Option<Identity>,
    /// Whom to believe.
    pub bundle: Arc<TrustBundle>,
}

/// The [`Material`] of a process, shared by all who shake hands. Cloning shares it.
#[derive(Clone)]
pub struct Materials(Arc<Shared>);

struct Shared {
    now: ArcSwap<Material>,
    trust_domains: ArcSwap<Vec<String>>,
    generation: watch::Sender<u64>,
    /// How often trust changed, read without a lock, and told.
    trust: AtomicU64,
    trusted: watch::Sender<u64>,
}

/// Where certificates come from.
pub trait CertSource: Send + 'static {
    /// Stores what there is whenever it is not what was there before, for ever. What cannot be taken is logged, and what
    /// was stored before stays for as long as it is good for anything.
    fn run(self, materials: Materials) -> impl Future<Output = ()> + Send;
}

/// How it stands with a certificate that is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CertState {
    /// Until when the certificate that there is lives; `None` when there is none.
    pub held_until: Option<SystemTime>,
    /// Certificates that came so far.
    pub received: u64,
    /// Questions in a row that had no answer that could be taken.
    pub failures: u32,
    /// Why the last one had none.
    pub last_error: Option<String>,
    /// The same without files and addresses, for those who need not know them.
    pub last_reason: Option<&'static str>,
}

/// Why a certificate and its key are not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidIdentity {
    /// Text is no PEM, or lacks a part.
    #[error("the PEM cannot be read: {0}")]
    Pem(rustls::pki_types::pem::Error),
    /// There is no certificate.
    #[error("there is no certificate")]
    NoCertificate,
    /// The certificate cannot be read.
    #[error(transparent)]
    Certificate(#[from] crate::certificate::Malformed),
    /// The key cannot be used, or is that of another certificate.
    #[error("the key does not fit the certificate: {0}")]
    Key(rustls::Error),
    /// There is a certificate without its key, or a key without its certificate.
    #[error("a certificate needs its key, and a key its certificate")]
    Half,
    /// The authorities cannot be read.
    #[error("the authorities: {0}")]
    Bundle(#[from] InvalidBundle),
}

impl Identity {
    /// The identity of a chain, its own certificate first, and its key.
    ///
    /// # Errors
    /// When there is no certificate, it cannot be read, or the key is not its own.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        provider: &CryptoProvider,
    ) -> Result<Self, InvalidIdentity> {
        let leaf = Leaf::read(chain.first().ok_or(InvalidIdentity::NoCertificate)?)?;
        let key = CertifiedKey::from_der(chain, key, provider).map_err(InvalidIdentity::Key)?;
        let spiffe_id = match leaf.uri_sans.as_slice() {
            [one] => one.parse().ok(),
            _ => None,
        };
        Ok(Self { key: Arc::new(key), spiffe_id, not_before: leaf.not_before, not_after: leaf.not_after })
    }

    /// The identity of a chain and a key in PEM.
    ///
    /// # Errors
    /// As [`Identity::new`], and when the text is no PEM.
    pub fn from_pem(chain: &[u8], key: &[u8], provider: &CryptoProvider) -> Result<Self, InvalidIdentity> {
        let chain = CertificateDer::pem_slice_iter(chain).collect::<Result<Vec<_>, _>>();
        let key = PrivateKeyDer::from_pem_slice(key).map_err(InvalidIdentity::Pem)?;
        Self::new(chain.map_err(InvalidIdentity::Pem)?, key, provider)
    }

    /// Who we are, where the certificate says it in the form of SPIFFE.
    #[must_use]
    pub fn spiffe_id(&self) -> Option<&SpiffeId> {
        self.spiffe_id.as_ref()
    }

    /// When the certificate begins.
    #[must_use]
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// When the certificate ends.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The chain that peers are shown, our own certificate first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    pub(crate) fn key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.key)
    }
}

impl Materials {
    /// What there is to begin with.
    #[must_use]
    pub fn new(material: Material) -> Self {
        let own = material.identity.as_ref().and_then(Identity::spiffe_id);
        let own = own.map(|id| id.trust_domain().to_owned());
        Self(Arc::new(Shared {
            trust_domains: ArcSwap::from_pointee(own.into_iter().collect()),
            now: ArcSwap::from_pointee(material),
            generation: watch::Sender::new(1),
            trust: AtomicU64::new(1),
            trusted: watch::Sender::new(1),
        }))
    }

    /// The trust domains whose workloads are believed. Until they are set, that of the identity there was at first.
    #[must_use]
    pub fn trust_domains(&self) -> Arc<Vec<String>> {
        self.0.trust_domains.load_full()
    }

    /// Believes workloads of these trust domains: the mesh's own and its aliases.
    pub fn set_trust_domains(&self, trust_domains: Vec<String>) {
        if **self.0.trust_domains.load() != trust_domains {
            self.0.trust_domains.store(Arc::new(trust_domains));
            self.changed(true);
        }
    }

    /// Nobody is anybody, and nobody is believed.
    #[must_use]
    pub fn none() -> Self {
        Self::new(Material::default())
    }

    /// What handshakes use now.
    #[must_use]
    pub fn load(&self) -> Arc<Material> {
        self.0.now.load_full()
    }

    /// Gives handshakes from now on something else.
    pub fn store(&self, material: Material) {
        let next = Arc::new(material);
        let before = self.0.now.swap(Arc::clone(&next));
        let is_same = Arc::ptr_eq(&before.bundle, &next.bundle) || before.bundle.is_same(&next.bundle);
        let name = |material: &Material| material.identity.as_ref()?.spiffe_id().cloned();
        self.changed(!is_same || name(&before) != name(&next));
    }

    fn changed(&self, trust: bool) {
        if trust {
            // The number first: whoever is told finds it changed.
            let generation = self.0.trust.fetch_add(1, Ordering::AcqRel) + 1;
            self.0.trusted.send_modify(|told| *told = (*told).max(generation));
        }
        self.0.generation.send_modify(|generation| *generation += 1);
    }

    /// Whether both are the same, not only alike.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// How often trust changed, beginning with 1: authorities, revocations, trust domains, our own name. One atomic read.
    #[must_use]
    pub fn trust_generation(&self) -> u64 {
        self.0.trust.load(Ordering::Acquire)
    }

    /// Hears of changes of trust.
    #[must_use]
    pub fn trust_changes(&self) -> watch::Receiver<u64> {
        self.0.trusted.subscribe()
    }

    /// How often it changed, beginning with 1.
    #[must_use]
    pub fn generation(&self) -> u64 {
        *self.0.generation.borrow()
    }

    /// Hears of changes.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.generation.subscribe()
    }
}

impl fmt::Debug for Materials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Materials").field("generation", &self.generation()).finish_non_exhaustive()
    }
}
