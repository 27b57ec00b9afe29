//! Sidecar.

use super::{Fine, NETWORKING, Refused, Verdict, Warns, judge};

fn sidecar(frame: &str, cases: &[(&str, Verdict)]) {
    judge(NETWORKING, "Sidecar", frame, cases);
}

#[test]
fn sc_01_egress_hosts() {
    sidecar(
        "{egress: [{hosts: [$]}]}",
        &[
            ("'*/*'", Fine),
            ("./*", Fine),
            ("./a.b", Fine),
            ("'~/*'", Fine),
            ("ns1/*.a.b", Fine),
            ("'*/a.b', ns1/c.d", Fine),
            ("'*/*', '~ns1/*'", Fine),
            ("", Refused("egress[0].hosts")),
            ("'*'", Refused("hosts[0]")),
            ("/", Refused("hosts[0]")),
            ("ns1/a", Refused("hosts[0]")),
            ("ns1/*a.b", Refused("hosts[0]")),
            ("ns1/10.0.0.1", Refused("hosts[0]")),
            ("a_b/c.d", Refused("hosts[0]")),
            ("'*/*', ns1/a.b", Warns("hosts")),
            ("ns1/*, ns1/a.b", Warns("hosts[1]")),
            ("./*, ns/a.b", Warns("hosts[1]")),
            ("ns1/a.b, ns1/a.b", Warns("hosts[1]")),
        ],
    );
}

#[test]
fn sc_01_egress_listeners() {
    sidecar(
        "{egress: [$]}",
        &[
            ("{port: {number: 80, protocol: HTTP}, hosts: [./*]}, {hosts: [./*]}", Fine),
            ("{hosts: [./*]}, {port: {number: 80, protocol: HTTP}, hosts: [./*]}", Refused("egress[0].port")),
            ("{hosts: [./*]}, {hosts: [./*]}", Refused("egress[0].port")),
            (
                "{port: {number: 80, protocol: HTTP}, hosts: [./*]}, {port: {number: 80, protocol: TCP}, hosts: [./*]}",
                Refused("egress[1].port.number"),
            ),
            ("{port: {number: 80}, bind: 127.0.0.1, hosts: [./*]}", Fine),
            ("{port: {number: 80, name: a_b}, hosts: [./*]}", Refused("port.name")),
            ("{port: {number: 80, protocol: http1}, hosts: [./*]}", Refused("port.protocol")),
            ("{port: {number: 65536}, hosts: [./*]}", Refused("port.number")),
            ("{port: {number: 80, targetPort: 81}, hosts: [./*]}", Refused("port.targetPort")),
            ("{port: {number: 80}, bind: a, hosts: [./*]}", Refused("bind")),
            ("{port: {number: 0, protocol: HTTP}, bind: 'unix:///a', hosts: [./*]}", Fine),
            ("{port: {number: 0, protocol: HTTP}, bind: 'unix://@a', captureMode: NONE, hosts: [./*]}", Fine),
            (
                "{port: {number: 0, protocol: HTTP}, bind: 'unix:///a', captureMode: IPTABLES, hosts: [./*]}",
                Refused("captureMode"),
            ),
            ("{port: {number: 0, protocol: HTTP}, bind: 'a:///b', hosts: [./*]}", Refused("bind")),
            (
                "{port: {number: 0}, bind: 'unix:///a', hosts: [./*]}, {port: {number: 0}, bind: 'unix:///a', hosts: [./*]}",
                Refused("egress[1].bind"),
            ),
        ],
    );
}

