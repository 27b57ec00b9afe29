//! VirtualService.

use super::{Fine, NETWORKING, Refused, Verdict, Warns, judge};

const TO: &str = "route: [{destination: {host: b}}]";

fn service(frame: &str, cases: &[(&str, Verdict)]) {
    judge(NETWORKING, "VirtualService", &frame.replace("TO", TO), cases);
}

/// Judges HTTP routes.
fn route(cases: &[(&str, Verdict)]) {
    service("{hosts: [a.b], http: [{$}]}", cases);
}

/// Judges HTTP routes that forward to one destination.
fn forward(cases: &[(&str, Verdict)]) {
    service("{hosts: [a.b], http: [{TO, $}]}", cases);
}

#[test]
fn vs_01_hosts_gateways_and_visibility() {
    service(
        "{http: [{TO}], $}",
        &[
            ("hosts: [a.b, '*.c.d', '*e.f', '*-g.h', i]", Fine),
            ("hosts: [a.ba!r]", Refused("hosts[0]")),
            ("hosts: [a.*]", Refused("hosts[0]")),
            ("hosts: ['*']", Refused("hosts[0]")),
            ("hosts: ['*'], gateways: [mesh, g]", Refused("hosts[0]")),
            ("hosts: ['*'], gateways: [g]", Fine),
            ("hosts: [10.0.0.1], gateways: [g]", Fine),
            ("hosts: ['*.a.b', '*.b']", Refused("hosts[1]")),
            ("hosts: ['*.b', a.b]", Refused("hosts[1]")),
            ("hosts: [a.b, A.B]", Refused("hosts[1]")),
            ("hosts: [a.b], gateways: [ns/g]", Fine),
            ("hosts: [a.b], gateways: [g.example.com]", Warns("gateways[0]")),
            ("hosts: [a.b], gateways: [b@d]", Refused("gateways[0]")),
            ("hosts: [a.b], gateways: [ns/*]", Refused("gateways[0]")),
            ("hosts: [a.b], gateways: ['*/g']", Refused("gateways[0]")),
            ("hosts: [a.b], gateways: [/g]", Refused("gateways[0]")),
            ("hosts: [a.b], exportTo: [., other]", Fine),
            ("hosts: [a.b], exportTo: ['~']", Refused("exportTo")),
            ("hosts: [a.b], exportTo: [., '*']", Refused("exportTo")),
        ],
    );
    service("$", &[("{hosts: [a.b]}", Refused("")), ("{hosts: [a.b], http: []}", Refused(""))]);
}

#[test]
fn vs_g01_delegates() {
    service(
        "$",
        &[
            ("{hosts: [a.b], http: [{delegate: {name: a, namespace: b}}]}", Fine),
            ("{hosts: [a.b], gateways: [g], http: [{delegate: {name: a}}]}", Fine),
            ("{http: [{route: [{destination: {host: b}}]}]}", Fine),
            ("{http: [{match: [{sourceNamespace: c}], route: [{destination: {host: b}}]}]}", Fine),
            ("{http: [{}]}", Refused("http[0]")),
            ("{http: [{delegate: {name: a}}]}", Refused("http[0].delegate")),
            ("{gateways: [g], http: [{route: [{destination: {host: b}}]}]}", Refused("gateways")),
            ("{tcp: [{route: [{destination: {host: b}}]}]}", Refused("tcp")),
            ("{tls: [{match: [{sniHosts: [a.b]}], route: [{destination: {host: b}}]}]}", Refused("tls")),
            (
                "{hosts: [a.b], http: [{delegate: {name: a}, route: [{destination: {host: b}}]}]}",
                Refused("http[0].route"),
            ),
            (
                "{hosts: [a.b], http: [{delegate: {name: a}, redirect: {uri: /c}}]}",
                Refused("http[0].redirect"),
            ),
            (
                "{hosts: [a.b], http: [{delegate: {name: a}, match: [{uri: {regex: c}, headers: {d: {regex: e}}, \
               queryParams: {f: {regex: g}}, withoutHeaders: {h: {regex: i}}}]}]}",
                Fine,
            ),
        ],
    );
}

