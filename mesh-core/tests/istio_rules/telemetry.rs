//! Telemetry.

use super::{Fine, Refused, Warns, judge};

#[test]
fn te_01_rules() {
    judge(
        "telemetry.istio.io/v1",
        "Telemetry",
        "$",
        &[
            ("{}", Fine),
            ("{selector: {matchLabels: {a: b}}, targetRef: {kind: Service, name: a}}", Refused("")),
            ("{targetRefs: [{kind: Service}]}", Refused("targetRefs[0].name")),
            ("{tracing: [{providers: [{name: a}], randomSamplingPercentage: 0.5}]}", Fine),
            ("{tracing: [{}, {}]}", Warns("tracing")),
            ("{tracing: [{providers: [{name: a}, {name: b}]}]}", Warns("tracing[0].providers")),
            ("{tracing: [{providers: [{}]}]}", Refused("providers[0].name")),
            ("{tracing: [{randomSamplingPercentage: 100.5}]}", Refused("randomSamplingPercentage")),
            ("{tracing: [{randomSamplingPercentage: -1}]}", Refused("randomSamplingPercentage")),
            (
                "{tracing: [{customTags: {a: {literal: {value: b}}, c: {header: {name: d}}, e: {environment: {name: F}}}}]}",
                Fine,
            ),
            ("{tracing: [{customTags: {a: ~}}]}", Refused("customTags.a")),
            ("{tracing: [{customTags: {a: {literal: {}}}}]}", Refused("literal.value")),
            ("{tracing: [{customTags: {a: {header: {}}}}]}", Refused("header.name")),
            ("{tracing: [{customTags: {a: {environment: {}}}}]}", Refused("environment.name")),
            (
                "{tracing: [{customTags: {a: {literal: {value: b}, header: {name: c}}}}]}",
                Refused("customTags.a"),
            ),
            ("{metrics: [{providers: [{name: prometheus}], reportingInterval: 5s}]}", Fine),
            ("{metrics: [{providers: [{name: ''}]}]}", Refused("providers[0].name")),
            ("{metrics: [{reportingInterval: 0s}]}", Refused("reportingInterval")),
            (
                "{metrics: [{overrides: [{match: {metric: REQUEST_COUNT}, tagOverrides: {a: {value: b}}}]}]}",
                Fine,
            ),
            ("{metrics: [{overrides: [{tagOverrides: {a: {operation: REMOVE}}}]}]}", Fine),
            (
                "{metrics: [{overrides: [{tagOverrides: {a: {operation: UPSERT}}}]}]}",
                Refused("tagOverrides.a.value"),
            ),
            ("{metrics: [{overrides: [{tagOverrides: {a: {}}}]}]}", Refused("tagOverrides.a.value")),
            (
                "{metrics: [{overrides: [{tagOverrides: {a: {operation: REMOVE, value: b}}}]}]}",
                Refused("tagOverrides.a.value"),
            ),
            ("{metrics: [{overrides: [{tagOverrides: {a: ~}}]}]}", Refused("tagOverrides.a")),
            ("{metrics: [{overrides: [{match: {customMetric: ''}}]}]}", Refused("match.customMetric")),
            (
                "{metrics: [{overrides: [{match: {customMetric: a, metric: REQUEST_COUNT}}]}]}",
                Refused("match"),
            ),
            ("{metrics: [{overrides: [{match: {metric: NONE}}]}]}", Refused("match.metric")),
            ("{accessLogging: [{providers: [{name: a}, {name: b}]}, {disabled: true}]}", Fine),
            ("{accessLogging: [{providers: [{}]}]}", Refused("providers[0].name")),
            ("{accessLogging: [{filter: {expression: 'response.code >= 400'}}]}", Fine),
            ("{accessLogging: [{filter: {expression: 'response.code'}}]}", Fine),
            ("{accessLogging: [{filter: {expression: ')++++'}}]}", Refused("filter.expression")),
        ],
    );
}
