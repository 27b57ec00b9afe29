//! The process: serves, and looks at its directory.
//!
//! What it knows is one [`View`], replaced as a whole when the directory or the time asks for it. A change is on disk
//! before it is in the view, so that nobody is told of a root that a crash would forget.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use http::Request;
use mesh_core::server::{DrainTimes, ListenerSpec, Server, ServerLimits, WithTls};
use mesh_core::{Body, ConnInfo, Direction, RequestContext, Slot};
use mesh_tls::ca::{Authorities, BootstrapTokens, Rotation};
use mesh_tls::istio_ca::{Call, Status, answer};
use mesh_tls::{Acceptor, Identity, Inbound, InboundTls, Material, Materials, TrustBundle};
use rustls::pki_types::ServerName;
use tokio::signal::unix::{SignalKind, signal};

use super::cli::MeshCa;
use super::decide::{Granted, Rules, decide};
use super::provider;
use super::state::{Stamp, State, read_tokens, write_file};

/// How often the directory is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// How long the certificate of the server lives; it is renewed at half of it.
const SERVING_TTL: Duration = Duration::from_secs(24 * 3600);

/// How long before its end a root is warned of.
const WARN_BEFORE: Duration = Duration::from_secs(30 * 24 * 3600);

/// How often that is said.
const WARN_EVERY: Duration = Duration::from_secs(24 * 3600);

/// What is served, and by what.
struct Service {
    state: State,
    tokens_file: PathBuf,
    names: Vec<ServerName<'static>>,
    rules: Rules,
    materials: Materials,
    view: Mutex<View>,
}

/// What is known of the directory.
struct View {
    authorities: Arc<Authorities>,
    seen: Stamp,
    /// When the server's own certificate is renewed.
    renew_at: SystemTime,
    tokens: Arc<BootstrapTokens>,
    tokens_seen: Stamp,
    /// What was said of the rotation.
    said: Option<Rotation>,
    warn_at: SystemTime,
}

pub(super) fn run(args: &MeshCa) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.map_err(|error| error.to_string())?.block_on(serve(args))
}

async fn serve(args: &MeshCa) -> Result<(), String> {
    let state = State::open(&args.dir)?;
    let _alone = state.serve_alone()?;
    let service = Arc::new(Service::open(state, args)?);
    let limits = {
        let mut limits = ServerLimits::default();
        limits.max_connections = 1_000;
        limits.max_tls_handshakes = 100;
        limits.max_head_bytes = 32 * 1024;
        limits.h2_max_streams = 16;
        limits.idle_timeout = Some(Duration::from_secs(60));
        limits.max_connection_age = Some(Duration::from_secs(600));
        limits
    };
    let server = Server::builder().limits(limits).start().map_err(|error| error.to_string())?;
    let acceptor = Acceptor::bootstrap(service.materials.clone(), Arc::clone(&service.rules.provider));
    let tls = Inbound::new(acceptor.map_err(|error| error.to_string())?, Slot::fixed(InboundTls::default()));
    let spec = ListenerSpec::new("ca", args.listen, Direction::Inbound);
    let serving = Arc::clone(&service);
    let stack = move |_| {
        let service = Arc::clone(&serving);
        tower::service_fn(move |request: Request<Body>| {
            let service = Arc::clone(&service);
            async move {
                let conn = request.extensions().get::<RequestContext>().map(|cx| Arc::clone(cx.conn()));
                Ok::<_, Infallible>(answer(request, |call| service.sign(&call, conn.as_deref())).await)
            }
        })
    };
    let bound = server.listen_with(spec, move |_| WithTls::new(tls.clone()), stack);
    let address = bound.map_err(|error| format!("{error}; choose another address with --listen"))?;
    let listen = |kind| signal(kind).map_err(|error| error.to_string());
    let mut hangup = listen(SignalKind::hangup())?;
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    {
        let mut out = std::io::stdout().lock();
        // Whoever closed our standard output does not wait for the line.
        let _ = writeln!(out, "listening ca={address}").and_then(|()| out.flush());
    }
    let mut looks = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            Some(()) = hangup.recv() => {}
            _ = looks.tick() => {}
        }
        if let Err(error) = tokio::task::block_in_place(|| service.look()) {
            tracing::error!("{error}; what was known stays");
        }
    }
    let times = DrainTimes { drain_time: Duration::ZERO, deadline: Duration::from_secs(5) };
    server.drain().run(times, std::future::pending()).await;
    Ok(())
}

impl Service {
    fn open(state: State, args: &MeshCa) -> Result<Self, String> {
        let rules =
            Rules { trust_domain: args.trust_domain.clone(), leaf_ttl: args.leaf_ttl, provider: provider() };
        let authorities = state.load_or_make(&rules.trust_domain, rules.leaf_ttl, args.root_ttl)?;
        let materials = Materials::none();
        materials.set_trust_domains(vec![rules.trust_domain.as_str().to_owned()]);
        let now = SystemTime::now();
        let view = View {
            authorities: Arc::new(authorities),
            seen: Stamp::default(),
            renew_at: now,
            tokens: Arc::default(),
            tokens_seen: Stamp::default(),
            said: None,
            warn_at: now,
        };
        let service = Self {
            tokens_file: args.tokens_file(),
            names: names(args)?,
            state,
            rules,
            materials,
            view: Mutex::new(view),
        };
        service.look()?;
        let tokens = read_tokens(&service.tokens_file)?;
        BootstrapTokens::parse(&tokens)
            .map_err(|error| format!("{}: {error}", service.tokens_file.display()))?;
        Ok(service)
    }

