//! AuthorizationPolicy.

use super::{Fine, Refused, SECURITY, Verdict, Warns, judge, load};

fn policy(frame: &str, cases: &[(&str, Verdict)]) {
    judge(SECURITY, "AuthorizationPolicy", frame, cases);
}

#[test]
fn ap_01_actions() {
    policy(
        "$",
        &[
            ("{}", Fine),
            ("{action: ALLOW}", Fine),
            ("{action: ALLOW, rules: [{}]}", Fine),
            ("{action: AUDIT}", Fine),
            ("{action: DENY}", Refused("rules")),
            ("{action: DENY, rules: [{}]}", Fine),
            ("{action: CUSTOM}", Refused("rules")),
            ("{action: CUSTOM, provider: {name: a}, rules: [{}]}", Fine),
            ("{action: CUSTOM, provider: {name: ''}, rules: [{}]}", Refused("provider.name")),
            ("{action: CUSTOM, rules: [{}]}", Refused("provider.name")),
            ("{action: ALLOW, provider: {name: a}, rules: [{}]}", Refused("provider")),
            ("{action: MAYBE}", Refused("action")),
            ("{selector: {matchLabels: {'a*': b}}}", Refused("[\"a*\"]")),
            ("{selector: {matchLabels: {a: 'b-*'}}}", Refused("matchLabels.a")),
            ("{selector: {}}", Warns("matchLabels")),
        ],
    );
}

#[test]
fn ap_05_sources() {
    policy(
        "{rules: [{from: [$]}]}",
        &[
            ("{source: {principals: [a, 'b*', '*c', '*']}}", Fine),
            ("{source: {serviceAccounts: [a, ns/b]}}", Fine),
            ("{source: {ipBlocks: [10.0.0.1, 10.0.0.0/8, '2001:db8::/32']}}", Fine),
            ("{source: {trustDomains: [td]}}", Fine),
            ("", Refused("from")),
            ("{}", Refused("from[0].source")),
            ("{source: {}}", Refused("from[0].source")),
            ("{source: {serviceAccounts: [a], namespaces: [b]}}", Refused("from[0].source")),
            ("{source: {notServiceAccounts: [a], notPrincipals: [b]}}", Refused("from[0].source")),
            ("{source: {serviceAccounts: ['']}}", Refused("serviceAccounts[0]")),
            ("{source: {serviceAccounts: ['a*']}}", Refused("serviceAccounts[0]")),
            ("{source: {serviceAccounts: [a/b/c]}}", Refused("serviceAccounts[0]")),
            ("{source: {principals: ['']}}", Refused("principals[0]")),
            ("{source: {notPrincipals: ['']}}", Refused("notPrincipals[0]")),
            ("{source: {requestPrincipals: ['']}}", Refused("requestPrincipals[0]")),
            ("{source: {notRequestPrincipals: ['']}}", Refused("notRequestPrincipals[0]")),
            ("{source: {namespaces: ['']}}", Refused("namespaces[0]")),
            ("{source: {notNamespaces: ['']}}", Refused("notNamespaces[0]")),
            ("{source: {ipBlocks: ['']}}", Refused("ipBlocks[0]")),
            ("{source: {notIpBlocks: [a]}}", Refused("notIpBlocks[0]")),
            ("{source: {remoteIpBlocks: [10.0.0.0/33]}}", Refused("remoteIpBlocks[0]")),
            ("{source: {notRemoteIpBlocks: ['']}}", Refused("notRemoteIpBlocks[0]")),
        ],
    );
}

#[test]
fn ap_07_operations() {
    policy(
        "{rules: [{to: [$]}]}",
        &[
            (
                "{operation: {hosts: [a, '*.b', 'c.*', '*'], ports: ['80', '0'], methods: [GET], paths: [/a, '/b/*']}}",
                Fine,
            ),
            ("{operation: {paths: ['/a/{*}', '/{**}/b', '/{*}/{**}']}}", Fine),
            ("", Refused("to")),
            ("{}", Refused("to[0].operation")),
            ("{operation: {}}", Refused("to[0].operation")),
            ("{operation: {hosts: ['']}}", Refused("hosts[0]")),
            ("{operation: {notHosts: ['']}}", Refused("notHosts[0]")),
            ("{operation: {ports: ['']}}", Refused("ports[0]")),
            ("{operation: {ports: [http]}}", Refused("ports[0]")),
            ("{operation: {notPorts: ['65536']}}", Refused("notPorts[0]")),
            ("{operation: {methods: ['']}}", Refused("methods[0]")),
            ("{operation: {notMethods: ['']}}", Refused("notMethods[0]")),
            ("{operation: {paths: ['']}}", Refused("paths[0]")),
            ("{operation: {notPaths: ['']}}", Refused("notPaths[0]")),
            ("{operation: {paths: ['/{**}/{*}']}}", Refused("paths[0]")),
            ("{operation: {paths: ['/{*}/a*']}}", Refused("paths[0]")),
            ("{operation: {paths: ['/{a}/{*}']}}", Refused("paths[0]")),
            ("{operation: {notPaths: ['/a{**}']}}", Refused("notPaths[0]")),
        ],
    );
}

