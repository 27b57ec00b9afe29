//! A connection that is being made, and whose it is.
//!
//! The request that began it waits for it. Left by that one, it goes on by itself within the connect timeout, and what
//! comes of it is still known: a connection is kept for the next request, and a failure is the endpoint's. Else one that
//! takes longer to fail than requests wait for it, a black hole behind a short timeout, would never be left out.

use std::pin::Pin;
use std::sync::Arc;

use mesh_core::Error;

use crate::balance::peak_ewma;
use crate::cluster::{BalancerKind, Cluster};
use crate::endpoint::Endpoint;
use crate::outlier::{Observation, Watch};
use crate::runtime::ClusterRuntime;

type Making<C> = Pin<Box<dyn Future<Output = Result<C, Error>> + Send>>;

/// A connection that a request makes.
pub(super) struct Dial<'a, C: Send + 'static> {
    making: Option<Making<C>>,
    /// What becomes of one that nobody has waited for.
    keep: fn(C),
    cluster: &'a Cluster,
    runtime: &'a Arc<ClusterRuntime>,
    endpoint: &'a Arc<Endpoint>,
}

impl<'a, C: Send + 'static> Dial<'a, C> {
    pub(super) fn new(
        cluster: &'a Cluster,
        runtime: &'a Arc<ClusterRuntime>,
        endpoint: &'a Arc<Endpoint>,
        making: impl Future<Output = Result<C, Error>> + Send + 'static,
        keep: fn(C),
    ) -> Self {
        Self { making: Some(Box::pin(making)), keep, cluster, runtime, endpoint }
    }

    /// The connection, or why there is none: whoever waits tells outlier detection.
    async fn made(&mut self) -> Result<C, Error> {
        let Some(making) = &mut self.making else { return std::future::pending().await };
        let made = making.await;
        self.making = None;
        made
    }
}

/// What comes of the connection that a request makes for itself; nothing without one.
pub(super) async fn made<C: Send + 'static>(dial: &mut Option<Dial<'_, C>>) -> Result<C, Error> {
    match dial {
        None => std::future::pending().await,
        Some(dial) => dial.made().await,
    }
}

impl<C: Send + 'static> Drop for Dial<'_, C> {
    fn drop(&mut self) {
        let Some(making) = self.making.take() else { return };
        let Ok(handle) = tokio::runtime::Handle::try_current() else { return };
        let keep = self.keep;
        // Nothing of the configuration: a dial may outlive it.
        let watch = Watch::of(self.cluster, self.runtime);
        let counts_latency = self.cluster.spec().balancer == BalancerKind::PeakEwma;
        let endpoint = Arc::clone(self.endpoint);
        handle.spawn(async move {
            let error = match making.await {
                Ok(connection) => return keep(connection),
                Err(error) => error,
            };
            let Some(seen) = Observation::of_failure(error.kind()) else { return };
            if counts_latency {
                endpoint.observe(peak_ewma::FAILED, mesh_core::clock::now());
            }
            if let Some(watch) = watch {
                watch.tell(&endpoint, seen);
            }
        });
    }
}
