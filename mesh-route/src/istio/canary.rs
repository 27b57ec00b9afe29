//! The annotation by which a rule's second version is rolled out as a canary.
//!
//! `mesh.rs/canary` on a VirtualService holds `KEY=VALUE` pairs between semicolons:
//!
//! | key | value | default |
//! |---|---|---|
//! | `canary` | the subset, or the host, of the destination that is the canary | must be there |
//! | `rule` | the name of the HTTP rule | the only one with several destinations |
//! | `steps` | growing shares in percent, the last is 100 | `5,20,50,100` |
//! | `interval` | how often the counts are looked at | `10s` |
//! | `min-duration` | the shortest time of a step | `1m` |
//! | `min-requests` | the fewest requests of the canary in a step | `100` |
//! | `tolerated` | the share of failures that is good enough in any case | `1%` |
//! | `latency-factor` | how many times as long the canary may take | `1.5` |
//! | `alpha` | how likely a good canary may be rolled back, by each test | `1%` |
//! | `beta` | how likely a worse one may pass a step, by each test | `1%` |
//! | `run` | any text; another one begins the rollout anew | nothing |
//!
//! The rule has exactly two destinations, whose weights hold no more. What defines the rollout are these values, the
//! hosts, ports and subsets of the destinations, and the labels of the subsets: a change of any of them begins anew.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::diagnostics::Diagnostics;
use mesh_core::istio::Resource;
use mesh_core::istio::types::virtual_service::{HttpRoute, HttpRouteDestination, VirtualService};

use super::annotations::{self, CANARY};
use super::delegate;
use super::mesh::Mesh;
use crate::canary::{CanaryPolicy, CanarySpec, InvalidCanary};
use crate::route::Forward;

/// What an annotation says.
struct Wanted {
    rule: Option<String>,
    canary: String,
    run: String,
    interval: Duration,
    policy: CanaryPolicy,
}

/// Says which annotations cannot be understood, or have no rule to hold for.
pub(super) fn check(mesh: &Mesh<'_>, diags: &mut Diagnostics) {
    for resource in mesh.set.virtual_services() {
        let Some(text) = resource.meta.annotations.get(CANARY) else { continue };
        let at = format!("metadata.annotations[{CANARY:?}]");
        let wanted = match parse(text) {
            Ok(wanted) => wanted,
            Err(reason) => {
                diags.error_at(resource.doc, at, reason);
                continue;
            }
        };
        if resource.spec.hosts.is_empty() {
            let message = "has no effect in a delegate: the virtual service that delegates says it";
            diags.warning_at(resource.doc, at, message);
            continue;
        }
        // What is wrong with delegates is said where they are compiled.
        let rules = delegate::rules(mesh, resource, &mut Diagnostics::default());
        let mut of_name = rules.iter().filter(|(_, rule)| wanted.is_for(rule));
        let (path, rule) = match (of_name.next(), of_name.next(), &wanted.rule) {
            (Some((path, rule)), None, _) => (path, rule),
            (None, _, Some(name)) => {
                diags.error_at(resource.doc, at, format!("no HTTP rule is called {name:?}"));
                continue;
            }
            (None, _, None) => {
                diags.error_at(resource.doc, at, "no HTTP rule has two destinations");
                continue;
            }
            (Some(_), Some(_), Some(name)) => {
                diags.error_at(resource.doc, at, format!("several HTTP rules are called {name:?}"));
                continue;
            }
            (Some(_), Some(_), None) => {
                diags.error_at(resource.doc, at, "several HTTP rules have two destinations: add rule=NAME");
                continue;
            }
        };
        if rule.route.len() != 2 {
            let message = InvalidCanary::Destinations(rule.route.len()).to_string();
            diags.error_at(resource.doc, format!("{path}.route"), message);
        } else if let Err(reason) = wanted.place(mesh, resource, rule) {
            diags.error_at(resource.doc, at, reason);
        }
    }
}

