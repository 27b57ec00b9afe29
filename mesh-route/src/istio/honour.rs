//! Which fields this crate gives meaning to. What is missing here is reported as not enforced, so a field joins the
//! list in the change that enforces it.

use mesh_core::config::CompileContext;
use mesh_core::diagnostics::Diagnostics;
use mesh_core::istio::types::destination_rule::{ClientTlsMode, ClientTlsSettings, DestinationRule};
use mesh_core::istio::types::gateway::{Server, ServerTlsMode};
use mesh_core::istio::types::service_entry::Resolution;
use mesh_core::istio::{Resource, ResourceSet};

use super::annotations;

const VIRTUAL_SERVICE: &[&str] = &[
    "spec.hosts",
    "spec.gateways",
    "spec.exportTo",
    "spec.http[*].name",
    "spec.http[*].match[*].name",
    "spec.http[*].match[*].uri",
    "spec.http[*].match[*].scheme",
    "spec.http[*].match[*].method",
    "spec.http[*].match[*].authority",
    "spec.http[*].match[*].port",
    "spec.http[*].match[*].sourceLabels",
    "spec.http[*].match[*].sourceNamespace",
    "spec.http[*].match[*].gateways",
    "spec.http[*].match[*].queryParams",
    "spec.http[*].match[*].ignoreUriCase",
    "spec.http[*].route",
    "spec.http[*].redirect",
    "spec.http[*].directResponse",
    "spec.http[*].delegate",
    "spec.http[*].rewrite",
    "spec.http[*].timeout",
    "spec.http[*].retries",
    "spec.http[*].headers",
    "spec.http[*].fault",
    "spec.http[*].corsPolicy",
    "spec.http[*].mirror",
    "spec.http[*].mirrorPercentage",
    "spec.http[*].mirrorPercent",
    "spec.http[*].mirrors",
    "spec.http[*].websocketUpgrade",
];

const POLICY: &[&str] = &[
    "loadBalancer.simple",
    "loadBalancer.consistentHash",
    "loadBalancer.localityLbSetting",
    "loadBalancer.zoneAwareLbSetting",
    "loadBalancer.warmup",
    "loadBalancer.warmupDurationSecs",
    "connectionPool.tcp",
    "connectionPool.http.http1MaxPendingRequests",
    "connectionPool.http.http2MaxRequests",
    "connectionPool.http.maxRequestsPerConnection",
    "connectionPool.http.maxRetries",
    "connectionPool.http.idleTimeout",
    "connectionPool.http.h2UpgradePolicy",
    "connectionPool.http.useClientProtocol",
    "connectionPool.http.maxConcurrentStreams",
    "connectionPool.http.http2KeepAlive",
    "outlierDetection.consecutiveErrors",
    "outlierDetection.consecutive5xxErrors",
    "outlierDetection.consecutiveGatewayErrors",
    "outlierDetection.consecutiveLocalOriginFailures",
    "outlierDetection.splitExternalLocalOriginErrors",
    "outlierDetection.interval",
    "outlierDetection.baseEjectionTime",
    "outlierDetection.maxEjectionPercent",
    "outlierDetection.minHealthPercent",
    "outlierDetection.outlierDetectionHttpErrorCodes",
    "retryBudget",
    "portLevelSettings[*].port",
];

/// Where a traffic policy stands.
const POLICIES: &[&str] = &[
    "spec.trafficPolicy",
    "spec.trafficPolicy.portLevelSettings[*]",
    "spec.subsets[*].trafficPolicy",
    "spec.subsets[*].trafficPolicy.portLevelSettings[*]",
];

/// The settings of the mesh that routing reads.
const MESH: [&str; 13] = [
    "connectTimeout",
    "defaultConfig.proxyMetadata.ISTIO_META_ENABLE_SELF_DISCOVERY",
    "defaultHttpRetryPolicy",
    "defaultDestinationRuleExportTo",
    "defaultServiceExportTo",
    "defaultVirtualServiceExportTo",
    "dnsRefreshRate",
    "h2UpgradePolicy",
    "localityLbSetting",
    "outboundTrafficPolicy",
    "rootNamespace",
    "tcpKeepalive",
    "zoneAwareLbSetting",
];

