//! The rules of Istio's validators and of the schemas of its CRDs, each shown by a configuration of our own: accepted,
//! accepted with a warning, or refused, and at which field.
//!
//! Istio's own tables (`istio_validation.rs`) are samples of these rules; here every rule stands, by kind.
#![cfg(feature = "istio")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod authorization_policy;
mod destination_rule;
mod extensions;
mod gateway;
mod mesh_config;
mod metadata;
mod peer_authentication;
mod proxy_config;
mod request_authentication;
mod service_entry;
mod sidecar;
mod telemetry;
mod virtual_service;
mod workloads;

use mesh_core::diagnostics::{Diagnostics, Severity};
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};

/// What must be said of a configuration.
#[derive(Clone, Copy, Debug)]
enum Verdict {
    /// Nothing.
    Fine,
    /// A warning at this field, and no error.
    Warns(&'static str),
    /// An error at this field.
    Refused(&'static str),
}

use Verdict::{Fine, Refused, Warns};

const NETWORKING: &str = "networking.istio.io/v1";
const SECURITY: &str = "security.istio.io/v1";

/// Judges a resource of `kind` for each of `cases`, whose text stands for the `$` of `frame`, which is the spec.
fn judge(api_version: &str, kind: &str, frame: &str, cases: &[(&str, Verdict)]) {
    let wrong: Vec<String> = cases
        .iter()
        .filter_map(|(case, verdict)| {
            let spec = frame.replace('$', case);
            let document = format!(
                "apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: a, namespace: ns}}\nspec: {spec}\n"
            );
            let diags = load(&document);
            (!agrees(&diags, *verdict)).then(|| format!("{case}\n  expected {verdict:?}, found:\n{diags}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{} of {} rows of {kind}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

fn load(document: &str) -> Diagnostics {
    let file = SourceFile::new("a.yaml", document.to_owned());
    ResourceSet::load(&[file], &LoadOptions::default()).1
}

fn agrees(diags: &Diagnostics, verdict: Verdict) -> bool {
    let at = |severity, field: &str| {
        diags.iter().any(|found| {
            found.severity == severity
                && if field.is_empty() { found.path == "spec" } else { found.path.ends_with(field) }
        })
    };
    match verdict {
        Fine => diags.iter().next().is_none(),
        Warns(field) => !diags.has_errors() && at(Severity::Warning, field),
        Refused(field) => at(Severity::Error, field),
    }
}
