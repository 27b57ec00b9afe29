//! What Istio's `ValidateDestinationRule` refuses and warns about.

use std::collections::BTreeSet;

use super::{
    ClientTlsMode, ClientTlsSettings, ConnectionPoolSettings, ConsistentHashLb, DestinationRule,
    H2UpgradePolicy, HttpSettings, LoadBalancerSettings, LocalityFailover, LocalityLbSetting,
    OutlierDetection, PortTrafficPolicy, RetryBudget, SimpleLb, Subset, TcpSettings, TrafficPolicy,
    TunnelSettings, WarmupConfiguration, ZoneAwareLbSetting,
};
use crate::istio::findings::{Findings, Validate};
use crate::istio::types::check::{self, ExportToOf};
use crate::istio::types::common::{Duration, Percent};
use crate::istio::types::target;

/// How many `portLevelSettings` there may be.
const MAX_PORT_SETTINGS: usize = 4096;

/// Envoy's bound on the size of Maglev's table.
const MAX_MAGLEV_TABLE: u64 = 5_000_011;

const DEPRECATED: &str = "IST0002";

impl Validate for DestinationRule {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        out.check("host", check::wildcard_domain(&self.host));
        if let Some(policy) = &self.traffic_policy {
            out.within("trafficPolicy", |out| policy.validate(out));
        }
        let mut names = BTreeSet::new();
        for (index, subset) in self.subsets.iter().enumerate() {
            out.item("subsets", index, |out| {
                if !names.insert(subset.name.as_str()) {
                    out.error("name", format!("the subset name {:?} is used twice", subset.name));
                }
                subset.validate(out);
            });
        }
        let kind = match self.workload_selector {
            Some(_) => ExportToOf::DestinationRuleWithSelector,
            None => ExportToOf::Other,
        };
        let namespace = out.subject().namespace.clone();
        check::export_to(out, "exportTo", &self.export_to, &namespace, kind);
        if let Some(selector) = &self.workload_selector {
            check::selector_labels(out, "workloadSelector.matchLabels", &selector.match_labels);
        }
    }
}

impl Validate for Subset {
    fn validate(&self, out: &mut Findings) {
        if self.name.is_empty() {
            out.error("name", "a subset needs a name");
        } else {
            out.check("name", check::dns1123_label(&self.name));
        }
        check::labels(out, "labels", &self.labels);
        if let Some(policy) = &self.traffic_policy {
            out.within("trafficPolicy", |out| policy.validate(out));
        }
    }
}

impl Validate for TrafficPolicy {
    fn validate(&self, out: &mut Findings) {
        if *self == Self::default() {
            out.error("", "a traffic policy needs at least one field");
            return;
        }
        if self.tunnel.is_some() && self.proxy_protocol.is_some() {
            out.error("proxyProtocol", "tunnel and proxyProtocol must not be set together");
        }
        blocks(
            out,
            self.outlier_detection.as_ref(),
            self.connection_pool.as_ref(),
            self.load_balancer.as_ref(),
            self.tls.as_ref(),
        );
        if self.port_level_settings.len() > MAX_PORT_SETTINGS {
            out.error("portLevelSettings", format!("at most {MAX_PORT_SETTINGS} ports may have settings"));
        }
        for (index, settings) in self.port_level_settings.iter().enumerate() {
            out.item("portLevelSettings", index, |out| settings.validate(out));
        }
        if let Some(tunnel) = &self.tunnel {
            out.within("tunnel", |out| tunnel.validate(out));
        }
        if let Some(budget) = &self.retry_budget {
            out.within("retryBudget", |out| budget.validate(out));
        }
    }
}

impl Validate for PortTrafficPolicy {
    fn validate(&self, out: &mut Findings) {
        match &self.port {
            None => out.error("port", "the settings of a port need the port"),
            Some(port) => {
                out.check("port.number", check::port(port.number));
            }
        }
        if *self == (Self { port: self.port, ..Self::default() }) {
            out.error("", "the settings of a port need at least one field");
        }
        blocks(
            out,
            self.outlier_detection.as_ref(),
            self.connection_pool.as_ref(),
            self.load_balancer.as_ref(),
            self.tls.as_ref(),
        );
    }
}

