//! Identities from files: rotated one after the other, swapped as Kubernetes does, and broken.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_tls::Materials;
use mesh_tls::ca::{Authority, Issued};
use mesh_tls::source::{CertSource as _, IdentityFiles};

const HOUR: Duration = Duration::from_secs(3600);

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A directory that goes with the test.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mesh-tls-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn authority() -> Authority {
    Authority::new("cluster.local".parse().unwrap(), SystemTime::now(), 24 * HOUR).unwrap()
}

fn issue(ca: &Authority, name: &str) -> Issued {
    let id = format!("spiffe://cluster.local/ns/default/sa/{name}").parse().unwrap();
    ca.issue(&id, SystemTime::now(), HOUR).unwrap()
}

fn write(dir: &Path, ca: &Authority, issued: &Issued) {
    std::fs::write(dir.join("cert-chain.pem"), &issued.certificate.chain_pem).unwrap();
    std::fs::write(dir.join("key.pem"), issued.key_pem()).unwrap();
    std::fs::write(dir.join("root-cert.pem"), ca.root_pem()).unwrap();
}

fn who(materials: &Materials) -> Option<String> {
    let material = materials.load();
    Some(material.identity.as_ref()?.spiffe_id()?.service_account()?.to_owned())
}

#[test]
fn pa_05_names_of_istio_and_of_kubernetes() {
    let (dir, ca) = (Dir::new("names"), authority());
    let none = IdentityFiles::in_dir(&dir.0).unwrap_err().to_string();
    assert!(none.contains("cert-chain.pem") && none.contains("tls.crt"), "{none}");
    let issued = issue(&ca, "a");
    std::fs::write(dir.0.join("tls.crt"), &issued.certificate.chain_pem).unwrap();
    std::fs::write(dir.0.join("tls.key"), issued.key_pem()).unwrap();
    assert!(IdentityFiles::in_dir(&dir.0).is_err());
    std::fs::write(dir.0.join("ca.crt"), ca.root_pem()).unwrap();
    let material = IdentityFiles::in_dir(&dir.0).unwrap().open(provider()).unwrap().0;
    assert_eq!(who(&Materials::new(material)).as_deref(), Some("a"));
    write(&dir.0, &ca, &issue(&ca, "b"));
    let material = IdentityFiles::in_dir(&dir.0).unwrap().open(provider()).unwrap().0;
    assert_eq!(who(&Materials::new(material)).as_deref(), Some("b"));
}

#[test]
fn what_does_not_go_together_is_refused_with_the_name_of_the_file() {
    let (dir, ca) = (Dir::new("unsound"), authority());
    write(&dir.0, &ca, &issue(&ca, "a"));
    let files = IdentityFiles::in_dir(&dir.0).unwrap();
    let load = || files.clone().open(provider()).map(drop).map_err(|error| error.to_string());
    assert_eq!(load(), Ok(()));
    for (file, content, reason) in [
        ("key.pem", issue(&ca, "b").key_pem(), "does not fit the certificate"),
        ("key.pem", "no key".to_owned(), "PEM"),
        ("cert-chain.pem", String::new(), "no certificate"),
        ("root-cert.pem", String::new(), "no certificate"),
    ] {
        let path = dir.0.join(file);
        let before = std::fs::read(&path).unwrap();
        std::fs::write(&path, content).unwrap();
        let error = load().unwrap_err();
        assert!(error.contains(reason) && error.contains(".pem: "), "{file}: {error}");
        std::fs::write(&path, before).unwrap();
    }
    assert_eq!(load(), Ok(()));
}

#[tokio::test]
async fn pa_05_a_rotation_of_files_is_followed_and_half_of_one_is_not() {
    let (dir, ca) = (Dir::new("rotation"), authority());
    write(&dir.0, &ca, &issue(&ca, "first"));
    let files = IdentityFiles::in_dir(&dir.0).unwrap();
    let (material, following) = files.open(provider()).unwrap();
    let materials = Materials::new(material);
    let following = tokio::spawn(following.run(materials.clone()));
    let mut changes = materials.changes();
    // Between the two files they do not go together, and nothing is stored.
    let second = issue(&ca, "second");
    std::fs::write(dir.0.join("key.pem"), second.key_pem()).unwrap();
    std::fs::write(dir.0.join("cert-chain.pem"), &second.certificate.chain_pem).unwrap();
    tokio::time::timeout(Duration::from_secs(30), changes.changed()).await.unwrap().unwrap();
    assert_eq!((who(&materials).as_deref(), materials.generation()), (Some("second"), 2));
    following.abort();
}

#[tokio::test]
async fn pa_05_a_swap_of_a_mounted_secret_is_followed() {
    let (dir, ca) = (Dir::new("swap"), authority());
    let version = |name: &str| {
        let to = dir.0.join(format!("..{name}"));
        std::fs::create_dir_all(&to).unwrap();
        write(&to, &ca, &issue(&ca, name));
        to
    };
    let point = |to: &Path| {
        let link = dir.0.join("..data_tmp");
        std::os::unix::fs::symlink(to, &link).unwrap();
        std::fs::rename(&link, dir.0.join("..data")).unwrap();
    };
    point(&version("first"));
    for file in ["cert-chain.pem", "key.pem", "root-cert.pem"] {
        std::os::unix::fs::symlink(Path::new("..data").join(file), dir.0.join(file)).unwrap();
    }
    let files = IdentityFiles::in_dir(&dir.0).unwrap();
    let (material, following) = files.open(provider()).unwrap();
    let materials = Materials::new(material);
    let following = tokio::spawn(following.run(materials.clone()));
    let mut changes = materials.changes();
    let second = version("second");
    point(&second);
    tokio::time::timeout(Duration::from_secs(30), changes.changed()).await.unwrap().unwrap();
    assert_eq!(who(&materials).as_deref(), Some("second"));
    following.abort();
}
