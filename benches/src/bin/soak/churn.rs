//! C6: every endpoint replaced each 100 ms under load.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_testkit::ledger::Load;
use mesh_testkit::process::ConfigDir;
use mesh_testkit::raw::get_json;
use mesh_testkit::until;
use mesh_testkit::upstream::Echo;

use crate::proxy::{reload, service, start};

/// How often every endpoint is replaced.
const EVERY: Duration = Duration::from_millis(100);

pub(crate) async fn run(time: Duration) -> bool {
    let mut apps = Vec::new();
    for _ in 0..10 {
        apps.push(Echo::start("app").await);
    }
    let addresses: Vec<SocketAddr> = apps.iter().map(|app| app.addr).collect();
    let (even, odd) = addresses.split_at(5);
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &service(even));
    let config = dir.file("mesh.yaml");
    let any = "127.0.0.1:0";
    let sidecar =
        start("sidecar", &["--config", &config, "--outbound", any, "--admin", any, "--log", "error"]);
    let load = Load::start(sidecar.address("outbound"), "app", 8, 1024);
    let mut tick = tokio::time::interval(EVERY);
    let (mut turns, started) = (0_u64, tokio::time::Instant::now());
    while started.elapsed() < time || turns % 2 == 1 {
        tick.tick().await;
        turns += 1;
        dir.replace("mesh.yaml", &service(if turns % 2 == 0 { even } else { odd }));
        reload(&sidecar, turns).await;
    }
    let totals = load.stop().await;
    let twice = apps.iter().flat_map(|app| app.seen().into_values()).filter(|count| *count > 1).count();
    println!(
        "c6: {turns} turns of every endpoint; {} whole, {} refused, {} wrong, {} broken, {twice} sent twice (goal 0)",
        totals.whole, totals.refused, totals.wrong, totals.broken
    );
    // What is gone has no connection for long: everything that is open is to the endpoints of this generation.
    let admin = sidecar.address("admin");
    until("the connections to endpoints that are gone to end", async || {
        let clusters = get_json(admin, "/clusters").await;
        let Some(cluster) = clusters["clusters"].as_array().and_then(|all| {
            all.iter().find(|cluster| cluster["name"].as_str().is_some_and(|name| name.contains("app.")))
        }) else {
            return false;
        };
        let listed: u64 = cluster["endpoints"].as_array().map_or(0, |endpoints| {
            endpoints.iter().filter_map(|endpoint| endpoint["connections"].as_u64()).sum()
        });
        cluster["now"]["connections"].as_u64() == Some(listed)
    })
    .await;
    println!("c6: every open connection is to an endpoint of the last generation");
    totals.is_clean() && twice == 0
}
