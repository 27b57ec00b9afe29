//! Bookinfo's own networking files, unmodified, and their effect through the binaries.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::exchange;
use mesh_testkit::shared_data;
use mesh_testkit::upstream::Echo;
use serde_json::Value;

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");
const ANY: &str = "127.0.0.1:0";

/// The services of Bookinfo and the versions that are deployed.
const SERVICES: &[(&str, &[&str])] = &[
    ("productpage", &["v1"]),
    ("reviews", &["v1", "v2", "v3"]),
    ("ratings", &["v1", "v2", "v2-mysql", "v2-mysql-vm"]),
    ("details", &["v1", "v2"]),
];

/// Bookinfo, each version an application of its own.
struct Bookinfo {
    _apps: Vec<Echo>,
    yaml: String,
}

impl Bookinfo {
    async fn start() -> Self {
        let (mut apps, mut yaml) = (Vec::new(), String::new());
        for (service, deployed) in SERVICES {
            let _ = write!(
                yaml,
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {service}, namespace: default}}\nspec: {{ports: [{{port: 9080, name: http}}], selector: {{app: {service}}}}}\n---\n"
            );
            for version in *deployed {
                let app = Echo::start(version).await;
                let _ = write!(
                    yaml,
                    "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {service}-{version}, namespace: default}}\nspec: {{address: {}, ports: {{http: {}}}, labels: {{app: {service}, version: {version}}}}}\n---\n",
                    app.addr.ip(),
                    app.addr.port()
                );
                apps.push(app);
            }
        }
        Self { _apps: apps, yaml }
    }

    /// Asks `host` so often as `user`; how often each version answered, a status where none did.
    async fn ask(proxy: SocketAddr, host: &str, user: &str, times: u32) -> BTreeMap<String, u32> {
        let mut one =
            format!("GET / HTTP/1.1\r\nhost: {host}\r\nend-user: {user}\r\n\r\n").repeat(times as usize);
        one = one.trim_end().to_owned() + "\r\nconnection: close\r\n\r\n";
        let answer = exchange(proxy, one.as_bytes(), Duration::from_secs(5)).await;
        let text = String::from_utf8_lossy(&answer.bytes).into_owned();
        let mut seen = BTreeMap::new();
        for part in text.split("HTTP/1.1 ").skip(1) {
            let status = part.get(..3).unwrap_or_default();
            let saw = part.find('{').and_then(|at| serde_json::from_str::<Value>(part[at..].trim()).ok());
            let name = saw.as_ref().and_then(|saw| saw["name"].as_str()).unwrap_or(status);
            *seen.entry(name.to_owned()).or_default() += 1;
        }
        seen
    }
}