#[test]
fn ap_09_conditions() {
    policy(
        "{rules: [{when: [$]}]}",
        &[
            ("{key: 'request.headers[:authority]', values: [a]}", Fine),
            ("{key: source.ip, notValues: [10.0.0.0/8]}", Fine),
            ("{key: 'request.auth.claims[a][b]', values: ['*']}", Fine),
            ("{key: 'experimental.envoy.filters.a.b[c]', values: [d]}", Fine),
            ("{key: destination.port, values: ['80']}", Fine),
            ("{values: [a]}", Refused("when[0].key")),
            ("{key: source.principal}", Refused("when[0]")),
            ("{key: source.principal, values: ['']}", Refused("values[0]")),
            ("{key: source.ip, values: [a]}", Refused("values[0]")),
            ("{key: remote.ip, notValues: [a]}", Refused("notValues[0]")),
            ("{key: destination.port, values: ['65536']}", Refused("values[0]")),
            ("{key: request.headers, values: [a]}", Refused("when[0].key")),
            ("{key: 'destination.labels[a]', values: [b]}", Refused("when[0].key")),
            ("{key: destination.user, values: [b]}", Refused("when[0].key")),
            ("{key: destination.namespace, values: [b]}", Refused("when[0].key")),
            ("{key: other, values: [b]}", Refused("when[0].key")),
        ],
    );
}

#[test]
fn ap_13_what_an_external_authorizer_cannot_be_asked() {
    policy(
        "{action: CUSTOM, provider: {name: a}, rules: [$]}",
        &[
            ("{from: [{source: {ipBlocks: [10.0.0.1]}}], to: [{operation: {paths: [/a]}}]}", Fine),
            ("{from: [{source: {namespaces: [a]}}]}", Refused("namespaces")),
            ("{from: [{source: {notPrincipals: [a]}}]}", Refused("notPrincipals")),
            ("{from: [{source: {serviceAccounts: [a]}}]}", Refused("serviceAccounts")),
            ("{from: [{source: {requestPrincipals: [a]}}]}", Refused("requestPrincipals")),
            ("{when: [{key: source.namespace, values: [a]}]}", Refused("key")),
            ("{when: [{key: source.principal, values: [a]}]}", Refused("key")),
            ("{when: [{key: source.serviceAccount, values: [a]}]}", Refused("key")),
            ("{when: [{key: 'request.auth.claims[a]', values: [a]}]}", Refused("key")),
        ],
    );
}

#[test]
fn ap_10_denials_that_reach_every_tcp_port() {
    policy(
        "{action: DENY, rules: [$]}",
        &[
            ("{from: [{source: {requestPrincipals: [a]}}]}", Warns("rules[0]")),
            ("{from: [{source: {notRequestPrincipals: [a]}}]}", Warns("rules[0]")),
            ("{to: [{operation: {methods: [GET]}}]}", Warns("rules[0]")),
            ("{from: [{source: {principals: [a]}}], to: [{operation: {methods: [GET]}}]}", Warns("rules[0]")),
            (
                "{from: [{source: {principals: [a]}}], to: [{operation: {methods: [GET], ports: ['80']}}]}",
                Fine,
            ),
            ("{from: [{source: {principals: [a]}}]}", Fine),
            ("{to: [{operation: {notPorts: ['80']}}]}", Fine),
            ("{when: [{key: 'request.headers[a]', values: [b]}]}", Fine),
        ],
    );
}

#[test]
fn ap_14_dry_run() {
    for (value, spec, valid) in [
        ("true", "{}", true),
        ("F", "{action: DENY, rules: [{}]}", true),
        ("yes", "{}", false),
        ("true", "{action: AUDIT}", false),
        ("true", "{action: CUSTOM, provider: {name: a}, rules: [{}]}", false),
    ] {
        let diags = load(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{name: a, namespace: ns, annotations: {{istio.io/dry-run: '{value}'}}}}\nspec: {spec}\n"
        ));
        assert_eq!(!diags.has_errors(), valid, "{value} {spec}: {diags}");
    }
}
