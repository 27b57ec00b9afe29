//! Who the proxy is, and how its connections are secured: from the command line to what handshakes need.
//!
//! Where the identity comes from is known before anything is compiled, because what can be enforced depends on it: with one,
//! destinations with an identity are called over mutual TLS and PeerAuthentication is enforced; without one, a demand for
//! it is an error that is said, and nothing goes out or comes in as plaintext in its place. One that an authority has yet
//! to sign, or an agent to give, counts as one: until it is there, what needs it is refused, and what does not is served.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use mesh_core::config::Transport;
use mesh_core::identity::{SpiffeId, TrustDomain};
use mesh_core::{Credential, ListenerSet, Slot, UpstreamTls};
use mesh_route::{Cluster, Shard};
use mesh_tls::istio::Secrets;
use mesh_tls::istio_ca::{IstioCa, IstioCaSource};
use mesh_tls::source::{CertSource as _, CertState, IdentityFiles};
use mesh_tls::spiffe::{SpiffeSource, SvidChoice, WorkloadApi};
use mesh_tls::{Acceptor, Connector, Credentials, GatewayTls, Inbound, InboundTls, Materials};
use rustls::crypto::CryptoProvider;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::certs::Named;
use crate::cli::Common;
use crate::credentials::{Known, Places, system_roots};

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
    /// Other workloads of this process.
    workloads: Arc<Mutex<Vec<(String, Materials)>>>,
    /// The trust domains that the configuration names.
    named: Arc<Mutex<Vec<String>>>,
    issuer: Option<Issuer>,
    /// Who is asked to say who we are.
    asked: Arc<OnceLock<Asked>>,
}

/// Who says who we are, beside files.
#[derive(Clone, Debug)]
enum Issuer {
    Authority(Arc<IstioCa>),
    Agent(WorkloadApi, SvidChoice),
}

/// An identity that somebody else gives us while we run.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Who we are, where we say it ourselves; an agent knows it better.
    pub id: Option<SpiffeId>,
    /// How it stands.
    pub state: watch::Receiver<CertState>,
}

