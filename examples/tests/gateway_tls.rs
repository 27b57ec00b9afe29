//! TLS at the gateway, through the binary: servers with certificates of their own, secrets that are renewed, clients
//! that show certificates, and clients that we did not write.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod tls;

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{Request, Version};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::{exchange, get, get_json};
use mesh_testkit::until;
use mesh_testkit::upstream::Echo;
use mesh_tls::ca::Authority;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use tls::TlsUpstream;

const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");
const ANY: &str = "127.0.0.1:0";

/// An authority of the outside world.
struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate with its key, in PEM.
#[derive(Clone)]
struct Pair {
    chain: String,
    key: String,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        // openssl takes a certificate whose issuer has its own name for a self-signed one.
        params.distinguished_name.push(DnType::CommonName, "an authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn issue(&self, names: &[&str]) -> Pair {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        Pair { chain: params.signed_by(&key, &self.issuer).unwrap().pem(), key: key.serialize_pem() }
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap()).unwrap();
        roots
    }
}

impl Pair {
    fn der(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.chain.as_bytes()).unwrap()
    }
}

fn resource(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    )
}

/// A Secret of the form of `kubernetes.io/tls`; the text is JSON, which is YAML.
fn secret(name: &str, pair: &Pair, ca: Option<&Ca>) -> String {
    let mut data = serde_json::json!({ "tls.crt": pair.chain, "tls.key": pair.key });
    if let Some(ca) = ca {
        data["ca.crt"] = ca.pem.clone().into();
    }
    format!(
        "---\napiVersion: v1\nkind: Secret\ntype: kubernetes.io/tls\nmetadata: {{name: {name}}}\nstringData: {data}\n"
    )
}

fn https(hosts: &str, tls: &str, name: &str) -> String {
    format!("{{port: {{number: 443, name: {name}, protocol: HTTPS}}, hosts: {hosts}, tls: {tls}}}")
}

/// A gateway with these servers, whose hosts below example.com all lead to `app`.
fn edge(app: SocketAddr, servers: &[String]) -> String {
    let entry = format!(
        "{{hosts: [app.default.svc.cluster.local], location: MESH_INTERNAL, resolution: STATIC, ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{{address: 127.0.0.1, ports: {{http: {}}}}}]}}",
        app.port()
    );
    resource("ServiceEntry", "app", &entry)
        + &resource(
            "Gateway",
            "edge",
            &format!("{{selector: {{istio: ingressgateway}}, servers: [{}]}}", servers.join(", ")),
        )
        + &resource(
            "VirtualService",
            "app",
            "{hosts: ['*.example.com'], gateways: [edge], http: [{route: [{destination: {host: app}}]}]}",
        )
}

struct Gateway {
    process: Process,
    config: ConfigDir,
}

impl Gateway {
    fn start(config: &str, more: &[&str]) -> Self {
        let dir = ConfigDir::new();
        dir.write("mesh.yaml", config);
        let file = dir.file("mesh.yaml");
        let mut args = vec![
            "--config",
            &file,
            "--bind",
            "127.0.0.1",
            "--admin",
            ANY,
            "--workers",
            "1",
            "--map-port",
            "443=0",
        ];
        args.extend(more);
        Self { process: Process::start(GATEWAY, &args), config: dir }
    }

    fn https(&self) -> SocketAddr {
        self.process.address("https")
    }

    async fn says(&self, what: &str) {
        until(what, async || self.process.stderr().contains(what)).await;
    }
}

/// A client of TLS that believes `ca` and may show a certificate.
struct Client<'a> {
    ca: &'a Ca,
    shows: Option<&'a Pair>,
}

