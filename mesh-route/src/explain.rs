//! Why a request goes where it goes: a pure function on the model that decides.
//!
//! `explain` asks the same table and the same predicates as [`SelectRouteLayer`](crate::SelectRouteLayer), but keeps
//! what the fast path throws away: every rule before the one that takes the request, with the first predicate that
//! did not hold and the value that it saw.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use mesh_core::{ClusterName, ConnInfo};
use rand::SeedableRng as _;
use rand::rngs::SmallRng;

use crate::balance::{Balancer, Choice, Cursors};
use crate::canary::CanaryStatus;
use crate::cluster::Cluster;
use crate::hash_policy::HashPolicy;
use crate::request_view::RequestView;
use crate::route::{ActionKind, Route, Unmet};
use crate::table::RouteTable;

/// Where a request goes and why.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// The port that picked the virtual hosts; `None` for hosts that answer at any port.
    pub port: Option<u16>,
    /// The virtual host that answers to the authority; `None` when none does.
    pub virtual_host: Option<String>,
    /// The rules before the one that takes the request, in order.
    pub passed_over: Vec<PassedOver>,
    /// The rule that takes the request; `None` is 404 `NR`.
    pub route: Option<Arc<Route>>,
    /// What is done with the request.
    pub decision: Decision,
    /// The key by which the destination picks one of its endpoints; `None` where it goes by none.
    pub endpoint_key: Option<EndpointKey>,
}

/// The key of a request for a destination with consistent hashing (DR-LB02).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointKey {
    /// Where it is.
    pub policy: HashPolicy,
    /// Its number; `None` when the request has none, so that an endpoint is picked by chance, or by the cookie that the
    /// client is given.
    pub hash: Option<u64>,
    /// The endpoint that it picks now; `None` without a key, and when none is available.
    pub endpoint: Option<SocketAddr>,
}

/// A rule that did not take the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedOver {
    /// Its name.
    pub route: String,
    /// Its first predicate that did not hold.
    pub unmet: Unmet,
}

/// What is done with a request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Decision {
    /// No route takes it: 404 `NR`.
    NotFound,
    /// It is sent to one of these.
    Forward {
        /// Every destination with its weight; with a canary, its share now.
        destinations: Vec<(u32, ClusterName, Option<Arc<Cluster>>)>,
        /// Index of the one that it is sent to.
        chosen: usize,
        /// What makes it that one.
        by: ChosenBy,
        /// Where the rollout of the canary stands, which is one of the two.
        canary: Option<Box<CanaryStatus>>,
    },
    /// It is answered with another place to go.
    Redirect {
        /// The status.
        status: u16,
        /// The place.
        location: String,
    },
    /// It is answered directly.
    DirectResponse {
        /// The status.
        status: u16,
    },
}

/// What makes a request go to one destination of several.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChosenBy {
    /// The seed.
    Draw,
    /// This key, whatever the seed (VS-R05).
    Key(HashPolicy),
    /// The seed, because the request does not have this key.
    DrawWithout(HashPolicy),
}

/// Explains where `table` sends a request that arrives on `conn`; `seed` stands for the random draw.
#[must_use]
pub fn explain(table: &RouteTable, request: &RequestView<'_>, conn: &ConnInfo, seed: u64) -> Explanation {
    let lookup = table.lookup(request, conn);
    let mut passed_over = Vec::new();
    let mut route = None;
    match lookup.virtual_host {
        None => route = table.unknown().cloned(),
        Some(virtual_host) => {
            for candidate in virtual_host.routes() {
                match candidate.matcher().explain(request) {
                    None => {
                        route = Some(Arc::clone(candidate));
                        break;
                    }
                    Some(unmet) => passed_over.push(PassedOver { route: candidate.name().to_owned(), unmet }),
                }
            }
        }
    }
    let decision = route.as_ref().map_or(Decision::NotFound, |route| decide(route, request, conn, seed));
    let endpoint_key = match &decision {
        Decision::Forward { destinations, chosen, .. } => destinations
            .get(*chosen)
            .and_then(|(.., cluster)| endpoint_key(cluster.as_deref()?, request, conn)),
        _ => None,
    };
    Explanation {
        port: lookup.port,
        virtual_host: lookup.virtual_host.map(|host| host.name().to_owned()),
        passed_over,
        route,
        decision,
        endpoint_key,
    }
}

fn endpoint_key(cluster: &Cluster, request: &RequestView<'_>, conn: &ConnInfo) -> Option<EndpointKey> {
    let policy = cluster.spec().hash_policy.as_deref()?.clone();
    let hash = policy.hash(request, conn);
    let pick = |balancer: Arc<Balancer>| {
        let choice = Choice { hash: Some(hash?), ..Choice::default() };
        // A key leaves nothing to chance.
        let mut rng = SmallRng::seed_from_u64(0);
        let picked = balancer.pick(&choice, &mut Cursors::new(0), &mut rng, mesh_core::clock::now);
        picked.map(|endpoint| endpoint.addr())
    };
    let endpoint = cluster.balancer().and_then(pick);
    Some(EndpointKey { policy, hash, endpoint })
}

