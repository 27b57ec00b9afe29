//! DestinationRule.

use super::{Fine, NETWORKING, Refused, Verdict, Warns, judge};

fn rule(frame: &str, cases: &[(&str, Verdict)]) {
    judge(NETWORKING, "DestinationRule", frame, cases);
}

fn policy(cases: &[(&str, Verdict)]) {
    rule("{host: a, trafficPolicy: {$}}", cases);
}

#[test]
fn dr_01_host_and_subsets() {
    rule(
        "$",
        &[
            ("{host: a}", Fine),
            ("{host: '*.a.b'}", Fine),
            ("{}", Refused("host")),
            ("{host: a.*}", Refused("host")),
            ("{host: 10.0.0.1}", Refused("host")),
            ("{host: a, subsets: [{name: v1, labels: {version: v1}}, {name: v2}]}", Fine),
            ("{host: a, subsets: [{labels: {version: v1}}]}", Refused("subsets[0].name")),
            ("{host: a, subsets: [{name: a_b}]}", Refused("subsets[0].name")),
            ("{host: a, subsets: [{name: a}, {name: a}]}", Refused("subsets[1].name")),
            ("{host: a, subsets: [{name: a, labels: {'.': b}}]}", Refused("[\".\"]")),
            ("{host: a, subsets: [{name: a, trafficPolicy: {}}]}", Refused("subsets[0].trafficPolicy")),
            ("{host: a, exportTo: ['*']}", Fine),
            ("{host: a, exportTo: ['*', b]}", Refused("exportTo")),
            ("{host: a, exportTo: ['~']}", Refused("exportTo")),
            ("{host: a, exportTo: [b, b]}", Refused("exportTo[1]")),
            ("{host: a, workloadSelector: {}}", Warns("workloadSelector.matchLabels")),
            ("{host: a, workloadSelector: {matchLabels: {a: b}}, exportTo: [.]}", Fine),
            ("{host: a, workloadSelector: {matchLabels: {a: b}}, exportTo: [ns]}", Fine),
            ("{host: a, workloadSelector: {matchLabels: {a: b}}, exportTo: ['*']}", Refused("exportTo")),
            ("{host: a, workloadSelector: {matchLabels: {a: b}}, exportTo: [other]}", Refused("exportTo")),
            ("{host: a, workloadSelector: {matchLabels: {a: b}}, exportTo: [., other]}", Refused("exportTo")),
            ("{host: a, workloadSelector: {matchLabels: {a: 'b*'}}}", Refused("matchLabels.a")),
        ],
    );
}

#[test]
fn dr_02_policies_and_ports() {
    policy(&[
        ("", Refused("trafficPolicy")),
        ("loadBalancer: {simple: RANDOM}", Fine),
        ("loadBalancer: {simple: MAYBE}", Refused("loadBalancer.simple")),
        ("proxyProtocol: {version: V2}", Fine),
        ("proxyProtocol: {version: V3}", Refused("proxyProtocol.version")),
        ("tunnel: {protocol: POST, targetHost: a.b, targetPort: 443}", Fine),
        ("tunnel: {targetHost: 10.0.0.1, targetPort: 443}", Fine),
        ("tunnel: {protocol: GET, targetHost: a.b, targetPort: 443}", Refused("tunnel.protocol")),
        ("tunnel: {targetHost: '*.a', targetPort: 443}", Refused("tunnel.targetHost")),
        ("tunnel: {targetHost: a.b}", Refused("tunnel.targetPort")),
        ("tunnel: {targetHost: a.b, targetPort: 443}, proxyProtocol: {}", Refused("proxyProtocol")),
        ("portLevelSettings: [{port: {number: 80}, loadBalancer: {simple: RANDOM}}]", Fine),
        ("portLevelSettings: [{loadBalancer: {simple: RANDOM}}]", Refused("portLevelSettings[0].port")),
        ("portLevelSettings: [{port: {number: 80}}]", Refused("portLevelSettings[0]")),
        (
            "portLevelSettings: [{port: {number: 80}, connectionPool: {}}]",
            Refused("portLevelSettings[0].connectionPool"),
        ),
        ("retryBudget: {percent: {value: 25}, budgetInterval: 10s, minRetryConcurrency: 3}", Fine),
        ("retryBudget: {percent: {value: 101}}", Refused("retryBudget.percent.value")),
    ]);
}