impl Client<'_> {
    async fn connect(
        &self,
        peer: SocketAddr,
        name: &str,
        alpn: &str,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.ca.roots());
        let mut config = match self.shows {
            None => builder.with_no_client_auth(),
            Some(pair) => {
                let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
                builder.with_client_auth_cert(vec![pair.der()], key).unwrap()
            }
        };
        config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let tcp = TcpStream::connect(peer).await?;
        TlsConnector::from(Arc::new(config))
            .connect(ServerName::try_from(name.to_owned()).unwrap(), tcp)
            .await
    }

    /// The certificate that is shown for a name.
    async fn shown(&self, peer: SocketAddr, name: &str) -> std::io::Result<CertificateDer<'static>> {
        let stream = self.connect(peer, name, "h2").await?;
        Ok(stream.get_ref().1.peer_certificates().unwrap()[0].clone())
    }

    /// What the application saw of a request, over a connection of its own.
    async fn ask(&self, peer: SocketAddr, name: &str) -> Result<Value, String> {
        let stream = self.connect(peer, name, "http/1.1").await.map_err(|error| error.to_string())?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        let (status, saw) = h1(&mut sender, name).await.map_err(|error| error.to_string())?;
        assert_eq!(status, 200, "{saw}");
        Ok(saw)
    }
}

async fn h1(
    sender: &mut http1::SendRequest<Empty<bytes::Bytes>>,
    host: &str,
) -> Result<(u16, Value), hyper::Error> {
    let request = Request::get("/x").header("host", host).body(Empty::new()).unwrap();
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let body = response.into_body().collect().await?.to_bytes();
    Ok((status, serde_json::from_slice(&body).unwrap_or(Value::Null)))
}

#[tokio::test]
async fn gw_04_servers_share_a_port_and_are_chosen_by_name() {
    let (ca, app) = (Ca::new(), Echo::start("app").await);
    let passed = TlsUpstream::start(&["p.example.org"]).await;
    let (a, b) = (ca.issue(&["a.example.com"]), ca.issue(&["*.b.example.com"]));
    let files = ConfigDir::new();
    files.write("cert.pem", &b.chain);
    files.write("key.pem", &b.key);
    let of_files = format!(
        "{{mode: SIMPLE, serverCertificate: {:?}, privateKey: {:?}}}",
        files.file("cert.pem"),
        files.file("key.pem")
    );
    let servers = [
        https("[a.example.com]", "{mode: SIMPLE, credentialName: a}", "https"),
        https("['*.b.example.com']", &of_files, "https-b"),
        https("[c.example.com]", "{mode: SIMPLE, credentialName: c}", "https-c"),
        "{port: {number: 443, name: tls, protocol: TLS}, hosts: [p.example.org], tls: {mode: PASSTHROUGH}}"
            .to_owned(),
    ];
    let through = resource(
        "ServiceEntry",
        "p",
        &format!(
            "{{hosts: [p.example.org], resolution: STATIC, ports: [{{number: 443, name: tls, protocol: TLS}}], endpoints: [{{address: 127.0.0.1, ports: {{tls: {}}}}}]}}",
            passed.addr.port()
        ),
    ) + &resource(
        "VirtualService",
        "p",
        "{hosts: [p.example.org], gateways: [edge], tls: [{match: [{sniHosts: [p.example.org]}], route: [{destination: {host: p.example.org}}]}]}",
    );
    let gateway = Gateway::start(&(edge(app.addr, &servers) + &through + &secret("a", &a, None)), &[]);
    let client = Client { ca: &ca, shows: None };
    let peer = gateway.https();
    assert_eq!(client.shown(peer, "a.example.com").await.unwrap(), a.der());
    assert_eq!(client.shown(peer, "x.b.example.com").await.unwrap(), b.der());
    let saw = client.ask(peer, "a.example.com").await.unwrap();
    assert_eq!(saw["headers"]["x-forwarded-proto"], "https");
    assert_eq!(saw["host"], "a.example.com");
    client.ask(peer, "x.b.example.com").await.unwrap();
    // No server, no handshake; a secret that is missing silences its server and no other, and is named.
    assert!(client.shown(peer, "nobody.example.com").await.is_err());
    gateway.says("no server answers to the name nobody.example.com").await;
    assert!(client.shown(peer, "c.example.com").await.is_err());
    gateway.says("Secret default/c is neither among the configuration").await;
    gateway.says("there is no certificate: Secret c is missing").await;
    // What is passed on reaches its upstream as it is.
    let (said, back) = passed.exchange(peer, "p.example.org", None, b"echo").await.unwrap();
    assert_eq!((said.as_str(), back.as_slice()), ("p.example.org", b"echo".as_slice()));
    // Plaintext is reset, and never served.
    let plain =
        exchange(peer, b"GET / HTTP/1.1\r\nhost: a.example.com\r\n\r\n", Duration::from_secs(5)).await;
    assert!(plain.closed && plain.bytes.is_empty(), "{plain:?}");
    assert_eq!(app.requests(), 2);
}

