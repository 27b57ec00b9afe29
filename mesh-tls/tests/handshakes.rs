//! Handshakes between our own two sides, and with peers that are not what they should be.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod peers;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::server::Protocol;
use mesh_core::{ClientTls, Credential, CredentialFiles, Spoken};
use mesh_tls::ca::Authority;
use mesh_tls::{Acceptor, Connector, Credentials, Material, Materials, TrustBundle};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use peers::{Ca, DAY, HOUR, authority, material, provider, spiffe};

/// Both ends of a handshake over memory: what the server learned, or why it failed, and the same of the client.
async fn shake(
    acceptor: &Acceptor,
    connector: &Connector,
    tls: &ClientTls,
    spoken: Spoken,
) -> (Result<mesh_tls::Secured<tokio::io::DuplexStream>, String>, Result<(), String>) {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let client = async {
        let mut stream = connector.connect(ours, tls, spoken).await.map_err(|error| error.to_string())?;
        // With TLS 1.3 a client hears of its refusal when it reads.
        stream.write_all(b"ping").await.map_err(|error| error.to_string())?;
        let mut pong = [0; 4];
        stream.read_exact(&mut pong).await.map_err(|error| error.to_string())?;
        Ok(())
    };
    let server = async {
        let mut secured = acceptor.accept(theirs).await.map_err(|error| error.to_string())?;
        let mut ping = [0; 4];
        secured.io.read_exact(&mut ping).await.map_err(|error| error.to_string())?;
        secured.io.write_all(b"pong").await.map_err(|error| error.to_string())?;
        secured.io.flush().await.map_err(|error| error.to_string())?;
        Ok(secured)
    };
    tokio::join!(server, client)
}

fn mesh() -> ClientTls {
    ClientTls { sni: Some("reviews.default.svc.cluster.local".to_owned()), ..ClientTls::default() }
}

#[tokio::test]
async fn pa_04_both_sides_know_each_other() {
    let ca = authority("cluster.local");
    let server = material(&ca, "spiffe://cluster.local/ns/default/sa/reviews");
    let client = material(&ca, "spiffe://cluster.local/ns/default/sa/productpage");
    let acceptor = Acceptor::mutual(server, provider()).unwrap();
    let connector = Connector::new(client, provider());
    for (spoken, protocol) in [
        (Spoken::Http1, Some(Protocol::Http1)),
        (Spoken::Http2, Some(Protocol::Http2)),
        (Spoken::Bytes, None),
    ] {
        let (server, client) = shake(&acceptor, &connector, &mesh(), spoken).await;
        let secured = server.unwrap();
        client.unwrap();
        let peer = secured.peer.unwrap();
        assert_eq!(peer.principal(), Some("cluster.local/ns/default/sa/productpage"));
        assert_eq!(peer.uri_sans, ["spiffe://cluster.local/ns/default/sa/productpage"]);
        assert_ne!(peer.fingerprint, [0; 32]);
        assert_eq!(secured.protocol, protocol);
        assert_eq!(secured.sni.as_deref(), Some("reviews.default.svc.cluster.local"));
    }
}

#[tokio::test]
async fn dr_tls02_a_client_takes_only_whom_it_expects() {
    let ca = authority("cluster.local");
    let server = material(&ca, "spiffe://cluster.local/ns/default/sa/reviews");
    let client = material(&ca, "spiffe://cluster.local/ns/default/sa/productpage");
    let acceptor = Acceptor::mutual(server, provider()).unwrap();
    let connector = Connector::new(client, provider());
    let expecting = |names: &[&str]| ClientTls {
        subject_alt_names: names.iter().map(|name| (*name).to_owned()).collect(),
        ..mesh()
    };
    let right = expecting(&["spiffe://a/b", "spiffe://cluster.local/ns/default/sa/reviews"]);
    let (server, client) = shake(&acceptor, &connector, &right, Spoken::Http1).await;
    server.unwrap();
    client.unwrap();
    let wrong = expecting(&["spiffe://cluster.local/ns/default/sa/details"]);
    let (server, client) = shake(&acceptor, &connector, &wrong, Spoken::Http1).await;
    assert!(server.is_err());
    let reason = client.unwrap_err();
    assert!(reason.contains("sa/reviews") && reason.contains("sa/details"), "{reason}");
}

