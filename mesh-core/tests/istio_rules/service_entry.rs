//! ServiceEntry.

use super::{Fine, NETWORKING, Refused, Verdict, Warns, judge};

fn entry(frame: &str, cases: &[(&str, Verdict)]) {
    judge(NETWORKING, "ServiceEntry", frame, cases);
}

#[test]
fn se_01_hosts_and_addresses() {
    entry(
        "{ports: [{number: 80, name: a, protocol: HTTP}], $}",
        &[
            ("hosts: [a.b], resolution: DNS", Fine),
            ("hosts: [a, b.c], resolution: DNS", Fine),
            ("hosts: ['*.a.b']", Fine),
            ("hosts: ['*a.b']", Warns("hosts[0]")),
            ("hosts: []", Refused("hosts")),
            ("resolution: DNS", Refused("hosts")),
            ("hosts: ['-']", Refused("hosts[0]")),
            ("hosts: [a.b, '*']", Refused("hosts[1]")),
            ("hosts: ['a*']", Refused("hosts[0]")),
            ("hosts: [a.b], addresses: [10.0.0.1, 10.1.0.0/16, '2001:db8::']", Fine),
            ("hosts: [a.b], addresses: [10.1.0.0/16], resolution: STATIC", Fine),
            ("hosts: [a.b], addresses: [10.1.0.0/16], resolution: DNS", Refused("addresses[0]")),
            ("hosts: [a.b], addresses: [10.0.0.1/99]", Refused("addresses[0]")),
            ("hosts: [a.b], addresses: [a]", Refused("addresses[0]")),
            ("hosts: [a.b], workloadSelector: {labels: {a: b}}, resolution: STATIC", Fine),
            ("hosts: [a.b], workloadSelector: {labels: {a: b}}, resolution: DNS", Fine),
            ("hosts: [a.b], workloadSelector: {labels: {a: b}}", Warns("workloadSelector")),
            ("hosts: [a.b], workloadSelector: {}, resolution: STATIC", Warns("workloadSelector.labels")),
            ("hosts: [a.b], workloadSelector: {labels: {'': b}}", Refused("[\"\"]")),
            ("hosts: [a.b], workloadSelector: {labels: {a: '*'}}", Refused("labels.a")),
            (
                "hosts: [a.b], workloadSelector: {labels: {a: b}}, endpoints: [{address: 1.2.3.4}], resolution: STATIC",
                Refused(""),
            ),
            ("hosts: [a.b], exportTo: ['~']", Fine),
            ("hosts: [a.b], exportTo: [., other]", Fine),
            ("hosts: [a.b], exportTo: ['~', other]", Refused("exportTo")),
            ("hosts: [a.b], exportTo: ['~', '~']", Refused("exportTo[1]")),
            ("hosts: [a.b], exportTo: [., ns]", Refused("exportTo[1]")),
            ("hosts: [a.b], exportTo: [a_b]", Refused("exportTo[0]")),
            ("hosts: [a.b], resolution: MAYBE", Refused("resolution")),
        ],
    );
}

#[test]
fn se_02_ports() {
    entry(
        "{hosts: [a.b], resolution: DNS, ports: [$]}",
        &[
            ("{number: 80, name: a, protocol: HTTP, targetPort: 8080}", Fine),
            (
                "{number: 80, name: a, protocol: HTTP, targetPort: 80}, {number: 81, name: b, protocol: HTTP, targetPort: 80}",
                Fine,
            ),
            ("{number: 80, name: a}", Fine),
            ("{number: 80, name: a, protocol: kafka}", Refused("ports[0].protocol")),
            ("{number: 80, protocol: HTTP}", Refused("ports[0].name")),
            ("{number: 80, name: a_b, protocol: HTTP}", Refused("ports[0].name")),
            ("{name: a, protocol: HTTP}", Refused("ports[0].number")),
            ("{number: 65536, name: a, protocol: HTTP}", Refused("ports[0].number")),
            ("{number: 80, name: a, protocol: HTTP, targetPort: 65536}", Refused("ports[0].targetPort")),
            (
                "{number: 80, name: a, protocol: HTTP}, {number: 81, name: a, protocol: HTTP}",
                Refused("ports[1].name"),
            ),
            (
                "{number: 80, name: a, protocol: HTTP}, {number: 80, name: b, protocol: HTTP}",
                Refused("ports[1].number"),
            ),
        ],
    );
    entry(
        "{hosts: [a.b], $}",
        &[
            ("ports: [{number: 80, name: a, protocol: TCP}]", Warns("ports[0].protocol")),
            ("ports: [{number: 80, name: a}]", Warns("ports[0].protocol")),
            ("ports: [{number: 80, name: a}], addresses: [10.0.0.0/8]", Fine),
            ("ports: [{number: 80, name: a, protocol: HTTP}]", Fine),
        ],
    );
}

