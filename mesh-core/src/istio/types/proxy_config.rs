//! `networking.istio.io/v1beta1` ProxyConfig (PC-01).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::common::WorkloadSelector;
use super::target;
use crate::istio::findings::{Findings, Validate};

/// Settings of the proxy process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyConfig {
    /// The workloads.
    pub selector: Option<WorkloadSelector>,
    /// Worker threads; 0 is all cores, none is the CPU limit.
    pub concurrency: Option<i32>,
    /// Environment of the proxy.
    pub environment_variables: BTreeMap<String, String>,
    /// The proxy's image, which means nothing here.
    pub image: Option<ProxyImage>,
}

/// Which image a proxy runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyImage {
    /// `default`, `debug` or `distroless`.
    pub image_type: String,
}

impl Validate for ProxyConfig {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        target::workload_selector(out, self.selector.as_ref());
        if self.concurrency.is_some_and(|workers| workers < 0) {
            out.error("concurrency", "must be greater than or equal to 0");
        }
    }
}
