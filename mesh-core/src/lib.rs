//! Vocabulary and plumbing of the mesh layers; no policy.
#![forbid(unsafe_code)]

mod body;
pub mod clock;
mod compat;
pub mod config;
mod conn;
mod context;
pub mod diagnostics;
mod documents;
mod drain;
mod error;
mod flags;
#[cfg(feature = "istio")]
pub mod istio;
mod listener;
pub mod local_reply;
pub mod matcher;
pub mod panic;
pub mod registry;
pub mod server;
mod snapshot;
mod upstream;
#[cfg(feature = "watch")]
pub mod watch;

pub use body::{Body, BodyHook, EndOfBody, Side};
pub use compat::{Compat, UnknownCompat};
pub use conn::{ConnInfo, Direction};
pub use context::{Normalized, PinnedRoute, RequestContext, UpstreamInfo};
pub use error::{BoxError, Error, ErrorKind};
pub use flags::ResponseFlags;
pub use local_reply::{LocalReply, LocalReplyLayer};
pub use panic::{CatchPanic, CatchPanicLayer, Panics};
pub use snapshot::{Pinned, Slot, Snapshot, Snapshots};
pub use upstream::{ClusterName, ConnectTarget, UpstreamTls};
