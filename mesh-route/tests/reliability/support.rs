//! Stacks to break: by the builder, over sockets or over a network in memory, and what must hold when all is over.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Request, Response};
use http_body_util::BodyExt as _;
use mesh_core::{Body, ClusterName, Connect, ConnectTarget, Connecting, Error, Io, Slot};
use mesh_route::{
    Cluster, ClusterSpec, Clusters, Discovery, EndpointSpec, RouteBuilder, RouteTable, SelectRouteLayer,
    Shard, UpstreamProtocol, dispatch,
};
use mesh_testkit::scripted::Script;
use mesh_testkit::until;
use tokio::io::DuplexStream;
use tower::util::BoxCloneSyncService;
use tower::{ServiceBuilder, ServiceExt as _};

pub(crate) const BOTH: [UpstreamProtocol; 2] = [UpstreamProtocol::Http1, UpstreamProtocol::Http2];

pub(crate) type Client = BoxCloneSyncService<Request<Body>, Response<Body>, Error>;

/// A cluster of these endpoints.
pub(crate) fn cluster_of(addrs: &[SocketAddr], change: impl FnOnce(&mut ClusterSpec)) -> Arc<Cluster> {
    let endpoints = addrs.iter().map(|addr| EndpointSpec::new(*addr)).collect();
    let mut spec = ClusterSpec::new(ClusterName::custom("up"), Discovery::Static(endpoints));
    change(&mut spec);
    let cluster = Arc::new(Cluster::new(spec));
    Clusters::new().reconcile(std::slice::from_ref(&cluster));
    cluster
}

/// A stack with one route to the cluster, on this shard.
pub(crate) fn client_on(
    shard: Arc<Shard>,
    cluster: &Arc<Cluster>,
    route: impl FnOnce(RouteBuilder) -> RouteBuilder,
) -> Client {
    let route = route(RouteBuilder::new("all")).forward(Arc::clone(cluster)).unwrap();
    let table = RouteTable::builder().host("*", [route]).build().unwrap();
    let stack =
        ServiceBuilder::new().layer(SelectRouteLayer::new(Slot::fixed(table))).service(dispatch(shard));
    BoxCloneSyncService::new(stack)
}

/// A stack over sockets.
pub(crate) fn client(cluster: &Arc<Cluster>, route: impl FnOnce(RouteBuilder) -> RouteBuilder) -> Client {
    client_on(Shard::seeded(1), cluster, route)
}

pub(crate) fn get() -> Request<Body> {
    Request::get("http://up/").body(Body::empty()).unwrap()
}

/// What came of a request: `200 - up`, `503 UF …`; a body that breaks off is `200 cut`.
pub(crate) async fn outcome(client: &Client, request: Request<Body>) -> String {
    match client.clone().oneshot(request).await {
        Ok(response) => {
            let status = response.status().as_u16();
            match response.into_body().collect().await {
                Ok(body) => format!("{status} - {}", String::from_utf8_lossy(&body.to_bytes())),
                Err(error) => format!("{status} cut {}", error.flags()),
            }
        }
        Err(error) => format!("{} {} {}", error.status().as_u16(), error.flags(), error.details()),
    }
}

/// Nothing is in flight, and every connection that is counted is one that the upstreams have open.
pub(crate) async fn nothing_is_left(cluster: &Cluster, open: impl Fn() -> usize) {
    let runtime = cluster.runtime().unwrap();
    until("every count to be given back", async || {
        let endpoints = cluster.endpoints();
        let in_flight: u32 = endpoints.iter().map(|endpoint| endpoint.in_flight()).sum();
        let connections: u32 = endpoints.iter().map(|endpoint| endpoint.connections()).sum();
        (runtime.requests(), runtime.pending(), runtime.retries(), in_flight) == (0, 0, 0, 0)
            && runtime.connections() == connections
            && connections as usize == open()
    })
    .await;
}

/// Whoever is gone leaves no task behind.
pub(crate) struct Tasks(usize);

impl Tasks {
    /// Those that there are now.
    pub(crate) fn now() -> Self {
        Self(alive())
    }

    /// Waits until there are no more than there were.
    pub(crate) async fn are_back(self) {
        until("the tasks to end", async || alive() <= self.0).await;
    }
}

fn alive() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

