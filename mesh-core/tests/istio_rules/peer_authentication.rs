//! PeerAuthentication.

use super::{Fine, Refused, SECURITY, Warns, judge};

#[test]
fn pa_01_rules() {
    judge(
        SECURITY,
        "PeerAuthentication",
        "$",
        &[
            ("{}", Fine),
            ("{mtls: {}}", Fine),
            ("{mtls: {mode: UNSET}}", Fine),
            (
                "{mtls: {mode: STRICT}, selector: {matchLabels: {a: b}}, portLevelMtls: {8080: {mode: DISABLE}}}",
                Fine,
            ),
            ("{mtls: {mode: BLAH}}", Refused("mtls.mode")),
            ("{selector: {}}", Warns("selector.matchLabels")),
            ("{selector: {matchLabels: {'': b}}}", Refused("[\"\"]")),
            ("{portLevelMtls: {8080: {mode: STRICT}}}", Refused("portLevelMtls")),
            (
                "{selector: {matchLabels: {}}, portLevelMtls: {8080: {mode: STRICT}}}",
                Refused("portLevelMtls"),
            ),
            ("{selector: {matchLabels: {a: b}}, portLevelMtls: {}}", Refused("portLevelMtls")),
            ("{selector: {matchLabels: {a: b}}, portLevelMtls: {0: {}}}", Refused("portLevelMtls.0")),
            ("{selector: {matchLabels: {a: b}}, portLevelMtls: {65536: {}}}", Refused("portLevelMtls.65536")),
            ("{selector: {matchLabels: {a: b}}, portLevelMtls: {abc: {}}}", Refused("abc")),
        ],
    );
}