#[test]
fn se_03_several_hosts_need_a_protocol_that_names_them() {
    entry(
        "{hosts: [a.b, c.d], $}",
        &[
            (
                "resolution: DNS, ports: [{number: 80, name: a, protocol: HTTP}, {number: 443, name: b, protocol: TLS}]",
                Fine,
            ),
            ("resolution: DNS, ports: [{number: 80, name: a, protocol: TCP}]", Refused("ports[0].protocol")),
            (
                "resolution: STATIC, ports: [{number: 80, name: a, protocol: MONGO}]",
                Refused("ports[0].protocol"),
            ),
            ("addresses: [10.0.0.1], ports: [{number: 80, name: a, protocol: TCP}]", Fine),
            (
                "resolution: DNS, addresses: [10.0.0.1], ports: [{number: 443, name: b, protocol: HTTPS}]",
                Warns("ports[0]"),
            ),
            ("resolution: DNS, addresses: [10.0.0.1], ports: [{number: 80, name: a, protocol: HTTP}]", Fine),
        ],
    );
}

#[test]
fn se_04_endpoints_by_resolution() {
    entry(
        "{hosts: [a.b], ports: [{number: 80, name: http, protocol: HTTP}], $}",
        &[
            ("resolution: NONE, endpoints: [{address: 1.2.3.4}]", Refused("endpoints")),
            ("resolution: STATIC", Fine),
            (
                "resolution: STATIC, endpoints: [{address: 1.2.3.4, ports: {http: 8080}, labels: {a: b}}]",
                Fine,
            ),
            ("resolution: STATIC, endpoints: [{address: a.b}]", Refused("endpoints[0].address")),
            (
                "resolution: STATIC, endpoints: [{address: 1.2.3.4, ports: {other: 8080}}]",
                Refused("ports.other"),
            ),
            (
                "resolution: STATIC, endpoints: [{address: 1.2.3.4, ports: {http: 65536}}]",
                Refused("ports.http"),
            ),
            ("resolution: STATIC, endpoints: [{network: n}]", Warns("endpoints[0].address")),
            ("resolution: STATIC, endpoints: [{}]", Refused("endpoints[0].address")),
            ("resolution: STATIC, endpoints: [{address: 'unix:///a'}]", Fine),
            ("resolution: STATIC, endpoints: [{address: 'unix://./a'}]", Refused("endpoints[0].address")),
            (
                "resolution: STATIC, endpoints: [{address: 'unix:///a', ports: {http: 80}}]",
                Refused("endpoints[0].ports"),
            ),
            ("resolution: DNS, endpoints: [{address: c.d, ports: {http: 80}}, {address: 1.2.3.4}]", Fine),
            ("resolution: DNS, endpoints: [{address: '*.c.d'}]", Refused("endpoints[0].address")),
            ("resolution: DNS, endpoints: [{address: 'unix:///a'}]", Refused("endpoints[0].address")),
            ("resolution: DNS, endpoints: [{address: c.d, ports: {other: 80}}]", Refused("ports.other")),
            ("resolution: DNS_ROUND_ROBIN, endpoints: []", Fine),
            ("resolution: DNS_ROUND_ROBIN, endpoints: [{address: c.d}]", Fine),
            (
                "resolution: DNS_ROUND_ROBIN, endpoints: [{address: c.d}, {address: e.f}]",
                Refused("endpoints"),
            ),
        ],
    );
    entry(
        "{hosts: ['*.a.b'], ports: [{number: 80, name: http, protocol: HTTP}], resolution: $}",
        &[
            ("DNS", Refused("hosts[0]")),
            ("DNS, endpoints: [{address: c.d}]", Fine),
            ("DNS_ROUND_ROBIN", Refused("hosts[0]")),
            ("DYNAMIC_DNS", Fine),
            ("DYNAMIC_DNS, endpoints: [{address: c.d}]", Refused("endpoints")),
            ("DYNAMIC_DNS, addresses: [10.0.0.1]", Refused("addresses")),
            ("DYNAMIC_DNS, workloadSelector: {labels: {a: b}}", Refused("workloadSelector")),
        ],
    );
    entry(
        "{hosts: [a.b], resolution: STATIC, endpoints: [{address: 'unix:///a'}], ports: [$]}",
        &[
            ("{number: 80, name: a, protocol: HTTP}", Fine),
            (
                "{number: 80, name: a, protocol: HTTP}, {number: 81, name: b, protocol: HTTP}",
                Refused("endpoints[0].address"),
            ),
        ],
    );
}

#[test]
fn se_01_how_many() {
    let list =
        |count: usize, item: &dyn Fn(usize) -> String| (0..count).map(item).collect::<Vec<_>>().join(", ");
    let host = |at: usize| format!("a{at}.b");
    let address = |at: usize| format!("10.0.{}.{}", at / 256, at % 256);
    let port = |at: usize| format!("{{number: {}, name: a{at}, protocol: HTTP}}", at + 1);
    let endpoint = |at: usize| format!("{{address: 10.0.{}.{}}}", at / 256, at % 256);
    for (field, most, item) in [
        ("hosts", 256, &host as &dyn Fn(usize) -> String),
        ("addresses", 256, &address),
        ("ports", 256, &port),
        ("endpoints", 4096, &endpoint),
    ] {
        for (count, verdict) in [(most, Fine), (most + 1, Refused(field))] {
            let of = |name: &str, one: &str| {
                if name == field { list(count, item) } else { one.to_owned() }
            };
            let spec = format!(
                "{{hosts: [{}], addresses: [{}], ports: [{}], endpoints: [{}], resolution: STATIC}}",
                of("hosts", "a.b"),
                of("addresses", "10.1.0.1"),
                of("ports", &port(0)),
                of("endpoints", "{address: 10.1.0.2}")
            );
            entry("$", &[(&spec, verdict)]);
        }
    }
}
