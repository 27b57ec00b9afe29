//! MeshConfig, with the ProxyConfig within it.

use mesh_core::diagnostics::Severity;
use mesh_core::istio::SourceFile;
use mesh_core::istio::types::mesh_config::MeshConfig;

use super::{Fine, Refused, Verdict, Warns};

fn mesh(cases: &[(&str, Verdict)]) {
    for (text, verdict) in cases {
        let (mesh, found) = MeshConfig::load(&SourceFile::new("mesh.yaml", (*text).to_owned()));
        let at = |severity, field: &str| {
            found.iter().any(|item| item.severity == severity && item.path.ends_with(field))
        };
        let agrees = match verdict {
            Fine => mesh.is_some() && found.is_empty(),
            Warns(field) => mesh.is_some() && at(Severity::Warning, field),
            Refused(field) => mesh.is_none() && at(Severity::Error, field),
        };
        assert!(agrees, "{text}\n  expected {verdict:?}, found: {found:#?}");
    }
}

#[test]
fn mc_01_the_mesh() {
    mesh(&[
        ("trustDomain: a.b.", Fine),
        ("trustDomain: -a.b", Refused("trustDomain")),
        ("trustDomain: a/b", Refused("trustDomain")),
        ("trustDomain: 'a:b'", Refused("trustDomain")),
        ("trustDomainAliases: [a, 'a.$b']", Refused("trustDomainAliases[1]")),
        ("trustDomainAliases: ['']", Refused("trustDomainAliases[0]")),
        ("connectTimeout: 31s", Fine),
        ("connectTimeout: 0s", Refused("connectTimeout")),
        ("connectTimeout: 2h", Refused("connectTimeout")),
        ("protocolDetectionTimeout: 0s", Fine),
        ("protocolDetectionTimeout: 0.00009s", Refused("protocolDetectionTimeout")),
        ("proxyListenPort: 15001", Fine),
        ("proxyListenPort: 0", Refused("proxyListenPort")),
        ("proxyListenPort: 65536", Refused("proxyListenPort")),
        ("serviceSettings: [{hosts: ['*.a.b', c], settings: {clusterLocal: true}}]", Fine),
        ("serviceSettings: [{hosts: ['a.*']}]", Refused("serviceSettings[0].hosts[0]")),
        ("localityLbSetting: {failover: [{from: a, to: b}]}", Fine),
        ("localityLbSetting: {failover: [{from: a, to: a}]}", Refused("failover[0].to")),
        ("meshMTLS: {ecdhCurves: [P-256]}", Refused("meshMTLS.ecdhCurves")),
        ("tlsDefaults: {ecdhCurves: [P-256, X25519]}", Fine),
        ("tlsDefaults: {ecdhCurves: [P-256, P-256]}", Warns("tlsDefaults.ecdhCurves[1]")),
        ("tlsDefaults: {ecdhCurves: [P-1]}", Warns("tlsDefaults.ecdhCurves[0]")),
    ]);
}

