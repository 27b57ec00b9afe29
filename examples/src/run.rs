//! From a command line to a running proxy and its end.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_core::config::{CompileContext, Role};
use mesh_core::diagnostics::Severity;
use mesh_core::istio::SourceFile;
use mesh_core::server::{
    BindError, DrainTimes, Drained, ListenerProtocol, ListenerSpec, Phase, Server, ServerLimits, WithTls,
    serve_here,
};
use mesh_core::watch::VANISHED;
use mesh_core::{ClusterName, Direction, GatewayListener, Panics, Slot, vendor};
use mesh_route::discover::{Discoverer, SystemResolver};
use mesh_route::{
    Cluster, ClusterSpec, Clusters, Discovery, EndpointSpec, RouteBuilder, RouteTable, Shard, TcpRouteTable,
    UpstreamProtocol,
};
use mesh_telemetry::access_log::{AccessLogLayer, AccessLogSink};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::admin::{Admin, Port};
use crate::cli::{Common, Gateway, Sidecar};
use crate::compose::{self, Parts};
use crate::control::{Control, Sources};
use crate::credentials::Places;
use crate::security::Security;
use crate::status::{Controls, Metrics, Probers};
use crate::{demo, logging, replay, simulate};

/// How often the demo says what its applications have seen.
const DEMO_REPORT: Duration = Duration::from_secs(2);

/// Why a proxy did not start or go on, in words for its user.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Other(String),
}

impl Failure {
    fn other(error: impl ToString) -> Self {
        Self::Other(error.to_string())
    }
}

/// Runs the sidecar to its end.
#[must_use]
pub fn sidecar(args: Sidecar) -> ExitCode {
    if let Err(error) = vendor::set(&args.common.header_prefix) {
        return finish(Err(Failure::other(error)));
    }
    if let Some(scenario) = &args.common.simulate {
        return finish(run_simulation(&args.common, Role::Sidecar, scenario));
    }
    finish(on_runtime(run_sidecar(args)))
}

/// Runs the gateway to its end.
#[must_use]
pub fn gateway(args: Gateway) -> ExitCode {
    if let Err(error) = vendor::set(&args.common.header_prefix) {
        return finish(Err(Failure::other(error)));
    }
    if let Some(scenario) = &args.common.simulate {
        return finish(run_simulation(&args.common, Role::Gateway, scenario));
    }
    finish(on_runtime(run_gateway(args)))
}

/// The control plane's runtime; requests are served by the workers' own.
fn on_runtime(run: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("mesh-control")
        .enable_all()
        .build()
        .map_err(Failure::other)?;
    runtime.block_on(run)
}

fn finish(result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => {
            eprintln!("error: {message}\n\nFor more information, try '--help'.");
            ExitCode::from(2)
        }
        Err(Failure::Other(message)) => {
            eprintln!("{}", message.trim_end());
            ExitCode::FAILURE
        }
    }
}

fn run_simulation(common: &Common, role: Role, scenario: &Path) -> Result<(), Failure> {
    let (report, unmet) = simulate::run(common, role, scenario).map_err(Failure::Other)?;
    // Whoever closed our standard output does not want the rest.
    let _ = std::io::stdout().lock().write_all(report.as_bytes());
    if unmet.is_empty() { Ok(()) } else { Err(Failure::Other(unmet)) }
}

async fn run_sidecar(args: Sidecar) -> Result<(), Failure> {
    logging::init(&args.common.log).map_err(Failure::Usage)?;
    if let (Some(file), Some(against)) = (&args.replay, &args.against) {
        let report = replay::run(file, against, args.baseline.as_ref()).await.map_err(Failure::Other)?;
        print!("{}", report.table());
        return if report.is_clean() { Ok(()) } else { Err(Failure::other("the answers differ")) };
    }
    let pairs = args.inbound_pairs().map_err(Failure::Usage)?;
    let mut sources = sources(&args.common)?;
    let bookinfo = if args.runs_demo() {
        let bookinfo = demo::start().await.map_err(Failure::other)?;
        sources.fixed.insert(0, SourceFile::new("<demo>", demo::config(&bookinfo)));
        Some(bookinfo)
    } else {
        None
    };
    let mut proxy = Proxy::prepare("sidecar", Role::Sidecar, &args.common, sources)?;
    if args.common.check {
        return proxy.check();
    }
    proxy.load()?;
    proxy.start()?;
    let outbound = ListenerSpec::new("outbound", args.outbound, Direction::Outbound)
        .original_dst(true)
        .protocol(ListenerProtocol::Sniff);
    proxy.listen(outbound, "--outbound")?;
    for (at, (inbound, app)) in pairs.into_iter().enumerate() {
        proxy.listen_inbound(at, inbound, app)?;
    }
    let admin = proxy.listen_admin()?;
    let outbound = proxy.addresses.first().map_or(args.outbound, |(_, address)| *address);
    let signals = Signals::listen()?;
    proxy.announce();
    if let Some(bookinfo) = bookinfo {
        bookinfo.connect(outbound);
        eprint!("{}", demo::welcome(outbound, admin));
        tokio::spawn(report(bookinfo));
    }
    proxy.serve(signals, |_| {}).await
}