/// The four blocks that a policy and the settings of a port share.
fn blocks(
    out: &mut Findings,
    outlier: Option<&OutlierDetection>,
    pool: Option<&ConnectionPoolSettings>,
    balancer: Option<&LoadBalancerSettings>,
    tls: Option<&ClientTlsSettings>,
) {
    if let Some(outlier) = outlier {
        out.within("outlierDetection", |out| outlier.validate(out));
    }
    if let Some(pool) = pool {
        out.within("connectionPool", |out| pool.validate(out));
    }
    if let Some(balancer) = balancer {
        out.within("loadBalancer", |out| {
            balancer.validate(out);
            if let Some(locality) = &balancer.locality_lb_setting {
                out.within("localityLbSetting", |out| locality_setting(out, locality, outlier.is_some()));
            }
            if let Some(zones) = &balancer.zone_aware_lb_setting {
                out.within("zoneAwareLbSetting", |out| zone_aware_setting(out, zones, outlier.is_some()));
            }
        });
    }
    if let Some(tls) = tls {
        out.within("tls", |out| tls.validate(out));
    }
}

impl Validate for TunnelSettings {
    fn validate(&self, out: &mut Findings) {
        if !matches!(self.protocol.as_str(), "" | "CONNECT" | "POST") {
            out.error(
                "protocol",
                format!("{:?} is not a tunnel protocol; use \"CONNECT\" or \"POST\"", self.protocol),
            );
        }
        if check::fqdn(&self.target_host).is_err() && check::ip(&self.target_host).is_err() {
            out.error(
                "targetHost",
                format!("{:?} is neither a host name nor an IP address", self.target_host),
            );
        }
        out.check("targetPort", check::port(self.target_port));
    }
}

impl Validate for RetryBudget {
    fn validate(&self, out: &mut Findings) {
        percentage(out, "percent", self.percent);
        if let Some(interval) = self.budget_interval {
            out.check("budgetInterval", check::duration_or_zero(interval));
        }
    }
}

/// A share of requests: 0..=100.
fn percentage(out: &mut Findings, field: &str, percent: Option<Percent>) {
    if let Some(Percent { value }) = percent
        && !(0.0..=100.0).contains(&value)
    {
        out.within(field, |out| {
            out.error("value", format!("percentage {value} must be in the range 0..100"));
        });
    }
}

fn optional_duration(out: &mut Findings, field: &str, value: Option<Duration>) {
    if let Some(value) = value {
        out.check(field, check::duration(value));
    }
}

fn not_negative(out: &mut Findings, field: &str, value: i32) {
    if value < 0 {
        out.error(field, format!("{value} must not be negative"));
    }
}

impl Validate for OutlierDetection {
    fn validate(&self, out: &mut Findings) {
        if self.consecutive_errors != 0 {
            let message = "deprecated; use consecutiveGatewayErrors or consecutive5xxErrors";
            out.warning_code("consecutiveErrors", message, DEPRECATED);
        }
        if !self.split_external_local_origin_errors
            && self.consecutive_local_origin_failures.is_some_and(|n| n > 0)
        {
            out.error(
                "consecutiveLocalOriginFailures",
                "has no meaning without splitExternalLocalOriginErrors",
            );
        }
        optional_duration(out, "interval", self.interval);
        optional_duration(out, "baseEjectionTime", self.base_ejection_time);
        out.check("maxEjectionPercent", check::percent(self.max_ejection_percent.into()));
        out.check("minHealthPercent", check::percent(self.min_health_percent.into()));
        for (index, code) in self.outlier_detection_http_error_codes.iter().enumerate() {
            out.check(&format!("outlierDetectionHttpErrorCodes[{index}]"), check::http_status(*code));
        }
    }
}

impl Validate for ConnectionPoolSettings {
    fn validate(&self, out: &mut Findings) {
        if self.tcp.is_none() && self.http.is_none() {
            out.error("", "a connection pool needs tcp or http");
        }
        if let Some(http) = &self.http {
            out.within("http", |out| http.validate(out));
        }
        if let Some(tcp) = &self.tcp {
            out.within("tcp", |out| tcp.validate(out));
        }
    }
}