    /// Makes the view be what the directory and the time say.
    fn look(&self) -> Result<(), String> {
        let now = SystemTime::now();
        let mut view = self.view();
        let seen = Stamp::of(&self.state.state_file());
        let is_due = match view.authorities.rotation(now) {
            Rotation::Made => true,
            Rotation::Overlap(end) => end <= now,
            _ => false,
        };
        if seen != view.seen || is_due {
            let leaf = self.rules.leaf_ttl;
            let authorities = self.state.update(|authorities| {
                let changes =
                    [authorities.retire(now), authorities.allow_leaf(leaf), authorities.announce(now)];
                Ok(changes.contains(&true))
            })?;
            view.authorities = Arc::new(authorities);
            // Written by us just now, if by anybody.
            view.seen = Stamp::of(&self.state.state_file());
            view.renew_at = now;
        }
        if view.renew_at <= now {
            let authorities = Arc::clone(&view.authorities);
            view.renew_at = self.renew(&authorities, now)?;
        }
        let rotation = view.authorities.rotation(now);
        if view.said != Some(rotation) {
            say(&view.authorities, rotation);
            view.said = Some(rotation);
        }
        let left = view.authorities.signing(now).not_after().duration_since(now).unwrap_or_default();
        if left < WARN_BEFORE.max(self.rules.leaf_ttl * 4) && view.warn_at <= now {
            view.warn_at = now + WARN_EVERY;
            tracing::warn!(
                ?left,
                "the root ends soon, and with it every certificate: replace it with `mesh-ca rotate`"
            );
        }
        Ok(())
    }

    /// Gives the server another certificate, and says who is believed. Returns when that has to be done again.
    fn renew(&self, authorities: &Authorities, now: SystemTime) -> Result<SystemTime, String> {
        let roots = authorities.roots_pem();
        let file = self.state.roots_file();
        if std::fs::read(&file).ok().as_deref() != Some(roots.as_bytes()) {
            write_file(&file, roots.as_bytes())?;
        }
        let bundle = TrustBundle::from_pem(roots.as_bytes()).map_err(|error| error.to_string())?;
        let issued = authorities
            .known_by_all(now)
            .issue_server(&self.names, now, SERVING_TTL)
            .map_err(|error| format!("{error}; replace the root with `mesh-ca rotate`"))?;
        let identity: Identity = issued.identity(&self.rules.provider).map_err(|error| error.to_string())?;
        let life = identity.not_after().duration_since(now).unwrap_or_default();
        self.materials.store(Material { identity: Some(identity), bundle: Arc::new(bundle) });
        Ok(now + life / 2)
    }

    fn sign(&self, call: &Call, conn: Option<&ConnInfo>) -> Result<Vec<String>, Status> {
        let now = SystemTime::now();
        let tokens = self.tokens();
        let authorities = Arc::clone(&self.view().authorities);
        let peer = conn.and_then(|conn| conn.identity.as_deref());
        let from = conn.map(|conn| tracing::field::display(conn.peer));
        match decide(call, peer, &tokens, &authorities, &self.rules, now) {
            Ok(Granted { id, proof, not_after, chain }) => {
                let until = humantime::format_rfc3339_seconds(not_after);
                tracing::info!(%id, proof, %until, from, "signed");
                Ok(chain)
            }
            Err(status) => {
                tracing::warn!(from, "refused: {status}");
                Err(status)
            }
        }
    }

    /// The tokens that the file has now. A list that cannot be read leaves the one that could.
    fn tokens(&self) -> Arc<BootstrapTokens> {
        let mut view = self.view();
        let seen = Stamp::of(&self.tokens_file);
        if seen != view.tokens_seen {
            view.tokens_seen = seen;
            let read = read_tokens(&self.tokens_file).and_then(|text| {
                BootstrapTokens::parse(&text)
                    .map_err(|error| format!("{}: {error}", self.tokens_file.display()))
            });
            match read {
                Ok(tokens) => view.tokens = Arc::new(tokens),
                Err(error) => tracing::error!("{error}; the tokens that were known stay"),
            }
        }
        Arc::clone(&view.tokens)
    }

    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn say(authorities: &Authorities, rotation: Rotation) {
    let root_until = humantime::format_rfc3339_seconds(authorities.old().not_after());
    match rotation {
        Rotation::Announced(at) => {
            let signs_at = humantime::format_rfc3339_seconds(at);
            tracing::info!(%signs_at, "a new root is handed out beside the old one");
        }
        Rotation::Overlap(at) => {
            let until = humantime::format_rfc3339_seconds(at);
            tracing::info!(%until, "the new root signs, and the old one is still believed");
        }
        _ => tracing::info!(%root_until, "one root signs and is believed"),
    }
}

/// The names of the server.
fn names(args: &MeshCa) -> Result<Vec<ServerName<'static>>, String> {
    let own = args.listen.ip();
    let mut addresses = BTreeSet::from([IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]);
    if !own.is_unspecified() {
        addresses.insert(own);
    }
    let named = std::iter::once("localhost").chain(args.name.iter().map(String::as_str));
    let named = named.map(|name| {
        ServerName::try_from(name.to_owned())
            .map_err(|_| format!("--name {name}: that is no name of a server"))
    });
    named.chain(addresses.into_iter().map(|address| Ok(address.into()))).collect()
}
