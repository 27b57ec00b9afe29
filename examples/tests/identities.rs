//! Whose connections requests go over: never those of another identity (D11), nor those to a server that is no longer
//! trusted (D9).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use mesh_core::server::{DownstreamTls, ListenerSpec, Server, WithTls};
use mesh_core::{
    Body, ClientTls, ClusterName, Credential, Direction, LocalReplyLayer, RequestContext, Slot, UpstreamTls,
};
use mesh_route::{
    Cluster, ClusterSpec, Clusters, Discovery, EndpointSpec, HeadersLayer, RouteBuilder, RouteTable,
    SelectRouteLayer, Shard, UpstreamProtocol, dispatch,
};
use mesh_testkit::until;
use mesh_tls::ca::Authority;
use mesh_tls::{Acceptor, Connector, Credentials, Inbound, InboundTls, Material, Materials, TrustBundle};
use rustls::crypto::CryptoProvider;
use serde_json::{Value, json};
use tower::{Service, ServiceBuilder, ServiceExt as _};

const HOUR: Duration = Duration::from_secs(3600);

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn authority() -> Authority {
    Authority::new("cluster.local".parse().unwrap(), SystemTime::now(), 24 * HOUR).unwrap()
}

fn bundle(ca: &Authority) -> Arc<TrustBundle> {
    Arc::new(TrustBundle::new([ca.root().clone()]).unwrap())
}

fn workload(ca: &Authority, name: &str) -> Materials {
    let id = format!("spiffe://cluster.local/ns/default/sa/{name}").parse().unwrap();
    let identity = ca.issue(&id, SystemTime::now(), HOUR).unwrap().identity(&provider()).unwrap();
    Materials::new(Material { identity: Some(identity), bundle: bundle(ca) })
}

/// A server behind mutual TLS that says who asked, for whom, and over which connection.
fn server(own: &Materials) -> (Server, SocketAddr) {
    let acceptor = Acceptor::mutual(own.clone(), provider()).unwrap();
    let inbound = Inbound::new(acceptor, Slot::fixed(InboundTls::all(DownstreamTls::Strict)));
    let server = Server::builder().start().unwrap();
    let spec = ListenerSpec::new("inbound", "127.0.0.1:0".parse().unwrap(), Direction::Inbound);
    let stack = tower::service_fn(async |request: Request<Body>| {
        let context = request.extensions().get::<RequestContext>().unwrap();
        let conn = context.conn();
        let told = json!({
            "who": conn.identity.as_ref().unwrap().principal(),
            "sni": conn.sni.as_deref(),
            "connection": conn.peer.to_string(),
            "version": format!("{:?}", request.version()),
        });
        Ok::<_, Infallible>(Response::new(Body::full(told.to_string())))
    });
    let listened = server.listen_with(spec, move |_| WithTls::new(inbound.clone()), move |_| stack).unwrap();
    (server, listened)
}

#[derive(Debug)]
struct Accounts(HashMap<String, Materials>);

impl Credentials for Accounts {
    fn find(&self, credential: &Credential) -> Option<Materials> {
        let Credential::Secret(name) = credential else { return None };
        self.0.get(name).cloned()
    }
}

type Stack = tower::util::BoxCloneService<Request<Body>, Response<Body>, Infallible>;

fn stack(clusters: &[Arc<Cluster>], shard: &Arc<Shard>) -> Stack {
    let mut table = RouteTable::builder();
    for cluster in clusters {
        let route = RouteBuilder::new("all").forward(Arc::clone(cluster)).unwrap();
        table = table.host(cluster.name().as_str(), [route]);
    }
    let stack = ServiceBuilder::new()
        .layer(LocalReplyLayer::new(Direction::Outbound))
        .layer(SelectRouteLayer::new(Slot::fixed(table.build().unwrap())))
        .layer(HeadersLayer::new())
        .service(dispatch(Arc::clone(shard)));
    Stack::new(stack)
}

async fn ask(stack: &mut Stack, host: &str) -> (StatusCode, Value) {
    let request = Request::get("/").header("host", host).body(Body::empty()).unwrap();
    let answer = stack.ready().await.unwrap().call(request).await.unwrap();
    let status = answer.status();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

/// How a cluster reaches the one endpoint, in one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Way {
    account: &'static str,
    sni: String,
    sans: Vec<String>,
    http2: bool,
}

impl Way {
    /// Each of the clusters is another way, and each has another account in every generation.
    fn of(generation: usize, at: usize) -> Self {
        let mut sans = vec!["spiffe://cluster.local/ns/default/sa/server".to_owned()];
        if at / 4 % 2 == 1 {
            sans.push("spiffe://cluster.local/ns/default/sa/other".to_owned());
        }
        Self {
            account: ["a", "b"][(generation + at) % 2],
            sni: format!("server-{}", at / 2 % 2),
            sans,
            http2: at / 8 % 2 == 1,
        }
    }

    fn cluster(&self, name: &str, endpoint: SocketAddr) -> Arc<Cluster> {
        let endpoints = Discovery::Static(vec![EndpointSpec::new(endpoint)]);
        let mut spec = ClusterSpec::new(ClusterName::custom(name), endpoints);
        spec.protocol = if self.http2 { UpstreamProtocol::Http2 } else { UpstreamProtocol::Http1 };
        spec.tls = UpstreamTls::Tls(Arc::new(ClientTls {
            credential: Credential::Secret(self.account.to_owned()),
            sni: Some(self.sni.clone()),
            subject_alt_names: self.sans.clone(),
            ..ClientTls::default()
        }));
        Arc::new(Cluster::new(spec))
    }
}

