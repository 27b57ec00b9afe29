//! Endpoints that do what a scenario says: servers over memory.
//!
//! What an endpoint does is a pure function of its script, the time and two random numbers for each request, which are
//! drawn whether or not they are needed, so that one endpoint's numbers do not depend on what another's script says.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::istio::types::scenario::{
    Answer, ConnectionFate, EndpointScript, Latency, ResetAt, Scenario, Window,
};
use mesh_core::{Connect, ConnectTarget, Connecting, Prefixed};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, DuplexStream};
use tokio::time::Instant;

use super::ledger::Ledger;
use super::seed;
use crate::cluster::{Cluster, Discovery, DnsEndpoint};
use crate::discover::{Resolve, Resolving};

/// Bytes that are under way in one direction of a connection.
const WINDOW: usize = 64 * 1024;

const HTTP2_PREFACE: &[u8] = b"PRI ";

/// Everything behind the proxies.
#[derive(Debug)]
pub(super) struct World {
    /// When the run began.
    pub(super) origin: Instant,
    endpoints: BTreeMap<SocketAddr, Arc<Endpoint>>,
    pub(super) ledger: Arc<Ledger>,
}

/// What configuration says of an address.
#[derive(Clone, Debug, Default)]
pub(super) struct Place {
    hosts: BTreeSet<String>,
    subsets: BTreeSet<String>,
    labels: BTreeSet<Vec<(String, String)>>,
}

/// The addresses of a configuration.
pub(super) type Places = BTreeMap<SocketAddr, Place>;

/// Names, each with what it resolves to since when, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Names(BTreeMap<Arc<str>, Vec<(Duration, Vec<IpAddr>)>>);

#[derive(Debug)]
struct Endpoint {
    addr: SocketAddr,
    script: Script,
    rng: Mutex<SmallRng>,
}

/// What an endpoint does, and when.
#[derive(Debug, Default)]
pub(super) struct Script {
    latency: Latency,
    windows: Vec<Window>,
}

/// What becomes of one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fate {
    Status(StatusCode),
    Grpc(u32),
    Hang,
    Reset(ResetAt),
}

impl Names {
    pub(super) fn of(scenario: &Scenario) -> Self {
        let mut names: BTreeMap<Arc<str>, Vec<(Duration, Vec<IpAddr>)>> = BTreeMap::new();
        for answer in &scenario.dns {
            let addresses = answer.addresses.iter().filter_map(|address| address.parse().ok()).collect();
            let since = answer.from.unwrap_or_default().to_std();
            names.entry(answer.name.as_str().into()).or_default().push((since, addresses));
        }
        names.values_mut().for_each(|answers| answers.sort_by_key(|(since, _)| *since));
        Self(names)
    }

    /// Every address that a name ever has; `None` when the scenario does not know it.
    fn ever(&self, name: &str) -> Option<Vec<IpAddr>> {
        if let Ok(address) = name.parse() {
            return Some(vec![address]);
        }
        let answers = self.0.get(name)?;
        Some(answers.iter().flat_map(|(_, addresses)| addresses.iter().copied()).collect())
    }

    fn at(&self, name: &str, at: Duration) -> io::Result<Vec<IpAddr>> {
        let answers = self.0.get(name).map(Vec::as_slice).unwrap_or_default();
        let answer = answers.iter().rev().find(|(since, _)| *since <= at);
        match answer {
            Some((_, addresses)) if !addresses.is_empty() => Ok(addresses.clone()),
            _ => Err(io::Error::new(io::ErrorKind::NotFound, "the scenario has no address for it")),
        }
    }
}

/// Collects what a cluster says of its addresses; the names that the scenario does not know.
pub(super) fn places(cluster: &Cluster, names: &Names, places: &mut Places) -> Vec<Arc<str>> {
    let mut unknown = Vec::new();
    let mut known = Vec::new();
    let mut of_name = |name: &DnsEndpoint| match names.ever(&name.host) {
        Some(addresses) => {
            let at = |address| (SocketAddr::new(address, name.port), Arc::clone(&name.labels));
            known.extend(addresses.into_iter().map(at));
        }
        None => unknown.push(Arc::clone(&name.host)),
    };
    match &cluster.spec().discovery {
        Discovery::StrictDns(names) => names.iter().for_each(of_name),
        Discovery::LogicalDns(name) => of_name(name),
        Discovery::Static(endpoints) => {
            known.extend(endpoints.iter().map(|endpoint| (endpoint.addr, Arc::clone(&endpoint.labels))));
        }
        Discovery::OriginalDst | Discovery::OriginalDstPort(_) | Discovery::BlackHole => {}
    }
    for (addr, labels) in known {
        let place = places.entry(addr).or_default();
        place.hosts.extend(cluster.name().host().map(str::to_owned));
        place.subsets.extend(cluster.name().subset().map(str::to_owned));
        place.labels.insert(labels.to_vec());
    }
    unknown
}