async fn run_gateway(args: Gateway) -> Result<(), Failure> {
    logging::init(&args.common.log).map_err(Failure::Usage)?;
    let sources = sources(&args.common)?;
    let mut proxy = Proxy::prepare("gateway", Role::Gateway, &args.common, sources)?;
    if args.common.check {
        return proxy.check();
    }
    proxy.load()?;
    proxy.start()?;
    proxy.listen_admin()?;
    let specs = gateway_listeners(&proxy, args.bind, &args.map_port);
    if specs.is_empty() {
        tracing::warn!(
            "no Gateway with a server that can be served selects this workload: nothing is served yet"
        );
    }
    for spec in specs {
        proxy.listen(spec, "--bind and --map-port")?;
    }
    let signals = Signals::listen()?;
    proxy.announce();
    proxy
        .serve(signals, move |proxy| proxy.reconcile(gateway_listeners(proxy, args.bind, &args.map_port)))
        .await
}

fn sources(common: &Common) -> Result<Sources, Failure> {
    Sources::of(&common.config, common.mesh_config.as_deref())
        .map_err(|error| Failure::Other(format!("<stdin>: {error}")))
}

fn gateway_listeners(proxy: &Proxy, bind: IpAddr, map_port: &[(u16, u16)]) -> Vec<ListenerSpec> {
    let snapshot = proxy.control.snapshots().load();
    let listeners =
        snapshot.get(&proxy.control.listeners).map(|set| set.listeners.as_slice()).unwrap_or_default();
    let spec = |listener: &GatewayListener| {
        let mapped = map_port.iter().rev().find(|(from, _)| *from == listener.port);
        let port = mapped.map_or(listener.port, |(_, to)| *to);
        ListenerSpec::new(
            &*listener.name,
            SocketAddr::new(listener.bind.unwrap_or(bind), port),
            Direction::Gateway,
        )
        .protocol(listener.protocol)
        .port(listener.port)
    };
    listeners.iter().map(spec).collect()
}

/// Whose turn it is to change the listeners.
#[derive(Default)]
struct Turns {
    lock: tokio::sync::Mutex<()>,
    last: AtomicU64,
}

/// A proxy on its way from a command line to its end.
struct Proxy {
    binary: &'static str,
    common: Common,
    control: Control,
    files: Vec<SourceFile>,
    parts: Parts,
    security: Security,
    sink: Option<AccessLogSink>,
    log_writer: Option<std::thread::JoinHandle<()>>,
    server: Option<Arc<Server>>,
    /// The routes to the applications, with the port of each.
    inbound: Vec<(u16, Slot<RouteTable>)>,
    /// The clusters to the applications, which no snapshot holds.
    apps: Vec<Arc<Cluster>>,
    addresses: Vec<(String, SocketAddr)>,
    reconciling: Arc<Turns>,
    controls: Controls,
    started: Instant,
}

impl Proxy {
    fn prepare(binary: &'static str, role: Role, common: &Common, sources: Sources) -> Result<Self, Failure> {
        let mut context: CompileContext = common.compile_context(role);
        let runtime = tokio::runtime::Handle::current();
        let places =
            Places { namespace: context.workload.namespace.clone(), secret_dir: common.secret_dir.clone() };
        let security = Security::new(common, places, &runtime).map_err(Failure::Other)?;
        context.transport = security.transport();
        let discoverer = Discoverer::new(SystemResolver, runtime);
        let control =
            Control::new(context, sources, common.lenient, Clusters::new(), discoverer, security.clone());
        let parts = Parts {
            access_log: AccessLogLayer::off(),
            panics: Panics::default(),
            edge: control.edge.clone(),
            servers: (role == Role::Gateway).then(|| control.listeners.clone()),
        };
        Ok(Self {
            binary,
            common: common.clone(),
            files: control.read().map_err(Failure::other)?,
            control,
            parts,
            security,
            sink: None,
            log_writer: None,
            server: None,
            inbound: Vec::new(),
            apps: Vec::new(),
            addresses: Vec::new(),
            reconciling: Arc::default(),
            controls: Controls::default(),
            started: mesh_core::clock::now(),
        })
    }

