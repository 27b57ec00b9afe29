//! Identity and transport security of the mesh.
#![forbid(unsafe_code)]

pub mod acceptor;
mod alpn;
mod bundle;
#[cfg(feature = "ca")]
pub mod ca;
pub mod certificate;
#[cfg(any(feature = "istio-ca", feature = "spiffe"))]
mod clock;
pub mod connector;
pub mod gateway;
#[cfg(any(feature = "istio-ca", feature = "spiffe"))]
mod grpc;
mod inbound;
#[cfg(feature = "istio")]
pub mod istio;
#[cfg(feature = "istio-ca")]
pub mod istio_ca;
#[cfg(any(feature = "istio-ca", feature = "spiffe"))]
mod protobuf;
pub mod rotate;
mod secret;
pub mod source;
#[cfg(feature = "spiffe")]
pub mod spiffe;
mod standing;
pub mod verifier;
pub mod xfcc;

pub use acceptor::{Acceptor, Inbound, Secured};
pub use bundle::{InvalidBundle, TrustBundle};
pub use connector::{Connector, Credentials};
pub use gateway::GatewayTls;
pub use inbound::InboundTls;
pub use mesh_core::sniff;
pub use secret::SecretData;
pub use source::{CertSource, CertState, Identity, InvalidIdentity, Material, Materials};
pub use verifier::{PeerRule, PeerVerifier, Pin, Refusal};