impl Validate for HttpSettings {
    fn validate(&self, out: &mut Findings) {
        not_negative(out, "http1MaxPendingRequests", self.http1_max_pending_requests);
        not_negative(out, "http2MaxRequests", self.http2_max_requests);
        not_negative(out, "maxRequestsPerConnection", self.max_requests_per_connection);
        not_negative(out, "maxRetries", self.max_retries);
        not_negative(out, "maxConcurrentStreams", self.max_concurrent_streams);
        if let Some(timeout) = self.idle_timeout {
            out.check("idleTimeout", check::duration_or_zero(timeout));
        }
        if self.h2_upgrade_policy == H2UpgradePolicy::Upgrade && self.use_client_protocol {
            out.error("useClientProtocol", "must not be true when h2UpgradePolicy is UPGRADE");
        }
        if let Some(keepalive) = &self.http2_keepalive {
            out.within("http2KeepAlive", |out| {
                for (field, value) in [("interval", keepalive.interval), ("timeout", keepalive.timeout)] {
                    match value {
                        None => out.error(field, "is required"),
                        Some(value) => {
                            out.check(field, check::duration(value));
                        }
                    }
                }
            });
        }
    }
}

impl Validate for TcpSettings {
    fn validate(&self, out: &mut Findings) {
        not_negative(out, "maxConnections", self.max_connections);
        optional_duration(out, "connectTimeout", self.connect_timeout);
        optional_duration(out, "maxConnectionDuration", self.max_connection_duration);
        if let Some(timeout) = self.idle_timeout {
            out.check("idleTimeout", check::duration_or_zero(timeout));
        }
        if let Some(keepalive) = &self.tcp_keepalive {
            optional_duration(out, "tcpKeepalive.time", keepalive.time);
            optional_duration(out, "tcpKeepalive.interval", keepalive.interval);
        }
    }
}

impl Validate for LoadBalancerSettings {
    fn validate(&self, out: &mut Findings) {
        if self.simple.is_some() && self.consistent_hash.is_some() {
            out.error("consistentHash", "only one of simple and consistentHash may be set");
        }
        if let Some(hash) = &self.consistent_hash {
            out.within("consistentHash", |out| hash.validate(out));
        }
        if self.locality_lb_setting.is_some() && self.zone_aware_lb_setting.is_some() {
            out.error(
                "zoneAwareLbSetting",
                "only one of localityLbSetting and zoneAwareLbSetting may be set",
            );
        }
        if let Some(duration) = self.warmup_duration_secs {
            out.warning_code("warmupDurationSecs", "deprecated; use warmup.duration", DEPRECATED);
            out.check("warmupDurationSecs", check::duration(duration));
            if self.warmup.is_some() {
                out.error("warmupDurationSecs", "only one of warmupDurationSecs and warmup may be set");
            }
        }
        if let Some(warmup) = &self.warmup {
            out.within("warmup", |out| warmup.validate(out));
            let slow_start = matches!(
                self.simple.unwrap_or_default(),
                SimpleLb::Unspecified | SimpleLb::RoundRobin | SimpleLb::LeastRequest | SimpleLb::LeastConn
            );
            if self.consistent_hash.is_some() || !slow_start {
                out.warning("warmup", "only has a meaning for ROUND_ROBIN and LEAST_REQUEST");
            }
        }
    }
}

impl Validate for WarmupConfiguration {
    fn validate(&self, out: &mut Findings) {
        match self.duration {
            None => out.error("duration", "is required"),
            Some(duration) => {
                out.check("duration", check::duration(duration));
            }
        }
        if let Some(percent) = self.minimum_percent
            && !(0.0..=100.0).contains(&percent)
        {
            out.error("minimumPercent", format!("percentage {percent} must be in the range 0..100"));
        }
        if let Some(aggression) = self.aggression
            && aggression < 1.0
        {
            out.error("aggression", format!("{aggression} must be at least 1"));
        }
    }
}