#[test]
fn vs_r01_one_action() {
    route(&[
        ("", Refused("http[0]")),
        ("route: [{destination: {host: b}}]", Fine),
        ("redirect: {uri: /a}", Fine),
        ("directResponse: {status: 200}", Fine),
        ("redirect: {uri: /a}, route: [{destination: {host: b}}]", Refused("http[0].route")),
        ("redirect: {uri: /a}, rewrite: {uri: /b}", Refused("http[0].rewrite")),
        ("redirect: {uri: /a}, directResponse: {status: 200}", Refused("http[0].directResponse")),
        ("redirect: {uri: /a}, fault: {abort: {httpStatus: 500}}", Refused("http[0].fault")),
        ("directResponse: {status: 200}, route: [{destination: {host: b}}]", Refused("http[0].route")),
        ("directResponse: {status: 200}, rewrite: {uri: /b}", Refused("http[0].rewrite")),
        ("directResponse: {status: 200}, fault: {abort: {httpStatus: 500}}", Refused("http[0].fault")),
    ]);
}

#[test]
fn vs_r02_destinations() {
    route(&[
        ("route: [{}]", Refused("route[0].destination")),
        ("route: [{destination: {}}]", Refused("destination.host")),
        ("route: [{destination: {host: '*'}}]", Refused("destination.host")),
        ("route: [{destination: {host: a.*}}]", Refused("destination.host")),
        ("route: [{destination: {host: ns/a}}]", Refused("destination.host")),
        ("route: [{destination: {host: '*.a'}}]", Fine),
        ("route: [{destination: {host: '*-a.b'}}]", Fine),
        ("route: [{destination: {host: a, subset: v1, port: {number: 80}}}]", Fine),
        ("route: [{destination: {host: a, subset: v_1}}]", Refused("destination.subset")),
        ("route: [{destination: {host: a, port: {}}}]", Refused("port.number")),
        ("route: [{destination: {host: a}, weight: 25}, {destination: {host: b}, weight: 80}]", Fine),
        ("route: [{destination: {host: a}, weight: 0}]", Fine),
        ("route: [{destination: {host: a}, weight: 100}, {destination: {host: b}}]", Fine),
        ("route: [{destination: {host: a}}, {destination: {host: b}}]", Refused("http[0].route")),
        (
            "route: [{destination: {host: a}, weight: 5}, {destination: {host: b}, weight: -1}]",
            Refused("route[1].weight"),
        ),
    ]);
}