#[tokio::test]
async fn dr_tls03_without_an_identity_mutual_tls_is_not_tried() {
    let ca = authority("cluster.local");
    let server = material(&ca, "spiffe://cluster.local/ns/default/sa/reviews");
    let acceptor = Acceptor::mutual(server, provider()).unwrap();
    let connector = Connector::new(Materials::none(), provider());
    let (server, client) = shake(&acceptor, &connector, &mesh(), Spoken::Http1).await;
    assert!(server.is_err());
    assert!(client.unwrap_err().contains("no identity"));
}

#[tokio::test]
async fn d4_bad_peers_are_refused_with_a_reason() {
    let ca = authority("cluster.local");
    let revoked = peers::leaf(&ca, |_| {});
    let server = material(&ca, "spiffe://cluster.local/ns/default/sa/reviews");
    let crl = ca.0.revoke(&[revoked.serial()], SystemTime::now(), DAY).unwrap();
    let bundle = TrustBundle::new([ca.0.root().clone()]).unwrap().with_crls([crl]).unwrap();
    server.store(Material { bundle: Arc::new(bundle), ..Material::clone(&server.load()) });
    let acceptor = Acceptor::mutual(server, provider()).unwrap();
    let mut refused = 0;
    for (what, peer, reason) in peers::bad(&ca, revoked) {
        let (server, client) = shake(&acceptor, &peer.connector(&ca), &mesh(), Spoken::Http1).await;
        let Err(seen) = server else { panic!("{what} was let in") };
        assert!(client.is_err(), "{what}");
        assert!(seen.contains(reason), "{what}: {seen}");
        refused += 1;
    }
    assert_eq!(refused, 16);
    // The same way, but good, is let in: it is the badness that is refused.
    let good = peers::leaf(&ca, |_| {});
    let (server, client) = shake(&acceptor, &good.connector(&ca), &mesh(), Spoken::Http1).await;
    server.unwrap();
    client.unwrap();
}

#[tokio::test]
async fn d2_a_trust_bundle_rotates_by_overlap_and_the_old_one_is_refused() {
    let [a, b] = [(); 2].map(|()| authority("cluster.local"));
    let bundle =
        |roots: &[&Authority]| Arc::new(TrustBundle::new(roots.iter().map(|ca| ca.root().clone())).unwrap());
    let server = material(&a, "spiffe://cluster.local/ns/default/sa/reviews");
    let client = material(&a, "spiffe://cluster.local/ns/default/sa/productpage");
    let acceptor = Acceptor::mutual(server.clone(), provider()).unwrap();
    let connector = Connector::new(client.clone(), provider());
    let issue = |ca: &Ca, name: &str| {
        ca.0.issue(&spiffe(name), SystemTime::now(), HOUR).unwrap().identity(&provider()).unwrap()
    };
    let set = |materials: &Materials, ca: &Ca, name: &str, roots: &[&Authority]| {
        let identity = issue(ca, &format!("spiffe://cluster.local/ns/default/sa/{name}"));
        materials.store(Material { identity: Some(identity), bundle: bundle(roots) });
    };
    let works = async || {
        let (server, client) = shake(&acceptor, &connector, &mesh(), Spoken::Http2).await;
        server.is_ok() && client.is_ok()
    };
    assert!(works().await);
    set(&server, &a, "reviews", &[&a.0, &b.0]);
    assert!(works().await);
    set(&client, &a, "productpage", &[&a.0, &b.0]);
    assert!(works().await);
    set(&server, &b, "reviews", &[&a.0, &b.0]);
    assert!(works().await);
    set(&client, &b, "productpage", &[&a.0, &b.0]);
    assert!(works().await);
    set(&server, &b, "reviews", &[&b.0]);
    assert!(works().await);
    // A client that still has the old certificate is refused, though it was known a moment ago (D7): nothing resumes.
    set(&client, &a, "productpage", &[&a.0, &b.0]);
    assert!(!works().await);
    set(&client, &b, "productpage", &[&b.0]);
    assert!(works().await);
}

