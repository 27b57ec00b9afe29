//! The SPIFFE Workload API: certificates (SVIDs) from an agent on the same machine, as SPIRE's.
//!
//! `SpiffeWorkloadAPI/FetchX509SVID` is one gRPC call over a Unix socket, whose answer does not end: each message has all
//! that holds from then on. The agent knows who asks by the process at the other end of the socket, so nothing is proved
//! and nothing is configured but where the socket is; the keys are made by the agent and come with the certificates.
//!
//! * [`X509SvidResponse`] is the message, without IO.
//! * [`WorkloadApi`] is the client of one socket, and [`Subscribe`] what it does, so that a test may do it.
//! * [`SpiffeSource`] is the [`CertSource`](crate::source::CertSource): it takes what holds, keeps it through outages of the
//!   agent, and leaves what does not hold.
//!
//! **Federation is not supported.** There is one bundle for all trust domains that are believed, so a bundle of another
//! trust domain could vouch for our own. It is left out with a warning; workloads of that domain are not believed.
//!
//! The call is written by hand. The crate `spiffe` leaves out the revocation lists of an answer, and puts a federated bundle
//! that names our own trust domain in the place of our own.

mod client;
mod message;
mod source;

pub use self::client::{ENDPOINT_SOCKET, InvalidEndpoint, SvidUpdates, WorkloadApi, WorkloadApiError};
pub use self::message::{X509Svid, X509SvidResponse};
pub use self::source::{SpiffeSource, Subscribe, SvidChoice, Updates};
pub use crate::clock::WallClock;
pub use crate::grpc::{Code, Status};
pub use crate::protobuf::InvalidMessage;
pub use crate::source::CertState;

/// The path of the one call.
pub const PATH: &str = "/SpiffeWorkloadAPI/FetchX509SVID";

/// The longest message that is read, in bytes: what gRPC libraries read, too.
pub const MAX_MESSAGE: usize = 4 * 1024 * 1024;
