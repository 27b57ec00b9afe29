//! `security.istio.io` AuthorizationPolicy (AP-02, AP-03, AP-05 … AP-09, AP-13, AP-14).

use serde::Deserialize;

use super::check::{self, Checked};
use super::common::{PolicyTargetReference, WorkloadSelector};
use super::target::{self, DRY_RUN_ANNOTATION};
use crate::istio::findings::{Findings, Validate};

/// The most service accounts in one list, and the longest.
const MAX_SERVICE_ACCOUNTS: usize = 16;
const MAX_SERVICE_ACCOUNT_LEN: usize = 320;

/// Who may do what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AuthorizationPolicy {
    /// The workloads; not together with a target reference.
    pub selector: Option<WorkloadSelector>,
    /// The one target; the older form of `target_refs`.
    pub target_ref: Option<PolicyTargetReference>,
    /// The targets.
    pub target_refs: Vec<PolicyTargetReference>,
    /// The rules; a request matches the policy if it matches one of them. An ALLOW without rules matches nothing and
    /// so denies everything; a rule without members matches everything (AP-02).
    pub rules: Option<Vec<Rule>>,
    /// What a match means; default ALLOW.
    pub action: Action,
    /// Who decides, for CUSTOM.
    pub provider: Option<ExtensionProviderRef>,
}

/// What a match means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Action {
    /// Allowed.
    #[default]
    Allow,
    /// Denied.
    Deny,
    /// Marked, and neither.
    Audit,
    /// Decided by the provider.
    Custom,
}

/// The name of an external authorizer in MeshConfig's `extensionProviders`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtensionProviderRef {
    /// The name.
    pub name: String,
}

/// Any of `from`, and any of `to`, and all of `when` (AP-03).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rule {
    /// Where the request comes from.
    pub from: Option<Vec<From>>,
    /// What it does.
    pub to: Option<Vec<To>>,
    /// Further conditions.
    pub when: Vec<Condition>,
}

/// One source, wrapped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct From {
    /// The source; required.
    pub source: Option<Source>,
}

/// One operation, wrapped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct To {
    /// The operation; required.
    pub operation: Option<Operation>,
}

/// Where a request comes from: all members that are set must hold; within one list any value does, and a `not` list
/// holds when none of its values does (AP-05, AP-06).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Source {
    /// Peer identities, `td/ns/NS/sa/SA`.
    pub principals: Vec<String>,
    /// None of these.
    pub not_principals: Vec<String>,
    /// `issuer/subject` of the validated token.
    pub request_principals: Vec<String>,
    /// None of these.
    pub not_request_principals: Vec<String>,
    /// Namespaces of the peer.
    pub namespaces: Vec<String>,
    /// None of these.
    pub not_namespaces: Vec<String>,
    /// `namespace/account`, or `account` in the policy's namespace; no wildcards.
    pub service_accounts: Vec<String>,
    /// None of these.
    pub not_service_accounts: Vec<String>,
    /// Trust domains of the peer.
    pub trust_domains: Vec<String>,
    /// None of these.
    pub not_trust_domains: Vec<String>,
    /// Addresses or blocks of the direct peer.
    pub ip_blocks: Vec<String>,
    /// None of these.
    pub not_ip_blocks: Vec<String>,
    /// Addresses or blocks of the original client, from `X-Forwarded-For` or the proxy protocol.
    pub remote_ip_blocks: Vec<String>,
    /// None of these.
    pub not_remote_ip_blocks: Vec<String>,
}

/// What a request does; read as [`Source`] is (AP-07, AP-08).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Operation {
    /// Hosts, compared in any case.
    pub hosts: Vec<String>,
    /// None of these.
    pub not_hosts: Vec<String>,
    /// Ports of the workload.
    pub ports: Vec<String>,
    /// None of these.
    pub not_ports: Vec<String>,
    /// Methods.
    pub methods: Vec<String>,
    /// None of these.
    pub not_methods: Vec<String>,
    /// Paths without query; `{*}` is one segment, `{**}` any number.
    pub paths: Vec<String>,
    /// None of these.
    pub not_paths: Vec<String>,
}

/// A condition on one attribute (AP-09).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// The attribute, as `request.headers[X-Token]`.
    pub key: String,
    /// Any of these.
    pub values: Vec<String>,
    /// None of these.
    pub not_values: Vec<String>,
}

impl Validate for AuthorizationPolicy {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, true);
        self.validate_dry_run(out);
        target::aim(out, self.selector.as_ref(), self.target_ref.as_ref(), &self.target_refs);
        let rules = self.rules.as_deref().unwrap_or_default();
        self.validate_action(out, rules);
        for (index, rule) in rules.iter().enumerate() {
            out.item("rules", index, |out| rule.validate_for(out, self.action));
        }
    }
}

