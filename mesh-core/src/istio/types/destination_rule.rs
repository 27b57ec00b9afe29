//! `DestinationRule` (networking.istio.io): how connections to a service behave once a route has chosen it.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::common::{Duration, Percent, PortSelector, WorkloadSelector};

pub(super) mod validate;

/// Policies of a service and its subsets (DR-01 … DR-06).
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DestinationRule {
    /// The service; a short name is completed by the namespace of the rule.
    pub host: String,
    /// For the whole service.
    pub traffic_policy: Option<Box<TrafficPolicy>>,
    /// Named parts of the service's endpoints.
    pub subsets: Vec<Subset>,
    /// Namespaces that see the resource; empty is all.
    pub export_to: Vec<String>,
    /// The clients that the rule is for; absent is all.
    pub workload_selector: Option<WorkloadSelector>,
}

/// Endpoints of a service that have some labels.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Subset {
    /// The name that routes use.
    pub name: String,
    /// Labels that an endpoint must have.
    pub labels: BTreeMap<String, String>,
    /// Replaces the rule's policy block by block (DR-03).
    pub traffic_policy: Option<Box<TrafficPolicy>>,
}

/// How connections behave.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TrafficPolicy {
    /// Load balancing.
    pub load_balancer: Option<LoadBalancerSettings>,
    /// Limits and timeouts of connections.
    pub connection_pool: Option<ConnectionPoolSettings>,
    /// Ejection of endpoints that fail.
    pub outlier_detection: Option<OutlierDetection>,
    /// TLS to the endpoints.
    pub tls: Option<ClientTlsSettings>,
    /// Replaces all four blocks for a port (DR-04).
    pub port_level_settings: Vec<PortTrafficPolicy>,
    /// A tunnel through another proxy.
    pub tunnel: Option<TunnelSettings>,
    /// The PROXY protocol to the endpoints.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// A limit on concurrent retries.
    pub retry_budget: Option<RetryBudget>,
}

/// The policy of one port.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PortTrafficPolicy {
    /// Which port; required.
    pub port: Option<PortSelector>,
    /// Load balancing.
    pub load_balancer: Option<LoadBalancerSettings>,
    /// Limits and timeouts of connections.
    pub connection_pool: Option<ConnectionPoolSettings>,
    /// Ejection of endpoints that fail.
    pub outlier_detection: Option<OutlierDetection>,
    /// TLS to the endpoints.
    pub tls: Option<ClientTlsSettings>,
}

/// A tunnel through another proxy, for TCP.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TunnelSettings {
    /// `CONNECT` (also when empty) or `POST`.
    pub protocol: String,
    /// The host that the tunnel leads to.
    pub target_host: String,
    /// The port that the tunnel leads to.
    pub target_port: u32,
}

/// The PROXY protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyProtocol {
    /// The version.
    pub version: ProxyProtocolVersion,
}

/// A version of the PROXY protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum ProxyProtocolVersion {
    /// The text form.
    #[default]
    V1,
    /// The binary form.
    V2,
}

/// A limit on concurrent retries (DR-RB01).
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryBudget {
    /// Of the active and pending requests; absent is 20.
    pub percent: Option<Percent>,
    /// Always allowed; 0 is 3.
    pub min_retry_concurrency: u32,
    /// Over which requests are counted; absent or zero is only those active now.
    pub budget_interval: Option<Duration>,
}

/// Load balancing: one of `simple` and `consistent_hash`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancerSettings {
    /// An algorithm without parameters.
    pub simple: Option<SimpleLb>,
    /// Stickiness by a property of the request.
    pub consistent_hash: Option<ConsistentHashLb>,
    /// Preference by locality.
    pub locality_lb_setting: Option<LocalityLbSetting>,
    /// The deprecated form of `warmup`.
    pub warmup_duration_secs: Option<Duration>,
    /// A slow start for new endpoints.
    pub warmup: Option<WarmupConfiguration>,
    /// Preference by zone; xor `locality_lb_setting`.
    pub zone_aware_lb_setting: Option<ZoneAwareLbSetting>,
}

