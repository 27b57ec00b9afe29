//! Configurations from short YAML, and what they come to.

use std::sync::Arc;
use std::time::Duration;

use http::Request;
use http_body_util::BodyExt as _;
use mesh_core::config::{Compile as _, CompileContext, Role};
use mesh_core::diagnostics::{Diagnostic, Diagnostics, Severity};
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};
use mesh_core::{Body, ConnInfo, Direction, Error, RequestContext, Slot};
use mesh_route::{
    Cluster, ClusterSpec, Clusters, CorsLayer, Decision, Explanation, FaultLayer, HeadersLayer, RequestView,
    RouteTable, SelectRouteLayer, Shard, dispatch, explain,
};
use mesh_testkit::upstream::Echo;
use serde_json::Value;
use tower::util::BoxCloneSyncService;
use tower::{ServiceBuilder, ServiceExt as _};

/// A resource of a networking kind. `spec` is YAML in flow style, or in block style with an indent of two.
pub(crate) fn resource(kind: &str, name: &str, spec: &str) -> String {
    in_namespace("default", kind, name, spec)
}

/// A resource of a networking kind in another namespace than the workload's.
pub(crate) fn in_namespace(namespace: &str, kind: &str, name: &str, spec: &str) -> String {
    aged(namespace, kind, name, None, spec)
}

/// A resource with a creation time.
pub(crate) fn aged(namespace: &str, kind: &str, name: &str, created: Option<&str>, spec: &str) -> String {
    let created = created.map_or_else(String::new, |at| format!(", creationTimestamp: '{at}'"));
    let break_ = if spec.starts_with('{') { " " } else { "\n" };
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}{created}}}\nspec:{break_}{spec}\n"
    )
}

/// A virtual service for `reviews` with these rules.
pub(crate) fn rules(http: &str) -> String {
    resource("VirtualService", "reviews", &format!("  hosts: [reviews]\n  http:\n{http}"))
}

/// The settings of the mesh, in block style without indent.
pub(crate) fn mesh(settings: &str) -> String {
    let indented: String = settings.lines().map(|line| format!("    {line}\n")).collect();
    format!(
        "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |-\n{indented}"
    )
}

/// A service `name.namespace.svc.cluster.local` at port 80 (HTTP) with endpoints on these ports of the loopback; the
/// label `version` of the first is `v1`, of the second `v2`, and so on.
pub(crate) fn service_in(namespace: &str, name: &str, endpoints: &[u16]) -> String {
    let endpoints: Vec<_> = (1..)
        .zip(endpoints)
        .map(|(at, port)| {
            format!("{{address: 127.0.0.1, ports: {{http: {port}}}, labels: {{version: v{at}}}}}")
        })
        .collect();
    in_namespace(
        namespace,
        "ServiceEntry",
        name,
        &format!(
            "{{hosts: [{name}.{namespace}.svc.cluster.local], location: MESH_INTERNAL, resolution: STATIC, \
             ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{}]}}",
            endpoints.join(", ")
        ),
    )
}

/// `reviews` in the namespace of the workload, with subsets `v1` and `v2` where there are two endpoints.
pub(crate) fn reviews(endpoints: &[u16]) -> String {
    let subsets =
        "{host: reviews, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}";
    service_in("default", "reviews", endpoints) + &resource("DestinationRule", "reviews", subsets)
}

fn load(yaml: &str) -> (ResourceSet, Diagnostics) {
    ResourceSet::load(&[SourceFile::new("<test>", yaml)], &LoadOptions::default())
}

/// What loading says, one `severity path: message` for each finding.
pub(crate) fn findings(yaml: &str) -> Vec<Diagnostic> {
    load(yaml).1.iter().cloned().collect()
}

/// The configuration must be refused at `path` for a reason that contains `reason`.
pub(crate) fn refused(yaml: &str, path: &str, reason: &str) {
    found(yaml, Severity::Error, path, reason);
}

/// The configuration must be accepted with a warning at `path` that contains `reason`.
pub(crate) fn warned(yaml: &str, path: &str, reason: &str) {
    assert!(!load(yaml).1.has_errors(), "{}\n{yaml}", load(yaml).1);
    found(yaml, Severity::Warning, path, reason);
}

fn found(yaml: &str, severity: Severity, path: &str, reason: &str) {
    let findings = findings(yaml);
    assert!(
        findings.iter().any(|d| d.severity == severity && d.path == path && d.message.contains(reason)),
        "no {severity} at {path} about {reason:?} in {findings:#?}\n{yaml}"
    );
}