/// Whether a script is meant for an address.
pub(super) fn selects(script: &EndpointScript, addr: SocketAddr, place: &Place) -> bool {
    let is_listed = |text: &String| {
        text.parse::<SocketAddr>().map_or_else(|_| text.parse() == Ok(addr.ip()), |listed| listed == addr)
    };
    let has_labels = |labels: &Vec<(String, String)>| {
        script
            .labels
            .iter()
            .all(|(key, value)| labels.iter().any(|(known, its)| known == key && its == value))
    };
    (script.addresses.is_empty() || script.addresses.iter().any(is_listed))
        && (script.host.is_empty() || place.hosts.contains(&script.host))
        && (script.subset.is_empty() || place.subsets.contains(&script.subset))
        && (script.labels.is_empty() || place.labels.iter().any(has_labels))
}

impl Script {
    fn of(scenario: &Scenario, addr: SocketAddr, place: &Place) -> Self {
        let mut script = Self::default();
        for entry in scenario.endpoints.iter().filter(|entry| selects(entry, addr, place)) {
            script.latency = entry.latency.unwrap_or(script.latency);
            script.windows.extend(entry.script.iter().cloned());
        }
        script
    }

    /// The window in force.
    fn window(&self, at: Duration) -> Option<&Window> {
        self.windows.iter().rev().find(|window| {
            window.from.unwrap_or_default().to_std() <= at && window.to.is_none_or(|to| at < to.to_std())
        })
    }

    fn connect(&self, at: Duration) -> ConnectionFate {
        self.window(at).map_or(ConnectionFate::Accept, |window| window.connect)
    }

    /// When connections that are open break off next.
    fn breaks_off(&self, at: Duration) -> Option<Duration> {
        let begins = self.windows.iter().filter(|window| window.connect == ConnectionFate::Refuse);
        let begins = begins.map(|window| window.from.unwrap_or_default().to_std());
        begins.filter(|begins| *begins > at && self.connect(*begins) == ConnectionFate::Refuse).min()
    }

    /// What becomes of a request, and how long that takes. Both numbers are of `0.0..1.0`.
    fn fate(&self, at: Duration, which: f64, how_long: f64) -> (Fate, Duration) {
        let window = self.window(at);
        let latency = window.and_then(|window| window.latency).unwrap_or(self.latency);
        let fate = match window {
            Some(window) if window.connect == ConnectionFate::Hang => Fate::Hang,
            Some(window) => draw(&window.answers, which * 100.0),
            None => Fate::Status(StatusCode::OK),
        };
        (fate, time(latency, how_long))
    }
}

fn draw(answers: &[Answer], number: f64) -> Fate {
    let said: f64 = answers.iter().filter_map(|answer| answer.percent).sum();
    let mut upto = 0.0;
    let drawn = answers.iter().find(|answer| {
        upto += answer.percent.unwrap_or(100.0 - said);
        number < upto
    });
    match drawn {
        Some(Answer { hang: true, .. }) => Fate::Hang,
        Some(Answer { reset: Some(at), .. }) => Fate::Reset(*at),
        Some(Answer { grpc_status: Some(status), .. }) => Fate::Grpc(*status),
        Some(Answer { status: Some(status), .. }) => {
            let status = u16::try_from(*status).ok().and_then(|status| StatusCode::from_u16(status).ok());
            Fate::Status(status.unwrap_or(StatusCode::OK))
        }
        _ => Fate::Status(StatusCode::OK),
    }
}

fn time(latency: Latency, number: f64) -> Duration {
    if let Some(fixed) = latency.fixed {
        fixed.to_std()
    } else if let Some(uniform) = latency.uniform {
        let (min, max) = (uniform.min.to_std(), uniform.max.to_std());
        min + max.saturating_sub(min).mul_f64(number)
    } else if let Some(exponential) = latency.exponential {
        // At most 37 times the mean: `number` is below one.
        exponential.mean.to_std().mul_f64(-(1.0 - number).ln())
    } else {
        Duration::ZERO
    }
}

impl World {
    pub(super) fn new(scenario: &Scenario, places: &Places, ledger: Arc<Ledger>) -> Arc<Self> {
        let endpoints = places.iter().map(|(addr, place)| {
            let rng = SmallRng::seed_from_u64(seed(scenario.seed, &format!("endpoint {addr}")));
            let script = Script::of(scenario, *addr, place);
            (*addr, Arc::new(Endpoint { addr: *addr, script, rng: Mutex::new(rng) }))
        });
        Arc::new(Self { origin: Instant::now(), endpoints: endpoints.collect(), ledger })
    }

    /// How long the run has taken.
    pub(super) fn elapsed(&self) -> Duration {
        self.origin.elapsed()
    }

