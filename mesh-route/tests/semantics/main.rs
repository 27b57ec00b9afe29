//! Istio's semantics by ID, on the routing that unmodified Istio YAML compiles to: which route takes a request, what its
//! cluster is like, and, where something has to be done to a request or response, what an upstream sees behind the
//! real stack.
#![cfg(feature = "istio")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod canary;
mod connection_pool;
mod cors;
mod cross_cutting;
mod destination_rule;
mod fault;
mod gateway;
mod l4;
mod load_balancing;
mod mesh_config;
mod mirror;
mod mirror_diff;
mod outlier;
mod ports;
mod registry;
mod retry;
mod service_entry;
mod sidecar;
mod support;
mod virtual_service_action;
mod virtual_service_delegate;
mod virtual_service_match;
mod virtual_service_redirect;
mod virtual_service_route;
mod virtual_service_top;
