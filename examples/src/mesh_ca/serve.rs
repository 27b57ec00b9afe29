//! The process: serves, and looks at its directory.
//!
//! Calls are answered from what is known, which is replaced as a whole when the directory or the time asks for it: nobody
//! waits for a lock or a key in the place of a call, and files are read and written where they may let us wait. A change is
//! on disk before calls see it, so that nobody is told of a root that a crash would forget.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use http::Request;
use mesh_core::server::{DrainTimes, ListenerSpec, Server, ServerLimits, WithTls};
use mesh_core::{Body, ConnInfo, Direction, RequestContext, Slot};
use mesh_tls::ca::{Authorities, BootstrapTokens, Rotation};
use mesh_tls::istio_ca::{Call, Status, answer};
use mesh_tls::{Acceptor, Identity, Inbound, InboundTls, Material, Materials, TrustBundle};
use rustls::pki_types::ServerName;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::time::MissedTickBehavior;

use super::cli::MeshCa;
use super::decide::{Granted, Rules, decide};
use super::provider;
use super::state::{Stamp, State, write_file};
use super::tokens_file::TokensFile;

/// How often the directory is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// How long the certificate of the server lives; it is renewed at half of it.
const SERVING_TTL: Duration = Duration::from_secs(24 * 3600);

/// How long before its end a root is warned of.
const WARN_BEFORE: Duration = Duration::from_secs(30 * 24 * 3600);

/// How often that is said.
const WARN_EVERY: Duration = Duration::from_secs(24 * 3600);

/// How long the end of an overlap has to be seen before the old root is forgotten, which nothing brings back: a clock that
/// is wrong for a moment ends nothing. Where certificates live for less, so long as they do.
const SURE: Duration = Duration::from_secs(600);

/// How long an error that stays is not said again.
const QUIET: Duration = Duration::from_secs(600);

/// How long file systems may go on by themselves after the end.
const LAST_WRITES: Duration = Duration::from_secs(1);

/// How many calls look at the list of tokens at a time.
const READERS: usize = 16;

/// What calls are answered from. Nothing of it is locked.
struct Service {
    rules: Rules,
    authorities: ArcSwap<Authorities>,
    tokens: Arc<TokensFile>,
    readers: Semaphore,
}

/// What looks at the directory, and is alone in that.
struct Looker {
    service: Arc<Service>,
    state: State,
    names: Vec<ServerName<'static>>,
    materials: Materials,
    /// The state that is known; none makes it be read.
    seen: Option<Stamp>,
    /// When the server's own certificate is renewed.
    renew_at: SystemTime,
    over: Over,
    /// What was said of the rotation.
    said: Option<Rotation>,
    warn_at: SystemTime,
    errors: Errors,
}

pub(super) fn run(args: &MeshCa) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let served = runtime.block_on(serve(args));
    // A file system that hangs does not keep us.
    runtime.shutdown_timeout(LAST_WRITES);
    served
}

