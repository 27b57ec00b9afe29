//! A proxy of one's own: three layers of the mesh, and a foreign one between them, on a listener of one's own.
//!
//! `custom_proxy LISTEN UPSTREAM`: requests below `/api` go upstream, at most 64 at a time; everything else is 404.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use mesh_core::server::{ListenerSpec, ServerLimits, serve_here};
use mesh_core::{ClusterName, Direction, EdgeSettings, LocalReplyLayer, NormalizeLayer, Slot};
use mesh_route::{
    Cluster, ClusterSpec, Clusters, Discovery, EndpointSpec, RouteBuilder, RouteTable, SelectRouteLayer,
    Shard, dispatch,
};
use tower::ServiceBuilder;
use tower::limit::ConcurrencyLimitLayer;

/// Forwards what is below /api.
#[derive(Parser)]
struct Args {
    /// Where to listen; port 0 takes a free one
    listen: SocketAddr,
    /// Where to forward to
    upstream: SocketAddr,
}

#[tokio::main]
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
    let endpoints = Discovery::Static(vec![EndpointSpec::new(args.upstream)]);
    let cluster = Arc::new(Cluster::new(ClusterSpec::new(ClusterName::custom("upstream"), endpoints)));
    Clusters::new().reconcile(std::slice::from_ref(&cluster));
    let api = RouteBuilder::new("api").path_prefix("/api").forward(cluster)?;
    let table = RouteTable::builder().host("*", [api]).build()?;

    let stack = ServiceBuilder::new()
        .layer(LocalReplyLayer::new(Direction::Gateway))
        .layer(NormalizeLayer::new(Slot::fixed(EdgeSettings::default()), Direction::Gateway))
        // A foreign layer: it waits, so the edge waits with it; its error type passes through.
        .layer(ConcurrencyLimitLayer::new(64))
        .layer(SelectRouteLayer::new(Slot::fixed(table)))
        .service(dispatch(Shard::new()));
    let spec = ListenerSpec::new("custom", args.listen, Direction::Gateway);
    let (address, serving) = serve_here(spec, stack, ServerLimits::default(), None)?;
    println!("listening custom={address}");
    serving.await;
    Ok(())
}