#[test]
fn vs_m01_matches() {
    service(
        "{hosts: [a.b], http: [{TO, match: [{$}]}]}",
        &[
            (
                "uri: {prefix: /a}, scheme: {exact: https}, method: {regex: 'GET|POST'}, authority: {prefix: a}",
                Fine,
            ),
            ("uri: {prefix: ''}", Fine),
            ("uri: {regex: ''}", Refused("uri.regex")),
            ("uri: {regex: '('}", Refused("uri.regex")),
            ("uri: {regex: 'a(?=b)'}", Refused("uri.regex")),
            ("uri: {exact: a, prefix: b}", Refused("uri")),
            ("method: {prefix: ''}", Refused("method.prefix")),
            ("method: {regex: ''}", Refused("method.regex")),
            ("scheme: {prefix: ''}", Refused("scheme.prefix")),
            ("scheme: {regex: ''}", Refused("scheme.regex")),
            ("authority: {prefix: ''}", Refused("authority.prefix")),
            ("authority: {regex: '['}", Refused("authority.regex")),
            ("queryParams: {a: {exact: b}, c: {prefix: d}, e: {regex: f}, g: {}}", Fine),
            ("queryParams: {a: {prefix: ''}}", Refused("queryParams.a.prefix")),
            ("queryParams: {a: {regex: ''}}", Refused("queryParams.a.regex")),
            ("port: 80", Fine),
            ("port: 65536", Refused("port")),
            ("sourceLabels: {a: b}", Fine),
            ("sourceLabels: {'.': b}", Refused("[\".\"]")),
            ("gateways: [ns/g]", Fine),
            ("gateways: ['a b']", Refused("gateways[0]")),
            ("sourceNamespace: a", Fine),
            ("sourceNamespace: a_b", Refused("sourceNamespace")),
            (
                "headers: {x-a: {exact: b}, x-c: {}, ':path': {prefix: /}, ':method': {exact: GET}, ':status': {exact: '1'}}",
                Fine,
            ),
            ("headers: {'x.a!$#_~`|': {exact: b}}", Fine),
            ("headers: {'': {exact: b}}", Refused("headers[\"\"]")),
            ("headers: {'::': {exact: b}}", Refused("headers[\"::\"]")),
            ("headers: {'a b': {exact: b}}", Refused("headers[\"a b\"]")),
            ("headers: {'a\"b': {exact: b}}", Refused("]")),
            ("headers: {x-a: ~}", Refused("headers.x-a")),
            ("headers: {x-a: {prefix: ''}}", Refused("headers.x-a.prefix")),
            ("headers: {x-a: {regex: ''}}", Refused("headers.x-a.regex")),
            ("headers: {x-a: {regex: '('}}", Refused("headers.x-a.regex")),
            ("headers: {'@request.auth.claims.sub': {exact: b}}", Refused("]")),
            ("withoutHeaders: {x-a: {exact: b}, x-c: {}, x-d: {regex: '*'}}", Fine),
            ("withoutHeaders: {x-a: {prefix: ''}}", Refused("withoutHeaders.x-a.prefix")),
            ("withoutHeaders: {x-a: {regex: '('}}", Refused("withoutHeaders.x-a.regex")),
            ("withoutHeaders: {'a b': {exact: b}}", Refused("withoutHeaders[\"a b\"]")),
            ("withoutHeaders: {'@request.auth.claims[a]': {exact: b}}", Refused("]")),
        ],
    );
    service(
        "{hosts: [a.b], gateways: [g], http: [{TO, match: [{$}]}]}",
        &[
            ("headers: {'@request.auth.claims.sub': {exact: b}}", Fine),
            ("withoutHeaders: {'@request.auth.claims[a][b]': {exact: b}}", Fine),
        ],
    );
}

#[test]
fn vs_h01_header_operations() {
    forward(&[
        (
            "headers: {request: {set: {a: '100%%'}, add: {b: '%HOSTNAME%'}, remove: [c]}, response: {set: {d: ''}}}",
            Fine,
        ),
        ("headers: {request: {set: {':authority': c}}}", Fine),
        ("headers: {request: {add: {Host: c}}}", Fine),
        ("headers: {request: {set: {':path': c}}}", Refused("set[\":path\"]")),
        ("headers: {request: {add: {'': c}}}", Refused("add[\"\"]")),
        ("headers: {request: {remove: [Host]}}", Refused("remove[0]")),
        ("headers: {request: {remove: [':authority']}}", Refused("remove[0]")),
        ("headers: {response: {set: {host: c}}}", Refused("set.host")),
        ("headers: {response: {add: {':status': c}}}", Refused("add[\":status\"]")),
        ("headers: {response: {remove: ['']}}", Refused("remove[0]")),
        ("headers: {request: {set: {a: '50% off'}}}", Refused("set.a")),
        ("headers: {request: {set: {a: '%START_TIME%%'}}}", Refused("set.a")),
        ("headers: {request: {set: {a: '%DYNAMIC_METADATA(a.b)%'}}}", Fine),
        ("headers: {request: {set: {a: \"b\\nc\"}}}", Refused("set.a")),
        ("headers: {response: {add: {a: \"b\\x7fc\"}}}", Refused("add.a")),
        ("headers: {response: {add: {a: \"b\\tc\"}}}", Fine),
        (
            "headers: {request: {set: {':authority': c}}}, rewrite: {authority: d}",
            Refused("set[\":authority\"]"),
        ),
        ("headers: {request: {set: {host: c}, add: {':authority': d}}}", Refused("add[\":authority\"]")),
    ]);
    route(&[
        ("route: [{destination: {host: b}, headers: {request: {set: {':authority': c}}}}]", Fine),
        ("route: [{destination: {host: b}, headers: {request: {add: {'': c}}}}]", Refused("add[\"\"]")),
        ("route: [{destination: {host: b}, headers: {response: {set: {a: 'x%y'}}}}]", Refused("set.a")),
        ("route: [{destination: {host: b}, headers: {response: {remove: ['']}}}]", Refused("remove[0]")),
    ]);
}

