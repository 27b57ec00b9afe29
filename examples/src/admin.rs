//! The admin endpoints (PT-02, the part that reads), and Istio's health and Prometheus ports.
//!
//! They are served on the control plane's runtime, so that a slow reader stalls no request, and they answer during a
//! drain: `/ready` is how a drain is announced.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Instant, SystemTime};

use http::header::{ALLOW, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use mesh_core::config::Workload;
use mesh_core::diagnostics::{Diagnostic, Severity};
use mesh_core::identity::SpiffeId;
use mesh_core::server::{HttpStack, Phase, Server};
use mesh_core::{Body, Direction, EdgeSettings, Slot, Snapshots};
use mesh_route::canary::Canaries;
use mesh_route::diff::Counts;
use mesh_route::{Clusters, MirrorOutcome, RouteTable, TcpRouteTable, dump};
use mesh_telemetry::access_log::DroppedLines;
use mesh_tls::Materials;
use serde_json::{Value, json};

use crate::certs;
use crate::control::Status;
use crate::explain::Question;
use crate::security::{Asked, Security};
use crate::status::{Controls, Metrics, Probers, TEXT_PAGE};

/// What the endpoints show.
#[derive(Debug)]
pub struct Admin {
    /// `sidecar` or `gateway`.
    pub binary: &'static str,
    /// What became of the configuration.
    pub status: Status,
    /// The snapshots in force.
    pub snapshots: Snapshots,
    /// The routes that virtual services make.
    pub routes: Slot<RouteTable>,
    /// The routes of what is not HTTP.
    pub tcp_routes: Slot<TcpRouteTable>,
    /// The run-time state of the clusters.
    pub clusters: Clusters,
    /// The routes to the applications, with the port of each.
    pub inbound: Vec<(u16, Slot<RouteTable>)>,
    /// How requests are normalised.
    pub edge: Slot<EdgeSettings>,
    /// The listeners. Weakly, as admin connections outlive them: a drain ends with the server, not with whoever watches.
    pub server: Weak<Server>,
    /// The side of the workload that virtual services route.
    pub direction: Direction,
    /// Whom the configuration is compiled for.
    pub workload: Workload,
    /// The same, as the command line says it.
    pub node: Value,
    /// The certificates in force.
    pub security: Security,
    /// The rollouts of canaries.
    pub canaries: Canaries,
    /// What the access log dropped, if it is on.
    pub access_log: Option<DroppedLines>,
    /// When the process began.
    pub started: Instant,
    /// The identity that somebody else gives us, where one is asked.
    pub identity: Option<Asked>,
    /// What handshakes of the mesh use.
    pub materials: Materials,
    /// What the status port asks of the process.
    pub controls: Controls,
    /// The ports of these endpoints.
    pub own_ports: Mutex<Vec<u16>>,
    /// The probes of the application, which the status port answers.
    pub probers: Probers,
    /// The application's metrics, which the status port has behind our own.
    pub metrics: Metrics,
}

/// Which endpoints a port serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// Everything: Istio's 15000.
    Admin,
    /// `/stats/prometheus`: Istio's 15090.
    Prometheus,
    /// Health, statistics and what Istio's agent answers ([`status`](crate::status)): Istio's 15020.
    Status,
    /// Health: Istio's 15021.
    Health,
}

impl Port {
    /// Whether this is a path of Prometheus'. Istio's agent has two.
    fn has_stats(self, path: &str) -> bool {
        path == "/stats/prometheus" || (self == Self::Status && path == "/metrics")
    }
}

const PATHS: &[(&str, &str)] = &[
    (
        "/ready",
        "200 when requests are served, 503 during a drain and before --ca or --spiffe-endpoint gave an identity; generation, identity",
    ),
    ("/healthz/ready", "the same, for probes"),
    ("/config_dump", "the configuration in force: routes, diagnostics, what is not enforced"),
    ("/clusters", "every cluster with its endpoints and counters"),
    (
        "/certs",
        "every certificate in force with its names, serial number and days until expiration, as Envoy's",
    ),
    ("/canary", "every canary with its share, its evidence and what was decided"),
    ("/listeners", "every listener with its address and counters"),
    ("/server_info", "version, workload, uptime"),
    ("/explain?url=http://HOST/PATH", "which rule takes a request, and why not the ones before it"),
    ("/mirror_diff", "where the answers of mirrors differ from those of the primary; samples"),
    (
        "/mirror_diff?captured",
        "the compared requests of mirrors that say \"capture\", a JSON object a line, for sidecar --replay",
    ),
    ("/stats/prometheus", "counters of the process"),
];

