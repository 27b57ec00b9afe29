//! Identity and transport security of the mesh.
//!
//! This version originates and terminates no TLS. What it has is the first decision that a port which may carry
//! both has to make: [`sniff`] tells TLS, HTTP/2 and everything else apart by the first bytes.
#![forbid(unsafe_code)]

pub mod sniff;
