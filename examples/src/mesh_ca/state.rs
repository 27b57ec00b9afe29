//! What `mesh-ca` has on disk: one directory that nobody else may look into.
//!
//! `state.json` has the keys and where a rotation stands, as one unit. It is replaced by a rename after everything of it
//! is on the disk, so that whoever reads it, or comes back after a crash, sees one state or the other. Whoever changes it
//! holds a lock while it reads, changes and writes; so `mesh-ca rotate` and a running `mesh-ca` do not lose each other's
//! changes. `root-cert.pem` is made of it, for those who are to believe the authority.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mesh_core::identity::TrustDomain;
use mesh_tls::ca::{Authorities, Authority};
use serde_json::{Value, json};

/// The form of `state.json`.
const VERSION: u64 = 1;

/// A file larger than this is not one of ours.
const MAX_FILE: u64 = 16 * 1024 * 1024;

/// The directory.
#[derive(Clone, Debug)]
pub(super) struct State {
    dir: PathBuf,
}

/// Whether a file is still the one that was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stamp(Option<(u64, i64, i64, u64)>);

impl Stamp {
    pub(super) fn of(path: &Path) -> Self {
        let stamp = |file: fs::Metadata| (file.ino(), file.mtime(), file.mtime_nsec(), file.len());
        Self(fs::metadata(path).ok().map(stamp))
    }
}

impl State {
    /// The state in `dir`, which is made where there is none.
    ///
    /// # Errors
    /// When it cannot be made, or others may look into it.
    pub(super) fn open(dir: &Path) -> Result<Self, String> {
        let failed = |error: io::Error| format!("{}: {error}", dir.display());
        match DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
        }
        private(dir)?;
        Ok(Self { dir: dir.to_owned() })
    }

    pub(super) fn state_file(&self) -> PathBuf {
        self.dir.join("state.json")
    }

    pub(super) fn roots_file(&self) -> PathBuf {
        self.dir.join("root-cert.pem")
    }

    /// Keeps a second process from serving from here.
    pub(super) fn serve_alone(&self) -> Result<File, String> {
        let path = self.dir.join("serving.lock");
        let file = open_lock(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(_) => Err(format!("{}: another mesh-ca serves from this directory", self.dir.display())),
        }
    }

    /// The authorities; made where there are none.
    pub(super) fn load_or_make(
        &self,
        trust_domain: &TrustDomain,
        leaf: Duration,
        root: Duration,
    ) -> Result<Authorities, String> {
        let _lock = self.lock()?;
        if self.state_file().exists() {
            let known = self.read()?;
            let is = known.old().trust_domain();
            if is != trust_domain {
                return Err(format!(
                    "{} is of the trust domain {is}, and --trust-domain is {trust_domain}",
                    self.dir.display()
                ));
            }
            return Ok(known);
        }
        let authority = Authority::new(trust_domain.clone(), SystemTime::now(), root);
        let authorities = Authorities::new(authority.map_err(|error| error.to_string())?, leaf);
        self.write(&authorities)?;
        Ok(authorities)
    }

    /// Changes the authorities. `change` says whether there is anything to write.
    pub(super) fn update(
        &self,
        change: impl FnOnce(&mut Authorities) -> Result<bool, String>,
    ) -> Result<Authorities, String> {
        let _lock = self.lock()?;
        let mut authorities = self.read()?;
        if change(&mut authorities)? {
            self.write(&authorities)?;
        }
        Ok(authorities)
    }

    /// Adds a line to a list of tokens.
    pub(super) fn add_token(&self, path: &Path, line: &str) -> Result<(), String> {
        let _lock = self.lock()?;
        let mut text = match fs::symlink_metadata(path) {
            Ok(_) => read_private(path)?,
            Err(_) => String::new(),
        };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(line);
        write_file(path, text.as_bytes())
    }

    fn lock(&self) -> Result<File, String> {
        let path = self.dir.join("state.lock");
        let file = open_lock(&path)?;
        file.lock().map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(file)
    }

    fn read(&self) -> Result<Authorities, String> {
        let path = self.state_file();
        if !path.exists() {
            return Err(format!(
                "{}: there is no authority here; run mesh-ca on it first",
                self.dir.display()
            ));
        }
        parse(&read_private(&path)?).map_err(|reason| format!("{}: {reason}", path.display()))
    }

    fn write(&self, authorities: &Authorities) -> Result<(), String> {
        write_file(&self.state_file(), format(authorities).as_bytes())
    }
}

/// The list of tokens; empty where there is no file yet.
pub(super) fn read_tokens(path: &Path) -> Result<String, String> {
    if path.exists() { read_private(path) } else { Ok(String::new()) }
}

/// Replaces a file as a whole; nobody else may read it.
pub(super) fn write_file(path: &Path, content: &[u8]) -> Result<(), String> {
    let written = || {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy().into_owned();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temporary = parent.join(format!(".{name}.{}.new", std::process::id()));
        // One that a crash left.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        let moved = file
            .write_all(content)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&temporary, path));
        if moved.is_err() {
            // The first error is the one to tell of.
            let _ = fs::remove_file(&temporary);
        }
        moved?;
        File::open(parent)?.sync_all()
    };
    written().map_err(|error| format!("{}: {error}", path.display()))
}

