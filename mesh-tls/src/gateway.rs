//! TLS at a gateway: each server of a port with certificates of its own, chosen by the name that the client asks for.
//!
//! **Choice.** The ClientHello is read first, and its name finds the server ([`Servers::of`]): the exact name, else the
//! longest wildcard, else `*`. Without a server there is no handshake, and the connection closes as it would behind
//! Envoy. The server's configuration then shakes hands; nothing of another server's can be agreed on.
//!
//! **Configurations** are made when the model is published ([`GatewayTls::prepare`]), one for each different
//! [`ServerTls`], and live as long as a worker may still have a model that names them. Certificates are not part of
//! them: a handshake reads those of the moment from [`Materials`], so that a renewed secret is in force at once, without
//! a reload, and no connection notices. A server whose certificates are missing answers no handshake, and the log names
//! what is missing; the others live.
//!
//! **Within.** HTTP for servers of HTTPS, bytes for those of TLS, for which no protocol is agreed on.
//!
//! **Clients.** MUTUAL and OPTIONAL_MUTUAL ask for a chain of the server's own authorities, with the names and hashes that
//! are configured ([`PeerRule::Chain`]): a certificate without a SPIFFE ID is one of nobody, and lets in. ISTIO_MUTUAL is
//! the mesh's own mutual TLS. Sessions are never resumed, so a client that comes back is judged again; so is one whose
//! connection is open when its authorities change, or its server asks for something else (D9).
//!
//! [`Servers::of`]: mesh_core::Servers::of

mod suites;

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use mesh_core::server::{DownstreamTls, Judge, Terminate, Terminated, Within};
use mesh_core::{
    ClientCertificate, ConnInfo, Credential, GatewayServer, ListenerSet, Pinned, Prefixed, ServerTls, Slot,
    TlsVersion,
};
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, SignatureAlgorithm, SupportedProtocolVersion};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use crate::acceptor::{Secured, secured};
use crate::alpn;
use crate::connector::Credentials;
use crate::source::{Identity, Materials};
use crate::verifier::{PeerRule, PeerVerifier, Pin, in_words};

/// Ends TLS for the servers of a gateway. Cloning shares it.
#[derive(Clone)]
pub struct GatewayTls {
    shared: Arc<Shared>,
    listeners: Slot<ListenerSet>,
}

struct Shared {
    mesh: Materials,
    others: Arc<dyn Credentials>,
    provider: Arc<CryptoProvider>,
    prepared: ArcSwap<HashMap<Arc<ServerTls>, Prepared>>,
    /// Whose turn it is to prepare.
    turn: Mutex<()>,
}

#[derive(Clone)]
struct Prepared {
    server: Result<Arc<Server>, Arc<str>>,
    /// Whether the newest model names it; else only one that a worker may still have.
    newest: bool,
}

/// One way to shake hands.
struct Server {
    config: Arc<ServerConfig>,
    shown: Arc<Shown>,
    asks: ClientCertificate,
    verifier: Arc<PeerVerifier>,
    within: Within,
    /// No other has the same.
    number: u64,
}

/// How many servers have been made in this process.
static MADE: AtomicU64 = AtomicU64::new(0);

impl GatewayTls {
    /// Ends TLS for the servers of `listeners`: with the identity and authorities of `mesh` where they say ISTIO_MUTUAL,
    /// and with those that `others` finds elsewhere.
    #[must_use]
    pub fn new(
        mesh: Materials,
        others: Arc<dyn Credentials>,
        provider: Arc<CryptoProvider>,
        listeners: Slot<ListenerSet>,
    ) -> Self {
        let shared = Shared { mesh, others, provider, prepared: ArcSwap::default(), turn: Mutex::new(()) };
        Self { shared: Arc::new(shared), listeners }
    }

    /// Makes the configurations that the servers of a model need, before the model is published. A server that cannot be
    /// made is logged, and answers no handshake.
    pub fn prepare(&self, next: &ListenerSet) {
        let _turn = self.shared.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.shared.prepared.load();
        let mut prepared: HashMap<_, _> = before
            .iter()
            .filter(|(_, known)| known.newest)
            .map(|(tls, known)| (Arc::clone(tls), Prepared { newest: false, ..known.clone() }))
            .collect();
        for tls in next.terminating() {
            let known = before.get(tls).filter(|known| known.server.is_ok());
            let server = known.map_or_else(|| self.shared.server(tls), |known| known.server.clone());
            prepared.insert(Arc::clone(tls), Prepared { server, newest: true });
        }
        self.shared.prepared.store(Arc::new(prepared));
    }

