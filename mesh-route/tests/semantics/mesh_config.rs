//! What routing takes from the settings of the mesh: MC-01.

use std::time::Duration;

use mesh_core::istio::types::mesh_config::MeshConfig;
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};
use mesh_route::TcpKeepalive;

use crate::support::*;

const REVIEWS: &str = "outbound|80||reviews.default.svc.cluster.local";

#[test]
fn mc_01_connections() {
    let service = service_in("default", "reviews", &[1]);
    let of = |yaml: String| compile(&(service.clone() + &yaml)).spec(REVIEWS).pool;
    assert_eq!(of(String::new()).connect_timeout, Duration::from_secs(10));
    assert_eq!(of(mesh("connectTimeout: 3s")).connect_timeout, Duration::from_secs(3));
    let rule = |pool: &str| {
        resource(
            "DestinationRule",
            "r",
            &format!("{{host: reviews, trafficPolicy: {{connectionPool: {{tcp: {pool}}}}}}}"),
        )
    };
    let own = of(mesh("connectTimeout: 3s") + &rule("{connectTimeout: 4s}"));
    assert_eq!(own.connect_timeout, Duration::from_secs(4), "a destination rule comes first");
    let keepalive = "tcpKeepalive: {probes: 2, time: 60s, interval: 5s}";
    let expected = TcpKeepalive {
        probes: Some(2),
        time: Some(Duration::from_secs(60)),
        interval: Some(Duration::from_secs(5)),
    };
    assert_eq!(of(mesh(keepalive)).tcp_keepalive, Some(expected));
    let own = of(mesh(keepalive) + &rule("{tcpKeepalive: {time: 1s}}"));
    assert_eq!(own.tcp_keepalive.unwrap().time, Some(Duration::from_secs(1)));
}

#[test]
fn mc_01_outbound_traffic_policy() {
    let unknown = |yaml: &str| compile(yaml).clusters("http://nobody.example.com/").remove(0);
    assert_eq!(unknown(""), "PassthroughCluster");
    assert_eq!(unknown(&mesh("outboundTrafficPolicy: {mode: ALLOW_ANY}")), "PassthroughCluster");
    let only = mesh("outboundTrafficPolicy: {mode: REGISTRY_ONLY}");
    assert_eq!(unknown(&only), "BlackHoleCluster");
    let sidecar = resource("Sidecar", "s", "{outboundTrafficPolicy: {mode: ALLOW_ANY}}");
    assert_eq!(unknown(&(only + &sidecar)), "PassthroughCluster", "a Sidecar comes first");
}

#[test]
fn mc_01_export_to_by_default() {
    let other = sidecar("other", &[]);
    let host = "http://reviews.default.svc.cluster.local/";
    let service = |export_to: &str| {
        let spec = format!(
            "{{hosts: [reviews.default.svc.cluster.local], resolution: STATIC, ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{{address: 127.0.0.1}}]{export_to}}}"
        );
        resource("ServiceEntry", "reviews", &spec)
    };
    let kubernetes = "---\napiVersion: v1\nkind: Service\nmetadata: {name: reviews, namespace: default}\nspec: {clusterIP: 10.0.0.1, ports: [{name: http, port: 80}]}\n";
    let private = mesh("defaultServiceExportTo: ['.']");
    for (yaml, own, elsewhere) in [
        (service(""), true, true),
        (service("") + &private, true, false),
        (kubernetes.to_owned() + &private, true, false),
        (service(", exportTo: ['*']") + &private, true, true),
    ] {
        assert_eq!(compile(&yaml).route(host).as_deref() == Some("default"), own, "{yaml}");
        assert_eq!(compile_for(&other, &yaml).route(host).as_deref() == Some("default"), elsewhere, "{yaml}");
    }
    let rule = rules("  - {name: v, route: [{destination: {host: reviews}}]}\n");
    for (settings, expected) in
        [(String::new(), "v"), (mesh("defaultVirtualServiceExportTo: ['.']"), "default")]
    {
        let it = compile_for(&other, &(service("") + &rule + &settings));
        assert_eq!(it.route(host).as_deref(), Some(expected));
    }
    let policy = resource(
        "DestinationRule",
        "r",
        "{host: reviews, trafficPolicy: {connectionPool: {tcp: {connectTimeout: 1s}}}}",
    );
    for (settings, expected) in [(String::new(), 1), (mesh("defaultDestinationRuleExportTo: ['.']"), 10)] {
        let it = compile_for(&other, &(service("") + &policy + &settings));
        assert_eq!(it.spec(REVIEWS).pool.connect_timeout, Duration::from_secs(expected));
    }
}

#[test]
fn mc_01_the_root_namespace() {
    let rule = |namespace: &str| {
        in_namespace(
            namespace,
            "DestinationRule",
            "r",
            "{host: '*.cluster.local', trafficPolicy: {connectionPool: {tcp: {connectTimeout: 1s}}}}",
        )
    };
    let timeout = |yaml: String| {
        compile(&(service_in("default", "reviews", &[1]) + &yaml))
            .spec(REVIEWS)
            .pool
            .connect_timeout
            .as_secs()
    };
    assert_eq!((timeout(rule("istio-system")), timeout(rule("infra"))), (1, 10));
    let infra = mesh("rootNamespace: infra");
    assert_eq!(timeout(rule("infra") + &infra), 1);
    assert_eq!(timeout(rule("istio-system") + &infra), 10);
}

#[test]
fn mc_01_a_file_of_its_own_comes_before_the_config_map() {
    let yaml = service_in("default", "reviews", &[1]) + &mesh("connectTimeout: 3s");
    let (set, _) = ResourceSet::load(&[SourceFile::new("<test>", yaml)], &LoadOptions::default());
    let (file, findings) = MeshConfig::load(&SourceFile::new("mesh.yaml", "connectTimeout: 5s\n"));
    assert!(findings.is_empty());
    let set = set.with_mesh_config(file.unwrap());
    let cx = mesh_core::config::CompileContext::new(mesh_core::config::Role::Sidecar);
    let mut diags = mesh_core::diagnostics::Diagnostics::about(set.documents().clone());
    let table =
        <mesh_route::RouteTable as mesh_core::config::Compile<ResourceSet>>::compile(&set, &cx, &mut diags)
            .unwrap();
    let cluster = table.clusters().iter().find(|cluster| cluster.name().as_str() == REVIEWS).unwrap();
    assert_eq!(cluster.spec().pool.connect_timeout, Duration::from_secs(5));
}
