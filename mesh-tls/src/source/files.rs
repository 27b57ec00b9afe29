//! Certificates from files, which somebody else renews: cert-manager, an agent, Kubernetes' mounted secrets.
//!
//! What stands on disk is one unit: a certificate without its key, or with that of another, is not taken, and what was
//! taken before stays. So a rotation may write its files one after the other, or swap Kubernetes' `..data`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_core::istio::SourceFile;
use mesh_core::watch::{Watcher, read};
use rustls::crypto::CryptoProvider;

use super::{CertSource, Identity, InvalidIdentity, Material, Materials};
use crate::bundle::TrustBundle;
use crate::secret::SecretData;

/// The names that files of an identity have: certificate, key, authorities.
const NAMES: [[&str; 3]; 2] =
    [["cert-chain.pem", "key.pem", "root-cert.pem"], ["tls.crt", "tls.key", "ca.crt"]];

/// Revoked certificates beside them, where there are any.
const REVOKED: [&str; 2] = ["ca.crl", "crl.pem"];

/// Where the files are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdentityFiles {
    /// Our certificate with its intermediate ones; `None` when we show none.
    pub certificate: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// The authorities that are believed.
    pub roots: Option<PathBuf>,
    /// What they revoked.
    pub revoked: Option<PathBuf>,
}

/// Why files are not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    /// A file cannot be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A directory has no files of known names.
    #[error("{}: there is neither cert-chain.pem, key.pem and root-cert.pem nor tls.crt, tls.key and ca.crt", .0.display())]
    NoFiles(PathBuf),
    /// What is in a file is not sound.
    #[error("{}: {reason}", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: InvalidIdentity,
    },
    /// There is nothing of a secret.
    #[error("{}: there is no such secret", .0.display())]
    NoSecret(PathBuf),
    /// What is in a secret is not sound.
    #[error("{}: {reason}", .path.display())]
    Secret {
        /// Its directory.
        path: PathBuf,
        /// What is wrong with it; nothing of it is quoted.
        reason: String,
    },
    /// There is a certificate without a key, or the other way around.
    #[error("a certificate needs its key, and a key its certificate")]
    Half,
}

impl IdentityFiles {
    /// The files of a directory, by the names that Istio (`cert-chain.pem`, `key.pem`, `root-cert.pem`) or Kubernetes
    /// (`tls.crt`, `tls.key`, `ca.crt`) gives them; and `ca.crl` or `crl.pem`, where there is one.
    ///
    /// # Errors
    /// When there are none of either names.
    pub fn in_dir(dir: &Path) -> Result<Self, FilesError> {
        let found = NAMES.iter().find(|names| names.iter().all(|name| dir.join(name).exists()));
        let Some([certificate, key, roots]) = found else {
            return Err(FilesError::NoFiles(dir.to_owned()));
        };
        Ok(Self {
            certificate: Some(dir.join(certificate)),
            key: Some(dir.join(key)),
            roots: Some(dir.join(roots)),
            revoked: REVOKED.iter().map(|name| dir.join(name)).find(|path| path.exists()),
        })
    }

    /// Reads what is there, and goes on from it with [`CertSource::run`].
    ///
    /// # Errors
    /// When a file cannot be read, or what is in them does not go together.
    pub fn open(self, provider: Arc<CryptoProvider>) -> Result<(Material, Following), FilesError> {
        let read = read(&self.paths())?;
        let material = self.material(&read, &provider)?;
        Ok((material, Following { unit: Unit::Files(self), read, provider, fallback: None }))
    }

    /// [`open`](Self::open), for files that may come later: what is wrong with them now is for the log. Where they name
    /// no authorities, those of `fallback` are believed.
    pub fn follow(
        self,
        provider: Arc<CryptoProvider>,
        fallback: Option<Arc<TrustBundle>>,
    ) -> (Result<Material, FilesError>, Following) {
        Following::begin(Unit::Files(self), provider, fallback)
    }

    fn paths(&self) -> Vec<PathBuf> {
        [&self.certificate, &self.key, &self.roots, &self.revoked].into_iter().flatten().cloned().collect()
    }

    fn material(&self, files: &[SourceFile], provider: &CryptoProvider) -> Result<Material, FilesError> {
        let text = |path: &Option<PathBuf>| {
            let path = path.as_ref()?;
            let name = path.display().to_string();
            let file = files.iter().find(|file| *file.name == *name);
            Some((path.clone(), file.map_or(&[][..], |file| file.text.as_slice())))
        };
        let content = |path: PathBuf, reason: InvalidIdentity| FilesError::Content { path, reason };
        let identity = match (text(&self.certificate), text(&self.key)) {
            (None, None) => None,
            (Some((path, chain)), Some((_, key))) => {
                Some(Identity::from_pem(chain, key, provider).map_err(|reason| content(path, reason))?)
            }
            _ => return Err(FilesError::Half),
        };
        let mut bundle = match text(&self.roots) {
            None => TrustBundle::default(),
            Some((path, pem)) => TrustBundle::from_pem(pem).map_err(|reason| content(path, reason.into()))?,
        };
        if let Some((path, pem)) = text(&self.revoked) {
            bundle = bundle.with_crl_pem(pem).map_err(|reason| content(path, reason.into()))?;
        }
        Ok(Material { identity, bundle: Arc::new(bundle) })
    }
}