/// Rolls out what the annotation says of this rule. What is wrong with it was reported.
pub(super) fn apply(
    mesh: &Mesh<'_>,
    resource: &Resource<VirtualService>,
    rule: &HttpRoute,
    forward: Forward,
) -> Forward {
    let Some(wanted) = wanted(resource).filter(|wanted| wanted.is_for(rule)) else { return forward };
    let ([one, two], Ok(at)) = (&rule.route[..], wanted.place(mesh, resource, rule)) else { return forward };
    let (stable, canary) = if at == 0 { (two, one) } else { (one, two) };
    let called = |destination| version(mesh, resource, destination);
    let meta = &resource.meta;
    let name = match rule.name.as_str() {
        "" => format!("{}/{}", meta.namespace, meta.name),
        rule => format!("{}/{}/{rule}", meta.namespace, meta.name),
    };
    let spec = CanarySpec {
        run: wanted.run.into(),
        interval: wanted.interval,
        ..CanarySpec::new(name, called(stable), called(canary), wanted.policy)
    };
    forward.clone().with_canary(Arc::new(spec), at).unwrap_or(forward)
}

fn wanted(resource: &Resource<VirtualService>) -> Option<Wanted> {
    parse(resource.meta.annotations.get(CANARY)?).ok()
}

impl Wanted {
    fn is_for(&self, rule: &HttpRoute) -> bool {
        match &self.rule {
            Some(name) => rule.name == *name,
            None => rule.route.len() > 1,
        }
    }

    /// The place of the canary among the destinations of its rule.
    fn place(
        &self,
        mesh: &Mesh<'_>,
        resource: &Resource<VirtualService>,
        rule: &HttpRoute,
    ) -> Result<usize, String> {
        let host = mesh.resolve(&self.canary, &resource.meta.namespace);
        let is_it = |destination: &&HttpRouteDestination| {
            destination.destination.as_ref().is_some_and(|to| {
                to.subset == self.canary || mesh.resolve(&to.host, &resource.meta.namespace) == host
            })
        };
        let mut places = (0..).zip(&rule.route).filter(|(_, destination)| is_it(destination));
        match (places.next(), places.next()) {
            (Some((at, _)), None) => Ok(at),
            (None, _) => Err(format!("canary={}: no destination has this subset or host", self.canary)),
            (Some(_), Some(_)) => {
                Err(format!("canary={}: both destinations have this subset or host", self.canary))
            }
        }
    }
}

/// What a version is: host, port, subset with its labels.
fn version(mesh: &Mesh<'_>, resource: &Resource<VirtualService>, to: &HttpRouteDestination) -> String {
    let Some(to) = &to.destination else { return String::new() };
    let mut text = mesh.resolve(&to.host, &resource.meta.namespace);
    let rule = mesh.service(&text).and_then(|service| mesh.rule(service));
    if let Some(port) = &to.port {
        text.push_str(&format!(":{}", port.number));
    }
    if !to.subset.is_empty() {
        text.push_str(&format!(" {}", to.subset));
        for (key, value) in rule.iter().filter_map(|rule| rule.subset(&to.subset)).flat_map(|s| &s.labels) {
            text.push_str(&format!(" {key}={value}"));
        }
    }
    text
}

