//! Istio and Kubernetes resources as plain data, with positions and validators.
//!
//! [`ResourceSet::load`] reads files into resources by kind. The types ([`types`]) hold what was written and nothing
//! else; their meaning lives in the crates that have the behaviour. Every value has a position and a field path while
//! it is judged, and every field is remembered with its position for as long as somebody may ask whether it was
//! honoured ([`crate::diagnostics`]).

mod document;
pub mod effective;
mod envelope;
pub mod findings;
mod kinds;
mod loader;
mod mesh;
mod resource_set;
pub mod types;
mod yaml;

pub use envelope::Metadata;
pub use kinds::Kind;
pub use resource_set::{LoadOptions, Resource, ResourceSet, SourceFile, UnknownFields};
