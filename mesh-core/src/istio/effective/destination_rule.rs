//! Which DestinationRule a client uses for a host (DR-01, DR-02, DR-05), and which policy that gives for a subset and a
//! port (DR-03, DR-04).

use std::collections::BTreeMap;

use super::host::resolve;
use super::scope::is_subset;
use super::visibility::{is_private, is_visible};
use crate::config::Workload;
use crate::istio::Resource;
use crate::istio::types::destination_rule::{
    ClientTlsSettings, ConnectionPoolSettings, DestinationRule, LoadBalancerSettings, OutlierDetection,
    ProxyProtocol, RetryBudget, Subset, TrafficPolicy, TunnelSettings,
};
use crate::matcher::HostMap;

/// All destination rules, by who may use them.
#[derive(Debug, Default)]
pub struct DestinationRules<'a> {
    /// By namespace of the rule: what clients of the same namespace see.
    local: BTreeMap<&'a str, Rules<'a>>,
    /// By namespace of the rule: what may be seen from elsewhere.
    exported: BTreeMap<&'a str, Rules<'a>>,
    root_namespace: &'a str,
    default_export_to: &'a [String],
}

/// The rules of a namespace by host, oldest first.
type Rules<'a> = HostMap<Vec<&'a Resource<DestinationRule>>>;

/// Destination rules of one host and namespace, taken together (DR-02).
#[derive(Clone, Debug)]
pub struct MergedRule<'a> {
    /// The rules, oldest first; what is honoured is honoured for all of them.
    pub rules: Vec<&'a Resource<DestinationRule>>,
    /// The policy of the first rule that has one.
    pub traffic_policy: Option<&'a TrafficPolicy>,
    /// The subsets of all rules; of several with one name the first.
    pub subsets: Vec<&'a Subset>,
}

impl<'a> DestinationRules<'a> {
    /// Sorts the rules, which come oldest first. `default_export_to` is the mesh's
    /// `defaultDestinationRuleExportTo`.
    #[must_use]
    pub fn new(
        rules: &'a [Resource<DestinationRule>],
        cluster_domain: &str,
        root_namespace: &'a str,
        default_export_to: &'a [String],
    ) -> Self {
        let (mut local, mut exported) = (BTreeMap::new(), BTreeMap::new());
        for rule in rules {
            let (namespace, export_to) = (rule.meta.namespace.as_str(), &rule.spec.export_to);
            let host = resolve(&rule.spec.host, namespace, cluster_domain).to_ascii_lowercase();
            let private = is_private(export_to, default_export_to, namespace);
            // In the root namespace only what is private is local: the rest must not come before the rules of the
            // namespace of the service, just because a gateway runs there.
            if (namespace != root_namespace || private)
                && is_visible(export_to, default_export_to, namespace, namespace)
            {
                add(&mut local, namespace, &host, rule);
            }
            if !private {
                add(&mut exported, namespace, &host, rule);
            }
        }
        Self { local: by_host(local), exported: by_host(exported), root_namespace, default_export_to }
    }

    /// The rule that `client` uses for `host`, the full name of a service of `service_namespace` (DR-01): the first of
    /// the client's namespace, the service's and the root namespace that has one for the host, and there the most
    /// specific host. No two of them are ever combined.
    #[must_use]
    pub fn find(&self, client: &Workload, host: &str, service_namespace: &str) -> Option<MergedRule<'a>> {
        let own = self.local.get(client.namespace.as_str()).and_then(|rules| rules.get(host));
        let rules = own
            .cloned()
            .or_else(|| self.exported_by(service_namespace, host, client))
            .or_else(|| self.exported_by(self.root_namespace, host, client))?;
        merge(&rules, client)
    }

    fn exported_by(
        &self,
        namespace: &str,
        host: &str,
        client: &Workload,
    ) -> Option<Vec<&'a Resource<DestinationRule>>> {
        let mut rules = self.exported.get(namespace)?.get(host)?.clone();
        rules.retain(|rule| {
            is_visible(&rule.spec.export_to, self.default_export_to, namespace, &client.namespace)
        });
        (!rules.is_empty()).then_some(rules)
    }
}