/// The configuration must be accepted in silence.
pub(crate) fn accepted(yaml: &str) {
    assert!(findings(yaml).is_empty(), "{:#?}\n{yaml}", findings(yaml));
}

/// A compiled configuration.
pub(crate) struct Compiled {
    pub(crate) set: ResourceSet,
    pub(crate) table: Arc<RouteTable>,
    pub(crate) diags: Diagnostics,
    direction: Direction,
}

/// Compiles for a sidecar in the namespace `default`.
pub(crate) fn compile(yaml: &str) -> Compiled {
    compile_for(&CompileContext::new(Role::Sidecar), yaml)
}

/// Compiles for a gateway that is labelled `istio: ingressgateway`.
pub(crate) fn compile_gateway(yaml: &str) -> Compiled {
    let mut cx = CompileContext::new(Role::Gateway);
    cx.workload.labels = [("istio".to_owned(), "ingressgateway".to_owned())].into();
    compile_for(&cx, yaml)
}

/// A sidecar with these labels, in this namespace.
pub(crate) fn sidecar(namespace: &str, labels: &[(&str, &str)]) -> CompileContext {
    let mut cx = CompileContext::new(Role::Sidecar);
    cx.workload.namespace = namespace.to_owned();
    cx.workload.labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    cx
}

pub(crate) fn compile_for(cx: &CompileContext, yaml: &str) -> Compiled {
    let (set, mut diags) = load(yaml);
    assert!(!diags.has_errors(), "{diags}\n{yaml}");
    let table = RouteTable::compile(&set, cx, &mut diags).unwrap();
    assert!(!diags.has_errors(), "{diags}\n{yaml}");
    Compiled { set, table: Arc::new(table), diags, direction: cx.role.direction() }
}

pub(crate) fn get(url: &str) -> Request<Body> {
    Request::get(url).body(Body::empty()).unwrap()
}

impl Compiled {
    /// A connection to this port of a gateway, or of a sidecar that does not know the original destination.
    pub(crate) fn conn(&self, port: u16) -> ConnInfo {
        ConnInfo { port, ..ConnInfo::unknown(self.direction) }
    }

    pub(crate) fn explain(&self, request: &Request<Body>) -> Explanation {
        // The port of a gateway's listener is that of plain HTTP, unless the request says another.
        let conn = self.conn(request.extensions().get::<ListenerPort>().map_or(80, |port| port.0));
        explain(&self.table, &RequestView::new(request, &conn), &conn, 7)
    }

    pub(crate) fn ask(&self, url: &str) -> Explanation {
        self.explain(&get(url))
    }

    /// The name of the route that takes a GET; `None` when none does.
    pub(crate) fn route(&self, url: &str) -> Option<String> {
        self.route_of(&get(url))
    }

    pub(crate) fn route_of(&self, request: &Request<Body>) -> Option<String> {
        self.explain(request).route.map(|route| route.name().to_owned())
    }

    /// The names of the clusters that a GET may be sent to.
    pub(crate) fn clusters(&self, url: &str) -> Vec<String> {
        match self.ask(url).decision {
            Decision::Forward { destinations, .. } => {
                destinations.iter().map(|(_, name, _)| name.to_string()).collect()
            }
            other => panic!("{url} is not forwarded: {other:?}"),
        }
    }

    /// `status location` of the redirect that answers a GET.
    pub(crate) fn redirect(&self, url: &str) -> String {
        match self.ask(url).decision {
            Decision::Redirect { status, location } => format!("{status} {location}"),
            other => panic!("{url} is not redirected: {other:?}"),
        }
    }

    pub(crate) fn cluster(&self, name: &str) -> Arc<Cluster> {
        let clusters = self.table.clusters();
        let found = clusters.iter().find(|cluster| cluster.name().as_str() == name);
        Arc::clone(found.unwrap_or_else(|| {
            panic!("no {name} among {:?}", clusters.iter().map(|c| c.name().as_str()).collect::<Vec<_>>())
        }))
    }

    pub(crate) fn spec(&self, name: &str) -> ClusterSpec {
        self.cluster(name).spec().clone()
    }

    /// The paths of the fields that nothing enforces.
    pub(crate) fn unenforced(&self) -> Vec<String> {
        self.set.unhonoured(&self.diags, Severity::Error).into_iter().map(|d| d.path).collect()
    }

