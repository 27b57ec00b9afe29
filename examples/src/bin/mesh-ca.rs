//! A certificate authority; see `mesh-ca --help`.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    mesh_examples::mesh_ca::run(mesh_examples::mesh_ca::cli::MeshCa::parse())
}