    async fn connect(self: Arc<Self>, addr: SocketAddr) -> io::Result<Box<dyn mesh_core::Io>> {
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let Some(endpoint) = self.endpoints.get(&addr).cloned() else { return Err(refused()) };
        let at = self.elapsed();
        match endpoint.script.connect(at) {
            ConnectionFate::Accept => {}
            ConnectionFate::Refuse => {
                self.ledger.tried(addr, at);
                return Err(refused());
            }
            ConnectionFate::Hang => {
                self.ledger.tried(addr, at);
                std::future::pending::<()>().await;
            }
        }
        let (ours, theirs) = tokio::io::duplex(WINDOW);
        tokio::spawn(async move {
            let breaks_off = endpoint.script.breaks_off(at).map(|at| self.origin + at);
            tokio::select! {
                biased;
                () = until(breaks_off) => {}
                () = serve(Arc::clone(&self), endpoint, theirs) => {}
            }
        });
        Ok(Box::new(ours))
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Serves one connection, of the protocol that its first bytes say.
async fn serve(world: Arc<World>, endpoint: Arc<Endpoint>, mut stream: DuplexStream) {
    let mut first = [0; HTTP2_PREFACE.len()];
    if stream.read_exact(&mut first).await.is_err() {
        return;
    }
    let io = TokioIo::new(Prefixed::new(Bytes::copy_from_slice(&first), stream));
    let service = service_fn(move |request| answer(Arc::clone(&world), Arc::clone(&endpoint), request));
    // A connection that breaks off is what some scripts want.
    if first == HTTP2_PREFACE {
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .auto_date_header(false)
            .serve_connection(io, service)
            .await;
    } else {
        let _ = hyper::server::conn::http1::Builder::new()
            .auto_date_header(false)
            .serve_connection(io, service)
            .await;
    }
}

async fn answer(
    world: Arc<World>,
    endpoint: Arc<Endpoint>,
    request: Request<Incoming>,
) -> Result<Response<Reply>, BreaksOff> {
    let at = world.elapsed();
    world.ledger.tried(endpoint.addr, at);
    let (fate, latency) = {
        let mut rng = endpoint.rng.lock().unwrap_or_else(PoisonError::into_inner);
        let (which, how_long) = (rng.random(), rng.random());
        endpoint.script.fate(at, which, how_long)
    };
    let (parts, mut body) = request.into_parts();
    while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        frame.map_err(|_| BreaksOff)?;
    }
    if fate == Fate::Hang {
        std::future::pending::<()>().await;
    }
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    let content_type = parts.headers.get(CONTENT_TYPE);
    let is_grpc = content_type.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    let mut response = Response::new(Reply::Whole(None));
    match fate {
        Fate::Reset(ResetAt::Head) | Fate::Hang => return Err(BreaksOff),
        Fate::Reset(ResetAt::Body) => *response.body_mut() = Reply::Broken { begun: false, pause: None },
        Fate::Status(status) if is_grpc && status == StatusCode::OK => grpc(&mut response, 0),
        Fate::Grpc(status) => grpc(&mut response, status),
        Fate::Status(status) => {
            *response.status_mut() = status;
            if !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
                *response.body_mut() = Reply::Whole(Some(Bytes::from_static(b"ok\n")));
            }
        }
    }
    Ok(response)
}

fn grpc(response: &mut Response<Reply>, status: u32) {
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response.headers_mut().insert("grpc-status", HeaderValue::from(status));
}

/// The body of an answer.
#[derive(Debug)]
enum Reply {
    Whole(Option<Bytes>),
    /// Breaks off after some bytes, when those are on their way.
    Broken {
        begun: bool,
        pause: Option<Pin<Box<tokio::time::Sleep>>>,
    },
}

/// The exchange ends here.
#[derive(Debug, thiserror::Error)]
#[error("the script breaks the exchange off")]
struct BreaksOff;

impl http_body::Body for Reply {
    type Data = Bytes;
    type Error = BreaksOff;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BreaksOff>>> {
        match &mut *self {
            Self::Whole(data) => Poll::Ready(data.take().map(|data| Ok(Frame::data(data)))),
            Self::Broken { begun: begun @ false, .. } => {
                *begun = true;
                Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"o")))))
            }
            Self::Broken { pause, .. } => {
                let pause =
                    pause.get_or_insert_with(|| Box::pin(tokio::time::sleep(Duration::from_millis(1))));
                pause.as_mut().poll(cx).map(|()| Some(Err(BreaksOff)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(data) => SizeHint::with_exact(data.as_ref().map_or(0, |data| data.len() as u64)),
            Self::Broken { .. } => SizeHint::default(),
        }
    }
}

/// Connects to the endpoints of the world.
#[derive(Debug)]
pub(super) struct Connector(pub(super) Arc<World>);

