//! C1: reloads under load.

use std::time::Duration;

use mesh_testkit::ledger::Load;
use mesh_testkit::process::ConfigDir;
use mesh_testkit::upstream::Echo;

use crate::proxy::{reload, service, start};

/// Requests per second.
const RATE: u32 = 1000;

/// How long nothing changes, to compare with.
const QUIET: Duration = Duration::from_secs(10);

pub(crate) async fn run(reloads: u32) -> bool {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    // Each generation says its name twice, once in a header and once in the path; routes, weights and clusters change.
    let generation = |number: u32| {
        format!(
            "{}apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: app}}\nspec: {{host: app, subsets: [{{name: v{number}}}, {{name: other}}]}}\n---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: app}}\nspec:\n  hosts: [app]\n  http:\n  - headers: {{request: {{set: {{x-generation: g{number}}}}}}}\n    rewrite: {{uri: /g{number}/echo}}\n    match: [{{uri: {{prefix: /echo}}}}]\n    route:\n    - {{destination: {{host: app, subset: v{number}}}, weight: {}}}\n    - {{destination: {{host: app, subset: other}}, weight: 50}}\n",
            service(&[app.addr]),
            number % 50 + 1
        )
    };
    dir.write("mesh.yaml", &generation(0));
    let config = dir.file("mesh.yaml");
    let any = "127.0.0.1:0";
    let sidecar =
        start("sidecar", &["--config", &config, "--outbound", any, "--admin", any, "--log", "error"]);
    let outbound = sidecar.address("outbound");

    let quiet = Load::paced(outbound, "app", 16, 1024, RATE);
    tokio::time::sleep(QUIET).await;
    let mut quiet = quiet.stop().await;

    let load = Load::paced(outbound, "app", 16, 1024, RATE);
    let mut before = 0;
    let mut tick = tokio::time::interval(Duration::from_millis(20));
    for number in 1..=reloads {
        tick.tick().await;
        dir.replace("mesh.yaml", &generation(number));
        reload(&sidecar, u64::from(number)).await;
        // The pools have filled by then.
        if number == reloads * 3 / 10 {
            before = sidecar.pss_kib();
        }
        if number % 100 == 0 {
            println!("c1: {number} reloads, {} requests, {} KiB", load.done(), sidecar.pss_kib());
        }
    }
    let after = sidecar.pss_kib();
    let mut totals = load.stop().await;
    let twice = app.seen().values().filter(|count| **count > 2).count();
    println!(
        "c1: {reloads} reloads; {} whole, {} refused, {} wrong or mixed, {} broken, {twice} sent twice (goal 0)",
        totals.whole, totals.refused, totals.wrong, totals.broken
    );
    println!(
        "c1: p99 {} us, quiet {} us (goal +5 %); p90 {} us, quiet {} us; PSS {before} -> {after} KiB (goal 5 %)",
        totals.percentile(0.99),
        quiet.percentile(0.99),
        totals.percentile(0.90),
        quiet.percentile(0.90)
    );
    let flat = after <= before + before / 20;
    quiet.is_clean() && totals.is_clean() && totals.connections == 16 && twice == 0 && flat
}
