//! The control plane of a process: from files to the generation in force.

use std::any::Any;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use mesh_core::config::{CompileContext, Compiler, Outcome};
use mesh_core::diagnostics::{Diagnostic, Diagnostics, Severity};
use mesh_core::istio::types::mesh_config::MeshConfig;
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile, UnknownFields};
use mesh_core::watch::{self, Watcher};
use mesh_core::{EdgeSettings, ListenerSet, Slot, Snapshots};
use mesh_route::canary::Canaries;
use mesh_route::discover::Discoverer;
use mesh_route::{Clusters, RouteTable, TcpRouteTable};
use mesh_tls::InboundTls;
use mesh_tls::istio::Secrets;

use crate::memory;
use crate::security::Security;

/// Where configuration comes from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Files and directories.
    pub paths: Vec<PathBuf>,
    /// Text that does not change: standard input, the demo.
    pub fixed: Vec<SourceFile>,
    /// A file with a MeshConfig.
    pub mesh_config: Option<PathBuf>,
}

/// Loads, compiles and publishes.
#[derive(Debug)]
pub struct Control {
    sources: Sources,
    options: LoadOptions,
    compiler: Compiler<ResourceSet>,
    clusters: Clusters,
    canaries: Canaries,
    /// The subsets that the generation in force misses.
    missing: Vec<Diagnostic>,
    /// The routes that virtual services make.
    pub routes: Slot<RouteTable>,
    /// The routes of what is not HTTP.
    pub tcp_routes: Slot<TcpRouteTable>,
    /// The listeners that gateways ask for.
    pub listeners: Slot<ListenerSet>,
    /// How requests are normalised.
    pub edge: Slot<EdgeSettings>,
    /// What the inbound ports accept.
    pub inbound_tls: Slot<InboundTls>,
    security: Security,
    status: Status,
}

/// What became of the configuration, shared with the admin endpoints.
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<Mutex<Loaded>>);

/// What became of the configuration so far.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// The generation in force.
    pub generation: u64,
    /// Configurations that were accepted.
    pub accepted: u64,
    /// Configurations that were rejected.
    pub rejected: u64,
    /// What was said of the last configuration that was loaded, accepted or not.
    pub diagnostics: Vec<Diagnostic>,
    /// What is in force and not enforced by this build.
    pub not_enforced: Vec<Diagnostic>,
    /// How many documents were skipped, as their kind is no concern of a mesh, in words; `None` for none.
    pub skipped: Option<String>,
    /// When the generation in force was accepted.
    pub since: Option<SystemTime>,
    /// The settings of the mesh in force.
    pub access_log_file: String,
    /// The trust domain of the mesh.
    pub trust_domain: String,
}

