//! From an accepted connection to its upstream and back: what [`dispatch`](crate::dispatch()) is to requests.
//!
//! In this order: the route, the weighted destination (chosen once), the pick of an endpoint, the limit on connections,
//! which is exact, the connection, the copying. What fails before there is an upstream resets the downstream, so that
//! its client does not take it for an orderly end, and is reported with Envoy's flags. Whether the connection could be
//! made is told to outlier detection.
//!
//! A connection may live for weeks, so once its endpoint is picked it holds nothing of the configuration: neither the
//! snapshot nor the cluster, only its places in their counters.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh_core::server::{Expect, L4, L4Conn, SecuredConn};
use mesh_core::{ConnInfo, Pinned, ResponseFlags, Slot, Spoken};
use tokio::io::{AsyncRead, AsyncWrite};

use super::relay::{Limits, Meter, relay};
use super::{TcpDestination, TcpRouteTable};
use crate::balance::Choice;
use crate::cluster::{BalancerKind, Cluster, Discovery, PoolSettings};
use crate::connect::{Opened, open};
use crate::endpoint::{Endpoint, InFlight};
use crate::outlier::{Observation, Watch};
use crate::pool;
use crate::runtime::ClusterRuntime;
use crate::shard::Shard;

/// Forwards connections by a [`TcpRouteTable`]. Cloning shares the shard.
///
/// It is the L4 side of a listener ([`Server::listen_l4`](mesh_core::server::Server::listen_l4)); build one per worker
/// with a [`Shard`] of the worker's own, which may be that of [`dispatch`](crate::dispatch()).
#[derive(Clone)]
pub struct TcpDispatch {
    table: Slot<TcpRouteTable>,
    shard: Arc<Shard>,
    observer: Option<Observer>,
}

type Observer = Arc<dyn Fn(&ConnInfo, &TcpReport) + Send + Sync>;

/// What became of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TcpReport {
    /// The route that took it; `None` when none did (`NR`).
    pub route: Option<Arc<str>>,
    /// The cluster that was chosen.
    pub cluster: Option<Arc<str>>,
    /// The endpoint that was picked.
    pub upstream: Option<SocketAddr>,
    /// Our end of the connection to it.
    pub upstream_local: Option<SocketAddr>,
    /// The server name that the client asked for.
    pub sni: Option<Box<str>>,
    /// What the proxy did to it, in Envoy's codes; none for a connection that came to its own end.
    pub flags: ResponseFlags,
    /// Why there is no connection to the endpoint.
    pub transport_failure: Option<String>,
    /// Bytes from the downstream.
    pub received_bytes: u64,
    /// Bytes to the downstream.
    pub sent_bytes: u64,
    /// From the beginning to the end.
    pub duration: Duration,
}

/// What became of a connection's TLS before it came here.
#[derive(Clone, Copy)]
enum Tls {
    /// Nothing: it goes on as it came, if it is TLS at all.
    AsItIs,
    /// It was ended.
    Ended,
}

/// An endpoint that was picked, and what its connection holds.
struct Picked {
    endpoint: Arc<Endpoint>,
    settings: PoolSettings,
    /// Told whether there is a connection, as in Envoy: what becomes of it later says nothing.
    watch: Option<Watch>,
    _slot: pool::Slot,
    _in_flight: InFlight,
}

/// What a connection that was made counts as.
const MADE: Observation = Observation::Status(200);

impl TcpDispatch {
    /// Forwards by this table.
    #[must_use]
    pub fn new(table: Slot<TcpRouteTable>, shard: Arc<Shard>) -> Self {
        Self { table, shard, observer: None }
    }

    /// Tells `observer` of every connection, when it has ended: for an access log. Called on the worker, so it must not
    /// block.
    #[must_use]
    pub fn on_end(mut self, observer: impl Fn(&ConnInfo, &TcpReport) + Send + Sync + 'static) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// Forwards one connection to its end, or until `cut` completes. `sni` is the server name of its TLS.
    pub async fn forward<T>(
        &self,
        conn: &ConnInfo,
        sni: Option<Box<str>>,
        snapshot: Option<Pinned>,
        io: T,
        cut: impl Future<Output = ()>,
    ) -> TcpReport
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        self.run(conn, sni, snapshot, Tls::AsItIs, io, cut).await.0
    }