#[tokio::test]
async fn d7_no_session_is_resumed() {
    let ca = authority("cluster.local");
    let server = material(&ca, "spiffe://cluster.local/ns/default/sa/reviews");
    let acceptor = Acceptor::mutual(server, provider()).unwrap();
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        // A client that would resume if it could.
        let config = Arc::new(peers::leaf(&ca, |_| {}).client_config(&ca, version));
        for _ in 0..3 {
            let (ours, theirs) = tokio::io::duplex(1 << 16);
            let connector = tokio_rustls::TlsConnector::from(Arc::clone(&config));
            let name = "reviews".try_into().unwrap();
            let client = async {
                let mut stream = connector.connect(name, ours).await.unwrap();
                let mut byte = [0; 1];
                stream.read_exact(&mut byte).await.unwrap();
                stream.get_ref().1.handshake_kind()
            };
            let server = async {
                let mut secured = acceptor.accept(theirs).await.unwrap();
                secured.io.write_all(b"x").await.unwrap();
                secured.io.flush().await.unwrap();
                secured
            };
            let (secured, kind) = tokio::join!(server, client);
            assert_eq!(kind, Some(rustls::HandshakeKind::Full));
            assert_eq!(secured.io.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
        }
    }
}

#[tokio::test]
async fn a_server_of_the_outside_is_known_by_its_name() {
    let ca = authority("example.org");
    let server = peers::leaf(&ca, |params| {
        params.subject_alt_names = vec![
            rcgen::SanType::DnsName("*.example.org".try_into().unwrap()),
            rcgen::SanType::DnsName("example.org".try_into().unwrap()),
        ];
    });
    let acceptor = Acceptor::of(server.server_config(), provider());
    #[derive(Debug)]
    struct Roots(Materials);
    impl Credentials for Roots {
        fn find(&self, credential: &Credential) -> Option<Materials> {
            matches!(credential, Credential::Files(_)).then(|| self.0.clone())
        }
    }
    let bundle = Arc::new(TrustBundle::new([ca.0.root().clone()]).unwrap());
    let roots = Roots(Materials::new(Material { identity: None, bundle }));
    let connector = Connector::new(Materials::none(), provider()).credentials(Arc::new(roots));
    let simple = |host: &str, sans: &[&str]| ClientTls {
        credential: Credential::Files(CredentialFiles::default()),
        sni: Some("example.org".to_owned()),
        host: host.to_owned(),
        subject_alt_names: sans.iter().map(|san| (*san).to_owned()).collect(),
        insecure_skip_verify: false,
    };
    for (host, sans, good) in [
        ("example.org", &[][..], true),
        ("a.example.org", &[], true),
        ("a.b.example.org", &[], false),
        ("example.com", &[], false),
        ("", &[], false),
        // Names that are expected take the place of the host, and are taken as written.
        ("example.com", &["example.org"], true),
        ("example.org", &["a.example.org"], false),
    ] {
        let (server, client) = shake(&acceptor, &connector, &simple(host, sans), Spoken::Http1).await;
        assert_eq!((server.is_ok(), client.is_ok()), (good, good), "{host:?} {sans:?}");
        assert!(server.map_or(true, |secured| secured.peer.is_none()));
    }
    let anybody = ClientTls { insecure_skip_verify: true, ..simple("example.com", &[]) };
    let (server, client) = shake(&acceptor, &connector, &anybody, Spoken::Http1).await;
    server.unwrap();
    client.unwrap();
    let secret =
        ClientTls { credential: Credential::Secret("gone".to_owned()), ..simple("example.org", &[]) };
    let (_, client) = shake(&acceptor, &connector, &secret, Spoken::Http1).await;
    assert!(client.unwrap_err().contains("no such credentials"));
}

#[tokio::test]
async fn trust_domains_are_those_of_the_mesh_and_its_aliases() {
    let (ours, theirs) = (authority("cluster.local"), authority("old.example"));
    let server = material(&ours, "spiffe://cluster.local/ns/default/sa/reviews");
    let roots = [ours.0.root().clone(), theirs.0.root().clone()];
    server.store(Material {
        bundle: Arc::new(TrustBundle::new(roots).unwrap()),
        ..Material::clone(&server.load())
    });
    let acceptor = Acceptor::mutual(server.clone(), provider()).unwrap();
    let issued = theirs.0.issue(&spiffe("spiffe://old.example/ns/a/sa/b"), SystemTime::now(), HOUR).unwrap();
    let client = Materials::new(Material {
        identity: Some(issued.identity(&provider()).unwrap()),
        bundle: Arc::new(TrustBundle::new([ours.0.root().clone()]).unwrap()),
    });
    client.set_trust_domains(vec!["cluster.local".to_owned()]);
    let connector = Connector::new(client, provider());
    let (refused, _) = shake(&acceptor, &connector, &mesh(), Spoken::Http1).await;
    assert!(refused.unwrap_err().contains("not of a trust domain that is trusted"));
    server.set_trust_domains(vec!["cluster.local".to_owned(), "old.example".to_owned()]);
    let (accepted, _) = shake(&acceptor, &connector, &mesh(), Spoken::Http1).await;
    assert_eq!(accepted.unwrap().peer.unwrap().principal(), Some("old.example/ns/a/sa/b"));
}

