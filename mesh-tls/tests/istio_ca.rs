//! Istio's certificate service from both sides, and certificates from it through outages that last for hours.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use http::Request;
use mesh_core::identity::PeerInfo;
use mesh_core::server::{ListenerSpec, Server, WithTls};
use mesh_core::{Body, Direction, RequestContext, Slot};
use mesh_tls::ca::Authority;
use mesh_tls::istio_ca::{
    CaClientError, Call, Code, IstioCa, IstioCaSource, Question, Sign, Status, WallClock, answer,
};
use mesh_tls::source::CertSource as _;
use mesh_tls::{Acceptor, Identity, Inbound, InboundTls, Material, Materials, TrustBundle};
use rcgen::{CertificateParams, CertificateSigningRequestParams, Issuer, KeyPair, SanType};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateSigningRequestDer, ServerName};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
const REVIEWS: &str = "spiffe://cluster.local/ns/default/sa/reviews";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn authority() -> Arc<Authority> {
    Arc::new(Authority::new("cluster.local".parse().unwrap(), SystemTime::now(), 1000 * HOUR).unwrap())
}

fn bundle(ca: &Authority) -> Arc<TrustBundle> {
    Arc::new(TrustBundle::from_pem(ca.root_pem().as_bytes()).unwrap())
}

fn csr() -> String {
    let params = CertificateParams::default();
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

fn sign(ca: &Authority, csr: &str, id: &str, now: SystemTime, life: Duration) -> Vec<String> {
    let request = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes()).unwrap();
    let signed = ca.sign(&request, &id.parse().unwrap(), now, life).unwrap();
    vec![signed.chain_pem, ca.root_pem().to_owned()]
}

/// A file that goes with the test.
struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mesh-tls-ca-{name}-{}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// What a server was told: the token, and who showed a certificate.
type Told = Arc<Mutex<Vec<(Option<String>, Option<String>)>>>;

/// A certificate service whose server has these names.
struct Service {
    address: SocketAddr,
    told: Told,
    _server: Server,
}

impl Service {
    fn start(
        ca: &Arc<Authority>,
        names: &[&str],
        decide: impl Fn(&Call, Option<&PeerInfo>) -> Result<Vec<String>, Status> + Send + Sync + 'static,
    ) -> Self {
        let names: Vec<ServerName<'_>> = names.iter().map(|name| (*name).try_into().unwrap()).collect();
        let issued = ca.issue_server(&names, SystemTime::now(), HOUR).unwrap();
        let identity = Some(issued.identity(&provider()).unwrap());
        let materials = Materials::new(Material { identity, bundle: bundle(ca) });
        materials.set_trust_domains(vec!["cluster.local".to_owned()]);
        let acceptor = Acceptor::bootstrap(materials, provider()).unwrap();
        let tls = Inbound::new(acceptor, Slot::fixed(InboundTls::default()));
        let (told, decide) = (Told::default(), Arc::new(decide));
        let seen = Arc::clone(&told);
        let stack = move |_| {
            let (seen, decide) = (Arc::clone(&seen), Arc::clone(&decide));
            tower::service_fn(move |request: Request<Body>| {
                let (seen, decide) = (Arc::clone(&seen), Arc::clone(&decide));
                async move {
                    let conn = Arc::clone(request.extensions().get::<RequestContext>().unwrap().conn());
                    let decided = answer(request, |call| {
                        let peer = conn.identity.as_deref();
                        let id = peer.map(|peer| peer.principal().unwrap().to_owned());
                        seen.lock().unwrap().push((call.token.clone(), id));
                        decide(&call, peer)
                    });
                    Ok::<_, Infallible>(decided.await)
                }
            })
        };
        let server = Server::builder().start().unwrap();
        let spec = ListenerSpec::new("ca", "127.0.0.1:0".parse().unwrap(), Direction::Inbound);
        let address = server.listen_with(spec, move |_| WithTls::new(tls.clone()), stack).unwrap();
        Self { address, told, _server: server }
    }

    fn told(&self) -> Vec<(Option<String>, Option<String>)> {
        std::mem::take(&mut self.told.lock().unwrap())
    }

    fn client(&self, token: &File, roots: &File) -> IstioCa {
        let address = format!("https://{}", self.address);
        IstioCa::new(&address, token.0.clone(), roots.0.clone(), provider()).unwrap()
    }
}

