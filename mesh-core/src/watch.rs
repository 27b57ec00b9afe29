//! Watching configuration files: when what stands on disk becomes what is in force.
//!
//! Files are written in pieces, replaced by renames, and swapped as whole directories behind a symlink
//! (Kubernetes' `..data`), so an event says only that it is time to look. Whether to act is decided by a pure
//! state machine, [`Settle`], from the content that a look found and the time:
//!
//! * the same content again: nothing;
//! * content that changed: wait until it has been the same for 100 ms, then load it;
//! * content that went away (a file that is empty or gone where the files in force had some): wait until it has
//!   been so for 5 s, since an editor or a volume may be half way;
//! * an explicit request (SIGHUP) loads what stands there now.
//!
//! [`Watcher`] adds the IO: it looks when the kernel reports a change below a watched path, and twice a second
//! besides, because watches can be lost or unsupported, and see nothing behind a symlink. So what changed is in force
//! within a second in any case.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::mpsc;

use crate::istio::SourceFile;

/// How long changed content must stay the same before it is loaded.
pub const SETTLE: Duration = Duration::from_millis(100);

/// How long content must be gone before its absence is loaded.
pub const VANISHED: Duration = Duration::from_secs(5);

/// How often a watcher looks when no event comes.
pub const POLL: Duration = Duration::from_millis(500);

/// A file larger than this is not read; it becomes an error at its position.
const MAX_FILE_BYTES: u64 = 64 * 1024 * 1024;

/// Decides when content is loaded. Pure: the caller looks and brings the time.
#[derive(Debug)]
pub struct Settle {
    in_force: Files,
    candidate: Option<Candidate>,
}

type Files = BTreeMap<Arc<str>, Vec<u8>>;

#[derive(Debug)]
struct Candidate {
    files: Files,
    since: Instant,
    /// Since when something that is in force has been missing, whatever else changed meanwhile.
    missing_since: Option<Instant>,
}

/// What to do with what a look found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is in force already.
    Unchanged,
    /// Look again at this time.
    Wait(Instant),
    /// Load it.
    Load,
}

impl Settle {
    /// A state machine for which `files` are in force.
    #[must_use]
    pub fn new(files: &[SourceFile]) -> Self {
        Self { in_force: keyed(files), candidate: None }
    }

    /// Judges what a look at `now` found. After [`Verdict::Load`], `files` count as in force, whether or not they
    /// turn out to be acceptable: refused content is not loaded again until it changes.
    pub fn observe(&mut self, files: &[SourceFile], now: Instant) -> Verdict {
        let files = keyed(files);
        if files == self.in_force {
            self.candidate = None;
            return Verdict::Unchanged;
        }
        let missing = self
            .in_force
            .iter()
            .any(|(name, text)| !is_blank(text) && files.get(name).is_none_or(|text| is_blank(text)));
        let missing_before = self.candidate.as_ref().and_then(|candidate| candidate.missing_since);
        let missing_since = missing.then(|| missing_before.unwrap_or(now));
        let since = match &self.candidate {
            Some(candidate) if candidate.files == files => candidate.since,
            _ => now,
        };
        let due = missing_since
            .map_or(since + SETTLE, |since_missing| (since_missing + VANISHED).max(since + SETTLE));
        if now >= due {
            self.in_force = files;
            self.candidate = None;
            return Verdict::Load;
        }
        self.candidate = Some(Candidate { files, since, missing_since });
        Verdict::Wait(due)
    }

    /// Takes `files` as in force at once: an operator asked for it.
    pub fn force(&mut self, files: &[SourceFile]) {
        self.in_force = keyed(files);
        self.candidate = None;
    }
}

/// Looks at configuration paths and says when to load.
#[derive(Debug)]
pub struct Watcher {
    paths: Vec<PathBuf>,
    settle: Settle,
    events: mpsc::Receiver<()>,
    // Dropping it ends the kernel's watches.
    _kernel: Option<notify::RecommendedWatcher>,
}