type Grouped<'a> = BTreeMap<&'a str, BTreeMap<String, Vec<&'a Resource<DestinationRule>>>>;

fn add<'a>(groups: &mut Grouped<'a>, namespace: &'a str, host: &str, rule: &'a Resource<DestinationRule>) {
    groups.entry(namespace).or_default().entry(host.to_owned()).or_default().push(rule);
}

fn by_host<'a>(groups: Grouped<'a>) -> BTreeMap<&'a str, Rules<'a>> {
    let hosts = |rules: BTreeMap<String, Vec<_>>| {
        let mut map = HostMap::new();
        for (host, rules) in rules {
            // The hosts differ, but for a trailing dot; of two such names the first is kept.
            let _ = map.insert(&host, rules);
        }
        map
    };
    groups.into_iter().map(|(namespace, rules)| (namespace, hosts(rules))).collect()
}

/// The rules that select the client as the oldest of them does, else those that select nobody (DR-05), as one (DR-02).
fn merge<'a>(rules: &[&'a Resource<DestinationRule>], client: &Workload) -> Option<MergedRule<'a>> {
    let selected = |rule: &&&'a Resource<DestinationRule>| {
        let selector = rule.spec.workload_selector.as_ref();
        rule.meta.namespace == client.namespace
            && selector.is_some_and(|selector| is_subset(&selector.match_labels, &client.labels))
    };
    let selector = rules.iter().find(selected).and_then(|rule| rule.spec.workload_selector.as_ref());
    let rules: Vec<_> =
        rules.iter().filter(|rule| rule.spec.workload_selector.as_ref() == selector).copied().collect();
    let mut merged = MergedRule {
        traffic_policy: rules.iter().find_map(|rule| rule.spec.traffic_policy.as_deref()),
        subsets: Vec::new(),
        rules,
    };
    for subset in merged.rules.iter().flat_map(|rule| &rule.spec.subsets) {
        if merged.subset(&subset.name).is_none() {
            merged.subsets.push(subset);
        }
    }
    (!merged.rules.is_empty()).then_some(merged)
}

impl<'a> MergedRule<'a> {
    /// The subset of that name.
    #[must_use]
    pub fn subset(&self, name: &str) -> Option<&'a Subset> {
        self.subsets.iter().find(|subset| subset.name == name).copied()
    }

    /// The policy for a subset, or for the whole service, and a port of the service. `base` is the mesh's
    /// `defaultTrafficPolicy` (DR-CP06). A subset that the rule does not have gives the policy of the service.
    #[must_use]
    pub fn policy<'p>(
        &self,
        base: Option<&'p TrafficPolicy>,
        subset: Option<&str>,
        port: u16,
    ) -> EffectivePolicy<'p>
    where
        'a: 'p,
    {
        let subset =
            subset.and_then(|name| self.subset(name)).and_then(|subset| subset.traffic_policy.as_deref());
        [base, self.traffic_policy, subset]
            .into_iter()
            .flatten()
            .fold(EffectivePolicy::default(), |policy, next| policy.overridden_by(next, port))
    }
}

/// A policy for one port, block by block. A block that is `None` has its defaults.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EffectivePolicy<'a> {
    /// Load balancing.
    pub load_balancer: Option<&'a LoadBalancerSettings>,
    /// Limits and timeouts of connections.
    pub connection_pool: Option<&'a ConnectionPoolSettings>,
    /// Ejection of endpoints that fail.
    pub outlier_detection: Option<&'a OutlierDetection>,
    /// TLS to the endpoints.
    pub tls: Option<&'a ClientTlsSettings>,
    /// A tunnel through another proxy.
    pub tunnel: Option<&'a TunnelSettings>,
    /// The PROXY protocol to the endpoints.
    pub proxy_protocol: Option<&'a ProxyProtocol>,
    /// A limit on concurrent retries.
    pub retry_budget: Option<&'a RetryBudget>,
}