async fn ask(client: &IstioCa, current: &Material) -> Result<Vec<String>, CaClientError> {
    client.sign(Question::new(&csr(), HOUR, current)).await
}

#[tokio::test]
async fn pa_05_a_token_gets_a_certificate_and_the_certificate_the_next_one() {
    let ca = authority();
    let signing = Arc::clone(&ca);
    let service = Service::start(&ca, &["127.0.0.1"], move |call, _| {
        Ok(sign(&signing, &call.request.csr, REVIEWS, SystemTime::now(), HOUR))
    });
    let (token, roots) = (File::new("token", "first\n"), File::new("roots", ca.root_pem()));
    let client = service.client(&token, &roots);
    let none = Material::default();
    assert_eq!(ask(&client, &none).await.unwrap().len(), 2);
    // The token is read anew for each question, as Kubernetes replaces it.
    std::fs::write(&token.0, "second").unwrap();
    ask(&client, &none).await.unwrap();
    let told = service.told();
    assert_eq!(told, [(Some("first".to_owned()), None), (Some("second".to_owned()), None)]);

    let id = REVIEWS.parse().unwrap();
    let identity = ca.issue(&id, SystemTime::now(), HOUR).unwrap().identity(&provider()).unwrap();
    let current = Material { identity: Some(identity), bundle: bundle(&ca) };
    std::fs::remove_file(&token.0).unwrap();
    // Nor are roots on disk needed, once the authority has named itself.
    std::fs::remove_file(&roots.0).unwrap();
    ask(&client, &current).await.unwrap();
    assert_eq!(service.told(), [(None, Some("cluster.local/ns/default/sa/reviews".to_owned()))]);
    // Without either there is nothing to ask with.
    let nothing = ask(&client, &Material { identity: None, ..current }).await.unwrap_err();
    assert!(matches!(nothing, CaClientError::Token { .. }), "{nothing}");
    let stranger = ask(&client, &none).await.unwrap_err();
    assert!(matches!(stranger, CaClientError::Roots { .. }), "{stranger}");
    assert!(service.told().is_empty());
}

#[tokio::test]
async fn who_is_not_the_authority_is_told_nothing() {
    let ca = authority();
    let told_nothing = async |service: &Service, roots: &str| {
        let (token, roots) = (File::new("told", "secret"), File::new("told-roots", roots));
        let error = ask(&service.client(&token, &roots), &Material::default()).await.unwrap_err();
        assert!(matches!(error, CaClientError::Handshake { .. }), "{error}");
        assert!(service.told().is_empty() && !error.to_string().contains("secret"));
    };
    let refuse = |_: &Call, _: Option<&PeerInfo>| Err(Status::new(Code::Internal, "never asked"));
    // Of another name, and of another root.
    told_nothing(&Service::start(&ca, &["ca.example"], refuse), ca.root_pem()).await;
    told_nothing(&Service::start(&ca, &["127.0.0.1"], refuse), authority().root_pem()).await;
}