impl Watcher {
    /// Watches `paths`, of which `loaded` are in force.
    ///
    /// Kernel watches that cannot be had (an unsupported file system, no watches left) are made up for by looking
    /// twice a second.
    #[must_use]
    pub fn new(paths: Vec<PathBuf>, loaded: &[SourceFile]) -> Self {
        let (sender, events) = mpsc::channel(1);
        let kernel = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading a file is an event of its own; acting on it would make every look cause the next.
            if event.is_ok_and(|event| !event.kind.is_access()) {
                // A full channel holds a wake-up already.
                let _ = sender.try_send(());
            }
        });
        let kernel = match kernel {
            Ok(mut kernel) => {
                for (path, how) in watched(&paths) {
                    if let Err(error) = kernel.watch(&path, how) {
                        tracing::warn!(path = %path.display(), %error, "no kernel watch; looking twice a second");
                    }
                }
                Some(kernel)
            }
            Err(error) => {
                tracing::warn!(%error, "no kernel watches; looking twice a second");
                None
            }
        };
        Self { paths, settle: Settle::new(loaded), events, _kernel: kernel }
    }

    /// Waits until there is something to load and returns it. Cancel-safe.
    pub async fn next(&mut self) -> Vec<SourceFile> {
        let mut wake = crate::clock::now() + POLL;
        loop {
            tokio::select! {
                Some(()) = self.events.recv() => {}
                () = tokio::time::sleep_until(wake.into()) => {}
            }
            let now = crate::clock::now();
            let files = match look(&self.paths).await {
                Ok(files) => files,
                Err(error) => {
                    // Not gone, only unreadable: nothing is known of it, and what is in force stays.
                    tracing::warn!(%error, "the configuration cannot be read; what is in force stays");
                    wake = now + POLL;
                    continue;
                }
            };
            match self.settle.observe(&files, now) {
                Verdict::Load => return files,
                Verdict::Unchanged => wake = now + POLL,
                Verdict::Wait(due) => wake = due.min(now + POLL),
            }
        }
    }

    /// What stands there now, to be loaded whatever it is.
    ///
    /// # Errors
    /// The first path that is there and cannot be read; nothing is to be loaded then.
    pub async fn now(&mut self) -> io::Result<Vec<SourceFile>> {
        let files = look(&self.paths).await?;
        self.settle.force(&files);
        Ok(files)
    }
}

/// Reads every configuration file below `paths`: a file as it is, a directory recursively in name order (`.yaml`,
/// `.yml`, `.json`; names that begin with a dot are skipped, as Kubernetes' `..data` wants).
///
/// # Errors
/// The first path that cannot be read, with its name.
pub fn read(paths: &[PathBuf]) -> io::Result<Vec<SourceFile>> {
    let mut files = Vec::new();
    for path in paths {
        let metadata = std::fs::metadata(path).map_err(|error| named(path, error))?;
        if metadata.is_dir() {
            let mut visited = vec![path.canonicalize().map_err(|error| named(path, error))?];
            read_dir(path, &mut visited, &mut files)?;
        } else {
            files.push(read_file(path)?);
        }
    }
    Ok(files)
}

/// What is below the paths now. A path that is not there has no files; any other failure says nothing of its files.
async fn look(paths: &[PathBuf]) -> io::Result<Vec<SourceFile>> {
    let paths = paths.to_vec();
    let read = move || {
        let mut files = Vec::new();
        for path in &paths {
            match read(std::slice::from_ref(path)) {
                Ok(found) => files.extend(found),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(files)
    };
    tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
}

fn read_dir(directory: &Path, visited: &mut Vec<PathBuf>, files: &mut Vec<SourceFile>) -> io::Result<()> {
    let mut entries = std::fs::read_dir(directory)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .map_err(|error| named(directory, error))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let metadata = match std::fs::metadata(&path) {
            Ok(metadata) => metadata,
            // Removed since the directory was listed, or a dangling link.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(named(&path, error)),
        };
        if metadata.is_dir() {
            let real = path.canonicalize().map_err(|error| named(&path, error))?;
            if !visited.contains(&real) {
                visited.push(real);
                read_dir(&path, visited, files)?;
            }
        } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json") {
            files.push(read_file(&path)?);
        }
    }
    Ok(())
}

