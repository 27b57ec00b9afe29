//! Which mTLS mode a workload has, by port (PA-01 … PA-03).
//!
//! Where no PeerAuthentication says anything for a workload, the authentication policies of Istio 1.1 do (LA-01), as they
//! did while Istio had both.

use std::collections::BTreeMap;

use super::legacy_authentication::LegacyMtls;
use super::scope::{Level, selector_level};
use crate::config::Workload;
use crate::istio::types::peer_authentication::{MutualTls, MutualTlsMode, PeerAuthentication};
use crate::istio::{Resource, ResourceSet};

/// The resolved modes of a workload; never [`MutualTlsMode::Unset`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MtlsModes {
    default: MutualTlsMode,
    ports: BTreeMap<u16, MutualTlsMode>,
}

impl MtlsModes {
    /// The modes of `workload`.
    ///
    /// Of several policies of one level the oldest counts; each level that says nothing inherits from the one above,
    /// and the mesh's from PERMISSIVE, or from the policies of Istio 1.1 where there are some. Selectors in the root
    /// namespace mean nothing here, unlike elsewhere.
    #[must_use]
    pub fn of(set: &ResourceSet, workload: &Workload, root_namespace: &str) -> Self {
        let policies: &[Resource<PeerAuthentication>] = set.peer_authentications();
        let oldest = |level: Level| {
            policies.iter().map(|policy| (policy.meta.namespace.as_str(), &policy.spec)).find(
                |(namespace, spec)| {
                    selector_level(spec.selector.as_ref(), namespace, workload, root_namespace) == Some(level)
                        && (level != Level::Workload || *namespace != root_namespace)
                },
            )
        };
        let [mesh, namespace, own] =
            [Level::Mesh, Level::Namespace, Level::Workload].map(|level| oldest(level).map(|(_, spec)| spec));
        let said =
            [own, namespace, mesh].into_iter().flatten().filter_map(|policy| policy.mtls).find_map(set_mode);
        let legacy = LegacyMtls::of(set, workload);
        let default = said.or(legacy.default).unwrap_or(MutualTlsMode::Permissive);
        let mut ports = if said.is_some() { BTreeMap::new() } else { legacy.ports };
        let own_ports = own.and_then(|policy| policy.port_level_mtls.as_ref()).into_iter().flatten();
        ports.extend(
            own_ports.filter_map(|(port, tls)| {
                Some((u16::try_from(*port).ok()?, set_mode(*tls).unwrap_or(default)))
            }),
        );
        Self { default, ports }
    }

    /// The mode of a port of the **workload**.
    #[must_use]
    pub fn of_port(&self, port: u16) -> MutualTlsMode {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }

    /// The mode of the ports that have none of their own.
    #[must_use]
    pub const fn default_mode(&self) -> MutualTlsMode {
        self.default
    }

    /// The ports that have a mode of their own.
    pub fn ports(&self) -> impl Iterator<Item = (u16, MutualTlsMode)> {
        self.ports.iter().map(|(port, mode)| (*port, *mode))
    }
}

fn set_mode(tls: MutualTls) -> Option<MutualTlsMode> {
    (tls.mode != MutualTlsMode::Unset).then_some(tls.mode)
}

#[cfg(test)]
mod tests {
    use super::super::scope::workload;
    use super::*;
    use crate::istio::{LoadOptions, ResourceSet, SourceFile};

    fn modes(policies: &[(&str, &str, &str)]) -> MtlsModes {
        let yaml: Vec<_> = policies
            .iter()
            .enumerate()
            .map(|(index, (namespace, created, spec))| {
                format!(
                    "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: p{index}, namespace: \
                     {namespace}, creationTimestamp: '{created}'}}\nspec: {spec}\n"
                )
            })
            .collect();
        let file = SourceFile::new("a.yaml", yaml.join("---\n"));
        let (set, diags) = ResourceSet::load(&[file], &LoadOptions::default());
        assert!(!diags.has_errors(), "{diags}");
        MtlsModes::of(&set, &workload("a", &[("app", "web")]), "istio-system")
    }

    const T1: &str = "2024-01-01T00:00:00Z";
    const T2: &str = "2024-01-02T00:00:00Z";
    const STRICT: &str = "{mtls: {mode: STRICT}}";
    const DISABLE: &str = "{mtls: {mode: DISABLE}}";
    const PERMISSIVE: &str = "{mtls: {mode: PERMISSIVE}}";

    #[test]
    fn pa_01_the_default_is_permissive_and_unset_inherits() {
        assert_eq!(modes(&[]).of_port(80), MutualTlsMode::Permissive);
        assert_eq!(
            modes(&[("istio-system", T1, "{mtls: {mode: UNSET}}")]).of_port(80),
            MutualTlsMode::Permissive
        );
        let inherit = [("istio-system", T1, STRICT), ("a", T1, "{mtls: {mode: UNSET}}")];
        assert_eq!(modes(&inherit).of_port(80), MutualTlsMode::Strict);
        assert_eq!(
            modes(&[("istio-system", T1, STRICT), ("a", T1, "{}")]).of_port(80),
            MutualTlsMode::Strict
        );
    }

    #[test]
    fn pa_02_the_nearest_level_counts() {
        let own = "{selector: {matchLabels: {app: web}}, mtls: {mode: PERMISSIVE}}";
        let levels = [("a", T1, own), ("a", T1, DISABLE), ("istio-system", T1, STRICT)];
        assert_eq!(modes(&levels).default_mode(), MutualTlsMode::Permissive);
        assert_eq!(modes(&levels[1..]).default_mode(), MutualTlsMode::Disable);
        assert_eq!(modes(&levels[2..]).default_mode(), MutualTlsMode::Strict);
        assert_eq!(modes(&[("b", T1, STRICT)]).default_mode(), MutualTlsMode::Permissive);
    }

    #[test]
    fn pa_02_of_one_level_the_oldest_counts() {
        assert_eq!(modes(&[("a", T2, DISABLE), ("a", T1, STRICT)]).default_mode(), MutualTlsMode::Strict);
        assert_eq!(
            modes(&[("a", T1, PERMISSIVE), ("a", T1, STRICT)]).default_mode(),
            MutualTlsMode::Permissive
        );
    }

    #[test]
    fn pa_02_a_selector_in_the_root_namespace_is_ignored() {
        let root = "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}}";
        assert_eq!(modes(&[("istio-system", T1, root)]).default_mode(), MutualTlsMode::Permissive);
    }

    #[test]
    fn pa_03_ports_of_the_workload_policy_alone() {
        let spec = "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {'8080': {mode: \
                    DISABLE}, '9090': {mode: UNSET}}}";
        let modes = modes(&[("a", T1, spec), ("a", T1, PERMISSIVE)]);
        assert_eq!(modes.of_port(8080), MutualTlsMode::Disable);
        assert_eq!(modes.of_port(9090), MutualTlsMode::Strict);
        assert_eq!(modes.of_port(80), MutualTlsMode::Strict);
        assert_eq!(modes.ports().count(), 2);
    }
}