    fn find<'a>(
        &'a self,
        info: &ConnInfo,
        snapshot: Option<&'a Pinned>,
        sni: Option<&str>,
    ) -> Option<&'a GatewayServer> {
        self.listeners.get_in(snapshot)?.port(info.port)?.servers.of(sni)
    }

    fn server(
        &self,
        info: &ConnInfo,
        snapshot: Option<&Pinned>,
        sni: Option<&str>,
    ) -> Result<Arc<Server>, String> {
        let found = self.find(info, snapshot, sni);
        let tls = found.and_then(|server| server.tls.as_ref()).ok_or_else(|| match sni {
            Some(sni) => format!("no server answers to the name {}", sni.escape_debug()),
            None => "the client asks for no name, and no server answers to all".to_owned(),
        })?;
        match self.shared.prepared.load().get(tls).map(|known| &known.server) {
            Some(Ok(server)) => Ok(Arc::clone(server)),
            Some(Err(reason)) => Err(reason.to_string()),
            None => Err("the server was not prepared".to_owned()),
        }
    }
}

impl Judge for GatewayTls {
    /// A server that is gone, or asks for another client than it did, lets nobody stay whom it would not let in. A
    /// certificate of its own that is missing concerns the next handshake alone.
    fn judge(&self, info: &ConnInfo, snapshot: Option<&Pinned>) -> Result<(), String> {
        let server = self.server(info, snapshot, info.sni.as_deref())?;
        match (server.asks, &info.identity) {
            (ClientCertificate::Required, None) => {
                Err("it showed no certificate, and one is demanded now".to_owned())
            }
            (ClientCertificate::None, _) | (ClientCertificate::Optional, None) => Ok(()),
            (_, Some(peer)) => server
                .verifier
                .judge_client_again(&peer.chain, SystemTime::now())
                .map_err(|refusal| refusal.to_string()),
        }
    }

    fn generation(&self, info: &ConnInfo, snapshot: Option<&Pinned>) -> u64 {
        let server = self.server(info, snapshot, info.sni.as_deref()).ok();
        let asked = server.as_ref().filter(|_| info.identity.is_some());
        let trust =
            asked.and_then(|server| Some((server.number, server.shown.0.first()?.1.trust_generation())));
        trust.map_or(0, |trust| BuildHasherDefault::<DefaultHasher>::default().hash_one(trust))
    }

    fn changes(&self) -> Vec<watch::Receiver<u64>> {
        let prepared = self.shared.prepared.load();
        let asking = prepared.values().filter_map(|known| known.server.as_ref().ok());
        let asking = asking.filter(|server| server.asks != ClientCertificate::None);
        asking.filter_map(|server| server.shown.0.first()).map(|(_, own)| own.trust_changes()).collect()
    }
}

impl Terminate for GatewayTls {
    type Io = TlsStream<Prefixed<TcpStream>>;

    fn expect(&self, _: &ConnInfo, _: Option<&Pinned>) -> DownstreamTls {
        DownstreamTls::Strict
    }

    fn passes_on(&self, info: &ConnInfo, snapshot: Option<&Pinned>, sni: Option<&str>) -> bool {
        self.find(info, snapshot, sni).is_some_and(|server| server.tls.is_none())
    }

    async fn terminate(
        &self,
        io: Prefixed<TcpStream>,
        info: &ConnInfo,
        snapshot: Option<&Pinned>,
    ) -> io::Result<Terminated<Self::Io>> {
        let hello =
            LazyConfigAcceptor::new(rustls::server::Acceptor::default(), io).await.map_err(in_words)?;
        let server = self.server(info, snapshot, hello.client_hello().server_name()).map_err(refused)?;
        server.is_ready().map_err(refused)?;
        let io = hello.into_stream(Arc::clone(&server.config)).await.map_err(in_words)?;
        let own = server.shown.0.first().map(|(_, materials)| materials);
        let Secured { io, peer, protocol, sni } = secured(io, &self.shared.provider, own)?;
        Ok(Terminated { io, protocol, sni, identity: peer, within: server.within })
    }
}

impl fmt::Debug for GatewayTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatewayTls").finish_non_exhaustive()
    }
}

fn refused(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, reason)
}

impl Shared {
    fn server(&self, tls: &ServerTls) -> Result<Arc<Server>, Arc<str>> {
        let made = self.make(tls).map(Arc::new);
        if let Err(reason) = &made {
            tracing::error!("a server of the gateway answers no handshake: {reason}");
        }
        made.map_err(Arc::from)
    }

