//! B5: ten times as much load as an upstream can bear, held back by the limits of its cluster.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use mesh_testkit::ledger::Load;
use mesh_testkit::process::ConfigDir;
use mesh_testkit::raw;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::proxy::{service, start};

/// What the upstream does at once, and how long each takes.
const AT_ONCE: usize = 10;
const WORK: Duration = Duration::from_millis(10);

/// What it can do in a second.
const CAPACITY: u32 = 1000;

/// How long its best is measured.
const PEAK: Duration = Duration::from_secs(5);

const CLIENTS: usize = 400;

pub(crate) async fn run(time: Duration, factor: u32) -> bool {
    let app = limited().await;
    let dir = ConfigDir::new();
    let limits = format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: app}}\nspec: {{host: app, trafficPolicy: {{connectionPool: {{http: {{http2MaxRequests: {AT_ONCE}}}}}}}}}\n---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: app}}\nspec: {{hosts: [app], http: [{{retries: {{attempts: 0}}, route: [{{destination: {{host: app}}}}]}}]}}\n"
    );
    dir.write("mesh.yaml", &(service(&[app]) + &limits));
    let (config, any) = (dir.file("mesh.yaml"), "127.0.0.1:0");
    let sidecar =
        start("sidecar", &["--config", &config, "--outbound", any, "--admin", any, "--log", "error"]);
    let outbound = sidecar.address("outbound");

    // Its best: as many clients as it serves at once.
    let started = Instant::now();
    let best = Load::paced(outbound, "app", AT_ONCE, 100, CAPACITY * 2);
    tokio::time::sleep(PEAK).await;
    let best = best.stop().await;
    let peak = best.whole as f64 / started.elapsed().as_secs_f64();
    // How long an answer takes when nobody has to wait for another.
    let calm = Load::paced(outbound, "app", AT_ONCE, 100, CAPACITY / 2);
    tokio::time::sleep(PEAK).await;
    let mut calm = calm.stop().await;

    let started = Instant::now();
    let load = Load::paced(outbound, "app", CLIENTS, 100, CAPACITY * factor);
    tokio::time::sleep(time).await;
    let mut totals = load.stop().await;
    let took = started.elapsed().as_secs_f64();
    let goodput = totals.whole as f64 / took;
    let offered = (totals.whole + totals.refused) as f64 / took;

    // From its end on: until when is anything refused?
    let ended = Instant::now();
    let mut recovered = Duration::ZERO;
    while ended.elapsed() < Duration::from_secs(2) {
        let (status, _) = raw::get(outbound, "app", "/").await;
        if status != 200 {
            recovered = ended.elapsed();
        }
    }
    println!(
        "b5: {offered:.0} requests per second offered for {took:.0} s; goodput {goodput:.0} of {peak:.0} at its best: {:.1} % (goal 90 %); {} refused at once, {} wrong, {} broken (goal 0)",
        goodput / peak * 100.0,
        totals.refused,
        totals.wrong,
        totals.broken
    );
    println!(
        "b5: p99 of the admitted {} us from when they were due, {} us at half its best (goal 2 x); p90 {} and {} us; recovered {recovered:?} after the end (goal 1 s)",
        totals.percentile(0.99),
        calm.percentile(0.99),
        totals.percentile(0.90),
        calm.percentile(0.90)
    );
    (totals.wrong, totals.broken) == (0, 0)
        && totals.refused > 0
        && goodput >= peak * 0.9
        && recovered < Duration::from_secs(1)
}

/// An application that does so much at once, and lets everybody else wait.
async fn limited() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let permits = Arc::clone(&permits);
            let service = service_fn(move |request: Request<Incoming>| {
                let permits = Arc::clone(&permits);
                async move {
                    let id = request.headers().get("x-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
                    let body = request.into_body().collect().await.map_or(0, |body| body.to_bytes().len());
                    let _permit = permits.acquire().await;
                    tokio::time::sleep(WORK).await;
                    let saw = serde_json::json!({"headers": {"x-id": id}, "body_bytes": body});
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(saw.to_string()))))
                }
            });
            tokio::spawn(async move {
                // A proxy that goes away is no event.
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    addr
}
