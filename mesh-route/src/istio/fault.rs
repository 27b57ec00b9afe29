//! `fault` of a VirtualService's rule (VS-F01 … VS-F04), and the annotation that says what it is drawn for.

use mesh_core::diagnostics::Diagnostics;
use mesh_core::istio::types::common::Percent;
use mesh_core::istio::types::virtual_service::{HttpFaultInjection, VirtualService};
use mesh_core::istio::{Metadata, Resource, ResourceSet};

use crate::fault::{Fault, FaultScope};
use crate::percentage::Percentage;

/// The annotation of a VirtualService: `per-request`, the default and what Istio does, or `per-try`.
const SCOPE: &str = super::annotations::FAULT_SCOPE;

/// The fault of a rule in a virtual service with this metadata. What Istio does not support is nothing, as in Istio; its
/// validators have said so.
pub(super) fn compile(injection: &HttpFaultInjection, meta: &Metadata) -> Option<Fault> {
    let mut fault = Fault::new();
    if let Some(delay) = &injection.delay
        && let Some(fixed) = delay.fixed_delay
    {
        fault = fault.delay(fixed.to_std(), share(delay.percentage, delay.percent));
    }
    if let Some(abort) = &injection.abort {
        let share = share(abort.percentage, abort.percent);
        let aborting = match (abort.http_status, abort.grpc_code()) {
            (Some(status), _) => u16::try_from(status).ok().and_then(|s| fault.abort_http(s, share).ok()),
            (None, Some(code)) => fault.abort_grpc(code, share).ok(),
            (None, None) => None,
        };
        fault = aborting.unwrap_or(fault);
    }
    fault.scope = scope(meta).ok()?;
    (fault.delay.is_some() || fault.abort.is_some()).then_some(fault)
}

/// The share of requests: `percentage`, else the deprecated whole percent, else none at all.
fn share(percentage: Option<Percent>, percent: i32) -> Percentage {
    percentage.map_or_else(
        || Percentage::from_percent(percent.into()),
        |Percent { value }| Percentage::from_percent(value),
    )
}

fn scope(meta: &Metadata) -> Result<FaultScope, &str> {
    match meta.annotations.get(SCOPE).map(String::as_str) {
        None | Some("per-request") => Ok(FaultScope::PerRequest),
        Some("per-try") => Ok(FaultScope::PerTry),
        Some(other) => Err(other),
    }
}

/// Says which annotations mean nothing.
pub(super) fn annotations(set: &ResourceSet, diags: &mut Diagnostics) {
    for resource in set.virtual_services() {
        let path = || format!("metadata.annotations[{SCOPE:?}]");
        match scope(&resource.meta) {
            Err(other) => {
                let message = format!("{other:?} is neither per-request nor per-try");
                diags.error_at(resource.doc, path(), message);
            }
            Ok(_) if !resource.meta.annotations.contains_key(SCOPE) => {}
            Ok(_) if resource.spec.hosts.is_empty() => {
                let message = "has no effect in a delegate: the virtual service that delegates says it";
                diags.warning_at(resource.doc, path(), message);
            }
            Ok(_) if !has_fault(resource, set) => {
                diags.warning_at(resource.doc, path(), "has no effect: no rule injects a fault");
            }
            Ok(_) => {}
        }
    }
}

/// Whether a rule injects a fault, or may take one from a delegate.
fn has_fault(resource: &Resource<VirtualService>, set: &ResourceSet) -> bool {
    let delegates = || set.virtual_services().iter().filter(|other| other.spec.hosts.is_empty());
    resource.spec.http.iter().any(|rule| {
        rule.fault.is_some()
            || (rule.delegate.is_some()
                && delegates().any(|other| other.spec.http.iter().any(|rule| rule.fault.is_some())))
    })
}