impl Admin {
    /// The stack of one port.
    pub fn stack(self: &Arc<Self>, port: Port) -> impl HttpStack + use<> {
        let admin = Arc::clone(self);
        tower::service_fn(move |request: Request<Body>| {
            let admin = Arc::clone(&admin);
            let head = request.into_parts().0;
            async move {
                if port == Port::Status {
                    if let Some(response) = admin.controls.answer(&head) {
                        return Ok(response);
                    }
                    if Probers::owns(head.uri.path()) {
                        return Ok(admin.probers.answer(&head, |port| admin.is_own(port)).await);
                    }
                    if head.method == Method::GET
                        && port.has_stats(head.uri.path())
                        && let Some(own) = admin.server.upgrade().map(|server| admin.prometheus(&server))
                    {
                        return Ok(admin.metrics.merge(own, &head).await);
                    }
                }
                Ok::<_, Infallible>(admin.respond(port, &head))
            }
        })
    }

    /// Whether a port is one of these endpoints' or of the listeners.
    fn is_own(&self, port: u16) -> bool {
        let ours = self.own_ports.lock().unwrap_or_else(PoisonError::into_inner).contains(&port);
        let listeners = self.server.upgrade().map(|server| server.status()).unwrap_or_default();
        ours || listeners.iter().any(|listener| listener.address.port() == port)
    }

