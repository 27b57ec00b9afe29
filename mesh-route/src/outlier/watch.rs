//! Outlier detection of one endpoint, for who may outlive the configuration: a connection that lives for weeks, or one
//! that is still being made when its request is gone.

use std::sync::Arc;

use super::{Observation, OutlierDetection};
use crate::cluster::Cluster;
use crate::endpoint::Endpoint;
use crate::runtime::ClusterRuntime;

/// Whom outlier detection is told of. It holds the cluster's counters, and nothing else of the cluster.
pub(crate) struct Watch {
    config: OutlierDetection,
    runtime: Arc<ClusterRuntime>,
    /// How many there are in the cluster.
    endpoints: usize,
}

impl Watch {
    /// `None` where nobody is ever left out.
    pub(crate) fn of(cluster: &Cluster, runtime: &Arc<ClusterRuntime>) -> Option<Self> {
        let config = cluster.spec().outlier_detection.as_deref()?.clone();
        Some(Self { config, runtime: Arc::clone(runtime), endpoints: cluster.endpoints().len() })
    }

    /// Tells what was seen of an endpoint.
    pub(crate) fn tell(self, endpoint: &Endpoint, seen: Observation) {
        self.runtime.observe(&self.config, endpoint, seen, || self.endpoints);
    }
}