#[test]
fn dr_03_pools() {
    policy(&[
        (
            "connectionPool: {tcp: {maxConnections: 7, connectTimeout: 2s, maxConnectionDuration: 1h, idleTimeout: 1h}}",
            Fine,
        ),
        ("connectionPool: {tcp: {idleTimeout: 0s}}", Fine),
        ("connectionPool: {tcp: {tcpKeepalive: {time: 7200s, interval: 75s, probes: 3}}}", Fine),
        (
            "connectionPool: {http: {http1MaxPendingRequests: 2, http2MaxRequests: 3, maxRequestsPerConnection: 4, \
          maxRetries: 5, idleTimeout: 30s, maxConcurrentStreams: 6}}",
            Fine,
        ),
        ("connectionPool: {http: {http2KeepAlive: {interval: 15s, timeout: 5s}}}", Fine),
        ("connectionPool: {}", Refused("connectionPool")),
        ("connectionPool: {tcp: {maxConnections: -1}}", Refused("maxConnections")),
        ("connectionPool: {tcp: {connectTimeout: 2.000000005s}}", Refused("connectTimeout")),
        ("connectionPool: {tcp: {connectTimeout: 0s}}", Refused("connectTimeout")),
        ("connectionPool: {tcp: {maxConnectionDuration: 0.0000005s}}", Refused("maxConnectionDuration")),
        ("connectionPool: {tcp: {tcpKeepalive: {time: 0.5ms}}}", Refused("tcpKeepalive.time")),
        ("connectionPool: {tcp: {tcpKeepalive: {interval: 0s}}}", Refused("tcpKeepalive.interval")),
        ("connectionPool: {http: {http1MaxPendingRequests: -1}}", Refused("http1MaxPendingRequests")),
        ("connectionPool: {http: {http2MaxRequests: -1}}", Refused("http2MaxRequests")),
        ("connectionPool: {http: {maxRequestsPerConnection: -1}}", Refused("maxRequestsPerConnection")),
        ("connectionPool: {http: {maxRetries: -1}}", Refused("maxRetries")),
        ("connectionPool: {http: {maxConcurrentStreams: -1}}", Refused("maxConcurrentStreams")),
        ("connectionPool: {http: {idleTimeout: 30.000000005s}}", Refused("idleTimeout")),
        (
            "connectionPool: {http: {h2UpgradePolicy: UPGRADE, useClientProtocol: true}}",
            Refused("useClientProtocol"),
        ),
        (
            "connectionPool: {http: {http2KeepAlive: {interval: 15.5us, timeout: 5s}}}",
            Refused("http2KeepAlive.interval"),
        ),
        (
            "connectionPool: {http: {http2KeepAlive: {interval: 15s, timeout: 0s}}}",
            Refused("http2KeepAlive.timeout"),
        ),
    ]);
}

#[test]
fn dr_04_outliers() {
    policy(&[
        (
            "outlierDetection: {interval: 2s, baseEjectionTime: 2s, maxEjectionPercent: 50, minHealthPercent: 20}",
            Fine,
        ),
        ("outlierDetection: {splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 3}", Fine),
        ("outlierDetection: {consecutiveErrors: 5}", Warns("consecutiveErrors")),
        ("outlierDetection: {consecutiveLocalOriginFailures: 3}", Refused("consecutiveLocalOriginFailures")),
        ("outlierDetection: {interval: 2.000000005s}", Refused("interval")),
        ("outlierDetection: {baseEjectionTime: 0s}", Refused("baseEjectionTime")),
        ("outlierDetection: {maxEjectionPercent: 105}", Refused("maxEjectionPercent")),
        ("outlierDetection: {minHealthPercent: -1}", Refused("minHealthPercent")),
        ("outlierDetection: {minHealthPercent: 101}", Refused("minHealthPercent")),
    ]);
}