impl Validate for ConsistentHashLb {
    fn validate(&self, out: &mut Findings) {
        let keys = [
            self.http_header_name.is_some(),
            self.http_cookie.is_some(),
            self.use_source_ip.is_some(),
            self.http_query_parameter_name.is_some(),
        ];
        if keys.into_iter().filter(|set| *set).count() > 1 {
            out.error(
                "",
                "only one of httpHeaderName, httpCookie, useSourceIp and httpQueryParameterName may be set",
            );
        }
        if let Some(cookie) = &self.http_cookie {
            out.within("httpCookie", |out| {
                if cookie.name.is_empty() {
                    out.error("name", "a cookie needs a name");
                }
                if let Some(ttl) = cookie.ttl
                    && ttl.is_negative()
                {
                    out.error("ttl", format!("duration {ttl} must not be negative"));
                }
                let mut names = BTreeSet::new();
                for (index, attribute) in cookie.attributes.iter().enumerate() {
                    let at = format!("attributes[{index}].name");
                    if attribute.name.is_empty() {
                        out.error(&at, "an attribute of a cookie needs a name");
                    } else if !names.insert(attribute.name.as_str()) {
                        out.error(&at, format!("the attribute {:?} is set twice", attribute.name));
                    }
                }
            });
        }
        if self.minimum_ring_size != 0 {
            out.warning_code("minimumRingSize", "deprecated; use ringHash.minimumRingSize", DEPRECATED);
            if self.ring_hash.is_some() || self.maglev.is_some() {
                out.error("minimumRingSize", "only one of minimumRingSize, ringHash and maglev may be set");
            }
        }
        if self.ring_hash.is_some() && self.maglev.is_some() {
            out.error("maglev", "only one of ringHash and maglev may be set");
        }
        if let Some(size) = self.maglev.map(|maglev| maglev.table_size.unwrap_or_default()) {
            if size == 0 {
                out.error("maglev.tableSize", "must be set");
            } else if size >= MAX_MAGLEV_TABLE {
                out.error("maglev.tableSize", format!("{size} must be less than {MAX_MAGLEV_TABLE}"));
            } else if !is_prime(size) {
                out.error("maglev.tableSize", format!("{size} must be a prime number"));
            }
        }
    }
}

/// For numbers below [`MAX_MAGLEV_TABLE`]; 1 counts, as it does for Envoy.
fn is_prime(number: u64) -> bool {
    number < 4
        || (number % 2 == 1
            && (3..).step_by(2).take_while(|f| f * f <= number).all(|f| !number.is_multiple_of(f)))
}

const TOPOLOGY_LABELS: [&str; 3] =
    ["topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"];

pub(in crate::istio) fn locality_setting(
    out: &mut Findings,
    setting: &LocalityLbSetting,
    outlier_detection: bool,
) {
    if !setting.distribute.is_empty() && !setting.failover.is_empty() {
        out.error("failover", "only one of distribute and failover may be set");
    }
    if !setting.failover.is_empty() {
        for (index, label) in setting.failover_priority.iter().enumerate() {
            if TOPOLOGY_LABELS.contains(&label.as_str()) {
                let message = format!("the topology label {label:?} must not stand beside failover");
                out.error(&format!("failoverPriority[{index}]"), message);
            }
        }
    }
    let mut from = Localities::default();
    for (index, share) in setting.distribute.iter().enumerate() {
        out.item("distribute", index, |out| {
            out.check("from", from.add(&share.from));
            let mut to = Localities::default();
            out.within("to", |out| {
                for (locality, weight) in &share.to {
                    if !(1..=100).contains(weight) {
                        let message = format!("weight {weight} must be in the range 1..100");
                        out.error(&check::key_path(locality), message);
                    }
                    out.check(&check::key_path(locality), to.add(locality));
                }
            });
            let sum: u64 = share.to.values().map(|weight| u64::from(*weight)).sum();
            if sum != 100 {
                out.error("to", format!("the weights must be 100 in sum, and are {sum}"));
            }
        });
    }
    failovers(out, &setting.failover, &setting.failover_priority, outlier_detection);
}

pub(in crate::istio) fn zone_aware_setting(
    out: &mut Findings,
    setting: &ZoneAwareLbSetting,
    outlier_detection: bool,
) {
    for (index, label) in setting.failover_priority.iter().enumerate() {
        let key = label.split('=').next().unwrap_or(label);
        if TOPOLOGY_LABELS.contains(&key) {
            let message = format!("the topology label {key:?} must not stand here: zones are seen to anyway");
            out.error(&format!("failoverPriority[{index}]"), message);
        }
    }
    failovers(out, &setting.failover, &setting.failover_priority, outlier_detection);
}

