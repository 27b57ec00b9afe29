//! The layers in a program that speaks gRPC by tonic, without a proxy: below a tonic client, and around a tonic server.
//!
//! A client calls through [`dispatch`], which is its transport: routes, retries and timeouts are those of the table, and
//! what they answer themselves is a gRPC status. A server has the layers between its connections and its services, as
//! any tower layer. Code that a generator would make is written out here, so that the test needs none.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::uri::PathAndQuery;
use http::{Request, Response};
use mesh_core::{Body, ClusterName, Direction, LocalReplyLayer, Slot};
use mesh_route::{
    Backoff, CircuitBreakerLayer, Cluster, ClusterSpec, Clusters, Discovery, EndpointSpec, Fault, FaultLayer,
    HeadersLayer, Percentage, RetryOn, RetryPolicy, RouteBuilder, RouteTable, SelectRouteLayer, Shard,
    TimeoutLayer, UpstreamProtocol, dispatch,
};
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_stream::StreamExt as _;
use tonic::client::{Grpc, GrpcService};
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Status};
use tonic_prost::ProstCodec;
use tower::{Layer, Service, ServiceBuilder, service_fn};

const SAY: &str = "/test.Greeter/Say";
const COUNT: &str = "/test.Greeter/Count";

#[derive(Clone, PartialEq, prost::Message)]
struct Text {
    #[prost(string, tag = "1")]
    text: String,
}

fn text(text: impl Into<String>) -> Text {
    Text { text: text.into() }
}

/// Says hello to a name, fails as it is told to, and counts.
#[derive(Clone, Default)]
struct Greeter {
    calls: Arc<AtomicU32>,
}

impl Greeter {
    async fn say(self, request: tonic::Request<Text>) -> Result<tonic::Response<Text>, Status> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        match request.into_inner().text.as_str() {
            "the third time" if call < 3 => Err(Status::unavailable("not yet")),
            "nobody" => Err(Status::invalid_argument("who?")),
            "slow" => std::future::pending().await,
            name => Ok(tonic::Response::new(text(format!("hello, {name}")))),
        }
    }

    async fn count(
        self,
        request: tonic::Request<Text>,
    ) -> Result<tonic::Response<impl tokio_stream::Stream<Item = Result<Text, Status>>>, Status> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let most: u32 =
            request.into_inner().text.parse().map_err(|_| Status::invalid_argument("no number"))?;
        let numbers = (1..=most).map(|number| match number {
            1..=3 => Ok(text(number.to_string())),
            _ => Err(Status::aborted("I count to three")),
        });
        Ok(tonic::Response::new(tokio_stream::iter(numbers)))
    }
}

impl NamedService for Greeter {
    const NAME: &'static str = "test.Greeter";
}

impl Service<Request<tonic::body::Body>> for Greeter {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<Text, Text>::default());
            Ok(match request.uri().path() {
                SAY => grpc.unary(service_fn(move |request| this.clone().say(request)), request).await,
                COUNT => {
                    let count = service_fn(move |request| this.clone().count(request));
                    grpc.server_streaming(count, request).await
                }
                _ => Status::unimplemented("no such method").into_http(),
            })
        })
    }
}

/// A tonic server of the greeter behind these layers.
async fn serve<L>(greeter: Greeter, layers: L) -> SocketAddr
where
    L: Layer<tonic::service::Routes> + Clone + Send + Sync + 'static,
    L::Service: Service<Request<tonic::body::Body>, Response = Response<Body>, Error = Infallible, Future: Send>
        + Clone
        + Send
        + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let server = Server::builder().layer(layers).add_service(greeter);
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    addr
}

/// What a server has at least: errors become statuses.
fn plain() -> LocalReplyLayer {
    LocalReplyLayer::new(Direction::Inbound)
}

/// A tonic client whose calls go by this route.
fn client(
    addr: SocketAddr,
    route: impl FnOnce(RouteBuilder) -> RouteBuilder,
) -> Grpc<impl GrpcService<tonic::body::Body, ResponseBody = Body> + Clone> {
    let endpoints = Discovery::Static(vec![EndpointSpec::new(addr)]);
    let mut spec = ClusterSpec::new(ClusterName::custom("greeter"), endpoints);
    spec.protocol = UpstreamProtocol::Http2;
    let cluster = Arc::new(Cluster::new(spec));
    Clusters::new().reconcile(std::slice::from_ref(&cluster));
    let route = route(RouteBuilder::new("greeter").path_prefix("/test.Greeter/")).forward(cluster).unwrap();
    let table = RouteTable::builder().host("greeter", [route]).build().unwrap();
    let stack = ServiceBuilder::new()
        .layer(LocalReplyLayer::new(Direction::Outbound))
        .layer(SelectRouteLayer::new(Slot::fixed(table)))
        .layer(HeadersLayer::new())
        .map_request(|request: Request<tonic::body::Body>| request.map(Body::new))
        .service(dispatch(Shard::new()));
    Grpc::with_origin(stack, "http://greeter".parse().unwrap())
}

