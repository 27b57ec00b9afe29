//! What holds for one workload, host and port: resolution, not behaviour.
//!
//! Resources say for whom they are in half a dozen ways: by selector, by target, by namespace, by `exportTo`, by host,
//! by age. The answers have one home, here, so that routing, TLS, authorization and telemetry cannot disagree about
//! them. All of it is pure and runs when a configuration is compiled, never per request.
//!
//! - [`scope`]: which policies are for a workload, and from which level.
//! - [`host`]: short names, and which hosts one pattern covers.
//! - [`visibility`]: `exportTo`.
//! - [`peer_authentication`]: the mTLS mode by port (PA-01 … PA-03), and [`legacy_authentication`] in Istio 1.1 (LA-01).
//! - [`trust_domain`]: the aliases of a trust domain (AP-12).
//! - [`destination_rule`]: which rule a client uses for a host, and its policy by subset and port (DR-01 … DR-04).
//! - [`sidecar`]: which Sidecar a workload has, and which services it lets in (SC-01).

pub mod destination_rule;
pub mod host;
pub mod legacy_authentication;
pub mod peer_authentication;
pub mod scope;
pub mod sidecar;
pub mod trust_domain;
pub mod visibility;