impl Connect for Connector {
    fn connect(&self, target: &ConnectTarget) -> Connecting {
        Box::pin(Arc::clone(&self.0).connect(target.addr))
    }
}

/// Resolves the names of the scenario.
#[derive(Debug)]
pub(super) struct Resolver {
    pub(super) world: Arc<World>,
    pub(super) names: Names,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Arc<str>) -> Resolving {
        let found = self.names.at(&name, self.world.elapsed());
        Box::pin(async move { found })
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::istio::types::common::Duration as Written;
    use mesh_core::istio::types::scenario::{Exponential, Uniform};

    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn window(from: i64, to: i64, connect: ConnectionFate) -> Window {
        let (from, to) = (Some(Written::from_secs(from)), Some(Written::from_secs(to)));
        Window { from, to, connect, ..Window::default() }
    }

    #[test]
    fn the_last_window_wins_and_none_is_health() {
        use ConnectionFate::{Accept, Hang, Refuse};
        let mut script = Script::default();
        script.windows.push(window(10, 50, Hang));
        script.windows.push(window(20, 30, Refuse));
        let fates = [0, 9, 10, 20, 29, 30, 50].map(|at| script.connect(seconds(at)));
        assert_eq!(fates, [Accept, Accept, Hang, Refuse, Refuse, Hang, Accept]);
        assert_eq!(script.breaks_off(seconds(0)), Some(seconds(20)));
        assert_eq!(script.breaks_off(seconds(20)), None);
        assert_eq!(script.fate(seconds(0), 0.0, 0.0).0, Fate::Status(StatusCode::OK));
        assert_eq!(script.fate(seconds(10), 0.0, 0.0).0, Fate::Hang);
    }

    #[test]
    fn answers_take_their_shares_and_health_the_rest() {
        let status = |percent, status| Answer { percent, status: Some(status), ..Answer::default() };
        let fates = |answers: &[Answer]| [0.0, 29.9, 30.0, 39.9, 40.0, 99.9].map(|at| draw(answers, at));
        let [ok, bad, worse] = [200, 500, 503].map(|code| Fate::Status(StatusCode::from_u16(code).unwrap()));
        let shares = [status(Some(30.0), 500), status(Some(10.0), 503)];
        assert_eq!(fates(&shares), [bad, bad, worse, worse, ok, ok]);
        let rest = [status(None, 503), status(Some(60.0), 500)];
        assert_eq!(fates(&rest), [worse, worse, worse, worse, bad, bad]);
    }

    #[test]
    fn latencies_are_drawn_from_their_distributions() {
        let millis = Duration::from_millis;
        let fixed = Latency { fixed: Some(Written::from_millis(7)), ..Latency::default() };
        assert_eq!(time(fixed, 0.9), millis(7));
        let bounds = Uniform { min: Written::from_millis(10), max: Written::from_millis(30) };
        let uniform = Latency { uniform: Some(bounds), ..Latency::default() };
        assert_eq!([0.0, 0.5].map(|number| time(uniform, number)), [millis(10), millis(20)]);
        let mean = Exponential { mean: Written::from_millis(100) };
        let exponential = Latency { exponential: Some(mean), ..Latency::default() };
        let mut rng = SmallRng::seed_from_u64(1);
        let total: Duration = (0..10_000).map(|_| time(exponential, rng.random())).sum();
        // Within four standard deviations.
        assert!((96_000..104_000).contains(&(total / 10_000).as_micros()), "{total:?}");
    }

    #[test]
    fn a_script_selects_by_everything_that_it_names() {
        let addr: SocketAddr = "10.0.0.1:8080".parse().unwrap();
        let place = Place {
            hosts: ["a.b".to_owned()].into(),
            subsets: ["v1".to_owned()].into(),
            labels: [vec![("app".to_owned(), "a".to_owned()), ("version".to_owned(), "v1".to_owned())]]
                .into(),
        };
        let ask = |script: EndpointScript| selects(&script, addr, &place);
        let addresses =
            |text: &str| EndpointScript { addresses: vec![text.into()], ..EndpointScript::default() };
        assert!(ask(EndpointScript::default()));
        assert!(ask(addresses("10.0.0.1")) && ask(addresses("10.0.0.1:8080")));
        assert!(!ask(addresses("10.0.0.2")) && !ask(addresses("10.0.0.1:80")));
        let by = |host: &str, subset: &str| EndpointScript {
            host: host.into(),
            subset: subset.into(),
            ..EndpointScript::default()
        };
        assert!(ask(by("a.b", "v1")) && !ask(by("a.b", "v2")) && !ask(by("a", "")));
        let labels = |value: &str| EndpointScript {
            labels: [("version".to_owned(), value.to_owned())].into(),
            ..EndpointScript::default()
        };
        assert!(ask(labels("v1")) && !ask(labels("v2")));
    }
}
