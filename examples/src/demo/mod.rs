//! The embedded demo: Bookinfo in this process, behind this process's own outbound listener.
//!
//! Every version of every service is a small HTTP server on a free loopback port. They know each other only by
//! their mesh names: `productpage` asks for `reviews`, and `reviews` v2 and v3 ask for `ratings`, through a
//! sidecar, as applications do. Every server has an identity of its own and lets in nobody without one; an authority
//! that lives as long as the process signs them. The configuration is ordinary Istio YAML (`config/demo.yaml`), in which the ports
//! that the servers got are filled in.

mod app;
mod identities;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

pub use app::Bookinfo;
pub use identities::Identities;

/// The configuration of the demo, with `@SERVICE-VERSION@` in the place of ports.
const CONFIG: &str = include_str!("../../config/demo.yaml");

/// The namespace of the servers.
const NAMESPACE: &str = "default";

/// Starts the servers on the current runtime, before there is a sidecar to ask; tell them later with
/// [`Bookinfo::connect`]. Without identities they speak plaintext.
///
/// # Errors
/// When no loopback port can be had.
pub async fn start(identities: Option<&Identities>) -> io::Result<Arc<Bookinfo>> {
    Bookinfo::start(identities).await
}

/// An identity for each server, and one for the sidecar that its user asks.
///
/// # Errors
/// When a name is none of SPIFFE's, or the system gives no key; the words are for the user.
pub fn identities(trust_domain: &str, user: &str) -> Result<Identities, String> {
    let workloads: Vec<_> = app::workloads().collect();
    let accounts = workloads.iter().map(String::as_str).chain([user]);
    Identities::new(trust_domain, NAMESPACE, accounts)
}

/// The demo's configuration for these servers.
#[must_use]
pub fn config(bookinfo: &Bookinfo) -> String {
    bookinfo.ports().iter().fold(CONFIG.to_owned(), |text, (workload, port)| {
        let text = text.replace(&format!("@{workload}@"), &port.to_string());
        if bookinfo.is_secured() { text } else { text.replace(&format!(", serviceAccount: {workload}"), "") }
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

Every server has an identity of its own and lets in nobody without one: applications speak plain HTTP, what goes
between their sidecars is mutual TLS. Who a server was asked by, and every certificate in force:

  curl -i -H 'Host: reviews' http://{outbound}/
  curl http://{admin}/certs

Why a request goes where it goes, and what is in force:

  curl '{explain}'
  curl http://{admin}/clusters
  curl http://{admin}/config_dump

Ctrl-C ends it. With your own YAML: sidecar --config PATH
",
        explain = format_args!("http://{admin}/explain?url=http://reviews/"),
    )
}