impl AuthorizationPolicy {
    fn validate_dry_run(&self, out: &mut Findings) {
        let Some(value) = out.subject().annotations.get(DRY_RUN_ANNOTATION).cloned() else { return };
        out.at_root("metadata.annotations", |out| {
            let at = check::key_path(DRY_RUN_ANNOTATION);
            if !matches!(self.action, Action::Allow | Action::Deny) {
                out.error(&at, "only the actions ALLOW and DENY can be run dry");
            } else if !is_bool(&value) {
                out.error(&at, format!("invalid value {value:?}, it must be true or false"));
            }
        });
    }

    fn validate_action(&self, out: &mut Findings, rules: &[Rule]) {
        let custom = self.action == Action::Custom;
        if rules.is_empty() && (custom || self.action == Action::Deny) {
            let action = if custom { "CUSTOM" } else { "DENY" };
            out.error(
                "rules",
                format!(
                    "{action} action without `rules` is meaningless as it will never be triggered, add an empty rule \
                     `{{}}` if you want it be triggered for every request"
                ),
            );
        } else if custom && self.provider.as_ref().is_none_or(|provider| provider.name.is_empty()) {
            out.error("provider.name", "must not be empty with the action CUSTOM");
        }
        if self.provider.is_some() && !custom {
            out.error("provider", "must not be set with another action than CUSTOM");
        }
    }
}

impl Rule {
    fn validate_for(&self, out: &mut Findings, action: Action) {
        for (field, empty) in [
            ("from", self.from.as_ref().is_some_and(Vec::is_empty)),
            ("to", self.to.as_ref().is_some_and(Vec::is_empty)),
        ] {
            if empty {
                out.error(field, format!("`{field}` must not be empty"));
            }
        }
        for (index, from) in self.from.iter().flatten().enumerate() {
            out.item("from", index, |out| match &from.source {
                None => out.error("source", "`from.source` must not be nil"),
                Some(source) => out.within("source", |out| source.validate_for(out, action)),
            });
        }
        for (index, to) in self.to.iter().flatten().enumerate() {
            out.item("to", index, |out| match &to.operation {
                None => out.error("operation", "`to.operation` must not be nil"),
                Some(operation) => out.within("operation", |out| operation.validate(out)),
            });
        }
        for (index, condition) in self.when.iter().enumerate() {
            out.item("when", index, |out| condition.validate_for(out, action));
        }
        if action == Action::Deny && self.denies_every_tcp_connection() {
            out.warning(
                "",
                "configured AuthorizationPolicy will deny all traffic to TCP ports under its scope due to the use of \
                 only HTTP attributes in a DENY rule; it is recommended to explicitly specify the port",
            );
        }
    }

    /// On a TCP connection a DENY rule loses its HTTP attributes and so grows (AP-10).
    fn denies_every_tcp_connection(&self) -> bool {
        let mut sources = self.from.iter().flatten().filter_map(|from| from.source.as_ref()).peekable();
        let mut operations = self.to.iter().flatten().filter_map(|to| to.operation.as_ref()).peekable();
        let (has_from, has_to) = (sources.peek().is_some(), operations.peek().is_some());
        let tcp_from = sources.any(Source::has_tcp_attribute);
        let tcp_to =
            operations.any(|operation| !operation.ports.is_empty() || !operation.not_ports.is_empty());
        (has_from && !has_to && !tcp_from) || (has_to && !tcp_to)
    }
}