impl<'a> EffectivePolicy<'a> {
    /// This policy under a nearer one: each block that `policy` has replaces the whole block (DR-03), and the settings
    /// of the port replace all four blocks that a port can have, those that they do not name by the defaults (DR-04).
    #[must_use]
    pub fn overridden_by(self, policy: &'a TrafficPolicy, port: u16) -> Self {
        let mut merged = Self {
            load_balancer: policy.load_balancer.as_ref().or(self.load_balancer),
            connection_pool: policy.connection_pool.as_ref().or(self.connection_pool),
            outlier_detection: policy.outlier_detection.as_ref().or(self.outlier_detection),
            tls: policy.tls.as_ref().or(self.tls),
            tunnel: policy.tunnel.as_ref().or(self.tunnel),
            proxy_protocol: policy.proxy_protocol.as_ref().or(self.proxy_protocol),
            retry_budget: policy.retry_budget.as_ref().or(self.retry_budget),
        };
        let of_port = |number: Option<u32>| number == Some(u32::from(port));
        let settings =
            policy.port_level_settings.iter().find(|settings| of_port(settings.port.map(|port| port.number)));
        if let Some(settings) = settings {
            merged.load_balancer = settings.load_balancer.as_ref();
            merged.connection_pool = settings.connection_pool.as_ref();
            merged.outlier_detection = settings.outlier_detection.as_ref();
            merged.tls = settings.tls.as_ref();
        }
        merged
    }
}

#[cfg(test)]
mod tests {
    use super::super::scope::workload;
    use super::*;
    use crate::istio::types::destination_rule::SimpleLb;
    use crate::istio::{LoadOptions, ResourceSet, SourceFile};

    /// Rules as `(namespace, spec)`, oldest first; the policy of each is told by its LB.
    fn load(rules: &[(&str, &str)]) -> ResourceSet {
        let yaml: Vec<_> = rules
            .iter()
            .enumerate()
            .map(|(index, (namespace, spec))| {
                format!(
                    "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: r{index}, namespace: \
                     {namespace}}}\nspec: {spec}\n"
                )
            })
            .collect();
        let (set, diags) =
            ResourceSet::load(&[SourceFile::new("a.yaml", yaml.join("---\n"))], &LoadOptions::default());
        assert!(!diags.has_errors(), "{diags}");
        set
    }

    fn find(rules: &[(&str, &str)], client: &Workload, host: &str) -> Option<SimpleLb> {
        let set = load(rules);
        let rules = DestinationRules::new(set.destination_rules(), "cluster.local", "istio-system", &[]);
        rules.find(client, host, "svc-ns")?.policy(None, None, 80).load_balancer?.simple
    }

    const HOST: &str = "web.svc-ns.svc.cluster.local";

    fn rule(host: &str, lb: &str, rest: &str) -> String {
        format!("{{host: {host:?}, trafficPolicy: {{loadBalancer: {{simple: {lb}}}}}{rest}}}")
    }

    #[test]
    fn dr_01_client_namespace_then_service_namespace_then_root() {
        let (own, svc, root) =
            (rule(HOST, "RANDOM", ""), rule(HOST, "ROUND_ROBIN", ""), rule(HOST, "LEAST_REQUEST", ""));
        let rules = [("istio-system", root.as_str()), ("svc-ns", svc.as_str()), ("client", own.as_str())];
        let client = workload("client", &[]);
        assert_eq!(find(&rules, &client, HOST), Some(SimpleLb::Random));
        assert_eq!(find(&rules[..2], &client, HOST), Some(SimpleLb::RoundRobin));
        assert_eq!(find(&rules[..1], &client, HOST), Some(SimpleLb::LeastRequest));
        assert_eq!(find(&[("elsewhere", own.as_str())], &client, HOST), None);
        // A gateway in the root namespace does not prefer the root's public rules.
        let gateway = workload("istio-system", &[]);
        assert_eq!(find(&rules, &gateway, HOST), Some(SimpleLb::RoundRobin));
        let private = rule(HOST, "LEAST_REQUEST", ", exportTo: [\".\"]");
        let rules = [("istio-system", private.as_str()), ("svc-ns", svc.as_str())];
        assert_eq!(find(&rules, &gateway, HOST), Some(SimpleLb::LeastRequest));
    }