/// What virtual services say of connections that are not HTTP.
const L4_RULES: &[&str] = &[
    "spec.tls[*].match[*].sniHosts",
    "spec.tls[*].match[*].destinationSubnets",
    "spec.tls[*].match[*].port",
    "spec.tls[*].match[*].sourceLabels",
    "spec.tls[*].match[*].sourceNamespace",
    "spec.tls[*].match[*].gateways",
    "spec.tls[*].route",
    "spec.tcp[*].match[*].destinationSubnets",
    "spec.tcp[*].match[*].port",
    "spec.tcp[*].match[*].sourceLabels",
    "spec.tcp[*].match[*].sourceNamespace",
    "spec.tcp[*].match[*].gateways",
    "spec.tcp[*].route",
];

/// What the routes of connections give meaning to, beside what those of requests do.
pub(super) fn honour_l4(set: &ResourceSet, cx: &CompileContext, diags: &mut Diagnostics) {
    diags.honour_mesh("protocolDetectionTimeout");
    for resource in set.virtual_services() {
        diags.honour_all(resource.doc, L4_RULES);
    }
    for resource in set.gateways() {
        for (at, server) in resource.spec.servers.iter().enumerate() {
            if server.is_plain_tcp() || server.is_passthrough() {
                diags.honour(resource.doc, &format!("spec.servers[{at}].port"));
            }
            if server.is_passthrough() {
                diags.honour(resource.doc, &format!("spec.servers[{at}].tls"));
            }
            if server.is_terminated_bytes(cx.transport) {
                diags.honour(resource.doc, &format!("spec.servers[{at}].port"));
                honour_termination(server, resource.doc, at, diags);
            }
        }
    }
}

pub(super) fn honour(set: &ResourceSet, cx: &CompileContext, diags: &mut Diagnostics) {
    for path in MESH {
        diags.honour_mesh(path);
    }
    let below = set.mesh_config().default_traffic_policy.as_ref();
    if below.is_none_or(|policy| policy.tls.is_none()) {
        diags.honour_mesh("defaultTrafficPolicy");
    }
    for resource in set.virtual_services() {
        diags.honour_all(resource.doc, VIRTUAL_SERVICE);
        annotations::check(&resource.meta.annotations, annotations::VIRTUAL_SERVICE, resource.doc, diags);
        for (rule_at, rule) in resource.spec.http.iter().enumerate() {
            for (match_at, matched) in rule.matches.iter().enumerate() {
                for (field, headers) in
                    [("headers", &matched.headers), ("withoutHeaders", &matched.without_headers)]
                {
                    // Claims are validated; there is nothing yet that could have verified a token.
                    if !headers.keys().any(|name| super::http::is_claim(name)) {
                        diags
                            .honour(resource.doc, &format!("spec.http[{rule_at}].match[{match_at}].{field}"));
                    }
                }
            }
        }
    }
    for resource in set.destination_rules() {
        annotations::check(&resource.meta.annotations, annotations::DESTINATION_RULE, resource.doc, diags);
        diags.honour_all(
            resource.doc,
            &[
                "spec.host",
                "spec.subsets[*].name",
                "spec.subsets[*].labels",
                "spec.exportTo",
                "spec.workloadSelector",
            ],
        );
        for policy in POLICIES {
            for field in POLICY {
                diags.honour(resource.doc, &format!("{policy}.{field}"));
            }
        }
        honour_tls(resource, cx, diags);
    }
    for resource in set.service_entries() {
        diags.honour_all(
            resource.doc,
            &[
                "spec.hosts",
                "spec.addresses",
                "spec.ports",
                "spec.location",
                "spec.endpoints[*].ports",
                "spec.endpoints[*].labels",
                "spec.endpoints[*].weight",
                "spec.endpoints[*].locality",
                "spec.endpoints[*].serviceAccount",
                "spec.workloadSelector",
                "spec.exportTo",
            ],
        );
        if cx.transport.originates {
            diags.honour(resource.doc, "spec.subjectAltNames");
        }
        if resource.spec.resolution != Resolution::DynamicDns {
            diags.honour(resource.doc, "spec.resolution");
        }
        for (at, endpoint) in resource.spec.endpoints().iter().enumerate() {
            if !is_socket(&endpoint.address) {
                diags.honour(resource.doc, &format!("spec.endpoints[{at}].address"));
            }
        }
    }
    for resource in set.workload_entries() {
        for field in ["ports", "labels", "weight", "locality", "serviceAccount"] {
            diags.honour(resource.doc, &format!("spec.{field}"));
        }
        if !is_socket(&resource.spec.address) {
            diags.honour(resource.doc, "spec.address");
        }
    }
    for resource in set.gateways() {
        diags.honour_all(
            resource.doc,
            &["spec.selector", "spec.servers[*].hosts", "spec.servers[*].bind", "spec.servers[*].name"],
        );
        for (at, server) in resource.spec.servers.iter().enumerate() {
            if server.is_plain_http() {
                diags.honour(resource.doc, &format!("spec.servers[{at}].port"));
                honour_redirect(server, resource.doc, at, diags);
            } else if server.is_terminated(cx.transport) {
                diags.honour(resource.doc, &format!("spec.servers[{at}].port"));
                honour_termination(server, resource.doc, at, diags);
            }
        }
    }
    for resource in set.sidecars() {
        diags.honour_all(
            resource.doc,
            &[
                "spec.workloadSelector",
                "spec.egress[*].hosts",
                "spec.egress[*].port",
                "spec.outboundTrafficPolicy.mode",
            ],
        );
    }
    for doc in set.services().iter().map(|service| service.doc) {
        diags.honour(doc, "spec");
    }
    for doc in set.endpoints().iter().map(|endpoints| endpoints.doc) {
        diags.honour(doc, "subsets");
    }
    for doc in set.endpoint_slices().iter().map(|slice| slice.doc) {
        diags.honour_all(doc, &["endpoints", "ports", "addressType"]);
    }
}