#[test]
fn vs_c01_cors() {
    forward(&[
        (
            "corsPolicy: {allowOrigins: [{exact: a}, {prefix: b}, {regex: c}], allowMethods: [GET, '*'], \
          allowHeaders: [x.a, '*'], exposeHeaders: [b], maxAge: 2s}",
            Fine,
        ),
        ("corsPolicy: {allowOrigins: [{}]}", Refused("allowOrigins[0]")),
        ("corsPolicy: {allowOrigins: [{exact: ''}]}", Refused("allowOrigins[0]")),
        ("corsPolicy: {allowOrigins: [{regex: '('}]}", Refused("allowOrigins[0].regex")),
        ("corsPolicy: {allowMethods: [PUTT]}", Refused("allowMethods[0]")),
        ("corsPolicy: {allowHeaders: ['']}", Refused("allowHeaders[0]")),
        ("corsPolicy: {exposeHeaders: ['a b']}", Refused("exposeHeaders[0]")),
        ("corsPolicy: {maxAge: 2.5s}", Refused("maxAge")),
        ("corsPolicy: {maxAge: 0s}", Refused("maxAge")),
    ]);
}

#[test]
fn vs_f01_faults() {
    forward(&[
        ("fault: {}", Refused("fault")),
        ("fault: {abort: {httpStatus: 503, percentage: {value: 0.001}}}", Fine),
        ("fault: {abort: {httpStatus: 200}}", Fine),
        ("fault: {abort: {grpcStatus: DEADLINE_EXCEEDED, percentage: {value: 100}}}", Fine),
        ("fault: {abort: {}}", Warns("fault.abort")),
        ("fault: {abort: {httpStatus: 199}}", Refused("abort.httpStatus")),
        ("fault: {abort: {httpStatus: 600}}", Refused("abort.httpStatus")),
        ("fault: {abort: {grpcStatus: '14'}}", Refused("abort.grpcStatus")),
        ("fault: {abort: {http2Error: a}}", Refused("abort.http2Error")),
        ("fault: {abort: {httpStatus: 503, percentage: {value: -10}}}", Refused("percentage.value")),
        ("fault: {abort: {httpStatus: 503, percentage: {value: 0.00005}}}", Refused("percentage.value")),
        ("fault: {delay: {fixedDelay: 3s, percentage: {value: 20}}}", Fine),
        ("fault: {delay: {fixedDelay: 3s}}", Fine),
        ("fault: {delay: {fixedDelay: 3.00000004s}}", Refused("delay.fixedDelay")),
        ("fault: {delay: {exponentialDelay: 3s}}", Refused("delay.exponentialDelay")),
        ("fault: {delay: {fixedDelay: 3s, percentage: {value: 101}}}", Refused("percentage.value")),
    ]);
}

#[test]
fn vs_y01_retries_and_timeouts() {
    forward(&[
        ("timeout: 5s", Fine),
        ("timeout: 0s", Refused("timeout")),
        ("timeout: 0.0005s", Refused("timeout")),
        (
            "retries: {attempts: 3, perTryTimeout: 2s, retryOn: 'gateway-error,503,cancelled', backoff: 10ms}",
            Fine,
        ),
        ("retries: {attempts: 0}", Fine),
        ("retries: {attempts: -1}", Refused("retries.attempts")),
        ("retries: {attempts: 0, perTryTimeout: 2s}", Refused("retries.attempts")),
        ("retries: {retryOn: 5xx}", Refused("retries.attempts")),
        ("retries: {attempts: 0, retryRemoteLocalities: false}", Refused("retries.attempts")),
        ("retries: {attempts: 0, backoff: 10ms}", Warns("retries.attempts")),
        ("retries: {attempts: 0, retryIgnorePreviousHosts: true}", Warns("retries.attempts")),
        ("retries: {attempts: 3, perTryTimeout: 2.000000001s}", Refused("retries.perTryTimeout")),
        ("retries: {attempts: 3, perTryTimeout: 0.000000999s}", Refused("retries.perTryTimeout")),
        ("retries: {attempts: 3, backoff: 0.000000999s}", Refused("retries.backoff")),
        ("retries: {attempts: 3, retryOn: '5xx,other'}", Refused("retries.retryOn")),
        ("retries: {attempts: 3, retryOn: '600'}", Refused("retries.retryOn")),
        ("retries: {attempts: 3, retryOn: '5xx, reset'}", Refused("retries.retryOn")),
        (
            "retries: {attempts: 3, retryOn: 'reset-before-request,retriable-headers,envoy-ratelimited,http3-post-connect-failure'}",
            Fine,
        ),
    ]);
}