#[tokio::test]
async fn f6_a_request_for_another_servers_host_is_misdirected() {
    let (ca, app) = (Ca::new(), Echo::start("app").await);
    let wide = ca.issue(&["*.example.com"]);
    let servers = [
        https("[a.example.com, c.example.com]", "{mode: SIMPLE, credentialName: wide}", "https"),
        https("[b.example.com]", "{mode: MUTUAL, credentialName: wide}", "https-b"),
        https("[d.example.com]", "{mode: SIMPLE, credentialName: wide}", "https-d"),
    ];
    let gateway = Gateway::start(&(edge(app.addr, &servers) + &secret("wide", &wide, Some(&ca))), &[]);
    let client = Client { ca: &ca, shows: None };
    let stream = client.connect(gateway.https(), "a.example.com", "h2").await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    for (host, expected) in [
        ("a.example.com", 200),
        ("c.example.com", 200),
        // It asks for certificates: nobody comes there over a handshake that did not.
        ("b.example.com", 421),
        ("b.example.com:443", 421),
        // The same certificate, and the same handshake.
        ("d.example.com", 200),
        ("nobody.example.com", 404),
    ] {
        let request = Request::get(format!("https://{host}/"))
            .version(Version::HTTP_2)
            .body(Empty::<bytes::Bytes>::new())
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), expected, "{host}");
    }
    assert_eq!(app.requests(), 3);
    // Whoever came in before certificates were asked for is asked now: the connection closes (D9), and what comes in
    // between is answered by nobody.
    let [first, ..] = &servers;
    let config = edge(app.addr, &[first.replace("SIMPLE", "MUTUAL")]) + &secret("wide", &wide, Some(&ca));
    gateway.config.replace("mesh.yaml", &config);
    until("the end of the connection", async || {
        let request = Request::get("https://a.example.com/").version(Version::HTTP_2);
        match sender.send_request(request.body(Empty::new()).unwrap()).await {
            Ok(response) => {
                assert!(matches!(response.status().as_u16(), 200 | 403 | 421), "{response:?}");
                false
            }
            Err(_) => true,
        }
    })
    .await;
    let served = app.requests();
    let mut again = client.connect(gateway.https(), "a.example.com", "h2").await.unwrap();
    // With TLS 1.3 a client hears of its refusal when it reads.
    assert!(again.read_u8().await.is_err());
    assert_eq!(app.requests(), served);
}

/// TCP behind TLS: what leads to `app` is the first rule of a virtual service.
fn tcp_edge(app: SocketAddr, servers: &[String]) -> String {
    let entry = format!(
        "{{hosts: [app.default.svc.cluster.local], location: MESH_INTERNAL, resolution: STATIC, ports: [{{number: 80, name: tcp, protocol: TCP}}], endpoints: [{{address: 127.0.0.1, ports: {{tcp: {}}}}}]}}",
        app.port()
    );
    let gateway = format!("{{selector: {{istio: ingressgateway}}, servers: [{}]}}", servers.join(", "));
    let rules = "{hosts: ['*.example.com'], gateways: [edge], tcp: [{route: [{destination: {host: app}}]}]}";
    resource("ServiceEntry", "app", &entry)
        + &resource("Gateway", "edge", &gateway)
        + &resource("VirtualService", "app", rules)
}

fn tls_server(hosts: &str, tls: &str, name: &str) -> String {
    format!("{{port: {{number: 443, name: {name}, protocol: TLS}}, hosts: {hosts}, tls: {tls}}}")
}

/// A server of bytes: it speaks first, and then says everything back. With it, how many came.
async fn parrot() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let came = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&came);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                // Whoever goes away is not asked why.
                let _ = write.write_all(b"hello\n").await;
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    (address, came)
}

async fn talks(stream: &mut TlsStream<TcpStream>) -> std::io::Result<()> {
    let mut said = [0; 6];
    stream.read_exact(&mut said).await?;
    assert_eq!(&said, b"hello\n");
    stream.write_all(b"\0GET / HTTP/1.1").await?;
    let mut back = [0; 15];
    stream.read_exact(&mut back).await?;
    assert_eq!(&back, b"\0GET / HTTP/1.1");
    Ok(())
}

