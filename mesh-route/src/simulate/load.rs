//! The requests of a scenario: when they are made, and what came of each.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, Version};
use http_body::Body as _;
use mesh_core::istio::types::scenario::{Arrivals, Load};
use mesh_core::{Body, ConnInfo, Direction, RequestContext, Snapshots};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::mpsc::Sender;
use tower_service::Service;

use super::endpoint::World;
use super::ledger::End;
use super::seed;

/// Stands for the number of the user in paths and headers.
const USER: &str = "{user}";

/// Makes the requests of one load.
pub(super) struct Generator<S> {
    pub(super) load: Load,
    pub(super) index: usize,
    pub(super) seed: u64,
    /// When the run ends.
    pub(super) duration: Duration,
    pub(super) direction: Direction,
    /// The port that requests arrive at, where the load says none.
    pub(super) port: u16,
    /// A stack for each worker.
    pub(super) workers: Vec<S>,
    pub(super) snapshots: Snapshots,
    pub(super) world: Arc<World>,
    /// Lives as long as a request does.
    pub(super) alive: Sender<Infallible>,
}

/// When requests are made.
pub(super) struct Schedule {
    arrivals: Arrivals,
    rate: f64,
    from: Duration,
    to: Duration,
    made: u64,
    last: f64,
}

impl Schedule {
    pub(super) fn new(load: &Load, duration: Duration) -> Self {
        let to = load.to.map_or(duration, |to| to.to_std().min(duration));
        let from = load.from.unwrap_or_default().to_std();
        Self { arrivals: load.arrivals, rate: load.rate, from, to, made: 0, last: 0.0 }
    }

    /// The next; `None` when it would come too late.
    pub(super) fn next(&mut self, rng: &mut SmallRng) -> Option<Duration> {
        let seconds = match self.arrivals {
            // By number, so that no error adds up.
            Arrivals::Even => self.made as f64 / self.rate,
            Arrivals::Poisson => self.last - (1.0 - rng.random::<f64>()).ln() / self.rate,
        };
        (self.made, self.last) = (self.made + 1, seconds);
        let at = self.from + Duration::try_from_secs_f64(seconds).ok()?;
        (at < self.to).then_some(at)
    }
}

impl<S> Generator<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    pub(super) async fn run(self) {
        let mut rng = SmallRng::seed_from_u64(seed(self.seed, &format!("load {}", self.index)));
        let mut schedule = Schedule::new(&self.load, self.duration);
        let mut made = self.index;
        while let Some(at) = schedule.next(&mut rng) {
            tokio::time::sleep_until(self.world.origin + at).await;
            let user = rng.random_range(0..u64::from(self.load.users.unwrap_or(1).max(1)));
            let context = self.context(user);
            // What a scenario's validator has let pass is a request.
            let Some(request) = self.request(user, &context) else { return };
            let Some(stack) = self.workers.get(made % self.workers.len().max(1)) else { return };
            made += 1;
            let number = self.world.ledger.begin(self.index, self.world.elapsed(), context.clone());
            let (world, alive) = (Arc::clone(&self.world), self.alive.clone());
            tokio::spawn(exchange(stack.clone(), request, context, world, number, alive));
        }
    }

    fn context(&self, user: u64) -> RequestContext {
        let mut conn = ConnInfo::unknown(self.direction);
        // Of the network that RFC 2544 sets aside for measurements.
        let host = u32::from(Ipv4Addr::new(198, 18, 0, 1)).saturating_add(user as u32 & 0xffff);
        conn.peer = SocketAddr::from((Ipv4Addr::from(host), 40_000));
        conn.port = self.load.port.and_then(|port| u16::try_from(port).ok()).unwrap_or(self.port);
        let snapshot = Arc::new(self.snapshots.load());
        RequestContext::new(Arc::new(conn), Some(snapshot), mesh_core::clock::now())
    }

    fn request(&self, user: u64, context: &RequestContext) -> Option<Request<Body>> {
        let user = user.to_string();
        let path = self.load.path.as_deref().unwrap_or("/").replace(USER, &user);
        let path: PathAndQuery = path.parse().ok()?;
        let mut request = Request::new(Body::full(self.load.body.clone()));
        if self.load.body.is_empty() {
            *request.body_mut() = Body::empty();
        }
        *request.method_mut() = match &self.load.method {
            Some(method) => method.parse().ok()?,
            None => Method::GET,
        };
        if self.load.http2 {
            *request.version_mut() = Version::HTTP_2;
            let authority: Authority = self.load.host.parse().ok()?;
            let parts = Uri::builder().scheme(Scheme::HTTP).authority(authority).path_and_query(path);
            *request.uri_mut() = parts.build().ok()?;
        } else {
            *request.uri_mut() = Uri::from(path);
            request.headers_mut().insert(http::header::HOST, self.load.host.parse().ok()?);
        }
        for (name, value) in &self.load.headers {
            let name: HeaderName = name.parse().ok()?;
            request.headers_mut().append(name, HeaderValue::try_from(value.replace(USER, &user)).ok()?);
        }
        request.extensions_mut().insert(context.clone());
        Some(request)
    }
}