    fn respond(&self, port: Port, head: &Parts) -> Response<Body> {
        if !matches!(head.method, Method::GET | Method::HEAD) {
            let mut response =
                text(StatusCode::METHOD_NOT_ALLOWED, "these endpoints are read with GET\n".to_owned());
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        let path = head.uri.path();
        let health = matches!(path, "/healthz/ready");
        let stats = port.has_stats(path);
        let served = match port {
            Port::Admin => true,
            Port::Prometheus => stats,
            Port::Status => stats || health,
            Port::Health => health,
        };
        if !served {
            return not_found(port);
        }
        let Some(server) = self.server.upgrade() else {
            return text(StatusCode::SERVICE_UNAVAILABLE, "the process ends\n".to_owned());
        };
        match path {
            "/" => text(StatusCode::OK, index()),
            "/ready" | "/healthz/ready" => self.ready(port, &server),
            "/config_dump" => json(StatusCode::OK, &self.config_dump()),
            "/clusters" => json(StatusCode::OK, &self.clusters()),
            "/certs" => json(StatusCode::OK, &certs::dump(&self.security.certificates(), SystemTime::now())),
            "/canary" => json(StatusCode::OK, &dump::canaries(&self.canaries)),
            "/listeners" => json(StatusCode::OK, &listeners(&server)),
            "/server_info" => json(StatusCode::OK, &self.server_info(&server)),
            "/explain" => self.explain(head.uri.query().unwrap_or("")),
            "/mirror_diff" => self.mirror_diff(head.uri.query()),
            _ if stats => reply(StatusCode::OK, TEXT_PAGE, self.prometheus(&server)),
            _ => not_found(port),
        }
    }

    fn tables(&self) -> Vec<Arc<RouteTable>> {
        let snapshot = self.snapshots.load();
        std::iter::once(&self.routes)
            .chain(self.inbound.iter().map(|(_, slot)| slot))
            .filter_map(|slot| snapshot.get_shared(slot))
            .collect()
    }

    fn clusters(&self) -> Value {
        let snapshot = self.snapshots.load();
        let (tables, tcp) = (self.tables(), snapshot.get(&self.tcp_routes));
        dump::clusters(
            tables
                .iter()
                .flat_map(|table| table.clusters())
                .chain(tcp.into_iter().flat_map(TcpRouteTable::clusters)),
        )
    }

    fn ready(&self, port: Port, server: &Server) -> Response<Body> {
        let loaded = self.status.read();
        let phase = server.drain().phase();
        let security: Vec<_> = loaded
            .not_enforced
            .iter()
            .filter(|diagnostic| is_security(diagnostic))
            .map(ToString::to_string)
            .collect();
        for warning in &security {
            // Said again and again: it must not be missed.
            tracing::warn!("security configuration is not enforced: {warning}");
        }
        let serving = phase == Phase::Serving && loaded.since.is_some();
        // Only until the first certificate: one that is late later is no reason to send nothing here any more.
        let waiting = self.identity.as_ref().is_some_and(|asked| asked.state.borrow().received == 0);
        let live = serving && !waiting;
        let state = match (serving, waiting) {
            (false, _) => "DRAINING",
            (true, true) => "INITIALIZING",
            (true, false) => "LIVE",
        };
        let mut body = json!({
            "state": state,
            "generation": loaded.generation,
            "accepted": loaded.accepted,
            "rejected": loaded.rejected,
            "security_not_enforced": security,
        });
        if let Some(asked) = &self.identity {
            body["identity"] = identity(asked, &self.materials);
            if port != Port::Admin {
                // Everyone may ask here, and what went wrong names files and the authority.
                body["identity"]["last_error"] = json!(asked.state.borrow().last_reason);
            }
        }
        json(if live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &body)
    }

    fn config_dump(&self) -> Value {
        let loaded = self.status.read();
        let tables = self.tables();
        json!({
            "generation": loaded.generation,
            "accepted": loaded.accepted,
            "rejected": loaded.rejected,
            "since": loaded.since.map(|since| humantime::format_rfc3339_millis(since).to_string()),
            "routes": tables.first().map(|table| dump::routes(table)),
            "tcp_routes": self.snapshots.load().get(&self.tcp_routes).map(dump::tcp_routes),
            "inbound": tables.iter().skip(1).map(|table| dump::routes(table)).collect::<Vec<_>>(),
            "last_load": loaded.diagnostics.iter().map(Diagnostic::to_json).collect::<Vec<_>>(),
            "not_enforced": loaded.not_enforced.iter().map(Diagnostic::to_json).collect::<Vec<_>>(),
        })
    }

    fn server_info(&self, server: &Server) -> Value {
        json!({
            "binary": self.binary,
            "version": env!("CARGO_PKG_VERSION"),
            "state": format!("{:?}", server.drain().phase()).to_ascii_lowercase(),
            "uptime_seconds": mesh_core::clock::now().saturating_duration_since(self.started).as_secs(),
            "node": self.node,
        })
    }

    fn explain(&self, query: &str) -> Response<Body> {
        let mut question = match Question::parse(query) {
            Ok(question) => question,
            Err(reason) => return json(StatusCode::BAD_REQUEST, &json!({ "error": reason })),
        };
        let direction = match question.direction {
            Some(Direction::Inbound) => Direction::Inbound,
            _ => self.direction,
        };
        let snapshot = self.snapshots.load();
        let slot = match direction {
            Direction::Inbound => self.inbound_of(question.port).map(|(app, slot)| {
                question.port = Some(*app);
                slot
            }),
            _ => Some(&self.routes),
        };
        let Some(table) = slot.and_then(|slot| snapshot.get(slot)) else {
            let port = question.port.map_or_else(String::new, |port| format!(" for port {port}"));
            let reason = format!("this process has no {} listener{port}", direction.as_str());
            return json(StatusCode::NOT_FOUND, &json!({ "error": reason }));
        };
        let edge = snapshot.get(&self.edge).copied().unwrap_or_default();
        let seed = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64);
        json(StatusCode::OK, &question.answer(table, direction, edge, &self.workload, seed))
    }

    fn mirror_diff(&self, query: Option<&str>) -> Response<Body> {
        let diffs = self.clusters.mirroring().diffs();
        match query {
            None | Some("") => json(StatusCode::OK, &diffs.to_json()),
            Some("captured") => reply(StatusCode::OK, "application/x-ndjson", diffs.captured()),
            Some(_) => text(StatusCode::BAD_REQUEST, "known is /mirror_diff?captured\n".to_owned()),
        }
    }

