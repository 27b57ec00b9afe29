//! Vocabulary and plumbing of the mesh layers; no policy.
#![forbid(unsafe_code)]

pub mod clock;
pub mod diagnostics;
#[cfg(feature = "istio")]
pub mod istio;
