//! `extensions.istio.io` WasmPlugin (WA-01, WA-02), and what TrafficExtension has in common with it.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::Value;

use super::check::{self, Checked};
use super::common::{PolicyTargetReference, PortSelector, WorkloadSelector};
use super::target;
use super::telemetry::WorkloadMode;
use crate::istio::findings::{Findings, Validate};

const MAX_NAME_LEN: usize = 256;
const MAX_SECRET_LEN: usize = 253;
const MAX_ENV_VALUE_LEN: usize = 2048;

/// A WebAssembly filter of the proxy.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WasmPlugin {
    /// The workloads; not together with a target reference.
    pub selector: Option<WorkloadSelector>,
    /// The one target; the older form of `target_refs`.
    pub target_ref: Option<PolicyTargetReference>,
    /// The targets.
    pub target_refs: Vec<PolicyTargetReference>,
    /// Where the module is: `oci://` (also without a scheme), `file://`, `http[s]://`. Required.
    pub url: String,
    /// The module's digest: 64 lowercase hexadecimal digits.
    pub sha256: String,
    /// When the module is pulled again.
    pub image_pull_policy: PullPolicy,
    /// The secret with the registry's credentials.
    pub image_pull_secret: Option<String>,
    /// Not implemented by Istio.
    pub verification_key: String,
    /// Passed to the plugin as it is.
    pub plugin_config: Option<Value>,
    /// The plugin's name (`rootID`).
    pub plugin_name: Option<String>,
    /// Where in the chain it stands.
    pub phase: PluginPhase,
    /// Higher comes first within a phase; default 0.
    pub priority: Option<i32>,
    /// What happens when the plugin fails.
    pub fail_strategy: FailStrategy,
    /// The virtual machine.
    pub vm_config: Option<VmConfig>,
    /// Which traffic passes it; none is all.
    #[serde(rename = "match")]
    pub matches: Vec<TrafficSelector>,
    /// HTTP or network filter.
    #[serde(rename = "type")]
    pub plugin_type: PluginType,
}

/// When an image is pulled again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum PullPolicy {
    /// `Always` for the tag `latest`, else `IfNotPresent`.
    #[default]
    #[serde(rename = "UNSPECIFIED_POLICY")]
    Unspecified,
    /// Once.
    IfNotPresent,
    /// Whenever the configuration changes.
    Always,
}

/// Where in the chain an extension stands (WA-01).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub enum PluginPhase {
    /// Just before the router.
    #[default]
    #[serde(rename = "UNSPECIFIED_PHASE", alias = "EXECUTION_PHASE_UNSPECIFIED")]
    Unspecified,
    /// Before authentication.
    #[serde(rename = "AUTHN", alias = "EXECUTION_PHASE_AUTHN")]
    Authn,
    /// Between authentication and authorization.
    #[serde(rename = "AUTHZ", alias = "EXECUTION_PHASE_AUTHZ")]
    Authz,
    /// Between authorization and statistics.
    #[serde(rename = "STATS", alias = "EXECUTION_PHASE_STATS")]
    Stats,
}

/// What happens when an extension fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum FailStrategy {
    /// The request is answered with 5xx; the default.
    #[default]
    FailClose,
    /// The request passes.
    FailOpen,
    /// The plugin is loaded anew.
    FailReload,
}

/// HTTP or network filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PluginType {
    /// HTTP.
    #[default]
    UnspecifiedPluginType,
    /// HTTP filter.
    Http,
    /// Network filter.
    Network,
}

/// The virtual machine of an extension.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VmConfig {
    /// Its environment, unique by name.
    pub env: Vec<EnvVar>,
}

/// A variable of the environment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EnvVar {
    /// The name.
    pub name: String,
    /// Where the value comes from.
    pub value_from: EnvValueSource,
    /// The value; with INLINE alone.
    pub value: String,
}

/// Where the value of a variable comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum EnvValueSource {
    /// From the resource; the default.
    #[default]
    Inline,
    /// From the proxy's environment.
    Host,
}

/// Which traffic passes an extension: by side and by port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TrafficSelector {
    /// The side; default both.
    pub mode: WorkloadMode,
    /// The destination ports, any of them; none is all.
    pub ports: Vec<PortSelector>,
}

/// What WasmPlugin and the `wasm` of a TrafficExtension have in common.
pub(crate) struct Module<'a> {
    pub(crate) url: &'a str,
    pub(crate) sha256: &'a str,
    pub(crate) image_pull_secret: Option<&'a str>,
    pub(crate) plugin_name: Option<&'a str>,
    pub(crate) plugin_config: Option<&'a Value>,
    pub(crate) vm_config: Option<&'a VmConfig>,
}

