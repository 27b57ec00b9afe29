//! Telemetry of the mesh as tower layers.
//!
//! This version has the access log. Metrics and traces are not there yet.
#![forbid(unsafe_code)]

pub mod access_log;