#[test]
fn dr_05_load_balancers() {
    policy(&[
        ("loadBalancer: {consistentHash: {httpCookie: {name: a, ttl: 1h}}}", Fine),
        ("loadBalancer: {consistentHash: {httpCookie: {name: a, ttl: 0s}}}", Fine),
        (
            "loadBalancer: {consistentHash: {httpHeaderName: a, minimumRingSize: 1024}}",
            Warns("minimumRingSize"),
        ),
        ("loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 65537}}}", Fine),
        ("loadBalancer: {consistentHash: {httpCookie: {ttl: 1h}}}", Refused("httpCookie.name")),
        (
            "loadBalancer: {consistentHash: {httpCookie: {name: a, attributes: [{name: SameSite, value: Lax}]}}}",
            Fine,
        ),
        (
            "loadBalancer: {consistentHash: {httpCookie: {name: a, attributes: [{name: b}, {name: b}]}}}",
            Refused("attributes[1].name"),
        ),
        ("loadBalancer: {consistentHash: {httpHeaderName: a, useSourceIp: true}}", Refused("consistentHash")),
        (
            "loadBalancer: {consistentHash: {httpHeaderName: a, maglev: {tableSize: 1000}}}",
            Refused("maglev.tableSize"),
        ),
        ("loadBalancer: {consistentHash: {httpHeaderName: a, maglev: {}}}", Refused("maglev.tableSize")),
        (
            "loadBalancer: {consistentHash: {httpHeaderName: a, maglev: {tableSize: 5000011}}}",
            Refused("maglev.tableSize"),
        ),
        (
            "loadBalancer: {consistentHash: {httpHeaderName: a, minimumRingSize: 8, ringHash: {}}}",
            Refused("minimumRingSize"),
        ),
        (
            "loadBalancer: {consistentHash: {httpHeaderName: a, ringHash: {}, maglev: {tableSize: 7}}}",
            Refused("maglev"),
        ),
        ("loadBalancer: {simple: RANDOM, consistentHash: {httpHeaderName: a}}", Refused("consistentHash")),
        ("loadBalancer: {warmup: {duration: 300s, minimumPercent: 5, aggression: 1.5}}", Fine),
        ("loadBalancer: {warmup: {minimumPercent: 5}}", Refused("warmup.duration")),
        ("loadBalancer: {warmup: {duration: 0s}}", Refused("warmup.duration")),
        ("loadBalancer: {warmup: {duration: 300s, minimumPercent: 150}}", Refused("warmup.minimumPercent")),
        ("loadBalancer: {warmup: {duration: 300s, aggression: 0.3}}", Refused("warmup.aggression")),
    ]);
}

#[test]
fn dr_06_localities() {
    rule(
        "{host: a, trafficPolicy: {outlierDetection: {}, loadBalancer: {localityLbSetting: {$}}}}",
        &[
            ("distribute: [{from: a/b/c, to: {a/b/c: 80, a/b1: 20}}]", Fine),
            ("distribute: [{from: a/*, to: {a/*: 100}}, {from: '*', to: {b/*: 100}}]", Fine),
            (
                "distribute: [{from: a1/*, to: {a: 100}}, {from: a2/b/c, to: {a: 100}}, {from: a3/b, to: {a: 100}}]",
                Fine,
            ),
            ("distribute: [{from: a, to: {a: 80, b: 25}}]", Refused("distribute[0].to")),
            ("distribute: [{from: a, to: {a: 80}}]", Refused("distribute[0].to")),
            ("distribute: [{from: a, to: {a: 0, b: 100}}]", Refused("to.a")),
            ("distribute: [{from: '*/b/*', to: {a: 100}}]", Refused("distribute[0].from")),
            ("distribute: [{from: '*/b', to: {a: 100}}]", Refused("distribute[0].from")),
            ("distribute: [{from: a//c, to: {a: 100}}]", Refused("distribute[0].from")),
            (
                "distribute: [{from: '*', to: {a: 100}}, {from: a/b/c, to: {a: 100}}]",
                Refused("distribute[1].from"),
            ),
            (
                "distribute: [{from: a, to: {a: 100}}, {from: a/b/c, to: {a: 100}}]",
                Refused("distribute[1].from"),
            ),
            (
                "distribute: [{from: a/*, to: {a: 100}}, {from: a/b/c, to: {a: 100}}]",
                Refused("distribute[1].from"),
            ),
            (
                "distribute: [{from: a/b, to: {a: 100}}, {from: a/b/c, to: {a: 100}}]",
                Refused("distribute[1].from"),
            ),
            (
                "distribute: [{from: a/b/*, to: {a: 100}}, {from: a/b/c, to: {a: 100}}]",
                Refused("distribute[1].from"),
            ),
            (
                "distribute: [{from: a/b/c, to: {a: 100}}, {from: a/b, to: {a: 100}}]",
                Refused("distribute[1].from"),
            ),
            ("distribute: [{from: x, to: {a/*: 50, a/b: 50}}]", Refused("[\"a/b\"]")),
            ("distribute: [{from: a, to: {a: 100}}], failover: [{from: a, to: b}]", Refused("failover")),
            ("failover: [{from: a, to: b}]", Fine),
            ("failover: [{from: a, to: a}]", Refused("failover[0].to")),
            ("failover: [{from: '*', to: a}]", Refused("failover[0].from")),
            ("failover: [{from: a, to: '*'}]", Refused("failover[0].to")),
            ("failover: [{from: a/b, to: c}]", Refused("failover[0].from")),
            ("failover: [{from: a, to: c/d}]", Refused("failover[0].to")),
            ("failoverPriority: [topology.istio.io/network, topology.kubernetes.io/region]", Fine),
            (
                "failover: [{from: a, to: b}], failoverPriority: [topology.kubernetes.io/region]",
                Refused("failoverPriority[0]"),
            ),
            ("failover: [{from: a, to: b}], failoverPriority: [topology.istio.io/network]", Fine),
        ],
    );
    policy(&[
        ("loadBalancer: {localityLbSetting: {failover: [{from: a, to: b}]}}", Warns("localityLbSetting")),
        ("loadBalancer: {localityLbSetting: {failoverPriority: [a]}}", Warns("localityLbSetting")),
        ("loadBalancer: {localityLbSetting: {enabled: true}}", Fine),
    ]);
}