/// 100,000 requests of two service accounts to one endpoint, by sixteen clusters that differ in identity, server name,
/// expected names and protocol, and that change their identity with each of fifty generations.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d11_no_request_goes_over_a_connection_of_another_identity() {
    const CLUSTERS: usize = 16;
    const GENERATIONS: usize = 50;
    const REQUESTS: usize = 2_000;
    const TASKS: usize = 32;
    let ca = authority();
    let (_server, endpoint) = server(&workload(&ca, "server"));
    let accounts = ["a", "b"].map(|name| (name.to_owned(), workload(&ca, name)));
    let connector = Connector::new(Materials::none(), provider())
        .credentials(Arc::new(Accounts(HashMap::from(accounts))));
    let shard = Shard::securing_by(1, Arc::new(connector));
    let registry = Clusters::new();
    let (mut asked, mut connections, mut wrong) = (0, 0, Vec::new());
    for generation in 0..GENERATIONS {
        let clusters: Vec<_> =
            (0..CLUSTERS).map(|at| Way::of(generation, at).cluster(&format!("c{at}"), endpoint)).collect();
        registry.reconcile(&clusters);
        let stack = stack(&clusters, &shard);
        let next = Arc::new(AtomicUsize::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..TASKS {
            let (mut stack, next) = (stack.clone(), Arc::clone(&next));
            tasks.spawn(async move {
                let mut seen = Vec::new();
                loop {
                    let turn = next.fetch_add(1, Ordering::Relaxed);
                    if turn >= REQUESTS {
                        return seen;
                    }
                    let at = turn % CLUSTERS;
                    seen.push((at, ask(&mut stack, &format!("c{at}")).await));
                }
            });
        }
        // A connection is told by its port, which another may have in a later generation.
        let mut ways: HashMap<String, Way> = HashMap::new();
        for (at, (status, told)) in tasks.join_all().await.into_iter().flatten() {
            asked += 1;
            let way = Way::of(generation, at);
            let version = if way.http2 { "HTTP/2.0" } else { "HTTP/1.1" };
            let expected = json!({
                "who": format!("cluster.local/ns/default/sa/{}", way.account),
                "sni": way.sni,
                "connection": told["connection"],
                "version": version,
            });
            let before = ways.entry(told["connection"].to_string()).or_insert_with(|| way.clone());
            if status != StatusCode::OK || told != expected || *before != way {
                wrong.push((generation, at, status, told));
            }
        }
        connections += ways.len();
    }
    assert_eq!(wrong, []);
    assert_eq!(asked, GENERATIONS * REQUESTS);
    // Connections were kept, and each cluster had some of its own.
    assert!((CLUSTERS * GENERATIONS..asked / 10).contains(&connections), "{connections} connections");
}

#[tokio::test]
async fn d9_no_request_goes_to_a_server_that_is_no_longer_trusted() {
    let ca = authority();
    let own = workload(&ca, "client");
    for http2 in [false, true] {
        let (server_ca, theirs) = (authority(), workload(&ca, "server"));
        let (server, endpoint) = server(&theirs);
        let shard = Shard::securing_by(1, Arc::new(Connector::new(own.clone(), provider())));
        let endpoints = Discovery::Static(vec![EndpointSpec::new(endpoint)]);
        let mut spec = ClusterSpec::new(ClusterName::custom("server"), endpoints);
        spec.protocol = if http2 { UpstreamProtocol::Http2 } else { UpstreamProtocol::Http1 };
        spec.tls =
            UpstreamTls::Tls(Arc::new(ClientTls { sni: Some("server".to_owned()), ..ClientTls::default() }));
        let cluster = Arc::new(Cluster::new(spec));
        Clusters::new().reconcile(std::slice::from_ref(&cluster));
        let mut stack = stack(&[cluster], &shard);
        let trust = |bundle: Arc<TrustBundle>| own.store(Material { bundle, ..Material::clone(&own.load()) });

        let (status, first) = ask(&mut stack, "server").await;
        assert_eq!(status, StatusCode::OK);
        // The same authorities, read anew: nothing changes.
        trust(bundle(&ca));
        assert_eq!(ask(&mut stack, "server").await.1["connection"], first["connection"]);
        // One authority more: judged again, and kept.
        trust(Arc::new(TrustBundle::new([ca.root().clone(), server_ca.root().clone()]).unwrap()));
        assert_eq!(ask(&mut stack, "server").await.1["connection"], first["connection"]);
        // The server's own is gone: the very next request does not go there, and the connection does not stay open.
        trust(bundle(&server_ca));
        let (status, _) = ask(&mut stack, "server").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "http2: {http2}");
        let until_closed = mesh_core::clock::now();
        until("the connection to close", async || server.status()[0].open == 0).await;
        assert!(until_closed.elapsed() < Duration::from_secs(3));
        // Trusted again, it is connected to again.
        trust(bundle(&ca));
        let (status, again) = ask(&mut stack, "server").await;
        assert_eq!(status, StatusCode::OK);
        assert_ne!(again["connection"], first["connection"]);
        // An idle connection is given up without a request.
        trust(bundle(&server_ca));
        until("the idle connection to close", async || server.status()[0].open == 0).await;
        trust(bundle(&ca));
        // Under another name the connections of the old one are not used.
        let (_, before) = ask(&mut stack, "server").await;
        let renamed = workload(&ca, "other").load();
        own.store(Material::clone(&renamed));
        let (_, after) = ask(&mut stack, "server").await;
        assert_eq!(after["who"], "cluster.local/ns/default/sa/other");
        assert_ne!(before["connection"], after["connection"]);
        own.store(Material::clone(&workload(&ca, "client").load()));
    }
}