    /// The application at this port, or the first one.
    fn inbound_of(&self, port: Option<u16>) -> Option<&(u16, Slot<RouteTable>)> {
        match port {
            None => self.inbound.first(),
            Some(port) => self.inbound.iter().find(|(app, _)| *app == port),
        }
    }

    fn prometheus(&self, server: &Server) -> String {
        let loaded = self.status.read();
        let mut out = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, value: u64| {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
        };
        metric("mesh_config_generation", "gauge", "The generation in force.", loaded.generation);
        metric(
            "mesh_config_accepted_total",
            "counter",
            "Configurations that were accepted.",
            loaded.accepted,
        );
        metric(
            "mesh_config_rejected_total",
            "counter",
            "Configurations that were rejected.",
            loaded.rejected,
        );
        metric("mesh_request_panics_total", "counter", "Panics of requests.", server.panics().count());
        let dropped = self.access_log.as_ref().map_or(0, DroppedLines::count);
        metric("mesh_access_log_dropped_total", "counter", "Access log lines that were dropped.", dropped);
        metric(
            "mesh_application_scrape_failures_total",
            "counter",
            "Pages of the application's metrics that did not come, or not whole.",
            self.metrics.failures(),
        );
        let _ = writeln!(
            out,
            "# HELP mesh_listener_connections Open connections.\n# TYPE mesh_listener_connections gauge"
        );
        for listener in server.status() {
            let _ = writeln!(
                out,
                "mesh_listener_connections{{listener=\"{}\"}} {}",
                listener.name, listener.open
            );
        }
        self.certificate_metrics(&mut out);
        self.mirrored(&mut out);
        self.canary_metrics(&mut out);
        out
    }

    /// How long the identity still lives (D3); below zero when it is over, nothing when there is none.
    fn certificate_metrics(&self, out: &mut String) {
        if let Some(identity) = &self.materials.load().identity {
            let left = match identity.not_after().duration_since(SystemTime::now()) {
                Ok(left) => left.as_secs_f64(),
                Err(over) => -over.duration().as_secs_f64(),
            };
            let name = "mesh_cert_expiry_seconds";
            let help = "How long the certificate of this workload is still valid.";
            // Writing to a String cannot fail.
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {left:.0}");
        }
    }

    fn mirrored(&self, out: &mut String) {
        let name = "mesh_mirrored_requests_total";
        // Writing to a String cannot fail.
        let _ =
            writeln!(out, "# HELP {name} Copies for mirrors, by what became of them.\n# TYPE {name} counter");
        let runtimes = self.clusters.runtimes();
        for runtime in runtimes.iter().filter(|runtime| !runtime.mirrors().is_empty()) {
            for outcome in MirrorOutcome::ALL {
                let (cluster, count) = (runtime.name(), runtime.mirrors().get(outcome));
                let _ =
                    writeln!(out, "{name}{{cluster=\"{cluster}\",outcome=\"{}\"}} {count}", outcome.as_str());
            }
        }
        let name = "mesh_mirrored_requests_in_flight";
        let in_flight = self.clusters.mirroring().in_flight();
        let _ = writeln!(out, "# HELP {name} Copies in flight.\n# TYPE {name} gauge\n{name} {in_flight}");
        let name = "mesh_mirror_comparisons_total";
        let help = "Answers of mirrors that were compared with those of the primary, by what came of it.";
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} counter");
        for Counts { route, mirror, verdicts } in self.clusters.mirroring().diffs().counts() {
            let route = route.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            for (verdict, count) in verdicts {
                let labels = format!("route=\"{route}\",cluster=\"{mirror}\",verdict=\"{verdict}\"");
                let _ = writeln!(out, "{name}{{{labels}}} {count}");
            }
        }
    }

    fn canary_metrics(&self, out: &mut String) {
        let canaries = self.canaries.status();
        let mut say = |line: std::fmt::Arguments<'_>| {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{line}");
        };
        say(format_args!("# HELP mesh_canary_events_total What was decided of canaries."));
        say(format_args!("# TYPE mesh_canary_events_total counter"));
        for (what, count) in [
            ("passed", self.canaries.passed()),
            ("promoted", self.canaries.promoted()),
            ("rolled_back", self.canaries.rolled_back()),
        ] {
            say(format_args!("mesh_canary_events_total{{event=\"{what}\"}} {count}"));
        }
        if canaries.is_empty() {
            return;
        }
        say(format_args!("# HELP mesh_canary_share The share of a canary, in percent."));
        say(format_args!("# TYPE mesh_canary_share gauge"));
        for canary in &canaries {
            let name = label(&canary.spec.name);
            say(format_args!("mesh_canary_share{{canary=\"{name}\"}} {}", canary.share));
        }
        say(format_args!("# HELP mesh_canary_requests_total Requests of a version during a rollout."));
        say(format_args!("# TYPE mesh_canary_requests_total counter"));
        for canary in &canaries {
            let name = label(&canary.spec.name);
            for (version, total) in [("canary", canary.canary_total), ("stable", canary.stable_total)] {
                for (result, count) in [("success", total.successes), ("failure", total.failures)] {
                    say(format_args!(
                        "mesh_canary_requests_total{{canary=\"{name}\",version=\"{version}\",result=\"{result}\"}} {count}"
                    ));
                }
            }
        }
    }
}

