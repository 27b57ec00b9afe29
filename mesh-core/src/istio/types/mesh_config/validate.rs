//! What Istio's `ValidateMeshConfig` refuses and warns about.
//!
//! istiod fills its defaults in before it judges, so that only what was written can be wrong.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{ExtensionProvider, MeshConfig, MeshProxyConfig, MeshTracing, PrivateKeyProvider, RemoteService};
use crate::istio::findings::{Findings, Validate};
use crate::istio::types::check::{self, Checked, ExportToOf};
use crate::istio::types::common::Duration;
use crate::istio::types::destination_rule::validate::{locality_setting, zone_aware_setting};
use crate::istio::types::host::{HostOf, namespaced_host};

const MIN_CONNECT_TIMEOUT: Duration = Duration::from_secs(0);
const MAX_CONNECT_TIMEOUT: Duration = Duration::from_secs(3_600);

const DEPRECATED: &str = "IST0002";

/// The metadata by which a proxy once allocated addresses of ServiceEntries itself.
const AUTO_ALLOCATE: &str = "ISTIO_META_DNS_AUTO_ALLOCATE";

impl Validate for MeshConfig {
    fn validate(&self, out: &mut Findings) {
        if !self.trust_domain.is_empty() {
            out.check("trustDomain", trust_domain(&self.trust_domain));
        }
        for (index, alias) in self.trust_domain_aliases.iter().enumerate() {
            out.check(&format!("trustDomainAliases[{index}]"), trust_domain(alias));
        }
        if !self.root_namespace.is_empty() {
            out.check("rootNamespace", check::dns1123_label(&self.root_namespace));
        }
        if let Some(timeout) = self.connect_timeout
            && out.check("connectTimeout", check::duration(timeout))
        {
            out.check(
                "connectTimeout",
                check::duration_range(timeout, MIN_CONNECT_TIMEOUT, MAX_CONNECT_TIMEOUT),
            );
        }
        for (field, value) in [
            ("protocolDetectionTimeout", self.protocol_detection_timeout),
            ("dnsRefreshRate", self.dns_refresh_rate),
        ] {
            if let Some(value) = value {
                out.check(field, check::duration_or_zero(value));
            }
        }
        if let Some(setting) = &self.locality_lb_setting {
            out.within("localityLbSetting", |out| locality_setting(out, setting, true));
        }
        if let Some(setting) = &self.zone_aware_lb_setting {
            out.within("zoneAwareLbSetting", |out| zone_aware_setting(out, setting, true));
        }
        for (field, list) in [
            ("defaultServiceExportTo", &self.default_service_export_to),
            ("defaultVirtualServiceExportTo", &self.default_virtual_service_export_to),
            ("defaultDestinationRuleExportTo", &self.default_destination_rule_export_to),
        ] {
            check::export_to(out, field, list, ".", ExportToOf::ServiceEntry);
        }
        if let Some(policy) = &self.default_traffic_policy {
            out.within("defaultTrafficPolicy", |out| policy.validate(out));
        }
        if let Some(config) = &self.default_config {
            out.within("defaultConfig", |out| config.validate(out));
        }
        if let Some(port) = self.proxy_listen_port {
            out.check("proxyListenPort", check::port(port));
        }
        for (index, settings) in self.service_settings.iter().enumerate() {
            for (at, host) in settings.hosts.iter().enumerate() {
                out.check(&format!("serviceSettings[{index}].hosts[{at}]"), check::wildcard_domain(host));
            }
        }
        let mut names = BTreeSet::new();
        for (index, provider) in self.extension_providers.iter().enumerate() {
            out.item("extensionProviders", index, |out| provider.validate_among(out, &mut names));
        }
        if self.mesh_mtls.as_ref().is_some_and(|tls| !tls.ecdh_curves.is_empty()) {
            out.error("meshMTLS.ecdhCurves", "TLS between workloads does not support a choice of curves");
        }
        if let Some(tls) = &self.tls_defaults {
            curves(out, &tls.ecdh_curves);
        }
    }
}