fn decide(route: &Route, request: &RequestView<'_>, conn: &ConnInfo, seed: u64) -> Decision {
    match &route.action().kind {
        ActionKind::Forward(forward) => {
            let key = forward.sticks_by(request, conn);
            let by = match &forward.sticky {
                None => ChosenBy::Draw,
                Some(sticky) if key.is_some() => ChosenBy::Key(HashPolicy::clone(sticky)),
                Some(sticky) => ChosenBy::DrawWithout(HashPolicy::clone(sticky)),
            };
            let picked = forward.choose(key, &mut SmallRng::seed_from_u64(seed));
            let destinations: Vec<_> = forward.destinations.iter().collect();
            let chosen = destinations.iter().position(|(_, to)| std::ptr::eq(*to, picked)).unwrap_or(0);
            let split = forward.canary.as_ref();
            let weight = |at, written| split.and_then(|split| split.weight(at)).unwrap_or(written);
            let destinations = (0..)
                .zip(destinations)
                .map(|(at, (written, to))| (weight(at, written), to.name.clone(), to.cluster.clone()))
                .collect();
            let canary = split.and_then(|split| split.rollout()).map(|rollout| Box::new(rollout.status()));
            Decision::Forward { destinations, chosen, by, canary }
        }
        ActionKind::Redirect(redirect) => Decision::Redirect {
            status: redirect.code.as_u16(),
            location: redirect.location(request, crate::redirect::arrived_at(request, conn)),
        },
        ActionKind::DirectResponse(direct) => Decision::DirectResponse { status: direct.status.as_u16() },
    }
}

/// One line for each rule, as a person would read it.
impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.virtual_host {
            Some(name) => writeln!(f, "virtual host {name}")?,
            None => writeln!(f, "no virtual host answers to this authority")?,
        }
        for passed in &self.passed_over {
            write!(f, "  {}: not taken, {} does not hold", passed.route, passed.unmet.predicate)?;
            match &passed.unmet.seen {
                Some(seen) => writeln!(f, " (saw {seen:?})")?,
                None => writeln!(f, " (absent)")?,
            }
        }
        if let Some(route) = &self.route {
            writeln!(f, "  {}: taken, {}", route.name(), route.matcher())?;
        }
        match &self.decision {
            Decision::NotFound => writeln!(f, "  404 NR route_not_found"),
            Decision::Forward { destinations, chosen, by, canary } => {
                for (index, (weight, name, cluster)) in destinations.iter().enumerate() {
                    let mark = if index == *chosen { "->" } else { "  " };
                    let known = if cluster.is_some() { "" } else { " (not known: 503 NC)" };
                    writeln!(f, "  {mark} {weight:>3} {name}{known}")?;
                }
                if let Some(canary) = canary {
                    writeln!(f, "     canary {}: {} %, {}", canary.spec.name, canary.share, canary.phase)?;
                }
                match by {
                    ChosenBy::Draw => {}
                    ChosenBy::Key(key) => writeln!(f, "     by its key {key}")?,
                    ChosenBy::DrawWithout(key) => writeln!(f, "     by a draw, for want of the key {key}")?,
                }
                match &self.endpoint_key {
                    None => Ok(()),
                    Some(EndpointKey { policy, endpoint: Some(endpoint), .. }) => {
                        writeln!(f, "     at {endpoint} by its key {policy}")
                    }
                    Some(EndpointKey { policy, .. }) => {
                        writeln!(f, "     at an endpoint by chance, for want of the key {policy}")
                    }
                }
            }
            Decision::Redirect { status, location } => writeln!(f, "  {status} {location}"),
            Decision::DirectResponse { status } => writeln!(f, "  {status} direct response"),
        }
    }
}

#[cfg(feature = "istio")]
impl Explanation {
    /// The explanation as `/explain` shows it, with the policies that hold for the rule that takes the request and for each
    /// of its destinations.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        use serde_json::json;

        use crate::dump::policies;
        let unmet = |unmet: &Unmet| json!({"predicate": unmet.predicate, "saw": unmet.seen});
        let decision = match &self.decision {
            Decision::NotFound => json!({"status": 404, "flags": "NR", "details": "route_not_found"}),
            Decision::Forward { destinations, chosen, by, canary } => {
                let to: Vec<_> = destinations
                    .iter()
                    .enumerate()
                    .map(|(index, (weight, name, cluster))| {
                        let endpoints = cluster.as_ref().map(|cluster| cluster.describe_endpoints());
                        json!({
                            "cluster": name.as_str(),
                            "subset": name.subset(),
                            "host": name.host(),
                            "weight": weight,
                            "chosen": index == *chosen,
                            "known": cluster.is_some(),
                            "endpoints": endpoints,
                            "policies": cluster.as_ref().map(|cluster| policies::of_cluster(cluster.spec())),
                        })
                    })
                    .collect();
                let sticky = match by {
                    ChosenBy::Draw => serde_json::Value::Null,
                    ChosenBy::Key(key) => json!({"key": key.to_string(), "present": true}),
                    ChosenBy::DrawWithout(key) => json!({"key": key.to_string(), "present": false}),
                };
                let endpoint_key = self.endpoint_key.as_ref().map(|key| {
                    json!({
                        "key": key.policy.to_string(),
                        "present": key.hash.is_some(),
                        "hash": key.hash.map(|hash| format!("{hash:016x}")),
                        "endpoint": key.endpoint.map(|endpoint| endpoint.to_string()),
                    })
                });
                let canary = canary.as_ref().map(|canary| {
                    json!({
                        "name": &*canary.spec.name,
                        "share": canary.share,
                        "phase": canary.phase.to_string(),
                    })
                });
                json!({"forward": to, "sticky": sticky, "endpoint_key": endpoint_key, "canary": canary})
            }
            Decision::Redirect { status, location } => json!({"status": status, "location": location}),
            Decision::DirectResponse { status } => json!({"status": status, "details": "direct_response"}),
        };
        json!({
            "port": self.port,
            "virtual_host": self.virtual_host,
            "passed_over": self.passed_over.iter().map(|passed| json!({
                "route": passed.route,
                "first_failing": unmet(&passed.unmet),
            })).collect::<Vec<_>>(),
            "route": self.route.as_ref().map(|route| json!({
                "name": route.name(),
                "match": route.matcher().to_string(),
                "policies": policies::of_route(route),
            })),
            "decision": decision,
        })
    }
}
