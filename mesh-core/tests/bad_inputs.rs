//! Bad configurations are refused with file, line, column, field path and reason; all of their errors at once, and
//! quickly. What is said about each is in the snapshot.
#![cfg(feature = "istio")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fmt::Write as _;
use std::time::Duration;

use mesh_core::diagnostics::{Diagnostics, Severity};
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};

/// The most that refusing a file may take of a core.
const PATIENCE: Duration = Duration::from_millis(500);

/// An HTTP route that is fine by itself; a case adds what is not.
const ROUTE: &str = "route: [{destination: {host: a}}]";

/// The body of `http[0]`, in which `$` stands for a fine `route`.
const HTTP_ROUTES: &[&str] = &[
    "{}",
    "5",
    "[]",
    "route: {}",
    "route: [5]",
    "route: [null]",
    "route: [{}]",
    "route: [{destination: {}}]",
    "route: [{destination: a}]",
    "route: [{destination: {host: '*'}}]",
    "route: [{destination: {host: 'a b'}}]",
    "route: [{destination: {host: 10.0.0.1}}]",
    "route: [{destination: {host: 5}}]",
    "route: [{destination: {host: true}}]",
    "route: [{destination: {hots: a}}]",
    "route: [{destination: {host: a, subset: v_1}}]",
    "route: [{destination: {host: a, subst: v1}}]",
    "route: [{destination: {host: a, port: 80}}]",
    "route: [{destination: {host: a, port: {number: 0}}}]",
    "route: [{destination: {host: a, port: {number: 65536}}}]",
    "route: [{destination: {host: a, port: {number: -1}}}]",
    "route: [{destination: {host: a, port: {number: http}}}]",
    "route: [{destination: {host: a, port: {name: http}}}]",
    "route: [{destination: {host: a}, weight: -1}]",
    "route: [{destination: {host: a}, weight: ten}]",
    "route: [{destination: {host: a}, weight: 1.5}]",
    "route: [{destination: {host: a}, weight: 99999999999}]",
    "route: [{destination: {host: a}, wieght: 10}]",
    "route: [{destination: {host: a}, weight: 0}, {destination: {host: b}, weight: 0}]",
    "route: [{destination: {host: a}}, {destination: {host: b}}]",
    "route: [{destination: {host: a}, headers: {request: {set: {'': x}}}}]",
    "route: [{destination: {host: a}, headers: {request: {set: {':path': x}}}}]",
    "route: [{destination: {host: a}, headers: {request: {remove: [host]}}}]",
    "route: [{destination: {host: a}, headers: {response: {add: {host: x}}}}]",
    "route: [{destination: {host: a}, headers: {response: {set: {x: '50%'}}}}]",
    "$, headers: {request: {set: {x: '%REQ(:path)'}}}",
    "$, headers: {request: {set: {x: 5}}}",
    "$, headers: {request: {set: [x]}}",
    "$, headers: {requests: {}}",
    "$, headers: {request: {set: {host: a, ':authority': b}}}",
    "$, rewrite: {authority: a}, headers: {request: {add: {host: b}}}",
    "$, match: {uri: {prefix: /}}",
    "$, match: [{uri: /}]",
    "$, match: [{uri: {exact: /a, prefix: /b}}]",
    "$, match: [{uri: {regex: '('}}]",
    "$, match: [{uri: {regex: 'a(?=b)'}}]",
    "$, match: [{uri: {regex: '(a)\\1'}}]",
    "$, match: [{uri: {regex: '(a{1,1000}){1,1000}'}}]",
    "$, match: [{uri: {regex: ''}}]",
    "$, match: [{uri: {suffix: /a}}]",
    "$, match: [{method: GET}]",
    "$, match: [{method: {prefix: ''}}]",
    "$, match: [{scheme: {regex: ''}}]",
    "$, match: [{authority: {regex: '[a'}}]",
    "$, match: [{headers: {'x y': {exact: a}}}]",
    "$, match: [{headers: {x-user: a}}]",
    "$, match: [{headers: {x-user: null}}]",
    "$, match: [{headers: {x-user: {regex: '+'}}}]",
    "$, match: [{headers: {x-user: {exact: 1}}}]",
    "$, match: [{headers: {'@request.auth.claims.sub': {exact: a}}}]",
    "$, match: [{withoutHeaders: {'': {}}}]",
    "$, match: [{queryParams: {q: {regex: ')'}}}]",
    "$, match: [{queryParams: [q]}]",
    "$, match: [{port: 0x10000}]",
    "$, match: [{port: http}]",
    "$, match: [{sourceLabels: {a b: c}}]",
    "$, match: [{sourceLabels: {app: 1.0}}]",
    "$, match: [{sourceLabels: {app: '-'}}]",
    "$, match: [{sourceNamespace: a.b}]",
    "$, match: [{gateways: [/a]}]",
    "$, match: [{gateways: a}]",
    "$, match: [{ignoreUriCase: 1}]",
    "$, match: [{ignoreUriCase: 'true'}]",
    "$, redirect: {uri: /}",
    "redirect: {}",
    "redirect: {redirectCode: 301}",
    "redirect: {uri: /, redirectCode: 200}",
    "redirect: {uri: /, redirectCode: 400}",
    "redirect: {uri: /, scheme: ftp}",
    "redirect: {uri: /, port: 70000}",
    "redirect: {uri: /, port: 80, derivePort: FROM_REQUEST_PORT}",
    "redirect: {uri: /, derivePort: FROM_MARS}",
    "redirect: {uri: /, prefixRewrite: /b}",
    "match: [{uri: {exact: /a}}], redirect: {prefixRewrite: /b}",
    "redirect: {uri: /}, rewrite: {uri: /b}",
    "redirect: {uri: /}, fault: {delay: {fixedDelay: 1s}}",
    "redirect: {uri: /}, directResponse: {status: 200}",
    "$, directResponse: {status: 200}",
    "directResponse: {}",
    "directResponse: {status: 99}",
    "directResponse: {status: 600}",
    "directResponse: {status: 200, body: hello}",
    "directResponse: {status: 200, body: {bytes: '*'}}",
    "directResponse: {status: 200, body: {bytes: aGk=, string: hi}}",
    "directResponse: {status: 200}, rewrite: {uri: /}",
    "$, delegate: {name: a}",
    "$, rewrite: {}",
    "$, rewrite: {uri: /a, uriRegexRewrite: {match: a, rewrite: b}}",
    "$, rewrite: {uriRegexRewrite: {match: '(', rewrite: b}}",
    "$, rewrite: {uriRegexRewrite: {match: a}}",
    "$, timeout: 0s",
    "$, timeout: 5",
    "$, timeout: 5 s",
    "$, timeout: -1s",
    "$, timeout: 1us",
    "$, timeout: 1.0005s",
    "$, timeout: 1d",
    "$, timeout: apple",
    "$, retries: {attempts: -1}",
    "$, retries: {attempts: 0, perTryTimeout: 1s}",
    "$, retries: {attempts: many}",
    "$, retries: {attempts: 1, perTryTimeout: 0s}",
    "$, retries: {attempts: 1, retryOn: '5xx,sometimes'}",
    "$, retries: {attempts: 1, retryOn: '600'}",
    "$, retries: {attempts: 1, retryOn: '5xx, reset'}",
    "$, retries: {attempts: 1, backoff: 10us}",
    "$, retries: {attempt: 1}",
    "$, fault: {}",
    "$, fault: {delay: {fixedDelay: 0s}}",
    "$, fault: {delay: {percentage: {value: 101}, fixedDelay: 1s}}",
    "$, fault: {delay: {percentage: {value: 0.00001}, fixedDelay: 1s}}",
    "$, fault: {delay: {percentage: 10, fixedDelay: 1s}}",
    "$, fault: {delay: {percent: 101, fixedDelay: 1s}}",
    "$, fault: {delay: {exponentialDelay: 1s}}",
    "$, fault: {abort: {httpStatus: 199}}",
    "$, fault: {abort: {httpStatus: 600}}",
    "$, fault: {abort: {httpStatus: 500, grpcStatus: INTERNAL}}",
    "$, fault: {abort: {grpcStatus: '14'}}",
    "$, fault: {abort: {http2Error: REFUSED}}",
    "$, fault: {abort: {percentage: {value: -1}, httpStatus: 500}}",
    "$, mirror: {host: '*'}",
    "$, mirror: {host: b}, mirrors: [{destination: {host: c}}]",
    "$, mirror: {host: b}, mirrorPercent: 101",
    "$, mirror: {host: b}, mirrorPercentage: {value: 100.5}",
    "$, mirrors: [{percentage: {value: 5}}]",
    "$, mirrors: [{destination: {host: b}, percentage: {value: -5}}]",
    "$, corsPolicy: {allowOrigins: [{}]}",
    "$, corsPolicy: {allowOrigins: ['*']}",
    "$, corsPolicy: {allowOrigins: [{regex: '('}]}",
    "$, corsPolicy: {allowMethods: [get]}",
    "$, corsPolicy: {allowHeaders: ['x y']}",
    "$, corsPolicy: {exposeHeaders: ['']}",
    "$, corsPolicy: {maxAge: 1500ms}",
    "$, corsPolicy: {allowCredentials: maybe}",
    "$, corsPolicy: {unmatchedPreflights: DROP}",
    "$, websockets: true",
];

