//! `security.istio.io` PeerAuthentication (PA-01 … PA-03).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::check;
use super::common::WorkloadSelector;
use super::target;
use crate::istio::findings::{Findings, Validate};

/// Whether workloads accept plain text, mTLS or both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerAuthentication {
    /// The workloads; none is the namespace, or the mesh when it is the root namespace's.
    pub selector: Option<WorkloadSelector>,
    /// The mode; none inherits.
    pub mtls: Option<MutualTls>,
    /// The mode by **workload** port; only with a selector.
    pub port_level_mtls: Option<BTreeMap<u32, MutualTls>>,
}

/// A mode, wrapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MutualTls {
    /// The mode.
    pub mode: MutualTlsMode,
}

/// What a workload accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum MutualTlsMode {
    /// Inherited from the level above; PERMISSIVE at the top.
    #[default]
    Unset,
    /// Plain text alone.
    Disable,
    /// Both, told apart by the first bytes.
    Permissive,
    /// mTLS alone.
    Strict,
}

impl Validate for PeerAuthentication {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        target::workload_selector(out, self.selector.as_ref());
        let Some(ports) = &self.port_level_mtls else { return };
        if self.selector.as_ref().is_none_or(|selector| selector.match_labels.is_empty()) {
            out.error("portLevelMtls", "needs a selector: a mesh or namespace policy has no port level mTLS");
        }
        if ports.is_empty() {
            out.error("portLevelMtls", "must have at least one element, if defined");
        }
        for port in ports.keys() {
            out.check(&format!("portLevelMtls.{port}"), check::port(*port));
        }
    }
}
