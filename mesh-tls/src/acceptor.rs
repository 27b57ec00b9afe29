//! The server's side: shakes hands with clients, and says who they are.
//!
//! An [`Acceptor`] is the same in a proxy and in an axum, hyper or tonic server: it takes a stream and gives a stream, and
//! the peer. [`Inbound`] puts it behind a listener of the mesh, where the mode of each port (PA-01 … PA-03) decides what
//! plaintext is worth.
//!
//! Sessions are never resumed: a client that comes back shows its certificate again, to be judged by the bundle and the
//! revocations of that moment. A whole handshake costs half a millisecond; a resumed identity could cost the mesh.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_core::identity::PeerInfo;
use mesh_core::server::{DownstreamTls, Judge, Protocol, Terminate, Terminated, Within};
use mesh_core::{ConnInfo, Pinned, Prefixed, Slot};
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, ServerConnection};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::alpn;
use crate::certificate::peer_info;
use crate::inbound::InboundTls;
use crate::source::Materials;
use crate::verifier::{PeerRule, PeerVerifier, Refusal, in_words};
use crate::xfcc;

/// Shakes hands as a server. Cloning shares it.
///
/// ```no_run
/// use std::sync::Arc;
/// use mesh_tls::{Acceptor, Materials};
///
/// # async fn example(materials: Materials, provider: Arc<rustls::crypto::CryptoProvider>)
/// # -> Result<(), Box<dyn std::error::Error>> {
/// let acceptor = Acceptor::mutual(materials, provider)?;
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:8443").await?;
/// let (stream, _) = listener.accept().await?;
/// let client = acceptor.accept(stream).await?;
/// let principal = client.peer.as_ref().and_then(|peer| peer.principal());
/// println!("{} speaks {:?}", principal.unwrap_or("nobody"), client.protocol);
/// // Serve `client.io` with hyper, axum or tonic.
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Acceptor {
    tls: TlsAcceptor,
    provider: Arc<CryptoProvider>,
    mutual: Option<Mutual>,
}

/// What mutual TLS of the mesh knows of both ends.
#[derive(Clone)]
struct Mutual {
    own: Materials,
    verifier: Arc<PeerVerifier>,
}

/// A connection after its handshake.
#[derive(Debug)]
#[non_exhaustive]
pub struct Secured<IO> {
    /// The stream, decrypted.
    pub io: TlsStream<IO>,
    /// Who the peer is, where it showed a certificate; its chain was verified.
    pub peer: Option<Arc<PeerInfo>>,
    /// The HTTP that was agreed on; `None` where ALPN agreed on none.
    pub protocol: Option<Protocol>,
    /// The server name that the client asked for, in lower case.
    pub sni: Option<Arc<str>>,
}

impl Acceptor {
    /// Mutual TLS of the mesh: clients are workloads of a trust domain of ours, and are shown our identity.
    ///
    /// # Errors
    /// When the provider has no TLS 1.2 or 1.3.
    pub fn mutual(materials: Materials, provider: Arc<CryptoProvider>) -> Result<Self, rustls::Error> {
        let rule = PeerRule::Svid { trust_domains: None, any_of: Vec::new() };
        let verifier = Arc::new(PeerVerifier::new(materials.clone(), Arc::clone(&provider), rule));
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(Arc::clone(&verifier) as _)
            .with_cert_resolver(Arc::new(Ours(materials.clone())));
        config.alpn_protocols = alpn::SERVER.iter().map(|name| name.to_vec()).collect();
        let mutual = Some(Mutual { own: materials, verifier });
        Ok(Self { mutual, ..Self::of(config, provider) })
    }

    /// TLS for those who have no certificate yet: clients may show one of the mesh, and are told from each other by it, but
    /// need none. What an authority has to serve, so its server is shown by the names of its certificate; over HTTP/2 alone.
    ///
    /// # Errors
    /// When the provider has no TLS 1.2 or 1.3.
    pub fn bootstrap(materials: Materials, provider: Arc<CryptoProvider>) -> Result<Self, rustls::Error> {
        let rule = PeerRule::Svid { trust_domains: None, any_of: Vec::new() };
        let verifier = PeerVerifier::new(materials.clone(), Arc::clone(&provider), rule).optional();
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(Ours(materials)));
        config.alpn_protocols = vec![alpn::H2.to_vec()];
        Ok(Self::of(config, provider))
    }

    /// Any configuration of rustls, without sessions that could be resumed.
    #[must_use]
    pub fn of(mut config: ServerConfig, provider: Arc<CryptoProvider>) -> Self {
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Self { tls: TlsAcceptor::from(Arc::new(config)), provider, mutual: None }
    }

    /// Shakes hands. The time that it may take is the caller's to bound.
    ///
    /// # Errors
    /// When the client is not who it has to be, does not speak as it should, or goes away.
    pub async fn accept<IO>(&self, io: IO) -> io::Result<Secured<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let io = self.tls.accept(io).await.map_err(in_words)?;
        secured(io, &self.provider, self.mutual.as_ref().map(|mutual| &mutual.own))
    }

    /// Whether a client whose connection is open would be let in now: what it may be asked of each client when
    /// [`trust`](Materials::trust_changes) has changed. That its certificate has ended since does not count. A
    /// configuration of one's own ([`Acceptor::of`]) is nothing that can be asked again, and lets everybody in.
    ///
    /// # Errors
    /// When it would not be let in.
    pub fn judge_again(&self, peer: &PeerInfo) -> Result<(), Refusal> {
        let Some(mutual) = &self.mutual else { return Ok(()) };
        mutual.verifier.judge_client_again(&peer.chain, SystemTime::now())
    }
}

