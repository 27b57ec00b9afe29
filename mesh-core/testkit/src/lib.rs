//! What the tests of the mesh share: upstreams that record, clients that write raw bytes, a ledger of requests, and
//! the binaries as processes.
//!
//! It depends on no crate of the mesh, so that it judges them from outside. Nothing here sleeps for luck: waiting is
//! always for something that can be observed, with a bound.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on says so by a panic")]

pub mod h2_raw;
pub mod h2_upstream;
pub mod ledger;
pub mod process;
pub mod raw;
pub mod scripted;
pub mod upstream;

use std::path::PathBuf;
use std::time::Duration;

/// The longest that anything is waited for.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The folder of conformance data, when it is there; otherwise says loudly that `test` skips.
#[must_use]
pub fn shared_data(test: &str, folder: &str) -> Option<PathBuf> {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    // mesh-core/testkit is two levels below the workspace, and the data stands beside that.
    root.extend(["..", "..", "..", "shared", "data", folder]);
    if root.exists() {
        return Some(root);
    }
    eprintln!("SKIPPED {test}: {} is not there", root.display());
    None
}

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not within [`PATIENCE`].
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "waited for {what} in vain");
}
