//! The sidecar and the gateway: thin compositions of the mesh layers.
//!
//! [`compose`] is the composition in plain sight; everything else here is what a program around it needs: a command
//! line, a control plane that loads and watches configuration, admin endpoints, a demo.

pub mod admin;
pub mod certs;
pub mod cli;
pub mod compose;
pub mod control;
pub mod credentials;
pub mod demo;
mod explain;
mod logging;
mod memory;
pub mod mesh_ca;
pub mod replay;
mod run;
pub mod security;
mod simulate;
pub mod status;

pub use run::{gateway, sidecar};

/// What the README shows compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