/// Where the files of a Kubernetes secret are: `DIR/NAME/KEY`, as a mounted volume has them, with the authorities in
/// `DIR/NAME-cacert` where they stand apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretFiles {
    own: PathBuf,
    authorities: PathBuf,
    within: PathBuf,
}

impl SecretFiles {
    /// The secret of this name below `dir`; `None` for a name that is not that of one directory.
    #[must_use]
    pub fn new(dir: &Path, name: &str) -> Option<Self> {
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
            return None;
        }
        Some(Self {
            own: dir.join(name),
            authorities: dir.join(SecretData::authorities_of(name)),
            within: dir.to_owned(),
        })
    }

    /// Reads what is there, and goes on from it with [`CertSource::run`]; the secret may come later.
    pub fn follow(self, provider: Arc<CryptoProvider>) -> (Result<Material, FilesError>, Following) {
        Following::begin(Unit::Secret(self), provider, None)
    }

    fn paths(&self) -> Vec<PathBuf> {
        [&self.own, &self.authorities]
            .iter()
            .flat_map(|dir| SecretData::KEYS.map(|key| dir.join(key)))
            .collect()
    }

    fn material(&self, files: &[SourceFile], provider: &CryptoProvider) -> Result<Material, FilesError> {
        let value = |dir: &Path, key: &str| {
            let name = dir.join(key).display().to_string();
            let file = files.iter().find(|file| *file.name == *name)?;
            (!file.text.is_empty()).then(|| file.text.clone())
        };
        let data = SecretData::read(|key| value(&self.own, key), |key| value(&self.authorities, key));
        if data == SecretData::default() {
            return Err(FilesError::NoSecret(self.own.clone()));
        }
        let broken = |reason| FilesError::Secret { path: self.own.clone(), reason };
        data.material(provider).map_err(broken)
    }
}

/// Files of which a content was taken, or will be.
#[derive(Debug)]
pub struct Following {
    unit: Unit,
    read: Vec<SourceFile>,
    provider: Arc<CryptoProvider>,
    fallback: Option<Arc<TrustBundle>>,
}

/// Files that are taken as one.
#[derive(Debug)]
enum Unit {
    Files(IdentityFiles),
    Secret(SecretFiles),
}

impl Unit {
    fn paths(&self) -> Vec<PathBuf> {
        match self {
            Self::Files(files) => files.paths(),
            Self::Secret(files) => files.paths(),
        }
    }

    /// What is watched. Directories of secrets come and go, and are seen from the one that they are in.
    fn watched(&self) -> Vec<PathBuf> {
        match self {
            Self::Files(files) => files.paths(),
            Self::Secret(files) => std::iter::once(files.within.clone()).chain(files.paths()).collect(),
        }
    }

    fn material(&self, files: &[SourceFile], provider: &CryptoProvider) -> Result<Material, FilesError> {
        match self {
            Self::Files(unit) => unit.material(files, provider),
            Self::Secret(unit) => unit.material(files, provider),
        }
    }
}

impl Following {
    fn begin(
        unit: Unit,
        provider: Arc<CryptoProvider>,
        fallback: Option<Arc<TrustBundle>>,
    ) -> (Result<Material, FilesError>, Self) {
        let there: Vec<_> = unit.paths().into_iter().filter(|path| path.exists()).collect();
        let following = |read| Self { unit, read, provider, fallback };
        match read(&there) {
            Ok(read) => {
                let following = following(read);
                (following.material(&following.read), following)
            }
            Err(error) => (Err(error.into()), following(Vec::new())),
        }
    }

    fn material(&self, files: &[SourceFile]) -> Result<Material, FilesError> {
        let mut material = self.unit.material(files, &self.provider)?;
        if material.bundle.roots().is_empty()
            && let Some(fallback) = &self.fallback
        {
            material.bundle = Arc::clone(fallback);
        }
        Ok(material)
    }
}

impl CertSource for Following {
    async fn run(self, materials: Materials) {
        let mut watcher = Watcher::new(self.unit.watched(), &self.read);
        loop {
            match self.material(&watcher.next().await) {
                Ok(material) => {
                    let until = material.identity.as_ref().map(Identity::not_after);
                    tracing::info!(?until, "certificates renewed from files");
                    materials.store(material);
                }
                Err(error @ FilesError::NoSecret(_)) => {
                    tracing::error!("certificates are gone: {error}");
                    materials.store(Material::default());
                }
                Err(error) => tracing::error!("certificates are not taken, those in force stay: {error}"),
            }
        }
    }
}
