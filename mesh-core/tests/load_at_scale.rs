//! A configuration of a thousand services loads quickly, and what stays of it is small.
#![cfg(feature = "istio")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fmt::Write as _;
use std::time::Duration;

use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};

/// Of a core, without optimisation; it takes a quarter of a second.
const PATIENCE: Duration = Duration::from_secs(3);

#[test]
fn a_thousand_services_load_quickly() {
    let mut text = String::new();
    for n in 0..1000 {
        write!(
            text,
            "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: s{n}\nspec:\n\
             \x20 hosts:\n  - s{n}\n  http:\n  - match:\n    - uri:\n        prefix: /api\n      headers:\n        x-user:\n\
             \x20         exact: jason\n    route:\n    - destination:\n        host: s{n}\n        subset: v2\n  - route:\n\
             \x20   - destination:\n        host: s{n}\n        subset: v1\n      weight: 90\n    - destination:\n\
             \x20       host: s{n}\n        subset: v3\n      weight: 10\n    timeout: 5s\n---\n\
             apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata:\n  name: s{n}\nspec:\n  host: s{n}\n\
             \x20 trafficPolicy:\n    loadBalancer:\n      simple: ROUND_ROBIN\n    outlierDetection:\n\
             \x20     consecutive5xxErrors: 5\n  subsets:\n  - name: v1\n    labels:\n      version: v1\n\
             \x20 - name: v2\n    labels:\n      version: v2\n  - name: v3\n    labels:\n      version: v3\n"
        )
        .unwrap();
    }
    let bytes = text.len();
    let file = SourceFile::new("mesh.yaml", text);
    let begin = computed();
    let (set, diags) = ResourceSet::load(&[file], &LoadOptions::default());
    let took = computed() - begin;
    println!("{bytes} bytes in {took:?}");
    assert_eq!(diags.to_string(), "");
    assert_eq!((set.virtual_services().len(), set.destination_rules().len()), (1000, 1000));
    assert!(took < PATIENCE, "took {took:?}");
}

/// Every route is compared with those before it, but not with each of them.
#[test]
fn ten_thousand_routes_of_one_service_load_quickly() {
    let mut text = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: big}\nspec:\n  hosts: [big]\n  http:\n"
        .to_owned();
    for n in 0..10_000 {
        writeln!(
            text,
            "  - match: [{{uri: {{prefix: /}}, headers: {{x-user: {{exact: u{n}}}}}}}]\n    route: [{{destination: {{host: big}}}}]"
        )
        .unwrap();
    }
    let begin = computed();
    let (set, diags) = ResourceSet::load(&[SourceFile::new("big.yaml", text)], &LoadOptions::default());
    let took = computed() - begin;
    println!("10,000 routes in {took:?}");
    assert_eq!((diags.to_string(), set.len()), (String::new(), 1));
    assert!(took < PATIENCE, "took {took:?}");
}

/// What this thread has computed so far. A machine that is busy with something else does not count.
fn computed() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