#[test]
fn mc_02_proxies() {
    mesh(&[
        ("defaultConfig: {drainDuration: 45s}", Fine),
        ("defaultConfig: {drainDuration: 1.001s}", Refused("defaultConfig.drainDuration")),
        ("defaultConfig: {drainDuration: -1s}", Refused("defaultConfig.drainDuration")),
        (
            "defaultConfig: {discoveryAddress: 'istiod.istio-system.svc:15012', proxyAdminPort: 15000, statusPort: 15020}",
            Fine,
        ),
        ("defaultConfig: {discoveryAddress: 10.0.0.1}", Refused("defaultConfig.discoveryAddress")),
        ("defaultConfig: {discoveryAddress: 'a..:80'}", Refused("defaultConfig.discoveryAddress")),
        ("defaultConfig: {proxyAdminPort: 0}", Refused("defaultConfig.proxyAdminPort")),
        ("defaultConfig: {statusPort: 65536}", Refused("defaultConfig.statusPort")),
        ("defaultConfig: {statsdUdpAddress: '10.0.0.1:9125'}", Fine),
        ("defaultConfig: {statsdUdpAddress: 10.0.0.1}", Refused("defaultConfig.statsdUdpAddress")),
        (
            "defaultConfig: {envoyMetricsService: {address: a}}",
            Refused("defaultConfig.envoyMetricsService.address"),
        ),
        ("defaultConfig: {envoyAccessLogService: {address: 'a:80'}}", Fine),
        (
            "defaultConfig: {envoyAccessLogService: {address: 'a:x'}}",
            Refused("defaultConfig.envoyAccessLogService.address"),
        ),
        ("defaultConfig: {tracing: {zipkin: {address: 'zipkin.ns:9411'}}}", Fine),
        ("defaultConfig: {tracing: {zipkin: {address: '$(HOST_IP):9411'}}}", Fine),
        ("defaultConfig: {tracing: {zipkin: {address: '[2001:db8::1]:9411'}}}", Fine),
        (
            "defaultConfig: {tracing: {zipkin: {address: '2001:db8::1:9411'}}}",
            Refused("tracing.zipkin.address"),
        ),
        ("defaultConfig: {tracing: {zipkin: {address: 10.0.0.1}}}", Refused("tracing.zipkin.address")),
        ("defaultConfig: {tracing: {datadog: {address: 'a:8126'}}}", Fine),
        ("defaultConfig: {tracing: {datadog: {}}}", Refused("tracing.datadog.address")),
        ("defaultConfig: {tracing: {lightstep: {address: 'a:80', accessToken: b}}}", Fine),
        (
            "defaultConfig: {tracing: {lightstep: {address: 'a:80'}}}",
            Refused("tracing.lightstep.accessToken"),
        ),
        ("defaultConfig: {tracing: {lightstep: {accessToken: b}}}", Refused("tracing.lightstep.address")),
        ("defaultConfig: {tracing: {customTags: {a: {literal: {value: b}}}}}", Fine),
        ("defaultConfig: {tracing: {customTags: {a: ~}}}", Refused("tracing.customTags.a")),
        (
            "defaultConfig: {tracing: {tlsSettings: {mode: MUTUAL}}}",
            Refused("tracing.tlsSettings.privateKey"),
        ),
        (
            "defaultConfig: {proxyMetadata: {ISTIO_META_DNS_AUTO_ALLOCATE: 'true'}}",
            Warns("ISTIO_META_DNS_AUTO_ALLOCATE"),
        ),
        ("defaultConfig: {privateKeyProvider: {cryptomb: {pollDelay: 10us}}}", Fine),
        ("defaultConfig: {privateKeyProvider: {}}", Refused("privateKeyProvider")),
        (
            "defaultConfig: {privateKeyProvider: {cryptomb: {}}}",
            Refused("privateKeyProvider.cryptomb.pollDelay"),
        ),
        (
            "defaultConfig: {privateKeyProvider: {qat: {pollDelay: 0s}}}",
            Refused("privateKeyProvider.qat.pollDelay"),
        ),
    ]);
}

#[test]
fn mc_03_providers_do_harm_only_where_they_are_used() {
    mesh(&[
        ("extensionProviders: [{name: a, envoyExtAuthzHttp: {service: ns/a.b, port: 80}}]", Fine),
        (
            "extensionProviders: [{name: a, envoyExtAuthzGrpc: {service: 10.0.0.1, port: 80, statusOnError: '503'}}]",
            Fine,
        ),
        (
            "extensionProviders: [{name: a, prometheus: {}}, {name: b, envoyFileAccessLog: {path: /dev/stdout}}]",
            Fine,
        ),
        (
            "extensionProviders: [{name: a, prometheus: {}}, {name: a, prometheus: {}}]",
            Warns("extensionProviders[1].name"),
        ),
        ("extensionProviders: [{prometheus: {}}]", Warns("extensionProviders[0].name")),
        ("extensionProviders: [{name: a}]", Warns("extensionProviders[0]")),
        ("extensionProviders: [{name: a, zipkin: {port: 80}}]", Warns("zipkin.service")),
        ("extensionProviders: [{name: a, zipkin: {service: a.b}}]", Warns("zipkin.port")),
        (
            "extensionProviders: [{name: a, opentelemetry: {service: a/b/c, port: 80}}]",
            Warns("opentelemetry.service"),
        ),
        (
            "extensionProviders: [{name: a, opentelemetry: {service: a.b, port: 80, http: {path: /a}, grpc: {timeout: 1s}}}]",
            Warns("opentelemetry"),
        ),
        (
            "extensionProviders: [{name: a, lightstep: {service: a.b, port: 80}}]",
            Warns("lightstep.accessToken"),
        ),
        (
            "extensionProviders: [{name: a, envoyExtAuthzHttp: {service: a.b, port: 80, pathPrefix: a}}]",
            Warns("pathPrefix"),
        ),
        (
            "extensionProviders: [{name: a, envoyExtAuthzHttp: {service: a.b, port: 80, statusOnError: x}}]",
            Warns("statusOnError"),
        ),
        (
            "extensionProviders: [{name: a, envoyOtelAls: {service: a.b, port: 999999}}]",
            Warns("envoyOtelAls.port"),
        ),
    ]);
}
