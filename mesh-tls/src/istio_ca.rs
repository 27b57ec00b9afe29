//! Istio's certificate service: certificates from istiod, or from an authority of one's own that serves the same.
//!
//! `istio.v1.auth.IstioCertificateService/CreateCertificate` over gRPC and TLS takes a signing request and gives a chain,
//! of which the last element is whom to believe. Who asks proves who it is with a bearer token, or with the certificate
//! that it has; the authority decides whose name it signs.
//!
//! * [`CertificateRequest`], [`CertificateResponse`] and [`Status`] are the messages, without IO.
//! * [`IstioCa`] asks, once, over a connection of its own: what it needs is read anew for each question, so that tokens
//!   and roots may change on disk, and hours lie between two questions.
//! * [`IstioCaSource`] is the [`CertSource`](crate::source::CertSource): it makes keys and requests, renews in time, and
//!   goes on with what it has while the authority is away (D10).
//! * [`answer`] is the server's side of one call.
//!
//! The few fields of two messages are written by hand; a gRPC library would bring forty crates for one call in twelve hours.

mod client;
mod message;
mod server;
mod source;

pub use self::client::{CaClientError, InvalidAddress, IstioCa, Question, Sign};
pub use self::message::{CertificateRequest, CertificateResponse};
pub use self::server::{Call, answer};
pub use self::source::IstioCaSource;
pub use crate::clock::WallClock;
pub use crate::grpc::{Code, Status};
pub use crate::protobuf::InvalidMessage;
pub use crate::source::CertState;

/// The path of the one call.
pub const PATH: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The longest message that is read, in bytes: a chain and a few roots.
pub const MAX_MESSAGE: usize = 256 * 1024;