#[tokio::test]
async fn bug_a_root_that_was_taken_out_of_the_file_stayed_trusted() {
    let (old, next, other) = (authority(), authority(), authority());
    let serve = |ca: &Arc<Authority>| {
        let (signing, roots) = (Arc::clone(ca), [&old, &next].map(|ca| ca.root_pem().to_owned()).concat());
        Service::start(ca, &["127.0.0.1"], move |call, _| {
            let now = SystemTime::now();
            Ok(vec![sign(&signing, &call.request.csr, REVIEWS, now, HOUR)[0].clone(), roots.clone()])
        })
    };
    let (by_old, by_next) = (serve(&old), serve(&next));
    let both = [old.root_pem(), next.root_pem()].concat();
    let named =
        Material { identity: None, bundle: Arc::new(TrustBundle::from_pem(both.as_bytes()).unwrap()) };
    let (token, roots) = (File::new("gone", "secret"), File::new("gone-roots", old.root_pem()));
    // One address, behind which now one server is and now the other.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let behind = Arc::new(Mutex::new(by_old.address));
    let target = Arc::clone(&behind);
    let relay = tokio::spawn(async move {
        loop {
            let (mut here, _) = listener.accept().await.unwrap();
            let target = *target.lock().unwrap();
            tokio::spawn(async move {
                let mut there = tokio::net::TcpStream::connect(target).await.unwrap();
                // Whoever ends first, ends it.
                let _ = tokio::io::copy_bidirectional(&mut here, &mut there).await;
            });
        }
    });
    let client = IstioCa::new(&address, token.0.clone(), roots.0.clone(), provider()).unwrap();
    let believes = async |service: &Service, client: &IstioCa| {
        *behind.lock().unwrap() = service.address;
        let asked = ask(client, &named).await;
        assert!(matches!(asked, Ok(_) | Err(CaClientError::Handshake { .. })), "{asked:?}");
        asked.is_ok()
    };
    // Nobody has named the next one to this client.
    assert!(!believes(&by_next, &client).await);
    // It was named under the file, and is believed beside it, and beside what is added to it.
    assert!(believes(&by_old, &client).await && believes(&by_next, &client).await);
    std::fs::write(&roots.0, [old.root_pem(), other.root_pem()].concat()).unwrap();
    assert!(believes(&by_next, &client).await);
    // The old one is taken out: neither it nor whom it named is believed, whoever names them again.
    std::fs::write(&roots.0, other.root_pem()).unwrap();
    assert!(!believes(&by_old, &client).await && !believes(&by_next, &client).await);
    std::fs::write(&roots.0, next.root_pem()).unwrap();
    assert!(believes(&by_next, &client).await && !believes(&by_old, &client).await);
    // A file that cannot be read leaves what was named.
    std::fs::write(&roots.0, "").unwrap();
    assert!(believes(&by_next, &client).await && !believes(&by_old, &client).await);
    relay.abort();
}

#[tokio::test]
async fn bug_a_token_that_is_too_long_was_cut() {
    let ca = authority();
    let refuse = |_: &Call, _: Option<&PeerInfo>| Err(Status::new(Code::Internal, "never asked"));
    let service = Service::start(&ca, &["127.0.0.1"], refuse);
    let (token, roots) =
        (File::new("long", &"x".repeat(16 * 1024 + 1)), File::new("long-roots", ca.root_pem()));
    let error = ask(&service.client(&token, &roots), &Material::default()).await.unwrap_err();
    assert!(matches!(error, CaClientError::Token { .. }), "{error}");
    assert!(error.to_string().contains("longer than 16384 bytes") && service.told().is_empty(), "{error}");
}

#[tokio::test]
async fn an_authority_that_forgot_its_root_takes_the_token_alone() {
    let (ca, forgotten) = (authority(), authority());
    let signing = Arc::clone(&ca);
    let service = Service::start(&ca, &["127.0.0.1"], move |call, _| {
        Ok(sign(&signing, &call.request.csr, REVIEWS, SystemTime::now(), HOUR))
    });
    let identity = forgotten.issue(&REVIEWS.parse().unwrap(), SystemTime::now(), HOUR).unwrap();
    let current =
        Material { identity: Some(identity.identity(&provider()).unwrap()), bundle: bundle(&forgotten) };
    let (token, roots) = (File::new("forgot", "secret"), File::new("forgot-roots", ca.root_pem()));
    ask(&service.client(&token, &roots), &current).await.unwrap();
    assert_eq!(service.told(), [(Some("secret".to_owned()), None)]);
}

