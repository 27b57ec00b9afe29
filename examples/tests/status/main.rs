//! The status port through the binaries (PT-01).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod controls;
mod metrics;
mod probes;

use mesh_testkit::process::Process;
use mesh_testkit::until;

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");
const ANY: &str = "127.0.0.1:0";
const PORTS: [&str; 6] = ["--outbound", ANY, "--admin", ANY, "--status", ANY];

/// A sidecar with this in its environment.
fn sidecar_with(variables: &[&str]) -> Process {
    Process::start("env", &[&["-u", "INSTANCE_IP"], variables, &[SIDECAR, "--demo"], &PORTS[..]].concat())
}

/// Waits until a process has said this on a line with `about`: what it says may come later than its answers.
async fn said(process: &Process, about: &str, what: &str) {
    let is_said = |line: &str| line.contains(about) && line.contains(what);
    until(&format!("{about}: {what}"), async || process.stderr().lines().any(is_said)).await;
}