/// An algorithm without parameters (DR-LB01).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum SimpleLb {
    /// The default.
    #[default]
    Unspecified,
    /// The deprecated name of `LEAST_REQUEST`.
    LeastConn,
    /// At random.
    Random,
    /// To where the connection was going.
    Passthrough,
    /// In turn.
    RoundRobin,
    /// The less busy of two.
    LeastRequest,
}

/// Stickiness: one key, one algorithm (DR-LB02 … DR-LB05).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConsistentHashLb {
    /// The value of this header.
    pub http_header_name: Option<String>,
    /// The value of this cookie.
    pub http_cookie: Option<HttpCookie>,
    /// The address of the client.
    pub use_source_ip: Option<bool>,
    /// The value of this query parameter.
    pub http_query_parameter_name: Option<String>,
    /// A ring.
    pub ring_hash: Option<RingHash>,
    /// Maglev's table.
    pub maglev: Option<Maglev>,
    /// The deprecated form of `ring_hash`.
    pub minimum_ring_size: u64,
}

/// A cookie that holds the hash key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpCookie {
    /// Its name; required.
    pub name: String,
    /// The path for which it is set.
    pub path: String,
    /// Its age when the proxy sets it, 0 for a session; absent: the proxy never sets it.
    pub ttl: Option<Duration>,
    /// Further attributes when the proxy sets it.
    pub attributes: Vec<CookieAttribute>,
}

/// An attribute of a cookie.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CookieAttribute {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// A ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RingHash {
    /// Virtual nodes; 0 is 1024.
    pub minimum_ring_size: u64,
}

/// Maglev's table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Maglev {
    /// A prime number below 5,000,011; absent is 65,537.
    pub table_size: Option<u64>,
}

/// Preference by locality (DR-LB06): one of `distribute`, `failover`, `failover_priority`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LocalityLbSetting {
    /// Shares by locality of the client.
    pub distribute: Vec<LocalityDistribute>,
    /// Regions in place of failed ones.
    pub failover: Vec<LocalityFailover>,
    /// Labels by which endpoints are ordered.
    pub failover_priority: Vec<String>,
    /// Absent is on.
    pub enabled: Option<bool>,
}

/// Shares for clients of a locality.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LocalityDistribute {
    /// `region/zone/sub-zone` of the client; may end in `*`.
    pub from: String,
    /// Shares by locality, 100 in sum.
    pub to: BTreeMap<String, u32>,
}

/// A region in place of another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LocalityFailover {
    /// The region that failed.
    pub from: String,
    /// The region in its place.
    pub to: String,
}

/// Preference by zone (DR-LB07).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ZoneAwareLbSetting {
    /// Absent is on.
    pub enabled: Option<bool>,
    /// Regions in place of others.
    pub failover: Vec<LocalityFailover>,
    /// Labels by which endpoints are near, before regions are.
    pub failover_priority: Vec<String>,
    /// Below so many endpoints zones do not count; absent is 6.
    pub min_cluster_size: Option<u32>,
}

/// A slow start (DR-LB08).
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WarmupConfiguration {
    /// How long; required.
    pub duration: Option<Duration>,
    /// The share at the start; absent is 10.
    pub minimum_percent: Option<f64>,
    /// How the share grows; absent is 1, which is linear.
    pub aggression: Option<f64>,
}

/// Limits and timeouts of connections (DR-CP01 … DR-CP06).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConnectionPoolSettings {
    /// Of TCP connections.
    pub tcp: Option<TcpSettings>,
    /// Of HTTP requests.
    pub http: Option<HttpSettings>,
}

/// Limits and timeouts of TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpSettings {
    /// 0 is no limit.
    pub max_connections: i32,
    /// Absent is 10 s.
    pub connect_timeout: Option<Duration>,
    /// Keep-alive probes.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Absent is none.
    pub max_connection_duration: Option<Duration>,
    /// Absent is 1 h, zero is off.
    pub idle_timeout: Option<Duration>,
}