/// The spec of a VirtualService.
const VIRTUAL_SERVICES: &[&str] = &[
    "{}",
    "[]",
    "5",
    "{hosts: [a]}",
    "{hosts: [a], http: []}",
    "{hosts: a, http: [{$}]}",
    "{hosts: ['*'], http: [{$}]}",
    "{hosts: ['a*.b'], http: [{$}]}",
    "{hosts: [a, a], http: [{$}]}",
    "{hosts: ['*.foo.com', www.foo.com], http: [{$}]}",
    "{hosts: [''], http: [{$}]}",
    "{hosts: [a], gateways: ['b@d'], http: [{$}]}",
    "{hosts: [a], gateways: [ns/], http: [{$}]}",
    "{hosts: [a], exportTo: ['*', b], http: [{$}]}",
    "{hosts: [a], exportTo: ['~'], http: [{$}]}",
    "{hosts: [a], exportTo: [., default], http: [{$}]}",
    "{hosts: [a], host: b, http: [{$}]}",
    "{gateways: [g], http: [{$}]}",
    "{tcp: [{$}]}",
    "{http: [{delegate: {name: a}}]}",
    "{hosts: [a], tcp: [{}]}",
    "{hosts: [a], tcp: [{route: [{}]}]}",
    "{hosts: [a], tcp: [{match: [{destinationSubnets: [10.0.0.0/33]}], $}]}",
    "{hosts: [a], tcp: [{match: [{destinationSubnets: [ten]}], $}]}",
    "{hosts: [a], tcp: [{match: [{port: 65536}], $}]}",
    "{hosts: [a], tls: [{$}]}",
    "{hosts: [a], tls: [{match: [{port: 443}], $}]}",
    "{hosts: [a], tls: [{match: [{sniHosts: [b]}], $}]}",
    "{hosts: [a], tls: [{match: [{sniHosts: [a]}]}]}",
];

