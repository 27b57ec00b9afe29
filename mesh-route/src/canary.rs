//! Canaries: the share of a new version grows while it does as well as the stable one, and goes to nothing when not.
//!
//! An extension, off unless a rule asks for it. Four parts:
//!
//! - A [`CanarySpec`] is what configuration says: which of the two destinations of a rule is the canary, and how it is
//!   rolled out.
//! - The [`Controller`] decides. It is pure: counts and time are arguments, and what it decides is an [`Event`] with its
//!   evidence.
//! - A [`Rollout`] is what the process knows of one canary: its share, which every worker reads with each request, and
//!   what was counted of both versions. It is shared like the state of clusters, and outlives a reload that leaves its
//!   definition as it was.
//! - [`Canaries`] are all rollouts of the process, and drive them: [`Canaries::reconcile`] before a table is published,
//!   [`Canaries::run`] on a task that is no worker's, [`Canaries::status`] for whoever wants to see.
//!
//! **What is counted** is the end of a request, as its client sees it: after retries, and when the body has ended. It
//! failed if it was answered with 500 to 599, or with a gRPC status by which a server says that it failed (`UNKNOWN`,
//! `DEADLINE_EXCEEDED`, `UNIMPLEMENTED`, `INTERNAL`, `UNAVAILABLE`, `DATA_LOSS`: those that OpenTelemetry takes for
//! errors of a server), or if there was no whole answer: no healthy upstream, no known cluster, no connection, a reset, a
//! timeout. Not counted is what says nothing of a version: requests that a limit of ours refused, injected faults,
//! and whatever a client cancelled. The latency of a request that succeeded is the time from its arrival to the head of
//! its response.
//!
//! A version that hangs is therefore seen to fail only where a timeout of the rule ends its requests.
//!
//! **How long a rollout lives.** As long as its rule with an equal definition: the name of the rule, the versions, how it
//! is rolled out. Another definition begins anew, and so does the process: a restart begins at the first step. What was
//! rolled back stays so until the definition changes. Every process decides by what it has seen itself.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use mesh_core::ClusterName;
//! use mesh_route::canary::{Canaries, CanaryPolicy};
//! use mesh_route::{Cluster, ClusterSpec, Clusters, Discovery, EndpointSpec, RouteBuilder, RouteTable};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let version = |name, port| {
//!     let endpoints = Discovery::Static(vec![EndpointSpec::new(([127, 0, 0, 1], port).into())]);
//!     Arc::new(Cluster::new(ClusterSpec::new(ClusterName::custom(name), endpoints)))
//! };
//! let route = RouteBuilder::new("reviews")
//!     .timeout(Duration::from_secs(5))
//!     .canary(Duration::from_secs(10), CanaryPolicy::default())
//!     .split([(100, version("v1", 9081)), (0, version("v2", 9082))])?;
//! let table = RouteTable::builder().host("reviews", [route]).build()?;
//!
//! // Before the table is published, each time.
//! let canaries = Canaries::new();
//! canaries.reconcile(&table);
//! Clusters::new().reconcile(table.clusters());
//! tokio::spawn(canaries.clone().run());
//! for canary in canaries.status() {
//!     assert_eq!((&*canary.spec.name, canary.share), ("reviews", 5));
//! }
//! # Ok(())
//! # }
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(example()).unwrap();
//! ```

mod controller;
mod ending;
mod registry;
mod rollout;
mod spec;
mod split;

pub use controller::{CanaryPolicy, Cause, Controller, Event, Measured, Phase};
pub use registry::Canaries;
pub use rollout::{CanaryStatus, Rollout, Totals};
pub use spec::{CanarySpec, InvalidCanary};
pub(crate) use split::Split;