    /// Compiling must have warned at `path` with a reason that contains `reason`.
    pub(crate) fn warns(&self, path: &str, reason: &str) {
        assert!(
            self.diags
                .iter()
                .any(|d| { d.severity == Severity::Warning && d.path == path && d.message.contains(reason) }),
            "no warning at {path} about {reason:?} in {}",
            self.diags
        );
    }

    /// The stack on these routes: selection, faults, CORS, header operations, dispatch.
    pub(crate) fn client(&self) -> Client {
        self.client_seeded(1)
    }

    pub(crate) fn client_seeded(&self, seed: u64) -> Client {
        self.client_of(&Clusters::new(), seed)
    }

    /// The stack of a process that had other configurations before.
    pub(crate) fn client_on(&self, clusters: &Clusters) -> Client {
        self.client_of(clusters, 1)
    }

    fn client_of(&self, clusters: &Clusters, seed: u64) -> Client {
        clusters.reconcile(self.table.clusters());
        let stack = ServiceBuilder::new()
            .layer(
                SelectRouteLayer::new(Slot::fixed_shared(Arc::clone(&self.table))).direction(self.direction),
            )
            .layer(FaultLayer::seeded(seed))
            .layer(CorsLayer::new())
            .layer(HeadersLayer::new())
            .service(dispatch(Shard::seeded(seed)));
        BoxCloneSyncService::new(stack)
    }
}

/// The port of the gateway's listener that a request arrives at.
#[derive(Clone, Copy)]
pub(crate) struct ListenerPort(pub(crate) u16);

pub(crate) type Client = BoxCloneSyncService<Request<Body>, http::Response<Body>, Error>;

/// What came back of one exchange.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    /// What the upstream saw.
    pub(crate) fn saw(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no upstream answered: {}", self.text))
    }

    /// The value of a header that the upstream saw; repeated ones are joined.
    pub(crate) fn saw_header(&self, name: &str) -> Option<String> {
        self.saw()["headers"][name].as_str().map(str::to_owned)
    }

    /// The name of the upstream.
    pub(crate) fn by(&self) -> String {
        self.saw()["name"].as_str().unwrap().to_owned()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

pub(crate) async fn send(client: &Client, request: Request<Body>) -> Answer {
    let response = client.clone().oneshot(request).await.unwrap_or_else(|error| panic!("{error}"));
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    Answer {
        status: parts.status.as_u16(),
        headers: parts.headers,
        text: String::from_utf8_lossy(&bytes).into_owned(),
    }
}

/// `status flags details` of a request that must fail.
pub(crate) async fn fail(client: &Client, request: Request<Body>) -> String {
    let error = client.clone().oneshot(request).await.map(|response| response.status()).unwrap_err();
    format!("{} {} {}", error.status().as_u16(), error.flags(), error.details())
}

/// A request on a connection whose destination before the redirect was this.
pub(crate) fn to_original(mut request: Request<Body>, addr: std::net::SocketAddr) -> Request<Body> {
    let conn = ConnInfo { original_dst: Some(addr), ..ConnInfo::unknown(Direction::Outbound) };
    let cx = RequestContext::new(Arc::new(conn), None, mesh_core::clock::now());
    request.extensions_mut().insert(cx);
    request
}

/// What a spawned exchange comes to, with a bound.
pub(crate) async fn ended<T>(exchange: tokio::task::JoinHandle<T>) -> T {
    let bounded = tokio::time::timeout(Duration::from_secs(10), exchange).await;
    bounded.expect("the exchange ends within ten seconds").unwrap()
}

/// Waits for a condition on observable state, with a bound.
pub(crate) async fn until(condition: impl Fn() -> bool) {
    let bounded = tokio::time::timeout(Duration::from_secs(10), async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    });
    bounded.await.expect("the condition holds within ten seconds");
}

/// Two upstreams, and `reviews` with a subset for each.
pub(crate) async fn two_versions() -> (Echo, Echo, String) {
    let (one, two) = (Echo::start("v1").await, Echo::start("v2").await);
    let yaml = reviews(&[one.addr.port(), two.addr.port()]);
    (one, two, yaml)
}

/// An upstream behind `reviews`.
pub(crate) async fn one_version() -> (Echo, String) {
    let echo = Echo::start("v1").await;
    let yaml = reviews(&[echo.addr.port()]);
    (echo, yaml)
}
