//! What the kinds of security, telemetry and extensions share: at whom a policy aims, and the rules on metadata.

use super::check;
use super::common::{NetworkingWorkloadSelector, PolicyTargetReference, WorkloadSelector};
use crate::istio::findings::Findings;

/// The annotation that makes an AuthorizationPolicy evaluate without enforcing (AP-14).
pub(crate) const DRY_RUN_ANNOTATION: &str = "istio.io/dry-run";

/// What a `targetRef` may name: API group (canonical, so that the core group is `core`) and kind.
const TARGETS: [(&str, &str); 4] = [
    ("core", "Service"),
    ("networking.istio.io", "ServiceEntry"),
    ("gateway.networking.k8s.io", "Gateway"),
    ("gateway.networking.k8s.io", "GatewayClass"),
];

/// The most references that one policy may hold.
const MAX_TARGET_REFS: usize = 16;

/// Judges selector, targetRef and targetRefs of one policy: of the three at most one, and each by itself.
pub(crate) fn aim(
    out: &mut Findings,
    selector: Option<&WorkloadSelector>,
    target_ref: Option<&PolicyTargetReference>,
    target_refs: &[PolicyTargetReference],
) {
    let set = [selector.is_some(), target_ref.is_some(), !target_refs.is_empty()];
    if set.into_iter().filter(|set| *set).count() > 1 {
        out.error("", "only one of selector, targetRef and targetRefs can be set");
    }
    workload_selector(out, selector);
    if let Some(target) = target_ref {
        out.within("targetRef", |out| target_reference(out, target));
    }
    if target_refs.len() > MAX_TARGET_REFS {
        out.error("targetRefs", format!("at most {MAX_TARGET_REFS} references are allowed"));
    }
    for (index, target) in target_refs.iter().enumerate() {
        out.item("targetRefs", index, |out| target_reference(out, target));
    }
}

/// Judges `selector.matchLabels`.
pub(crate) fn workload_selector(out: &mut Findings, selector: Option<&WorkloadSelector>) {
    if let Some(selector) = selector {
        out.within("selector", |out| check::selector_labels(out, "matchLabels", &selector.match_labels));
    }
}

/// Judges `workloadSelector.labels`.
pub(crate) fn networking_selector(out: &mut Findings, selector: Option<&NetworkingWorkloadSelector>) {
    if let Some(selector) = selector {
        out.within("workloadSelector", |out| check::selector_labels(out, "labels", &selector.labels));
    }
}

fn target_reference(out: &mut Findings, target: &PolicyTargetReference) {
    if target.name.is_empty() {
        out.error("name", "the name of the target must be set");
    }
    if !target.namespace.is_empty() {
        out.error("namespace", "must not be set: a target in another namespace is not supported");
    }
    let group = if target.group.is_empty() { "core" } else { target.group.as_str() };
    if !TARGETS.contains(&(group, target.kind.as_str())) {
        out.error(
            "kind",
            format!(
                "{:?} of group {:?} cannot be a target; allowed are Service, ServiceEntry (networking.istio.io), \
                 Gateway and GatewayClass (gateway.networking.k8s.io)",
                target.kind, target.group
            ),
        );
    }
}

/// The rules on `metadata` that hold for every Istio kind but AuthorizationPolicy, where the dry-run annotation means
/// something; to be called once per resource.
pub(crate) fn metadata(out: &mut Findings, dry_run_allowed: bool) {
    /// Annotations that only Istio's own conversions may write.
    const INTERNAL: [&str; 3] = [
        "internal.istio.io/parents",
        "internal.istio.io/parent-namespace",
        "internal.istio.io/webhook-always-reject",
    ];
    let annotations = out.subject().annotations.clone();
    out.at_root("metadata.annotations", |out| {
        if !dry_run_allowed && annotations.contains_key(DRY_RUN_ANNOTATION) {
            out.error(
                &check::key_path(DRY_RUN_ANNOTATION),
                "only an AuthorizationPolicy supports this annotation",
            );
        }
        for name in INTERNAL.into_iter().filter(|name| annotations.contains_key(*name)) {
            out.error(&check::key_path(name), "this annotation must not be set by users");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn x_05_one_aim_only() {
        let selector = WorkloadSelector { match_labels: [("app".to_owned(), "a".to_owned())].into() };
        let target = PolicyTargetReference {
            group: String::new(),
            kind: "Service".to_owned(),
            name: "reviews".to_owned(),
            namespace: String::new(),
        };
        let judge =
            |selector: Option<&WorkloadSelector>, target_ref: Option<&PolicyTargetReference>, refs: &[_]| {
                let mut out = Findings::new("spec");
                aim(&mut out, selector, target_ref, refs);
                out.into_vec().into_iter().map(|finding| finding.path).collect::<Vec<_>>()
            };
        assert!(judge(Some(&selector), None, &[]).is_empty());
        assert!(judge(None, Some(&target), &[]).is_empty());
        assert_eq!(judge(Some(&selector), None, std::slice::from_ref(&target)), ["spec"]);
        let elsewhere = PolicyTargetReference { namespace: "b".to_owned(), kind: "Pod".to_owned(), ..target };
        assert_eq!(
            judge(None, None, &[elsewhere]),
            ["spec.targetRefs[0].namespace", "spec.targetRefs[0].kind"]
        );
    }
}