/// The spec of a DestinationRule.
const DESTINATION_RULES: &[&str] = &[
    "{}",
    "{host: ''}",
    "{host: 'a b'}",
    "{host: [a]}",
    "{host: a, trafficPolicy: {}}",
    "{host: a, trafficPolicy: []}",
    "{host: a, subsets: [{labels: {v: '1'}}]}",
    "{host: a, subsets: [{name: v1}, {name: v1}]}",
    "{host: a, subsets: [{name: v.1}]}",
    "{host: a, subsets: [{name: v1, labels: {version: 1}}]}",
    "{host: a, subsets: [{name: v1, labels: {a/b/c: d}}]}",
    "{host: a, subsets: [{name: v1, trafficPolicy: {}}]}",
    "{host: a, exportTo: [a b]}",
    "{host: a, workloadSelector: {matchLabels: {app: 'a*'}}}",
    "{host: a, workloadSelector: {matchLabels: {app: a}}, exportTo: ['*']}",
    "{host: a, trafficPolicy: {loadBalancer: {simple: FASTEST}}}",
    "{host: a, trafficPolicy: {loadBalancer: {simple: 17}}}",
    "{host: a, trafficPolicy: {loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, httpHeaderName: x}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {httpCookie: {ttl: 1s}}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {maglev: {tableSize: 10}}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {maglev: {tableSize: 5000011}}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {maglev: {}}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {minimumRingSize: 8, ringHash: {}}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: a/*, to: {b: 99}}]}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: '*/a', to: {b: 100}}]}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {localityLbSetting: {failover: [{from: a, to: a}]}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {localityLbSetting: {failover: [{from: a/b, to: c}]}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {warmup: {}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {warmup: {duration: 1s, aggression: 0.5}}}}",
    "{host: a, trafficPolicy: {connectionPool: {}}}",
    "{host: a, trafficPolicy: {connectionPool: {tcp: {maxConnections: -1}}}}",
    "{host: a, trafficPolicy: {connectionPool: {tcp: {connectTimeout: 0s}}}}",
    "{host: a, trafficPolicy: {connectionPool: {tcp: {idleTimeout: -1s}}}}",
    "{host: a, trafficPolicy: {connectionPool: {tcp: {tcpKeepalive: {time: 1us}}}}}",
    "{host: a, trafficPolicy: {connectionPool: {http: {maxRetries: -1}}}}",
    "{host: a, trafficPolicy: {connectionPool: {http: {h2UpgradePolicy: UPGRADE, useClientProtocol: true}}}}",
    "{host: a, trafficPolicy: {connectionPool: {http: {h2UpgradePolicy: MAYBE}}}}",
    "{host: a, trafficPolicy: {connectionPool: {http: {http2KeepAlive: {interval: 5s}}}}}",
    "{host: a, trafficPolicy: {outlierDetection: {interval: 0s}}}",
    "{host: a, trafficPolicy: {outlierDetection: {maxEjectionPercent: 101}}}",
    "{host: a, trafficPolicy: {outlierDetection: {minHealthPercent: -1}}}",
    "{host: a, trafficPolicy: {outlierDetection: {consecutiveLocalOriginFailures: 5}}}",
    "{host: a, trafficPolicy: {outlierDetection: {consecutive5xxErrors: -5}}}",
    "{host: a, trafficPolicy: {outlierDetection: {consecutive5xxError: 5}}}",
    "{host: a, trafficPolicy: {tls: {mode: MUTUAL}}}",
    "{host: a, trafficPolicy: {tls: {mode: STRICT}}}",
    "{host: a, trafficPolicy: {tls: {mode: SIMPLE, credentialName: a, caCertificates: b}}}",
    "{host: a, trafficPolicy: {tls: {mode: SIMPLE, insecureSkipVerify: true, subjectAltNames: [a]}}}",
    "{host: a, trafficPolicy: {portLevelSettings: [{tls: {}}]}}",
    "{host: a, trafficPolicy: {portLevelSettings: [{port: {number: 80}}]}}",
    "{host: a, trafficPolicy: {portLevelSettings: [{port: {number: 0}, tls: {}}]}}",
    "{host: a, trafficPolicy: {tunnel: {targetHost: a b, targetPort: 0, protocol: UDP}}}",
    "{host: a, trafficPolicy: {tunnel: {targetHost: a, targetPort: 80}, proxyProtocol: {}}}",
    "{host: a, trafficPolicy: {proxyProtocol: {version: V3}}}",
    "{host: a, trafficPolicy: {retryBudget: {percent: {value: 200}}}}",
    "{host: a, traffic_policy: {tls: {}}, trafficPolicy: {tls: {}}}",
];

