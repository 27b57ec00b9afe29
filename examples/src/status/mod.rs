//! What Istio's agent answers on its status port (15020) beside health (PT-01).
//!
//! | path | who may ask | what it does |
//! |---|---|---|
//! | POST `/quitquitquit` | this host | ends the process as SIGTERM does; asked again it has no effect |
//! | POST `/drain` | this host | drains the listeners; the process stays until a signal or `/quitquitquit` |
//! | `/app-health/CONTAINER/{livez,readyz,startupz}` | anyone | asks the application what the kubelet would ask it |
//! | `/stats/prometheus`, `/metrics` | anyone | our own metrics, and behind them the application's ([`Metrics`]) |
//!
//! The semantics are those of Istio's `pilot-agent/status/server.go`. Probes go to `INSTANCE_IP`, the address of the pod
//! (default 127.0.0.1), from 127.0.0.6 (for IPv6 from `::6`), which Istio's iptables rules do not redirect to the proxy. A
//! path without a prober is 400; no answer in time is 500, and without `timeoutSeconds` a probe takes Kubernetes' 1 s, not
//! forever as in Istio.
//!
//! | probe | how | success |
//! |---|---|---|
//! | `httpGet` | GET with the kubelet's headers; redirects at the same host are followed, ten requests in all, to another port or scheme without the kubelet's headers and not to ports of ours (500) | the application's status, and the first 10 KiB of its answer; a redirect that leads elsewhere is 200 |
//! | `httpGet` with `scheme: HTTPS` | the same over HTTP/2 or HTTP/1.1 by ALPN, and **the certificate is not verified**, as the kubelet does not; the client that does so is private to these probes | the same |
//! | `tcpSocket` | connects | 200 when that succeeds, else 500 |
//! | `grpc` | `grpc.health.v1.Health/Check` over HTTP/2 without TLS | 200 for `SERVING`, else 500 |

mod controls;
mod grpc;
mod http;
mod location;
mod metrics;
mod page;
mod probers;
mod unverified;

use ::http::{Response, StatusCode};
use bytes::Bytes;
use mesh_core::Body;

pub use self::controls::Controls;
pub use self::metrics::{ANNOTATIONS, Metrics};
pub use self::page::TEXT_PAGE;
pub use self::probers::{PROBERS, Probers};

fn reply(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::full(body));
    *response.status_mut() = status;
    response
}
