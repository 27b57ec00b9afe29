//! Rules on `metadata`, which hold for every kind.

use super::{Fine, Refused, Verdict, agrees, load};

const ROUTES: &str = "{hosts: [a.b], http: [{route: [{destination: {host: c}}]}]}";

const BODIES: [(&str, &str, &str); 6] = [
    ("networking.istio.io/v1", "VirtualService", ROUTES),
    ("networking.istio.io/v1", "DestinationRule", "{host: a}"),
    (
        "networking.istio.io/v1",
        "Gateway",
        "{servers: [{hosts: [a.b], port: {number: 80, name: a, protocol: HTTP}}]}",
    ),
    (
        "networking.istio.io/v1",
        "ServiceEntry",
        "{hosts: [a.b], resolution: DNS, ports: [{number: 80, name: a, protocol: HTTP}]}",
    ),
    ("security.istio.io/v1", "PeerAuthentication", "{}"),
    ("telemetry.istio.io/v1", "Telemetry", "{}"),
];

fn each(annotation: &str, verdict: Verdict) {
    for (api_version, kind, spec) in BODIES {
        let diags = load(&format!(
            "apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: a, namespace: ns, annotations: {{{annotation}}}}}\nspec: {spec}\n"
        ));
        assert!(agrees(&diags, verdict), "{kind} with {annotation}: expected {verdict:?}, found:\n{diags}");
    }
}

#[test]
fn x_08_annotations_that_only_some_may_have() {
    each("a.b/c: d", Fine);
    each("istio.io/dry-run: 'true'", Refused("[\"istio.io/dry-run\"]"));
    for own in ["parents", "parent-namespace", "webhook-always-reject"] {
        let annotation = format!("internal.istio.io/{own}: a");
        each(&annotation, Refused("\"]"));
    }
}
