//! Which mTLS mode a workload has by the authentication policies of Istio 1.1 (LA-01).
//!
//! A policy is for services, by name and port; a workload has the ports of the services that select it. The most specific
//! policy counts alone: one that targets the service, else `default` of the namespace, else the MeshPolicy `default`; of
//! several that target one port of a service, the oldest. A policy without mTLS among its peers turns mTLS off.
//!
//! A service that is not among the resources is taken for the workloads whose label `app` is its name, at the ports by
//! their numbers.

use std::collections::BTreeMap;

use super::scope::is_subset;
use crate::config::Workload;
use crate::istio::types::authentication::{AuthenticationPolicy, PeerMtlsMode, TargetPort, TargetSelector};
use crate::istio::types::kubernetes::{IntOrString, ServiceSpec, ServiceSpecPort};
use crate::istio::types::peer_authentication::MutualTlsMode;
use crate::istio::{Resource, ResourceSet};

/// The label by which a workload says of which application it is.
const APP: &str = "app";

/// What the policies say for a workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LegacyMtls {
    /// The mode of ports that have none of their own; `None` where no policy is for them.
    pub default: Option<MutualTlsMode>,
    /// The ports of the workload that have a mode of their own.
    pub ports: BTreeMap<u16, MutualTlsMode>,
}

impl LegacyMtls {
    /// What is said for `workload`.
    #[must_use]
    pub fn of(set: &ResourceSet, workload: &Workload) -> Self {
        let own = || {
            set.authentication_policies().iter().filter(|policy| policy.meta.namespace == workload.namespace)
        };
        let namespace = own().find(|policy| policy.spec.targets.is_empty()).map(|policy| mode(&policy.spec));
        let mesh = set.mesh_policies().first().map(|policy| mode(&policy.spec.0));
        let mut found = Self { default: namespace.or(mesh), ports: BTreeMap::new() };
        let mut whole = None;
        for policy in own() {
            for target in &policy.spec.targets {
                let Some(at) = aims(set, target, workload) else { continue };
                let mode = mode(&policy.spec);
                for port in &at.ports {
                    found.ports.entry(*port).or_insert(mode);
                }
                if at.is_whole {
                    whole.get_or_insert(mode);
                }
            }
        }
        found.default = whole.or(found.default);
        found
    }
}

/// Whether it is known for which workloads the targets of a policy are, and at which ports.
#[must_use]
pub fn is_known(set: &ResourceSet, policy: &Resource<AuthenticationPolicy>, workload: &Workload) -> bool {
    policy.meta.namespace != workload.namespace
        || policy.spec.targets.iter().all(|target| match service(set, target, workload) {
            None => {
                workload.labels.contains_key(APP) && target.ports.iter().all(|port| port.number.is_some())
            }
            Some(service) => {
                let ports = service.spec.ports.iter().filter(|port| is_meant(target, port));
                !is_subset(&service.spec.selector, &workload.labels)
                    || ports.clone().all(|port| number(port).is_some())
            }
        })
}

/// What a target is of a workload.
struct Aim {
    ports: Vec<u16>,
    /// Whether ports that nobody lists are meant too.
    is_whole: bool,
}

fn aims(set: &ResourceSet, target: &TargetSelector, workload: &Workload) -> Option<Aim> {
    if !is_subset(&target.labels, &workload.labels) {
        return None;
    }
    let Some(service) = service(set, target, workload) else {
        let is_ours = workload.labels.get(APP) == Some(&target.name);
        let ports = target.ports.iter().filter_map(|port| u16::try_from(port.number?).ok()).collect();
        return is_ours.then_some(Aim { ports, is_whole: target.ports.is_empty() });
    };
    let selector = &service.spec.selector;
    if selector.is_empty() || !is_subset(selector, &workload.labels) {
        return None;
    }
    let meant = service.spec.ports.iter().filter(|port| is_meant(target, port));
    Some(Aim { ports: meant.filter_map(number).collect(), is_whole: false })
}