#[test]
fn dr_07_tls() {
    policy(&[
        ("tls: {mode: DISABLE}", Fine),
        ("tls: {mode: SIMPLE, caCertificates: a, subjectAltNames: [b], sni: c}", Fine),
        ("tls: {mode: SIMPLE, credentialName: a, subjectAltNames: [b]}", Fine),
        ("tls: {mode: SIMPLE, credentialName: a, clientCertificate: b}", Refused("tls.clientCertificate")),
        ("tls: {mode: SIMPLE, credentialName: a, privateKey: b}", Refused("tls.privateKey")),
        ("tls: {mode: SIMPLE, credentialName: a, caCertificates: b}", Refused("tls.caCertificates")),
        ("tls: {mode: MUTUAL, credentialName: a, caCrl: b}", Refused("tls.caCrl")),
        ("tls: {mode: MUTUAL, credentialName: a}", Fine),
        ("tls: {mode: MUTUAL, clientCertificate: a, privateKey: b}", Fine),
        ("tls: {mode: MUTUAL, clientCertificate: a}", Refused("tls.privateKey")),
        ("tls: {mode: MUTUAL, privateKey: a}", Refused("tls.clientCertificate")),
        ("tls: {mode: SIMPLE, insecureSkipVerify: true}", Fine),
        ("tls: {mode: SIMPLE, insecureSkipVerify: false, caCertificates: a}", Fine),
        ("tls: {mode: SIMPLE, insecureSkipVerify: true, caCertificates: a}", Refused("tls.caCertificates")),
        ("tls: {mode: SIMPLE, insecureSkipVerify: true, credentialName: a}", Refused("tls.credentialName")),
        (
            "tls: {mode: SIMPLE, insecureSkipVerify: true, subjectAltNames: [a]}",
            Refused("tls.subjectAltNames"),
        ),
        ("tls: {mode: MUTUAL, insecureSkipVerify: true, credentialName: a}", Fine),
        (
            "tls: {mode: MUTUAL, insecureSkipVerify: true, clientCertificate: a, privateKey: b, caCertificates: c}",
            Refused("tls.caCertificates"),
        ),
        (
            "tls: {mode: MUTUAL, insecureSkipVerify: true, clientCertificate: a, privateKey: b, subjectAltNames: [c]}",
            Refused("tls.subjectAltNames"),
        ),
        ("tls: {mode: SIMPLE, credentialName: 'configmap://a'}", Fine),
        ("tls: {mode: SIMPLE, credentialName: 'configmap://ns/a'}", Fine),
        ("tls: {mode: SIMPLE, credentialName: 'configmap://other/a'}", Refused("tls.credentialName")),
        ("tls: {mode: SIMPLE, credentialName: 'configmap://'}", Refused("tls.credentialName")),
        ("tls: {mode: MAYBE}", Refused("tls.mode")),
    ]);
}