#[test]
fn sc_03_ingress_listeners() {
    sidecar(
        "{ingress: [$]}",
        &[
            ("{port: {number: 80, protocol: HTTP}}", Fine),
            ("{port: {number: 80}, defaultEndpoint: '127.0.0.1:8080'}", Fine),
            ("{port: {number: 80}, defaultEndpoint: '[::1]:8080'}", Fine),
            ("{port: {number: 80}, defaultEndpoint: '0.0.0.0:8080'}", Fine),
            ("{port: {number: 80}, defaultEndpoint: 'unix:///a'}", Fine),
            ("{port: {number: 80}, defaultEndpoint: '10.0.0.1:8080'}", Refused("defaultEndpoint")),
            ("{port: {number: 80}, defaultEndpoint: '[1:1:1:1:1:1:1:1]:80'}", Refused("defaultEndpoint")),
            ("{port: {number: 80}, defaultEndpoint: '127.0.0.1:a'}", Refused("defaultEndpoint")),
            ("{port: {number: 80}, defaultEndpoint: 'unix:///'}", Refused("defaultEndpoint")),
            ("{defaultEndpoint: '127.0.0.1:8080'}", Refused("ingress[0].port")),
            ("{port: {number: 0, protocol: HTTP}, bind: 'unix:///a'}", Refused("port.number")),
            ("{port: {number: 80, targetPort: 81}}", Refused("port.targetPort")),
            ("{port: {number: 80}}, {port: {number: 80}}", Refused("ingress[1].port.number")),
            (
                "{port: {number: 80, protocol: HTTPS}, tls: {mode: SIMPLE, serverCertificate: a, privateKey: b}}",
                Fine,
            ),
            (
                "{port: {number: 80, protocol: TCP}, tls: {mode: SIMPLE, serverCertificate: a, privateKey: b}}",
                Refused("tls"),
            ),
            ("{port: {number: 80, protocol: HTTPS}, tls: {mode: SIMPLE}}", Refused("tls.privateKey")),
            ("{port: {number: 80, protocol: HTTPS}, tls: {mode: ISTIO_MUTUAL}}", Refused("tls.mode")),
            ("{port: {number: 80, protocol: HTTPS}, tls: {mode: AUTO_PASSTHROUGH}}", Refused("tls.mode")),
            (
                "{port: {number: 80, protocol: HTTPS}, tls: {mode: SIMPLE, httpsRedirect: true}}",
                Refused("tls.httpsRedirect"),
            ),
            (
                "{port: {number: 80, protocol: HTTPS}, tls: {mode: SIMPLE, subjectAltNames: [a]}}",
                Refused("tls.subjectAltNames"),
            ),
            (
                "{port: {number: 80, protocol: HTTPS}, tls: {mode: SIMPLE, credentialName: a}}",
                Refused("tls.credentialName"),
            ),
            (
                "{port: {number: 80, protocol: HTTPS}, tls: {mode: SIMPLE, credentialNames: [a]}}",
                Refused("tls.credentialNames"),
            ),
            (
                "{port: {number: 80, protocol: HTTPS}, tls: {mode: SIMPLE, tlsCertificates: [{}]}}",
                Refused("tls.tlsCertificates"),
            ),
            ("{port: {number: 80, protocol: HTTP}, connectionPool: {http: {maxRetries: 1}}}", Fine),
            (
                "{port: {number: 80, protocol: TCP}, connectionPool: {http: {maxRetries: 1}}}",
                Warns("connectionPool.http"),
            ),
            ("{port: {number: 80, protocol: TCP}, connectionPool: {}}", Refused("connectionPool")),
        ],
    );
}

#[test]
fn sc_02_the_whole() {
    sidecar(
        "$",
        &[
            ("{}", Refused("")),
            ("{outboundTrafficPolicy: {mode: ALLOW_ANY}}", Fine),
            ("{inboundConnectionPool: {http: {http1MaxPendingRequests: 1}}}", Fine),
            ("{inboundConnectionPool: {}}", Refused("inboundConnectionPool")),
            ("{workloadSelector: {}, egress: [{hosts: ['*/*']}]}", Warns("workloadSelector.labels")),
            ("{workloadSelector: {labels: {a: '*'}}, egress: [{hosts: ['*/*']}]}", Refused("labels.a")),
            (
                "{outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: a.b, subset: c, port: {number: 80}}}}",
                Fine,
            ),
            (
                "{outboundTrafficPolicy: {egressProxy: {host: a.b, port: {number: 80}}}}",
                Refused("egressProxy"),
            ),
            (
                "{outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: 'a*b', port: {number: 80}}}}",
                Refused("egressProxy.host"),
            ),
            (
                "{outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: a.b}}}",
                Refused("egressProxy.port"),
            ),
            (
                "{outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: a.b, port: {}}}}",
                Refused("egressProxy.port.number"),
            ),
        ],
    );
}
