//! Connections that end just as a request is written (A2).

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::Full;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::Body;
use mesh_route::{Backoff, RetryOn, RetryPolicy, UpstreamProtocol};
use mesh_testkit::h2_upstream::{Act, Http2Upstream};
use mesh_testkit::upstream::{Ending, Recorder};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::DuplexStream;
use tokio::sync::Notify;

use crate::support::{BOTH, Host, Network, client, cluster_of, get, nothing_is_left, outcome};

/// Races of each protocol and way to end.
const RACES: usize = 2500;

/// An upstream that ends each connection right after its first answer.
enum Upstream {
    Http1(Recorder),
    Http2(Http2Upstream),
}

impl Upstream {
    async fn start(protocol: UpstreamProtocol, reset: bool) -> Self {
        if protocol == UpstreamProtocol::Http2 {
            let act = if reset { Act::AnswerAndReset } else { Act::AnswerAndClose };
            return Self::Http2(Http2Upstream::start(&[], act).await);
        }
        let ending = if reset { Ending::Reset } else { Ending::Close };
        Self::Http1(Recorder::ending(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", ending).await)
    }

    fn addr(&self) -> std::net::SocketAddr {
        match self {
            Self::Http1(recorder) => recorder.addr,
            Self::Http2(upstream) => upstream.addr,
        }
    }

    /// How often each request, which is known by its body, has come whole.
    fn seen(&self) -> HashMap<Vec<u8>, usize> {
        match self {
            Self::Http2(upstream) => upstream.bodies(),
            Self::Http1(recorder) => {
                let mut seen = HashMap::new();
                for connection in recorder.connections() {
                    let text = String::from_utf8(connection).unwrap();
                    // A connection has one request, and its body has no line.
                    if let Some((_, body)) = text.split_once("\r\n\r\n") {
                        *seen.entry(body.as_bytes().to_vec()).or_default() += 1;
                    }
                }
                seen
            }
        }
    }
}

/// The upstream has a thread of its own, so that the end of a connection and the next request really race.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a2_a_connection_that_dies_as_a_request_is_written_duplicates_nothing() {
    for protocol in BOTH {
        for reset in [false, true] {
            let up = Upstream::start(protocol, reset).await;
            let cluster = cluster_of(&[up.addr()], |spec| spec.protocol = protocol);
            let policy = RetryPolicy::new(5, RetryOn::parse("reset").unwrap())
                .idempotent_only()
                .backoff(Backoff::new(Duration::ZERO));
            let client = client(&cluster, |route| route.retry(policy));
            let mut failed = 0;
            for number in 0..RACES {
                let method = if number % 2 == 0 { Method::PUT } else { Method::POST };
                let body = Body::full(format!("request {number}"));
                let request = Request::builder().method(&method).uri("http://up/").body(body).unwrap();
                match outcome(&client, request).await.as_str() {
                    "200 - ok" => {}
                    text if text == format!("200 - request {number}") => {}
                    // Written before the end was seen, and not to be sent again.
                    "503 UC upstream_reset_before_response_started{connection_termination}"
                        if method == Method::POST =>
                    {
                        failed += 1;
                    }
                    other => panic!("{protocol:?} {method} {number}: {other}"),
                }
                // The end comes now sooner, now later.
                for _ in 0..number % 50 * 20 {
                    std::hint::spin_loop();
                }
            }
            let seen = up.seen();
            assert!(seen.len() >= RACES - failed && seen.len() <= RACES);
            // An answer may be lost with its connection. Then what is idempotent was to be sent again, and only that.
            let mut twice = 0;
            for (body, count) in seen {
                let number: usize = String::from_utf8(body).unwrap()["request ".len()..].parse().unwrap();
                assert!(count == 1 || number.is_multiple_of(2), "request {number} came {count} times");
                twice += usize::from(count > 1);
            }
            println!(
                "a2 {protocol:?} {}: {RACES} races; of those that may be sent once 0 came twice and {failed} failed, of the idempotent ones 0 failed and {twice} came twice",
                if reset { "RST" } else { "FIN" }
            );
            // The upstream ends every connection, so none is open, whatever is counted.
            nothing_is_left(&cluster, || 0).await;
        }
    }
}

/// A connection that ends on one thread while a request is handed to it on another: hyper may leave the request between
/// the two. Nothing but the end of the handle gives it back, and whoever waits for the answer held the handle. It is a race:
/// while that was so, one run in five hung.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bug_a_request_handed_over_as_its_connection_ended_was_waited_for_for_ever() {
    for protocol in BOTH {
        let network = Network::default();
        let seeds = Arc::new(AtomicU64::new(0));
        let host = Host::Serves(Arc::new(move |stream| {
            let rng = SmallRng::seed_from_u64(seeds.fetch_add(1, Ordering::Relaxed));
            tokio::spawn(answer_once(stream, protocol, rng));
        }));
        let cluster = cluster_of(&[network.host(host)], |spec| spec.protocol = protocol);
        let policy =
            RetryPolicy::new(20, RetryOn::parse("reset").unwrap()).backoff(Backoff::new(Duration::ZERO));
        let client = network.client(&cluster, |route| route.retry(policy));
        let mut rng = SmallRng::seed_from_u64(7);
        for number in 0..4 * RACES {
            let answered = tokio::time::timeout(Duration::from_secs(20), outcome(&client, get())).await;
            // The end may cut the answer too; what must not be is that there is none.
            let answered = answered.unwrap_or_else(|_| panic!("{protocol:?}, request {number} hangs"));
            assert!(answered.starts_with("200 "), "{protocol:?}, request {number}: {answered}");
            spin(&mut rng);
        }
        // The hosts end every connection, so none is open, whatever is counted.
        nothing_is_left(&cluster, || 0).await;
    }
}

/// Answers the first request, and is gone a little later.
async fn answer_once(stream: DuplexStream, protocol: UpstreamProtocol, mut rng: SmallRng) {
    let answered = Arc::new(Notify::new());
    let tell = Arc::clone(&answered);
    let service = service_fn(move |_| {
        tell.notify_one();
        async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"ok")))) }
    });
    let io = TokioIo::new(stream);
    let serving = async {
        // Its end is what the test is about.
        if protocol == UpstreamProtocol::Http2 {
            let _ = http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await;
        } else {
            let _ = http1::Builder::new().serve_connection(io, service).await;
        }
    };
    tokio::select! {
        () = serving => {}
        () = async {
            answered.notified().await;
            // The answer is written.
            for _ in 0..4 {
                tokio::task::yield_now().await;
            }
            spin(&mut rng);
        } => {}
    }
}

/// Now longer, now shorter, from a seed.
fn spin(rng: &mut SmallRng) {
    for _ in 0..rng.random_range(0..2000) {
        std::hint::spin_loop();
    }
}