async fn serve(args: &MeshCa) -> Result<(), String> {
    let state = State::open(&args.dir)?;
    let _alone = state.serve_alone()?;
    let mut looker = Looker::open(state, args)?;
    let service = Arc::clone(&looker.service);
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
    let acceptor = Acceptor::bootstrap(looker.materials.clone(), Arc::clone(&service.rules.provider));
    let tls = Inbound::new(acceptor.map_err(|error| error.to_string())?, Slot::fixed(InboundTls::default()));
    let spec = ListenerSpec::new("ca", args.listen, Direction::Inbound);
    let stack = move |_| {
        let service = Arc::clone(&service);
        tower::service_fn(move |request: Request<Body>| {
            let service = Arc::clone(&service);
            async move {
                let conn = request.extensions().get::<RequestContext>().map(|cx| Arc::clone(cx.conn()));
                let tokens = service.tokens().await;
                let sign = |call: Call| service.sign(&call, conn.as_deref(), tokens.as_deref());
                Ok::<_, Infallible>(answer(request, sign).await)
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
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let mut anew = false;
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            Some(()) = hangup.recv() => anew = true,
            _ = looks.tick() => {}
        }
        // Files may let us wait, and then nobody else waits.
        let mut looking = tokio::task::spawn_blocking(move || {
            looker.look_or_say(anew);
            looker
        });
        let looked = tokio::select! {
            looked = &mut looking => looked,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        };
        looker = looked.map_err(|error| error.to_string())?;
    }
    let times = DrainTimes { drain_time: Duration::ZERO, deadline: Duration::from_secs(5) };
    server.drain().run(times, std::future::pending()).await;
    Ok(())
}

impl Service {
    /// The tokens that the file has now; none while it cannot be read.
    async fn tokens(&self) -> Option<Arc<BootstrapTokens>> {
        let _permit = self.readers.acquire().await.ok()?;
        let file = Arc::clone(&self.tokens);
        tokio::task::spawn_blocking(move || file.now(false)).await.ok()?
    }

    fn sign(
        &self,
        call: &Call,
        conn: Option<&ConnInfo>,
        tokens: Option<&BootstrapTokens>,
    ) -> Result<Vec<String>, Status> {
        let now = SystemTime::now();
        let authorities = self.authorities.load_full();
        let peer = conn.and_then(|conn| conn.identity.as_deref());
        let from = conn.map(|conn| tracing::field::display(conn.peer));
        match decide(call, peer, tokens, &authorities, &self.rules, now) {
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
}

impl Looker {
    fn open(state: State, args: &MeshCa) -> Result<Self, String> {
        let rules =
            Rules { trust_domain: args.trust_domain.clone(), leaf_ttl: args.leaf_ttl, provider: provider() };
        let authorities = state.load_or_make(&rules.trust_domain, rules.leaf_ttl, args.root_ttl)?;
        let materials = Materials::none();
        materials.set_trust_domains(vec![rules.trust_domain.as_str().to_owned()]);
        let now = SystemTime::now();
        let tokens = Arc::new(TokensFile::new(args.tokens_file()));
        tokens.read()?;
        let service = Service {
            rules,
            authorities: ArcSwap::from_pointee(authorities),
            tokens,
            readers: Semaphore::new(READERS),
        };
        let mut looker = Self {
            service: Arc::new(service),
            names: names(args)?,
            state,
            materials,
            seen: None,
            renew_at: now,
            over: Over::default(),
            said: None,
            warn_at: now,
            errors: Errors::default(),
        };
        looker.look()?;
        Ok(looker)
    }

    /// Looks, and says what went wrong. `anew` reads everything, whatever is known of it.
    fn look_or_say(&mut self, anew: bool) {
        if anew {
            self.seen = None;
            self.service.tokens.now(true);
        }
        let looked = self.look();
        if let Some(error) = self.errors.worth_saying(looked.err(), mesh_core::clock::now()) {
            tracing::error!("{error}; what was known stays");
        }
    }

    /// Makes what is served be what the directory and the time say.
    fn look(&mut self) -> Result<(), String> {
        let now = SystemTime::now();
        let known = self.service.authorities.load_full();
        let rotation = known.rotation(now);
        let leaf = self.service.rules.leaf_ttl;
        let is_over = matches!(rotation, Rotation::Overlap(end) if end <= now);
        let retires = self.over.is_sure(is_over, mesh_core::clock::now(), SURE.min(known.longest_leaf()));
        let is_due = retires || rotation == Rotation::Made;
        if self.seen != Some(Stamp::of(&self.state.state_file())) || is_due {
            let (authorities, stamp) = self.state.update(|authorities| {
                let retired = retires && authorities.retire(now);
                let allowed = authorities.allow_leaf(leaf).map_err(|error| {
                    format!("--leaf-ttl: {error}; give a shorter one until the rotation is over")
                })?;
                Ok([retired, allowed, authorities.announce(now)].contains(&true))
            })?;
            self.service.authorities.store(Arc::new(authorities));
            self.seen = Some(stamp);
            self.renew_at = now;
        }
        let authorities = self.service.authorities.load_full();
        let rotation = authorities.rotation(now);
        if self.said != Some(rotation) {
            say(&authorities, rotation);
            self.said = Some(rotation);
        }
        let left = authorities.signing(now).not_after().duration_since(now).unwrap_or_default();
        if left < WARN_BEFORE.max(leaf.saturating_mul(4)) && self.warn_at <= now {
            self.warn_at = now + WARN_EVERY;
            tracing::warn!(
                ?left,
                "the root ends soon, and with it every certificate: replace it with `mesh-ca rotate`"
            );
        }
        if self.renew_at <= now {
            self.renew_at = self.renew(&authorities, now)?;
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
        let provider = &self.service.rules.provider;
        let identity: Identity = issued.identity(provider).map_err(|error| error.to_string())?;
        let life = identity.not_after().duration_since(now).unwrap_or_default();
        self.materials.store(Material { identity: Some(identity), bundle: Arc::new(bundle) });
        Ok(now + life / 2)
    }
}

/// Whether the end of an overlap was seen for long enough, by a clock that nobody sets.
#[derive(Debug, Default)]
struct Over(Option<Instant>);

impl Over {
    fn is_sure(&mut self, is_over: bool, now: Instant, sure: Duration) -> bool {
        if !is_over {
            self.0 = None;
            return false;
        }
        let since = *self.0.get_or_insert(now);
        now.saturating_duration_since(since) >= sure
    }
}

/// The error that was said last, so that one that stays is not said with every look.
#[derive(Debug, Default)]
struct Errors(Option<(String, Instant)>);

impl Errors {
    fn worth_saying(&mut self, error: Option<String>, now: Instant) -> Option<String> {
        let Some(error) = error else {
            self.0 = None;
            return None;
        };
        let was_said = self
            .0
            .as_ref()
            .is_some_and(|(said, at)| *said == error && now.saturating_duration_since(*at) < QUIET);
        if was_said {
            return None;
        }
        self.0 = Some((error.clone(), now));
        Some(error)
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
        Rotation::TooShort => tracing::error!(
            "the new root ends before every workload would have changed to it, and does not sign: replace it with \
             `mesh-ca rotate`, and a longer --root-ttl"
        ),
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

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn bug_one_wrong_reading_of_the_clock_deleted_the_old_root() {
        let (mut over, now) = (Over::default(), mesh_core::clock::now());
        // Wrong for a moment, and then for almost too long.
        assert!(!over.is_sure(true, now, SURE) && !over.is_sure(false, now + SECOND, SURE));
        let again = now + SURE + SECOND;
        assert!(!over.is_sure(true, again, SURE));
        assert!(!over.is_sure(true, again + SURE - SECOND, SURE));
        assert!(over.is_sure(true, again + SURE, SURE));
    }

    #[test]
    fn bug_an_error_that_stayed_was_logged_twice_a_second() {
        let (mut errors, now) = (Errors::default(), mesh_core::clock::now());
        let mut said = |error: &str, at| errors.worth_saying(Some(error.to_owned()), at).is_some();
        assert!(said("over", now) && !said("over", now + LOOK) && said("other", now + LOOK));
        assert!(!said("other", now + QUIET) && said("other", now + LOOK + QUIET));
        // What was mended and breaks again is news.
        assert!(errors.worth_saying(None, now).is_none());
        assert!(errors.worth_saying(Some("other".to_owned()), now + LOOK + QUIET).is_some());
    }
}
