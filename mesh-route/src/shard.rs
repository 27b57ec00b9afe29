//! What one worker owns: pools, balancer cursors, random numbers.
//!
//! A proxy has one shard per worker thread; a program that embeds [`dispatch`](crate::dispatch) has one per built
//! stack. The mutex is held for a few map operations and never across an await. In a proxy only the worker's own
//! thread takes it; embedded in a multi-threaded runtime, tasks of the same stack share it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use http::HeaderValue;
use mesh_core::{Connect, Originate};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::balance::{Balancer, Choice, Cursors};
use crate::cluster::Cluster;
use crate::endpoint::Endpoint;
use crate::lock_order::{Guard, Ordered, SHARD};
use crate::pool::{h1, h2};
use crate::runtime::ClusterRuntime;
use crate::timeout::Timers;

/// How often idle connections are looked through: so long may one stay open after its endpoint is gone.
const SWEEP: Duration = Duration::from_secs(1);

/// The state of one worker's dispatching.
#[derive(Debug)]
pub struct Shard {
    inner: Ordered<SHARD, Inner>,
    timers: Arc<Timers>,
    connector: Option<Arc<dyn Connect>>,
    originator: Option<Arc<dyn Originate>>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) rng: SmallRng,
    pub(crate) h1: HashMap<u64, h1::Pool, foldhash::fast::RandomState>,
    pub(crate) h2: HashMap<u64, h2::Pool, foldhash::fast::RandomState>,
    cursors: HashMap<u64, Cursors, foldhash::fast::RandomState>,
    sweeping: bool,
    /// The last number that [`Inner::millis`] wrote.
    millis: (u64, HeaderValue),
}

impl Inner {
    /// A number as the value of a header. Most requests have the same as the one before, and share its text.
    pub(crate) fn millis(&mut self, millis: u64) -> HeaderValue {
        if self.millis.0 != millis {
            self.millis = (millis, HeaderValue::from(millis));
        }
        self.millis.1.clone()
    }
}

impl Shard {
    /// A shard whose random numbers start from the operating system.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Self::seeded(rand::random())
    }

    /// A shard whose random numbers start from `seed`, so that its choices can be replayed.
    #[must_use]
    pub fn seeded(seed: u64) -> Arc<Self> {
        Self::make(seed, None, None)
    }

    /// A shard whose connections are made by `connector` in the place of TCP, whatever the cluster demands of their
    /// security.
    #[must_use]
    pub fn connecting_by(seed: u64, connector: Arc<dyn Connect>) -> Arc<Self> {
        Self::make(seed, Some(connector), None)
    }

    /// A shard whose connections are made by TCP and, where an endpoint asks for it, secured by `originator`. Without
    /// one, connections to such endpoints fail.
    #[must_use]
    pub fn securing_by(seed: u64, originator: Arc<dyn Originate>) -> Arc<Self> {
        Self::make(seed, None, Some(originator))
    }

    fn make(
        seed: u64,
        connector: Option<Arc<dyn Connect>>,
        originator: Option<Arc<dyn Originate>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            timers: Arc::default(),
            connector,
            originator,
            inner: Ordered::new(Inner {
                rng: SmallRng::seed_from_u64(seed),
                h1: HashMap::default(),
                h2: HashMap::default(),
                cursors: HashMap::default(),
                sweeping: false,
                millis: (0, HeaderValue::from_static("0")),
            }),
        })
    }

    pub(crate) fn connector(&self) -> Option<&Arc<dyn Connect>> {
        self.connector.as_ref()
    }

    pub(crate) fn originator(&self) -> Option<&Arc<dyn Originate>> {
        self.originator.as_ref()
    }

    /// The timers of its requests.
    pub(crate) fn timers(&self) -> &Arc<Timers> {
        &self.timers
    }

    #[cfg(test)]
    pub(crate) fn is_free(&self) -> bool {
        self.inner.is_free()
    }

    pub(crate) fn lock(&self) -> Guard<'_, Inner> {
        self.inner.lock()
    }

    /// An endpoint of the cluster; `None` when none is available.
    pub(crate) fn pick(
        &self,
        cluster: &Cluster,
        runtime: &ClusterRuntime,
        choice: &Choice<'_>,
    ) -> Option<Arc<Endpoint>> {
        runtime.let_return(mesh_core::clock::now);
        // The balancer is held for longer than the lock: it may have been replaced, and this be its last holder.
        let pick = |balancer: &Balancer| {
            let inner = &mut *self.lock();
            // Workers begin at different places, or each would send its first request to the same endpoint.
            let new = || Cursors::new(inner.rng.random_range(0..1 << 20));
            let cursors = inner.cursors.entry(runtime.id()).or_insert_with(new);
            balancer.pick(choice, cursors, &mut inner.rng, mesh_core::clock::now).cloned()
        };
        cluster.with_balancer(pick).flatten()
    }

    /// Starts looking through idle connections, once per shard, on the current runtime.
    pub(crate) fn sweep(self: &Arc<Self>) {
        let mut inner = self.lock();
        if !inner.sweeping {
            inner.sweeping = true;
            drop(inner);
            tokio::spawn(sweep(Arc::downgrade(self)));
        }
    }
}

async fn sweep(shard: Weak<Shard>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        let Some(shard) = shard.upgrade() else { return };
        let mut unjudged = Vec::new();
        {
            let inner = shard.lock();
            inner.h1.values().for_each(|pool| pool.unjudged(&mut unjudged));
            inner.h2.values().for_each(|pool| pool.unjudged(&mut unjudged));
        }
        for standing in unjudged {
            // What it finds is kept; the next sweep of the pools compares a number.
            if !standing.is_judged() {
                standing.holds();
                tokio::task::yield_now().await;
            }
        }
        let now = mesh_core::clock::now();
        let mut expired = (h1::Swept::default(), Vec::new());
        {
            let mut inner = shard.lock();
            inner.h1.retain(|_, pool| pool.sweep(now, &mut expired.0));
            inner.h2.retain(|_, pool| pool.sweep(now, &mut expired.1));
        }
        // Connections close outside the lock, and those that waited are dropped there.
        drop(expired);
    }
}