/// Group, kind and spec of everything else.
const OTHERS: &[(&str, &str, &str)] = &[
    ("networking.istio.io/v1", "Gateway", "{}"),
    ("networking.istio.io/v1", "Gateway", "{servers: [{}]}"),
    (
        "networking.istio.io/v1",
        "Gateway",
        "{servers: [{hosts: ['*'], port: {number: 0, name: http, protocol: HTTP}}]}",
    ),
    (
        "networking.istio.io/v1",
        "Gateway",
        "{servers: [{hosts: ['*'], port: {number: 80, name: http, protocol: SPDY}}]}",
    ),
    (
        "networking.istio.io/v1",
        "Gateway",
        "{servers: [{hosts: [], port: {number: 80, name: http, protocol: HTTP}}]}",
    ),
    (
        "networking.istio.io/v1",
        "Gateway",
        "{servers: [{hosts: ['a/b/c'], port: {number: 80, name: http, protocol: HTTP}}]}",
    ),
    (
        "networking.istio.io/v1",
        "Gateway",
        "{servers: [{hosts: ['*'], port: {number: 443, name: https, protocol: HTTPS}}]}",
    ),
    (
        "networking.istio.io/v1",
        "Gateway",
        "{servers: [{hosts: ['*'], port: {number: 443, name: https, protocol: HTTPS}, tls: {mode: MUTUAL}}]}",
    ),
    (
        "networking.istio.io/v1",
        "Gateway",
        "{servers: [{hosts: ['*'], port: {number: 443, name: https, protocol: HTTPS}, tls: {mode: HARD}}]}",
    ),
    ("networking.istio.io/v1", "Gateway", "{selector: [a], servers: [{hosts: '*', port: 80}]}"),
    ("networking.istio.io/v1", "ServiceEntry", "{}"),
    (
        "networking.istio.io/v1",
        "ServiceEntry",
        "{hosts: ['*'], ports: [{number: 80, name: http, protocol: HTTP}]}",
    ),
    ("networking.istio.io/v1", "ServiceEntry", "{hosts: [a.com], ports: [{number: 80}, {number: 80}]}"),
    ("networking.istio.io/v1", "ServiceEntry", "{hosts: [a.com], addresses: [10.0.0.0/99]}"),
    ("networking.istio.io/v1", "ServiceEntry", "{hosts: [a.com], resolution: DNSS}"),
    (
        "networking.istio.io/v1",
        "ServiceEntry",
        "{hosts: [a.com], resolution: NONE, ports: [{number: 80, name: h, protocol: HTTP}], endpoints: [{address: 10.0.0.1}]}",
    ),
    (
        "networking.istio.io/v1",
        "ServiceEntry",
        "{hosts: [a.com], resolution: STATIC, ports: [{number: 80, name: h, protocol: HTTP}], endpoints: [{address: 300.0.0.1}]}",
    ),
    ("networking.istio.io/v1", "WorkloadEntry", "{}"),
    ("networking.istio.io/v1", "WorkloadEntry", "{address: unix://a}"),
    ("networking.istio.io/v1", "WorkloadEntry", "{address: 10.0.0.1, ports: {http: 70000}}"),
    ("networking.istio.io/v1", "Sidecar", "{}"),
    ("networking.istio.io/v1", "Sidecar", "{egress: [{hosts: []}]}"),
    ("networking.istio.io/v1", "Sidecar", "{egress: [{hosts: [a]}]}"),
    ("networking.istio.io/v1", "Sidecar", "{egress: [{hosts: ['./*']}, {hosts: ['./*']}]}"),
    ("networking.istio.io/v1", "Sidecar", "{outboundTrafficPolicy: {mode: DENY}}"),
    ("security.istio.io/v1", "AuthorizationPolicy", "{action: REFUSE}"),
    ("security.istio.io/v1", "AuthorizationPolicy", "{action: DENY}"),
    (
        "security.istio.io/v1",
        "AuthorizationPolicy",
        "{rules: [{from: [{source: {ipBlocks: [10.0.0.0/40]}}]}]}",
    ),
    ("security.istio.io/v1", "AuthorizationPolicy", "{rules: [{from: [{source: {}}]}]}"),
    ("security.istio.io/v1", "AuthorizationPolicy", "{rules: [{from: [{source: {principal: [a]}}]}]}"),
    ("security.istio.io/v1", "AuthorizationPolicy", "{rules: [{to: [{operation: {ports: ['http']}}]}]}"),
    ("security.istio.io/v1", "AuthorizationPolicy", "{rules: [{to: [{operation: {ports: [80]}}]}]}"),
    ("security.istio.io/v1", "AuthorizationPolicy", "{rules: [{to: []}]}"),
    ("security.istio.io/v1", "AuthorizationPolicy", "{rules: [{when: [{key: request.headers}]}]}"),
    ("security.istio.io/v1", "AuthorizationPolicy", "{selector: {matchLabels: {'': a}}}"),
    ("security.istio.io/v1", "PeerAuthentication", "{mtls: {mode: STRIKT}}"),
    ("security.istio.io/v1", "PeerAuthentication", "{portLevelMtls: {80: {mode: DISABLE}}}"),
    (
        "security.istio.io/v1",
        "PeerAuthentication",
        "{selector: {matchLabels: {a: b}}, portLevelMtls: {0: {mode: DISABLE}}}",
    ),
    (
        "security.istio.io/v1",
        "PeerAuthentication",
        "{selector: {matchLabels: {a: b}}, portLevelMtls: {http: {}}}",
    ),
    ("security.istio.io/v1", "RequestAuthentication", "{jwtRules: [{}]}"),
    ("security.istio.io/v1", "RequestAuthentication", "{jwtRules: [{issuer: a, jwksUri: 'a b'}]}"),
    ("security.istio.io/v1", "RequestAuthentication", "{jwtRules: [{issuer: a, jwks: '{'}]}"),
    (
        "security.istio.io/v1",
        "RequestAuthentication",
        "{jwtRules: [{issuer: a, fromHeaders: [{prefix: b}]}]}",
    ),
    ("telemetry.istio.io/v1", "Telemetry", "{tracing: [{randomSamplingPercentage: 101}]}"),
    ("telemetry.istio.io/v1", "Telemetry", "{metrics: [{overrides: [{match: {metric: NO_SUCH}}]}]}"),
    ("telemetry.istio.io/v1", "Telemetry", "{accessLogging: [{filter: {expression: 'response.code >='}}]}"),
];