impl Source {
    fn lists(&self) -> [(&'static str, &[String]); 14] {
        [
            ("principals", &self.principals),
            ("notPrincipals", &self.not_principals),
            ("requestPrincipals", &self.request_principals),
            ("notRequestPrincipals", &self.not_request_principals),
            ("namespaces", &self.namespaces),
            ("notNamespaces", &self.not_namespaces),
            ("serviceAccounts", &self.service_accounts),
            ("notServiceAccounts", &self.not_service_accounts),
            ("trustDomains", &self.trust_domains),
            ("notTrustDomains", &self.not_trust_domains),
            ("ipBlocks", &self.ip_blocks),
            ("notIpBlocks", &self.not_ip_blocks),
            ("remoteIpBlocks", &self.remote_ip_blocks),
            ("notRemoteIpBlocks", &self.not_remote_ip_blocks),
        ]
    }

    fn has_tcp_attribute(&self) -> bool {
        self.lists().into_iter().any(|(name, list)| !list.is_empty() && !name.ends_with("equestPrincipals"))
    }

    fn validate_for(&self, out: &mut Findings, action: Action) {
        if self.lists().into_iter().all(|(_, list)| list.is_empty()) {
            out.error("", "`from.source` must not be empty");
        }
        let accounts = self.service_accounts.len() + self.not_service_accounts.len();
        let names = [&self.principals, &self.not_principals, &self.namespaces, &self.not_namespaces];
        if accounts > 0 && names.into_iter().any(|list| !list.is_empty()) {
            out.error("", "cannot set serviceAccounts with namespaces or principals");
        }
        for (field, list) in self.lists() {
            let is_address = field.ends_with("pBlocks");
            if action == Action::Custom && !is_address && !list.is_empty() {
                out.error(field, "is currently not supported with the CUSTOM action");
            }
            match field {
                "serviceAccounts" | "notServiceAccounts" => service_accounts(out, field, list),
                _ if is_address => addresses(out, field, list),
                _ => not_empty(out, field, list),
            }
        }
    }
}

impl Validate for Operation {
    fn validate(&self, out: &mut Findings) {
        let lists: [(&str, &[String]); 8] = [
            ("hosts", &self.hosts),
            ("notHosts", &self.not_hosts),
            ("ports", &self.ports),
            ("notPorts", &self.not_ports),
            ("methods", &self.methods),
            ("notMethods", &self.not_methods),
            ("paths", &self.paths),
            ("notPaths", &self.not_paths),
        ];
        if lists.iter().all(|(_, list)| list.is_empty()) {
            out.error("", "`to.operation` must not be empty");
        }
        for (field, list) in lists {
            match field {
                "ports" | "notPorts" => ports(out, field, list),
                _ => not_empty(out, field, list),
            }
            if matches!(field, "paths" | "notPaths") {
                for (index, path) in list.iter().enumerate() {
                    out.check(&format!("{field}[{index}]"), path_template(path));
                }
            }
        }
    }
}

impl Condition {
    fn validate_for(&self, out: &mut Findings, action: Action) {
        if self.key.is_empty() {
            out.error("key", "`key` must not be empty");
            return;
        }
        let identity = matches!(
            self.key.as_str(),
            "source.namespace" | "source.serviceAccount" | "source.principal" | "source.trustDomain"
        );
        if action == Action::Custom && (identity || self.key.starts_with("request.auth.")) {
            out.error("key", format!("{} is currently not supported with the CUSTOM action", self.key));
        }
        if self.values.is_empty() && self.not_values.is_empty() {
            out.error(
                "",
                format!("at least one of `values` or `notValues` must be set for key {}", self.key),
            );
        }
        let Some(attribute) = attribute(out, &self.key) else { return };
        for (field, list) in [("values", &self.values), ("notValues", &self.not_values)] {
            match attribute {
                Attribute::Text => not_empty(out, field, list),
                Attribute::Address => addresses(out, field, list),
                Attribute::Port => ports(out, field, list),
                Attribute::ServiceAccount => service_accounts(out, field, list),
            }
        }
    }
}

/// What the values of a condition are.
#[derive(Clone, Copy)]
enum Attribute {
    Text,
    Address,
    Port,
    ServiceAccount,
}

fn attribute(out: &mut Findings, key: &str) -> Option<Attribute> {
    let reason = match key {
        "source.ip" | "remote.ip" | "destination.ip" => return Some(Attribute::Address),
        "destination.port" => return Some(Attribute::Port),
        "source.serviceAccount" => return Some(Attribute::ServiceAccount),
        "source.namespace"
        | "source.principal"
        | "source.trustDomain"
        | "request.auth.principal"
        | "request.auth.audiences"
        | "request.auth.presenter"
        | "connection.sni" => return Some(Attribute::Text),
        "destination.namespace" => format!("attribute {key} is replaced by the metadata.namespace"),
        "destination.name" | "destination.user" => {
            format!("attribute {key} is deprecated: only rbac.istio.io/v1alpha1 has it")
        }
        _ if key.starts_with("destination.labels") => {
            format!("attribute {key} is replaced by the workload selector")
        }
        _ if [
            "request.headers",
            "request.experimental.inline.headers",
            "request.auth.claims",
            "experimental.envoy.filters.",
        ]
        .into_iter()
        .any(|prefix| key.starts_with(prefix)) =>
        {
            match key.find('[') {
                Some(open) if open > 0 && key.ends_with(']') && open + 2 < key.len() => {
                    return Some(Attribute::Text);
                }
                _ => format!("bad key {key:?}: it should have the format a[b]"),
            }
        }
        _ => format!("unknown attribute {key:?}"),
    };
    out.error("key", reason);
    None
}

fn each(out: &mut Findings, field: &str, list: &[String], judge: impl Fn(&str) -> Checked) {
    for (index, value) in list.iter().enumerate() {
        out.check(&format!("{field}[{index}]"), judge(value));
    }
}

fn not_empty(out: &mut Findings, field: &str, list: &[String]) {
    each(
        out,
        field,
        list,
        |value| if value.is_empty() { Err("empty value not allowed".to_owned()) } else { Ok(()) },
    );
}

fn addresses(out: &mut Findings, field: &str, list: &[String]) {
    each(out, field, list, check::ip_or_cidr);
}

fn ports(out: &mut Findings, field: &str, list: &[String]) {
    each(out, field, list, |value| {
        // Unlike the port of a listener, 0 is accepted here.
        let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
        if digits && value.parse::<u32>().is_ok_and(|port| port <= 65_535) {
            Ok(())
        } else {
            Err(format!("bad port {value:?}"))
        }
    });
}

fn service_accounts(out: &mut Findings, field: &str, list: &[String]) {
    if list.len() > MAX_SERVICE_ACCOUNTS {
        out.error(field, format!("may not have more than {MAX_SERVICE_ACCOUNTS} values"));
    }
    each(out, field, list, |value| {
        if value.is_empty() {
            return Err("empty value not allowed".to_owned());
        }
        if value.contains('*') {
            return Err("wildcard not allowed".to_owned());
        }
        if value.len() > MAX_SERVICE_ACCOUNT_LEN {
            return Err(format!("value cannot exceed {MAX_SERVICE_ACCOUNT_LEN} characters"));
        }
        let mut parts = value.split('/');
        match (parts.next(), parts.next(), parts.next()) {
            (Some(first), second, None) if !first.is_empty() && second != Some("") => Ok(()),
            _ => Err(format!("expected 'serviceAccount' or 'namespace/serviceAccount', found {value:?}")),
        }
    });
}

/// A path in which `{*}` and `{**}` are whole segments, `{**}` the last of them, and no other brace occurs; beside a
/// template, segments are literals of RFC 3986 (AP-08).
fn path_template(path: &str) -> Checked {
    let template = path.contains("{*}") || path.contains("{**}");
    let mut rest_seen = false;
    for segment in path.trim_matches('/').split('/') {
        match segment {
            "{*}" | "{**}" if rest_seen => {
                return Err(format!("invalid or unsupported path {path:?}: {{**}} is not the last operator"));
            }
            "{*}" => {}
            "{**}" => rest_seen = true,
            _ if segment.contains(['{', '}']) => {
                return Err(format!(
                    "invalid or unsupported path {path:?}: contains '{{' or '}}' beyond a supported path template"
                ));
            }
            _ if template && !is_literal(segment) => {
                return Err(format!(
                    "invalid or unsupported path {path:?}: segment {segment:?} is not a literal"
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

fn is_literal(segment: &str) -> bool {
    !segment.is_empty()
        && segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@=".contains(&byte))
}

/// Go's `strconv.ParseBool`.
fn is_bool(value: &str) -> bool {
    matches!(
        value,
        "1" | "t" | "T" | "TRUE" | "true" | "True" | "0" | "f" | "F" | "FALSE" | "false" | "False"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ap_08_path_templates() {
        for path in ["/", "/foo*", "*", "/foo/{*}/bar", "/{*}/{**}", "/foo/{**}/bar", "{*}", "/a*b"] {
            assert_eq!(path_template(path), Ok(()), "{path}");
        }
        for path in ["/{**}/{*}", "/{**}/{**}", "/foo{*}", "/{a}/b", "/{*}/a*", "/{*}//b", "/{}", "/{*}/b c"]
        {
            assert!(path_template(path).is_err(), "{path}");
        }
    }

    #[test]
    fn ap_09_keys() {
        let judge = |key: &str, value: &str| {
            let condition =
                Condition { key: key.to_owned(), values: vec![value.to_owned()], not_values: Vec::new() };
            let mut out = Findings::default();
            condition.validate_for(&mut out, Action::Allow);
            !out.has_errors()
        };
        for (key, value) in [
            ("request.headers[X-A]", "b"),
            ("source.ip", "10.0.0.0/8"),
            ("destination.port", "0"),
            ("request.auth.claims[a][b]", "c"),
            ("source.serviceAccount", "ns/sa"),
            ("connection.sni", "*"),
        ] {
            assert!(judge(key, value), "{key}");
        }
        for (key, value) in [
            ("request.headers", "b"),
            ("request.headers[]", "b"),
            ("source.ip", "10.0.0.256"),
            ("destination.port", "+80"),
            ("destination.labels[app]", "b"),
            ("source.serviceAccount", "a/b/c"),
            ("", "a"),
            ("source.namespace", ""),
        ] {
            assert!(!judge(key, value), "{key}");
        }
    }

    #[test]
    fn ap_10_a_deny_rule_of_http_attributes_alone_is_a_warning() {
        let warn = |operation: Operation| {
            let rule = Rule { to: Some(vec![To { operation: Some(operation) }]), ..Rule::default() };
            rule.denies_every_tcp_connection()
        };
        assert!(warn(Operation { methods: vec!["POST".to_owned()], ..Operation::default() }));
        assert!(!warn(Operation { ports: vec!["80".to_owned()], ..Operation::default() }));
    }
}
