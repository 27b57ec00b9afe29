//! ProxyConfig.

use super::{Fine, Refused, Warns, judge};

#[test]
fn pc_01_rules() {
    judge(
        "networking.istio.io/v1beta1",
        "ProxyConfig",
        "$",
        &[
            ("{}", Fine),
            (
                "{concurrency: 0, selector: {matchLabels: {a: b}}, image: {imageType: debug}, environmentVariables: {A: b}}",
                Fine,
            ),
            ("{concurrency: -1}", Refused("concurrency")),
            ("{selector: {}}", Warns("selector.matchLabels")),
            ("{selector: {matchLabels: {'': b}}}", Refused("[\"\"]")),
            ("{selector: {matchLabels: {a: 'b*'}}}", Refused("matchLabels.a")),
            ("{selector: {matchLabels: {'a*': b}}}", Refused("[\"a*\"]")),
        ],
    );
}
