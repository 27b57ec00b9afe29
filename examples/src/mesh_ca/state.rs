//! What `mesh-ca` has on disk: one directory that nobody else may look into.
//!
//! `state.json` has the keys and where a rotation stands, as one unit. It is replaced by a rename after everything of it
//! is on the disk, so that whoever reads it, or comes back after a crash, sees one state or the other. Whoever changes it
//! holds a lock while it reads, changes and writes; so `mesh-ca rotate` and a running `mesh-ca` do not lose each other's
//! changes. `root-cert.pem` is made of it, for those who are to believe the authority.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mesh_core::identity::TrustDomain;
use mesh_tls::ca::{Authorities, Authority, BootstrapTokens};
use serde_json::{Value, json};

/// The form of `state.json`.
const VERSION: u64 = 1;

/// A file larger than this is not one of ours.
const MAX_FILE: u64 = 16 * 1024 * 1024;

/// The longest life of a certificate: a century.
const MAX_LIFE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// How long it is waited for the lock: nobody who holds it does more than read and write one file.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);

/// How often it is asked for meanwhile.
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// The directory.
#[derive(Clone, Debug)]
pub(super) struct State {
    dir: PathBuf,
}

/// Whether a file is still the one that was read, with the mode that it had. To be taken before it is read, so that what
/// is written meanwhile is seen the next time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp(Option<Metadata>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Metadata {
    device: u64,
    inode: u64,
    mode: u32,
    owner: u32,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    pub(super) fn of(path: &Path) -> Self {
        let metadata = fs::metadata(path).ok();
        Self(metadata.map(|file| Metadata {
            device: file.dev(),
            inode: file.ino(),
            mode: file.mode(),
            owner: file.uid(),
            length: file.len(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        }))
    }

    /// Whether another change would make another stamp: clocks of file systems go on in steps, and what changes twice within
    /// one may look alike.
    pub(super) fn is_settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs());
        self.0.is_none_or(|file| u64::try_from(file.changed.0).is_ok_and(|changed| changed + 1 < now))
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
        open_private(dir, Kind::Directory)?;
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

    /// Changes the authorities. `change` says whether there is anything to write. With the stamp of the file that they are
    /// in: taken under the lock, so that whoever changes it next is seen.
    pub(super) fn update(
        &self,
        change: impl FnOnce(&mut Authorities) -> Result<bool, String>,
    ) -> Result<(Authorities, Stamp), String> {
        let _lock = self.lock()?;
        let mut authorities = self.read()?;
        if change(&mut authorities)? {
            self.write(&authorities)?;
        }
        Ok((authorities, Stamp::of(&self.state_file())))
    }

    /// Adds a line to a list of tokens, and takes away those that have been over for a day.
    pub(super) fn add_token(&self, path: &Path, line: &str) -> Result<(), String> {
        let _lock = self.lock()?;
        let mut text = match fs::symlink_metadata(path) {
            Ok(_) => BootstrapTokens::without_expired(&read_private(path)?, SystemTime::now()),
            Err(_) => String::new(),
        };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(line);
        if text.len() as u64 > MAX_FILE {
            return Err(format!("{}: it would be longer than {MAX_FILE} bytes", path.display()));
        }
        write_file(path, text.as_bytes())
    }

    fn lock(&self) -> Result<File, String> {
        let path = self.dir.join("state.lock");
        let file = open_lock(&path)?;
        let began = mesh_core::clock::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if began.elapsed() < LOCK_PATIENCE => {
                    std::thread::park_timeout(LOCK_PAUSE);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(format!(
                        "{}: another process has held the lock for {LOCK_PATIENCE:?}; see who it is with `fuser`, and end it",
                        path.display()
                    ));
                }
                Err(TryLockError::Error(error)) => return Err(format!("{}: {error}", path.display())),
            }
        }
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
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        _ => read_private(path),
    }
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
    let mut text = String::new();
    let file = open_private(path, Kind::File)?;
    file.take(MAX_FILE + 1)
        .read_to_string(&mut text)
        .map_err(|error| format!("{}: {error}", path.display()))?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("{}: it is longer than {MAX_FILE} bytes", path.display()));
    }
    Ok(text)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
}

