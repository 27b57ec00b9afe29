//! What the validators of the kinds say, with field path and reason, as one snapshot.
#![cfg(feature = "istio")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fmt::Write as _;

use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};

/// Kind, metadata beside the name, and spec (or, for Kubernetes' own kinds, the body).
const CASES: &[(&str, &str, &str)] = &[
    ("Gateway", "name: a.b", "servers: []"),
    (
        "Gateway",
        "",
        "servers: [{hosts: [a], bind: 'unix://x', port: {number: 80, protocol: FOO, targetPort: 1}}]",
    ),
    ("Gateway", "", "servers: [{hosts: [a.b], port: {number: 443, protocol: HTTPS, name: h}}]"),
    (
        "Gateway",
        "",
        "servers: [{hosts: [a.b], port: {number: 80, protocol: HTTP, name: h}, tls: {mode: SIMPLE}}]",
    ),
    (
        "Gateway",
        "",
        "servers: [{hosts: [a.b], port: {number: 80, protocol: TCP, name: h}, tls: {httpsRedirect: true}}]",
    ),
    (
        "Gateway",
        "",
        "servers: [{hosts: [a.b], port: {number: 1, protocol: TLS, name: h}, tls: {mode: MUTUAL}}]",
    ),
    (
        "Gateway",
        "",
        "servers: [{hosts: [a.b], port: {number: 1, protocol: TLS, name: h}, tls: {mode: PASSTHROUGH, \
        credentialName: x, minProtocolVersion: TLSV1_0}}, {hosts: [a.b], port: {number: 2, protocol: TLS, name: h}, \
        tls: {mode: ISTIO_MUTUAL, privateKey: k, credentialNames: [a]}}]",
    ),
    (
        "Gateway",
        "",
        "servers: [{hosts: [a.b], port: {number: 1, protocol: TLS, name: h}, tls: {mode: SIMPLE, \
        serverCertificate: c, privateKey: k, caCrl: l, tlsCertificates: [{serverCertificate: a}], \
        cipherSuites: [AES128-SHA, AES128-SHA, nope]}}]",
    ),
    ("ServiceEntry", "", "hosts: []"),
    (
        "ServiceEntry",
        "",
        "hosts: ['*', '*a.b', 'a_b']\nports: [{number: 0, name: a b, protocol: X, targetPort: 70000}, \
        {number: 0, name: a b}]\nexportTo: ['*', '~']",
    ),
    (
        "ServiceEntry",
        "",
        "hosts: [a.b]\nresolution: DNS\naddresses: [10.0.0.0/8, x]\nendpoints: [{address: '1.2.3.999'}, \
        {address: 'unix:///a', ports: {http: 80}}]",
    ),
    (
        "ServiceEntry",
        "",
        "hosts: [a.b, c.d]\nresolution: STATIC\nports: [{number: 1, name: tcp, protocol: TCP}]\n\
        endpoints: [{address: a.b}, {address: 'unix://a', ports: {tcp: 1}}, {network: n}, {}]",
    ),
    (
        "ServiceEntry",
        "",
        "hosts: [a.b]\nresolution: DYNAMIC_DNS\nlocation: MESH_INTERNAL\naddresses: [10.0.0.1]\n\
        ports: [{number: 1, name: t, protocol: TCP}]\nendpoints: [{address: 1.1.1.1}]",
    ),
    ("ServiceEntry", "", "hosts: [a.b]\nworkloadSelector: {labels: {app: 'a*'}}\nendpoints: []"),
    ("WorkloadEntry", "", "address: 'a b'\nports: {'x y': 0}\nlabels: {'-': '-'}"),
    (
        "WorkloadGroup",
        "",
        "probe: {timeoutSeconds: -1, httpGet: {port: 0, scheme: FTP, httpHeaders: [{name: 'a_b'}]}, exec: {}}",
    ),
    ("Sidecar", "", "workloadSelector: {}"),
    (
        "Sidecar",
        "",
        "ingress: [{}, {port: {number: 80, protocol: HTTP, name: a b}, bind: x, defaultEndpoint: '1.2.3.4:80', \
        tls: {mode: AUTO_PASSTHROUGH, httpsRedirect: true}}, {port: {number: 80, protocol: TCP}, \
        connectionPool: {http: {maxRetries: -1}}}]",
    ),
    (
        "Sidecar",
        "",
        "egress: [{hosts: [a]}, {port: {number: 0, protocol: HTTP}, bind: 1.1.1.1, captureMode: IPTABLES, \
        hosts: ['~a b/*']}, {hosts: ['./*', './a.b']}]\noutboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: '*'}}",
    ),
    ("AuthorizationPolicy", "annotations: {istio.io/dry-run: maybe}", "action: DENY"),
    (
        "AuthorizationPolicy",
        "annotations: {istio.io/dry-run: 'true'}",
        "action: CUSTOM\nrules: [{from: [{source: \
        {principals: [a], ipBlocks: [x]}}], when: [{key: request.auth.principal, values: [a]}]}]",
    ),
    (
        "AuthorizationPolicy",
        "",
        "provider: {name: a}\nselector: {matchLabels: {a: b}}\ntargetRefs: [{kind: Pod, name: ''}]\n\
        rules: [{from: [], to: [{operation: {ports: ['99999'], paths: ['/{**}/{*}', '/{a}']}}, {}]}, \
        {from: [{source: {serviceAccounts: ['a/b/c', '*'], namespaces: [a]}}, {source: {}}], \
        when: [{key: ''}, {key: a.b, values: [c]}, {key: source.ip}, {key: 'request.headers[]', values: [a]}]}]",
    ),
    ("AuthorizationPolicy", "", "action: DENY\nrules: [{to: [{operation: {methods: [POST]}}]}]"),
    (
        "RequestAuthentication",
        "annotations: {istio.io/dry-run: 'true'}",
        "jwtRules: [{audiences: [''], jwks: '{', \
        fromHeaders: [{}], fromParams: [''], outputClaimToHeaders: [{header: 'a_b', claim: ''}], timeout: 0s}]",
    ),
    (
        "RequestAuthentication",
        "",
        "jwtRules: [{issuer: a, jwksUri: 'ftp://a', jwks: '{\"keys\":[{\"kty\":\"RSA\"}]}', presence: X}]",
    ),
    ("PeerAuthentication", "", "portLevelMtls: {'0': {mode: STRICT}, '70000': {}}"),
    ("PeerAuthentication", "", "selector: {matchLabels: {'': b}}\nportLevelMtls: {}\nmtls: {mode: MAYBE}"),
    (
        "Telemetry",
        "",
        "tracing: [{randomSamplingPercentage: 101, customTags: {a: {literal: {}, header: {}}, '': {}}, \
        providers: [{name: a}, {}]}, {}]\nmetrics: [{reportingInterval: 1us, overrides: [{match: {customMetric: ''}, \
        tagOverrides: {a: {}, b: {operation: REMOVE, value: x}}}]}]\naccessLogging: [{filter: {expression: 'a ||'}}]",
    ),
    ("ProxyConfig", "", "concurrency: -1\nselector: {matchLabels: {a: '*'}}"),
    (
        "EnvoyFilter",
        "",
        "configPatches: [{}, {applyTo: HTTP_FILTER, patch: {operation: ADD}, match: {cluster: {}, \
        proxy: {proxyVersion: '('}}}, {applyTo: LISTENER, patch: {operation: MERGE, value: {name: envoy.filters.http.fault}}, \
        match: {listener: {filterChain: {filter: {name: a, subFilter: {}}}}}}]",
    ),
    (
        "WasmPlugin",
        "",
        "url: 'x://a'\nsha256: A\nimagePullSecret: ''\npluginConfig: 1\nvmConfig: {env: [{name: a}, \
        {name: a, valueFrom: HOST, value: b}, {}]}\nmatch: [{ports: [{number: 0}, {number: 1}, {number: 1}]}]",
    ),
    ("TrafficExtension", "", "phase: AUTHN"),
    ("TrafficExtension", "", "wasm: {}\nlua: {inlineCode: ''}"),
    ("ClusterRbacConfig", "", "mode: ON_WITH_INCLUSION"),
    ("ServiceRole", "", "rules: [{paths: [a], constraints: [{}]}]"),
    ("ServiceRoleBinding", "", "subjects: [{}]\nroleRef: {kind: Role}"),
    (
        "Policy",
        "",
        "peers: [{mtls: }]\norigins: [{}, {jwt: {issuer: a, triggerRules: [{includedPaths: [{}]}]}}]",
    ),
    ("MeshPolicy", "", "targets: [{name: a.b, ports: [{}]}]"),
    ("denier", "", "whatever: [1, 2]"),
    ("Service", "", "ports: [{port: 0}, {port: 1, targetPort: http}]\ntype: ExternalName\nunknown: 1"),
    ("EndpointSlice", "", "addressType: IPv4\nendpoints: [{addresses: [x]}]\nports: [{port: 70000}]"),
];