#[test]
fn vs_w01_rewrites() {
    service(
        "{hosts: [a.b], http: [{TO, match: [{uri: {prefix: /a}}], rewrite: {$}}]}",
        &[
            ("uri: /b, authority: c", Fine),
            ("authority: c", Fine),
            ("uriRegexRewrite: {match: '^/a/([^/]+)(/.*)$', rewrite: '\\2/b/\\1'}", Fine),
            ("uriRegexRewrite: {match: '^/a', rewrite: /b}, authority: c", Fine),
            ("", Refused("rewrite")),
            ("uri: /b, uriRegexRewrite: {match: a, rewrite: b}", Refused("uriRegexRewrite")),
            ("uriRegexRewrite: {rewrite: b}", Refused("uriRegexRewrite.match")),
            ("uriRegexRewrite: {match: a}", Refused("uriRegexRewrite.rewrite")),
            ("uriRegexRewrite: {match: '[', rewrite: b}", Refused("uriRegexRewrite.match")),
        ],
    );
}

#[test]
fn vs_d01_answers() {
    let large = format!("directResponse: {{status: 200, body: {{string: '{}'}}}}", "a".repeat(101 * 1024));
    let huge = format!("directResponse: {{status: 200, body: {{string: '{}'}}}}", "a".repeat(2 << 20));
    // 4 letters of base64 are 3 bytes.
    let large_bytes =
        format!("directResponse: {{status: 200, body: {{bytes: '{}'}}}}", "YWFh".repeat(34_134));
    route(&[
        ("redirect: {}", Refused("redirect")),
        ("redirect: {authority: a}", Fine),
        ("redirect: {uri: /a, authority: b, redirectCode: 308}", Fine),
        ("redirect: {scheme: https}", Fine),
        ("redirect: {port: 8080}", Fine),
        ("redirect: {derivePort: FROM_REQUEST_PORT, authority: a}", Fine),
        ("redirect: {scheme: ftp}", Refused("redirect.scheme")),
        ("redirect: {port: 65536}", Refused("redirect.port")),
        ("redirect: {uri: /a, redirectCode: 299}", Refused("redirect.redirectCode")),
        ("redirect: {uri: /a, redirectCode: 400}", Refused("redirect.redirectCode")),
        ("redirect: {prefixRewrite: /a}", Fine),
        ("redirect: {uri: /a, prefixRewrite: /b}", Refused("redirect.prefixRewrite")),
        ("match: [{uri: {prefix: /a}}], redirect: {prefixRewrite: /b}", Fine),
        ("match: [{uri: {exact: /a}}], redirect: {prefixRewrite: /b}", Refused("redirect.prefixRewrite")),
        ("match: [{uri: {regex: /a}}], redirect: {prefixRewrite: /b}", Refused("redirect.prefixRewrite")),
        ("directResponse: {}", Refused("directResponse.status")),
        ("directResponse: {status: 199}", Refused("directResponse.status")),
        ("directResponse: {status: 600}", Refused("directResponse.status")),
        ("directResponse: {status: 200, body: {string: hello}}", Fine),
        ("directResponse: {status: 200, body: {bytes: aGVsbG8=}}", Fine),
        ("directResponse: {status: 200, body: {bytes: '%'}}", Refused("body.bytes")),
        ("directResponse: {status: 200, body: {string: a, bytes: aGVsbG8=}}", Refused("directResponse.body")),
        (&large, Warns("directResponse.body")),
        (&large_bytes, Warns("directResponse.body")),
        (&huge, Refused("directResponse.body")),
    ]);
}

