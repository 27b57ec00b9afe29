//! The access log: one line per request, in Istio's default text format (TE-06).
//!
//! The layer stands outermost, because only there are local replies, clients that left and bodies that were cut
//! seen. It captures what the client sent, keeps a clone of the [`RequestContext`](mesh_core::RequestContext), and
//! writes its line once: at the end of the response **body**, or when the request is dropped without a response
//! (code 0, flag `DC`).
//!
//! A connection that is not HTTP has a line too ([`AccessLogSink::connection`]), when it has ended.
//!
//! Where Istio's format asks for `X-ENVOY-UPSTREAM-SERVICE-TIME` or `X-ENVOY-ORIGINAL-PATH`, the line says what was meant
//! with any [prefix](mesh_core::vendor) of those headers. Envoy looks for the very name, so that with another prefix it
//! says `-` for the one and the rewritten path for the other.
//!
//! Telemetry fails open. A line goes into a bounded queue; when the sink cannot keep up, lines are dropped and
//! counted, and no request waits.

mod connection;
mod entry;
mod layer;
mod sink;

pub use connection::ConnectionEntry;
pub use layer::{AccessLog, AccessLogLayer, ResponseFuture};
pub use sink::{AccessLogSink, DroppedLines, Writer};