fn api_version(kind: &str) -> &'static str {
    match kind {
        "AuthorizationPolicy" | "RequestAuthentication" | "PeerAuthentication" => "security.istio.io/v1",
        "Telemetry" => "telemetry.istio.io/v1",
        "WasmPlugin" | "TrafficExtension" => "extensions.istio.io/v1alpha1",
        "ProxyConfig" => "networking.istio.io/v1beta1",
        "ClusterRbacConfig" | "ServiceRole" | "ServiceRoleBinding" => "rbac.istio.io/v1alpha1",
        "Policy" | "MeshPolicy" => "authentication.istio.io/v1alpha1",
        "denier" => "config.istio.io/v1alpha2",
        "Service" => "v1",
        "EndpointSlice" => "discovery.k8s.io/v1",
        _ => "networking.istio.io/v1",
    }
}

#[test]
fn x_08_every_finding_has_a_path_and_a_reason() {
    let mut seen = String::new();
    for (kind, meta, spec) in CASES {
        let indent = |text: &str| text.lines().map(|line| format!("  {line}\n")).collect::<String>();
        let name = if meta.contains("name:") { "" } else { "  name: x\n" };
        let body =
            if *kind == "EndpointSlice" { format!("{spec}\n") } else { format!("spec:\n{}", indent(spec)) };
        let text = format!(
            "apiVersion: {}\nkind: {kind}\nmetadata:\n{name}{}{body}",
            api_version(kind),
            if meta.is_empty() { String::new() } else { indent(meta) },
        );
        let (_, diags) = ResourceSet::load(&[SourceFile::new("a.yaml", text)], &LoadOptions::default());
        writeln!(seen, "# {kind}: {}", spec.lines().collect::<Vec<_>>().join("; ")).unwrap();
        for item in &diags {
            writeln!(seen, "{}: {}: {}", item.severity, item.path, item.message).unwrap();
        }
    }
    insta::assert_snapshot!("findings", seen);
}
