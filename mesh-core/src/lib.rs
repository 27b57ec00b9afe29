//! Vocabulary and plumbing of the mesh layers; no policy.
#![forbid(unsafe_code)]

pub mod attributes;
pub mod body;
pub mod clock;
mod compat;
pub mod config;
mod conn;
pub mod context;
pub mod diagnostics;
mod documents;
mod drain;
mod edge;
mod error;
mod flags;
pub mod forwarded;
pub mod identity;
#[cfg(feature = "istio")]
pub mod istio;
mod listener;
mod listener_set;
pub mod local_reply;
pub mod matcher;
pub mod mirrored;
mod normalize;
pub mod panic;
mod prefixed;
pub mod registry;
pub mod sanitize;
pub mod server;
mod snapshot;
pub mod sniff;
mod upstream;
pub mod vendor;
#[cfg(feature = "watch")]
pub mod watch;

pub use body::{Body, BodyHook, EndOfBody, Side};
pub use compat::{Compat, UnknownCompat};
pub use conn::{ConnInfo, Direction};
pub use context::{Normalized, PinnedRoute, RequestContext, UpstreamInfo};
pub use edge::{EdgeSettings, Normalize, NormalizeLayer};
pub use error::{BoxError, Error, ErrorKind};
pub use flags::ResponseFlags;
pub use listener_set::{
    ClientCertificate, GatewayListener, GatewayServer, ListenerSet, ServerTls, Servers, TlsVersion,
};
pub use local_reply::{LocalReply, LocalReplyLayer};
pub use normalize::PathNormalization;
pub use panic::{CatchPanic, CatchPanicLayer, Panics};
pub use prefixed::Prefixed;
pub use snapshot::{Pinned, Slot, Snapshot, Snapshots};
pub use upstream::{
    ClientTls, ClusterName, Connect, ConnectTarget, Connecting, Credential, CredentialFiles, Io, Originate,
    Originated, Originating, Spoken, Standing, UpstreamTls,
};
