//! The certificates that configuration names: files, and secrets of Kubernetes.
//!
//! Each is read when a configuration names it, never by a worker, and followed from then on: handshakes have the
//! [`Materials`] and see what they are at the moment. What is missing is logged by its name, and taken when it comes.
//!
//! A secret is looked for among the configuration first, in the workload's namespace, and then below `--secret-dir`. What
//! a configuration brings is in force with it; a broken secret leaves what was there before.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_core::{Credential, CredentialFiles};
use mesh_tls::istio::Secrets;
use mesh_tls::source::{CertSource as _, FilesError, Following, IdentityFiles, SecretFiles};
use mesh_tls::{Credentials, Material, Materials, SecretData, TrustBundle};
use rustls::crypto::CryptoProvider;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

/// Where certificates are looked for.
#[derive(Clone, Debug)]
pub struct Places {
    /// The namespace of the workload, whose secrets are its own.
    pub namespace: String,
    /// The directory of secrets.
    pub secret_dir: Option<PathBuf>,
}

/// The credentials of one side, by what names them.
pub struct Known {
    provider: Arc<CryptoProvider>,
    runtime: Handle,
    places: Places,
    /// Whether those that name no authorities believe those of the system: clients do.
    system_roots: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    known: HashMap<Credential, Entry>,
    secrets: Arc<Secrets>,
}

struct Entry {
    materials: Materials,
    source: Source,
}

/// Where a credential is from.
enum Source {
    Files,
    Document(SecretData),
    Directory(AbortHandle),
    Nowhere,
}

impl Known {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(provider: Arc<CryptoProvider>, runtime: Handle, places: Places, system_roots: bool) -> Self {
        Self { provider, runtime, places, system_roots, state: Mutex::default() }
    }

    /// Takes the secrets of a configuration: for what is known already, and for what is named next.
    pub fn set_secrets(&self, secrets: &Arc<Secrets>) {
        let mut state = self.state();
        state.secrets = Arc::clone(secrets);
        for (credential, entry) in &mut state.known {
            if let Credential::Secret(name) = credential {
                self.find_secret(secrets, name, entry);
            }
        }
    }

    /// Every credential that is known, by what a user calls it.
    #[must_use]
    pub fn all(&self) -> Vec<(String, Materials)> {
        let state = self.state();
        let named = state.known.iter().map(|(credential, entry)| {
            let name = match credential {
                Credential::Files(files) => {
                    let names = [&files.certificate, &files.roots];
                    names.into_iter().find(|name| !name.is_empty()).map_or("system", |name| name).to_owned()
                }
                Credential::Secret(name) => self.named(name),
                _ => "mesh".to_owned(),
            };
            (name, entry.materials.clone())
        });
        let mut named: Vec<_> = named.collect();
        named.sort_by(|(one, _), (other, _)| one.cmp(other));
        named
    }

    /// Reads a credential, unless it is known, and follows it.
    pub fn prepare(&self, credential: &Credential) {
        let mut state = self.state();
        if state.known.contains_key(credential) {
            return;
        }
        let mut entry = Entry { materials: Materials::none(), source: Source::Nowhere };
        match credential {
            Credential::Files(files) => self.follow_files(files, &mut entry),
            Credential::Secret(name) => {
                let secrets = Arc::clone(&state.secrets);
                self.find_secret(&secrets, name, &mut entry);
                if matches!(entry.source, Source::Nowhere) {
                    tracing::error!("{}", self.missing(name));
                }
            }
            _ => return,
        }
        state.known.insert(credential.clone(), entry);
    }

    fn follow_files(&self, files: &CredentialFiles, entry: &mut Entry) {
        let fallback = if self.system_roots && files.roots.is_empty() {
            system_roots().map_err(|error| tracing::error!("{error}")).ok().map(Arc::new)
        } else {
            None
        };
        let (found, following) = identity_files(files).follow(Arc::clone(&self.provider), fallback);
        match found {
            Ok(material) => entry.materials.store(material),
            Err(error) => tracing::error!("handshakes that need these certificates will fail: {error}"),
        }
        self.follow(following, &entry.materials);
        entry.source = Source::Files;
    }

    /// Makes an entry be what the secret of this name is now.
    fn find_secret(&self, secrets: &Secrets, name: &str, entry: &mut Entry) {
        let Some(data) = secrets.find(name) else { return self.find_directory(name, entry) };
        if matches!(&entry.source, Source::Document(known) if *known == data) {
            return;
        }
        match data.material(&self.provider) {
            Ok(material) => entry.materials.store(material),
            Err(reason) => tracing::error!("{} is not taken: {reason}", self.named(name)),
        }
        if let Source::Directory(following) = &entry.source {
            following.abort();
        }
        entry.source = Source::Document(data);
    }

    fn find_directory(&self, name: &str, entry: &mut Entry) {
        if matches!(entry.source, Source::Directory(_)) {
            return;
        }
        let is_gone = matches!(entry.source, Source::Document(_));
        let files = self.places.secret_dir.as_deref().and_then(|dir| SecretFiles::new(dir, name));
        let Some(files) = files else {
            if is_gone {
                tracing::error!("{}", self.missing(name));
                entry.materials.store(Material::default());
            }
            entry.source = Source::Nowhere;
            return;
        };
        let (found, following) = files.follow(Arc::clone(&self.provider));
        entry.materials.store(match found {
            Ok(material) => material,
            Err(FilesError::NoSecret(_)) => {
                tracing::error!("{}", self.missing(name));
                Material::default()
            }
            Err(error) => {
                tracing::error!("{} is not taken: {error}", self.named(name));
                Material::default()
            }
        });
        entry.source = Source::Directory(self.follow(following, &entry.materials));
    }

    fn follow(&self, following: Following, materials: &Materials) -> AbortHandle {
        self.runtime.spawn(following.run(materials.clone())).abort_handle()
    }

    fn named(&self, name: &str) -> String {
        format!("Secret {}/{name}", self.places.namespace)
    }

    fn missing(&self, name: &str) -> String {
        let below = self.places.secret_dir.as_deref().map(|dir| format!(" nor below {}", dir.display()));
        format!(
            "{} is neither among the configuration{}: handshakes that need it will fail",
            self.named(name),
            below.unwrap_or_else(|| " nor in a --secret-dir".to_owned())
        )
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Credentials for Known {
    fn find(&self, credential: &Credential) -> Option<Materials> {
        self.state().known.get(credential).map(|entry| entry.materials.clone())
    }
}

impl std::fmt::Debug for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Known").field("places", &self.places).finish_non_exhaustive()
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
pub(crate) fn system_roots() -> Result<TrustBundle, String> {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "an authority of the system cannot be read");
    }
    TrustBundle::new(found.certs).map_err(|error| format!("the authorities of the system: {error}"))
}