/// A network in memory, in which virtual time passes only when nobody has anything to do. Endpoints are its hosts.
#[derive(Clone, Default)]
pub(crate) struct Network(Arc<Hosts>);

#[derive(Default)]
struct Hosts {
    hosts: Mutex<HashMap<SocketAddr, Host>>,
    dialled: Mutex<HashMap<SocketAddr, usize>>,
    dialling: AtomicUsize,
    most_dialling: AtomicUsize,
}

/// How a host takes a connection.
#[derive(Clone)]
pub(crate) enum Host {
    /// By serving it.
    Serves(Arc<dyn Fn(DuplexStream) + Send + Sync>),
    /// Not at all.
    Fails(io::ErrorKind),
    /// By this error of the operating system.
    FailsWith(i32),
    /// As another does, after this time.
    Late(Duration, Arc<Self>),
    /// Without an answer, ever.
    Silent,
}

impl Host {
    pub(crate) fn script(script: &Script, protocol: UpstreamProtocol) -> Self {
        let script = script.clone();
        Self::Serves(Arc::new(move |stream| {
            let script = script.clone();
            tokio::spawn(async move { script.serve(stream, protocol == UpstreamProtocol::Http2).await });
        }))
    }
}

impl Network {
    /// Adds a host; its address.
    pub(crate) fn host(&self, host: Host) -> SocketAddr {
        let mut hosts = self.0.hosts.lock().unwrap();
        let addr = SocketAddr::from(([10, 0, 0, 1], u16::try_from(hosts.len() + 1).unwrap()));
        hosts.insert(addr, host);
        addr
    }

    /// Puts another host in the place of one.
    pub(crate) fn replace(&self, addr: SocketAddr, host: Host) {
        self.0.hosts.lock().unwrap().insert(addr, host);
    }

    /// Forgets every host.
    pub(crate) fn clear(&self) {
        self.0.hosts.lock().unwrap().clear();
    }

    /// How often an address was connected to.
    pub(crate) fn dialled(&self, addr: SocketAddr) -> usize {
        self.0.dialled.lock().unwrap().get(&addr).copied().unwrap_or(0)
    }

    /// The most connections that were being made at once.
    pub(crate) fn most_dialling(&self) -> usize {
        self.0.most_dialling.load(Ordering::SeqCst)
    }

    pub(crate) fn shard(&self, seed: u64) -> Arc<Shard> {
        Shard::connecting_by(seed, Arc::new(self.clone()))
    }

    /// A stack over this network.
    pub(crate) fn client(
        &self,
        cluster: &Arc<Cluster>,
        route: impl FnOnce(RouteBuilder) -> RouteBuilder,
    ) -> Client {
        client_on(self.shard(1), cluster, route)
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Network")
    }
}

struct Dialling(Arc<Hosts>);

impl Drop for Dialling {
    fn drop(&mut self) {
        self.0.dialling.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Connect for Network {
    fn connect(&self, target: &ConnectTarget) -> Connecting {
        let (hosts, addr) = (Arc::clone(&self.0), target.addr);
        Box::pin(async move {
            *hosts.dialled.lock().unwrap().entry(addr).or_default() += 1;
            let now = hosts.dialling.fetch_add(1, Ordering::SeqCst) + 1;
            hosts.most_dialling.fetch_max(now, Ordering::SeqCst);
            let _dialling = Dialling(Arc::clone(&hosts));
            // A round trip, in which others may come.
            tokio::task::yield_now().await;
            let mut host = hosts.hosts.lock().unwrap().get(&addr).cloned();
            while let Some(Host::Late(time, then)) = host {
                tokio::time::sleep(time).await;
                host = Some(Host::clone(&then));
            }
            match host {
                Some(Host::Late(..)) => unreachable!("it was waited for"),
                Some(Host::Serves(serve)) => {
                    let (ours, theirs) = tokio::io::duplex(64 * 1024);
                    serve(theirs);
                    Ok(Box::new(ours) as Box<dyn Io>)
                }
                Some(Host::Fails(kind)) => Err(kind.into()),
                Some(Host::FailsWith(code)) => Err(io::Error::from_raw_os_error(code)),
                Some(Host::Silent) => std::future::pending().await,
                None => Err(io::ErrorKind::HostUnreachable.into()),
            }
        })
    }
}
