//! The composition of the proxies, in plain sight.
//!
//! The order is a public contract, and a test holds it. Outermost first:
//!
//! | layer | why here |
//! |---|---|
//! | `AccessLog` | only here are local replies, clients that left and bodies that were cut seen |
//! | `LocalReply` | the one place that makes an HTTP or gRPC reply of an error |
//! | `CatchPanic` | a panic below is the 500 of one request |
//! | `Normalize` | before anything decides: all that follows reads one request |
//! | `SelectRoute` | selection precedes what is per route |
//! | `Fault` | what is injected reaches neither retries nor the upstream, nor what is told to browsers |
//! | `Cors` | preflights end here; what replies say to browsers has the last word |
//! | `Headers` | the route's operations, on replies too |
//! | `dispatch` | redirects, answers, or sends upstream; always ready |

use std::sync::Arc;

use mesh_core::server::{HttpStack, L4};
use mesh_core::{
    CatchPanicLayer, Direction, EdgeSettings, ListenerSet, LocalReplyLayer, NormalizeLayer, Panics, Slot,
};
use mesh_route::{
    CorsLayer, FaultLayer, HeadersLayer, RouteTable, SelectRouteLayer, Shard, TcpDispatch, TcpRouteTable,
    dispatch,
};
use mesh_telemetry::access_log::{AccessLogLayer, ConnectionEntry};
use tower::ServiceBuilder;

/// What every stack of a process shares.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Where lines of the access log go.
    pub access_log: AccessLogLayer,
    /// Panics of requests.
    pub panics: Panics,
    /// How requests are normalised, per generation.
    pub edge: Slot<EdgeSettings>,
    /// The servers of a gateway, of which each takes only requests for hosts of its own; `None` elsewhere.
    pub servers: Option<Slot<ListenerSet>>,
}

/// What the workload sends: `direction` is outbound for a sidecar and gateway for a gateway.
pub fn outbound(
    parts: &Parts,
    direction: Direction,
    routes: Slot<RouteTable>,
    shard: Arc<Shard>,
) -> impl HttpStack + use<> {
    let select = SelectRouteLayer::new(routes).direction(direction);
    let select = parts.servers.iter().fold(select, |select, servers| select.servers(servers.clone()));
    ServiceBuilder::new()
        .layer(parts.access_log.clone())
        .layer(LocalReplyLayer::new(direction))
        .layer(CatchPanicLayer::new(parts.panics.clone()))
        .layer(NormalizeLayer::new(parts.edge.clone(), direction))
        .layer(select)
        .layer(FaultLayer::new())
        .layer(CorsLayer::new())
        .layer(HeadersLayer::new())
        .service(dispatch(shard))
}

/// What is not HTTP, beside [`outbound`]: forwarded as it comes, with a line in the access log when it has ended.
pub fn l4(parts: &Parts, routes: Slot<TcpRouteTable>, shard: Arc<Shard>) -> impl L4 + use<> {
    let dispatch = TcpDispatch::new(routes, shard);
    let Some(sink) = parts.access_log.sink().cloned() else { return dispatch };
    dispatch.on_end(move |conn, report| {
        sink.connection(&ConnectionEntry {
            conn,
            flags: report.flags,
            transport_failure: report.transport_failure.as_deref(),
            received_bytes: report.received_bytes,
            sent_bytes: report.sent_bytes,
            duration: report.duration,
            upstream: report.upstream,
            cluster: report.cluster.as_deref(),
            upstream_local: report.upstream_local,
            sni: report.sni.as_deref(),
            route: report.route.as_deref(),
        });
    })
}

/// What comes to the workload. `routes` leads to the application, whatever the host.
pub fn inbound(parts: &Parts, routes: Slot<RouteTable>, shard: Arc<Shard>) -> impl HttpStack + use<> {
    outbound(parts, Direction::Inbound, routes, shard)
}
