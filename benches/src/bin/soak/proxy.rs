//! The proxies as processes of their own, so that their memory is theirs alone.

use mesh_testkit::process::Process;
use mesh_testkit::raw::get_json;
use mesh_testkit::until;
use std::fmt::Write as _;
use std::net::SocketAddr;

/// Starts this binary as `role`.
pub(crate) fn start(role: &str, args: &[&str]) -> Process {
    let own = std::env::current_exe().unwrap_or_else(|error| panic!("the path of this binary: {error}"));
    let args: Vec<&str> = [role].into_iter().chain(args.iter().copied()).collect();
    Process::start(&own.to_string_lossy(), &args)
}

/// Loads the files now and waits until a generation after `generation` is in force.
pub(crate) async fn reload(process: &Process, generation: u64) {
    process.signal("HUP");
    let admin = process.address("admin");
    until("the next generation", async || {
        get_json(admin, "/ready").await["generation"].as_u64() > Some(generation)
    })
    .await;
}

/// A service `app` of these endpoints.
pub(crate) fn service(endpoints: &[SocketAddr]) -> String {
    service_of("app", "HTTP", endpoints)
}

/// A service that speaks `protocol`.
pub(crate) fn service_of(name: &str, protocol: &str, endpoints: &[SocketAddr]) -> String {
    let mut yaml = format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}}}\nspec:\n  hosts: [{name}.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: p, protocol: {protocol}}}]\n  endpoints:\n"
    );
    for endpoint in endpoints {
        // Writing to a String cannot fail.
        let _ = writeln!(yaml, "  - {{address: {}, ports: {{p: {}}}}}", endpoint.ip(), endpoint.port());
    }
    yaml.push_str("---\n");
    yaml
}