fn read_file(path: &Path) -> io::Result<SourceFile> {
    let length = std::fs::metadata(path).map_err(|error| named(path, error))?.len();
    if length > MAX_FILE_BYTES {
        let reason = format!("{length} bytes; at most {MAX_FILE_BYTES} are read");
        return Err(named(path, io::Error::new(io::ErrorKind::FileTooLarge, reason)));
    }
    let bytes = std::fs::read(path).map_err(|error| named(path, error))?;
    Ok(SourceFile::new(path.to_string_lossy(), bytes))
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// What to watch: a directory with all that is below it; a file through its directory alone, since a rename over it ends
/// a watch of the file itself, and what else is in that directory may be a large tree that is no concern of ours.
fn watched(paths: &[PathBuf]) -> Vec<(PathBuf, RecursiveMode)> {
    let mut watched: Vec<_> = paths
        .iter()
        .map(|path| {
            if path.is_dir() {
                return (path.clone(), RecursiveMode::Recursive);
            }
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            (parent.unwrap_or(Path::new(".")).to_owned(), RecursiveMode::NonRecursive)
        })
        .collect();
    watched.sort_by_cached_key(|(path, how)| (path.clone(), *how == RecursiveMode::NonRecursive));
    // Of one directory the wider watch stays, and what is below it is watched with it.
    watched.dedup_by(|(later, _), (first, how)| {
        later == first || (*how == RecursiveMode::Recursive && later.starts_with(first))
    });
    watched
}

fn keyed(files: &[SourceFile]) -> Files {
    files.iter().map(|file| (Arc::clone(&file.name), file.text.clone())).collect()
}

fn is_blank(text: &[u8]) -> bool {
    text.trim_ascii().is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(contents: &[(&str, &str)]) -> Vec<SourceFile> {
        contents.iter().map(|(name, text)| SourceFile::new(*name, text.as_bytes())).collect()
    }

    fn at(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    #[test]
    fn what_is_beside_a_file_is_not_watched_to_its_depths() {
        let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let file = here.join("Cargo.toml");
        assert_eq!(watched(std::slice::from_ref(&file)), [(here.clone(), RecursiveMode::NonRecursive)]);
        assert_eq!(watched(&["mesh.yaml".into()]), [(".".into(), RecursiveMode::NonRecursive)]);
        assert_eq!(watched(&[file, here.clone()]), [(here, RecursiveMode::Recursive)]);
    }

    #[test]
    fn c3_a_change_is_loaded_once_it_has_settled() {
        let start = crate::clock::now();
        let mut settle = Settle::new(&files(&[("a", "1")]));
        assert_eq!(settle.observe(&files(&[("a", "1")]), start), Verdict::Unchanged);
        let half = files(&[("a", "2 hal")]);
        assert_eq!(settle.observe(&half, start), Verdict::Wait(at(start, 100)));
        let whole = files(&[("a", "2 whole")]);
        assert_eq!(settle.observe(&whole, at(start, 60)), Verdict::Wait(at(start, 160)));
        assert_eq!(settle.observe(&whole, at(start, 159)), Verdict::Wait(at(start, 160)));
        assert_eq!(settle.observe(&whole, at(start, 160)), Verdict::Load);
        assert_eq!(settle.observe(&whole, at(start, 161)), Verdict::Unchanged);
    }

    #[test]
    fn c3_an_empty_or_vanished_file_keeps_the_last_good_set_for_five_seconds() {
        for gone in [files(&[("a", "  \n"), ("b", "2")]), files(&[("b", "2")]), files(&[])] {
            let start = crate::clock::now();
            let mut settle = Settle::new(&files(&[("a", "1"), ("b", "2")]));
            assert_eq!(settle.observe(&gone, start), Verdict::Wait(at(start, 5000)));
            assert_eq!(settle.observe(&gone, at(start, 4999)), Verdict::Wait(at(start, 5000)));
            assert_eq!(settle.observe(&gone, at(start, 5000)), Verdict::Load);
        }
    }

    #[test]
    fn c3_a_file_that_comes_back_changed_is_an_ordinary_change() {
        let start = crate::clock::now();
        let mut settle = Settle::new(&files(&[("a", "1")]));
        assert_eq!(settle.observe(&files(&[]), start), Verdict::Wait(at(start, 5000)));
        let back = files(&[("a", "2")]);
        assert_eq!(settle.observe(&back, at(start, 50)), Verdict::Wait(at(start, 150)));
        assert_eq!(settle.observe(&back, at(start, 150)), Verdict::Load);
    }

    #[test]
    fn c3_writes_elsewhere_do_not_prolong_a_vanished_file() {
        let start = crate::clock::now();
        let mut settle = Settle::new(&files(&[("a", "1"), ("b", "0")]));
        settle.observe(&files(&[("b", "1")]), start);
        settle.observe(&files(&[("b", "2")]), at(start, 4000));
        assert_eq!(settle.observe(&files(&[("b", "2")]), at(start, 5000)), Verdict::Load);
    }
}
