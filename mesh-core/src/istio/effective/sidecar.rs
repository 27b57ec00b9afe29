//! Which Sidecar a workload has, and which services it lets in (SC-01).

use super::host::{is_covered_by, overlap};
use super::scope::{Level, level};
use crate::config::Workload;
use crate::istio::Resource;
use crate::istio::types::sidecar::Sidecar;

/// The Sidecar of `workload`: the oldest of its namespace that selects it, else the oldest of its namespace without a
/// selector, else that of the root namespace without one; `None` lets everything in that is visible. `sidecars` come
/// oldest first.
#[must_use]
pub fn sidecar_of<'a>(
    sidecars: &'a [Resource<Sidecar>],
    workload: &Workload,
    root_namespace: &str,
) -> Option<&'a Resource<Sidecar>> {
    let oldest = |wanted: Level| {
        sidecars.iter().find(|sidecar| {
            let labels = sidecar.spec.workload_selector.as_ref().map(|selector| &selector.labels);
            let namespace = sidecar.meta.namespace.as_str();
            level(labels, namespace, workload, root_namespace) == Some(wanted)
                && (wanted != Level::Workload || namespace == workload.namespace)
        })
    };
    oldest(Level::Workload).or_else(|| oldest(Level::Namespace)).or_else(|| oldest(Level::Mesh))
}

/// The hosts of one egress listener.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressHosts {
    hosts: Vec<(Namespaces, String)>,
    excluded: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Namespaces {
    All,
    One(String),
}

impl EgressHosts {
    /// Reads `egress[].hosts` of a Sidecar whose workloads are in `namespace`, which is what `.` means. Entries that
    /// the validator refuses select nothing.
    #[must_use]
    pub fn new(hosts: &[String], namespace: &str) -> Self {
        let mut this = Self::default();
        for (of, name) in hosts.iter().filter_map(|host| host.split_once('/')) {
            let namespaces = match of {
                "*" => Namespaces::All,
                "." => Namespaces::One(namespace.to_owned()),
                "~" => continue,
                _ => match of.strip_prefix('~') {
                    Some(excluded) => {
                        this.excluded.push(excluded.to_owned());
                        continue;
                    }
                    None => Namespaces::One(of.to_owned()),
                },
            };
            this.hosts.push((namespaces, name.to_owned()));
        }
        this
    }

    /// Whether a service of this name and namespace is let in. The name of a service may be a wildcard itself, and is
    /// let in when all of it is.
    #[must_use]
    pub fn allows(&self, host: &str, namespace: &str) -> bool {
        self.some(namespace, |pattern| is_covered_by(host, pattern))
    }

    /// Whether a rule for this host in this namespace is let in: when it is for some host that is let in.
    #[must_use]
    pub fn allows_rule(&self, host: &str, namespace: &str) -> bool {
        self.some(namespace, |pattern| overlap(host, pattern))
    }

    fn some(&self, namespace: &str, fits: impl Fn(&str) -> bool) -> bool {
        !self.excluded.iter().any(|excluded| excluded == namespace)
            && self.hosts.iter().any(|(namespaces, pattern)| match namespaces {
                Namespaces::All => fits(pattern),
                Namespaces::One(name) => name == namespace && fits(pattern),
            })
    }
}

/// Whether a Sidecar lets in a service of this name and namespace on `port`: by the listener of that port if there is
/// one, else by the one without a port. A Sidecar without egress listeners says nothing, and lets everything in.
#[must_use]
pub fn allows(
    sidecar: &Resource<Sidecar>,
    workload: &Workload,
    host: &str,
    namespace: &str,
    port: u16,
) -> bool {
    let egress = &sidecar.spec.egress;
    if egress.is_empty() {
        return true;
    }
    let of_port = |wanted: Option<u32>| {
        egress.iter().find(move |listener| listener.port.as_ref().map(|port| port.number) == wanted)
    };
    of_port(Some(u32::from(port))).or_else(|| of_port(None)).is_some_and(|listener| {
        EgressHosts::new(&listener.hosts, &workload.namespace).allows(host, namespace)
    })
}

