//! The list of bootstrap tokens as its file has it now.
//!
//! A line that is taken away is to be refused at once, so every call looks. The list is read anew when anything of the file
//! is another than before: its content, its times, its mode. A list that cannot be read is none: nobody knows which of the
//! tokens in the one before were meant to be ended, so whatever tokens would prove is refused until it can be read.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use mesh_tls::ca::BootstrapTokens;

use super::state::{Stamp, read_tokens};

pub(super) struct TokensFile {
    path: PathBuf,
    known: ArcSwap<Known>,
}

/// What is known of the list, as one.
#[derive(Default)]
struct Known {
    /// What the file was when it was read; none makes it be read.
    stamp: Option<Stamp>,
    tokens: Option<Arc<BootstrapTokens>>,
    /// Why it cannot be read, as was said.
    error: Option<String>,
}

impl TokensFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, known: ArcSwap::default() }
    }

    /// The tokens that the file has now; none while it cannot be read. `anew` reads it, whatever is known. Touches the disk.
    pub(super) fn now(&self, anew: bool) -> Option<Arc<BootstrapTokens>> {
        let known = self.known.load_full();
        // Before it is read: what is written meanwhile makes another.
        let stamp = Stamp::of(&self.path);
        if !anew && known.tokens.is_some() && known.stamp == Some(stamp) {
            return known.tokens.clone();
        }
        let read = match self.read() {
            Ok(tokens) => {
                if known.error.is_some() {
                    tracing::info!("the list of bootstrap tokens can be read again");
                }
                let stamp = Some(stamp).filter(|stamp| stamp.is_settled(SystemTime::now()));
                Known { stamp, tokens: Some(Arc::new(tokens)), error: None }
            }
            Err(error) => {
                if known.error.as_ref() != Some(&error) {
                    tracing::error!("{error}; until that is mended, bootstrap tokens prove nothing");
                }
                Known { stamp: None, tokens: None, error: Some(error) }
            }
        };
        let tokens = read.tokens.clone();
        self.known.store(Arc::new(read));
        tokens
    }

    pub(super) fn read(&self) -> Result<BootstrapTokens, String> {
        let text = read_tokens(&self.path)?;
        BootstrapTokens::parse(&text).map_err(|error| format!("{}: {error}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use super::*;
    use crate::mesh_ca::state::write_file;

    fn line(hash: &str) -> String {
        format!("{} a b 2999-01-01T00:00:00Z\n", hash.repeat(32))
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn bug_a_list_that_changed_twice_at_once_was_read_once() {
        let path = std::env::temp_dir().join(format!("mesh-ca-twice-{}", std::process::id()));
        write_file(&path, line("ab").as_bytes()).unwrap();
        let stamp = Stamp::of(&path);
        let changed = fs::metadata(&path).unwrap().modified().unwrap();
        fs::remove_file(&path).unwrap();
        let second = std::time::Duration::from_secs(1);
        assert!(!stamp.is_settled(changed) && stamp.is_settled(changed + 3 * second));
        assert!(Stamp::of(&path).is_settled(changed));
    }

    #[test]
    fn bug_a_list_that_could_not_be_read_left_tokens_that_were_revoked() {
        let path = std::env::temp_dir().join(format!("mesh-ca-tokens-{}", std::process::id()));
        write_file(&path, [line("ab"), line("cd")].concat().as_bytes()).unwrap();
        let file = TokensFile::new(path.clone());
        let count = |anew| file.now(anew).map(|tokens| tokens.len());
        assert_eq!((count(false), count(false)), (Some(2), Some(2)));
        // One is revoked by an editor that leaves the file open to all: none of them proves anything.
        let edited = path.with_extension("edited");
        write_file(&edited, line("ab").as_bytes()).unwrap();
        chmod(&edited, 0o644);
        fs::rename(&edited, &path).unwrap();
        assert_eq!((count(false), count(false), count(true)), (None, None, None));
        // What the log asks for is enough.
        chmod(&path, 0o600);
        assert_eq!(count(false), Some(1));
        write_file(&path, b"nonsense\n").unwrap();
        assert_eq!(count(false), None);
        fs::remove_file(&path).unwrap();
        assert_eq!(count(false), Some(0));
    }
}
