//! EnvoyFilter, WasmPlugin and TrafficExtension: accepted as data, so that a file with them can be judged.

use super::{Fine, NETWORKING, Refused, Verdict, Warns, judge};

const EXTENSIONS: &str = "extensions.istio.io/v1alpha1";
const DIGEST: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

#[test]
fn wa_01_wasm_plugins() {
    judge(
        EXTENSIONS,
        "WasmPlugin",
        "$",
        &[
            ("{}", Refused("url")),
            ("{url: ~}", Refused("url")),
            ("{url: ''}", Refused("url")),
            ("{url: 'oci://a/b'}", Fine),
            ("{url: 'http://a/b'}", Fine),
            ("{url: 'file:///a'}", Fine),
            ("{url: a/b}", Fine),
            ("{url: 'ftp://a/b'}", Refused("url")),
            ("{url: '#%a$#@'}", Refused("url")),
            ("{url: a, selector: {matchLabels: {a: b}}, targetRef: {kind: Service, name: a}}", Refused("")),
            ("{url: a, selector: {matchLabels: {a: 'b*'}}}", Refused("matchLabels.a")),
            ("{url: a, imagePullSecret: ''}", Refused("imagePullSecret")),
            ("{url: a, match: [{ports: [{number: 80}, {number: 81}]}]}", Fine),
            ("{url: a, match: [{ports: [{}]}]}", Refused("match[0].ports[0].number")),
            ("{url: a, match: [{ports: [{number: 65536}]}]}", Refused("match[0].ports[0].number")),
        ],
    );
}

#[test]
fn wa_02_modules_of_both_kinds() {
    let sound = format!("sha256: {DIGEST}");
    let upper = format!("sha256: {}", DIGEST.to_uppercase());
    let long_name = format!("pluginName: {}", "a".repeat(257));
    let long_variable = format!("vmConfig: {{env: [{{name: {}}}]}}", "a".repeat(257));
    let cases: [(&str, Verdict); 11] = [
        (&sound, Fine),
        (&upper, Refused("sha256")),
        ("sha256: abc", Refused("sha256")),
        ("pluginName: ''", Refused("pluginName")),
        (&long_name, Refused("pluginName")),
        ("vmConfig: {env: [{name: a, valueFrom: HOST}, {name: b, value: c}]}", Fine),
        ("vmConfig: {env: [{name: ''}]}", Refused("env[0].name")),
        ("vmConfig: {env: [{name: a}, {name: a}]}", Refused("env[1].name")),
        (&long_variable, Refused("env[0].name")),
        ("vmConfig: {env: [{name: a, valueFrom: HOST, value: b}]}", Refused("env[0].value")),
        ("failStrategy: NEVER", Refused("failStrategy")),
    ];
    judge(EXTENSIONS, "WasmPlugin", "{url: a, $}", &cases);
    judge(EXTENSIONS, "TrafficExtension", "{wasm: {url: a, $}}", &cases);
}

#[test]
fn wa_03_traffic_extensions() {
    let long = format!("{{lua: {{inlineCode: '{}'}}}}", "a".repeat(64 * 1024 + 1));
    judge(
        EXTENSIONS,
        "TrafficExtension",
        "$",
        &[
            ("{lua: {inlineCode: a}, phase: AUTHN, priority: 1}", Fine),
            ("{lua: {inlineCode: a}, selector: {matchLabels: {a: b}}}", Fine),
            ("{lua: {inlineCode: a}, targetRefs: [{kind: Service, name: a}]}", Fine),
            ("{}", Refused("")),
            ("{lua: {inlineCode: a}, wasm: {url: a}}", Refused("")),
            ("{lua: {inlineCode: ''}}", Refused("lua.inlineCode")),
            (&long, Refused("lua.inlineCode")),
            ("{wasm: {}}", Refused("wasm.url")),
            ("{lua: {inlineCode: a}, selector: {}, targetRefs: [{kind: Service, name: a}]}", Refused("")),
            (
                "{lua: {inlineCode: a}, match: [{mode: SERVER, ports: [{number: 0}]}]}",
                Refused("ports[0].number"),
            ),
        ],
    );
}