/// Whether a Sidecar lets in a rule for this host in this namespace: by any of its listeners.
#[must_use]
pub fn allows_rule(sidecar: &Resource<Sidecar>, workload: &Workload, host: &str, namespace: &str) -> bool {
    let egress = &sidecar.spec.egress;
    egress.is_empty()
        || egress.iter().any(|listener| {
            EgressHosts::new(&listener.hosts, &workload.namespace).allows_rule(host, namespace)
        })
}

#[cfg(test)]
mod tests {
    use super::super::scope::workload;
    use super::*;
    use crate::istio::{LoadOptions, ResourceSet, SourceFile};

    fn load(sidecars: &[(&str, &str)]) -> ResourceSet {
        let yaml: Vec<_> = sidecars
            .iter()
            .enumerate()
            .map(|(index, (namespace, spec))| {
                format!(
                    "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: s{index}, namespace: \
                     {namespace}}}\nspec: {spec}\n"
                )
            })
            .collect();
        let (set, diags) =
            ResourceSet::load(&[SourceFile::new("a.yaml", yaml.join("---\n"))], &LoadOptions::default());
        assert!(!diags.has_errors(), "{diags}");
        set
    }

    #[test]
    fn sc_01_the_nearest_sidecar() {
        let all = "{egress: [{hosts: ['*/*']}]}";
        let web = "{workloadSelector: {labels: {app: web}}, egress: [{hosts: ['./*']}]}";
        let set = load(&[("istio-system", all), ("istio-system", web), ("a", all), ("a", web), ("b", web)]);
        let name = |namespace, labels: &[(&str, &str)]| {
            let workload = workload(namespace, labels);
            sidecar_of(set.sidecars(), &workload, "istio-system").map(|sidecar| sidecar.meta.name.clone())
        };
        assert_eq!(name("a", &[("app", "web")]).as_deref(), Some("s3"));
        assert_eq!(name("a", &[]).as_deref(), Some("s2"));
        // A selector in the root namespace reaches no other namespace.
        assert_eq!(name("c", &[("app", "web")]).as_deref(), Some("s0"));
        assert_eq!(
            sidecar_of(load(&[("b", web)]).sidecars(), &workload("a", &[]), "istio-system").map(|s| s.doc),
            None
        );
    }

    #[test]
    fn sc_01_egress_hosts() {
        let allows = |hosts: &[&str], host: &str, namespace: &str| {
            let hosts: Vec<_> = hosts.iter().map(|host| (*host).to_owned()).collect();
            EgressHosts::new(&hosts, "own").allows(host, namespace)
        };
        assert!(allows(&["*/*"], "a.b", "x"));
        assert!(allows(&["./*"], "a.b", "own") && !allows(&["./*"], "a.b", "x"));
        assert!(allows(&["x/a.b"], "a.b", "x") && !allows(&["x/a.b"], "c.b", "x"));
        assert!(allows(&["*/*.b"], "a.b", "x") && !allows(&["*/*.b"], "b", "x"));
        assert!(allows(&["*/*.b"], "*.a.b", "x") && !allows(&["*/a.b"], "*.b", "x"));
        assert!(!allows(&["~/*"], "a.b", "own"));
        assert!(!allows(&["*/*", "~x/*"], "a.b", "x") && allows(&["*/*", "~x/*"], "a.b", "y"));
    }

    #[test]
    fn sc_01_the_listener_of_the_port_comes_first() {
        let spec = "{egress: [{port: {number: 9080, protocol: HTTP, name: egress}, hosts: ['x/*']}, {hosts: ['y/*']}]}";
        let set = load(&[("a", spec)]);
        let (sidecar, client) = (&set.sidecars()[0], workload("a", &[]));
        assert!(allows(sidecar, &client, "s.x", "x", 9080) && !allows(sidecar, &client, "s.y", "y", 9080));
        assert!(allows(sidecar, &client, "s.y", "y", 80) && !allows(sidecar, &client, "s.x", "x", 80));
        let set = load(&[("a", "{outboundTrafficPolicy: {mode: REGISTRY_ONLY}}")]);
        assert!(allows(&set.sidecars()[0], &client, "s.x", "x", 80));
    }
}
