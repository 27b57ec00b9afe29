//! Istio's resources compiled into the models of this crate.

mod peer_authentication;
mod secrets;

pub use secrets::Secrets;