async fn say<S>(client: &Grpc<S>, request: tonic::Request<Text>, path: &'static str) -> Result<String, Status>
where
    S: GrpcService<tonic::body::Body, ResponseBody = Body> + Clone,
{
    let mut client = client.clone();
    client.ready().await.map_err(|_| Status::unknown("not ready"))?;
    let codec = ProstCodec::<Text, Text>::default();
    let response = client.unary(request, PathAndQuery::from_static(path), codec).await?;
    Ok(response.into_inner().text)
}

fn hello(name: &str) -> tonic::Request<Text> {
    tonic::Request::new(text(name))
}

#[tokio::test]
async fn a_tonic_client_has_routes_retries_and_timeouts_below_it() {
    let greeter = Greeter::default();
    let calls = Arc::clone(&greeter.calls);
    let addr = serve(greeter, plain()).await;
    let policy = RetryPolicy::new(2, RetryOn::parse("unavailable").unwrap());
    let policy = policy.backoff(Backoff::new(Duration::from_millis(1)));
    let client = client(addr, |route| route.retry(policy).timeout(Duration::from_secs(20)));
    assert_eq!(say(&client, hello("the third time"), SAY).await.unwrap(), "hello, the third time");
    assert_eq!(calls.load(Ordering::Relaxed), 3, "two were tried again");
    // What no retry is for comes as it was said.
    let refused = say(&client, hello("nobody"), SAY).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::InvalidArgument, "who?"));
    assert_eq!(calls.load(Ordering::Relaxed), 4);
    // What the service does not know, and what no route takes.
    let unknown = say(&client, hello("a"), "/test.Greeter/Sing").await.unwrap_err();
    assert_eq!((unknown.code(), unknown.message()), (Code::Unimplemented, "no such method"));
    let lost = say(&client, hello("a"), "/test.Stranger/Say").await.unwrap_err();
    assert_eq!((lost.code(), lost.message()), (Code::Unimplemented, ""));
}

#[tokio::test]
async fn the_deadline_that_a_tonic_client_sets_is_kept_where_the_server_says_nothing() {
    // Nobody accepts what the system has taken.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = client(silent.local_addr().unwrap(), |route| route.timeout(Duration::from_secs(60)));
    let mut request = hello("you");
    request.set_timeout(Duration::from_millis(50));
    let started = Instant::now();
    let late = say(&client, request, SAY).await.unwrap_err();
    assert_eq!((late.code(), late.message()), (Code::Unavailable, "upstream request timeout"));
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_tonic_client_receives_a_stream_and_the_status_at_its_end() {
    let greeter = Greeter::default();
    let calls = Arc::clone(&greeter.calls);
    let addr = serve(greeter, plain()).await;
    let policy = RetryPolicy::new(2, RetryOn::parse("unavailable,cancelled,internal").unwrap());
    let client = client(addr, |route| route.retry(policy));
    for (most, fails) in [(3, false), (4, true)] {
        let mut client = client.clone();
        client.ready().await.map_err(|_| "not ready").unwrap();
        let codec = ProstCodec::<Text, Text>::default();
        let path = PathAndQuery::from_static(COUNT);
        let response = client.server_streaming(hello(&most.to_string()), path, codec).await.unwrap();
        let seen: Vec<_> = response.into_inner().collect().await;
        let numbers: Vec<_> =
            seen.iter().filter_map(|seen| seen.as_ref().ok()).map(|it| it.text.as_str()).collect();
        assert_eq!(numbers, ["1", "2", "3"]);
        let ended = seen.last().unwrap().as_ref().err().map(|status| (status.code(), status.message()));
        assert_eq!(ended, fails.then_some((Code::Aborted, "I count to three")));
    }
    assert_eq!(calls.load(Ordering::Relaxed), 2, "what has begun is not sent again");
}

#[tokio::test]
async fn a_tonic_server_has_faults_limits_and_a_timeout_around_its_services() {
    let fault = Fault::new().abort_grpc(14, Percentage::ALWAYS).unwrap();
    let routes = [
        RouteBuilder::new("stream").path_exact(COUNT).fault(fault).respond(200, "").unwrap(),
        RouteBuilder::new("rest").respond(200, "").unwrap(),
    ];
    let table = RouteTable::builder().host("*", routes).build().unwrap();
    let breaker = CircuitBreakerLayer::new().max_requests(1);
    let table = Slot::fixed(table);
    let layers = |timeout| {
        ServiceBuilder::new()
            .layer(LocalReplyLayer::new(Direction::Inbound))
            .layer(SelectRouteLayer::new(table.clone()))
            .layer(FaultLayer::seeded(1))
            .layer(breaker.clone())
            .layer(TimeoutLayer::new(timeout))
            .map_request(|request: Request<Body>| request.map(tonic::body::Body::new))
            .into_inner()
    };
    let greeter = Greeter::default();
    let calls = Arc::clone(&greeter.calls);
    // Nothing here is late, however busy the machine is, and there everything is.
    let hurried = serve(greeter.clone(), layers(Duration::from_millis(50))).await;
    let patient = serve(greeter, layers(Duration::from_secs(24 * 60 * 60))).await;
    let hurried = client(hurried, |route| route);
    let client = client(patient, |route| route);
    assert_eq!(say(&client, hello("you"), SAY).await.unwrap(), "hello, you");
    let aborted = say(&client, hello("3"), COUNT).await.unwrap_err();
    assert_eq!((aborted.code(), aborted.message()), (Code::Unavailable, "fault filter abort"));
    assert_eq!(calls.load(Ordering::Relaxed), 1, "the service was not asked");
    // One at a time: the second is refused, and the first has no answer.
    let slow = say(&client, hello("slow"), SAY);
    let refused = async {
        mesh_testkit::until("the first to be in its service", async || calls.load(Ordering::Relaxed) == 2)
            .await;
        say(&client, hello("you"), SAY).await
    };
    let refused = tokio::select! {
        biased;
        answered = slow => panic!("{answered:?}"),
        refused = refused => refused.unwrap_err(),
    };
    assert_eq!((refused.code(), breaker.overflows()), (Code::Unavailable, 1), "{refused}");
    // The server hears that nobody waits for the first any more; until then it is one at a time.
    let late = async || say(&hurried, hello("slow"), SAY).await.unwrap_err();
    mesh_testkit::until("the first to be gone", async || {
        late().await.message() == "upstream request timeout"
    })
    .await;
}
