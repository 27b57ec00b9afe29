//! What a rule says of retries, with the defaults of the mesh below it.

use mesh_core::Compat;
use mesh_core::diagnostics::Diagnostics;
use mesh_core::istio::Resource;
use mesh_core::istio::types::virtual_service::{HttpRetry, VirtualService};

use super::annotations;
use super::mesh::Mesh;
use crate::retry::{Backoff, RetryOn, RetryPolicy};

/// The policy of a route that says nothing (VS-Y01): that of the mesh, else Istio's.
pub(super) fn default(mesh: &Mesh<'_>) -> RetryPolicy {
    let istio = of_istio(mesh);
    match &mesh.config.default_http_retry_policy {
        // What the mesh says was judged when it was loaded.
        Some(retries) => policy(retries, &istio).unwrap_or(istio),
        None => istio,
    }
}

/// What a policy does not say, wherever it stands: a rule's does not inherit from the mesh's.
fn of_istio(mesh: &Mesh<'_>) -> RetryPolicy {
    match mesh.cx.compat {
        Compat::V1_1 => RetryPolicy::istio_1_1_default(),
        _ => RetryPolicy::istio_default(),
    }
}

/// The policy of a rule; `None` after an error was reported.
pub(super) fn of_rule(
    mesh: &Mesh<'_>,
    resource: &Resource<VirtualService>,
    path: &str,
    retries: Option<&HttpRetry>,
    diags: &mut Diagnostics,
) -> Option<RetryPolicy> {
    let mut compiled = match retries {
        None => default(mesh),
        Some(retries) => match policy(retries, &of_istio(mesh)) {
            Ok(policy) => policy,
            Err(error) => {
                diags.error_at(resource.doc, format!("{path}.retries.retryOn"), error.to_string());
                return None;
            }
        },
    };
    compiled.only_idempotent = resource
        .meta
        .annotations
        .get(annotations::RETRY)
        .is_some_and(|value| value == annotations::IDEMPOTENT_ONLY);
    Some(compiled)
}

fn policy(retries: &HttpRetry, default: &RetryPolicy) -> Result<RetryPolicy, crate::UnknownCondition> {
    let attempts = u32::try_from(retries.attempts).unwrap_or(0);
    if attempts == 0 {
        return Ok(RetryPolicy::never());
    }
    let on = if retries.retry_on.trim().is_empty() {
        default.on.clone()
    } else {
        RetryOn::parse(&retries.retry_on)?
    };
    let mut policy = RetryPolicy::new(attempts, on);
    policy.per_try_timeout =
        retries.per_try_timeout.map(|timeout| timeout.to_std()).filter(|timeout| !timeout.is_zero());
    if let Some(base) = retries.backoff {
        policy.backoff = Backoff::new(base.to_std());
    }
    policy.ignore_previous_hosts = retries.retry_ignore_previous_hosts.unwrap_or(true);
    policy.remote_localities = retries.retry_remote_localities.unwrap_or(false);
    Ok(policy)
}