/// Whether an endpoint is a unix socket, to which nothing connects yet.
fn is_socket(address: &str) -> bool {
    address.starts_with("unix:")
}

fn honour_redirect(server: &Server, doc: mesh_core::diagnostics::DocId, at: usize, diags: &mut Diagnostics) {
    if server.tls.as_ref().is_some_and(|tls| tls.https_redirect) {
        diags.honour(doc, &format!("spec.servers[{at}].tls.httpsRedirect"));
    }
}

/// What is ended is honoured, but for two: a redirect is for plain HTTP, and the mesh knows its workloads by identity and
/// not by the hashes of their certificates, which are renewed.
fn honour_termination(
    server: &Server,
    doc: mesh_core::diagnostics::DocId,
    at: usize,
    diags: &mut Diagnostics,
) {
    let Some(tls) = &server.tls else { return };
    let mut fields = vec![
        "mode",
        "serverCertificate",
        "privateKey",
        "caCertificates",
        "caCrl",
        "credentialName",
        "credentialNames",
        "tlsCertificates",
        "subjectAltNames",
        "minProtocolVersion",
        "maxProtocolVersion",
        "cipherSuites",
    ];
    if tls.mode != ServerTlsMode::IstioMutual {
        fields.extend(["verifyCertificateSpki", "verifyCertificateHash"]);
    }
    if !tls.https_redirect {
        fields.push("httpsRedirect");
    }
    for field in fields {
        diags.honour(doc, &format!("spec.servers[{at}].tls.{field}"));
    }
}

/// Plaintext is honoured by whoever does nothing; every other mode by a stack that can originate TLS, and the mesh's own
/// by one that has an identity too. The rest is reported, and refused at run time.
fn honour_tls(resource: &Resource<DestinationRule>, cx: &CompileContext, diags: &mut Diagnostics) {
    let mut policies = vec![("spec.trafficPolicy".to_owned(), resource.spec.traffic_policy.as_deref())];
    policies.extend(
        resource.spec.subsets.iter().enumerate().map(|(at, subset)| {
            (format!("spec.subsets[{at}].trafficPolicy"), subset.traffic_policy.as_deref())
        }),
    );
    let honoured = |tls: &Option<ClientTlsSettings>| {
        tls.as_ref().is_some_and(|tls| match tls.mode {
            ClientTlsMode::Disable => true,
            ClientTlsMode::Simple | ClientTlsMode::Mutual => cx.transport.originates,
            ClientTlsMode::IstioMutual => cx.transport.originates && cx.transport.has_identity,
        })
    };
    for (path, policy) in policies {
        let Some(policy) = policy else { continue };
        if honoured(&policy.tls) {
            diags.honour(resource.doc, &format!("{path}.tls"));
        }
        for (at, port) in policy.port_level_settings.iter().enumerate() {
            if honoured(&port.tls) {
                diags.honour(resource.doc, &format!("{path}.portLevelSettings[{at}].tls"));
            }
        }
    }
}