#[test]
fn vs_i01_mirrors() {
    forward(&[
        ("mirror: {host: c}, mirrorPercentage: {value: 1}", Fine),
        ("mirror: {host: c}, mirrorPercent: 5", Warns("mirrorPercent")),
        ("mirror: {host: c}, mirrorPercent: 101", Refused("mirrorPercent")),
        ("mirror: {host: '*'}", Refused("mirror.host")),
        ("mirrorPercentage: {value: 101}", Refused("mirrorPercentage.value")),
        ("mirrorPercentage: {value: -1}", Refused("mirrorPercentage.value")),
        ("mirrors: [{destination: {host: c}, percentage: {value: 1}}, {destination: {host: d}}]", Fine),
        ("mirrors: [{}]", Refused("mirrors[0].destination")),
        ("mirrors: [{destination: {host: c}, percentage: {value: 101}}]", Refused("percentage.value")),
        ("mirrors: [{destination: {host: c}, percentage: {value: -1}}]", Refused("percentage.value")),
        ("mirror: {host: c}, mirrors: [{destination: {host: d}}]", Refused("mirrors")),
    ]);
}

#[test]
fn vs_01_what_is_never_reached() {
    service(
        "{hosts: [a.b], http: [$]}",
        &[
            ("{route: [{destination: {host: b}}]}, {route: [{destination: {host: c}}]}", Warns("http[1]")),
            (
                "{route: [{destination: {host: b}}]}, {match: [{uri: {prefix: /a}}], route: [{destination: {host: c}}]}",
                Warns("http[1]"),
            ),
            (
                "{match: [{uri: {prefix: /a}}], route: [{destination: {host: b}}]}, {route: [{destination: {host: c}}]}",
                Fine,
            ),
            (
                "{match: [{uri: {exact: /a}}], route: [{destination: {host: b}}]}, \
              {match: [{name: n, uri: {exact: /a}}], route: [{destination: {host: c}}]}",
                Warns("http[1]"),
            ),
            (
                "{match: [{uri: {exact: /a}}], route: [{destination: {host: b}}]}, \
              {match: [{uri: {exact: /a}}, {uri: {exact: /c}}], route: [{destination: {host: c}}]}",
                Warns("http[1].match[0]"),
            ),
        ],
    );
    service(
        "{hosts: [a.b], http: [{TO, match: [$]}]}",
        &[
            ("{uri: {prefix: /a}}, {uri: {prefix: /ab}, method: {exact: GET}}", Warns("match[1]")),
            ("{uri: {prefix: /a}, method: {exact: POST}}, {uri: {prefix: /ab}, method: {exact: GET}}", Fine),
            (
                "{uri: {prefix: /a}, headers: {x: {exact: b}}}, {uri: {prefix: /ab}, headers: {x: {exact: b}}}",
                Warns("match[1]"),
            ),
            (
                "{uri: {prefix: /a}, headers: {x: {exact: b}}}, {uri: {prefix: /ab}, headers: {x: {exact: c}}}",
                Fine,
            ),
            ("{uri: {prefix: /a}, port: 80}, {uri: {prefix: /ab}}", Fine),
            ("{uri: {prefix: /}}, {uri: {exact: /}, method: {exact: GET}}", Fine),
        ],
    );
    service(
        "{hosts: [a.b], $}",
        &[
            (
                "tcp: [{route: [{destination: {host: b}}]}, {match: [{port: 80}], route: [{destination: {host: c}}]}]",
                Warns("tcp[1]"),
            ),
            (
                "tcp: [{match: [{port: 80}], route: [{destination: {host: b}}]}, {match: [{port: 80}], route: [{destination: {host: c}}]}]",
                Warns("tcp[1]"),
            ),
            (
                "tls: [{match: [{port: 443, sniHosts: [a.b]}], route: [{destination: {host: b}}]}, \
              {match: [{port: 443, sniHosts: [a.b]}], route: [{destination: {host: c}}]}]",
                Warns("tls[1]"),
            ),
        ],
    );
}