fn service<'s>(
    set: &'s ResourceSet,
    target: &TargetSelector,
    workload: &Workload,
) -> Option<&'s Resource<ServiceSpec>> {
    set.services()
        .iter()
        .find(|service| service.meta.namespace == workload.namespace && service.meta.name == target.name)
}

fn is_meant(target: &TargetSelector, port: &ServiceSpecPort) -> bool {
    let is = |wanted: &TargetPort| {
        wanted.number == Some(port.port) || wanted.name.as_ref().is_some_and(|name| *name == port.name)
    };
    target.ports.is_empty() || target.ports.iter().any(is)
}

/// The port of the workload; `None` where only its containers know it.
fn number(port: &ServiceSpecPort) -> Option<u16> {
    let number = match &port.target_port {
        None => port.port,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(_)) => return None,
    };
    u16::try_from(number).ok()
}

fn mode(policy: &AuthenticationPolicy) -> MutualTlsMode {
    match policy.peers.iter().find_map(|peer| peer.mtls) {
        None => MutualTlsMode::Disable,
        Some(mtls) if mtls.allow_tls || mtls.mode == PeerMtlsMode::Permissive || policy.peer_is_optional => {
            MutualTlsMode::Permissive
        }
        Some(_) => MutualTlsMode::Strict,
    }
}

#[cfg(test)]
mod tests {
    use super::super::peer_authentication::MtlsModes;
    use super::super::scope::workload;
    use super::*;
    use crate::istio::{LoadOptions, SourceFile};

    const STRICT: MutualTlsMode = MutualTlsMode::Strict;
    const PERMISSIVE: MutualTlsMode = MutualTlsMode::Permissive;
    const DISABLE: MutualTlsMode = MutualTlsMode::Disable;

    fn set(documents: &[String]) -> ResourceSet {
        let file = SourceFile::new("a.yaml", documents.join("---\n"));
        let (set, diags) = ResourceSet::load(&[file], &LoadOptions::default());
        assert!(!diags.has_errors(), "{diags}");
        set
    }

    fn policy(namespace: &str, name: &str, spec: &str) -> String {
        format!(
            "apiVersion: authentication.istio.io/v1alpha1\nkind: Policy\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
        )
    }

    fn mesh(spec: &str) -> String {
        format!(
            "apiVersion: authentication.istio.io/v1alpha1\nkind: MeshPolicy\nmetadata: {{name: default}}\nspec: {spec}\n"
        )
    }

    fn web() -> String {
        "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: a}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}, {name: admin, port: 81, targetPort: 8081}, {name: own, port: 82}]}\n".to_owned()
    }

    fn modes(documents: &[String]) -> [MutualTlsMode; 4] {
        let modes = MtlsModes::of(&set(documents), &workload("a", &[("app", "web")]), "istio-system");
        [8080, 8081, 82, 9999].map(|port| modes.of_port(port))
    }

    const MUST: &str = "{peers: [{mtls: {}}]}";
    const MAY: &str = "{peers: [{mtls: {mode: PERMISSIVE}}]}";

    #[test]
    fn la_01_the_modes() {
        for (spec, mode) in [
            (MUST, STRICT),
            ("{peers: [{mtls: null}]}", STRICT),
            ("{peers: [{mtls: {mode: STRICT}}]}", STRICT),
            (MAY, PERMISSIVE),
            ("{peers: [{mtls: {allowTls: true}}]}", PERMISSIVE),
            ("{peers: [{mtls: {}}], peerIsOptional: true}", PERMISSIVE),
            ("{}", DISABLE),
        ] {
            assert_eq!(modes(&[mesh(spec)]), [mode; 4], "{spec}");
        }
        assert_eq!(modes(&[]), [PERMISSIVE; 4]);
    }