    #[test]
    fn dr_01_the_most_specific_host_alone() {
        let wide = rule("*.svc-ns.svc.cluster.local", "RANDOM", "");
        let wider = rule("*.local", "ROUND_ROBIN", "");
        let exact = format!("{{host: {HOST:?}, subsets: [{{name: v1}}]}}");
        let client = workload("svc-ns", &[]);
        let rules = [("svc-ns", wider.as_str()), ("svc-ns", wide.as_str()), ("svc-ns", exact.as_str())];
        assert_eq!(find(&rules[..2], &client, HOST), Some(SimpleLb::Random));
        // The exact rule has no policy, and inherits none from the wildcard.
        assert_eq!(find(&rules, &client, HOST), None);
    }

    #[test]
    fn dr_01_export_to_hides_a_rule() {
        let private = rule(HOST, "RANDOM", ", exportTo: [\".\"]");
        let named = rule(HOST, "RANDOM", ", exportTo: [client]");
        let client = workload("client", &[]);
        assert_eq!(find(&[("svc-ns", private.as_str())], &client, HOST), None);
        assert_eq!(
            find(&[("svc-ns", private.as_str())], &workload("svc-ns", &[]), HOST),
            Some(SimpleLb::Random)
        );
        assert_eq!(find(&[("svc-ns", named.as_str())], &client, HOST), Some(SimpleLb::Random));
        assert_eq!(find(&[("svc-ns", named.as_str())], &workload("b", &[]), HOST), None);
        let set = load(&[("svc-ns", &rule(HOST, "RANDOM", ""))]);
        let own = [".".to_owned()];
        let rules = DestinationRules::new(set.destination_rules(), "cluster.local", "istio-system", &own);
        assert!(rules.find(&client, HOST, "svc-ns").is_none());
    }

    #[test]
    fn dr_02_rules_of_one_host_merge() {
        let set = load(&[
            ("svc-ns", "{host: web, subsets: [{name: v1, labels: {version: one}}]}"),
            ("svc-ns", &rule("web", "RANDOM", ", subsets: [{name: v1, labels: {version: two}}, {name: v2}]")),
            ("svc-ns", &rule("web", "ROUND_ROBIN", "")),
        ]);
        let rules = DestinationRules::new(set.destination_rules(), "cluster.local", "istio-system", &[]);
        let merged = rules.find(&workload("svc-ns", &[]), HOST, "svc-ns").unwrap();
        assert_eq!(merged.rules.len(), 3);
        assert_eq!(
            merged.subsets.iter().map(|subset| subset.name.as_str()).collect::<Vec<_>>(),
            ["v1", "v2"]
        );
        assert_eq!(merged.subset("v1").unwrap().labels["version"], "one");
        let policy = merged.policy(None, None, 80);
        assert_eq!(policy.load_balancer.unwrap().simple, Some(SimpleLb::Random));
    }

    #[test]
    fn dr_05_a_rule_that_selects_the_client_comes_first() {
        let all = rule(HOST, "RANDOM", "");
        let some =
            rule(HOST, "ROUND_ROBIN", ", exportTo: [\".\"], workloadSelector: {matchLabels: {app: web}}");
        let rules = [("client", all.as_str()), ("client", some.as_str())];
        assert_eq!(find(&rules, &workload("client", &[("app", "web")]), HOST), Some(SimpleLb::RoundRobin));
        assert_eq!(find(&rules, &workload("client", &[]), HOST), Some(SimpleLb::Random));
        assert_eq!(find(&rules[1..], &workload("client", &[]), HOST), None);
    }