fn open_lock(path: &Path) -> Result<File, String> {
    let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    opened.map_err(|error| format!("{}: {error}", path.display()))
}

fn read_private(path: &Path) -> Result<String, String> {
    private(path)?;
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE).read_to_string(&mut text))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(text)
}

/// Refuses what others may read: it may have been read already, and that is not mended by closing it.
fn private(path: &Path) -> Result<(), String> {
    let mode =
        fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?.permissions().mode();
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let only = if path.is_dir() { "700" } else { "600" };
    Err(format!(
        "{} has mode {:03o}, and others may use what is in it; if nobody has, `chmod {only}` it",
        path.display(),
        mode & 0o777
    ))
}

fn parse(text: &str) -> Result<Authorities, String> {
    // Where it is not what it should be, nothing of it is quoted: there are keys in it.
    let state: Value = serde_json::from_str(text).map_err(|_| "it is no JSON".to_owned())?;
    if state["version"].as_u64() != Some(VERSION) {
        return Err(format!("it is not of version {VERSION}"));
    }
    let text =
        |value: &Value, what: &str| value.as_str().map(str::to_owned).ok_or(format!("{what} is missing"));
    let domain: TrustDomain = text(&state["trust_domain"], "trust_domain")?
        .parse()
        .map_err(|error: mesh_core::identity::InvalidSpiffeId| format!("trust_domain: {error}"))?;
    let longest = state["longest_leaf_seconds"].as_u64().ok_or("longest_leaf_seconds is missing")?;
    let authority = |value: &Value| {
        Authority::from_pem(
            domain.clone(),
            &text(&value["certificate"], "certificate")?,
            &text(&value["key"], "key")?,
        )
        .map_err(|error| error.to_string())
    };
    let authorities = Authorities::new(authority(&state["authority"])?, Duration::from_secs(longest));
    if state["next"].is_null() {
        return Ok(authorities);
    }
    let announced = match &state["next"]["announced_millis"] {
        Value::Null => None,
        at => {
            let at = Duration::from_millis(at.as_u64().ok_or("announced_millis is no number")?);
            Some(SystemTime::UNIX_EPOCH.checked_add(at).ok_or("announced_millis is no time")?)
        }
    };
    authorities.with_next(authority(&state["next"])?, announced).map_err(|error| error.to_string())
}

fn format(authorities: &Authorities) -> String {
    let one =
        |authority: &Authority| json!({ "certificate": authority.root_pem(), "key": authority.key_pem() });
    let mut state = json!({
        "version": VERSION,
        "trust_domain": authorities.old().trust_domain().as_str(),
        // Rounded up: it bounds what is out there.
        "longest_leaf_seconds": authorities.longest_leaf().as_millis().div_ceil(1000) as u64,
        "authority": one(authorities.old()),
    });
    if let Some((next, announced)) = authorities.next() {
        let millis = |at: SystemTime| {
            at.duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_nanos().div_ceil(1_000_000) as u64)
        };
        state["next"] = one(next);
        state["next"]["announced_millis"] = json!(announced.map(millis));
    }
    let mut text = serde_json::to_string_pretty(&state).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn authority() -> Authority {
        Authority::new("cluster.local".parse().unwrap(), SystemTime::now(), 24 * HOUR).unwrap()
    }

    #[test]
    fn what_is_written_is_read_alike() {
        let mut authorities = Authorities::new(authority(), HOUR);
        let same = parse(&format(&authorities)).unwrap();
        assert_eq!(format(&same), format(&authorities));
        authorities.rotate(authority()).unwrap();
        let made = parse(&format(&authorities)).unwrap();
        assert_eq!(made.next().unwrap().1, None);
        let (now, millis) =
            (SystemTime::UNIX_EPOCH + Duration::from_hours(497_222), Duration::from_millis(1));
        authorities.announce(now + Duration::from_nanos(1));
        let announced = parse(&format(&authorities)).unwrap();
        // Rounded up, never down: the new root must not sign too early.
        assert_eq!(announced.next().unwrap().1, Some(now + millis));
        assert_eq!(format(&parse(&format(&announced)).unwrap()), format(&announced));
        assert_eq!(announced.roots_pem(), authorities.roots_pem());
    }

    #[test]
    fn what_is_no_state_is_said_without_a_key_in_it() {
        let authority = authority();
        let key = authority.key_pem();
        let secret = key.lines().nth(1).unwrap();
        let good = format(&Authorities::new(authority, HOUR));
        for (from, to, reason) in [
            ("{", "", "no JSON"),
            ("\"version\": 1", "\"version\": 2", "version"),
            ("\"trust_domain\"", "\"other\"", "trust_domain"),
            ("cluster.local", "Cluster", "trust_domain"),
            ("\"longest_leaf_seconds\": 3600", "\"longest_leaf_seconds\": \"x\"", "longest_leaf_seconds"),
            ("\"key\"", "\"kee\"", "key is missing"),
            ("BEGIN PRIVATE KEY", "BEGIN NOTHING", "cannot be used"),
        ] {
            assert!(good.contains(from), "{from}");
            let error = parse(&good.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(reason) && !error.contains(secret), "{error}");
        }
    }
}