/// Whole files.
const FILES: &[(&str, &str)] = &[
    ("a scalar", "hello\n"),
    ("a list", "- a\n"),
    ("no apiVersion", "kind: VirtualService\nmetadata: {name: a}\n"),
    ("no kind", "apiVersion: networking.istio.io/v1\nmetadata: {name: a}\n"),
    ("a numeric apiVersion", "apiVersion: 1\nkind: Service\n"),
    ("an unknown version", "apiVersion: networking.istio.io/v9\nkind: VirtualService\nmetadata: {name: a}\n"),
    ("an unknown kind", "apiVersion: networking.istio.io/v1\nkind: VirtualServices\nmetadata: {name: a}\n"),
    ("no metadata", "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nspec: {host: a}\n"),
    ("no name", "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {}\nspec: {host: a}\n"),
    (
        "a numeric name",
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: 5}\nspec: {host: a}\n",
    ),
    (
        "a numeric label",
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: a, labels: {v: 1}}\nspec: {host: a}\n",
    ),
    (
        "the same resource twice",
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: a}\nspec: {host: a}\n---\n\
         apiVersion: networking.istio.io/v1beta1\nkind: DestinationRule\nmetadata: {name: a}\nspec: {host: b}\n",
    ),
    (
        "a field beside spec",
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: a}\nspec: {host: a}\nsubsets: []\n",
    ),
    ("a list of items that is none", "apiVersion: v1\nkind: List\nitems: {}\n"),
    ("an item that is none", "apiVersion: v1\nkind: List\nitems: [5]\n"),
    ("a duplicate key", "apiVersion: v1\nkind: Service\nkind: Service\n"),
    ("a duplicate key far down", "a:\n- b: {c: 1,\n    c: 2}\n"),
    ("a tab", "apiVersion: v1\nmetadata:\n\tname: a\n"),
    ("wrong indentation", "a:\n  b: 1\n c: 2\n"),
    ("an open bracket", "a: [1, 2\n"),
    ("an open quote", "a: \"b\n"),
    ("an unknown anchor", "a: *b\n"),
    ("an anchor within itself", "a: &a [*a]\n"),
    ("a key that is a list", "? [a]\n: b\n"),
    ("a tag", "a: !python/object b\n"),
    ("a control character", "a: \u{1}\n"),
    ("a byte order mark", "\u{feff}a: b\n"),
    ("a broken document among others", "a: b\n---\na: [\n---\nc: d\n"),
];