#[tokio::test]
async fn gw_04_tcp_behind_tls_goes_by_tcp_rules() {
    let (ca, clients, (app, came)) = (Ca::new(), Ca::new(), parrot().await);
    let server = ca.issue(&["*.example.com"]);
    let servers = [
        tls_server("[a.example.com]", "{mode: SIMPLE, credentialName: own}", "tls"),
        tls_server("[m.example.com]", "{mode: MUTUAL, credentialName: own}", "tls-m"),
        tls_server("[p.example.com]", "{mode: PASSTHROUGH}", "tls-p"),
    ];
    let config = |ca: &Ca| tcp_edge(app, &servers) + &secret("own", &server, Some(ca));
    let gateway = Gateway::start(&config(&clients), &[]);
    let at = gateway.process.address("tls");
    let nobody = Client { ca: &ca, shows: None };
    // Whatever a client offers to speak.
    for alpn in ["h2", "postgresql"] {
        let mut stream = nobody.connect(at, "a.example.com", alpn).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), None);
        talks(&mut stream).await.unwrap();
    }
    let known = clients.issue(&["client"]);
    let somebody = Client { ca: &ca, shows: Some(&known) };
    let mut open = somebody.connect(at, "m.example.com", "h2").await.unwrap();
    talks(&mut open).await.unwrap();
    let before = came.load(Ordering::SeqCst);
    assert_eq!(before, 3);
    // With TLS 1.3 a client hears of its refusal when it reads; what it says until then goes nowhere.
    let stranger = Ca::new().issue(&["client"]);
    for shows in [None, Some(&stranger)] {
        let mut refused = Client { ca: &ca, shows }.connect(at, "m.example.com", "h2").await.unwrap();
        // It may be over already.
        let _ = refused.write_all(b"bytes").await;
        assert!(talks(&mut refused).await.is_err());
    }
    assert!(nobody.connect(at, "b.example.com", "h2").await.is_err(), "no server has this name");
    assert!(
        nobody.connect(at, "p.example.com", "h2").await.is_err(),
        "there is no rule for what is passed on"
    );
    assert_eq!(came.load(Ordering::SeqCst), before);
    // The client's authority is taken away: the connection that is open is cut (D9).
    gateway.config.replace("mesh.yaml", &config(&Ca::new()));
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(20), open.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "it stays open");
    gateway.says("closing a connection").await;
    assert!(rest.is_empty());
}

#[tokio::test]
async fn gw_04_auto_passthrough_goes_where_the_server_name_says() {
    let name = |port: u16, subset: &str| format!("outbound_.{port}_.{subset}_.app.default.svc.cluster.local");
    let (of_v1, of_v2, of_all) = (name(80, "v1"), name(80, "v2"), name(80, ""));
    // Each shakes hands under its own names alone: a handshake that holds was with the workload itself.
    let (v1, v2) = (TlsUpstream::start(&[&of_v1]).await, TlsUpstream::start(&[&of_v2, &of_all]).await);
    let endpoint = |upstream: &TlsUpstream, version: &str| {
        let port = upstream.addr.port();
        format!(
            "{{address: 127.0.0.1, ports: {{http: {port}}}, labels: {{version: {version}}}, serviceAccount: app}}"
        )
    };
    let config = |endpoints: &[String]| {
        let entry = format!(
            "{{hosts: [app.default.svc.cluster.local], location: MESH_INTERNAL, resolution: STATIC, ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{}]}}",
            endpoints.join(", ")
        );
        let server = tls_server("['*.local']", "{mode: AUTO_PASSTHROUGH}", "tls");
        let subsets =
            "{host: app, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}";
        resource("ServiceEntry", "app", &entry)
            + &resource(
                "Gateway",
                "edge",
                &format!("{{selector: {{istio: ingressgateway}}, servers: [{server}]}}"),
            )
            + &resource("DestinationRule", "app", subsets)
    };
    let gateway = Gateway::start(&config(&[endpoint(&v1, "v1"), endpoint(&v2, "v2")]), &[]);
    let at = gateway.process.address("tls");
    for (upstream, name) in [(&v1, &of_v1), (&v2, &of_v2)] {
        let (_, back) = upstream.exchange(at, name, None, b"bytes").await.unwrap();
        assert_eq!(back, b"bytes", "{name}");
    }
    // A subset that is not defined, a port that there is not, a host that nobody has.
    for unknown in [name(80, "v3"), name(81, "v1"), "app.local".to_owned()] {
        assert!(v1.reach(at, &unknown, None).await.is_err(), "{unknown}");
    }
    // Without a subset it is the whole service.
    gateway.config.replace("mesh.yaml", &config(&[endpoint(&v2, "v2")]));
    gateway.says("generation=2").await;
    until("the whole service", async || v2.exchange(at, &of_all, None, b"all").await.is_ok()).await;
}

