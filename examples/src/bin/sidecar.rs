//! The sidecar; see `sidecar --help`.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    mesh_examples::sidecar(mesh_examples::cli::Sidecar::parse())
}