#[test]
fn vs_t01_tls_and_tcp() {
    service(
        "{hosts: [a.b, '*.c.d'], tls: [{$}]}",
        &[
            ("match: [{sniHosts: [a.b], port: 443}], route: [{destination: {host: b}}]", Fine),
            (
                "match: [{sniHosts: ['*.x.c.d'], destinationSubnets: [10.0.0.0/8, 10.0.0.1]}], route: [{destination: {host: b}}]",
                Fine,
            ),
            ("match: [{sniHosts: [1.1.1.1]}], route: [{destination: {host: b}}]", Warns("sniHosts[0]")),
            ("match: [{sniHosts: [other]}], route: [{destination: {host: b}}]", Refused("sniHosts[0]")),
            ("match: [{sniHosts: ['*.d']}], route: [{destination: {host: b}}]", Refused("sniHosts[0]")),
            ("match: [{sniHosts: [a.*.b]}], route: [{destination: {host: b}}]", Refused("sniHosts[0]")),
            ("match: [{}], route: [{destination: {host: b}}]", Refused("sniHosts")),
            ("match: [~], route: [{destination: {host: b}}]", Refused("match[0]")),
            ("route: [{destination: {host: b}}]", Refused("tls[0].match")),
            ("match: [{sniHosts: [a.b]}]", Refused("tls[0].route")),
            ("match: [{sniHosts: [a.b], port: 65536}], route: [{destination: {host: b}}]", Refused("port")),
            (
                "match: [{sniHosts: [a.b], destinationSubnets: [10.0.0.0/33]}], route: [{destination: {host: b}}]",
                Refused("destinationSubnets[0]"),
            ),
            (
                "match: [{sniHosts: [a.b], gateways: [a_b]}], route: [{destination: {host: b}}]",
                Refused("gateways[0]"),
            ),
        ],
    );
    service(
        "{hosts: [a.b], tcp: [{$}]}",
        &[
            ("route: [{destination: {host: b}}]", Fine),
            (
                "match: [{port: 80, sourceLabels: {a: b}, destinationSubnets: ['2001:db8::/32']}], route: [{destination: {host: b}}]",
                Fine,
            ),
            ("match: [{port: 999}]", Refused("tcp[0].route")),
            ("match: [{port: 65536}], route: [{destination: {host: b}}]", Refused("port")),
            (
                "match: [{destinationSubnets: [a]}], route: [{destination: {host: b}}]",
                Refused("destinationSubnets[0]"),
            ),
            ("match: [{sourceLabels: {'.': b}}], route: [{destination: {host: b}}]", Refused("[\".\"]")),
            ("route: [{}]", Refused("route[0].destination")),
            ("route: [{destination: {host: b}}, {destination: {host: c}}]", Refused("tcp[0].route")),
            (
                "route: [{destination: {host: b}, weight: 1}, {destination: {host: c}, weight: -1}]",
                Refused("route[1].weight"),
            ),
        ],
    );
}

#[test]
fn vs_t02_names_that_istiod_makes_for_gateways_between_networks() {
    service(
        "{hosts: [$], gateways: [g], tls: [{match: [{sniHosts: [$]}], route: [{destination: {host: b}}]}]}",
        &[
            ("outbound_.80_._.a.b", Fine),
            ("outbound_.80_.v1_.a.b", Fine),
            ("outbound.b", Fine),
            ("inbound_.80_._.a.b", Refused("hosts[0]")),
            ("outbound_.port_._.a.b", Refused("hosts[0]")),
            ("outbound_.80_._", Refused("hosts[0]")),
            ("outbound_.80_._.1", Refused("hosts[0]")),
        ],
    );
    service(
        "{hosts: [$], tls: [{match: [{sniHosts: [$]}], route: [{destination: {host: b}}]}]}",
        &[("outbound_.80_._.a.b", Refused("hosts[0]"))],
    );
}
