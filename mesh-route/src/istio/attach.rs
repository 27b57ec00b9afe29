//! Gateways of virtual services have to be there. Those of matches choose among them, and attach nothing (VS-02, VS-M13).

use std::collections::HashSet;

use mesh_core::diagnostics::{Diagnostics, Severity};
use mesh_core::istio::ResourceSet;

use super::http::{gateway_name, names_gateway};

/// Reports gateways that nobody defines, and matches whose gateways their virtual service is not attached to.
pub(super) fn check(set: &ResourceSet, diags: &mut Diagnostics) {
    are_there(set, diags);
    // A delegate is attached where its root is.
    for resource in set.virtual_services().iter().filter(|resource| !resource.spec.hosts.is_empty()) {
        let (spec, namespace) = (&resource.spec, &resource.meta.namespace);
        let http = spec.http.iter().map(|rule| rule.matches.iter().map(|m| &m.gateways).collect::<Vec<_>>());
        let tls = spec.tls.iter().map(|rule| rule.matches.iter().map(|m| &m.gateways).collect());
        let tcp = spec.tcp.iter().map(|rule| rule.matches.iter().map(|m| &m.gateways).collect());
        let rules = (http.enumerate().map(|(at, rule)| ("http", at, rule)))
            .chain(tls.enumerate().map(|(at, rule)| ("tls", at, rule)))
            .chain(tcp.enumerate().map(|(at, rule)| ("tcp", at, rule)));
        for (kind, at, matches) in rules {
            for (match_at, gateways) in matches.into_iter().enumerate().filter(|(_, names)| !names.is_empty())
            {
                let attached = gateways
                    .iter()
                    .any(|name| names_gateway(&spec.gateways, namespace, &[gateway_name(name, namespace)]));
                if !attached {
                    diags.warning_at(
                        resource.doc,
                        format!("spec.{kind}[{at}].match[{match_at}].gateways"),
                        "spec.gateways has none of these: the match takes nothing".to_owned(),
                    );
                }
            }
        }
    }
}

/// Istio's analyser says this too, with the same code.
fn are_there(set: &ResourceSet, diags: &mut Diagnostics) {
    let there: HashSet<_> = set
        .gateways()
        .iter()
        .map(|gateway| format!("{}/{}", gateway.meta.namespace, gateway.meta.name))
        .chain(["mesh".to_owned()])
        .collect();
    for resource in set.virtual_services() {
        for (at, named) in resource.spec.gateways.iter().enumerate() {
            let name = gateway_name(named, &resource.meta.namespace);
            if !there.contains(&name) {
                diags.report(
                    resource.doc,
                    Severity::Warning,
                    format!("spec.gateways[{at}]"),
                    format!("no gateway {name} is there: nothing is attached to it"),
                    Some("IST0101"),
                );
            }
        }
    }
}
