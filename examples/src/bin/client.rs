//! An HTTP client whose own requests go through the mesh's routing, from the same YAML as a sidecar's, with no proxy.
//!
//! `client --config mesh.yaml URL [COUNT]`: sends COUNT requests (1 by default) and prints each answer.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use http::Request;
use http_body_util::BodyExt as _;
use mesh_core::config::{CompileContext, Compiler, Role};
use mesh_core::context::ContextLayer;
use mesh_core::istio::{LoadOptions, ResourceSet};
use mesh_core::{Body, Direction, watch};
use mesh_route::{Clusters, HeadersLayer, RouteTable, SelectRouteLayer, Shard, dispatch};
use tower::{Service as _, ServiceBuilder, ServiceExt as _};

/// Sends requests through the mesh's routing, in this process.
#[derive(Parser)]
struct Args {
    /// YAML file or directory; repeatable
    #[arg(long, value_name = "PATH", required = true)]
    config: Vec<PathBuf>,
    /// Where to send requests, by the mesh's names
    url: http::Uri,
    /// How many
    #[arg(default_value_t = 1)]
    count: u32,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    // From YAML to a snapshot: what a sidecar does, without its listeners.
    let (set, diagnostics) = ResourceSet::load(&watch::read(&args.config)?, &LoadOptions::default());
    let mut compiler = Compiler::new(CompileContext::new(Role::Sidecar));
    let routes = compiler.register::<RouteTable>();
    let (clusters, table) = (Clusters::new(), routes.clone());
    compiler.before_publish(move |snapshot| {
        clusters.reconcile(snapshot.get(&table).map(RouteTable::clusters).unwrap_or_default());
    });
    let outcome = compiler.apply(&set, diagnostics);
    if !outcome.accepted {
        return Err(outcome.diagnostics.to_string().into());
    }

    let mut client = ServiceBuilder::new()
        .layer(ContextLayer::new(compiler.snapshots().clone(), Direction::Outbound))
        .layer(SelectRouteLayer::new(routes))
        .layer(HeadersLayer::new())
        .service(dispatch(Shard::new()));
    for _ in 0..args.count {
        let request = Request::get(args.url.clone()).body(Body::empty())?;
        let response = client.ready().await?.call(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        println!("{} {}", status.as_u16(), String::from_utf8_lossy(&body).trim_end());
    }
    Ok(())
}