/// How it stands with the identity that somebody else gives us.
fn identity(asked: &Asked, materials: &Materials) -> Value {
    let material = materials.load();
    let id = asked.id.as_ref().or(material.identity.as_ref().and_then(|identity| identity.spiffe_id()));
    let state = asked.state.borrow();
    let until = state.held_until.map(|until| humantime::format_rfc3339_seconds(until).to_string());
    json!({
        "id": id.map(SpiffeId::as_str),
        "valid_until": until,
        "received": state.received,
        "failures": state.failures,
        "last_error": state.last_error,
    })
}

fn listeners(server: &Server) -> Value {
    let listeners: Vec<_> = server
        .status()
        .into_iter()
        .map(|listener| {
            json!({
                "name": &*listener.name,
                "address": listener.address.to_string(),
                "direction": listener.direction.as_str(),
                "protocol": listener.protocol.as_str(),
                "phase": format!("{:?}", listener.phase).to_ascii_lowercase(),
                "open": listener.open,
                "accepted": listener.accepted,
                "refused": listener.refused,
                "loops": listener.loops,
                "passed_on": listener.passed_on,
                "accept_errors": listener.accept_errors,
                "handshakes": listener.handshakes,
                "handshake_failures": listener.handshake_failures,
                "plaintext_refused": listener.plaintext_refused,
                "distrusted": listener.distrusted,
            })
        })
        .collect();
    json!({ "listeners": listeners })
}

/// Whether a finding is of a field that security rests on.
fn is_security(diagnostic: &Diagnostic) -> bool {
    let kind = diagnostic.resource.as_ref().map_or("", |resource| &*resource.kind);
    diagnostic.severity == Severity::Error
        || diagnostic.path.split('.').any(|segment| segment == "tls" || segment.starts_with("tls["))
        || matches!(
            kind,
            "AuthorizationPolicy"
                | "PeerAuthentication"
                | "RequestAuthentication"
                | "Policy"
                | "MeshPolicy"
                | "RbacConfig"
                | "ClusterRbacConfig"
                | "ServiceRole"
                | "ServiceRoleBinding"
        )
}

/// The value of a label, as Prometheus reads it.
fn label(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn index() -> String {
    PATHS.iter().fold(String::new(), |mut out, (path, what)| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{path:<32} {what}");
        out
    })
}

fn not_found(port: Port) -> Response<Body> {
    let body = match port {
        Port::Admin => format!("no such endpoint; there are\n{}", index()),
        Port::Prometheus => "this port serves /stats/prometheus\n".to_owned(),
        Port::Status => "this port serves /healthz/ready, /stats/prometheus and /metrics\n".to_owned(),
        Port::Health => "this port serves /healthz/ready\n".to_owned(),
    };
    text(StatusCode::NOT_FOUND, body)
}

fn json(status: StatusCode, value: &Value) -> Response<Body> {
    let mut body = serde_json::to_string_pretty(value).unwrap_or_default();
    body.push('\n');
    reply(status, "application/json", body)
}

fn text(status: StatusCode, body: String) -> Response<Body> {
    reply(status, "text/plain; charset=utf-8", body)
}

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
