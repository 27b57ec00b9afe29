//! What the benches share: synthetic meshes of any size, and requests into them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a bench that cannot be set up has nothing to measure"
)]

pub mod memory;
pub mod stack;

use std::fmt::Write as _;

use mesh_core::config::{Compile as _, CompileContext, Role};
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};
use mesh_route::RouteTable;

/// Istio YAML of a mesh with `services` services, each with `subsets` subsets and a virtual service that splits between
/// them.
#[must_use]
pub fn mesh_yaml(services: usize, subsets: usize) -> String {
    let mut yaml = String::new();
    for service in 0..services {
        let (high, low) = (service / 250, service % 250 + 1);
        let _ = write!(
            yaml,
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: s{service}}}\nspec:\n  hosts: [s{service}.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints:\n"
        );
        for subset in 0..subsets.max(1) {
            let _ =
                writeln!(yaml, "  - {{address: 10.{subset}.{high}.{low}, labels: {{version: v{subset}}}}}");
        }
        let _ = write!(
            yaml,
            "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: s{service}}}\nspec:\n  host: s{service}\n  subsets:\n"
        );
        for subset in 0..subsets.max(1) {
            let _ = writeln!(yaml, "  - {{name: v{subset}, labels: {{version: v{subset}}}}}");
        }
        let _ = write!(
            yaml,
            "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: s{service}}}\nspec:\n  hosts: [s{service}]\n  http:\n  - match: [{{uri: {{prefix: /api/}}}}]\n    route:\n    - {{destination: {{host: s{service}, subset: v0}}, weight: 90}}\n    - {{destination: {{host: s{service}, subset: v{}}}, weight: 10}}\n  - route: [{{destination: {{host: s{service}}}}}]\n---\n",
            subsets.max(1) - 1
        );
    }
    yaml
}

/// The outbound table of that mesh.
///
/// # Panics
/// When the YAML does not compile.
#[must_use]
pub fn table(services: usize, subsets: usize) -> RouteTable {
    let file = SourceFile::new("<bench>", mesh_yaml(services, subsets));
    let (set, mut diagnostics) = ResourceSet::load(&[file], &LoadOptions::default());
    RouteTable::compile(&set, &CompileContext::new(Role::Sidecar), &mut diagnostics).expect("a sound mesh")
}