async fn exchange<S>(
    mut stack: S,
    request: Request<Body>,
    context: RequestContext,
    world: Arc<World>,
    number: usize,
    alive: Sender<Infallible>,
) where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    let began = world.elapsed();
    let Ok(()) = std::future::poll_fn(|cx| stack.poll_ready(cx)).await;
    let Ok(response) = stack.call(request).await;
    let (parts, mut body) = response.into_parts();
    let mut trailers = None;
    let mut whole = true;
    while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        match frame.map(http_body::Frame::into_trailers) {
            Ok(Ok(last)) => trailers = Some(last),
            Ok(Err(_)) => {}
            Err(_) => {
                whole = false;
                break;
            }
        }
    }
    drop(body);
    let flags: Vec<_> = context.flags().codes().collect();
    let grpc = grpc_status(&parts.headers).or_else(|| trailers.as_ref().and_then(grpc_status));
    let failure = match grpc {
        _ if !whole && flags.is_empty() => Some("cut off".to_owned()),
        Some(status) if status != 0 && flags.is_empty() => Some(format!("grpc {status}")),
        None | Some(0) if whole && !parts.status.is_server_error() => None,
        _ if flags.is_empty() => Some(parts.status.as_str().to_owned()),
        _ => Some(flags.join(",")),
    };
    let took = world.elapsed().saturating_sub(began);
    world.ledger.end(number, End { took, tries: context.attempts(), failure });
    drop(alive);
}

fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use mesh_core::istio::types::common::Duration as Written;

    use super::*;

    fn times(load: &Load, seconds: u64) -> Vec<Duration> {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut schedule = Schedule::new(load, Duration::from_secs(seconds));
        std::iter::from_fn(|| schedule.next(&mut rng)).collect()
    }

    #[test]
    fn even_arrivals_keep_their_distance() {
        let load = Load { rate: 3.0, from: Some(Written::from_secs(1)), ..Load::default() };
        let millis: Vec<_> = times(&load, 3).iter().map(Duration::as_millis).collect();
        assert_eq!(millis, [1000, 1333, 1666, 2000, 2333, 2666]);
        let short = Load { to: Some(Written::from_secs(2)), ..load };
        assert_eq!(times(&short, 3).len(), 3);
    }

    #[test]
    fn poisson_arrivals_have_their_rate_and_their_spread() {
        let load = Load { rate: 100.0, arrivals: Arrivals::Poisson, ..Load::default() };
        let times = times(&load, 100);
        // Within four standard deviations.
        assert!((9600..10_400).contains(&times.len()), "{}", times.len());
        let gaps = times.windows(2).filter(|pair| pair[1] - pair[0] > Duration::from_millis(10)).count();
        let share = gaps as f64 / times.len() as f64;
        assert!((0.35..0.39).contains(&share), "e to the -1 of the gaps exceed their mean, not {share}");
    }
}
