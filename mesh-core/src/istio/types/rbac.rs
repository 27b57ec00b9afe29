//! `rbac.istio.io/v1alpha1`, the authorization of Istio 1.1 (LR-01 … LR-05).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::check;
use crate::istio::findings::{Findings, Validate};

/// The only name that a configuration of the mesh may have.
const SINGLETON: &str = "default";

/// Where authorization is on: RbacConfig, which is per mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RbacConfig {
    /// Where it is on.
    pub mode: RbacMode,
    /// For `ON_WITH_INCLUSION`.
    pub inclusion: Option<RbacTarget>,
    /// For `ON_WITH_EXCLUSION`.
    pub exclusion: Option<RbacTarget>,
    /// Whether decisions are enforced.
    pub enforcement_mode: EnforcementMode,
}

/// The same under the name that replaced RbacConfig.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct ClusterRbacConfig(pub RbacConfig);

/// Where authorization is on (LR-01).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RbacMode {
    /// Nowhere.
    #[default]
    Off,
    /// Everywhere.
    On,
    /// For what is listed.
    OnWithInclusion,
    /// For what is not listed.
    OnWithExclusion,
}

/// Whether decisions are enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum EnforcementMode {
    /// They are; the default.
    #[default]
    Enforced,
    /// They are only reported.
    Permissive,
}

/// Services, namespaces and workloads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RbacTarget {
    /// Full names of services.
    pub services: Vec<String>,
    /// Namespaces.
    pub namespaces: Vec<String>,
}

/// What may be done (LR-03).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceRole {
    /// The permissions, any of them.
    pub rules: Vec<AccessRule>,
}

/// One permission: all members that are set must hold; within one list any value does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AccessRule {
    /// Services: exact, `prefix*`, `*suffix` or `*`. Required.
    pub services: Vec<String>,
    /// Hosts.
    pub hosts: Vec<String>,
    /// None of these hosts.
    pub not_hosts: Vec<String>,
    /// Paths: exact, `prefix*`, `*suffix`.
    pub paths: Vec<String>,
    /// None of these paths.
    pub not_paths: Vec<String>,
    /// Methods; ignored for gRPC.
    pub methods: Vec<String>,
    /// None of these methods.
    pub not_methods: Vec<String>,
    /// Ports.
    pub ports: Vec<u32>,
    /// None of these ports.
    pub not_ports: Vec<u32>,
    /// Further conditions, all of them.
    pub constraints: Vec<Constraint>,
}

/// A condition on a property of the destination or the request (LR-04).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Constraint {
    /// The property.
    pub key: String,
    /// Any of these.
    pub values: Vec<String>,
}

/// Who may do what a role says (LR-05).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceRoleBinding {
    /// Who, any of them.
    pub subjects: Vec<Subject>,
    /// The role, in the same namespace.
    pub role_ref: Option<RoleRef>,
    /// Whether the binding is enforced.
    pub mode: EnforcementMode,
}

/// Who: all members that are set must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Subject {
    /// The peer's identity, or `*`.
    pub user: String,
    /// The caller's group.
    pub group: String,
    /// Properties of the caller.
    pub properties: BTreeMap<String, String>,
    /// Groups.
    pub groups: Vec<String>,
    /// None of these groups.
    pub not_groups: Vec<String>,
    /// Names.
    pub names: Vec<String>,
    /// None of these names.
    pub not_names: Vec<String>,
    /// Namespaces.
    pub namespaces: Vec<String>,
    /// None of these namespaces.
    pub not_namespaces: Vec<String>,
    /// Addresses.
    pub ips: Vec<String>,
    /// None of these addresses.
    pub not_ips: Vec<String>,
}

/// The role of a binding.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RoleRef {
    /// `ServiceRole`.
    pub kind: String,
    /// Its name.
    pub name: String,
}

impl Validate for RbacConfig {
    fn validate(&self, out: &mut Findings) {
        if out.subject().name != SINGLETON {
            out.at_root("metadata", |out| out.error("name", "the configuration must be named \"default\""));
        }
        for (mode, target, field) in [
            (RbacMode::OnWithInclusion, &self.inclusion, "inclusion"),
            (RbacMode::OnWithExclusion, &self.exclusion, "exclusion"),
        ] {
            if self.mode == mode && target.is_none() {
                out.error(field, format!("{field} cannot be missing in this mode"));
            }
        }
    }
}

impl Validate for ClusterRbacConfig {
    fn validate(&self, out: &mut Findings) {
        self.0.validate(out);
    }
}

impl Validate for ServiceRole {
    fn validate(&self, out: &mut Findings) {
        if self.rules.is_empty() {
            out.error("rules", "at least 1 rule must be specified");
        }
        for (index, rule) in self.rules.iter().enumerate() {
            out.item("rules", index, |out| {
                if rule.services.is_empty() {
                    out.error("services", "at least 1 service must be specified");
                }
                for (field, list) in [("ports", &rule.ports), ("notPorts", &rule.not_ports)] {
                    for (index, port) in list.iter().enumerate() {
                        out.check(&format!("{field}[{index}]"), check::port(*port));
                    }
                }
                for (index, constraint) in rule.constraints.iter().enumerate() {
                    if constraint.key.is_empty() {
                        out.error(&format!("constraints[{index}].key"), "the key must not be empty");
                    }
                    if constraint.values.is_empty() {
                        out.error(
                            &format!("constraints[{index}].values"),
                            "at least 1 value must be specified",
                        );
                    }
                }
            });
        }
    }
}

impl Validate for ServiceRoleBinding {
    fn validate(&self, out: &mut Findings) {
        if self.subjects.is_empty() {
            out.error("subjects", "at least 1 subject must be specified");
        }
        for (index, subject) in self.subjects.iter().enumerate() {
            if *subject == Subject::default() {
                out.error(&format!("subjects[{index}]"), "user, group or properties must be specified");
            }
        }
        let Some(role) = &self.role_ref else {
            out.error("roleRef", "must be specified");
            return;
        };
        if role.kind != "ServiceRole" {
            out.error("roleRef.kind", format!("must be \"ServiceRole\", found {:?}", role.kind));
        }
        if role.name.is_empty() {
            out.error("roleRef.name", "must not be empty");
        }
    }
}
