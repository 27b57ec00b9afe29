//! The gateway; see `gateway --help`.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    mesh_examples::gateway(mesh_examples::cli::Gateway::parse())
}
