//! Who the proxy is, and how its connections are secured: from the command line to what handshakes need.
//!
//! The identity is read before anything is compiled, because what can be enforced depends on it: with one, destinations
//! with an identity are called over mutual TLS and PeerAuthentication is enforced; without one, a demand for it is an
//! error that is said, and nothing goes out or comes in as plaintext in its place.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use mesh_core::config::Transport;
use mesh_core::{Credential, ListenerSet, Slot, UpstreamTls};
use mesh_route::{Cluster, Shard};
use mesh_tls::istio::Secrets;
use mesh_tls::source::IdentityFiles;
use mesh_tls::{Acceptor, Connector, Credentials, GatewayTls, Inbound, InboundTls, Materials};
use rustls::crypto::CryptoProvider;
use tokio::runtime::Handle;

use crate::credentials::{Known, Places};

/// The identity of a proxy and the credentials of its clusters.
#[derive(Clone, Debug)]
pub struct Security {
    mesh: Materials,
    acceptor: Acceptor,
    connector: Connector,
    credentials: Arc<Known>,
    servers: Arc<Known>,
    provider: Arc<CryptoProvider>,
    gateway: Arc<OnceLock<GatewayTls>>,
    trust_domain: Option<String>,
}

impl Security {
    /// Reads the identity that is in `dir`, and follows its files; without a directory there is none. `trust_domain` is
    /// trusted beside that of the identity.
    ///
    /// # Errors
    /// When the files are missing, cannot be read, or do not go together; the words are for the user.
    pub fn new(
        dir: Option<&Path>,
        trust_domain: Option<&str>,
        places: Places,
        runtime: &Handle,
    ) -> Result<Self, String> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mesh = match dir {
            None => Materials::none(),
            Some(dir) => {
                let opened = IdentityFiles::in_dir(dir).and_then(|files| files.open(Arc::clone(&provider)));
                let (material, following) =
                    opened.map_err(|error| format!("--identity-dir {}: {error}", dir.display()))?;
                let mesh = Materials::new(material);
                runtime.spawn(following.run(mesh.clone()));
                mesh
            }
        };
        let known = |system_roots| {
            Arc::new(Known::new(Arc::clone(&provider), runtime.clone(), places.clone(), system_roots))
        };
        let (credentials, servers) = (known(true), known(false));
        let acceptor =
            Acceptor::mutual(mesh.clone(), Arc::clone(&provider)).map_err(|error| error.to_string())?;
        let connector = Connector::new(mesh.clone(), Arc::clone(&provider))
            .credentials(Arc::clone(&credentials) as Arc<dyn Credentials>);
        let trust_domain = trust_domain.map(str::to_owned);
        let gateway = Arc::default();
        let security =
            Self { mesh, acceptor, connector, credentials, servers, provider, gateway, trust_domain };
        security.set_trust_domains([]);
        Ok(security)
    }

    /// What the stacks of this process can do.
    #[must_use]
    pub fn transport(&self) -> Transport {
        let has_identity = self.mesh.load().identity.is_some();
        Transport { originates: true, terminates: has_identity, terminates_servers: true, has_identity }
    }

    /// The materials of the mesh.
    #[must_use]
    pub fn mesh(&self) -> &Materials {
        &self.mesh
    }

    /// The state of a worker whose connections are secured as their clusters say.
    #[must_use]
    pub fn shard(&self) -> Arc<Shard> {
        Shard::securing_by(rand::random(), Arc::new(self.connector.clone()))
    }

    /// What ends TLS on inbound listeners.
    #[must_use]
    pub fn inbound(&self, modes: Slot<InboundTls>) -> Inbound {
        Inbound::new(self.acceptor.clone(), modes)
    }

    /// What ends TLS on the ports of a gateway, whose servers are in `listeners`.
    #[must_use]
    pub fn gateway(&self, listeners: &Slot<ListenerSet>) -> GatewayTls {
        let make = || {
            let others = Arc::clone(&self.servers) as Arc<dyn Credentials>;
            GatewayTls::new(self.mesh.clone(), others, Arc::clone(&self.provider), listeners.clone())
        };
        self.gateway.get_or_init(make).clone()
    }

    /// Takes the secrets of a configuration, and gets the servers of its gateways ready.
    pub fn prepare_servers(&self, secrets: &Arc<Secrets>, listeners: &Slot<ListenerSet>, next: &ListenerSet) {
        self.credentials.set_secrets(secrets);
        self.servers.set_secrets(secrets);
        for credential in next.terminating().flat_map(|tls| &tls.credentials) {
            self.servers.prepare(credential);
        }
        self.gateway(listeners).prepare(next);
    }

    /// Believes workloads of these trust domains, and of our own.
    pub fn set_trust_domains(&self, named: impl IntoIterator<Item = String>) {
        let material = self.mesh.load();
        let own = material.identity.as_ref().and_then(|identity| identity.spiffe_id());
        let own = own.map(|id| id.trust_domain().to_owned());
        let all: BTreeSet<_> = own.into_iter().chain(self.trust_domain.clone()).chain(named).collect();
        self.mesh.set_trust_domains(all.into_iter().collect());
    }

    /// Reads the credentials that these clusters name, before requests need them, and follows their files.
    pub fn prepare(&self, clusters: &[Arc<Cluster>]) {
        for cluster in clusters {
            if let UpstreamTls::Tls(tls) = &cluster.spec().tls
                && tls.credential != Credential::Mesh
            {
                self.credentials.prepare(&tls.credential);
            }
        }
    }
}