fn file(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// What one file does: whom `user` reaches at `host`, in percent.
struct Effect(&'static str, &'static str, &'static str, &'static [(&'static str, u32)]);

#[rustfmt::skip]
const EFFECTS: &[Effect] = &[
    Effect("virtual-service-all-v1.yaml", "reviews", "", &[("v1", 100)]),
    Effect("virtual-service-all-v1.yaml", "details", "", &[("v1", 100)]),
    Effect("virtual-service-all-v1.yaml", "ratings", "", &[("v1", 100)]),
    Effect("virtual-service-all-v1.yaml", "productpage", "", &[("v1", 100)]),
    Effect("virtual-service-details-v2.yaml", "details", "", &[("v2", 100)]),
    Effect("virtual-service-ratings-db.yaml", "reviews", "", &[("v3", 100)]),
    Effect("virtual-service-ratings-db.yaml", "ratings", "", &[("v2", 100)]),
    Effect("virtual-service-ratings-mysql.yaml", "ratings", "", &[("v2-mysql", 100)]),
    Effect("virtual-service-ratings-mysql-vm.yaml", "ratings", "", &[("v2-mysql-vm", 100)]),
    Effect("virtual-service-reviews-50-v3.yaml", "reviews", "", &[("v1", 50), ("v3", 50)]),
    Effect("virtual-service-reviews-80-20.yaml", "reviews", "", &[("v1", 80), ("v2", 20)]),
    Effect("virtual-service-reviews-90-10.yaml", "reviews", "", &[("v1", 90), ("v2", 10)]),
    Effect("virtual-service-reviews-jason-v2-v3.yaml", "reviews", "jason", &[("v2", 100)]),
    Effect("virtual-service-reviews-jason-v2-v3.yaml", "reviews", "jane", &[("v3", 100)]),
    Effect("virtual-service-reviews-test-v2.yaml", "reviews", "jason", &[("v2", 100)]),
    Effect("virtual-service-reviews-test-v2.yaml", "reviews", "jane", &[("v1", 100)]),
    Effect("virtual-service-reviews-v2-v3.yaml", "reviews", "", &[("v2", 50), ("v3", 50)]),
    Effect("virtual-service-reviews-v3.yaml", "reviews", "", &[("v3", 100)]),
];

#[tokio::test]
async fn the_networking_files_of_bookinfo_have_their_effect() {
    const TIMES: u32 = 400;
    for samples in ["istio-samples", "istio-samples-1.1"] {
        let Some(data) = shared_data("the_networking_files_of_bookinfo_have_their_effect", samples) else {
            return;
        };
        let folder = data.join("samples/bookinfo/networking");
        let bookinfo = Bookinfo::start().await;
        let mut shown = 0;
        for Effect(name, host, user, wanted) in EFFECTS {
            let dir = ConfigDir::new();
            dir.write("0-services.yaml", &bookinfo.yaml);
            dir.write("1-rules.yaml", &file(&folder, "destination-rule-all.yaml"));
            dir.write("2-sample.yaml", &file(&folder, name));
            let config = dir.path().to_str().unwrap();
            let sidecar = Process::start(SIDECAR, &["--config", config, "--outbound", ANY, "--admin", ANY]);
            let seen = Bookinfo::ask(sidecar.address("outbound"), host, user, TIMES).await;
            let versions: Vec<&str> = seen.keys().map(String::as_str).collect();
            let expected: Vec<&str> = wanted.iter().map(|(version, _)| *version).collect();
            assert_eq!(versions, expected, "{samples}/{name} {host} {user:?}: {seen:?}");
            for (version, percent) in *wanted {
                // Six standard deviations: once in a thousand million runs by chance.
                let (n, p) = (f64::from(TIMES), f64::from(*percent) / 100.0);
                let off = (f64::from(seen[*version]) - n * p).abs();
                assert!(off <= 6.0 * (n * p * (1.0 - p)).sqrt() + 0.5, "{samples}/{name}: {seen:?}");
            }
            shown += 1;
        }
        println!("{samples}: {shown} effects of bookinfo's networking files");
    }
}

#[tokio::test]
async fn the_gateway_of_bookinfo_leads_to_its_page() {
    let Some(data) = shared_data("the_gateway_of_bookinfo_leads_to_its_page", "istio-samples") else {
        return;
    };
    let folder = data.join("samples/bookinfo/networking");
    let bookinfo = Bookinfo::start().await;
    let dir = ConfigDir::new();
    dir.write("0-services.yaml", &bookinfo.yaml);
    dir.write("bookinfo-gateway.yaml", &file(&folder, "bookinfo-gateway.yaml"));
    let config = dir.path().to_str().unwrap();
    let gateway = Process::start(
        GATEWAY,
        &["--config", config, "--bind", "127.0.0.1", "--map-port", "8080=0", "--admin", ANY],
    );
    let address = gateway.address("http");
    for (path, status) in [
        ("/productpage", 200),
        ("/static/style.css", 200),
        ("/login", 200),
        ("/logout", 200),
        ("/api/v1/products/1/ratings", 200),
        ("/", 404),
        ("/productpage/", 404),
        ("/reviews", 404),
    ] {
        let answer = mesh_testkit::raw::get(address, "bookinfo.example", path).await;
        assert_eq!(answer.0, status, "{path}: {}", answer.1);
    }
}
