//! Istio traffic management as tower layers.
//!
//! A [`RouteTable`] is the compiled model: made in Rust ([`RouteTable::builder`]) or from Istio YAML (feature `istio`).
//! [`SelectRouteLayer`] pins the route that takes a request, [`HeadersLayer`] applies its header operations, and
//! [`dispatch()`] sends the request to one of its clusters, redirects, or answers. [`explain`] says why.
//!
//! What dispatch does with timeouts, retries, limits, outlier detection and load balancing is there without it too, for
//! any service of a server or client: [`TimeoutLayer`], [`RetryLayer`], [`CircuitBreakerLayer`],
//! [`OutlierDetectionLayer`], [`Balance`]. They share their decisions with dispatch, and nothing else.
#![forbid(unsafe_code)]

mod attempt;
pub mod balance;
mod builder;
pub mod canary;
mod circuit_breaker;
mod cluster;
mod connect;
mod cors;
pub mod diff;
mod direct_response;
pub mod discover;
mod dispatch;
mod draws;
#[cfg(feature = "istio")]
pub mod dump;
mod endpoint;
mod explain;
mod fault;
mod forward;
mod grpc;
pub mod hash_policy;
pub mod headers;
mod headers_layer;
mod index;
#[cfg(feature = "istio")]
mod istio;
mod lock_order;
pub mod mirror;
pub mod outlier;
mod overrides;
mod percentage;
mod permit;
mod pool;
mod redirect;
mod request_view;
mod retry;
mod rewrite;
mod route;
mod runtime;
pub mod select;
mod shard;
#[cfg(feature = "simulate")]
pub mod simulate;
mod table;
mod tcp;
mod timeout;
mod weighted;

pub use balance::{Balance, Balancer, LocalityWeights, NotStatic, WarmUp, ZoneAware};
pub use builder::{BuildError, RouteBuilder, RouteTableBuilder};
pub use circuit_breaker::{CircuitBreaker, CircuitBreakerLayer};
pub use cluster::{
    BalancerKind, Cluster, ClusterSpec, Discovery, DnsEndpoint, EndpointSpec, Http2Keepalive, PoolSettings,
    TcpKeepalive, UpstreamProtocol,
};
pub use cors::{Cors, CorsLayer, CorsPolicy, CorsPolicyBuilder, InvalidCors, UnmatchedPreflights};
pub use direct_response::DirectResponse;
pub use dispatch::dispatch;
pub use endpoint::{Endpoint, EndpointSet, Member};
pub use explain::{ChosenBy, Decision, EndpointKey, Explanation, PassedOver, explain};
pub use fault::{
    Abort, AbortKind, Delay, Fault, FaultLayer, FaultScope, InjectFault, Injected, InvalidFault,
};
pub use hash_policy::{HashCookie, HashPolicy, InvalidHashPolicy, RequestKey};
pub use headers::HeaderOps;
pub use headers_layer::{Headers, HeadersLayer};
pub use mirror::{
    Mirror, MirrorAuthority, MirrorCounters, MirrorLayer, MirrorOutcome, MirrorRequests, Mirroring,
};
pub use outlier::{DetectOutlier, OutlierDetection, OutlierDetectionLayer, OutlierGroup};
pub use percentage::Percentage;
pub use pool::upstream_error;
pub use redirect::{Redirect, RedirectPath, RedirectPort};
pub use request_view::RequestView;
pub use retry::{
    Backoff, Outcome, Retry, RetryBudget, RetryClass, RetryLayer, RetryOn, RetryPolicy, RetryState,
    UnknownCondition, is_idempotent,
};
pub use rewrite::{PathRewrite, RegexRewrite, Rewrite};
pub use route::{
    ActionKind, Destination, Forward, PseudoHeaderMatcher, Route, RouteAction, RouteMatch, Unmet,
};
pub use runtime::{ClusterRuntime, Clusters};
pub use select::{SelectRoute, SelectRouteLayer};
pub use shard::Shard;
pub use table::{KeyedBy, Lookup, RouteTable, VirtualHost};
pub use tcp::{
    HttpPort, TcpConflict, TcpDestination, TcpDispatch, TcpMatch, TcpReport, TcpRoute, TcpRouteTable,
};
pub use timeout::{Timeout, TimeoutLayer};
pub use weighted::{InvalidWeights, Weighted};
