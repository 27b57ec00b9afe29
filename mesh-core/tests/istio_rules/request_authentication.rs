//! RequestAuthentication.

use super::{Fine, Refused, SECURITY, Verdict, Warns, judge};

#[test]
fn x_05_aims() {
    const RULES: &str = "jwtRules: [{issuer: a}]";
    let frame = format!("{{{RULES}, $}}");
    judge(
        SECURITY,
        "RequestAuthentication",
        &frame,
        &[
            ("selector: {matchLabels: {a: b}}", Fine),
            ("selector: {matchLabels: {a: ''}}", Fine),
            ("selector: {}", Warns("selector.matchLabels")),
            ("selector: {matchLabels: {'': a}}", Refused("[\"\"]")),
            ("targetRef: {kind: Service, name: a}", Fine),
            ("targetRef: {group: core, kind: Service, name: a}", Fine),
            ("targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: a}]", Fine),
            ("targetRefs: [{group: gateway.networking.k8s.io, kind: GatewayClass, name: a}]", Fine),
            ("targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: a}]", Fine),
            ("targetRef: {group: other, kind: Gateway, name: a}", Refused("targetRef.kind")),
            (
                "targetRef: {group: gateway.networking.k8s.io, kind: Other, name: a}",
                Refused("targetRef.kind"),
            ),
            ("targetRef: {kind: Serv_ice, name: a}", Refused("targetRef.kind")),
            ("targetRef: {kind: Service}", Refused("targetRef.name")),
            ("targetRef: {kind: Service, name: a, namespace: b}", Refused("targetRef.namespace")),
            ("targetRef: {kind: Service, name: a}, selector: {matchLabels: {a: b}}", Refused("")),
            ("targetRefs: [{kind: Service, name: a}], selector: {matchLabels: {a: b}}", Refused("")),
            ("targetRefs: [{kind: Service, name: a}], targetRef: {kind: Service, name: a}", Refused("")),
        ],
    );
}

fn rule(cases: &[(&str, Verdict)]) {
    judge(SECURITY, "RequestAuthentication", "{jwtRules: [$]}", cases);
}

#[test]
fn jw_01_rules() {
    rule(&[
        ("{issuer: a}", Fine),
        ("{jwksUri: 'https://a.b/c'}", Fine),
        ("{issuer: a, jwksUri: 'http://a.b:8080'}", Fine),
        ("{issuer: a, presence: REQUIRED}", Fine),
        (
            "{issuer: a, audiences: [b], fromHeaders: [{name: x, prefix: 'Bearer '}], fromParams: [q], fromCookies: [c], \
           outputPayloadToHeader: x, forwardOriginalToken: true, timeout: 5s, \
           outputClaimToHeaders: [{header: X-Sub, claim: a.b}], spaceDelimitedClaims: [roles]}",
            Fine,
        ),
        ("{}", Refused("jwtRules[0].issuer")),
        ("~", Refused("jwtRules[0]")),
        ("{issuer: a, audiences: ['']}", Refused("audiences[0]")),
        ("{issuer: a, jwksUri: a.b}", Refused("jwksUri")),
        ("{issuer: a, jwksUri: 'ftp://a.b'}", Refused("jwksUri")),
        ("{issuer: a, jwksUri: 'https://a.b:c'}", Refused("jwksUri")),
        ("{issuer: a, jwksUri: 'https://a.b', jwks: '{\"keys\":[]}'}", Refused("jwks")),
        ("{issuer: a, jwks: none}", Refused("jwks")),
        ("{issuer: a, fromHeaders: [{prefix: a}]}", Refused("fromHeaders[0].name")),
        ("{issuer: a, fromParams: ['']}", Refused("fromParams[0]")),
        ("{issuer: a, fromCookies: [a, '']}", Refused("fromCookies[1]")),
        ("{issuer: a, outputClaimToHeaders: [~]}", Refused("outputClaimToHeaders[0]")),
        ("{issuer: a, outputClaimToHeaders: [{}]}", Refused("outputClaimToHeaders[0].claim")),
        ("{issuer: a, outputClaimToHeaders: [{header: x}]}", Refused("outputClaimToHeaders[0].claim")),
        ("{issuer: a, outputClaimToHeaders: [{claim: x}]}", Refused("outputClaimToHeaders[0].header")),
        (
            "{issuer: a, outputClaimToHeaders: [{claim: x, header: ':path'}]}",
            Refused("outputClaimToHeaders[0].header"),
        ),
        (
            "{issuer: a, outputClaimToHeaders: [{claim: x, header: 'a%1'}]}",
            Refused("outputClaimToHeaders[0].header"),
        ),
        ("{issuer: a, timeout: apple}", Refused("timeout")),
        ("{issuer: a, timeout: 0s}", Refused("timeout")),
        ("{issuer: a, spaceDelimitedClaims: ['']}", Refused("spaceDelimitedClaims[0]")),
        ("{issuer: a, presence: MANDATORY}", Refused("presence")),
    ]);
}
