//! `--simulate` as its users run it: every scenario of `examples/config/simulate`, exit codes, both forms of the report.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use mesh_testkit::process::ConfigDir;
use serde_json::Value;

const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");
const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");

const SERVICE: &str = "---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: a}
spec:
  hosts: [a.default.svc.cluster.local]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP}]
  endpoints: [{address: 10.0.0.1}]
";

fn scenario(more: &str) -> String {
    format!(
        "apiVersion: mesh.rs/v1alpha1\nkind: Scenario\nmetadata: {{name: s}}\nspec:\n  duration: 2s\n  \
         load: [{{rate: 10, host: a}}]\n{more}"
    )
}

fn run(binary: &str, args: &[&str]) -> Output {
    Command::new(binary).args(args).output().unwrap()
}

fn out(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Every scenario is met, and says the same in every process.
#[test]
fn every_scenario_is_met() {
    let folder = format!("{}/config/simulate", env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let mut scenarios: Vec<_> = files.filter(|path| path.is_file()).collect();
    scenarios.sort();
    assert!(scenarios.len() >= 3, "{scenarios:?}");
    for path in scenarios {
        let path = path.to_str().unwrap();
        let (code, printed, said) = out(&run(SIDECAR, &["--simulate", path]));
        assert_eq!((code, said.as_str()), (Some(0), ""), "{path}:\n{printed}");
        assert!(printed.contains("\n      met  spec.expect[0]"), "{path}:\n{printed}");
        assert!(printed.lines().all(|line| line.chars().count() <= 100), "{path}:\n{printed}");
        let json = ["--simulate", path, "--simulate-format", "json"];
        let (code, first, _) = out(&run(SIDECAR, &json));
        assert_eq!(code, Some(0), "{path}");
        let report: Value = serde_json::from_str(&first).unwrap();
        assert!(report["total"]["requests"].as_u64().unwrap() > 100, "{path}");
        for _ in 0..2 {
            assert_eq!(out(&run(SIDECAR, &["--simulate", path])).1, printed, "{path}");
            assert_eq!(out(&run(SIDECAR, &json)).1, first, "{path}");
        }
    }
}

#[test]
fn what_is_not_met_exits_with_1_and_is_named() {
    let dir = ConfigDir::new();
    let expect = "  endpoints: [{script: [{from: 1s, answers: [{status: 500}]}]}]\n  expect:\n  \
                  - {success: '>= 40%'}\n  - {name: half, success: '>= 99.5%'}\n";
    dir.write("s.yaml", &(scenario(expect) + SERVICE));
    let (code, printed, said) = out(&run(SIDECAR, &["--simulate", &dir.file("s.yaml")]));
    assert_eq!(code, Some(1));
    assert!(printed.contains("NOT MET  spec.expect[1].success (half): >= 99.5%, was 50.00%"), "{printed}");
    let file = dir.file("s.yaml");
    let line = format!("error: {file}:10:27: spec.expect[1].success (half): expected >= 99.5%, was 50.00%\n");
    assert_eq!(said, line);
}

#[test]
fn mistakes_are_named_with_their_place() {
    let dir = ConfigDir::new();
    dir.write("s.yaml", &(scenario("  config: [sub/a.yaml]\n  endpionts: []\n") + SERVICE));
    let (code, printed, said) = out(&run(SIDECAR, &["--simulate", &dir.file("s.yaml")]));
    assert_eq!((code, printed.as_str()), (Some(1), ""));
    assert!(said.contains("s.yaml:8:3: Scenario default/s: spec.endpionts: unknown field"), "{said}");
    dir.write("s.yaml", &(scenario("  config: [a.yaml]\n") + SERVICE));
    let (code, _, said) = out(&run(SIDECAR, &["--simulate", &dir.file("s.yaml")]));
    assert_eq!(code, Some(1));
    assert!(
        said.contains("s.yaml:7:12: Scenario default/s: spec.config[0]: ") && said.contains("a.yaml"),
        "{said}"
    );
    dir.write("a.yaml", &SERVICE.replace("name: a", "name: b").replace("STATIC", "SOMETIMES"));
    let (code, _, said) = out(&run(SIDECAR, &["--simulate", &dir.file("s.yaml")]));
    assert_eq!(code, Some(1));
    assert!(said.contains("a.yaml:7:15: ServiceEntry default/b: spec.resolution: "), "{said}");
    assert!(said.ends_with("nothing was simulated\n"), "{said}");
    let (code, ..) = out(&run(SIDECAR, &["--simulate", &dir.file("none.yaml")]));
    assert_eq!(code, Some(1));
    for args in
        [&["--simulate"][..], &["--simulate-format", "json"], &["--simulate", "a", "--simulate-format", "x"]]
    {
        assert_eq!(out(&run(SIDECAR, args)).0, Some(2), "{args:?}");
    }
}

/// The scenario from standard input, on a configuration that knows nothing of it.
#[test]
fn a_scenario_tries_any_configuration() {
    let dir = ConfigDir::new();
    dir.write("a.yaml", SERVICE);
    let mut child = Command::new(SIDECAR)
        .args(["--simulate", "-", "--config", &dir.file("a.yaml"), "--simulate-format", "json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(scenario("").as_bytes()).unwrap();
    let (code, printed, _) = out(&child.wait_with_output().unwrap());
    assert_eq!(code, Some(0));
    let report: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(report["total"]["succeeded"], 20);
    assert_eq!(report["total"]["tries_by_endpoint"]["10.0.0.1:80"], 20);
}

#[test]
fn a_gateway_is_simulated_at_its_listeners() {
    let dir = ConfigDir::new();
    let edge = "---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: edge}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: a}
spec: {hosts: [shop.example], gateways: [edge], http: [{route: [{destination: {host: a.default.svc.cluster.local}}]}]}
";
    dir.write("s.yaml", &(scenario("").replace("host: a", "host: shop.example") + SERVICE + edge));
    let json = ["--simulate", &dir.file("s.yaml"), "--simulate-format", "json"];
    let total = |binary| {
        let (code, printed, said) = out(&run(binary, &json));
        assert_eq!(code, Some(0), "{said}");
        serde_json::from_str::<Value>(&printed).unwrap()["total"].clone()
    };
    assert_eq!(total(GATEWAY)["succeeded"], 20);
    let (code, printed, said) = out(&run(SIDECAR, &json));
    assert_eq!((code, printed.as_str()), (Some(1), ""), "a sidecar does not know the host");
    let line = "s.yaml:6:27: Scenario default/s: spec.load[0].host: nothing in the configuration answers to \"shop.example\"";
    assert!(said.contains(line), "{said}");
}