impl Validate for MeshProxyConfig {
    fn validate(&self, out: &mut Findings) {
        if self.concurrency.is_some_and(|workers| workers < 0) {
            out.error("concurrency", "must be greater than or equal to 0");
        }
        if let Some(drain) = self.drain_duration
            && out.check("drainDuration", check::duration(drain))
            && drain.as_nanos() % 1_000_000_000 != 0
        {
            out.error("drainDuration", "only whole seconds are supported");
        }
        if let Some(drain) = self.termination_drain_duration {
            out.check("terminationDrainDuration", check::duration_or_zero(drain));
        }
        for (field, port) in [("proxyAdminPort", self.proxy_admin_port), ("statusPort", self.status_port)] {
            if let Some(port) = port {
                out.check(field, check::port(port));
            }
        }
        if let Some(address) = &self.discovery_address {
            out.check("discoveryAddress", host_and_port(address));
        }
        let remote =
            |service: &Option<RemoteService>| service.as_ref().map(|service| service.address.clone());
        for (field, address) in [
            ("statsdUdpAddress", Some(self.statsd_udp_address.clone())),
            ("envoyMetricsService.address", remote(&self.envoy_metrics_service)),
            ("envoyAccessLogService.address", remote(&self.envoy_access_log_service)),
        ] {
            if let Some(address) = address.filter(|address| !address.is_empty()) {
                out.check(field, host_and_port(&address));
            }
        }
        if self.proxy_metadata.contains_key(AUTO_ALLOCATE) {
            let at = format!("proxyMetadata.{AUTO_ALLOCATE}");
            out.warning_code(&at, "deprecated; addresses are allocated by istiod", DEPRECATED);
        }
        if let Some(provider) = &self.private_key_provider {
            out.within("privateKeyProvider", |out| provider.validate(out));
        }
        if let Some(tracing) = &self.tracing {
            out.within("tracing", |out| tracing.validate(out));
        }
    }
}

impl Validate for PrivateKeyProvider {
    fn validate(&self, out: &mut Findings) {
        let members = [("cryptomb", self.cryptomb), ("qat", self.qat)];
        if members.iter().filter(|(_, keys)| keys.is_some()).count() != 1 {
            out.error("", "exactly one of cryptomb and qat must be set");
        }
        for (field, keys) in members {
            if keys.is_some_and(|keys| keys.poll_delay.is_none_or(Duration::is_zero)) {
                out.error(&format!("{field}.pollDelay"), "is required and must not be 0");
            }
        }
    }
}

impl Validate for MeshTracing {
    fn validate(&self, out: &mut Findings) {
        if self.sampling.is_some_and(|percent| !(0.0..=100.0).contains(&percent)) {
            out.error("sampling", "must be in range [0.0, 100.0]");
        }
        if let Some(tls) = &self.tls_settings {
            out.within("tlsSettings", |out| tls.validate(out));
        }
        for (field, collector) in
            [("zipkin", &self.zipkin), ("datadog", &self.datadog), ("lightstep", &self.lightstep)]
        {
            if let Some(collector) = collector {
                // The host's own address is put in by the agent.
                let address = text(collector, "address").replacen("$(HOST_IP)", "127.0.0.1", 1);
                out.check(&format!("{field}.address"), host_and_port(&address));
            }
        }
        if self.lightstep.as_ref().is_some_and(|collector| text(collector, "accessToken").is_empty()) {
            out.error("lightstep.accessToken", "is required");
        }
        for name in self.custom_tags.iter().filter(|(_, tag)| tag.is_null()).map(|(name, _)| name) {
            out.error(&format!("customTags.{}", check::key_path(name)), "a tag needs a value");
        }
    }
}

impl ExtensionProvider {
    /// Judges one provider. istiod only logs what is wrong with it, since a provider that nobody names does no harm.
    fn validate_among<'a>(&'a self, out: &mut Findings, names: &mut BTreeSet<&'a str>) {
        if self.name.is_empty() {
            out.warning("name", "a provider without a name cannot be used");
        } else if !names.insert(&self.name) {
            let message = format!("provider {:?} is defined twice, the first is used", self.name);
            out.warning("name", message);
        }
        let named = [
            ("envoyExtAuthzHttp", &self.envoy_ext_authz_http),
            ("envoyExtAuthzGrpc", &self.envoy_ext_authz_grpc),
            ("zipkin", &self.zipkin),
            ("lightstep", &self.lightstep),
            ("datadog", &self.datadog),
            ("opencensus", &self.opencensus),
            ("skywalking", &self.skywalking),
            ("opentelemetry", &self.opentelemetry),
            ("envoyHttpAls", &self.envoy_http_als),
            ("envoyTcpAls", &self.envoy_tcp_als),
            ("envoyOtelAls", &self.envoy_otel_als),
        ];
        let others = [&self.stackdriver, &self.prometheus, &self.envoy_file_access_log, &self.sds];
        let given = named.iter().map(|(_, provider)| *provider).chain(others).flatten();
        if given.count() != 1 {
            out.warning("", "a provider needs exactly one kind");
        }
        for (field, provider) in named {
            if let Some(provider) = provider {
                out.within(field, |out| provider_service(out, field, provider));
            }
        }
    }
}

