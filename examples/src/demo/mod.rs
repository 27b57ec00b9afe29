//! The embedded demo: Bookinfo in this process, behind this process's own outbound listener.
//!
//! Every version of every service is a small HTTP server on a free loopback port. They know each other only by
//! their mesh names: `productpage` asks for `reviews`, and `reviews` v2 and v3 ask for `ratings`, through the
//! sidecar, as applications do. The configuration is ordinary Istio YAML (`config/demo.yaml`), in which the ports
//! that the servers got are filled in.

mod app;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

pub use app::Bookinfo;

/// The configuration of the demo, with `@SERVICE-VERSION@` in the place of ports.
const CONFIG: &str = include_str!("../../config/demo.yaml");

/// Starts the servers on the current runtime, before there is a sidecar to ask; tell them later with
/// [`Bookinfo::connect`].
///
/// # Errors
/// When no loopback port can be had.
pub async fn start() -> io::Result<Arc<Bookinfo>> {
    Bookinfo::start().await
}

/// The demo's configuration for servers on these ports.
#[must_use]
pub fn config(bookinfo: &Bookinfo) -> String {
    bookinfo.ports().iter().fold(CONFIG.to_owned(), |text, (workload, port)| {
        text.replace(&format!("@{workload}@"), &port.to_string())
    })
}

/// What the demo tells its user at the start.
#[must_use]
pub fn welcome(outbound: SocketAddr, admin: SocketAddr) -> String {
    format!(
        "\
The demo runs Bookinfo in this process: productpage, reviews v1, v2 and v3, ratings.
Its VirtualService sends 90 % of the requests for reviews to v1 and 10 % to v3. Try, from another terminal:

  curl -H 'Host: reviews' http://{outbound}/
  curl -H 'Host: productpage' http://{outbound}/
  for i in $(seq 100); do curl -s -H 'Host: reviews' http://{outbound}/; done | sort | uniq -c

Why a request goes where it goes, and what is in force:

  curl '{explain}'
  curl http://{admin}/clusters
  curl http://{admin}/config_dump

Ctrl-C ends it. With your own YAML: sidecar --config PATH
",
        explain = format_args!("http://{admin}/explain?url=http://reviews/"),
    )
}