    /// Prints every diagnostic; fails on any error.
    fn check(&self) -> Result<(), Failure> {
        let (diagnostics, skipped) = self.control.check(&self.files);
        print!("{diagnostics}");
        if let Some(skipped) = skipped {
            println!("{skipped}");
        }
        let (errors, all) = (diagnostics.error_count(), diagnostics.len());
        println!("{errors} errors, {} warnings", all - errors);
        if errors == 0 { Ok(()) } else { Err(Failure::Other("the configuration has errors".to_owned())) }
    }

    /// Loads the configuration for the first time; without a good one there is nothing to run.
    fn load(&mut self) -> Result<(), Failure> {
        let outcome = self.control.apply(&self.files);
        if !outcome.accepted {
            let mut message = outcome.diagnostics.to_string();
            // Writing to a String cannot fail.
            let _ =
                write!(message, "the configuration is not accepted; {} --check says the same", self.binary);
            return Err(Failure::Other(message));
        }
        self.say(&outcome);
        let named = self.control.status().read().trust_domain;
        let trust_domain = self.common.trust_domain.as_ref().unwrap_or(&named);
        self.security
            .ask(trust_domain, &self.common, &tokio::runtime::Handle::current())
            .map_err(Failure::Usage)
    }

    fn say(&self, outcome: &mesh_core::config::Outcome) {
        for diagnostic in &outcome.diagnostics {
            match diagnostic.severity {
                Severity::Error => tracing::error!("{diagnostic}"),
                Severity::Warning => tracing::warn!("{diagnostic}"),
            }
        }
        if outcome.accepted {
            let loaded = self.control.status().read();
            for diagnostic in &loaded.not_enforced {
                tracing::warn!("{diagnostic}");
            }
            if let Some(skipped) = &loaded.skipped {
                tracing::info!("{skipped}");
            }
            let is_watched = self.common.config.iter().any(|path| path.as_os_str() != "-");
            if is_watched && self.files.iter().all(|file| file.text.trim_ascii().is_empty()) {
                tracing::warn!("there is nothing in the configuration: no rule is in force any more");
            }
            tracing::info!(generation = outcome.generation, "configuration accepted");
        } else {
            tracing::error!(
                generation = outcome.generation,
                "configuration rejected; the last good generation stays in force"
            );
        }
    }

    fn start(&mut self) -> Result<(), Failure> {
        self.start_access_log()?;
        tokio::spawn(self.control.canaries().clone().run());
        let server = Server::builder()
            .workers(self.common.worker_count())
            .limits(ServerLimits::default())
            .snapshots(self.control.snapshots().clone())
            .panics(self.parts.panics.clone())
            .start()
            .map_err(Failure::other)?;
        self.server = Some(Arc::new(server));
        Ok(())
    }

    fn start_access_log(&mut self) -> Result<(), Failure> {
        let configured = self.control.status().read().access_log_file;
        let path = match &self.common.access_log {
            Some(path) => path.clone(),
            None if configured.is_empty() => return Ok(()),
            None => configured.into(),
        };
        let (sink, writer) = AccessLogSink::new();
        let to_stdout = path == Path::new("-") || path == Path::new("/dev/stdout");
        let file = if to_stdout {
            None
        } else {
            let opened = std::fs::OpenOptions::new().create(true).append(true).open(&path);
            Some(
                opened
                    .map_err(|error| Failure::Other(format!("--access-log {}: {error}", path.display())))?,
            )
        };
        let write = move || {
            let written = match file {
                Some(file) => writer.run(file),
                None => writer.run(std::io::stdout()),
            };
            if let Err(error) = written {
                tracing::error!(%error, "the access log cannot be written; lines are dropped and counted");
            }
        };
        let thread = std::thread::Builder::new().name("mesh-access-log".to_owned()).spawn(write);
        self.log_writer = Some(thread.map_err(Failure::other)?);
        self.parts.access_log = AccessLogLayer::new(sink.clone());
        self.sink = Some(sink);
        Ok(())
    }