#[test]
fn c2_bad_inputs_are_refused_with_place_path_and_reason() {
    let mut report = String::new();
    let mut count = 0;
    let mut case = |name: &str, text: &str| {
        let diags = refuse(name, text.as_bytes());
        writeln!(report, "# {name}").unwrap();
        for item in &diags {
            assert!(item.position.is_some(), "{name}: {item}");
            writeln!(report, "{item}").unwrap();
        }
        count += 1;
    };
    for body in HTTP_ROUTES {
        let body = body.replace('$', ROUTE);
        let body = if body.contains(": ") { format!("{{{body}}}") } else { body };
        case(&body, &resource("VirtualService", &format!("{{hosts: [a], http: [{body}]}}")));
    }
    for spec in VIRTUAL_SERVICES {
        let spec = spec.replace('$', ROUTE);
        case(&spec, &resource("VirtualService", &spec));
    }
    for spec in DESTINATION_RULES {
        case(spec, &resource("DestinationRule", spec));
    }
    for (version, kind, spec) in OTHERS {
        case(&format!("{kind} {spec}"), &resource(kind, spec).replace("networking.istio.io/v1", version));
    }
    for (name, text) in FILES {
        case(name, text);
    }
    assert!(count >= 200, "{count} bad inputs");
    insta::with_settings!({omit_expression => true}, { insta::assert_snapshot!("bad_inputs", report) });
}