impl Security {
    /// Reads the identity of `--identity-dir`, and follows its files; or gets ready to ask `--ca` or `--spiffe-endpoint` for
    /// one; without any of them there is none. The trust domain of the command line is trusted beside that of the identity.
    ///
    /// # Errors
    /// When the files are missing, cannot be read, or do not go together, or the address is none; the words are for the
    /// user.
    pub fn new(common: &Common, places: Places, runtime: &Handle) -> Result<Self, String> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let authority = authority(common, &provider)?.map(|authority| Issuer::Authority(Arc::new(authority)));
        let issuer = agent(common)?.or(authority);
        let dir: Option<&Path> = common.identity_dir.as_deref();
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
        let security = Self {
            mesh,
            acceptor,
            connector,
            credentials,
            servers,
            provider,
            gateway: Arc::default(),
            trust_domain: common.trust_domain.clone(),
            workloads: Arc::default(),
            named: Arc::default(),
            issuer,
            asked: Arc::default(),
        };
        security.set_trust_domains([]);
        Ok(security)
    }

    /// The same process as another workload: with this identity of the mesh, under a name for `/certs`.
    ///
    /// # Errors
    /// When the provider has no TLS 1.2 or 1.3.
    pub fn with_identity(&self, name: &str, mesh: Materials) -> Result<Self, String> {
        let acceptor =
            Acceptor::mutual(mesh.clone(), Arc::clone(&self.provider)).map_err(|error| error.to_string())?;
        let connector = Connector::new(mesh.clone(), Arc::clone(&self.provider))
            .credentials(Arc::clone(&self.credentials) as Arc<dyn Credentials>);
        self.workloads.lock().unwrap_or_else(PoisonError::into_inner).push((name.to_owned(), mesh.clone()));
        let security = Self {
            mesh,
            acceptor,
            connector,
            gateway: Arc::default(),
            named: Arc::default(),
            ..self.clone()
        };
        security.set_trust_domains([]);
        Ok(security)
    }

    /// Every certificate in force, with what it is called.
    #[must_use]
    pub fn certificates(&self) -> Vec<Named> {
        let workloads = self.workloads.lock().unwrap_or_else(PoisonError::into_inner);
        let named = workloads.iter().map(|(name, materials)| (name.clone(), materials.clone()));
        let mesh = [("mesh".to_owned(), self.mesh.clone())];
        let mesh = mesh.into_iter().filter(|_| workloads.is_empty());
        let others = [&self.servers, &self.credentials].into_iter().flat_map(|known| known.all());
        mesh.chain(named)
            .chain(others)
            .map(|(name, materials)| (name, materials.load()))
            .filter(|(_, material)| material.identity.is_some() || !material.bundle.roots().is_empty())
            .collect()
    }

    /// What the stacks of this process can do.
    #[must_use]
    pub fn transport(&self) -> Transport {
        let has_identity = self.issuer.is_some() || self.mesh.load().identity.is_some();
        Transport { originates: true, terminates: has_identity, terminates_servers: true, has_identity }
    }

    /// Begins to ask the authority or the agent, where there is one, for our identity: of an authority that of a service
    /// account. Once.
    ///
    /// # Errors
    /// When trust domain, namespace and service account are no identity; the words are for the user.
    pub fn ask(&self, trust_domain: &str, common: &Common, runtime: &Handle) -> Result<(), String> {
        let invalid = |what: &str, error: mesh_core::identity::InvalidSpiffeId| format!("{what}: {error}");
        match &self.issuer {
            None => {}
            Some(Issuer::Authority(authority)) => {
                let domain: TrustDomain = trust_domain
                    .parse()
                    .map_err(|error| invalid("the trust domain of this workload", error))?;
                let id = SpiffeId::workload(&domain, &common.namespace, &common.service_account)
                    .map_err(|error| invalid("--namespace and --service-account", error))?;
                let provider = Arc::clone(&self.provider);
                let source = IstioCaSource::new(IstioCa::clone(authority), id.clone(), provider);
                if self.asked.set(Asked { id: Some(id), state: source.state() }).is_ok() {
                    self.believe(None);
                    runtime.spawn(source.run(self.mesh.clone()));
                }
            }
            Some(Issuer::Agent(api, choice)) => {
                let source =
                    SpiffeSource::new(api.clone(), Arc::clone(&self.provider)).choose(choice.clone());
                let source = match &self.trust_domain {
                    None => source,
                    Some(ours) => {
                        let ours = ours.parse().map_err(|error| invalid("--trust-domain", error))?;
                        source.trust_domain(ours)
                    }
                };
                let mut state = source.state();
                if self.asked.set(Asked { id: None, state: state.clone() }).is_ok() {
                    runtime.spawn(source.run(self.mesh.clone()));
                    // What a reload set meanwhile may lack the trust domain that came.
                    let security = self.clone();
                    runtime.spawn(async move {
                        while state.changed().await.is_ok() {
                            security.believe(None);
                        }
                    });
                }
            }
        }
        Ok(())
    }

    /// The identity that somebody else gives us, where one is asked.
    #[must_use]
    pub fn asked(&self) -> Option<&Asked> {
        self.asked.get()
    }

    /// The materials of the mesh.
    #[must_use]
    pub fn mesh(&self) -> &Materials {
        &self.mesh
    }

    /// The cryptography of the process.
    #[must_use]
    pub fn provider(&self) -> &Arc<CryptoProvider> {
        &self.provider
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
        self.believe(Some(named.into_iter().collect()));
    }

    /// Believes workloads of the trust domains that are named, now or before, and of our own as it is now.
    fn believe(&self, now_named: Option<Vec<String>>) {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(now_named) = now_named {
            *named = now_named;
        }
        let material = self.mesh.load();
        let own = material.identity.as_ref().and_then(|identity| identity.spiffe_id());
        let asked = self.asked.get().and_then(|asked| asked.id.as_ref());
        let own = own.or(asked).map(|id| id.trust_domain().to_owned());
        let all: BTreeSet<_> =
            own.into_iter().chain(self.trust_domain.clone()).chain(named.iter().cloned()).collect();
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

/// The client of `--ca`.
fn authority(common: &Common, provider: &Arc<CryptoProvider>) -> Result<Option<IstioCa>, String> {
    let (Some(address), Some(token)) = (&common.ca, &common.bootstrap_token) else { return Ok(None) };
    let failed = |error: mesh_tls::istio_ca::InvalidAddress| format!("--ca {address}: {error}");
    let roots = common.ca_root.clone().unwrap_or_default();
    let client = IstioCa::new(address, token.clone(), roots, Arc::clone(provider)).map_err(failed)?;
    let client = client.cluster_id(&common.cluster_id).map_err(failed)?;
    Ok(Some(match &common.ca_root {
        Some(_) => client,
        None => client.fixed_roots(Arc::new(system_roots()?)),
    }))
}

/// The client of `--spiffe-endpoint`, and which identity it gives.
fn agent(common: &Common) -> Result<Option<Issuer>, String> {
    let Some(endpoint) = &common.spiffe_endpoint else { return Ok(None) };
    let api = if endpoint.is_empty() {
        WorkloadApi::from_env().map_err(|error| format!("--spiffe-endpoint: {error}"))?
    } else {
        WorkloadApi::new(endpoint).map_err(|error| format!("--spiffe-endpoint {endpoint}: {error}"))?
    };
    let choice = match &common.spiffe_svid {
        None => SvidChoice::First,
        Some(id) if id.starts_with("spiffe://") => {
            SvidChoice::Id(id.parse().map_err(|error| format!("--spiffe-svid {id}: {error}"))?)
        }
        Some(hint) => SvidChoice::Hint(hint.clone()),
    };
    Ok(Some(Issuer::Agent(api, choice)))
}
