//! C5: reloads of a large mesh, and how long they hold a worker up.
//!
//! A probe runs on the worker beside its listener and is polled as often as the worker can. What the worker's thread
//! did on a core between two polls is how long a request that came just then would have waited for this process. The
//! time is the thread's own, so that another process's turn on the core is not counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_benches::mesh_yaml;
use mesh_core::config::{CompileContext, Compiler, Role};
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};
use mesh_core::server::{ListenerSpec, Server};
use mesh_core::{Direction, EdgeSettings, Panics};
use mesh_examples::compose::{self, Parts};
use mesh_route::{Clusters, RouteTable, Shard};
use mesh_telemetry::access_log::AccessLogLayer;

/// Services; each has two endpoints and two routes.
const SERVICES: usize = 5_000;

/// How long a worker may be held up.
const GOAL: Duration = Duration::from_millis(1);

pub(crate) fn run(reloads: u32) -> bool {
    let mut compiler = Compiler::<ResourceSet>::new(CompileContext::new(Role::Sidecar));
    let routes = compiler.register::<RouteTable>();
    let edge = compiler.register::<EdgeSettings>();
    let (clusters, table) = (Clusters::new(), routes.clone());
    compiler.before_publish(move |snapshot| {
        if let Some(table) = snapshot.get(&table) {
            clusters.reconcile(table.clusters());
        }
    });
    let text = mesh_yaml(SERVICES, 2);
    let load = |compiler: &mut Compiler<ResourceSet>| {
        let file = SourceFile::new("<soak>", text.clone());
        let (set, diagnostics) = ResourceSet::load(&[file], &LoadOptions::default());
        compiler.apply(&set, diagnostics).accepted
    };
    let parts = Parts { access_log: AccessLogLayer::off(), panics: Panics::default(), edge, servers: None };
    let server = Server::builder().workers(1).snapshots(compiler.snapshots().clone()).start();
    let server = server.unwrap_or_else(|error| panic!("a server: {error}"));
    let (longest, on) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(true)));
    let (told, probing) = (Arc::clone(&longest), Arc::clone(&on));
    let spec = ListenerSpec::new("outbound", ([127, 0, 0, 1], 0).into(), Direction::Outbound);
    let listening = server.listen(spec, move |_| {
        tokio::spawn(probe(Arc::clone(&told), Arc::clone(&probing)));
        compose::outbound(&parts, Direction::Outbound, routes.clone(), Shard::new())
    });
    listening.unwrap_or_else(|error| panic!("a listener: {error}"));

    let mut held = load(&mut compiler);
    longest.store(0, Ordering::Relaxed);
    std::thread::sleep(Duration::from_secs(3));
    let quiet = Duration::from_nanos(longest.swap(0, Ordering::Relaxed));
    let mut took = Vec::new();
    for _ in 0..reloads {
        let started = Instant::now();
        held &= load(&mut compiler);
        took.push(started.elapsed());
    }
    // The worker lets go of the last generation by itself.
    std::thread::sleep(Duration::from_secs(1));
    let stalled = Duration::from_nanos(longest.load(Ordering::Relaxed));
    on.store(false, Ordering::Relaxed);
    took.sort_unstable();
    println!(
        "c5: {reloads} reloads of {} routes to {} endpoints, median {:?} each",
        SERVICES * 2,
        SERVICES * 2,
        took.get(took.len() / 2).copied().unwrap_or_default()
    );
    println!("c5: the worker was held up for at most {stalled:?} (goal {GOAL:?}); without reloads {quiet:?}");
    held && stalled <= GOAL
}

async fn probe(longest: Arc<AtomicU64>, on: Arc<AtomicBool>) {
    let mut last = on_core();
    while on.load(Ordering::Relaxed) {
        tokio::task::yield_now().await;
        let now = on_core();
        longest.fetch_max(now.saturating_sub(last), Ordering::Relaxed);
        last = now;
    }
}

/// Nanoseconds that this thread has been on a core.
fn on_core() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}