fn provider_service(out: &mut Findings, kind: &str, provider: &Value) {
    let mut warn = |field: &str, judged: Checked| {
        if let Err(reason) = judged {
            out.warning(field, reason);
        }
    };
    warn("service", service(text(provider, "service")));
    let port = provider.get("port");
    let number = port.and_then(|port| port.as_u64().or_else(|| port.as_str()?.parse().ok())).unwrap_or(0);
    warn("port", check::port(u32::try_from(number).unwrap_or(u32::MAX)));
    let prefix = text(provider, "pathPrefix");
    if !prefix.is_empty() && !prefix.starts_with('/') {
        warn("pathPrefix", Err(format!("{prefix:?} must begin with \"/\"")));
    }
    let status = text(provider, "statusOnError");
    if !status.is_empty() && !status.parse().is_ok_and(|status| check::http_status(status).is_ok()) {
        warn("statusOnError", Err(format!("{status:?} is not an HTTP status")));
    }
    if kind == "lightstep" && text(provider, "accessToken").is_empty() {
        warn("accessToken", Err("is required".to_owned()));
    }
    if kind == "opentelemetry" && provider.get("http").is_some() && provider.get("grpc").is_some() {
        warn("", Err("only one of http and grpc may be set".to_owned()));
    }
}

/// A text of a value that is kept as it was written, in either form of the name; empty if there is none.
fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    let snake = name.chars().fold(String::new(), |mut snake, letter| {
        if letter.is_ascii_uppercase() {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
        snake
    });
    value.get(name).or_else(|| value.get(&snake)).and_then(Value::as_str).unwrap_or_default()
}

/// A host or an address, with an optional namespace before it.
fn service(name: &str) -> Checked {
    if !name.contains('/') {
        return check::fqdn(name).or_else(|_| check::ip(name));
    }
    let mut found = Findings::default();
    namespaced_host(&mut found, "", name, HostOf::Sidecar);
    found.into_vec().into_iter().next().map_or(Ok(()), |finding| Err(finding.message))
}

/// `host:port`, `address:port` or `[address]:port`.
fn host_and_port(address: &str) -> Checked {
    let Some((host, port)) = address.rsplit_once(':') else {
        return Err(format!("{address:?} has no port"));
    };
    check::port(port.parse().map_err(|_| format!("{address:?}: the port is not a number"))?)?;
    match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(host) => check::ip(host),
        None if host.contains(':') => Err(format!("{address:?}: an IPv6 address needs brackets")),
        None => check::fqdn(host).or_else(|_| check::ip(host)),
    }
}

/// Curves of the key exchange, in BoringSSL's names.
fn curves(out: &mut Findings, curves: &[String]) {
    const KNOWN: [&str; 8] =
        ["P-224", "P-256", "P-384", "P-521", "X25519", "X25519MLKEM768", "X25519Kyber768Draft00", "CECPQ2"];
    let mut seen = BTreeSet::new();
    for (index, curve) in curves.iter().enumerate() {
        let at = format!("tlsDefaults.ecdhCurves[{index}]");
        if !KNOWN.contains(&curve.as_str()) {
            out.warning(&at, format!("{curve:?} is not a known curve"));
        } else if !seen.insert(curve) {
            out.warning(&at, format!("{curve:?} is named twice"));
        }
    }
}

/// Labels with dots between them; a dot at the end is allowed.
fn trust_domain(domain: &str) -> Checked {
    let labels = domain.strip_suffix('.').unwrap_or(domain);
    if labels.split('.').all(check::is_dns1123_label) {
        return Ok(());
    }
    Err(format!("trust domain name {domain:?} is invalid"))
}
