//! Istio traffic management as tower layers.
#![forbid(unsafe_code)]

mod cluster;

pub use cluster::{
    BalancerKind, ClusterSpec, Discovery, DnsEndpoint, EndpointSpec, PoolSettings, TcpKeepalive,
    UpstreamProtocol,
};