    fn policy(spec: &str, subset: Option<&str>, port: u16) -> (Option<SimpleLb>, Option<u32>, bool) {
        let set = load(&[("svc-ns", spec)]);
        let rules = DestinationRules::new(set.destination_rules(), "cluster.local", "istio-system", &[]);
        let merged = rules.find(&workload("svc-ns", &[]), HOST, "svc-ns").unwrap();
        let policy = merged.policy(None, subset, port);
        let connections =
            policy.connection_pool.and_then(|pool| pool.tcp.as_ref()).map(|tcp| tcp.max_connections);
        (
            policy.load_balancer.and_then(|balancer| balancer.simple),
            connections.map(i32::unsigned_abs),
            policy.outlier_detection.is_some(),
        )
    }

    const BLOCKS: &str = "
  host: web
  trafficPolicy:
    loadBalancer: {simple: RANDOM}
    connectionPool: {tcp: {maxConnections: 1}}
    outlierDetection: {interval: 1s}
    portLevelSettings:
    - port: {number: 8080}
      connectionPool: {tcp: {maxConnections: 2}}
  subsets:
  - name: v1
    trafficPolicy:
      connectionPool: {tcp: {maxConnections: 3}}
  - name: v2
    trafficPolicy:
      portLevelSettings:
      - port: {number: 80}
        loadBalancer: {simple: ROUND_ROBIN}
  - name: v3";

    #[test]
    fn dr_03_a_subset_replaces_block_by_block() {
        assert_eq!(policy(BLOCKS, None, 80), (Some(SimpleLb::Random), Some(1), true));
        assert_eq!(policy(BLOCKS, Some("v1"), 80), (Some(SimpleLb::Random), Some(3), true));
        assert_eq!(policy(BLOCKS, Some("v3"), 80), (Some(SimpleLb::Random), Some(1), true));
    }

    #[test]
    fn dr_03_a_block_is_replaced_whole() {
        let spec = "
  host: web
  trafficPolicy:
    connectionPool: {tcp: {maxConnections: 1}}
  subsets:
  - name: v1
    trafficPolicy:
      connectionPool: {http: {maxRetries: 1}}";
        assert_eq!(policy(spec, Some("v1"), 80), (None, None, false));
    }

    #[test]
    fn dr_04_port_level_replaces_all_blocks() {
        assert_eq!(policy(BLOCKS, None, 8080), (None, Some(2), false));
        // The subset's blocks are nearer than the port's of the rule; the subset's own port is nearest.
        assert_eq!(policy(BLOCKS, Some("v1"), 8080), (None, Some(3), false));
        assert_eq!(policy(BLOCKS, Some("v2"), 80), (Some(SimpleLb::RoundRobin), None, false));
        assert_eq!(policy(BLOCKS, Some("v2"), 8080), (None, Some(2), false));
    }

    #[test]
    fn dr_cp06_the_mesh_default_lies_below() {
        let base: TrafficPolicy = serde_json::from_str(
            r#"{"loadBalancer":{"simple":"ROUND_ROBIN"},"connectionPool":{"tcp":{"maxConnections":9}}}"#,
        )
        .unwrap();
        let set = load(&[("svc-ns", "{host: web, trafficPolicy: {loadBalancer: {simple: RANDOM}}}")]);
        let rules = DestinationRules::new(set.destination_rules(), "cluster.local", "istio-system", &[]);
        let merged = rules.find(&workload("svc-ns", &[]), HOST, "svc-ns").unwrap();
        let policy = merged.policy(Some(&base), None, 80);
        assert_eq!(policy.load_balancer.unwrap().simple, Some(SimpleLb::Random));
        assert_eq!(policy.connection_pool.unwrap().tcp.as_ref().unwrap().max_connections, 9);
    }
}
