//! WorkloadEntry and WorkloadGroup.

use super::{Fine, NETWORKING, Refused, Warns, judge};

const LONG: &str =
    "{address: 1.2.3.4, ports: {aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa: 80}}";

#[test]
fn we_01_entries() {
    judge(
        NETWORKING,
        "WorkloadEntry",
        "$",
        &[
            (
                "{address: 1.2.3.4, serviceAccount: a, network: n, labels: {a: b}, ports: {http: 80}, weight: 2, locality: a/b/c}",
                Fine,
            ),
            ("{address: a.b, ports: {http: 80}}", Fine),
            ("{address: 'unix:///a/b'}", Fine),
            ("{address: 'unix://@a'}", Fine),
            ("{network: n}", Warns("address")),
            ("{}", Refused("address")),
            ("{address: 'a.b:80'}", Refused("address")),
            ("{address: 'unix:///a/'}", Refused("address")),
            ("{address: 'unix://a'}", Refused("address")),
            ("{address: 'unix://@a', ports: {http: 80}}", Refused("ports")),
            ("{address: 1.2.3.4, ports: {http: 65536}}", Refused("ports.http")),
            ("{address: 1.2.3.4, ports: {http: 0}}", Refused("ports.http")),
            ("{address: 1.2.3.4, ports: {'@': 80}}", Refused("[\"@\"]")),
            (LONG, Refused("aa")),
            ("{address: 1.2.3.4, labels: {'.': b}}", Refused("[\".\"]")),
            ("{address: 1.2.3.4, labels: {a: '~'}}", Refused("labels.a")),
        ],
    );
}

#[test]
fn wg_01_groups() {
    judge(
        NETWORKING,
        "WorkloadGroup",
        "$",
        &[
            ("{template: {}}", Fine),
            (
                "{metadata: {labels: {a: b}, annotations: {c: d}}, template: {serviceAccount: a, ports: {http: 80}}}",
                Fine,
            ),
            ("{}", Refused("template")),
            ("{template: {}, metadata: {labels: {'.': '~'}}}", Refused("[\".\"]")),
            ("{template: {ports: {http: 65536}}}", Refused("ports.http")),
            ("{template: {address: 'unix://a'}}", Refused("template.address")),
            ("{template: {address: 'unix:///a', ports: {http: 80}}}", Refused("template.ports")),
            ("{template: {}, probe: {}}", Refused("probe")),
            ("{template: {}, probe: {tcpSocket: {port: 80}, exec: {command: [a]}}}", Refused("probe")),
            (
                "{template: {}, probe: {periodSeconds: 1, httpGet: {port: 80, scheme: HTTPS, httpHeaders: [{name: A-b, value: c}]}}}",
                Fine,
            ),
            ("{template: {}, probe: {httpGet: {}}}", Refused("httpGet.port")),
            ("{template: {}, probe: {httpGet: {port: 80, scheme: http}}}", Refused("httpGet.scheme")),
            (
                "{template: {}, probe: {httpGet: {port: 80, httpHeaders: [{name: '**'}]}}}",
                Refused("httpHeaders[0].name"),
            ),
            (
                "{template: {}, probe: {httpGet: {port: 80, httpHeaders: [{name: ''}]}}}",
                Refused("httpHeaders[0].name"),
            ),
            ("{template: {}, probe: {tcpSocket: {port: 65536}}}", Refused("tcpSocket.port")),
            ("{template: {}, probe: {tcpSocket: {}}}", Refused("tcpSocket.port")),
            ("{template: {}, probe: {grpc: {port: 80}}}", Fine),
            ("{template: {}, probe: {exec: {}}}", Refused("exec.command")),
            ("{template: {}, probe: {exec: {command: ['']}}}", Refused("exec.command[0]")),
            ("{template: {}, probe: {exec: {command: [a]}, timeoutSeconds: -1}}", Refused("timeoutSeconds")),
            (
                "{template: {}, probe: {exec: {command: [a]}, initialDelaySeconds: -1}}",
                Refused("initialDelaySeconds"),
            ),
            (
                "{template: {}, probe: {exec: {command: [a]}, successThreshold: -1}}",
                Refused("successThreshold"),
            ),
            (
                "{template: {}, probe: {exec: {command: [a]}, failureThreshold: -1}}",
                Refused("failureThreshold"),
            ),
        ],
    );
}

#[test]
fn we_01_how_long_and_how_many() {
    let text = |length: usize| "a".repeat(length);
    let many = |count: usize, value: &str| {
        let entries: Vec<_> = (0..count).map(|at| format!("a{at}: {value}")).collect();
        format!("{{{}}}", entries.join(", "))
    };
    let dotted = |length: usize| format!("{}.{}.{}.{}", text(60), text(60), text(60), text(length - 183));
    for (field, fits, exceeds) in [
        ("network", text(2048), text(2049)),
        ("locality", text(2048), text(2049)),
        ("serviceAccount", text(253), text(254)),
        ("ports", many(128, "80"), many(129, "80")),
        ("labels", many(256, "b"), many(257, "b")),
    ] {
        let entry = |value: &str, verdict| {
            let spec = format!("{{address: 1.2.3.4, {field}: {value}}}");
            judge(NETWORKING, "WorkloadEntry", "$", &[(&spec, verdict)]);
        };
        entry(&fits, Fine);
        entry(&exceeds, Refused(field));
    }
    let selector = |length: usize| format!("{{selector: {{matchLabels: {{a: {}}}}}}}", text(length));
    judge(
        "security.istio.io/v1",
        "PeerAuthentication",
        "$",
        &[(&selector(63), Fine), (&selector(64), Refused("selector.matchLabels.a"))],
    );
    let address = |length: usize| format!("{{address: {}}}", dotted(length));
    judge(NETWORKING, "WorkloadEntry", "$", &[(&address(240), Fine), (&address(257), Refused("address"))]);
}
