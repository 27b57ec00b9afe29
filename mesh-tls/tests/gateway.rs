//! The servers of a gateway, as their clients see them: which certificate is shown, who comes in, and with what.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod peers;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_core::server::{ListenerProtocol, Protocol, Terminate as _};
use mesh_core::{
    ClientCertificate, ConnInfo, Credential, Direction, GatewayListener, GatewayServer, ListenerSet,
    Prefixed, ServerTls, Servers, Slot, TlsVersion,
};
use mesh_tls::certificate::{Leaf, sha256};
use mesh_tls::{Credentials, GatewayTls, Material, Materials, PeerRule, PeerVerifier, TrustBundle};
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CipherSuite, ClientConfig, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

use peers::{Ca, DAY, Peer, authority, leaf, leaf_of, material, provider};

const PORT: u16 = 443;

#[derive(Debug, Default)]
struct Secrets(HashMap<String, Materials>);

impl Credentials for Secrets {
    fn find(&self, credential: &Credential) -> Option<Materials> {
        let Credential::Secret(name) = credential else { return None };
        self.0.get(name).cloned()
    }
}

/// A gateway with some secrets and some servers.
struct Edge {
    tls: GatewayTls,
    secrets: HashMap<String, Materials>,
}

fn dns(names: &'static [&'static str]) -> impl FnOnce(&mut CertificateParams) {
    move |params| {
        params.subject_alt_names =
            names.iter().map(|name| SanType::DnsName((*name).try_into().unwrap())).collect();
    }
}

fn secret(name: &str) -> Vec<Credential> {
    vec![Credential::Secret(name.to_owned())]
}

fn simple(name: &str) -> ServerTls {
    ServerTls { credentials: secret(name), ..ServerTls::default() }
}

fn mutual(name: &str) -> ServerTls {
    ServerTls { client_certificate: ClientCertificate::Required, ..simple(name) }
}

fn holds(peer: &Peer, ca: &Ca) -> Materials {
    Materials::new(Material { identity: Some(peer.identity()), bundle: ca.bundle() })
}

fn edge(
    mesh: Materials,
    secrets: Vec<(&str, Materials)>,
    servers: Vec<(&[&str], Option<ServerTls>)>,
) -> Edge {
    let mut all = Servers::default();
    for (hosts, tls) in servers {
        let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        assert!(all.push(GatewayServer { hosts, tls: tls.map(Arc::new) }).is_empty());
    }
    let listener = GatewayListener {
        port: PORT,
        name: "https".to_owned(),
        protocol: ListenerProtocol::Https,
        bind: None,
        servers: all,
    };
    let set = ListenerSet { listeners: vec![listener] };
    let secrets: HashMap<_, _> =
        secrets.into_iter().map(|(name, materials)| (name.to_owned(), materials)).collect();
    let others = Arc::new(Secrets(secrets.clone()));
    let tls = GatewayTls::new(mesh, others, provider(), Slot::fixed(set.clone()));
    tls.prepare(&set);
    Edge { tls, secrets }
}

/// What both sides know after a handshake.
#[derive(Debug)]
struct Met {
    shown: CertificateDer<'static>,
    version: rustls::ProtocolVersion,
    suite: CipherSuite,
    protocol: Option<Protocol>,
    peer: Option<Arc<mesh_core::identity::PeerInfo>>,
    sni: Option<String>,
}

/// A client that believes `ca`.
struct Client {
    config: ClientConfig,
}

impl Client {
    fn new(ca: &Ca, shows: Option<&Peer>) -> Self {
        Self::speaking(ca, shows, &[&rustls::version::TLS13, &rustls::version::TLS12], |_| {})
    }