    #[test]
    fn la_01_the_most_specific_policy_counts_alone() {
        let documents = [
            mesh(MUST),
            policy("a", "default", "{}"),
            policy(
                "a",
                "web",
                "{targets: [{name: web, ports: [{number: 80}]}], peers: [{mtls: {mode: PERMISSIVE}}]}",
            ),
            policy("b", "default", MAY),
            web(),
        ];
        assert_eq!(modes(&documents), [PERMISSIVE, DISABLE, DISABLE, DISABLE]);
        assert_eq!(modes(&documents[..1]), [STRICT; 4]);
        assert_eq!(modes(&[documents[0].clone(), documents[3].clone()]), [STRICT; 4]);
    }

    #[test]
    fn la_01_targets_are_services_and_their_ports() {
        let strict =
            |targets: &str| policy("a", "p", &format!("{{targets: [{targets}], peers: [{{mtls: {{}}}}]}}"));
        let by_name = [strict("{name: web, ports: [{name: admin}]}"), web()];
        assert_eq!(modes(&by_name), [PERMISSIVE, STRICT, PERMISSIVE, PERMISSIVE]);
        let whole = [strict("{name: web}"), web()];
        assert_eq!(modes(&whole), [STRICT, STRICT, STRICT, PERMISSIVE]);
        assert_eq!(modes(&[strict("{name: other}"), web()]), [PERMISSIVE; 4]);
        let labelled = [strict("{name: web, labels: {version: v2}}"), web()];
        assert_eq!(modes(&labelled), [PERMISSIVE; 4]);
        // The oldest of one port.
        let two = [
            policy("a", "p1", "{targets: [{name: web}], peers: [{mtls: {mode: PERMISSIVE}}]}"),
            policy("a", "p2", "{targets: [{name: web, ports: [{number: 81}]}], peers: [{mtls: {}}]}"),
            mesh(MUST),
            web(),
        ];
        assert_eq!(modes(&two), [PERMISSIVE, PERMISSIVE, PERMISSIVE, STRICT]);
    }

    #[test]
    fn la_01_a_service_that_nobody_describes_is_known_by_its_app() {
        let strict =
            |targets: &str| policy("a", "p", &format!("{{targets: [{targets}], peers: [{{mtls: {{}}}}]}}"));
        assert_eq!(modes(&[strict("{name: web}")]), [STRICT; 4]);
        let at = [strict("{name: web, ports: [{number: 8081}]}")];
        assert_eq!(modes(&at), [PERMISSIVE, STRICT, PERMISSIVE, PERMISSIVE]);
        assert_eq!(modes(&[strict("{name: other}")]), [PERMISSIVE; 4]);
        let known = |documents: &[String], labels: &[(&str, &str)]| {
            let set = set(documents);
            is_known(&set, &set.authentication_policies()[0], &workload("a", labels))
        };
        assert!(known(&[strict("{name: web}")], &[("app", "web")]));
        assert!(!known(&[strict("{name: web}")], &[]));
        assert!(!known(&[strict("{name: web, ports: [{name: http}]}")], &[("app", "web")]));
        assert!(known(&[strict("{name: web, ports: [{name: http}]}"), web()], &[("app", "web")]));
    }

    #[test]
    fn la_01_a_peer_authentication_comes_first() {
        let newer = |namespace: &str, spec: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: {namespace}}}\nspec: {spec}\n"
            )
        };
        let legacy = [
            policy("a", "default", MUST),
            policy("a", "p", "{targets: [{name: web, ports: [{number: 80}]}]}"),
            web(),
        ];
        let with = |newer: String| {
            let mut documents = legacy.to_vec();
            documents.push(newer);
            modes(&documents)
        };
        assert_eq!(modes(&legacy), [DISABLE, STRICT, STRICT, STRICT]);
        assert_eq!(with(newer("istio-system", "{mtls: {mode: PERMISSIVE}}")), [PERMISSIVE; 4]);
        // One that says nothing for the whole leaves it to the older one, and its ports count.
        let ports = "{selector: {matchLabels: {app: web}}, portLevelMtls: {'8081': {mode: PERMISSIVE}}}";
        assert_eq!(with(newer("a", ports)), [DISABLE, PERMISSIVE, STRICT, STRICT]);
    }
}
