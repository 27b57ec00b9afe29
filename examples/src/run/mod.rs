//! From a command line to a running proxy and its end.

mod listeners;
mod proxy;
mod serve;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::config::Role;
use mesh_core::istio::SourceFile;
use mesh_core::server::{ListenerProtocol, ListenerSpec};
use mesh_core::{Direction, vendor};

use self::listeners::gateway_listeners;
use self::proxy::Proxy;
use self::serve::Signals;
use crate::cli::{Common, Gateway, Sidecar};
use crate::control::Sources;
use crate::{demo, logging, replay, simulate};

/// How often the demo says what its applications have seen.
const DEMO_REPORT: Duration = Duration::from_secs(2);

/// The trust domain of the demo where none is said.
const TRUST_DOMAIN: &str = "cluster.local";

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
    let (mut bookinfo, mut identities) = (None, None);
    if args.runs_demo() {
        // Whoever brings an identity has an authority that is not the demo's.
        if args.common.identity_dir.is_none() && args.common.ca.is_none() {
            let domain = args.common.trust_domain.as_deref().unwrap_or(TRUST_DOMAIN);
            let all = demo::identities(domain, &args.common.service_account).map_err(Failure::Other)?;
            identities = Some(Arc::new(all));
        }
        let apps = demo::start(identities.as_deref()).await.map_err(Failure::other)?;
        sources.fixed.insert(0, SourceFile::new("<demo>", demo::config(&apps)));
        bookinfo = Some(apps);
    }
    let own = identities.as_ref().and_then(|all| all.of(&args.common.service_account).cloned());
    let mut proxy = Proxy::prepare("sidecar", Role::Sidecar, &args.common, sources, own)?;
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
        bookinfo.connect(proxy.listen_demo(&bookinfo, identities.as_deref(), outbound)?);
        if let Some(identities) = identities {
            tokio::spawn(identities.renew());
        }
        eprint!("{}", demo::welcome(outbound, admin));
        tokio::spawn(report(bookinfo));
    }
    proxy.serve(signals, |_| {}).await
}

async fn run_gateway(args: Gateway) -> Result<(), Failure> {
    logging::init(&args.common.log).map_err(Failure::Usage)?;
    let sources = sources(&args.common)?;
    let mut proxy = Proxy::prepare("gateway", Role::Gateway, &args.common, sources, None)?;
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