#[tokio::test]
async fn gw_04_mutual_and_optional_mutual_know_their_clients_by_their_own_authorities() {
    let (ca, clients, app) = (Ca::new(), Ca::new(), Echo::start("app").await);
    let server = ca.issue(&["*.example.com"]);
    let authorities = format!(
        "---\napiVersion: v1\nkind: Secret\nmetadata: {{name: own-cacert}}\nstringData: {}\n",
        serde_json::json!({ "cacert": clients.pem })
    );
    let servers = [
        https("[m.example.com]", "{mode: MUTUAL, credentialName: own, subjectAltNames: [device-1]}", "https"),
        https("[o.example.com]", "{mode: OPTIONAL_MUTUAL, credentialName: own}", "https-o"),
    ];
    let config = edge(app.addr, &servers) + &secret("own", &server, None) + &authorities;
    let gateway = Gateway::start(&config, &[]);
    let peer = gateway.https();
    let (one, two) = (clients.issue(&["device-1"]), clients.issue(&["device-2"]));
    let stranger = ca.issue(&["device-1"]);
    let told = |saw: &Value| saw["headers"]["x-forwarded-client-cert"].as_str().map(str::to_owned);
    let shows = |shows| Client { ca: &ca, shows };
    let saw = shows(Some(&one)).ask(peer, "m.example.com").await.unwrap();
    let certificate = told(&saw).unwrap();
    assert!(certificate.starts_with("Hash=") && certificate.ends_with(";DNS=device-1"), "{certificate}");
    assert!(shows(Some(&two)).ask(peer, "m.example.com").await.is_err());
    gateway.says("the certificate is of device-2, expected was device-1").await;
    assert!(shows(Some(&stranger)).ask(peer, "m.example.com").await.is_err());
    assert!(shows(None).ask(peer, "m.example.com").await.is_err());
    assert_eq!(told(&shows(None).ask(peer, "o.example.com").await.unwrap()), None);
    assert!(told(&shows(Some(&two)).ask(peer, "o.example.com").await.unwrap()).is_some());
    assert!(shows(Some(&stranger)).ask(peer, "o.example.com").await.is_err());
    assert_eq!(app.requests(), 3);
}

