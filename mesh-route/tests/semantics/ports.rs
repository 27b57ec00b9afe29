//! What is spoken at a port, and to an upstream: PT-04.

use mesh_route::UpstreamProtocol;
use mesh_testkit::upstream::Echo;

use crate::support::*;

/// A Kubernetes service with one port, at 9000 unless it says so itself.
fn kubernetes(port: &str) -> String {
    let number = if port.contains("port:") { "" } else { "port: 9000, " };
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: a, namespace: default}}\nspec: {{clusterIP: 10.0.0.1, ports: [{{{number}{port}}}]}}\n"
    )
}

/// The protocol that is spoken to the service; `None` when its port is not routed as HTTP.
fn spoken(yaml: &str) -> Option<UpstreamProtocol> {
    let it = compile(yaml);
    it.table
        .clusters()
        .iter()
        .find(|cluster| cluster.name().as_str().contains("a.default"))
        .map(|cluster| cluster.spec().protocol)
}

#[test]
fn pt_04_the_protocol_of_a_port() {
    use UpstreamProtocol::{Downstream, Http1, Http2};
    for (port, expected) in [
        // The prefix of the name.
        ("name: http", Some(Http1)),
        ("name: http-web", Some(Http1)),
        ("name: http2", Some(Http2)),
        ("name: http2-web", Some(Http2)),
        ("name: grpc", Some(Http2)),
        ("name: grpc-api", Some(Http2)),
        ("name: grpc-web", Some(Http2)),
        ("name: https", None),
        ("name: tls-web", None),
        ("name: tcp", None),
        ("name: mongo", None),
        ("name: mysql-db", None),
        ("name: redis", None),
        // appProtocol comes first.
        ("name: tcp-web, appProtocol: http", Some(Http1)),
        ("name: http, appProtocol: grpc", Some(Http2)),
        ("name: http, appProtocol: kubernetes.io/h2c", Some(Http2)),
        ("name: http, appProtocol: tcp", None),
        ("name: http, appProtocol: example.com/unknown", Some(Http1)),
        // Neither: sniffed, unless servers speak first there.
        ("name: web", Some(Downstream)),
        ("name: httpbin", Some(Downstream)),
        ("port: 25, name: mail", None),
        ("port: 53, name: dns", None),
        ("port: 3306, name: db", None),
        ("port: 27017, name: db", None),
        ("port: 3306, name: http-db", Some(Http1)),
    ] {
        assert_eq!(spoken(&kubernetes(port)), expected, "{port}");
    }
    // The protocol of a service entry.
    for (protocol, expected) in [
        ("HTTP", Some(Http1)),
        ("HTTP2", Some(Http2)),
        ("GRPC", Some(Http2)),
        ("GRPC-WEB", Some(Http2)),
        ("HTTPS", None),
        ("TLS", None),
        ("TCP", None),
        ("MONGO", None),
        ("MYSQL", None),
        ("REDIS", None),
    ] {
        let spec = format!(
            "{{hosts: [a.default.svc.cluster.local], resolution: STATIC, ports: [{{number: 9000, name: http, protocol: {protocol}}}], endpoints: [{{address: 127.0.0.1}}]}}"
        );
        assert_eq!(spoken(&resource("ServiceEntry", "a", &spec)), expected, "{protocol}");
    }
}

#[test]
fn pt_04_a_port_that_is_not_http_is_not_routed_as_http() {
    let it = compile(&kubernetes("name: tcp"));
    assert_eq!(it.clusters("http://a:9000/"), ["PassthroughCluster"]);
}

#[tokio::test]
async fn pt_04_what_an_upstream_is_spoken_to() {
    let echo = Echo::start("a").await;
    let spoken = |protocol: &str, policy: &str, mesh_settings: &str| {
        let service = resource(
            "ServiceEntry",
            "a",
            &format!(
                "{{hosts: [a.example.com], resolution: STATIC, ports: [{{number: 80, name: port, protocol: {protocol}}}], endpoints: [{{address: 127.0.0.1, ports: {{port: {}}}}}]}}",
                echo.addr.port()
            ),
        );
        let rule = match policy {
            "" => String::new(),
            policy => resource(
                "DestinationRule",
                "a",
                &format!(
                    "{{host: a.example.com, trafficPolicy: {{connectionPool: {{http: {{{policy}}}}}}}}}"
                ),
            ),
        };
        let settings = if mesh_settings.is_empty() { String::new() } else { mesh(mesh_settings) };
        let client = compile(&(service + &rule + &settings)).client();
        async move {
            send(&client, get("http://a.example.com/")).await.saw()["protocol"].as_str().unwrap().to_owned()
        }
    };
    let upgrade = "h2UpgradePolicy: UPGRADE";
    for (protocol, policy, mesh_settings, expected) in [
        ("HTTP", "", "", "HTTP/1.1"),
        ("HTTP2", "", "", "HTTP/2.0"),
        ("GRPC", "", "", "HTTP/2.0"),
        ("HTTP", upgrade, "", "HTTP/2.0"),
        ("HTTP", "", upgrade, "HTTP/2.0"),
        ("HTTP", "h2UpgradePolicy: DO_NOT_UPGRADE", upgrade, "HTTP/1.1"),
        ("HTTP", "h2UpgradePolicy: DEFAULT", upgrade, "HTTP/2.0"),
        // What the client spoke.
        ("HTTP2", "useClientProtocol: true", "", "HTTP/1.1"),
        ("''", "", "", "HTTP/1.1"),
        // Only its own rule vouches for a port that declares nothing.
        ("''", upgrade, "", "HTTP/2.0"),
        ("''", "", upgrade, "HTTP/1.1"),
    ] {
        assert_eq!(
            spoken(protocol, policy, mesh_settings).await,
            expected,
            "{protocol} {policy} {mesh_settings}"
        );
    }
    let both = "{host: a, trafficPolicy: {connectionPool: {http: {h2UpgradePolicy: UPGRADE, useClientProtocol: true}}}}";
    refused(
        &resource("DestinationRule", "a", both),
        "spec.trafficPolicy.connectionPool.http.useClientProtocol",
        "UPGRADE",
    );
}
