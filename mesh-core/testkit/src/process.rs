//! The binaries as processes, and files of configuration for them.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::PATIENCE;

/// A running binary; killed when it is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    addresses: HashMap<String, Vec<SocketAddr>>,
    stderr: Arc<Mutex<String>>,
}

impl Process {
    /// Starts a binary and waits for its line `listening NAME=ADDR …`.
    ///
    /// # Panics
    /// When it ends before that line; the message has what it said.
    #[must_use]
    pub fn start(binary: &str, args: &[&str]) -> Self {
        let mut child = Command::new(binary)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{binary}: {error}"));
        let stderr = Arc::new(Mutex::new(String::new()));
        let (out, mut err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let said = Arc::clone(&stderr);
        std::thread::spawn(move || {
            let mut buffer = [0_u8; 4096];
            while let Ok(read @ 1..) = err.read(&mut buffer) {
                said.lock().expect("not poisoned").push_str(&String::from_utf8_lossy(&buffer[..read]));
            }
        });
        let mut lines = BufReader::new(out).lines();
        let line = loop {
            match lines.next() {
                Some(Ok(line)) if line.starts_with("listening ") => break line,
                Some(Ok(_)) => {}
                _ => {
                    let status = child.wait();
                    panic!(
                        "{binary} {args:?} ended early ({status:?}): {}",
                        stderr.lock().expect("not poisoned")
                    );
                }
            }
        };
        // What it writes later must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let mut addresses: HashMap<String, Vec<SocketAddr>> = HashMap::new();
        for pair in line.split_whitespace().skip(1) {
            let (name, address) = pair.split_once('=').unwrap_or_else(|| panic!("not NAME=ADDR: {line}"));
            addresses.entry(name.to_owned()).or_default().push(address.parse().expect("an address"));
        }
        Self { child, addresses, stderr }
    }

    /// The address of a listener.
    ///
    /// # Panics
    /// When it has none of this name.
    #[must_use]
    pub fn address(&self, name: &str) -> SocketAddr {
        match self.addresses.get(name).map(Vec::as_slice) {
            Some([first, ..]) => *first,
            _ => panic!("no listener {name} among {:?}", self.addresses),
        }
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its memory in KiB: proportional, as the kernel accounts for it; 0 when it cannot be read.
    #[must_use]
    pub fn pss_kib(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.id())).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        line.and_then(|line| line.trim().split(' ').next()?.parse().ok()).unwrap_or(0)
    }

    /// Its memory that is no file's, in KiB; 0 when it cannot be read. Unlike [`pss_kib`](Self::pss_kib) it does not change
    /// when another process of the same binary comes or goes.
    #[must_use]
    pub fn anonymous_kib(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        line.and_then(|line| line.trim().split(' ').next()?.parse().ok()).unwrap_or(0)
    }

    /// What it wrote to its standard error so far.
    ///
    /// # Panics
    /// Never, but for a panic elsewhere.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.lock().expect("not poisoned").clone()
    }

    /// Sends it a signal by name (`TERM`, `HUP`).
    ///
    /// # Panics
    /// When there is no `kill` command.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.id().to_string()).status();
        assert!(status.is_ok_and(|status| status.success()), "cannot send {name}");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end within [`PATIENCE`].
    pub async fn wait(&mut self) -> ExitStatus {
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                if let Some(status) = self.child.try_wait().expect("a child") {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        waited.await.unwrap_or_else(|_| panic!("the process did not end"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder of its own for configuration files; removed when it is dropped.
#[derive(Debug)]
pub struct ConfigDir(PathBuf);

impl ConfigDir {
    /// An empty folder.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("mesh-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).expect("a temporary folder");
        Self(path)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The path of a file in it, as an argument.
    #[must_use]
    pub fn file(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }

    /// Writes a file in place, as an editor may.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).expect("a file");
    }

    /// Replaces a file at once, by a rename.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn replace(&self, name: &str, text: &str) {
        let temporary = self.0.join(format!(".{name}.new"));
        fs::write(&temporary, text).expect("a file");
        fs::rename(temporary, self.0.join(name)).expect("a rename");
    }
}

impl Default for ConfigDir {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for ConfigDir {
    fn drop(&mut self) {
        // What cannot be removed is in the system's folder of temporary files.
        let _ = fs::remove_dir_all(&self.0);
    }
}