/// Files that would take much time or memory.
#[test]
fn c2_bombs_are_refused_at_once() {
    let mut aliases = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..=11 {
        let before = format!("*a{}", level - 1);
        writeln!(aliases, "a{level}: &a{level} [{}]", [before.as_str(); 9].join(", ")).unwrap();
    }
    let mut anchors = String::new();
    for level in 0..90 {
        write!(anchors, "&a{level} [").unwrap();
    }
    anchors.push_str(&"x, ".repeat(50_000));
    let resource = resource("VirtualService", "{hosts: [a], http: [");
    for (name, text, said) in [
        ("an alias bomb", aliases.into_bytes(), "aliases"),
        ("anchors around anchors", format!("{anchors}{}", "]".repeat(90)).into_bytes(), "anchors"),
        ("100,000 lists in lists", "[".repeat(100_000).into_bytes(), "not valid YAML"),
        ("100,000 mappings in mappings", "{a: ".repeat(100_000).into_bytes(), "not valid YAML"),
        ("100,000 block lists", "- ".repeat(100_000).into_bytes(), "not valid YAML"),
        (
            "deep within a resource",
            format!("{resource}{}", "[".repeat(100_000)).into_bytes(),
            "not valid YAML",
        ),
        ("a document of 50 MB", b"# nothing\n".repeat(5_000_000), "too large"),
        ("bytes that are not UTF-8", b"a: b\nc: \xf0\x28\x8c\x28\n".to_vec(), "not valid UTF-8"),
        ("UTF-16", b"\xff\xfea\0:\0 \0b\0".to_vec(), "not valid UTF-8"),
        ("zero bytes", vec![0; 1000], "not valid YAML"),
    ] {
        let diags = refuse(name, &text);
        let first = diags.iter().next().unwrap().to_string();
        assert!(first.contains(said), "{name}: {first}");
    }
}

#[test]
fn c2_every_error_of_every_document_is_said() {
    let bad = resource("DestinationRule", "{host: '', subsets: [{name: ''}, {name: 5}], exportTo: ['*', a]}");
    let text = format!("{bad}---\n{}---\na: [\n", bad.replace("name: it", "name: that"));
    let diags = refuse("many", text.as_bytes());
    assert!(diags.error_count() >= 3, "{diags}");
    assert!(
        diags.to_string().contains("default/it") && diags.to_string().contains("default/that"),
        "{diags}"
    );
}

fn resource(kind: &str, spec: &str) -> String {
    format!("apiVersion: networking.istio.io/v1\nkind: {kind}\nmetadata:\n  name: it\nspec: {spec}\n")
}

/// What this thread has computed so far. A machine that is busy with something else does not count.
fn computed() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Loads a file that must be refused, and soon.
fn refuse(name: &str, text: &[u8]) -> Diagnostics {
    let files = [SourceFile::new("bad.yaml", text)];
    let begin = computed();
    let (set, diags) = ResourceSet::load(&files, &LoadOptions::default());
    let took = computed() - begin;
    assert!(took < PATIENCE, "{name}: took {took:?}");
    assert!(
        diags.has_errors(),
        "{name} was accepted:\n{}",
        String::from_utf8_lossy(&text[..text.len().min(500)])
    );
    assert!(set.len() < 2, "{name}");
    let errors = diags.iter().filter(|item| item.severity == Severity::Error);
    assert!(
        errors.into_iter().all(|item| item.position.is_some() && !item.message.is_empty()),
        "{name}: {diags}"
    );
    diags
}
