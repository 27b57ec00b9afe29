//! A proxy on its way from a command line to its listeners: what it is made of, and its configuration.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use mesh_core::config::{CompileContext, Role};
use mesh_core::diagnostics::Severity;
use mesh_core::istio::SourceFile;
use mesh_core::server::{Server, ServerLimits};
use mesh_core::{Panics, Slot};
use mesh_route::discover::{Discoverer, SystemResolver};
use mesh_route::{Cluster, Clusters, RouteTable};
use mesh_telemetry::access_log::{AccessLogLayer, AccessLogSink};
use mesh_tls::Materials;

use crate::cli::Common;
use crate::compose::Parts;
use crate::control::{Control, Sources};
use crate::credentials::Places;
use crate::memory;
use crate::security::Security;
use crate::status::Controls;

use super::Failure;
use super::listeners::Turns;

/// A proxy on its way from a command line to its end.
pub(super) struct Proxy {
    pub(super) binary: &'static str,
    pub(super) common: Common,
    pub(super) control: Control,
    pub(super) files: Vec<SourceFile>,
    pub(super) parts: Parts,
    pub(super) security: Security,
    pub(super) sink: Option<AccessLogSink>,
    pub(super) log_writer: Option<std::thread::JoinHandle<()>>,
    pub(super) server: Option<Arc<Server>>,
    /// The routes to the applications, with the port of each.
    pub(super) inbound: Vec<(u16, Slot<RouteTable>)>,
    /// The clusters to the applications, which no snapshot holds.
    pub(super) apps: Vec<Arc<Cluster>>,
    pub(super) addresses: Vec<(String, SocketAddr)>,
    pub(super) reconciling: Arc<Turns>,
    pub(super) controls: Controls,
    pub(super) started: Instant,
}

impl Proxy {
    /// `own` is the identity of the workload, where the command line says none.
    pub(super) fn prepare(
        binary: &'static str,
        role: Role,
        common: &Common,
        sources: Sources,
        own: Option<Materials>,
    ) -> Result<Self, Failure> {
        let mut context: CompileContext = common.compile_context(role);
        let runtime = tokio::runtime::Handle::current();
        let places =
            Places { namespace: context.workload.namespace.clone(), secret_dir: common.secret_dir.clone() };
        let security = Security::new(common, places, &runtime).map_err(Failure::Other)?;
        let security = match own {
            Some(own) => security.with_identity("mesh", own).map_err(Failure::Other)?,
            None => security,
        };
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
    pub(super) fn check(&self) -> Result<(), Failure> {
        let (diagnostics, skipped) = self.control.check(&self.files);
        print!("{diagnostics}");
        if let Some(skipped) = skipped {
            println!("{skipped}");
        }
        let (errors, all) = (diagnostics.error_count(), diagnostics.len());
        println!("{errors} errors, {} warnings", all - errors);
        let is_secured = [
            self.common.identity_dir.is_some(),
            self.common.ca.is_some(),
            self.common.spiffe_endpoint.is_some(),
        ]
        .contains(&true);
        if !is_secured
            && diagnostics.iter().any(|diagnostic| diagnostic.message.starts_with("security setting"))
        {
            println!(
                "mutual TLS is enforced with an identity: say --identity-dir, --ca or --spiffe-endpoint here too"
            );
        }
        if errors == 0 { Ok(()) } else { Err(Failure::Other("the configuration has errors".to_owned())) }
    }

    /// Loads the configuration for the first time; without a good one there is nothing to run.
    pub(super) fn load(&mut self) -> Result<(), Failure> {
        let outcome = self.control.apply(&self.files);
        if !outcome.accepted {
            let mut message = outcome.diagnostics.to_string();
            // Writing to a String cannot fail.
            let _ =
                write!(message, "the configuration is not accepted; {} --check says the same", self.binary);
            return Err(Failure::Other(message));
        }
        self.say(&outcome);
        // It knows every resource by name; not before it is gone are their pages free.
        drop(outcome);
        memory::give_back();
        let named = self.control.status().read().trust_domain;
        let trust_domain = self.common.trust_domain.as_ref().unwrap_or(&named);
        self.security
            .ask(trust_domain, &self.common, &tokio::runtime::Handle::current())
            .map_err(Failure::Usage)
    }

    pub(super) fn say(&self, outcome: &mesh_core::config::Outcome) {
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

    pub(super) fn start(&mut self) -> Result<(), Failure> {
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

    pub(super) fn server(&self) -> Result<&Arc<Server>, Failure> {
        self.server.as_ref().ok_or_else(|| Failure::Other("the server has not started".to_owned()))
    }

    /// The one line that scripts wait for, once every listener accepts.
    pub(super) fn announce(&self) {
        let mut line = "listening".to_owned();
        for (name, address) in &self.addresses {
            // Writing to a String cannot fail.
            let _ = write!(line, " {name}={address}");
        }
        let mut out = std::io::stdout().lock();
        // Whoever closed our standard output does not wait for the line.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}