    fn server(&self) -> Result<&Arc<Server>, Failure> {
        self.server.as_ref().ok_or_else(|| Failure::Other("the server has not started".to_owned()))
    }

    fn listen(&mut self, spec: ListenerSpec, flag: &str) -> Result<(), Failure> {
        let name = spec.name().to_owned();
        let address = listen(self.server()?, &self.parts, &self.security, &self.tables(), spec)
            .map_err(|error| bind_failure(&error, flag))?;
        self.addresses.push((name, address));
        Ok(())
    }

    fn tables(&self) -> Tables {
        (self.control.routes.clone(), self.control.tcp_routes.clone())
    }

    fn listen_inbound(&mut self, at: usize, inbound: SocketAddr, app: SocketAddr) -> Result<(), Failure> {
        let name = if at == 0 { "inbound".to_owned() } else { format!("inbound-{}", at + 1) };
        let mut cluster = ClusterName::new(Direction::Inbound, app.port(), "", "");
        // Runtime state goes by the name, and applications may share a port.
        if self.apps.iter().any(|known| *known.name() == cluster) {
            cluster = ClusterName::new(Direction::Inbound, app.port(), "", &name);
        }
        let mut spec = ClusterSpec::new(cluster, Discovery::Static(vec![EndpointSpec::new(app)]));
        spec.protocol = UpstreamProtocol::Downstream;
        let cluster = Arc::new(Cluster::new(spec));
        self.control.clusters().reconcile(std::slice::from_ref(&cluster));
        let route = RouteBuilder::new("default").forward(Arc::clone(&cluster)).map_err(Failure::other)?;
        let table = RouteTable::builder().host("*", [route]).build().map_err(Failure::other)?;
        let slot = Slot::fixed(table);
        let parts = self.parts.clone();
        let routes = slot.clone();
        let tls = self.security.inbound(self.control.inbound_tls.clone());
        let spec = ListenerSpec::new(name.as_str(), inbound, Direction::Inbound).port(app.port());
        let address = self
            .server()?
            .listen_with(
                spec,
                move |_| WithTls::new(tls.clone()),
                move |_| compose::inbound(&parts, routes.clone(), Shard::new()),
            )
            .map_err(|error| bind_failure(&error, "--inbound"))?;
        self.apps.push(cluster);
        self.inbound.push((app.port(), slot));
        self.addresses.push(("inbound".to_owned(), address));
        Ok(())
    }

    fn listen_admin(&mut self) -> Result<SocketAddr, Failure> {
        let role = if self.binary == "gateway" { Role::Gateway } else { Role::Sidecar };
        let workload = self.common.compile_context(role).workload;
        let admin = Arc::new(Admin {
            binary: self.binary,
            status: self.control.status().clone(),
            snapshots: self.control.snapshots().clone(),
            routes: self.control.routes.clone(),
            tcp_routes: self.control.tcp_routes.clone(),
            clusters: self.control.clusters().clone(),
            inbound: self.inbound.clone(),
            edge: self.control.edge.clone(),
            server: Arc::downgrade(self.server()?),
            direction: role.direction(),
            node: json!({
                "workload": workload.name,
                "namespace": workload.namespace,
                "service_account": workload.service_account,
                "labels": workload.labels,
                "compat": self.common.compat.as_str(),
                "header_prefix": self.common.header_prefix.to_string(),
                "workers": self.common.worker_count(),
            }),
            canaries: self.control.canaries().clone(),
            workload,
            access_log: self.sink.as_ref().map(AccessLogSink::dropped_lines),
            started: self.started,
            controls: self.controls.clone(),
            identity: self.security.asked().cloned(),
            materials: self.security.mesh().clone(),
            probers: Probers::from_env(Arc::clone(self.security.provider())).map_err(Failure::Other)?,
            // As in Istio: behind a gateway there is no application, and its service has this port.
            metrics: if role == Role::Sidecar { Metrics::from_env() } else { Ok(Metrics::none()) }
                .map_err(Failure::Other)?,
        });
        let ports = [
            ("admin", Some(self.common.admin), Port::Admin, "--admin"),
            ("prometheus", self.common.prometheus, Port::Prometheus, "--prometheus"),
            ("status", self.common.status, Port::Status, "--status"),
            ("health", self.common.health, Port::Health, "--health"),
        ];
        let mut first = self.common.admin;
        for (name, address, port, flag) in ports {
            let Some(address) = address else { continue };
            let has_metrics = matches!(port, Port::Status | Port::Prometheus);
            let refuse = |own: SocketAddr| match admin.metrics.refuse(own.port()) {
                Err(error) if has_metrics => Err(Failure::Other(error)),
                _ => Ok(()),
            };
            refuse(address)?;
            let spec = ListenerSpec::new(name, address, Direction::Inbound);
            let (bound, serving) = serve_here(spec, admin.stack(port), ServerLimits::default(), None)
                .map_err(|error| bind_failure(&error, flag))?;
            refuse(bound)?;
            tokio::spawn(serving);
            if port == Port::Admin {
                first = bound;
            }
            self.addresses.push((name.to_owned(), bound));
        }
        Ok(first)
    }

