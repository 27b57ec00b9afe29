//! A configuration against scripted endpoints, in virtual time, from a seed: what does this DestinationRule do when two
//! of five pods fail for 40 seconds?
//!
//! **Nothing is modelled twice.** What runs is the stack that a sidecar runs, on its own pools, balancers, limits and
//! outlier detection; only what is around it is made up. Time is tokio's paused clock, which stands still while anything
//! can go on and then jumps to the next timer. Connections are pipes in memory, made by the connector of the shard, and
//! at their other ends are hyper's servers that follow a script. So a simulation is as right as the tests of the proxy.
//!
//! **The same scenario and seed give the same report, byte for byte**, in every run of the same build. Everything is on
//! one thread, but for the comparison of a mirror's answer ([`diff`](crate::diff)), which runs on a thread for work that
//! blocks: the clock stands still meanwhile, no request waits for it, and the report says nothing of mirrors; every random number comes from the seed (that of each worker, endpoint and load by its name, so that
//! adding one changes nothing of the others); no result depends on the order of a hash map or on the time of day. What is
//! new in the request path must keep that: a `tokio::select!` there is `biased`, and what draws at random draws from
//! its shard.
//!
//! **What it leaves out**: the cost of computing, networks (a pipe takes no time; latency is the endpoint's), TLS, what
//! is not HTTP. The clock counts milliseconds, upwards.
//!
//! **What it costs a proxy** that is built with it: a look at a flag for each reading of the time, which is not to be
//! measured beside the reading, and two or three locks that nobody else takes for each time that a worker goes to sleep.
//!
//! A [`Simulation`] is loaded from a [`Scenario`] and the configuration that
//! it names, with every error at its place in the file, and run to a [`Report`].
//!
//! ```
//! use mesh_core::config::{CompileContext, Role};
//! use mesh_core::istio::{LoadOptions, SourceFile};
//! use mesh_route::simulate::{Input, Simulation};
//!
//! let yaml = "
//! apiVersion: mesh.rs/v1alpha1
//! kind: Scenario
//! metadata: {name: a-pod-fails}
//! spec:
//!   duration: 60s
//!   load: [{rate: 100, host: reviews}]
//!   endpoints: [{addresses: [10.0.0.1], script: [{from: 20s, answers: [{status: 503}]}]}]
//! ---
//! apiVersion: networking.istio.io/v1
//! kind: DestinationRule
//! metadata: {name: reviews}
//! spec: {host: reviews, trafficPolicy: {outlierDetection: {maxEjectionPercent: 50}}}
//! ---
//! apiVersion: networking.istio.io/v1
//! kind: ServiceEntry
//! metadata: {name: reviews}
//! spec:
//!   hosts: [reviews.default.svc.cluster.local]
//!   resolution: STATIC
//!   ports: [{number: 80, name: http, protocol: HTTP}]
//!   endpoints: [{address: 10.0.0.1}, {address: 10.0.0.2}]
//! ";
//! let (simulation, found) = Simulation::load(Input {
//!     scenario: SourceFile::new("a-pod-fails.yaml", yaml),
//!     config: Vec::new(),
//!     mesh_config: None,
//!     context: CompileContext::new(Role::Sidecar),
//!     options: LoadOptions::default(),
//!     read: &|path| std::fs::read(path).map(|text| vec![SourceFile::new(path, text)]),
//! });
//! let simulation = simulation.ok_or_else(|| format!("{found:?}"))?;
//! let report = simulation.run()?;
//! println!("{report}");
//! assert_eq!(report.intervals[3].ejected, ["10.0.0.1:80".parse()?]);
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```

mod endpoint;
mod ledger;
mod load;
mod report;
mod sampler;
mod text;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use mesh_core::config::{Compile as _, CompileContext, Compiler};
use mesh_core::diagnostics::{Diagnostic, Diagnostics, DocId, Documents, Severity};
use mesh_core::istio::types::mesh_config::MeshConfig;
use mesh_core::istio::types::scenario::{Load, Scenario};
use mesh_core::istio::{LoadOptions, Resource, ResourceSet, SourceFile};
use mesh_core::{
    Body, ConnInfo, Direction, EdgeSettings, ListenerSet, LocalReplyLayer, NormalizeLayer, Slot, Snapshots,
};
use tower_layer::Layer as _;
use tower_service::Service;

use self::endpoint::{Connector, Names, Places, Resolver, World};
use self::ledger::Ledger;
use self::load::Generator;
use self::sampler::Sampler;
use crate::canary::Canaries;
use crate::discover::Discoverer;
use crate::request_view::RequestView;
use crate::runtime::Clusters;
use crate::shard::Shard;
use crate::table::RouteTable;
use crate::tcp::TcpRouteTable;
use crate::{CorsLayer, FaultLayer, HeadersLayer, SelectRouteLayer, dispatch};

pub use self::report::{Checked, Event, EventKind, Interval, Report};

/// How long requests may take after the last was made, where the scenario does not say.
const DRAIN: Duration = Duration::from_secs(15);

/// What a simulation is made of.
pub struct Input<'a> {
    /// The file with the scenario, and maybe with documents of the configuration.
    pub scenario: SourceFile,
    /// Configuration beside what the scenario names.
    pub config: Vec<SourceFile>,
    /// The settings of the mesh, in the place of a ConfigMap.
    pub mesh_config: Option<SourceFile>,
    /// Whom the configuration is compiled for.
    pub context: CompileContext,
    /// How files are loaded.
    pub options: LoadOptions,
    /// Reads a path that the scenario names: the file, or every file of the directory.
    pub read: &'a dyn Fn(&str) -> io::Result<Vec<SourceFile>>,
}

/// A scenario with everything that it needs, ready to run, as often as one likes.
pub struct Simulation {
    scenario: Resource<Scenario>,
    documents: Arc<Documents>,
    context: CompileContext,
    generations: Vec<Generation>,
    places: Places,
    names: Names,
}

/// A configuration and when it comes into force.
struct Generation {
    at: Duration,
    files: String,
    set: ResourceSet,
}

impl Simulation {
    /// Loads a scenario and the configurations that it names. What is found is returned whether or not there is an error
    /// among it; with one there is no simulation.
    #[must_use]
    pub fn load(input: Input<'_>) -> (Option<Self>, Vec<Diagnostic>) {
        let mut found = Found::default();
        let simulation = found.simulation(input);
        (simulation.filter(|_| !found.failed()), found.all)
    }

    /// Runs it. The report is that of the scenario and its seed, whatever else the process does.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn run(&self) -> io::Result<Report> {
        // A thread of its own, as its clock is: the caller may be on a runtime already.
        let ran = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("mesh-simulate".to_owned());
            let run = || {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
                Ok(runtime.block_on(self.drive()))
            };
            thread.spawn_scoped(scope, run).map(std::thread::ScopedJoinHandle::join)
        })?;
        ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// The same with another seed.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.scenario.spec.seed = seed;
        self
    }

    async fn drive(&self) -> Report {
        let scenario = &self.scenario.spec;
        let ledger = Arc::new(Ledger::default());
        let world = World::new(scenario, &self.places, Arc::clone(&ledger));
        let mut control = Control::new(self, &world);
        let sampler = control.sampler(&world);
        let mut generations = self.generations.iter();
        generations.by_ref().take(1).for_each(|first| control.apply(first, &sampler));
        // Names that resolve at once are known before the first request, as in a proxy that waits until it is ready.
        tokio::task::yield_now().await;

        let duration = scenario.duration.unwrap_or_default().to_std();
        let (alive, mut ended) = tokio::sync::mpsc::channel::<Infallible>(1);
        let workers: Vec<_> =
            (0..scenario.workers.unwrap_or(1)).map(|nth| self.stack(nth, &control, &world)).collect();
        for (index, load) in scenario.load.iter().enumerate() {
            let generator = Generator {
                load: load.clone(),
                index,
                seed: scenario.seed,
                duration,
                direction: control.direction,
                port: control.port(),
                workers: workers.clone(),
                snapshots: control.snapshots().clone(),
                world: Arc::clone(&world),
                alive: alive.clone(),
            };
            tokio::spawn(generator.run());
        }
        drop((alive, workers));
        let ending = async {
            tokio::time::sleep_until(world.origin + duration).await;
            let drain = scenario.drain.map_or(DRAIN, |drain| drain.to_std());
            // What is still under way then is given up, and counted as unfinished.
            let _ = tokio::time::timeout(drain, ended.recv()).await;
        };
        let reloading = async {
            for generation in generations {
                tokio::time::sleep_until(world.origin + generation.at).await;
                control.apply(generation, &sampler);
            }
            std::future::pending::<Infallible>().await
        };
        tokio::select! {
            biased;
            never = reloading => match never {},
            never = sampler.run(scenario.row()) => match never {},
            () = ending => {}
        }
        sampler.sample();
        let end = world.elapsed();
        let position = |path: &str| {
            let written = self.documents.position(self.scenario.doc, path);
            written.unwrap_or_else(|| self.scenario.position.clone())
        };
        Report::new(&self.scenario, position, self.places.keys().copied().collect(), end, &ledger)
    }

    /// The stack of one worker, in the order of the proxies; what only logs is left out.
    fn stack(
        &self,
        nth: u32,
        control: &Control,
        world: &Arc<World>,
    ) -> impl Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send>
    + Clone
    + Send
    + use<> {
        let seed = |of: &str| seed(self.scenario.spec.seed, &format!("worker {nth} {of}"));
        let connector = Arc::new(Connector(Arc::clone(world)));
        let dispatch = dispatch(Shard::connecting_by(seed("shard"), connector));
        let route = HeadersLayer::new().layer(dispatch);
        let route = FaultLayer::seeded(seed("fault")).layer(CorsLayer::new().layer(route));
        let selected =
            SelectRouteLayer::new(control.routes.clone()).direction(control.direction).layer(route);
        let normalize = NormalizeLayer::new(control.edge.clone(), control.direction).seed(seed("request id"));
        LocalReplyLayer::new(control.direction).layer(normalize.layer(selected))
    }
}

impl fmt::Debug for Simulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Simulation")
            .field("scenario", &self.scenario.meta.name)
            .field("generations", &self.generations.len())
            .finish_non_exhaustive()
    }
}

/// The control plane of a run.
struct Control {
    compiler: Compiler<ResourceSet>,
    clusters: Clusters,
    canaries: Canaries,
    routes: Slot<RouteTable>,
    edge: Slot<EdgeSettings>,
    direction: Direction,
}

impl Control {
    fn new(simulation: &Simulation, world: &Arc<World>) -> Self {
        let clusters = Clusters::new();
        let resolver = Resolver { world: Arc::clone(world), names: simulation.names.clone() };
        let discoverer = Discoverer::new(resolver, tokio::runtime::Handle::current());
        let mut compiler = Compiler::new(simulation.context.clone());
        compiler.snapshots().free_in_place();
        let routes = compiler.register::<RouteTable>();
        let edge = compiler.register::<EdgeSettings>();
        let canaries = Canaries::new();
        let (registry, rollouts, table) = (clusters.clone(), canaries.clone(), routes.clone());
        compiler.before_publish(move |snapshot| {
            if let Some(table) = snapshot.get(&table) {
                registry.reconcile(table.clusters());
                discoverer.follow(table.clusters());
                rollouts.reconcile(table);
            }
        });
        tokio::spawn(canaries.clone().run());
        let direction = simulation.context.role.direction();
        Self { compiler, clusters, canaries, routes, edge, direction }
    }

    fn sampler(&self, world: &Arc<World>) -> Sampler {
        let (clusters, canaries) = (self.clusters.clone(), self.canaries.clone());
        Sampler::new(clusters, canaries, self.routes.clone(), Arc::clone(world))
    }

    fn snapshots(&self) -> &Snapshots {
        self.compiler.snapshots()
    }

    /// The port that requests arrive at, unless their load says another.
    fn port(&self) -> u16 {
        self.snapshots().load().get(&self.routes).map_or(0, |table| port(table, self.direction))
    }

    fn apply(&mut self, generation: &Generation, sampler: &Sampler) {
        // What a generation counted goes with it.
        sampler.sample();
        let documents = Arc::clone(generation.set.documents());
        let outcome = self.compiler.apply(&generation.set, Diagnostics::about(documents));
        sampler.watch(self.snapshots().load());
        if outcome.generation > 1 {
            sampler.reloaded(outcome.generation, &generation.files);
        }
    }
}

/// The port of the first listener, where there are several.
fn port(table: &RouteTable, direction: Direction) -> u16 {
    let first = table.ports().first().copied();
    first.filter(|_| direction == Direction::Gateway).unwrap_or(0)
}

/// Whether there is a virtual host for the requests of a load.
fn answers(table: &RouteTable, load: &Load, direction: Direction) -> bool {
    let mut conn = ConnInfo::unknown(direction);
    let said = load.port.and_then(|port| u16::try_from(port).ok());
    conn.port = said.unwrap_or_else(|| port(table, direction));
    let headers = HeaderMap::new();
    let request = RequestView {
        method: "GET",
        scheme: "http",
        authority: &load.host,
        path: "/",
        query: "",
        target: "/",
        headers: &headers,
    };
    table.lookup(&request, &conn).virtual_host.is_some()
}

/// A seed of its own for whatever has this name.
fn seed(seed: u64, name: &str) -> u64 {
    twox_hash::XxHash64::oneshot(seed, name.as_bytes())
}

/// What loading has found.
#[derive(Default)]
struct Found {
    all: Vec<Diagnostic>,
    said: BTreeSet<String>,
}

impl Found {
    fn failed(&self) -> bool {
        self.all.iter().any(|diagnostic| diagnostic.severity == Severity::Error)
    }

    /// Documents that stay are loaded with each configuration; what is wrong with them is said once.
    fn add(&mut self, diagnostics: impl IntoIterator<Item = Diagnostic>) {
        for diagnostic in diagnostics {
            if self.said.insert(diagnostic.to_string()) {
                self.all.push(diagnostic);
            }
        }
    }

    fn simulation(&mut self, input: Input<'_>) -> Option<Simulation> {
        let (set, diagnostics) = ResourceSet::load(std::slice::from_ref(&input.scenario), &input.options);
        let mut about = Diagnostics::about(Arc::clone(set.documents()));
        self.add(diagnostics.iter().cloned());
        let scenario = match set.scenarios() {
            [scenario] => scenario.clone(),
            [] if self.failed() => return None,
            [] => {
                let message = format!("{} has no document of kind Scenario", input.scenario.name);
                self.add([Diagnostic::new(Severity::Error, "", message)]);
                return None;
            }
            [_, second, ..] => {
                about.error_at(second.doc, "", "a file has one scenario");
                self.add(about.iter().cloned());
                return None;
            }
        };
        let mut files = Vec::new();
        let mut named = |at: Duration, field: &str, paths: &[String]| {
            let mut all = input.config.clone();
            for (index, path) in paths.iter().enumerate() {
                match (input.read)(path) {
                    Ok(read) => all.extend(read),
                    Err(error) => {
                        about.error_at(scenario.doc, format!("{field}[{index}]"), error.to_string());
                    }
                }
            }
            all.push(input.scenario.clone());
            files.push((at, paths.join(", "), all));
        };
        named(Duration::ZERO, "spec.config", &scenario.spec.config);
        let mut reloads: Vec<_> = scenario.spec.reload.iter().enumerate().collect();
        reloads.sort_by_key(|(_, reload)| reload.at);
        for (index, reload) in reloads {
            let at = reload.at.unwrap_or_default().to_std();
            named(at, &format!("spec.reload[{index}].config"), &reload.config);
        }
        self.add(about.iter().cloned());
        if self.failed() {
            return None;
        }
        let names = Names::of(&scenario.spec);
        let mut places = Places::new();
        let mut unknown = BTreeSet::new();
        let mut generations = Vec::new();
        let mut unanswered: Vec<_> = scenario.spec.load.iter().enumerate().collect();
        for (at, files, sources) in files {
            let (set, table) = self.generation(&sources, &input)?;
            unanswered.retain(|(_, load)| !answers(&table, load, input.context.role.direction()));
            for cluster in table.clusters() {
                unknown.extend(endpoint::places(cluster, &names, &mut places));
            }
            generations.push(Generation { at, files, set });
        }
        let mut about = Diagnostics::about(Arc::clone(set.documents()));
        for (index, load) in unanswered {
            let message = format!("nothing in the configuration answers to {:?}", load.host);
            about.error_at(scenario.doc, format!("spec.load[{index}].host"), message);
        }
        warn(&scenario, scenario.doc, &places, unknown, &mut about);
        self.add(about.iter().cloned());
        let documents = Arc::clone(set.documents());
        Some(Simulation { scenario, documents, context: input.context, generations, places, names })
    }

    /// Loads and compiles one configuration.
    fn generation(&mut self, files: &[SourceFile], input: &Input<'_>) -> Option<(ResourceSet, RouteTable)> {
        let (mut set, mut diagnostics) = ResourceSet::load(files, &input.options);
        if let Some(file) = &input.mesh_config {
            let (config, found) = MeshConfig::load(file);
            diagnostics.extend(found);
            if let Some(config) = config {
                set = set.with_mesh_config(config);
            }
        }
        let context = &input.context;
        let table = RouteTable::compile(&set, context, &mut diagnostics);
        // These say what they find, as they do for a proxy; nothing of them is run.
        let _ = TcpRouteTable::compile(&set, context, &mut diagnostics);
        let _ = ListenerSet::compile(&set, context, &mut diagnostics);
        let _ = EdgeSettings::compile(&set, context, &mut diagnostics);
        diagnostics.honour_mesh("accessLogFile");
        let is_ours = |found: &Diagnostic| found.resource.as_ref().is_none_or(|of| &*of.kind != "Scenario");
        let unhonoured = set.unhonoured(&diagnostics, Severity::Warning).into_iter().filter(is_ours);
        let failed = diagnostics.has_errors();
        self.add(diagnostics.iter().cloned());
        self.add(unhonoured);
        table.ok().filter(|_| !failed).map(|table| (set, table))
    }
}

/// Says what of a scenario can have no effect.
fn warn(
    scenario: &Resource<Scenario>,
    doc: DocId,
    places: &Places,
    unknown: BTreeSet<Arc<str>>,
    about: &mut Diagnostics,
) {
    for (index, script) in scenario.spec.endpoints.iter().enumerate() {
        if !places.iter().any(|(addr, place)| endpoint::selects(script, *addr, place)) {
            about.warning_at(
                doc,
                format!("spec.endpoints[{index}]"),
                "selects no endpoint of the configuration",
            );
        }
    }
    for name in unknown {
        let message = format!("nothing says what {name} resolves to: it has no endpoints");
        about.warning_at(doc, "spec.dns", message);
    }
    let duration = scenario.spec.duration.unwrap_or_default();
    for (index, reload) in scenario.spec.reload.iter().enumerate() {
        if reload.at.unwrap_or_default() >= duration {
            about.warning_at(doc, format!("spec.reload[{index}].at"), "comes after the last request");
        }
    }
}