    /// [`forward`](Self::forward), and the downstream if there was no upstream for it.
    async fn run<T>(
        &self,
        conn: &ConnInfo,
        sni: Option<Box<str>>,
        snapshot: Option<Pinned>,
        tls: Tls,
        io: T,
        cut: impl Future<Output = ()>,
    ) -> (TcpReport, Option<T>)
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let meter = Meter::new();
        let mut report = TcpReport { sni, ..TcpReport::default() };
        let picked = self.pick(conn, snapshot.as_ref(), tls, &mut report);
        drop(snapshot);
        let mut cut = pin!(cut);
        let left = match picked {
            Ok(mut picked) => {
                let watch = picked.watch.take();
                let target = picked.endpoint.target(Spoken::Bytes);
                let connected = tokio::select! {
                    connected = open(&self.shard, &target, &picked.settings) => {
                        let seen = match &connected {
                            Ok(_) => Some(MADE),
                            Err(error) => Observation::of_failure(error.kind()),
                        };
                        if let (Some(watch), Some(seen)) = (watch, seen) {
                            watch.tell(&picked.endpoint, seen);
                        }
                        connected.map_err(|error| {
                            report.transport_failure =
                                std::error::Error::source(&error).map(ToString::to_string);
                            error.flags()
                        })
                    }
                    () = cut.as_mut() => Err(super::relay::End::Cut.flags()),
                };
                match connected {
                    Ok(Opened { stream, local, .. }) => {
                        report.upstream_local = local;
                        let limits = Limits {
                            idle: picked.settings.tcp_idle_timeout,
                            duration: picked.settings.max_connection_duration,
                        };
                        report.flags = relay(io, stream, &meter, limits, cut).await.flags();
                        None
                    }
                    Err(flags) => {
                        report.flags = flags;
                        Some(io)
                    }
                }
            }
            Err(flags) => {
                report.flags = flags;
                Some(io)
            }
        };
        (report.received_bytes, report.sent_bytes) = (meter.received(), meter.sent());
        report.duration = meter.elapsed();
        tracing::debug!(peer = %conn.peer, %report, "connection ended");
        if let Some(observer) = &self.observer {
            observer(conn, &report);
        }
        (report, left)
    }

    fn pick(
        &self,
        conn: &ConnInfo,
        snapshot: Option<&Pinned>,
        tls: Tls,
        report: &mut TcpReport,
    ) -> Result<Picked, ResponseFlags> {
        let table = self.table.get_in(snapshot);
        let route = table
            .and_then(|table| match tls {
                Tls::AsItIs => table.select(conn, report.sni.as_deref()),
                Tls::Ended => table.select_within(conn, report.sni.as_deref()),
            })
            .ok_or(ResponseFlags::NO_ROUTE_FOUND)?;
        report.route = Some(route.name().into());
        let destination = route.destinations().pick(&mut self.shard.lock().rng);
        report.cluster = Some(destination.name.shared());
        let (cluster, runtime) = destination
            .cluster
            .as_ref()
            .and_then(|cluster| Some((cluster, cluster.runtime()?)))
            .ok_or(ResponseFlags::NO_CLUSTER_FOUND)?;
        let endpoint =
            self.endpoint(conn, destination, cluster, runtime).ok_or(ResponseFlags::NO_HEALTHY_UPSTREAM)?;
        report.upstream = Some(endpoint.addr());
        let settings = &cluster.spec().pool;
        let slot = pool::Slot::acquire(runtime, &endpoint, settings, false).ok_or_else(|| {
            runtime.overflows.fetch_add(1, Ordering::Relaxed);
            ResponseFlags::UPSTREAM_OVERFLOW
        })?;
        Ok(Picked {
            settings: settings.clone(),
            watch: Watch::of(cluster, runtime),
            _slot: slot,
            _in_flight: endpoint.start_request(),
            endpoint,
        })
    }

    fn endpoint(
        &self,
        conn: &ConnInfo,
        destination: &TcpDestination,
        cluster: &Cluster,
        runtime: &Arc<ClusterRuntime>,
    ) -> Option<Arc<Endpoint>> {
        let spec = cluster.spec();
        let original = conn.original_dst;
        match (&spec.discovery, spec.balancer) {
            (Discovery::OriginalDst, _) | (_, BalancerKind::Passthrough) => {
                original.map(|addr| runtime.endpoint(addr, &spec.tls))
            }
            (Discovery::OriginalDstPort(port), _) => {
                original.map(|addr| runtime.endpoint(SocketAddr::new(addr.ip(), *port), &spec.tls))
            }
            _ if destination.keeps_address => original.map(|addr| runtime.endpoint(addr, &spec.tls)),
            _ => {
                let hash = spec.hash_policy.as_ref().and_then(|policy| policy.hash_connection(conn));
                self.shard.pick(cluster, runtime, &Choice { hash, ..Choice::default() })
            }
        }
    }
}

impl L4 for TcpDispatch {
    fn expect(&self, info: &ConnInfo, snapshot: Option<&Pinned>) -> Expect {
        self.table.get_in(snapshot).map_or(Expect::Http, |table| table.expect(info))
    }

    fn serve(&self, accepted: L4Conn) -> impl Future<Output = ()> + Send + 'static {
        serve(self.clone(), accepted)
    }

    fn serve_secured(&self, accepted: SecuredConn) -> impl Future<Output = ()> + Send + 'static {
        let dispatch = self.clone();
        async move {
            let SecuredConn { io, conn, sni, snapshot, .. } = accepted;
            // Without an upstream it ends without TLS's notice of an end.
            dispatch.run(&Arc::clone(conn.info()), sni, snapshot, Tls::Ended, io, conn.cut()).await;
        }
    }
}

async fn serve(dispatch: TcpDispatch, mut accepted: L4Conn) {
    let (sni, snapshot) = (accepted.sni.take(), accepted.snapshot.take());
    let info = Arc::clone(accepted.conn.info());
    let (_, left) =
        dispatch.run(&info, sni, snapshot, Tls::AsItIs, &mut accepted.io, accepted.conn.cut()).await;
    if left.is_some() {
        accepted.reset();
    }
}

impl fmt::Debug for TcpDispatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpDispatch").field("table", &self.table).finish_non_exhaustive()
    }
}

/// `FLAGS route=… cluster=… upstream=… received=… sent=…`, where what is not known is left out.
impl fmt::Display for TcpReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.flags)?;
        for (name, value) in [
            ("route", self.route.as_deref()),
            ("cluster", self.cluster.as_deref()),
            ("sni", self.sni.as_deref()),
            ("failure", self.transport_failure.as_deref()),
        ] {
            if let Some(value) = value {
                write!(f, " {name}={value}")?;
            }
        }
        if let Some(upstream) = self.upstream {
            write!(f, " upstream={upstream}")?;
        }
        write!(f, " received={} sent={}", self.received_bytes, self.sent_bytes)
    }
}