#[tokio::test]
async fn a_refusal_comes_in_the_authoritys_words() {
    let ca = authority();
    let refusing = |_: &Call, _: Option<&PeerInfo>| Err(Status::new(Code::PermissionDenied, "nä: not you"));
    let service = Service::start(&ca, &["127.0.0.1"], refusing);
    let (token, roots) = (File::new("refused", "secret"), File::new("refused-roots", ca.root_pem()));
    let client = service.client(&token, &roots);
    let error = ask(&client, &Material::default()).await.unwrap_err();
    assert_eq!(error.to_string(), "the authority refuses: PERMISSION_DENIED: nä: not you");
    for (text, reason) in [("", "empty"), ("two\nlines", "more than one line")] {
        std::fs::write(&token.0, text).unwrap();
        let error = ask(&client, &Material::default()).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
    drop(service);
    std::fs::write(&token.0, "secret").unwrap();
    let error = ask(&client, &Material::default()).await.unwrap_err();
    assert!(matches!(error, CaClientError::Connect { .. }), "{error}");
}

/// What a signer does now.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Mood {
    Signs,
    Away,
    Hangs,
    /// Signs what was not asked for.
    Strange(&'static str),
}

/// A signer in the same process and of the same made-up time.
#[derive(Clone)]
struct Scripted {
    ca: Arc<Authority>,
    clock: WallClock,
    read: Arc<dyn Fn() -> SystemTime + Send + Sync>,
    mood: Arc<Mutex<Mood>>,
    asked: Arc<Mutex<Vec<SystemTime>>>,
    life: Duration,
    /// By how many seconds the clock of the wall was set.
    set: Arc<AtomicI64>,
}

impl Scripted {
    fn new(life: Duration) -> Self {
        let (base, start) = (SystemTime::now(), tokio::time::Instant::now());
        let set = Arc::new(AtomicI64::new(0));
        let by = Arc::clone(&set);
        let read: Arc<dyn Fn() -> SystemTime + Send + Sync> = Arc::new(move || {
            let by = by.load(Ordering::Relaxed);
            let moved = Duration::from_secs(by.unsigned_abs());
            let now = base + start.elapsed();
            if by < 0 { now - moved } else { now + moved }
        });
        let reading = Arc::clone(&read);
        Self {
            ca: authority(),
            clock: WallClock::new(move || reading()),
            read,
            mood: Arc::new(Mutex::new(Mood::Signs)),
            asked: Arc::default(),
            life,
            set,
        }
    }

    fn now(&self) -> SystemTime {
        (self.read)()
    }

    fn source(&self, seed: u64) -> IstioCaSource<Self> {
        let source = IstioCaSource::new(self.clone(), REVIEWS.parse().unwrap(), provider());
        source.lifetime(self.life).simulated(self.clock.clone(), seed)
    }

    fn be(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
        self.asked.lock().unwrap().clear();
    }

    fn asked(&self) -> Vec<SystemTime> {
        self.asked.lock().unwrap().clone()
    }
}

impl Sign for Scripted {
    async fn sign(&self, question: Question<'_>) -> Result<Vec<String>, CaClientError> {
        self.asked.lock().unwrap().push(self.now());
        let mood = self.mood.lock().unwrap().clone();
        let (now, life) = (self.now(), question.validity.min(self.life));
        let sign = |id| sign(&self.ca, question.csr, id, now, life);
        match mood {
            Mood::Signs => Ok(sign(REVIEWS)),
            Mood::Away => Err(CaClientError::Refused(Status::new(Code::Unavailable, "away"))),
            Mood::Hangs => std::future::pending().await,
            Mood::Strange("identity") => {
                // No authority of ours would.
                let issuer = KeyPair::from_pem(&self.ca.key_pem()).unwrap();
                let issuer = Issuer::from_ca_cert_der(self.ca.root(), issuer).unwrap();
                let mut request = CertificateSigningRequestParams::from_pem(question.csr).unwrap();
                let other = "spiffe://cluster.local/ns/default/sa/ratings";
                request.params.subject_alt_names = vec![SanType::URI(other.try_into().unwrap())];
                request.params.not_after = (now + life).into();
                Ok(vec![request.signed_by(&issuer).unwrap().pem(), self.ca.root_pem().to_owned()])
            }
            Mood::Strange("key") => Ok(sign_other(&self.ca, now, life)),
            Mood::Strange("root") => Ok(vec![sign(REVIEWS)[0].clone(), authority().root_pem().to_owned()]),
            Mood::Strange("no root") => Ok(vec![sign(REVIEWS)[0].clone()]),
            Mood::Strange("expired") => Ok(self::sign(&self.ca, question.csr, REVIEWS, now - 2 * HOUR, HOUR)),
            Mood::Strange(_) => Ok(Vec::new()),
        }
    }
}

fn sign_other(ca: &Authority, now: SystemTime, life: Duration) -> Vec<String> {
    sign(ca, &csr(), REVIEWS, now, life)
}

fn held(materials: &Materials) -> Option<SystemTime> {
    materials.load().identity.as_ref().map(Identity::not_after)
}

/// Lets the time pass in steps, and looks after each.
async fn pass(time: Duration, step: Duration, mut look: impl FnMut()) {
    let end = tokio::time::Instant::now() + time;
    while tokio::time::Instant::now() < end {
        tokio::time::sleep(step).await;
        look();
    }
}

#[tokio::test(start_paused = true)]
async fn d10_an_authority_that_is_away_for_an_hour_costs_nothing() {
    for seed in 0..20 {
        let signer = Scripted::new(2 * HOUR);
        let materials = Materials::none();
        let source = signer.source(seed);
        let state = source.state();
        let running = tokio::spawn(source.run(materials.clone()));
        tokio::time::sleep(SECOND).await;
        let first = held(&materials).expect("a certificate at once");
        let began = signer.now();

        // It is renewed at 40 to 50 % of its life, which is counted from when it came.
        signer.be(Mood::Away);
        pass(HOUR / 2, SECOND, || assert_eq!(held(&materials), Some(first))).await;
        assert!(signer.asked().is_empty(), "too early: {seed}");
        pass(HOUR / 2, SECOND, || assert_eq!(held(&materials), Some(first))).await;
        let asked = signer.asked();
        let at = asked[0].duration_since(began).unwrap();
        assert!((HOUR * 79 / 100..=HOUR * 101 / 100).contains(&at), "{at:?}");

        // An hour without an authority: it is asked again, with pauses that grow and are not alike, and never too often.
        pass(HOUR - (HOUR - at) - 60 * SECOND, SECOND, || assert_eq!(held(&materials), Some(first))).await;
        let asked = signer.asked();
        let pauses: Vec<_> = asked.windows(2).map(|pair| pair[1].duration_since(pair[0]).unwrap()).collect();
        assert!((40..200).contains(&asked.len()), "{} questions", asked.len());
        assert!(pauses.iter().all(|pause| (SECOND / 2..=61 * SECOND).contains(pause)), "{pauses:?}");
        assert!(pauses[0] <= SECOND && *pauses.iter().max().unwrap() > 30 * SECOND);
        let mut distinct = pauses.clone();
        distinct.sort();
        distinct.dedup();
        assert!(distinct.len() > pauses.len() / 2, "they are alike: {pauses:?}");
        assert!(state.borrow().failures as usize >= asked.len() - 1);

        // And when it is back, the next question is answered.
        signer.be(Mood::Signs);
        pass(61 * SECOND, SECOND, || assert!(held(&materials).is_some())).await;
        assert!(held(&materials).unwrap() > first && state.borrow().failures == 0);
        running.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn d10_a_certificate_is_kept_until_its_real_end_and_not_longer() {
    for mood in [Mood::Away, Mood::Hangs] {
        let signer = Scripted::new(2 * HOUR);
        let materials = Materials::none();
        let source = signer.source(7);
        let state = source.state();
        let running = tokio::spawn(source.run(materials.clone()));
        tokio::time::sleep(SECOND).await;
        let end = held(&materials).unwrap();
        signer.be(mood.clone());
        while signer.now() < end - SECOND {
            tokio::time::sleep(SECOND).await;
            assert_eq!(held(&materials), Some(end), "{mood:?}");
        }
        tokio::time::sleep(2 * SECOND).await;
        assert_eq!((held(&materials), state.borrow().held_until), (None, None), "{mood:?}");
        // Whom to believe is still known.
        assert!(!materials.load().bundle.roots().is_empty());
        if mood == Mood::Away {
            signer.be(Mood::Signs);
            tokio::time::sleep(16 * SECOND).await;
            assert!(held(&materials).is_some() && state.borrow().received == 2);
        }
        running.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn d3_a_clock_that_is_set_is_heeded() {
    let signer = Scripted::new(2 * HOUR);
    let materials = Materials::none();
    let running = tokio::spawn(signer.source(5).run(materials.clone()));
    tokio::time::sleep(SECOND).await;
    let first = held(&materials).unwrap();
    // An hour ahead, which is half of its life: it is renewed within half a minute, and not in an hour.
    signer.set.store(3600, Ordering::Relaxed);
    tokio::time::sleep(31 * SECOND).await;
    let second = held(&materials).unwrap();
    assert!(second > first);
    // Back again: it stays, and nobody is asked without need.
    signer.be(Mood::Signs);
    signer.set.store(0, Ordering::Relaxed);
    tokio::time::sleep(HOUR).await;
    assert_eq!((held(&materials), signer.asked().len()), (Some(second), 0));
    // Beyond its end: there is none until there is another.
    signer.be(Mood::Away);
    signer.set.store(4 * 3600, Ordering::Relaxed);
    tokio::time::sleep(31 * SECOND).await;
    assert_eq!(held(&materials), None);
    signer.be(Mood::Signs);
    tokio::time::sleep(16 * SECOND).await;
    assert!(held(&materials).unwrap() > signer.now());
    running.abort();
}

/// In real time, as real sockets are: a paused clock would jump to the end before the first packet came.
#[tokio::test]
async fn d10_an_authority_that_says_nothing_is_given_up() {
    use tokio::io::AsyncReadExt as _;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (token, roots) = (File::new("silent", "secret"), File::new("silent-roots", authority().root_pem()));
    let address = listener.local_addr().unwrap().to_string();
    let patience = SECOND / 2;
    let client = IstioCa::new(&address, token.0.clone(), roots.0.clone(), provider()).unwrap();
    let client = client.patience(patience);
    // It takes the first words of the handshake, and holds the connection until the client lets go of it.
    let silent = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        heard
    });
    let began = mesh_core::clock::now();
    let error = tokio::time::timeout(30 * SECOND, ask(&client, &Material::default())).await;
    let error = error.expect("it is given up").unwrap_err();
    assert!(
        matches!(error, CaClientError::TooLate { patience: waited, .. } if waited == patience),
        "{error}"
    );
    assert!(began.elapsed() >= patience);
    let heard = tokio::time::timeout(30 * SECOND, silent).await.expect("the connection ends").unwrap();
    assert_eq!(heard.first(), Some(&22), "a handshake was begun");
}

#[tokio::test(start_paused = true)]
async fn d1_lives_of_seconds_are_renewed_in_time_and_authorities_are_not_flooded() {
    let signer = Scripted::new(4 * SECOND);
    let materials = Materials::none();
    let running = tokio::spawn(signer.source(1).run(materials.clone()));
    tokio::time::sleep(SECOND / 10).await;
    pass(60 * SECOND, SECOND / 10, || {
        assert!(held(&materials).is_some_and(|end| end > signer.now()));
    })
    .await;
    let asked = signer.asked().len();
    assert!((20..80).contains(&asked), "{asked}");
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_not_what_was_asked_for_is_not_taken() {
    for strange in ["identity", "key", "root", "no root", "expired", "nothing"] {
        let signer = Scripted::new(2 * HOUR);
        let materials = Materials::none();
        signer.be(Mood::Strange(strange));
        let source = signer.source(3);
        let state = source.state();
        let running = tokio::spawn(source.run(materials.clone()));
        tokio::time::sleep(60 * SECOND).await;
        assert_eq!(held(&materials), None, "{strange}");
        let error = state.borrow().last_error.clone().unwrap();
        assert!(error.contains("answer is not taken"), "{strange}: {error}");
        // Nor does it replace one that is good.
        signer.be(Mood::Signs);
        tokio::time::sleep(16 * SECOND).await;
        let first = held(&materials).unwrap();
        signer.be(Mood::Strange(strange));
        tokio::time::sleep(HOUR + 60 * SECOND).await;
        assert!(!signer.asked().is_empty());
        assert_eq!(held(&materials), Some(first), "{strange}");
        running.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn pa_05_roots_that_istiod_writes_one_by_one_are_all_believed() {
    struct Istiod(Scripted, Arc<Authority>);
    impl Sign for Istiod {
        async fn sign(&self, question: Question<'_>) -> Result<Vec<String>, CaClientError> {
            let chain = self.0.sign(question).await?;
            Ok(vec![chain[0].clone(), chain[1].clone(), self.1.root_pem().to_owned()])
        }
    }
    let (signer, other) = (Scripted::new(HOUR), authority());
    let source =
        IstioCaSource::new(Istiod(signer.clone(), Arc::clone(&other)), REVIEWS.parse().unwrap(), provider());
    let materials = Materials::none();
    let running = tokio::spawn(source.simulated(signer.clock.clone(), 1).run(materials.clone()));
    tokio::time::sleep(SECOND).await;
    let material = materials.load();
    assert_eq!(material.identity.as_ref().unwrap().chain().len(), 1);
    let mut roots: Vec<_> = material.bundle.roots().iter().map(|root| root.to_vec()).collect();
    let mut expected = vec![signer.ca.root().to_vec(), other.root().to_vec()];
    roots.sort();
    expected.sort();
    assert_eq!(roots, expected);
    running.abort();
}