fn parse(text: &str) -> Result<Wanted, String> {
    let mut spec = CanarySpec::new("", "", "", CanaryPolicy::default());
    let (mut rule, mut canary, mut run) = (None, None, None);
    let mut seen = Vec::new();
    for pair in text.split(';').map(str::trim).filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| format!("{pair}: KEY=VALUE is wanted"))?;
        let (key, value) = (key.trim(), value.trim());
        if value.is_empty() {
            return Err(format!("{key}: is empty"));
        }
        if seen.contains(&key) {
            return Err(format!("{key}: is there twice"));
        }
        seen.push(key);
        let of = |reason: String| format!("{key}: {reason}");
        match key {
            "rule" => rule = Some(value.to_owned()),
            "canary" => canary = Some(value.to_owned()),
            "run" => run = Some(value.to_owned()),
            "steps" => spec.policy.steps = steps(value).map_err(of)?,
            "interval" => spec.interval = annotations::duration(value).map_err(of)?,
            "min-duration" => spec.policy.min_duration = annotations::duration(value).map_err(of)?,
            "min-requests" => spec.policy.min_requests = number(value).map_err(of)?,
            "tolerated" => spec.policy.tolerated = share(value).map_err(of)?,
            "alpha" => spec.policy.alpha = share(value).map_err(of)?,
            "beta" => spec.policy.beta = share(value).map_err(of)?,
            "latency-factor" => spec.policy.latency_factor = number(value).map_err(of)?,
            _ => {
                return Err(format!(
                    "{key}: is unknown; known are rule, canary, steps, interval, min-duration, min-requests, \
                     tolerated, latency-factor, alpha, beta, run"
                ));
            }
        }
    }
    spec.validate().map_err(|error| error.to_string())?;
    let canary = canary.ok_or("canary: is missing; it names the subset or host of the new version")?;
    let CanarySpec { interval, policy, .. } = spec;
    Ok(Wanted { rule, canary, run: run.unwrap_or_default(), interval, policy })
}

fn steps(value: &str) -> Result<Vec<u8>, String> {
    value.split(',').map(|step| number(step.trim())).collect()
}

fn number<T: std::str::FromStr>(value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{value:?} is no such number"))
}

/// A percentage as a share.
fn share(value: &str) -> Result<f64, String> {
    let percent = value.strip_suffix('%').ok_or_else(|| format!("{value:?} is no percentage, like 1%"))?;
    Ok(number::<f64>(percent.trim())? / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_read() {
        let text = "rule=all; canary = v2;steps=1, 10,100; interval=1s; min-duration=5m; min-requests=50; \
                    tolerated=0.5%; latency-factor=2; alpha=2%; beta=3%; run=b; ";
        let wanted = parse(text).unwrap();
        assert_eq!((wanted.rule.as_deref(), &*wanted.canary, &*wanted.run), (Some("all"), "v2", "b"));
        assert_eq!(wanted.interval, Duration::from_secs(1));
        let policy = CanaryPolicy {
            steps: vec![1, 10, 100],
            alpha: 0.02,
            beta: 0.03,
            tolerated: 0.005,
            min_requests: 50,
            min_duration: Duration::from_secs(300),
            latency_factor: 2.0,
        };
        assert_eq!(wanted.policy, policy);
        let least = parse("canary=v2").unwrap();
        assert_eq!((least.policy, least.interval), (CanaryPolicy::default(), Duration::from_secs(10)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, reason) in [
            ("", "canary: is missing"),
            ("v2", "v2: KEY=VALUE is wanted"),
            ("canary=", "canary: is empty"),
            ("canary=v2; canary=v3", "canary: is there twice"),
            ("canary=v2; step=5", "step: is unknown; known are rule"),
            ("canary=v2; steps=5,x", "steps: \"x\" is no such number"),
            ("canary=v2; steps=5,50", "steps: the shares grow"),
            ("canary=v2; interval=0s", "interval: a time above zero"),
            ("canary=v2; min-requests=0", "min-requests: at least 1"),
            ("canary=v2; tolerated=0.01", "tolerated: \"0.01\" is no percentage"),
            ("canary=v2; tolerated=60%", "tolerated: between"),
            ("canary=v2; latency-factor=1", "latency-factor: a number above 1"),
            ("canary=v2; latency-factor=NaN", "latency-factor: a number above 1"),
            ("canary=v2; alpha=0%", "alpha, beta: a probability"),
        ] {
            let error = parse(text).map(|_| ()).unwrap_err();
            assert!(error.starts_with(reason), "{text}: {error}");
        }
    }
}