    fn speaking(
        ca: &Ca,
        shows: Option<&Peer>,
        versions: &[&'static SupportedProtocolVersion],
        differs: impl FnOnce(&mut rustls::crypto::CryptoProvider),
    ) -> Self {
        let mut own = rustls::crypto::CryptoProvider::clone(&provider());
        differs(&mut own);
        let own = Arc::new(own);
        let believes = Materials::new(Material { identity: None, bundle: ca.bundle() });
        let rule = PeerRule::Chain { any_of: Vec::new(), pins: Vec::new() };
        let verifier = PeerVerifier::new(believes, Arc::clone(&own), rule);
        let builder = ClientConfig::builder_with_provider(own)
            .with_protocol_versions(versions)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match shows {
            Some(peer) => builder.with_client_auth_cert(peer.chain(), peer.key()).unwrap(),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self { config }
    }

    /// Shakes hands with an edge: what is known then, or why the edge refused.
    async fn meet(&self, edge: &Edge, name: &str) -> Result<Met, String> {
        let mut config = self.config.clone();
        config.enable_sni = !name.is_empty();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = ServerName::try_from(if name.is_empty() { "unnamed" } else { name }.to_owned()).unwrap();
        let client = async {
            let tcp = TcpStream::connect(address).await?;
            let mut stream = TlsConnector::from(Arc::new(config)).connect(asked, tcp).await?;
            // With TLS 1.3 a client hears of its refusal when it reads.
            stream.read_exact(&mut [0; 1]).await?;
            Ok::<_, std::io::Error>(stream)
        };
        let server = async {
            let (tcp, _) = listener.accept().await.unwrap();
            let info = ConnInfo { port: PORT, ..ConnInfo::unknown(Direction::Gateway) };
            let io = Prefixed::new(bytes::Bytes::new(), tcp);
            let mut done = edge.tls.terminate(io, &info, None).await?;
            done.io.write_all(b"!").await?;
            done.io.flush().await?;
            Ok::<_, std::io::Error>(done)
        };
        let (client, server) = tokio::join!(client, server);
        let done = server.map_err(|error| error.to_string())?;
        let client = client.expect("the server said yes");
        let connection = client.get_ref().1;
        Ok(Met {
            shown: connection.peer_certificates().unwrap()[0].clone(),
            version: connection.protocol_version().unwrap(),
            suite: connection.negotiated_cipher_suite().unwrap().suite(),
            protocol: done.protocol,
            peer: done.identity,
            sni: done.sni.map(|sni| sni.to_string()),
        })
    }
}

#[tokio::test]
async fn gw_04_the_name_that_is_asked_for_chooses_the_certificate() {
    let ca = authority("cluster.local");
    let (a, wide, narrow) = (
        leaf(&ca, dns(&["a.example.com"])),
        leaf(&ca, dns(&["*.example.com"])),
        leaf(&ca, dns(&["*.b.example.com"])),
    );
    let secrets = vec![("a", holds(&a, &ca)), ("wide", holds(&wide, &ca)), ("narrow", holds(&narrow, &ca))];
    let servers: Vec<(&[&str], _)> = vec![
        (&["*.example.com"], Some(simple("wide"))),
        (&["a.example.com"], Some(simple("a"))),
        (&["*.b.example.com"], Some(simple("narrow"))),
        (&["p.example.com"], None),
    ];
    let edge = edge(Materials::none(), secrets, servers);
    let client = Client::new(&ca, None);
    for (name, expected) in
        [("a.example.com", &a), ("A.example.COM", &a), ("x.example.com", &wide), ("x.b.example.com", &narrow)]
    {
        let met = client.meet(&edge, name).await.unwrap();
        assert_eq!(&met.shown, expected.der(), "{name}");
        assert_eq!(met.sni, Some(name.to_ascii_lowercase()));
        assert_eq!((met.protocol, met.peer), (Some(Protocol::Http2), None));
    }
    let reason = client.meet(&edge, "other.com").await.unwrap_err();
    assert!(reason.contains("no server answers to the name other.com"), "{reason}");
    let reason = client.meet(&edge, "").await.unwrap_err();
    assert!(reason.contains("asks for no name"), "{reason}");
    // What is passed on is not ended here.
    let info = ConnInfo { port: PORT, ..ConnInfo::unknown(Direction::Gateway) };
    assert!(edge.tls.passes_on(&info, None, Some("p.example.com")));
    assert!(!edge.tls.passes_on(&info, None, Some("a.example.com")));
    assert!(!edge.tls.passes_on(&info, None, Some("other.com")));
    assert!(client.meet(&edge, "p.example.com").await.is_err());
}

#[tokio::test]
async fn gw_05_a_missing_secret_silences_its_server_and_a_renewed_one_is_shown_at_once() {
    let ca = authority("cluster.local");
    let good = leaf(&ca, dns(&["a.example.com"]));
    let secrets = vec![("a", holds(&good, &ca)), ("b", Materials::none())];
    let servers: Vec<(&[&str], _)> = vec![
        (&["a.example.com"], Some(simple("a"))),
        (&["b.example.com"], Some(simple("b"))),
        (&["c.example.com"], Some(simple("c"))),
    ];
    let edge = edge(Materials::none(), secrets, servers);
    let client = Client::new(&ca, None);
    for name in ["b", "c"] {
        let reason = client.meet(&edge, &format!("{name}.example.com")).await.unwrap_err();
        assert!(reason.contains(&format!("Secret {name}")), "{reason}");
    }
    assert_eq!(&client.meet(&edge, "a.example.com").await.unwrap().shown, good.der());
    let next = leaf(&ca, dns(&["b.example.com"]));
    edge.secrets["b"].store(Material { identity: Some(next.identity()), bundle: ca.bundle() });
    assert_eq!(&client.meet(&edge, "b.example.com").await.unwrap().shown, next.der());
}

#[tokio::test]
async fn gw_05_of_two_certificates_the_client_has_the_one_that_it_can_verify() {
    let ca = authority("cluster.local");
    let rsa = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
    let (rsa, ecdsa) = (leaf_of(&ca, &rsa, dns(&["a.example.com"])), leaf(&ca, dns(&["a.example.com"])));
    let both = ServerTls { credentials: [secret("rsa"), secret("ecdsa")].concat(), ..ServerTls::default() };
    let secrets = vec![("rsa", holds(&rsa, &ca)), ("ecdsa", holds(&ecdsa, &ca))];
    let edge = edge(Materials::none(), secrets, vec![(&["a.example.com"], Some(both))]);
    let met = Client::new(&ca, None).meet(&edge, "a.example.com").await.unwrap();
    assert_eq!(&met.shown, ecdsa.der(), "whoever can has the cheaper one");
    let old = [&rustls::version::TLS12];
    let only_rsa = Client::speaking(&ca, None, &old, |provider| {
        provider.cipher_suites.retain(|suite| format!("{:?}", suite.suite()).contains("ECDHE_RSA"));
    });
    assert_eq!(&only_rsa.meet(&edge, "a.example.com").await.unwrap().shown, rsa.der());
    let only_ecdsa = Client::speaking(&ca, None, &old, |provider| {
        provider.cipher_suites.retain(|suite| format!("{:?}", suite.suite()).contains("ECDHE_ECDSA"));
    });
    assert_eq!(&only_ecdsa.meet(&edge, "a.example.com").await.unwrap().shown, ecdsa.der());
    // One of the two is enough.
    edge.secrets["ecdsa"].store(Material::default());
    assert_eq!(&Client::new(&ca, None).meet(&edge, "a.example.com").await.unwrap().shown, rsa.der());
}

#[tokio::test]
async fn gw_04_mutual_asks_for_a_chain_and_not_for_an_identity_of_the_mesh() {
    let (ca, clients) = (authority("cluster.local"), authority("elsewhere"));
    let server = leaf(&ca, dns(&["a.example.com"]));
    let believes = Material { identity: Some(server.identity()), bundle: clients.bundle() };
    let optional = ServerTls { client_certificate: ClientCertificate::Optional, ..simple("a") };
    let servers: Vec<(&[&str], _)> =
        vec![(&["a.example.com"], Some(mutual("a"))), (&["o.example.com"], Some(optional))];
    let edge = edge(Materials::none(), vec![("a", Materials::new(believes))], servers);
    let device = leaf(&clients, dns(&["device-1"]));
    let foreign = leaf(&clients, |params| {
        params.subject_alt_names = vec![SanType::URI("spiffe://far.example/ns/x/sa/y".try_into().unwrap())];
    });
    let stranger = leaf(&authority("elsewhere"), dns(&["device-1"]));
    for host in ["a.example.com", "o.example.com"] {
        let peer = Client::new(&ca, Some(&device)).meet(&edge, host).await.unwrap().peer.unwrap();
        assert_eq!((peer.principal(), &*peer.dns_sans), (None, &["device-1".to_owned()][..]));
        let peer = Client::new(&ca, Some(&foreign)).meet(&edge, host).await.unwrap().peer.unwrap();
        assert_eq!(peer.principal(), Some("far.example/ns/x/sa/y"), "as written");
        let reason = Client::new(&ca, Some(&stranger)).meet(&edge, host).await.unwrap_err();
        assert!(reason.contains("signature") || reason.contains("authority"), "{reason}");
    }
    let nobody = Client::new(&ca, None);
    assert!(nobody.meet(&edge, "a.example.com").await.is_err());
    assert!(nobody.meet(&edge, "o.example.com").await.unwrap().peer.is_none());
    // Revoked in the next moment.
    let crl = clients.0.revoke(&[device.serial()], SystemTime::now(), DAY).unwrap();
    let bundle = TrustBundle::new([clients.0.root().clone()]).unwrap().with_crls([crl]).unwrap();
    let now = &edge.secrets["a"];
    now.store(Material { bundle: Arc::new(bundle), ..Material::clone(&now.load()) });
    let reason = Client::new(&ca, Some(&device)).meet(&edge, "a.example.com").await.unwrap_err();
    assert!(reason.contains("revoked"), "{reason}");
    // Without authorities nobody could be judged, so nobody comes in: not even who shows nothing.
    now.store(Material { identity: Some(server.identity()), ..Material::default() });
    for host in ["a.example.com", "o.example.com"] {
        let reason = nobody.meet(&edge, host).await.unwrap_err();
        assert!(reason.contains("Secret a has no authorities"), "{reason}");
    }
}

#[tokio::test]
async fn gw_04_istio_mutual_is_the_mesh() {
    let ca = authority("cluster.local");
    let own = material(&ca, "spiffe://cluster.local/ns/istio-system/sa/gateway");
    let of_mesh = ServerTls {
        credentials: vec![Credential::Mesh],
        client_certificate: ClientCertificate::Required,
        ..ServerTls::default()
    };
    let edge = edge(own, vec![], vec![(&["*"], Some(of_mesh))]);
    let workload = leaf(&ca, |_| {});
    let met = Client::new(&ca, Some(&workload)).meet(&edge, "").await.unwrap();
    let peer = met.peer.unwrap();
    assert_eq!(peer.principal(), Some("cluster.local/ns/default/sa/productpage"));
    let told = peer.forwarded.as_ref().unwrap().to_str().unwrap();
    assert!(told.starts_with("By=spiffe://cluster.local/ns/istio-system/sa/gateway;"), "{told}");
    let device = leaf(&ca, dns(&["device-1"]));
    let reason = Client::new(&ca, Some(&device)).meet(&edge, "").await.unwrap_err();
    assert!(reason.contains("URI names"), "{reason}");
    assert!(Client::new(&ca, None).meet(&edge, "").await.is_err());
}

#[tokio::test]
async fn gw_06_names_and_hashes_of_clients() {
    let ca = authority("cluster.local");
    let server = leaf(&ca, dns(&["a.example.com"]));
    let (one, two) = (leaf(&ca, dns(&["device-1"])), leaf(&ca, dns(&["device-2"])));
    let hash = |data: &[u8]| sha256(data, &provider()).unwrap();
    let spki = hash(&Leaf::read(one.der()).unwrap().spki);
    let cases = [
        ("device-1 by name", ServerTls { subject_alt_names: vec!["device-1".to_owned()], ..mutual("a") }),
        ("by its key", ServerTls { spki_hashes: vec![spki], ..mutual("a") }),
        ("by its certificate", ServerTls { certificate_hashes: vec![hash(one.der())], ..mutual("a") }),
        (
            "by either",
            ServerTls {
                spki_hashes: vec![[7; 32]],
                certificate_hashes: vec![hash(one.der())],
                ..mutual("a")
            },
        ),
    ];
    for (what, tls) in cases {
        let edge = edge(Materials::none(), vec![("a", holds(&server, &ca))], vec![(&["*"], Some(tls))]);
        Client::new(&ca, Some(&one)).meet(&edge, "a.example.com").await.unwrap();
        let reason = Client::new(&ca, Some(&two)).meet(&edge, "a.example.com").await.unwrap_err();
        assert!(reason.contains("expected"), "{what}: {reason}");
    }
}

#[tokio::test]
async fn gw_06_versions_and_suites() {
    use rustls::ProtocolVersion as Version;
    let ca = authority("cluster.local");
    let server = leaf(&ca, dns(&["a.example.com"]));
    let with =
        |tls: ServerTls| edge(Materials::none(), vec![("a", holds(&server, &ca))], vec![(&["*"], Some(tls))]);
    let any = Client::new(&ca, None);
    let old = Client::speaking(&ca, None, &[&rustls::version::TLS12], |_| {});
    let new = Client::speaking(&ca, None, &[&rustls::version::TLS13], |_| {});
    let version = async |client: &Client, edge: &Edge| {
        client.meet(edge, "a.example.com").await.ok().map(|met| met.version)
    };
    let default = with(simple("a"));
    assert_eq!(version(&any, &default).await, Some(Version::TLSv1_3));
    assert_eq!(version(&old, &default).await, Some(Version::TLSv1_2));
    let only_new = with(ServerTls { min_version: TlsVersion::V1_3, ..simple("a") });
    assert_eq!(version(&any, &only_new).await, Some(Version::TLSv1_3));
    assert_eq!(version(&old, &only_new).await, None);
    let only_old = with(ServerTls { max_version: Some(TlsVersion::V1_2), ..simple("a") });
    assert_eq!(version(&any, &only_old).await, Some(Version::TLSv1_2));
    assert_eq!(version(&new, &only_old).await, None);
    let none = with(ServerTls { max_version: Some(TlsVersion::Older), ..simple("a") });
    let reason = any.meet(&none, "a.example.com").await.unwrap_err();
    assert!(reason.contains("no version of TLS"), "{reason}");
    let listed = ["ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-GCM-SHA256"];
    let listed = with(ServerTls { cipher_suites: listed.map(str::to_owned).to_vec(), ..simple("a") });
    let met = old.meet(&listed, "a.example.com").await.unwrap();
    assert_eq!(met.suite, CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, "the best first");
    let other = Client::speaking(&ca, None, &[&rustls::version::TLS12], |provider| {
        provider
            .cipher_suites
            .retain(|suite| suite.suite() == CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384);
    });
    assert!(other.meet(&listed, "a.example.com").await.is_err());
}