#[tokio::test]
async fn gw_04_istio_mutual_is_for_workloads_of_the_mesh() {
    let app = Echo::start("app").await;
    let mesh = Authority::new(
        "cluster.local".parse().unwrap(),
        std::time::SystemTime::now(),
        Duration::from_secs(86400),
    )
    .unwrap();
    let issue = |account: &str| {
        let id = format!("spiffe://cluster.local/ns/default/sa/{account}").parse().unwrap();
        mesh.issue(&id, std::time::SystemTime::now(), Duration::from_secs(3600)).unwrap()
    };
    let own = issue("gateway");
    let dir = ConfigDir::new();
    dir.write("cert-chain.pem", &own.certificate.chain_pem);
    dir.write("key.pem", &own.key_pem());
    dir.write("root-cert.pem", mesh.root_pem());
    let servers = [https("['*.example.com']", "{mode: ISTIO_MUTUAL}", "https")];
    let config = edge(app.addr, &servers);
    let identity = dir.path().display().to_string();
    let gateway = Gateway::start(&config, &["--identity-dir", &identity]);
    let workload = issue("productpage");
    let ask = async |chain: &str, key: &str| {
        let (clients, keys) = (ConfigDir::new(), "key.pem");
        clients.write("chain.pem", chain);
        clients.write(keys, key);
        let mut command = Command::new("curl");
        command.args(["-sk", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}"]);
        command.args(["--resolve", &format!("a.example.com:{}:127.0.0.1", gateway.https().port())]);
        command.args(["--cert", &clients.file("chain.pem"), "--key", &clients.file(keys)]);
        command.arg(format!("https://a.example.com:{}/", gateway.https().port()));
        output(command).await.map(|(said, _)| said)
    };
    let Some(status) = ask(&workload.certificate.chain_pem, &workload.key_pem()).await else {
        eprintln!("SKIPPED gw_04_istio_mutual_is_for_workloads_of_the_mesh: there is no curl");
        return;
    };
    assert_eq!(status, "200");
    let device = Ca::new().issue(&["device-1"]);
    assert_eq!(ask(&device.chain, &device.key).await.unwrap(), "000");
    assert_eq!(app.requests(), 1);
    // Without an identity there is nothing to show: it is said, and nothing is served.
    let config_dir = ConfigDir::new();
    config_dir.write("mesh.yaml", &config);
    let check =
        Command::new(GATEWAY).args(["--check", "--config", &config_dir.file("mesh.yaml")]).output().unwrap();
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(!check.status.success() && said.contains("spec.servers[0].tls"), "{said}");
}

#[tokio::test]
async fn dr_tls02_a_secret_is_for_the_way_out_as_well() {
    let (ca, app) = (Ca::new(), Echo::start("app").await);
    let server = [https("[in.example.com]", "{mode: MUTUAL, credentialName: own}", "https")];
    let inner = Gateway::start(
        &(edge(app.addr, &server) + &secret("own", &ca.issue(&["in.example.com"]), Some(&ca))),
        &[],
    );
    let outer = |secret: &str| {
        let entry = format!(
            "{{hosts: [in.example.com], resolution: STATIC, ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{{address: 127.0.0.1, ports: {{http: {}}}}}]}}",
            inner.https().port()
        );
        resource("ServiceEntry", "in", &entry)
            + &resource(
                "DestinationRule",
                "in",
                "{host: in.example.com, trafficPolicy: {tls: {mode: MUTUAL, credentialName: client}}}",
            )
            + &resource(
                "Gateway",
                "edge",
                "{servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}",
            )
            + &resource(
                "VirtualService",
                "in",
                "{hosts: [in.example.com], gateways: [edge], http: [{route: [{destination: {host: in.example.com}}]}]}",
            )
            + secret
    };
    let gateway = Gateway::start(&outer(""), &["--map-port", "80=0"]);
    let ask = async || get(gateway.process.address("http"), "in.example.com", "/").await;
    assert_eq!(ask().await.0, 503);
    gateway.says("Secret default/client is neither").await;
    gateway.config.replace("mesh.yaml", &outer(&secret("client", &ca.issue(&["device-1"]), Some(&ca))));
    until("the secret", async || ask().await.0 == 200).await;
    let saw: Value = serde_json::from_str(&ask().await.1).unwrap();
    assert!(saw["headers"]["x-forwarded-client-cert"].as_str().unwrap().contains("DNS=device-1"), "{saw}");
}

/// What a command says on its outputs; `None` when there is no such command.
async fn output(mut command: Command) -> Option<(String, String)> {
    let run = tokio::task::spawn_blocking(move || command.stdin(Stdio::null()).output());
    let done = run.await.unwrap().ok()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some((text(&done.stdout), text(&done.stderr)))
}

#[tokio::test]
async fn gw_05_a_renewed_secret_is_in_force_soon_and_no_connection_notices() {
    let (ca, app) = (Ca::new(), Echo::start("app").await);
    let (first, second) = (ca.issue(&["a.example.com"]), ca.issue(&["a.example.com"]));
    let servers = [
        https("[a.example.com]", "{mode: SIMPLE, credentialName: a}", "https"),
        https("[d.example.com]", "{mode: SIMPLE, credentialName: d}", "https-d"),
    ];
    let secrets = ConfigDir::new();
    let below = secrets.path().display().to_string();
    let config = edge(app.addr, &servers);
    let gateway = Gateway::start(&(config.clone() + &secret("a", &first, None)), &["--secret-dir", &below]);
    let client = Client { ca: &ca, shows: None };
    let peer = gateway.https();
    assert_eq!(client.shown(peer, "a.example.com").await.unwrap(), first.der());
    let stream = client.connect(peer, "a.example.com", "http/1.1").await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    assert_eq!(h1(&mut sender, "a.example.com").await.unwrap().0, 200);

    // A Secret among the configuration.
    let begun = mesh_core::clock::now();
    gateway.config.replace("mesh.yaml", &(config.clone() + &secret("a", &second, None)));
    until("the second certificate", async || {
        client.shown(peer, "a.example.com").await.unwrap() == second.der()
    })
    .await;
    println!("a Secret was in force after {:?}", begun.elapsed());
    assert_eq!(h1(&mut sender, "a.example.com").await.unwrap().0, 200);

    // A directory of secrets, which was not there when the server was.
    gateway.says("Secret default/d is neither among the configuration nor below").await;
    assert!(client.shown(peer, "d.example.com").await.is_err());
    for pair in [ca.issue(&["d.example.com"]), ca.issue(&["d.example.com"])] {
        std::fs::create_dir_all(secrets.path().join("d")).unwrap();
        let begun = mesh_core::clock::now();
        secrets.replace_in("d", "tls.crt", &pair.chain);
        secrets.replace_in("d", "tls.key", &pair.key);
        let shown = async || client.shown(peer, "d.example.com").await.is_ok_and(|shown| shown == pair.der());
        until("the certificate of the directory", shown).await;
        println!("a directory was in force after {:?}", begun.elapsed());
    }
    // A broken one leaves what was there.
    secrets.replace_in("d", "tls.key", "-----BEGIN hunter2-----");
    gateway.says("certificates are not taken, those in force stay").await;
    client.shown(peer, "d.example.com").await.unwrap();
    // One that goes silences its server.
    gateway.config.replace("mesh.yaml", &config);
    until("silence", async || client.shown(peer, "a.example.com").await.is_err()).await;
    assert_eq!(h1(&mut sender, "a.example.com").await.unwrap().0, 200, "who is connected stays");

    // Nothing of a secret is told.
    let dump = get_json(gateway.process.address("admin"), "/config_dump").await.to_string();
    let told = dump + &gateway.process.stderr();
    for pair in [&first, &second] {
        for line in pair.key.lines().filter(|line| !line.starts_with('-')) {
            assert!(!told.contains(line));
        }
    }
    assert!(!told.contains("hunter2") && !told.contains("PRIVATE KEY"));
}

/// Files one below a directory.
trait Below {
    fn replace_in(&self, dir: &str, name: &str, text: &str);
}

impl Below for ConfigDir {
    fn replace_in(&self, dir: &str, name: &str, text: &str) {
        let temporary = self.path().join(dir).join(format!(".{name}.new"));
        std::fs::write(&temporary, text).unwrap();
        std::fs::rename(temporary, self.path().join(dir).join(name)).unwrap();
    }
}

#[tokio::test]
async fn gw_06_openssl_and_curl_agree() {
    let (ca, app) = (Ca::new(), Echo::start("app").await);
    let (a, m) = (ca.issue(&["a.example.com"]), ca.issue(&["m.example.com"]));
    let servers = [
        https("[a.example.com]", "{mode: SIMPLE, credentialName: a}", "https"),
        https("[n.example.com]", "{mode: SIMPLE, credentialName: a, minProtocolVersion: TLSV1_3}", "https-n"),
        https(
            "[s.example.com]",
            "{mode: SIMPLE, credentialName: a, maxProtocolVersion: TLSV1_2, cipherSuites: [ECDHE-ECDSA-CHACHA20-POLY1305, NONE-SUCH]}",
            "https-s",
        ),
        https("[m.example.com]", "{mode: MUTUAL, credentialName: m}", "https-m"),
    ];
    let config = edge(app.addr, &servers) + &secret("a", &a, None) + &secret("m", &m, Some(&ca));
    let gateway = Gateway::start(&config, &[]);
    gateway.says("NONE-SUCH").await;
    let (port, files) = (gateway.https().port(), ConfigDir::new());
    files.write("ca.pem", &ca.pem);
    let device = ca.issue(&["device-1"]);
    files.write("cert.pem", &device.chain);
    files.write("key.pem", &device.key);

    let s_client = async |name: &str, more: &[&str]| {
        let mut command = Command::new("openssl");
        command.args(["s_client", "-connect", &format!("127.0.0.1:{port}"), "-servername", name, "-CAfile"]);
        command.arg(files.file("ca.pem")).args(["-alpn", "h2,http/1.1"]).args(more);
        output(command).await.map(|(said, _)| said)
    };
    if let Some(said) = s_client("a.example.com", &[]).await {
        assert!(said.contains("Verify return code: 0 (ok)") && said.contains("ALPN protocol: h2"), "{said}");
        let version = async |name: &str, asked: &str| s_client(name, &[asked]).await.unwrap();
        assert!(version("a.example.com", "-tls1_2").await.contains("Verify return code: 0 (ok)"));
        assert!(
            !version("a.example.com", "-tls1_1").await.contains("BEGIN CERTIFICATE"),
            "GW-06: 1.2 is the lowest"
        );
        assert!(!version("n.example.com", "-tls1_2").await.contains("BEGIN CERTIFICATE"));
        assert!(version("n.example.com", "-tls1_3").await.contains("BEGIN CERTIFICATE"));
        assert!(!version("s.example.com", "-tls1_3").await.contains("BEGIN CERTIFICATE"));
        let chacha = version("s.example.com", "-tls1_2").await;
        assert!(chacha.contains("ECDHE-ECDSA-CHACHA20-POLY1305"), "{chacha}");
        let other = s_client("s.example.com", &["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"]).await;
        assert!(!other.unwrap().contains("BEGIN CERTIFICATE"));
        assert!(!version("nobody.example.com", "-tls1_3").await.contains("BEGIN CERTIFICATE"));
    } else {
        eprintln!("SKIPPED gw_06_openssl_and_curl_agree: there is no openssl");
    }

    let curl = async |name: &str, more: &[&str]| {
        let mut command = Command::new("curl");
        command.args(["-s", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code} %{http_version}"]);
        command.args(["--cacert", &files.file("ca.pem"), "--resolve", &format!("{name}:{port}:127.0.0.1")]);
        command.args(more).arg(format!("https://{name}:{port}/"));
        output(command).await.map(|(said, _)| said)
    };
    let (cert, key) = (files.file("cert.pem"), files.file("key.pem"));
    if let Some(said) = curl("a.example.com", &["--http2"]).await {
        assert_eq!(said, "200 2");
        assert_eq!(curl("a.example.com", &["--http1.1"]).await.unwrap(), "200 1.1");
        assert_eq!(curl("m.example.com", &["--cert", &cert, "--key", &key]).await.unwrap(), "200 2");
        assert!(curl("m.example.com", &[]).await.unwrap().starts_with("000"));
    } else {
        eprintln!("SKIPPED gw_06_openssl_and_curl_agree: there is no curl");
    }
}

#[test]
fn gw_05_check_says_that_servers_with_tls_are_enforced() {
    let dir = ConfigDir::new();
    let check = |tls: &str| {
        let server = https("['*.example.com']", tls, "https");
        dir.write("mesh.yaml", &edge("127.0.0.1:9".parse().unwrap(), &[server]));
        let out =
            Command::new(GATEWAY).args(["--check", "--config", &dir.file("mesh.yaml")]).output().unwrap();
        (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned())
    };
    for tls in [
        "{mode: SIMPLE, credentialName: a}",
        "{mode: MUTUAL, credentialNames: [a, b], subjectAltNames: [c]}",
        "{mode: OPTIONAL_MUTUAL, serverCertificate: a, privateKey: b, caCertificates: c, caCrl: d}",
        "{mode: SIMPLE, tlsCertificates: [{serverCertificate: a, privateKey: b}, {serverCertificate: c, privateKey: d}]}",
    ] {
        let (passed, said) = check(tls);
        assert!(passed && said == "0 errors, 0 warnings\n", "{tls}: {said}");
    }
    let (passed, said) = check("{mode: MUTUAL, credentialName: a, verifyCertificateSpki: [abc]}");
    assert!(!passed && said.contains("spec.servers[0].tls.verifyCertificateSpki"), "{said}");
    let (passed, said) =
        check("{mode: SIMPLE, credentialName: a, cipherSuites: [AES128-SHA], minProtocolVersion: TLSV1_1}");
    assert!(
        passed && said.contains("is not offered") && said.contains("versions below TLSV1_2 are not spoken"),
        "{said}"
    );
}