/// Keep-alive probes of TCP; what is absent is the system's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpKeepalive {
    /// Probes without an answer until the connection is dead; 0 is the system's.
    pub probes: u32,
    /// Idle time before the first.
    pub time: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
}

/// Limits and timeouts of HTTP requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpSettings {
    /// Requests that wait for a connection; 0 is no limit.
    pub http1_max_pending_requests: i32,
    /// Requests in flight; 0 is no limit.
    pub http2_max_requests: i32,
    /// 0 is no limit, 1 is no keep-alive.
    pub max_requests_per_connection: i32,
    /// Retries in flight; 0 is no limit.
    pub max_retries: i32,
    /// Absent is 1 h, zero is off.
    pub idle_timeout: Option<Duration>,
    /// Whether HTTP/1.1 becomes HTTP/2 upstream.
    pub h2_upgrade_policy: H2UpgradePolicy,
    /// Whether upstream speaks the client's protocol.
    pub use_client_protocol: bool,
    /// Streams of one HTTP/2 connection; 0 is no limit.
    pub max_concurrent_streams: i32,
    /// Pings of HTTP/2 connections.
    #[serde(rename = "http2KeepAlive")]
    pub http2_keepalive: Option<Http2KeepAlive>,
}

/// Whether HTTP/1.1 becomes HTTP/2 upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum H2UpgradePolicy {
    /// The mesh's default.
    #[default]
    Default,
    /// Never.
    DoNotUpgrade,
    /// Always.
    Upgrade,
}

/// Pings of HTTP/2 connections; both are required.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Http2KeepAlive {
    /// Time between pings.
    pub interval: Option<Duration>,
    /// Until a ping without an answer ends the connection.
    pub timeout: Option<Duration>,
}

/// Ejection of endpoints that fail (DR-OD01 … DR-OD08).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OutlierDetection {
    /// Deprecated.
    pub consecutive_errors: i32,
    /// Whether errors of our own making are counted apart.
    pub split_external_local_origin_errors: bool,
    /// Errors of our own making in a row; absent is 5, 0 is off.
    pub consecutive_local_origin_failures: Option<u32>,
    /// 502, 503, 504 in a row; absent or 0 is off.
    pub consecutive_gateway_errors: Option<u32>,
    /// 5xx in a row; absent is 5, 0 is off.
    #[serde(rename = "consecutive5xxErrors")]
    pub consecutive_5xx_errors: Option<u32>,
    /// Between sweeps; absent is 10 s.
    pub interval: Option<Duration>,
    /// Times the ejections in a row; absent is 30 s.
    pub base_ejection_time: Option<Duration>,
    /// Of the endpoints; 0 is 10.
    pub max_ejection_percent: i32,
    /// Below that share of healthy endpoints nothing is ejected; 0 is off.
    pub min_health_percent: i32,
    /// The status codes that count as errors; empty is 500..=599.
    pub outlier_detection_http_error_codes: Vec<u32>,
}

/// TLS to the endpoints (DR-TLS01 … DR-TLS03).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientTlsSettings {
    /// Which kind of TLS.
    pub mode: ClientTlsMode,
    /// File of the client's certificate.
    pub client_certificate: String,
    /// File of the client's key.
    pub private_key: String,
    /// File of the authorities; empty is the system's.
    pub ca_certificates: String,
    /// A secret in place of files.
    pub credential_name: String,
    /// Names that the server may have; empty is the host.
    pub subject_alt_names: Vec<String>,
    /// The server name of the handshake; empty is the host.
    pub sni: String,
    /// Takes any certificate.
    pub insecure_skip_verify: Option<bool>,
    /// File of revoked certificates.
    pub ca_crl: String,
}

/// Which kind of TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ClientTlsMode {
    /// None.
    #[default]
    Disable,
    /// Only the server shows a certificate.
    Simple,
    /// Both do, from files or a secret.
    Mutual,
    /// Both do, with the mesh's identities.
    IstioMutual,
}