#[tokio::test]
async fn d8_old_versions_and_foreign_protocols_are_refused() {
    let ca = authority("cluster.local");
    let server = material(&ca, "spiffe://cluster.local/ns/default/sa/reviews");
    let acceptor = Acceptor::mutual(server, provider()).unwrap();
    // A ClientHello of TLS 1.1 with one CBC suite, as an old client sends it.
    let mut body = vec![3, 2];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0, 0x2f, 1, 0]);
    let length = u8::try_from(body.len()).unwrap();
    let mut hello = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    hello.extend(body);
    let (mut ours, theirs) = tokio::io::duplex(1 << 12);
    ours.write_all(&hello).await.unwrap();
    assert!(acceptor.accept(theirs).await.is_err());
    let mut alert = Vec::new();
    ours.read_to_end(&mut alert).await.unwrap();
    assert_eq!(alert[0], 21, "{alert:?}");
    // A client that speaks nothing that we do.
    let mut config = peers::leaf(&ca, |_| {}).client_config(&ca, &rustls::version::TLS13);
    config.alpn_protocols = vec![b"spdy/3".to_vec()];
    let (ours, theirs) = tokio::io::duplex(1 << 12);
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let client = connector.connect("reviews".try_into().unwrap(), ours);
    let (server, client) = tokio::join!(acceptor.accept(theirs), client);
    assert!(server.is_err() && client.is_err());
}

#[tokio::test]
async fn d6_a_client_hello_in_records_of_one_byte_is_read() {
    let ca = authority("cluster.local");
    let server = material(&ca, "spiffe://cluster.local/ns/default/sa/reviews");
    let acceptor = Acceptor::mutual(server, provider()).unwrap();
    let config = peers::leaf(&ca, |_| {}).client_config(&ca, &rustls::version::TLS13);
    let name = "reviews".try_into().unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut record = Vec::new();
    client.write_tls(&mut record).unwrap();
    let (mut ours, theirs) = tokio::io::duplex(1 << 16);
    let accepting = tokio::spawn(async move { acceptor.accept(theirs).await.map(drop) });
    for byte in &record[5..] {
        ours.write_all(&[22, 3, 1, 0, 1, *byte]).await.unwrap();
    }
    // It is answered by a ServerHello.
    let mut answer = [0; 6];
    ours.read_exact(&mut answer).await.unwrap();
    assert_eq!((answer[0], answer[5]), (22, 2));
    drop(ours);
    assert!(accepting.await.unwrap().is_err());
}

#[test]
fn d3_a_certificate_counts_from_its_beginning_to_its_end() {
    use rustls::pki_types::UnixTime;
    use rustls::server::danger::ClientCertVerifier as _;
    let ca = authority("cluster.local");
    let now = SystemTime::now();
    let issued = ca.0.issue(&spiffe("spiffe://cluster.local/ns/a/sa/b"), now, HOUR).unwrap();
    let server = material(&ca, "spiffe://cluster.local/ns/default/sa/reviews");
    let rule = mesh_tls::PeerRule::Svid { trust_domains: None, any_of: Vec::new() };
    let verifier = mesh_tls::PeerVerifier::new(server, provider(), rule);
    let at = |time: SystemTime| {
        let since = UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap());
        verifier
            .verify_client_cert(&issued.certificate.chain[0], &[], since)
            .map(drop)
            .map_err(|e| e.to_string())
    };
    let minute = Duration::from_secs(60);
    assert_eq!(at(now), Ok(()));
    assert_eq!(at(now - minute), Ok(()), "clocks may differ by a minute");
    assert_eq!(at(now + HOUR - minute), Ok(()));
    assert!(at(now + HOUR + minute).unwrap_err().contains("Expired"));
    assert!(at(now - HOUR).unwrap_err().contains("NotValidYet"));
}
