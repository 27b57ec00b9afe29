//! Identity and transport security of the mesh.
#![forbid(unsafe_code)]

pub mod acceptor;
mod alpn;
mod bundle;
#[cfg(feature = "ca")]
pub mod ca;
pub mod certificate;
pub mod connector;
mod inbound;
#[cfg(feature = "istio")]
mod istio;
pub mod rotate;
pub mod source;
pub mod verifier;
pub mod xfcc;

pub use acceptor::{Acceptor, Inbound, Secured};
pub use bundle::{InvalidBundle, TrustBundle};
pub use connector::{Connector, Credentials};
pub use inbound::InboundTls;
pub use mesh_core::sniff;
pub use source::{Identity, InvalidIdentity, Material, Materials};
pub use verifier::{PeerRule, PeerVerifier, Pin, Refusal};