fn failovers(
    out: &mut Findings,
    failover: &[LocalityFailover],
    failover_priority: &[String],
    outlier_detection: bool,
) {
    let fails_over = !failover.is_empty() || !failover_priority.is_empty();
    if fails_over && !outlier_detection {
        out.warning("", "failover needs outlierDetection; without it nothing ever fails over");
    }
    for (index, failover) in failover.iter().enumerate() {
        out.item("failover", index, |out| {
            if failover.from == failover.to {
                out.error("to", "must be another region than from");
            }
            for (field, region) in [("from", &failover.from), ("to", &failover.to)] {
                if region.contains('/') || region.contains('*') {
                    out.error(field, format!("{region:?} must be a region, without zone and wildcard"));
                }
            }
        });
    }
}

/// Localities of one list, none of which may lie within another, except that a wildcard may come after what it covers:
/// the first that matches is taken, so it stands for the rest.
#[derive(Default)]
struct Localities<'a> {
    seen: Vec<Vec<&'a str>>,
}

impl<'a> Localities<'a> {
    fn add(&mut self, locality: &'a str) -> check::Checked {
        let wildcards = locality.matches('*').count();
        if wildcards > 1 || (wildcards == 1 && !locality.ends_with('*')) {
            return Err(format!("locality {locality:?}: a wildcard may only stand once, and last"));
        }
        let mut parts: Vec<&str> = locality.split('/').collect();
        if parts.len() > 3 || parts.iter().any(|part| part.is_empty()) {
            return Err(format!("locality {locality:?} must be region, region/zone or region/zone/sub-zone"));
        }
        if wildcards == 1 {
            parts.pop();
        }
        let overlaps = self
            .seen
            .iter()
            .any(|before| parts.starts_with(before) || (wildcards == 0 && before.starts_with(&parts)));
        self.seen.push(parts);
        if overlaps { Err(format!("locality {locality:?} overlaps with another one")) } else { Ok(()) }
    }
}

/// What a credential's name begins with that is kept in a ConfigMap.
const CONFIG_MAP: &str = "configmap://";

/// The name of a ConfigMap with an optional namespace before it, which can only be the rule's own.
fn config_map(name: &str, own: &str) -> check::Checked {
    let (namespace, name) = name.split_once('/').unwrap_or((own, name));
    if name.is_empty() || name.contains('/') {
        return Err(format!("must be {CONFIG_MAP}name or {CONFIG_MAP}namespace/name"));
    }
    if namespace != own {
        return Err(format!("a ConfigMap of the namespace {namespace:?} cannot be used in {own:?}"));
    }
    Ok(())
}

impl Validate for ClientTlsSettings {
    fn validate(&self, out: &mut Findings) {
        let mode = self.mode;
        if let Some(name) = self.credential_name.strip_prefix(CONFIG_MAP) {
            out.check("credentialName", config_map(name, &out.subject().namespace));
        }
        if self.insecure_skip_verify == Some(true) {
            let set = [
                ("caCertificates", !self.ca_certificates.is_empty(), true),
                ("credentialName", !self.credential_name.is_empty(), mode == ClientTlsMode::Simple),
                ("subjectAltNames", !self.subject_alt_names.is_empty(), true),
            ];
            if matches!(mode, ClientTlsMode::Simple | ClientTlsMode::Mutual) {
                for (field, _, _) in set.iter().filter(|(_, set, checked)| *set && *checked) {
                    out.error(field, "must not be set when insecureSkipVerify is true");
                }
            }
        }
        let files = [
            ("clientCertificate", &self.client_certificate),
            ("privateKey", &self.private_key),
            ("caCertificates", &self.ca_certificates),
            ("caCrl", &self.ca_crl),
        ];
        match mode {
            ClientTlsMode::Simple | ClientTlsMode::Mutual if !self.credential_name.is_empty() => {
                for (field, _) in files.iter().filter(|(_, file)| !file.is_empty()) {
                    out.error(field, "must not be set when credentialName is");
                }
            }
            ClientTlsMode::Mutual => {
                for (field, file) in &files[..2] {
                    if file.is_empty() {
                        out.error(field, "is required for mutual TLS");
                    }
                }
            }
            ClientTlsMode::IstioMutual => {
                for (field, _) in files.iter().filter(|(_, file)| !file.is_empty()) {
                    out.warning(field, "is ignored: ISTIO_MUTUAL uses the mesh's own certificates");
                }
            }
            ClientTlsMode::Disable | ClientTlsMode::Simple => {}
        }
    }
}
