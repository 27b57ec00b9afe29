//! One plain struct file per kind.
//!
//! The structs hold what the protobuf messages hold, under the same names, and nothing else: no defaults are filled
//! in, no short host is expanded. [`Option`] stands where Istio tells "absent" from "zero"; a oneof is several
//! `Option`s of which a validator allows one. Field names are accepted in camelCase and snake_case by the loader,
//! and unknown fields are reported by it, so that no struct needs an attribute for either.
//!
//! The variants of an enum are listed in the order of their protobuf numbers, since protobuf's JSON form allows the
//! number in place of the name.

pub mod authentication;
pub mod authorization_policy;
mod cel_syntax;
pub mod check;
pub mod common;
pub mod destination_rule;
pub mod envoy_filter;
pub mod gateway;
mod host;
pub mod kubernetes;
pub mod mesh_config;
pub mod mixer;
pub mod peer_authentication;
pub mod protocol;
pub mod proxy_config;
pub mod rbac;
pub mod request_authentication;
pub mod scenario;
pub mod secret;
pub mod service_entry;
pub mod sidecar;
mod target;
pub mod telemetry;
pub mod traffic_extension;
pub mod virtual_service;
pub mod wasm_plugin;
pub mod workload_entry;
pub mod workload_group;
