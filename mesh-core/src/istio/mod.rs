//! Istio and Kubernetes resources as plain data, with positions and validators.

pub mod findings;
pub mod types;
