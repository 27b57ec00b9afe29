//! Identity and transport security of the mesh.
//!
//! This version originates and terminates no TLS. What there is, telling TLS from everything else by the first bytes,
//! is in [`mesh_core::sniff`], because a listener does that before anyone ends TLS.
#![forbid(unsafe_code)]

pub use mesh_core::sniff;