impl Validate for WasmPlugin {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        target::aim(out, self.selector.as_ref(), self.target_ref.as_ref(), &self.target_refs);
        let module = Module {
            url: &self.url,
            sha256: &self.sha256,
            image_pull_secret: self.image_pull_secret.as_deref(),
            plugin_name: self.plugin_name.as_deref(),
            plugin_config: self.plugin_config.as_ref(),
            vm_config: self.vm_config.as_ref(),
        };
        module.validate(out);
        traffic(out, &self.matches);
    }
}

impl Validate for Module<'_> {
    fn validate(&self, out: &mut Findings) {
        if self.url.is_empty() {
            out.error("url", "url field needs to be set");
        } else {
            out.check("url", module_url(self.url));
        }
        if !self.sha256.is_empty() {
            out.check("sha256", sha256(self.sha256));
        }
        text(out, "imagePullSecret", self.image_pull_secret, MAX_SECRET_LEN);
        text(out, "pluginName", self.plugin_name, MAX_NAME_LEN);
        if self.plugin_config.is_some_and(|config| !config.is_object() && !config.is_null()) {
            out.error("pluginConfig", "must be an object");
        }
        let mut names = BTreeSet::new();
        for (index, variable) in self.vm_config.iter().flat_map(|vm| &vm.env).enumerate() {
            out.item("vmConfig.env", index, |out| {
                if variable.name.is_empty() {
                    out.error("name", "spec.vmConfig.env invalid: a name must not be empty");
                } else if variable.name.len() > MAX_NAME_LEN {
                    out.error("name", format!("must be at most {MAX_NAME_LEN} characters long"));
                } else if !names.insert(variable.name.as_str()) {
                    out.error("name", format!("duplicate env {:?}", variable.name));
                }
                if variable.value_from != EnvValueSource::Inline && !variable.value.is_empty() {
                    out.error("value", "value may only be set when valueFrom is INLINE");
                }
                if variable.value.len() > MAX_ENV_VALUE_LEN {
                    out.error("value", format!("must be at most {MAX_ENV_VALUE_LEN} characters long"));
                }
            });
        }
    }
}

/// Judges `match`.
pub(crate) fn traffic(out: &mut Findings, selectors: &[TrafficSelector]) {
    for (index, selector) in selectors.iter().enumerate() {
        let mut seen = BTreeSet::new();
        for (at, port) in selector.ports.iter().enumerate() {
            let field = format!("match[{index}].ports[{at}].number");
            if check::port(port.number).is_err() {
                out.error(
                    &field,
                    format!("spec.Match[{index}].Ports[{at}] is out of range: {}", port.number),
                );
            } else if !seen.insert(port.number) {
                out.error(&field, format!("port {} is listed twice", port.number));
            }
        }
    }
}

/// A name that may be absent but not empty.
fn text(out: &mut Findings, field: &str, value: Option<&str>, max: usize) {
    match value {
        Some("") => out.error(field, format!("{field} must not be empty, if it is set")),
        Some(value) if value.len() > max => {
            out.error(field, format!("{field} field must be less than {max} characters long"));
        }
        _ => {}
    }
}

fn sha256(digest: &str) -> Checked {
    if digest.len() != 64 {
        return Err("sha256 field must be 64 characters long".to_owned());
    }
    if digest.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
        return Ok(());
    }
    Err("sha256 field must match [a-f0-9]{64} pattern".to_owned())
}

/// A URL of one of the known schemes; without any it is an OCI reference. As for Go, `host:port/path` without `//` has
/// the scheme `host`.
fn module_url(url: &str) -> Checked {
    if url.bytes().any(|byte| byte.is_ascii_control() || byte == b' ') {
        return Err(format!("{url:?} is not a valid url"));
    }
    let scheme = url.split_once(':').map(|(scheme, _)| scheme).filter(|scheme| {
        scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
    });
    let known = ["http", "https", "file", "oci"];
    match scheme {
        Some(scheme) if known.iter().any(|known| known.eq_ignore_ascii_case(scheme)) => Ok(()),
        Some(scheme) => Err(format!(
            "url contains unsupported scheme: {scheme}; it must be one of http, https, file, oci"
        )),
        None => {
            let authority = url.split('/').next().unwrap_or_default();
            if authority.is_empty() || authority.parse::<http::uri::Authority>().is_ok() {
                Ok(())
            } else {
                Err(format!("{url:?} is not a valid url"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wa_02_urls() {
        for url in ["http://a/b", "oci://r:5000/a:latest", "file:///a.wasm", "r.io/a/b:tag", "OCI://a", "/a"]
        {
            assert_eq!(module_url(url), Ok(()), "{url}");
        }
        for url in ["fake://a", "r:5000/a", "a b", "http://a\n"] {
            assert!(module_url(url).is_err(), "{url}");
        }
    }
}