impl Status {
    /// A copy of what is known now.
    #[must_use]
    pub fn read(&self) -> Loaded {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Loaded> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sources {
    /// The sources of a command line; `-` is read now.
    ///
    /// # Errors
    /// When standard input cannot be read.
    pub fn of(config: &[PathBuf], mesh_config: Option<&Path>) -> std::io::Result<Self> {
        let mut sources = Self { mesh_config: mesh_config.map(Path::to_owned), ..Self::default() };
        for path in config {
            if path.as_os_str() == "-" {
                let mut text = Vec::new();
                std::io::stdin().read_to_end(&mut text)?;
                sources.fixed.push(SourceFile::new("<stdin>", text));
            } else {
                sources.paths.push(path.clone());
            }
        }
        Ok(sources)
    }

    /// The resources among what was read and what is fixed, with the settings of the mesh.
    fn load(&self, files: &[SourceFile], options: &LoadOptions) -> (ResourceSet, Diagnostics) {
        let is_mesh_config = |file: &&SourceFile| {
            self.mesh_config.as_ref().is_some_and(|path| *file.name == *path.to_string_lossy())
        };
        let resources: Vec<_> =
            self.fixed.iter().chain(files.iter().filter(|file| !is_mesh_config(file))).cloned().collect();
        let (mut set, mut diagnostics) = ResourceSet::load(&resources, options);
        if let Some(file) = files.iter().find(is_mesh_config) {
            let (config, found) = MeshConfig::load(file);
            diagnostics.extend(found);
            if let Some(config) = config {
                set = set.with_mesh_config(config);
            }
        }
        diagnostics.honour_mesh("accessLogFile");
        (set, diagnostics)
    }

    /// Everything that is watched.
    fn watched(&self) -> Vec<PathBuf> {
        self.paths.iter().chain(&self.mesh_config).cloned().collect()
    }
}

impl Control {
    /// A control plane with every model of the proxies registered.
    #[must_use]
    pub fn new(
        context: CompileContext,
        sources: Sources,
        lenient: bool,
        clusters: Clusters,
        discoverer: Discoverer,
        security: Security,
    ) -> Self {
        let unknown = if lenient { UnknownFields::Lenient } else { UnknownFields::Strict };
        let options = LoadOptions::default()
            .with_default_namespace(context.workload.namespace.as_str())
            .with_unknown_fields(unknown);
        let mut compiler = Compiler::new(context);
        let routes = compiler.register::<RouteTable>();
        let tcp_routes = compiler.register::<TcpRouteTable>();
        let listeners = compiler.register::<ListenerSet>();
        let edge = compiler.register::<EdgeSettings>();
        let inbound_tls = compiler.register::<InboundTls>();
        let secrets = compiler.register::<Secrets>();
        let secured = security.clone();
        let servers = listeners.clone();
        let (registry, table, tcp) = (clusters.clone(), routes.clone(), tcp_routes.clone());
        let canaries = Canaries::new();
        let rollouts = canaries.clone();
        compiler.before_publish(move |snapshot| {
            if let (Some(secrets), Some(next)) = (snapshot.get_shared(&secrets), snapshot.get(&servers)) {
                secured.prepare_servers(&secrets, &servers, next);
            }
            if let Some(table) = snapshot.get(&table) {
                rollouts.reconcile(table);
            }
            let http = snapshot.get(&table).map(RouteTable::clusters);
            let tcp = snapshot.get(&tcp).map(TcpRouteTable::clusters);
            for clusters in [http, tcp].into_iter().flatten() {
                secured.prepare(clusters);
                registry.reconcile(clusters);
                discoverer.follow(clusters);
            }
        });
        let status = Status::default();
        let missing = Vec::new();
        Self {
            sources,
            options,
            compiler,
            clusters,
            canaries,
            missing,
            routes,
            tcp_routes,
            listeners,
            edge,
            inbound_tls,
            security,
            status,
        }
    }

    /// Where snapshots are published.
    #[must_use]
    pub fn snapshots(&self) -> &Snapshots {
        self.compiler.snapshots()
    }

    /// The registry of cluster runtimes.
    #[must_use]
    pub fn clusters(&self) -> &Clusters {
        &self.clusters
    }

    /// The rollouts of canaries, which somebody has to run.
    #[must_use]
    pub fn canaries(&self) -> &Canaries {
        &self.canaries
    }

    /// What became of the configuration, for the admin endpoints.
    #[must_use]
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// Reads every source once.
    ///
    /// # Errors
    /// The first path that cannot be read, by name.
    pub fn read(&self) -> std::io::Result<Vec<SourceFile>> {
        watch::read(&self.sources.watched())
    }

    /// Compiles what was read, without publishing, and says everything there is to say: what `--check` prints. With it
    /// goes how many documents were skipped, in words.
    #[must_use]
    pub fn check(&self, files: &[SourceFile]) -> (Diagnostics, Option<String>) {
        let (set, diagnostics) = self.load(files);
        let (_, mut diagnostics) = self.compiler.check(&set, diagnostics);
        let unhonoured = set.unhonoured(&diagnostics, Severity::Error);
        diagnostics.extend(unhonoured);
        (diagnostics, skipped(&set))
    }

    /// Compiles what was read and publishes it if nothing in it is an error.
    pub fn apply(&mut self, files: &[SourceFile]) -> Outcome {
        let (set, diagnostics) = self.load(files);
        let (models, diagnostics) = self.compiler.check(&set, diagnostics);
        self.publish(&set, models, diagnostics)
    }

    /// [`apply`](Self::apply), unless a route names a subset that is not defined and was not missed before: whoever
    /// applies routes and subsets one after the other must not see requests fail in between. Then nothing changes,
    /// and what is missing is said.
    ///
    /// # Errors
    /// What is missing.
    pub fn apply_if_complete(&mut self, files: &[SourceFile]) -> Result<Outcome, Vec<Diagnostic>> {
        let (set, diagnostics) = self.load(files);
        let (models, diagnostics) = self.compiler.check(&set, diagnostics);
        let mut missing = missing_subsets(&diagnostics);
        missing.retain(|subset| !self.missing.iter().any(|known| same(subset, known)));
        if models.is_some() && !missing.is_empty() {
            return Err(missing);
        }
        Ok(self.publish(&set, models, diagnostics))
    }

    fn publish(
        &mut self,
        set: &ResourceSet,
        models: Option<Vec<Arc<dyn Any + Send + Sync>>>,
        diagnostics: Diagnostics,
    ) -> Outcome {
        let not_enforced = set.unhonoured(&diagnostics, Severity::Warning);
        // Whoever sees the new generation at work finds it in the status too.
        let mut status = self.status.lock();
        let outcome = self.compiler.apply_checked(models, diagnostics);
        let (accepted, rejected) = self.compiler.counts();
        status.generation = outcome.generation;
        (status.accepted, status.rejected) = (accepted, rejected);
        status.diagnostics = outcome.diagnostics.iter().cloned().collect();
        if outcome.accepted {
            status.not_enforced = not_enforced;
            status.skipped = skipped(set);
            status.since = Some(SystemTime::now());
            status.access_log_file.clone_from(&set.mesh_config().access_log_file);
            let config = set.mesh_config();
            config.trust_domain().clone_into(&mut status.trust_domain);
            let named = Some(&config.trust_domain).filter(|named| !named.is_empty());
            self.security.set_trust_domains(named.into_iter().chain(&config.trust_domain_aliases).cloned());
            self.missing = missing_subsets(&outcome.diagnostics);
        }
        drop(status);
        outcome
    }

    /// A watcher of the sources, of which `files` are in force; `None` when nothing is to be watched.
    #[must_use]
    pub fn watcher(&self, files: &[SourceFile]) -> Option<Watcher> {
        let watched = self.sources.watched();
        (!watched.is_empty()).then(|| Watcher::new(watched, files))
    }

    fn load(&self, files: &[SourceFile]) -> (ResourceSet, Diagnostics) {
        let (sources, options) = (&self.sources, &self.options);
        memory::apart(|| sources.load(files, options))
    }
}

/// What is said of subsets that routes name and nothing defines.
fn missing_subsets<'d>(diagnostics: impl IntoIterator<Item = &'d Diagnostic>) -> Vec<Diagnostic> {
    let missing = diagnostics.into_iter().filter(|diagnostic| {
        diagnostic.code == Some("IST0101") && diagnostic.path.ends_with(".destination.subset")
    });
    missing.cloned().collect()
}

/// Whether two findings are of one missing subset, wherever it is named now.
fn same(one: &Diagnostic, other: &Diagnostic) -> bool {
    one.resource == other.resource && one.message == other.message
}

/// The documents that are no concern of a mesh, in one count.
fn skipped(set: &ResourceSet) -> Option<String> {
    let kinds = set.skipped();
    let all: usize = kinds.values().sum();
    let each: Vec<_> = kinds.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    (all > 0).then(|| format!("{all} documents of other kinds are skipped ({})", each.join(", ")))
}
