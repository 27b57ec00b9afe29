//! Identity and transport security of the mesh.
#![forbid(unsafe_code)]

mod bundle;
#[cfg(feature = "ca")]
pub mod ca;
pub mod certificate;
pub mod source;
pub mod verifier;

pub use bundle::{InvalidBundle, TrustBundle};
pub use mesh_core::sniff;
pub use source::{Identity, InvalidIdentity, Material, Materials};
pub use verifier::{PeerRule, PeerVerifier, Pin, Refusal};