/// What a handshake told. The peer is described as one whom we met as `own`.
pub(crate) fn secured<IO>(
    io: TlsStream<IO>,
    provider: &CryptoProvider,
    own: Option<&Materials>,
) -> io::Result<Secured<IO>> {
    let connection: &ServerConnection = io.get_ref().1;
    let peer = match connection.peer_certificates() {
        None | Some([]) => None,
        Some(chain) => {
            let mut info = peer_info(chain, provider)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let material = own.map(Materials::load);
            let own = material.as_ref().and_then(|material| material.identity.as_ref()?.spiffe_id());
            info.forwarded = xfcc::element(own, &info);
            Some(Arc::new(info))
        }
    };
    let protocol = connection.alpn_protocol().and_then(alpn::http);
    let sni = connection.server_name().map(|name| Arc::from(name.to_ascii_lowercase()));
    Ok(Secured { io, peer, protocol, sni })
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acceptor").finish_non_exhaustive()
    }
}

/// Shows the identity of the moment.
pub(crate) struct Ours(pub(crate) Materials);

impl ResolvesServerCert for Ours {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load().identity.as_ref().map(crate::source::Identity::key)
    }
}

impl fmt::Debug for Ours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ours").finish_non_exhaustive()
    }
}

/// Ends the mesh's mutual TLS on the inbound listeners of a workload, as PeerAuthentication says for each port.
#[derive(Clone, Debug)]
pub struct Inbound {
    acceptor: Acceptor,
    modes: Slot<InboundTls>,
}

impl Inbound {
    /// Ends TLS by `acceptor` where `modes` say so. Without a model nothing but TLS is served.
    #[must_use]
    pub const fn new(acceptor: Acceptor, modes: Slot<InboundTls>) -> Self {
        Self { acceptor, modes }
    }
}

impl Inbound {
    fn mode(&self, info: &ConnInfo, snapshot: Option<&Pinned>) -> DownstreamTls {
        self.modes.get_in(snapshot).map_or(DownstreamTls::Strict, |modes| modes.of_port(info.port))
    }
}

impl Judge for Inbound {
    fn judge(&self, info: &ConnInfo, snapshot: Option<&Pinned>) -> Result<(), String> {
        match &info.identity {
            Some(peer) => self.acceptor.judge_again(peer).map_err(|refusal| refusal.to_string()),
            None if !info.tls && self.mode(info, snapshot) == DownstreamTls::Strict => {
                Err("it is in plaintext, and TLS is demanded now".to_owned())
            }
            None => Ok(()),
        }
    }

    fn generation(&self, info: &ConnInfo, _: Option<&Pinned>) -> u64 {
        match (&info.identity, &self.acceptor.mutual) {
            (Some(_), Some(mutual)) => mutual.own.trust_generation(),
            _ => 0,
        }
    }

    fn changes(&self) -> Vec<watch::Receiver<u64>> {
        self.acceptor.mutual.iter().map(|mutual| mutual.own.trust_changes()).collect()
    }
}

impl Terminate for Inbound {
    type Io = TlsStream<Prefixed<TcpStream>>;

    fn expect(&self, info: &ConnInfo, snapshot: Option<&Pinned>) -> DownstreamTls {
        self.mode(info, snapshot)
    }

    async fn terminate(
        &self,
        io: Prefixed<TcpStream>,
        _: &ConnInfo,
        _: Option<&Pinned>,
    ) -> io::Result<Terminated<Self::Io>> {
        let Secured { io, peer, protocol, sni } = self.acceptor.accept(io).await?;
        Ok(Terminated { io, protocol, sni, identity: peer, within: Within::Http })
    }
}