    /// The one line that scripts wait for, once every listener accepts.
    fn announce(&self) {
        let mut line = "listening".to_owned();
        for (name, address) in &self.addresses {
            // Writing to a String cannot fail.
            let _ = write!(line, " {name}={address}");
        }
        let mut out = std::io::stdout().lock();
        // Whoever closed our standard output does not wait for the line.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }

    /// Serves until a signal ends it, applying changed configuration on the way.
    async fn serve(
        mut self,
        mut signals: Signals,
        mut applied: impl FnMut(&mut Self),
    ) -> Result<(), Failure> {
        let mut watcher = self.control.watcher(&self.files);
        // Until when a configuration waits for the rest of it.
        let mut waits: Option<Instant> = None;
        let controls = self.controls.clone();
        let mut joins = false;
        loop {
            let mut at_once = false;
            let files = tokio::select! {
                () = either(&mut signals.terminate, &mut signals.interrupt) => break,
                () = controls.quit.notified() => {
                    joins = true;
                    break;
                }
                () = controls.drain.notified() => {
                    self.drain_and_stay()?;
                    continue;
                }
                Some(()) = signals.hangup.recv() => {
                    at_once = true;
                    match &mut watcher {
                        None => Vec::new(),
                        Some(watcher) => match watcher.now().await {
                            Ok(files) => files,
                            Err(error) => {
                                tracing::error!(%error, "nothing is loaded; what is in force stays");
                                continue;
                            }
                        },
                    }
                },
                () = until(waits) => {
                    at_once = true;
                    std::mem::take(&mut self.files)
                },
                files = async {
                    match &mut watcher {
                        Some(watcher) => watcher.next().await,
                        None => std::future::pending().await,
                    }
                } => files,
            };
            self.files = files;
            // Compiling many routes takes a while; the admin endpoints answer meanwhile.
            let outcome = tokio::task::block_in_place(|| {
                if at_once {
                    Ok(self.control.apply(&self.files))
                } else {
                    self.control.apply_if_complete(&self.files)
                }
            });
            let outcome = match outcome {
                Ok(outcome) => outcome,
                Err(missing) => {
                    for diagnostic in missing {
                        tracing::warn!(
                            "waiting for up to {VANISHED:?}, what is in force stays: {diagnostic}"
                        );
                    }
                    waits.get_or_insert_with(|| mesh_core::clock::now() + VANISHED);
                    continue;
                }
            };
            waits = None;
            self.say(&outcome);
            // What drains opens no listener.
            if outcome.accepted && self.server()?.drain().phase() == Phase::Serving {
                applied(&mut self);
            }
        }
        let again = async {
            // The kubelet's signal is the first one, whoever asked for the end before it.
            if joins {
                either(&mut signals.terminate, &mut signals.interrupt).await;
                tracing::info!("a signal joins the drain; another one ends it at once");
            }
            either(&mut signals.terminate, &mut signals.interrupt).await;
        };
        self.drain(again).await
    }

    fn drain_times(&self) -> DrainTimes {
        DrainTimes { drain_time: self.common.drain_time, deadline: self.common.drain_deadline }
    }

    /// Drains beside everything else; the end of the process joins it where it stands.
    fn drain_and_stay(&self) -> Result<(), Failure> {
        let (drain, times) = (self.server()?.drain().clone(), self.drain_times());
        if drain.phase() == Phase::Serving {
            tracing::info!("draining, and staying");
            tokio::spawn(async move {
                let drained = drain.run(times, std::future::pending()).await;
                tracing::info!(?drained, "the listeners are drained");
            });
        }
        Ok(())
    }

    async fn drain(mut self, again: impl Future<Output = ()>) -> Result<(), Failure> {
        tracing::info!("draining");
        let times = self.drain_times();
        let server = Arc::clone(self.server()?);
        match server.drain().run(times, again).await {
            Drained::Finished => tracing::info!("drained, nothing was in flight"),
            Drained::Cut(connections) => tracing::warn!(connections, "cut at the drain deadline"),
            Drained::AtOnce(connections) => tracing::warn!(connections, "cut by a second signal"),
        }
        // The writer ends with the last sink, and with it the last line is on disk.
        let writer = self.log_writer.take();
        self.server = None;
        drop((self, server));
        if let Some(writer) = writer {
            let flushed = tokio::task::spawn_blocking(move || writer.join());
            // Where the log goes may be blocked; it does not keep the process alive.
            if tokio::time::timeout(Duration::from_secs(1), flushed).await.is_err() {
                tracing::warn!("the access log was not written to its end");
            }
        }
        Ok(())
    }

    /// Makes the listeners of a gateway be those of the generation in force.
    fn reconcile(&mut self, wanted: Vec<ListenerSpec>) {
        let Some(server) = self.server.clone() else { return };
        let (parts, security, tables) = (self.parts.clone(), self.security.clone(), self.tables());
        let turns = Arc::clone(&self.reconciling);
        let turn = turns.last.fetch_add(1, Ordering::AcqRel) + 1;
        tokio::spawn(async move {
            // One after the other, and only the newest: a listener of an old generation must not come back.
            let _turn = turns.lock.lock().await;
            if turns.last.load(Ordering::Acquire) != turn {
                return;
            }
            let done = server
                .reconcile(wanted, |server, spec| listen(server, &parts, &security, &tables, spec))
                .await;
            for (name, address) in &done.added {
                tracing::info!(listener = &**name, %address, "listening");
            }
            for error in &done.failed {
                tracing::error!(%error, "a listener of the new generation is missing");
            }
        });
    }
}

/// The routes of requests, and of what is not HTTP.
type Tables = (Slot<RouteTable>, Slot<TcpRouteTable>);

fn listen(
    server: &Server,
    parts: &Parts,
    security: &Security,
    (routes, tcp_routes): &Tables,
    spec: ListenerSpec,
) -> Result<SocketAddr, BindError> {
    let (direction, protocol) = (spec.direction(), spec.speaks());
    let stack = {
        let (parts, security, routes) = (parts.clone(), security.clone(), routes.clone());
        move |_| compose::outbound(&parts, direction, routes.clone(), security.shard())
    };
    if let ListenerProtocol::Http(_) = protocol {
        return server.listen(spec, stack);
    }
    let l4 = {
        let (parts, security, tcp_routes) = (parts.clone(), security.clone(), tcp_routes.clone());
        move || compose::l4(&parts, tcp_routes.clone(), security.shard())
    };
    match &parts.servers {
        Some(servers) if protocol == ListenerProtocol::Https => {
            let tls = security.gateway(servers);
            server.listen_with(spec, move |_| WithTls::new(tls.clone()).beside(l4()), stack)
        }
        _ => server.listen_l4(spec, move |_| l4(), stack),
    }
}

fn bind_failure(error: &BindError, flag: &str) -> Failure {
    Failure::Other(format!(
        "error: {error}\nAnother process may have the port; choose another address with {flag}."
    ))
}

/// The signals that a proxy hears. Listened for before anyone is told that it listens: a signal that comes sooner would
/// end it without a drain.
struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(Failure::other);
        Ok(Self {
            hangup: listen(SignalKind::hangup())?,
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Says what the demo's applications have seen, whenever that has changed.
async fn report(bookinfo: Arc<demo::Bookinfo>) {
    let mut said = bookinfo.served();
    loop {
        tokio::time::sleep(DEMO_REPORT).await;
        let served = bookinfo.served();
        if served == said {
            continue;
        }
        let mut line = "seen so far:".to_owned();
        for (workload, count) in &served {
            // Writing to a String cannot fail.
            let _ = write!(line, " {workload} {count}");
        }
        eprintln!("{line}");
        said = served;
    }
}