    fn make(&self, tls: &ServerTls) -> Result<Server, String> {
        let find = |credential: &Credential| match credential {
            Credential::Mesh => Ok((credential.clone(), self.mesh.clone())),
            other => {
                let found =
                    self.others.find(other).ok_or_else(|| format!("{} is not known", named(other)))?;
                Ok((other.clone(), found))
            }
        };
        let shown = tls.credentials.iter().map(find).collect::<Result<Vec<_>, String>>()?;
        let (first, authorities) = shown.first().cloned().ok_or("nothing here can end its TLS")?;
        let is_mesh = first == Credential::Mesh;
        let provider = suites::restricted(&self.provider, &tls.cipher_suites);
        let versions = versions(tls);
        if versions.is_empty() {
            return Err("no version of TLS is left between its lowest and its highest".to_owned());
        }
        let rule = if is_mesh {
            PeerRule::Svid { trust_domains: None, any_of: tls.subject_alt_names.clone() }
        } else {
            let keys = tls.spki_hashes.iter().copied().map(Pin::Spki);
            let pins = keys.chain(tls.certificate_hashes.iter().copied().map(Pin::Certificate)).collect();
            PeerRule::Chain { any_of: tls.subject_alt_names.clone(), pins }
        };
        let verifier = PeerVerifier::new(authorities, Arc::clone(&self.provider), rule);
        let is_optional = tls.client_certificate == ClientCertificate::Optional;
        let verifier = Arc::new(if is_optional { verifier.optional() } else { verifier });
        let builder = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(|error| error.to_string())?;
        let builder = match tls.client_certificate {
            ClientCertificate::None => builder.with_no_client_auth(),
            ClientCertificate::Optional | ClientCertificate::Required => {
                builder.with_client_cert_verifier(Arc::clone(&verifier) as _)
            }
        };
        let shown = Arc::new(Shown(shown));
        let mut config = builder.with_cert_resolver(Arc::clone(&shown) as _);
        let agreed = match (tls.within, is_mesh) {
            // Whatever a client offers, nothing is agreed on: what is within is not ours to name.
            (Within::Bytes, _) => &[],
            (Within::Http, true) => alpn::SERVER,
            (Within::Http, false) => alpn::EDGE,
        };
        config.alpn_protocols = agreed.iter().map(|name| name.to_vec()).collect();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        // Whoever lists suites lists the best first.
        config.ignore_client_order = !tls.cipher_suites.is_empty();
        Ok(Server {
            config: Arc::new(config),
            shown,
            asks: tls.client_certificate,
            verifier,
            within: tls.within,
            number: MADE.fetch_add(1, Ordering::Relaxed),
        })
    }
}

fn versions(tls: &ServerTls) -> Vec<&'static SupportedProtocolVersion> {
    [(TlsVersion::V1_3, &rustls::version::TLS13), (TlsVersion::V1_2, &rustls::version::TLS12)]
        .into_iter()
        .filter(|(version, _)| {
            *version >= tls.min_version && tls.max_version.is_none_or(|max| *version <= max)
        })
        .map(|(_, version)| version)
        .collect()
}

/// What a log calls a credential.
fn named(credential: &Credential) -> String {
    match credential {
        Credential::Secret(name) => format!("Secret {name}"),
        Credential::Files(files) => files.certificate.clone(),
        _ => "the identity of this workload".to_owned(),
    }
}

impl Server {
    /// Whether there is what a handshake needs, or what is missing. Authorities that are missing believe nobody, but
    /// where a certificate is optional that would let in everybody who shows none.
    fn is_ready(&self) -> Result<(), String> {
        let Some((first, authorities)) = self.shown.0.first() else { return Ok(()) };
        if self.shown.0.iter().all(|(_, materials)| materials.load().identity.is_none()) {
            let names: Vec<_> = self.shown.0.iter().map(|(credential, _)| named(credential)).collect();
            return Err(format!("there is no certificate: {} is missing or broken", names.join(", ")));
        }
        if self.asks != ClientCertificate::None && authorities.load().bundle.roots().is_empty() {
            return Err(format!("{} has no authorities for the certificates of clients", named(first)));
        }
        Ok(())
    }
}

/// Shows one of a server's certificates.
struct Shown(Vec<(Credential, Materials)>);

impl ResolvesServerCert for Shown {
    /// The first that the client can verify. ECDSA comes before RSA: it costs a tenth.
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let keys: Vec<_> = self
            .0
            .iter()
            .filter_map(|(_, materials)| materials.load().identity.as_ref().map(Identity::key))
            .filter(|key| key.key.choose_scheme(hello.signature_schemes()).is_some())
            .collect();
        let is_rsa = |key: &&Arc<CertifiedKey>| key.key.algorithm() == SignatureAlgorithm::RSA;
        keys.iter().find(|key| !is_rsa(key)).or_else(|| keys.first()).cloned()
    }
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Shown").finish_non_exhaustive()
    }
}