#[test]
fn ef_01_envoy_filters() {
    judge(
        NETWORKING.replace("/v1", "/v1alpha3").as_str(),
        "EnvoyFilter",
        "$",
        &[
            ("{}", Warns("")),
            ("{workloadSelector: {}}", Warns("workloadSelector.labels")),
            ("{workloadSelector: {labels: {a: 'b*'}}}", Refused("labels.a")),
            ("{workloadSelector: {labels: {a: b}}, targetRefs: [{kind: Service, name: a}]}", Refused("")),
        ],
    );
    judge(
        NETWORKING.replace("/v1", "/v1alpha3").as_str(),
        "EnvoyFilter",
        "{configPatches: [{$}]}",
        &[
            ("patch: {operation: REMOVE}", Refused("applyTo")),
            ("applyTo: LISTENER", Refused("patch")),
            ("applyTo: LISTENER, patch: {}", Refused("patch.operation")),
            ("applyTo: LISTENER, patch: {operation: ADD}", Refused("patch.value")),
            ("applyTo: CLUSTER, patch: {operation: ADD, value: {name: a}}", Warns("")),
            (
                "applyTo: LISTENER, patch: {operation: REMOVE}, match: {proxy: {proxyVersion: '1\\.2.*'}}",
                Warns(""),
            ),
            (
                "applyTo: LISTENER, patch: {operation: REMOVE}, match: {proxy: {proxyVersion: 'a++b'}}",
                Refused("proxyVersion"),
            ),
            ("applyTo: LISTENER, patch: {operation: REMOVE}, match: {cluster: {}}", Refused("match")),
            ("applyTo: VIRTUAL_HOST, patch: {operation: REMOVE}, match: {cluster: {}}", Refused("match")),
            ("applyTo: CLUSTER, patch: {operation: REMOVE}, match: {listener: {}}", Refused("match")),
            ("applyTo: CLUSTER, patch: {operation: REMOVE}, match: {cluster: {}}", Warns("")),
            (
                "applyTo: FILTER_CHAIN, patch: {operation: REMOVE}, match: {listener: {filterChain: {filter: {name: a}}}}",
                Warns("filter"),
            ),
            (
                "applyTo: NETWORK_FILTER, patch: {operation: REMOVE}, match: {listener: {filterChain: {filter: {}}}}",
                Refused("filter.name"),
            ),
            (
                "applyTo: NETWORK_FILTER, patch: {operation: REMOVE}, \
              match: {listener: {filterChain: {filter: {name: a, subFilter: {name: b}}}}}",
                Refused("subFilter"),
            ),
            (
                "applyTo: HTTP_FILTER, patch: {operation: REMOVE}, \
              match: {listener: {filterChain: {filter: {name: a, subFilter: {name: b}}}}}",
                Refused("subFilter"),
            ),
            (
                "applyTo: HTTP_FILTER, patch: {operation: REMOVE}, match: {listener: {filterChain: {filter: \
              {name: envoy.filters.network.http_connection_manager, subFilter: {}}}}}",
                Refused("subFilter.name"),
            ),
            (
                "applyTo: HTTP_FILTER, patch: {operation: REMOVE}, match: {context: WAYPOINT, waypoint: {portNumber: 80}}",
                Warns(""),
            ),
            (
                "applyTo: HTTP_FILTER, patch: {operation: REMOVE}, match: {context: WAYPOINT, waypoint: {portNumber: 65536}}",
                Refused("portNumber"),
            ),
            (
                "applyTo: HTTP_FILTER, patch: {operation: REMOVE}, match: {context: WAYPOINT, listener: {}}",
                Refused("match"),
            ),
            (
                "applyTo: HTTP_FILTER, patch: {operation: REMOVE}, match: {context: GATEWAY, waypoint: {}}",
                Refused("match"),
            ),
        ],
    );
}
