//! A resolver that fails while requests go on (A12).

use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_core::ClusterName;
use mesh_route::discover::{Discoverer, Resolve, Resolving};
use mesh_route::{Cluster, ClusterSpec, Clusters, Discovery, DnsEndpoint};
use mesh_testkit::scripted::{Reply, Script};

use crate::support::{BOTH, Host, Network, get, nothing_is_left, outcome};

/// Answers in turn: the address, `SERVFAIL`, nothing, late, `SERVFAIL`, ten thousand records.
#[derive(Clone)]
struct Broken {
    good: IpAddr,
    asked: Arc<AtomicUsize>,
    seen: Arc<Mutex<Vec<&'static str>>>,
}

impl Resolve for Broken {
    fn resolve(&self, _: Arc<str>) -> Resolving {
        let good = self.good;
        let kinds = ["good", "SERVFAIL", "empty", "slow", "SERVFAIL", "ten thousand"];
        let kind = kinds[self.asked.fetch_add(1, Ordering::SeqCst) % kinds.len()];
        self.seen.lock().unwrap().push(kind);
        Box::pin(async move {
            match kind {
                "SERVFAIL" => Err(io::Error::other("SERVFAIL")),
                "empty" => Ok(Vec::new()),
                "slow" => {
                    tokio::time::sleep(Duration::from_secs(30)).await;
                    Ok(vec![good])
                }
                // The same address again and again; what is not there does not matter here.
                "ten thousand" => Ok(vec![good; 10_000]),
                _ => Ok(vec![good]),
            }
        })
    }
}

#[tokio::test(start_paused = true)]
async fn a12_a_resolver_that_fails_drops_no_request() {
    for protocol in BOTH {
        let (network, up) = (Network::default(), Script::new("up", |_| Reply::Status(200)));
        let addr = network.host(Host::script(&up, protocol));
        let name = DnsEndpoint::new("up.example", addr.port());
        let mut spec = ClusterSpec::new(ClusterName::custom("up"), Discovery::StrictDns(vec![name]));
        (spec.protocol, spec.dns_refresh_rate) = (protocol, Duration::ZERO);
        let cluster = Arc::new(Cluster::new(spec));
        Clusters::new().reconcile(std::slice::from_ref(&cluster));
        let resolver = Broken { good: addr.ip(), asked: Arc::default(), seen: Arc::default() };
        let discoverer = Discoverer::new(resolver.clone(), tokio::runtime::Handle::current());
        discoverer.follow(std::slice::from_ref(&cluster));
        let client = network.client(&cluster, |route| route);
        mesh_testkit::until("the first answer", async || !cluster.endpoints().is_empty()).await;
        for number in 0..2000 {
            assert_eq!(outcome(&client, get()).await, "200 - up", "{protocol:?} {number}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let asked = resolver.asked.load(Ordering::SeqCst);
        let seen = resolver.seen.lock().unwrap().clone();
        assert!(seen.contains(&"ten thousand") && asked <= 201, "at most once a second: {asked}");
        assert_eq!(up.requests(), 2000);
        nothing_is_left(&cluster, || up.open()).await;
    }
}
