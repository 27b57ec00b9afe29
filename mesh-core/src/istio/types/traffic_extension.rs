//! `extensions.istio.io` TrafficExtension (WA-03).

use serde::Deserialize;
use serde_json::Value;

use super::common::{PolicyTargetReference, WorkloadSelector};
use super::target;
use super::wasm_plugin::{
    FailStrategy, Module, PluginPhase, PluginType, PullPolicy, TrafficSelector, VmConfig, traffic,
};
use crate::istio::findings::{Findings, Validate};

/// The longest Lua script, in bytes.
const MAX_LUA_LEN: usize = 64 * 1024;

/// A WebAssembly or Lua filter of the proxy.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TrafficExtension {
    /// The workloads; not together with a target reference.
    pub selector: Option<WorkloadSelector>,
    /// The targets.
    pub target_refs: Vec<PolicyTargetReference>,
    /// Where in the chain it stands.
    pub phase: PluginPhase,
    /// Higher comes first within a phase; default 0.
    pub priority: Option<i32>,
    /// Which traffic passes it; none is all.
    #[serde(rename = "match")]
    pub matches: Vec<TrafficSelector>,
    /// A WebAssembly filter; exactly one of this and `lua`.
    pub wasm: Option<WasmConfig>,
    /// A Lua filter.
    pub lua: Option<LuaConfig>,
}

/// A WebAssembly filter; the fields mean what they mean in [`WasmPlugin`](super::wasm_plugin::WasmPlugin).
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WasmConfig {
    /// Where the module is; required.
    pub url: String,
    /// The module's digest.
    pub sha256: String,
    /// When the module is pulled again.
    pub image_pull_policy: PullPolicy,
    /// The secret with the registry's credentials.
    pub image_pull_secret: Option<String>,
    /// Not implemented by Istio.
    pub verification_key: String,
    /// Passed to the plugin as it is.
    pub plugin_config: Option<Value>,
    /// The plugin's name.
    pub plugin_name: Option<String>,
    /// What happens when the plugin fails.
    pub fail_strategy: FailStrategy,
    /// The virtual machine.
    pub vm_config: Option<VmConfig>,
    /// HTTP or network filter.
    #[serde(rename = "type")]
    pub plugin_type: PluginType,
}

/// A Lua filter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LuaConfig {
    /// The script; at most 64 KiB.
    pub inline_code: String,
}

impl Validate for TrafficExtension {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        target::aim(out, self.selector.as_ref(), None, &self.target_refs);
        if self.wasm.is_some() == self.lua.is_some() {
            out.error("", "exactly one of wasm or lua must be set");
        }
        if let Some(wasm) = &self.wasm {
            let module = Module {
                url: &wasm.url,
                sha256: &wasm.sha256,
                image_pull_secret: wasm.image_pull_secret.as_deref(),
                plugin_name: wasm.plugin_name.as_deref(),
                plugin_config: wasm.plugin_config.as_ref(),
                vm_config: wasm.vm_config.as_ref(),
            };
            out.within("wasm", |out| module.validate(out));
        }
        if let Some(lua) = &self.lua {
            if lua.inline_code.is_empty() {
                out.error("lua.inlineCode", "lua.inlineCode must not be empty");
            } else if lua.inline_code.len() > MAX_LUA_LEN {
                out.error("lua.inlineCode", "lua.inlineCode exceeds maximum size of 64KB");
            }
        }
        traffic(out, &self.matches);
    }
}