/// Opens what nobody else may read: what others may read may have been read already, and that is not mended by closing it.
/// It is judged by what was opened, and not by its name, which may be another's by then.
fn open_private(path: &Path, kind: Kind) -> Result<File, String> {
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    // A pipe would keep us waiting for whoever writes to it.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = opened.map_err(failed)?;
    let is = file.metadata().map_err(failed)?;
    let (right, what, only) = match kind {
        Kind::Directory => (is.is_dir(), "directory", "700"),
        Kind::File => (is.is_file(), "regular file", "600"),
    };
    if !right {
        return Err(format!("{} is no {what}", path.display()));
    }
    let own = rustix::process::geteuid().as_raw();
    if is.uid() != own {
        return Err(format!(
            "{} belongs to user {}, and mesh-ca runs as {own}; `chown {own}` it",
            path.display(),
            is.uid()
        ));
    }
    if is.mode() & 0o077 != 0 {
        return Err(format!(
            "{} has mode {:03o}, and others may use what is in it; if nobody has, `chmod {only}` it",
            path.display(),
            is.mode() & 0o777
        ));
    }
    Ok(file)
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
    let longest = Duration::from_secs(longest);
    if longest > MAX_LIFE {
        return Err("longest_leaf_seconds is more than a century".to_owned());
    }
    let authorities = Authorities::new(authority(&state["authority"])?, longest);
    if state["next"].is_null() {
        return Ok(authorities);
    }
    let announced = match &state["next"]["announced_millis"] {
        Value::Null => None,
        at => {
            let at = Duration::from_millis(at.as_u64().ok_or("announced_millis is no number")?);
            // Until the year 3970, as times are shown.
            let at = Some(at).filter(|at| *at <= 20 * MAX_LIFE);
            let at = at.and_then(|at| SystemTime::UNIX_EPOCH.checked_add(at));
            Some(at.ok_or("announced_millis is no time")?)
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
        authorities.rotate(authority(), SystemTime::now()).unwrap();
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
            ("_seconds\": 3600", "_seconds\": 18446744073709551615", "more than a century"),
            ("\"key\"", "\"kee\"", "key is missing"),
            ("BEGIN PRIVATE KEY", "BEGIN NOTHING", "cannot be used"),
        ] {
            assert!(good.contains(from), "{from}");
            let error = parse(&good.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(reason) && !error.contains(secret), "{error}");
        }
    }

    /// A directory that goes with the test.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("mesh-ca-{name}-{}", std::process::id()));
            // One that a crash left.
            let _ = fs::remove_dir_all(&path);
            Self(path)
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            // It may be gone already.
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn chmod(path: &Path, mode: u32) {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn bug_a_file_that_was_closed_to_others_was_taken_for_the_one_before() {
        let place = Place::new("stamp");
        let state = State::open(&place.0).unwrap();
        let file = state.dir.join("list");
        let none = Stamp::of(&file);
        write_file(&file, b"one").unwrap();
        let first = Stamp::of(&file);
        chmod(&file, 0o644);
        let open = Stamp::of(&file);
        assert!(first != none && open != first);
        assert!(read_tokens(&file).unwrap_err().contains("chmod 600"));
        chmod(&file, 0o600);
        assert!(Stamp::of(&file) != open);
        assert_eq!(read_tokens(&file).unwrap(), "one");
    }

    #[test]
    fn bug_what_is_no_file_was_waited_for() {
        let place = Place::new("kind");
        let state = State::open(&place.0).unwrap();
        assert!(read_tokens(&state.dir).unwrap_err().contains("is no regular file"));
        let socket = state.dir.join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(read_tokens(&socket).is_err());
        let file = state.dir.join("file");
        write_file(&file, b"").unwrap();
        assert!(State::open(&file).unwrap_err().contains("is no directory"));
        assert_eq!(read_tokens(&state.dir.join("none")).unwrap(), "");
    }

    #[test]
    fn bug_a_list_of_tokens_that_is_too_long_was_cut() {
        let place = Place::new("long");
        let state = State::open(&place.0).unwrap();
        let file = state.dir.join("list");
        write_file(&file, &vec![b'#'; MAX_FILE as usize]).unwrap();
        assert_eq!(read_tokens(&file).unwrap().len() as u64, MAX_FILE);
        assert!(state.add_token(&file, "line\n").unwrap_err().contains("would be longer"));
        write_file(&file, &vec![b'#'; MAX_FILE as usize + 1]).unwrap();
        assert!(read_tokens(&file).unwrap_err().contains("longer than"));
        // What has long been over goes when something is added.
        let over = format!("{} a b 2020-01-01T00:00:00Z\n", "ab".repeat(32));
        write_file(&file, over.as_bytes()).unwrap();
        state.add_token(&file, "# new\n").unwrap();
        assert_eq!(read_tokens(&file).unwrap(), "# new\n");
    }

    #[test]
    fn bug_a_lock_that_is_held_was_waited_for_without_end() {
        let place = Place::new("lock");
        let state = State::open(&place.0).unwrap();
        let held = state.lock().unwrap();
        let error = state.update(|_| Ok(false)).unwrap_err();
        assert!(error.contains("another process has held the lock"), "{error}");
        drop(held);
        assert!(state.lock().is_ok());
    }

    #[test]
    fn bug_a_rotation_between_writing_and_stamping_was_lost() {
        let place = Place::new("stamped");
        let state = State::open(&place.0).unwrap();
        let domain = "cluster.local".parse().unwrap();
        state.load_or_make(&domain, HOUR, 24 * HOUR).unwrap();
        let before = Stamp::of(&state.state_file());
        // The stamp that comes with a change is that of the change, whatever comes after it.
        let (_, stamp) = state.update(|_| Ok(true)).unwrap();
        assert_ne!(stamp, before);
        assert_eq!(stamp, Stamp::of(&state.state_file()));
        state
            .update(|authorities| {
                authorities
                    .rotate(authority(), SystemTime::now())
                    .map(|()| true)
                    .map_err(|error| error.to_string())
            })
            .unwrap();
        assert_ne!(stamp, Stamp::of(&state.state_file()));
    }
}
