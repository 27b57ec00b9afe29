//! Who the proxy is, and how its connections are secured: from the command line to what handshakes need.
//!
//! The identity is read before anything is compiled, because what can be enforced depends on it: with one, destinations
//! with an identity are called over mutual TLS and PeerAuthentication is enforced; without one, a demand for it is an
//! error that is said, and nothing goes out or comes in as plaintext in its place.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use mesh_core::config::Transport;
use mesh_core::{Credential, CredentialFiles, Slot, UpstreamTls};
use mesh_route::{Cluster, Shard};
use mesh_tls::source::{FilesError, IdentityFiles};
use mesh_tls::{Acceptor, Connector, Credentials, Inbound, InboundTls, Material, Materials, TrustBundle};
use rustls::crypto::CryptoProvider;
use tokio::runtime::Handle;

/// The identity of a proxy and the credentials of its clusters.
#[derive(Clone, Debug)]
pub struct Security {
    mesh: Materials,
    acceptor: Acceptor,
    connector: Connector,
    credentials: Arc<Known>,
    trust_domain: Option<String>,
}

impl Security {
    /// Reads the identity that is in `dir`, and follows its files; without a directory there is none. `trust_domain` is
    /// trusted beside that of the identity.
    ///
    /// # Errors
    /// When the files are missing, cannot be read, or do not go together; the words are for the user.
    pub fn new(dir: Option<&Path>, trust_domain: Option<&str>, runtime: &Handle) -> Result<Self, String> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mesh = match dir {
            None => Materials::none(),
            Some(dir) => {
                let opened = IdentityFiles::in_dir(dir).and_then(|files| files.open(Arc::clone(&provider)));
                let (material, following) =
                    opened.map_err(|error| format!("--identity-dir {}: {error}", dir.display()))?;
                let mesh = Materials::new(material);
                runtime.spawn(following.run(mesh.clone()));
                mesh
            }
        };
        let credentials = Arc::new(Known {
            provider: Arc::clone(&provider),
            runtime: runtime.clone(),
            known: Mutex::default(),
        });
        let acceptor =
            Acceptor::mutual(mesh.clone(), Arc::clone(&provider)).map_err(|error| error.to_string())?;
        let connector = Connector::new(mesh.clone(), provider)
            .credentials(Arc::clone(&credentials) as Arc<dyn Credentials>);
        let trust_domain = trust_domain.map(str::to_owned);
        let security = Self { mesh, acceptor, connector, credentials, trust_domain };
        security.set_trust_domains([]);
        Ok(security)
    }

    /// What the stacks of this process can do.
    #[must_use]
    pub fn transport(&self) -> Transport {
        let has_identity = self.mesh.load().identity.is_some();
        Transport { originates: true, terminates: has_identity, has_identity }
    }

    /// The materials of the mesh.
    #[must_use]
    pub fn mesh(&self) -> &Materials {
        &self.mesh
    }

    /// The state of a worker whose connections are secured as their clusters say.
    #[must_use]
    pub fn shard(&self) -> Arc<Shard> {
        Shard::securing_by(rand::random(), Arc::new(self.connector.clone()))
    }

    /// What ends TLS on inbound listeners.
    #[must_use]
    pub fn inbound(&self, modes: Slot<InboundTls>) -> Inbound {
        Inbound::new(self.acceptor.clone(), modes)
    }

    /// Believes workloads of these trust domains, and of our own.
    pub fn set_trust_domains(&self, named: impl IntoIterator<Item = String>) {
        let material = self.mesh.load();
        let own = material.identity.as_ref().and_then(|identity| identity.spiffe_id());
        let own = own.map(|id| id.trust_domain().to_owned());
        let all: BTreeSet<_> = own.into_iter().chain(self.trust_domain.clone()).chain(named).collect();
        self.mesh.set_trust_domains(all.into_iter().collect());
    }

    /// Reads the credentials that these clusters name, before requests need them, and follows their files.
    pub fn prepare(&self, clusters: &[Arc<Cluster>]) {
        for cluster in clusters {
            if let UpstreamTls::Tls(tls) = &cluster.spec().tls
                && tls.credential != Credential::Mesh
            {
                self.credentials.prepare(&tls.credential);
            }
        }
    }
}

/// Credentials of clusters by what names them. They are read when a configuration names them, never by a worker.
struct Known {
    provider: Arc<CryptoProvider>,
    runtime: Handle,
    known: Mutex<HashMap<Credential, Materials>>,
}

impl Known {
    fn prepare(&self, credential: &Credential) {
        if self.find(credential).is_some() {
            return;
        }
        match self.read(credential) {
            Ok(materials) => {
                self.known
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(credential.clone(), materials);
            }
            Err(reason) => {
                tracing::error!("connections that need these credentials will fail: {reason}");
            }
        }
    }

    fn read(&self, credential: &Credential) -> Result<Materials, String> {
        let Credential::Files(files) = credential else {
            return Err(format!("{credential:?} is not known here"));
        };
        let (material, following) = identity_files(files)
            .open(Arc::clone(&self.provider))
            .map_err(|error: FilesError| error.to_string())?;
        let material = if files.roots.is_empty() {
            Material { bundle: Arc::new(system_roots()?), ..material }
        } else {
            material
        };
        let materials = Materials::new(material);
        if !files.roots.is_empty() {
            self.runtime.spawn(following.run(materials.clone()));
        }
        Ok(materials)
    }
}

impl Credentials for Known {
    fn find(&self, credential: &Credential) -> Option<Materials> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(credential).cloned()
    }
}

impl std::fmt::Debug for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Known").finish_non_exhaustive()
    }
}

fn identity_files(files: &CredentialFiles) -> IdentityFiles {
    let path = |name: &str| (!name.is_empty()).then(|| PathBuf::from(name));
    IdentityFiles {
        certificate: path(&files.certificate),
        key: path(&files.key),
        roots: path(&files.roots),
        revoked: path(&files.revoked),
    }
}

/// The authorities that the system believes.
fn system_roots() -> Result<TrustBundle, String> {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "an authority of the system cannot be read");
    }
    TrustBundle::new(found.certs).map_err(|error| format!("the authorities of the system: {error}"))
}
