//! Identities from the SPIFFE Workload API: an agent on a socket, and one in the same process for outages that last hours.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod agent;
mod peers;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use mesh_core::{ClientTls, Spoken};
use mesh_tls::source::{CertSource as _, IdentityFiles};
use mesh_tls::spiffe::{
    CertState, Code, SpiffeSource, Status, Subscribe, SvidChoice, Updates, WallClock, WorkloadApi,
    WorkloadApiError, X509Svid, X509SvidResponse,
};
use mesh_tls::{Acceptor, Connector, Identity, Material, Materials};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::client::TlsStream;

use agent::Agent;
use peers::{Ca, DAY, HOUR, Peer, authority, leaf, material, provider, spiffe};

const SECOND: Duration = Duration::from_secs(1);
const REVIEWS: &str = "spiffe://cluster.local/ns/default/sa/reviews";
const PRODUCTPAGE: &str = "spiffe://cluster.local/ns/default/sa/productpage";

fn in_a_row(chain: &[CertificateDer<'_>]) -> Vec<u8> {
    chain.iter().flat_map(|certificate| certificate.to_vec()).collect()
}

/// What an agent has of an identity.
fn svid(ca: &Ca, id: &str) -> X509Svid {
    svid_at(ca, id, SystemTime::now(), HOUR)
}

fn svid_at(ca: &Ca, id: &str, now: SystemTime, life: Duration) -> X509Svid {
    let issued = ca.0.issue(&spiffe(id), now, life).unwrap();
    let key = PrivatePkcs8KeyDer::from_pem_slice(issued.key_pem().as_bytes()).unwrap();
    X509Svid::new(id, in_a_row(&issued.certificate.chain), key, ca.0.root().to_vec())
}

/// The same of whatever certificate there is.
fn svid_of(ca: &Ca, id: &str, peer: &Peer) -> X509Svid {
    let key = PrivatePkcs8KeyDer::from(peer.key().secret_der().to_vec());
    X509Svid::new(id, in_a_row(&peer.chain()), key, ca.0.root().to_vec())
}

fn says(svids: impl IntoIterator<Item = X509Svid>) -> X509SvidResponse {
    let mut answer = X509SvidResponse::default();
    answer.svids.extend(svids);
    answer
}

fn who(materials: &Materials) -> Option<String> {
    Some(materials.load().identity.as_ref()?.spiffe_id()?.to_string())
}

fn chain(materials: &Materials) -> Vec<u8> {
    in_a_row(materials.load().identity.as_ref().unwrap().chain())
}

fn held(materials: &Materials) -> Option<SystemTime> {
    materials.load().identity.as_ref().map(Identity::not_after)
}

/// A source that runs, and what became of it.
struct Running {
    materials: Materials,
    state: watch::Receiver<CertState>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start<S: Subscribe>(source: SpiffeSource<S>) -> Self {
        let (materials, state) = (Materials::none(), source.state());
        let task = tokio::spawn(source.run(materials.clone()));
        Self { materials, state, task }
    }

    async fn until(&mut self, holds: impl FnMut(&CertState) -> bool) {
        tokio::time::timeout(60 * SECOND, self.state.wait_for(holds)).await.unwrap().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn from(agent: &Agent) -> SpiffeSource {
    SpiffeSource::new(WorkloadApi::new(&agent.endpoint()).unwrap(), provider())
}

#[tokio::test]
async fn pa_05_the_workload_api_says_who_we_are_and_each_message_is_a_rotation() {
    let (ca, agent) = (authority("cluster.local"), Agent::start("first"));
    let mut it = Running::start(from(&agent));
    // Who has no identity is told so, and asks again.
    it.until(|state| state.failures > 0).await;
    let error = it.state.borrow().last_error.clone().unwrap();
    assert_eq!(error, "the Workload API refuses: PERMISSION_DENIED: no identity issued");
    assert_eq!(who(&it.materials), None);
    agent.say(&says([svid(&ca, REVIEWS), svid(&ca, PRODUCTPAGE)]));
    it.until(|state| state.received == 1).await;
    assert_eq!(who(&it.materials).as_deref(), Some(REVIEWS));
    assert_eq!(it.materials.load().bundle.roots(), [ca.0.root().clone()]);
    assert_eq!(*it.materials.trust_domains(), ["cluster.local"]);
    let (first, generation, end) = (chain(&it.materials), it.materials.generation(), held(&it.materials));
    {
        let state = it.state.borrow();
        assert_eq!((state.held_until, state.failures, &state.last_error), (end, 0, &None));
    }
    agent.say(&says([svid(&ca, REVIEWS)]));
    it.until(|state| state.received == 2).await;
    assert_ne!(chain(&it.materials), first);
    assert_eq!(it.materials.generation(), generation + 1);
    assert_eq!(agent.strange(), 0, "the agent was asked in another way than SPIFFE says");
}

#[tokio::test]
async fn d10_an_agent_that_is_restarted_is_found_again_and_what_it_repeats_changes_nothing() {
    let (ca, mut agent) = (authority("cluster.local"), Agent::start("again"));
    agent.say(&says([svid(&ca, REVIEWS)]));
    let mut it = Running::start(from(&agent));
    it.until(|state| state.received == 1).await;
    let (first, generation) = (chain(&it.materials), it.materials.generation());
    // It ends the call in order.
    agent.end(Code::Ok);
    it.until(|state| state.failures > 0).await;
    it.until(|state| state.failures == 0).await;
    // It is ended, and another one is there later.
    agent.stop();
    it.until(|state| state.failures > 1).await;
    assert_eq!(chain(&it.materials), first);
    agent.restart();
    it.until(|state| state.failures == 0).await;
    assert_eq!((it.state.borrow().received, it.materials.generation()), (1, generation));
    agent.say(&says([svid(&ca, REVIEWS)]));
    it.until(|state| state.received == 2).await;
    assert_ne!(chain(&it.materials), first);
}

/// A connection of mutual TLS over memory, by what both ends have now.
async fn connect(client: &Materials, server: &Materials) -> Result<(Ends, String), String> {
    let acceptor = Acceptor::mutual(server.clone(), provider()).unwrap();
    let connector = Connector::new(client.clone(), provider());
    let tls = ClientTls { sni: Some("reviews".to_owned()), ..ClientTls::default() };
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let (ours, theirs) = tokio::join!(connector.connect(ours, &tls, Spoken::Bytes), acceptor.accept(theirs));
    let theirs = theirs.map_err(|error| error.to_string())?;
    let peer = theirs.peer.as_ref().unwrap().principal().unwrap().to_owned();
    let mut ends = Ends(ours.map_err(|error| error.to_string())?, theirs);
    ends.echo().await.map_err(|error| error.to_string())?;
    Ok((ends, peer))
}

struct Ends(TlsStream<DuplexStream>, mesh_tls::Secured<DuplexStream>);

impl Ends {
    async fn echo(&mut self) -> std::io::Result<()> {
        let mut read = [0; 4];
        self.0.write_all(b"ping").await?;
        self.0.flush().await?;
        self.1.io.read_exact(&mut read).await?;
        self.1.io.write_all(b"pong").await?;
        self.1.io.flush().await?;
        self.0.read_exact(&mut read).await?;
        Ok(())
    }
}

#[tokio::test]
async fn pa_05_an_identity_of_the_workload_api_and_one_of_files_know_each_other() {
    let (ca, agent) = (authority("cluster.local"), Agent::start("files"));
    agent.say(&says([svid(&ca, REVIEWS)]));
    let mut it = Running::start(from(&agent));
    it.until(|state| state.received == 1).await;
    let issued = ca.0.issue(&spiffe(PRODUCTPAGE), SystemTime::now(), HOUR).unwrap();
    for (file, text) in [
        ("cert-chain.pem", issued.certificate.chain_pem.clone()),
        ("key.pem", issued.key_pem()),
        ("root-cert.pem", ca.0.root_pem().to_owned()),
    ] {
        std::fs::write(agent.dir().join(file), text).unwrap();
    }
    let files = IdentityFiles::in_dir(agent.dir()).unwrap().open(provider()).unwrap().0;
    let files = Materials::new(files);
    let (mut open, peer) = connect(&files, &it.materials).await.unwrap();
    assert_eq!(peer, "cluster.local/ns/default/sa/productpage");
    let (_, peer) = connect(&it.materials, &files).await.unwrap();
    assert_eq!(peer, "cluster.local/ns/default/sa/reviews");
    // The next certificate: the connection that is open lives on, and is not even judged again.
    let trust = it.materials.trust_generation();
    agent.say(&says([svid(&ca, REVIEWS)]));
    it.until(|state| state.received == 2).await;
    open.echo().await.unwrap();
    assert_eq!(it.materials.trust_generation(), trust);
    connect(&files, &it.materials).await.unwrap();
    // Another authority: it is a change of trust, and new connections need somebody of the new one.
    let other = authority("cluster.local");
    agent.say(&says([svid(&other, REVIEWS)]));
    it.until(|state| state.received == 3).await;
    assert!(it.materials.trust_generation() > trust);
    assert!(connect(&files, &it.materials).await.is_err());
    connect(&material(&other, PRODUCTPAGE), &it.materials).await.unwrap();
}

#[tokio::test]
async fn a_federated_bundle_vouches_for_nobody() {
    let (ca, foreign, agent) =
        (authority("cluster.local"), authority("cluster.local"), Agent::start("federated"));
    let mut answer = says([svid(&ca, REVIEWS)]);
    let root = foreign.0.root().to_vec();
    // One for another trust domain, and one that claims to be for our own.
    for domain in ["spiffe://partner.example", "spiffe://cluster.local"] {
        answer.federated_bundles.insert(domain.to_owned(), root.clone());
    }
    agent.say(&answer);
    let mut it = Running::start(from(&agent));
    it.until(|state| state.received == 1).await;
    assert_eq!(it.materials.load().bundle.roots(), [ca.0.root().clone()]);
    assert_eq!(*it.materials.trust_domains(), ["cluster.local"]);
    connect(&material(&ca, PRODUCTPAGE), &it.materials).await.unwrap();
    // Of the foreign authority, with a name of our trust domain: the server has to refuse it by itself.
    let stranger = Materials::new(Material {
        bundle: ca.bundle(),
        ..Material::clone(&material(&foreign, PRODUCTPAGE).load())
    });
    let refused = connect(&stranger, &it.materials).await.map(drop).unwrap_err();
    assert!(refused.contains("signature does not hold") || refused.contains("authority"), "{refused}");
}

#[tokio::test]
async fn pa_05_what_the_agent_says_is_revoked_is_not_believed() {
    let (ca, agent) = (authority("cluster.local"), Agent::start("revoked"));
    let revoked = leaf(&ca, |_| {});
    agent.say(&says([svid(&ca, REVIEWS)]));
    let mut it = Running::start(from(&agent));
    it.until(|state| state.received == 1).await;
    let client = Materials::new(Material { identity: Some(revoked.identity()), bundle: ca.bundle() });
    connect(&client, &it.materials).await.unwrap();
    let mut answer = says([svid(&ca, REVIEWS)]);
    answer.crls.push(ca.0.revoke(&[revoked.serial()], SystemTime::now(), DAY).unwrap().to_vec());
    agent.say(&answer);
    it.until(|state| state.received == 2).await;
    let refused = connect(&client, &it.materials).await.map(drop).unwrap_err();
    assert!(refused.contains("was revoked"), "{refused}");
    connect(&material(&ca, PRODUCTPAGE), &it.materials).await.unwrap();
}

#[tokio::test]
async fn an_agent_that_speaks_strangely_is_left() {
    let (ca, agent) = (authority("cluster.local"), Agent::start("strange"));
    let api = WorkloadApi::new(&agent.endpoint()).unwrap();
    let good = agent::encode(&says([svid(&ca, REVIEWS)]));
    let mut half = good.clone();
    half.pop();
    for (raw, reason) in [
        (b"\x01\0\0\0\0".to_vec(), "compressed"),
        (b"\0\xff\xff\xff\xff".to_vec(), "too long"),
        (b"\0\0\0\0\x02\x08\x01".to_vec(), "cannot be read"),
        (half, "before it is whole"),
    ] {
        agent.say_raw(raw);
        agent.end_next();
        let mut updates = api.subscribe().await.unwrap();
        let error = updates.next().await.map(drop).unwrap_err().to_string();
        assert!(error.contains(reason), "{reason}: {error}");
    }
    // Messages that come together are two.
    agent.say_raw([good.clone(), good].concat());
    agent.end_next();
    let mut updates = api.subscribe().await.unwrap();
    for _ in 0..2 {
        assert_eq!(updates.next().await.unwrap().unwrap().svids[0].spiffe_id, REVIEWS);
    }
    assert!(updates.next().await.unwrap().is_none());
    drop(agent);
    let error = api.subscribe().await.map(drop).unwrap_err();
    assert!(matches!(error, WorkloadApiError::Connect { .. }), "{error}");
}

/// An agent in the same process and of the same made-up time.
#[derive(Clone)]
struct Scripted {
    clock: WallClock,
    read: Arc<dyn Fn() -> SystemTime + Send + Sync>,
    asked: Arc<Mutex<Vec<SystemTime>>>,
    call: Arc<Mutex<Option<mpsc::UnboundedReceiver<X509SvidResponse>>>>,
}

impl Scripted {
    fn new() -> Self {
        let (base, start) = (SystemTime::now(), tokio::time::Instant::now());
        let read: Arc<dyn Fn() -> SystemTime + Send + Sync> = Arc::new(move || base + start.elapsed());
        let reading = Arc::clone(&read);
        let clock = WallClock::new(move || reading());
        Self { clock, read, asked: Arc::default(), call: Arc::default() }
    }

    fn now(&self) -> SystemTime {
        (self.read)()
    }

    fn source(&self, seed: u64) -> SpiffeSource<Self> {
        SpiffeSource::new(self.clone(), provider()).simulated(self.clock.clone(), seed)
    }

    /// Answers the next call; dropping what it gives ends it.
    fn answer(&self) -> mpsc::UnboundedSender<X509SvidResponse> {
        let (say, said) = mpsc::unbounded_channel();
        *self.call.lock().unwrap() = Some(said);
        say
    }

    fn asked(&self) -> Vec<SystemTime> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

impl Subscribe for Scripted {
    type Updates = Said;

    async fn subscribe(&self) -> Result<Said, WorkloadApiError> {
        self.asked.lock().unwrap().push(self.now());
        let call = self.call.lock().unwrap().take();
        call.map(Said).ok_or_else(|| WorkloadApiError::Refused(Status::new(Code::Unavailable, "away")))
    }
}

struct Said(mpsc::UnboundedReceiver<X509SvidResponse>);

impl Updates for Said {
    async fn next(&mut self) -> Result<Option<X509SvidResponse>, WorkloadApiError> {
        Ok(self.0.recv().await)
    }
}

#[tokio::test(start_paused = true)]
async fn d10_without_the_agent_the_certificate_is_kept_until_its_real_end_and_not_longer() {
    for seed in 0..10 {
        let (ca, agent) = (authority("cluster.local"), Scripted::new());
        let say = agent.answer();
        say.send(says([svid_at(&ca, REVIEWS, agent.now(), HOUR)])).unwrap();
        let mut it = Running::start(agent.source(seed));
        it.until(|state| state.received == 1).await;
        let end = held(&it.materials).unwrap();
        agent.asked();
        drop(say);
        while agent.now() < end - SECOND {
            tokio::time::sleep(SECOND).await;
            assert_eq!(held(&it.materials), Some(end));
        }
        let asked = agent.asked();
        let pauses: Vec<_> = asked.windows(2).map(|pair| pair[1].duration_since(pair[0]).unwrap()).collect();
        assert!((60..240).contains(&asked.len()), "{} questions", asked.len());
        let longest = pauses.iter().max().unwrap();
        assert!(pauses[0] <= 2 * SECOND && (30 * SECOND..=61 * SECOND).contains(longest), "{pauses:?}");
        // While there is time enough, none of the pauses is bounded by it, and only chance tells them apart.
        let long: Vec<_> = pauses.iter().filter(|pause| **pause > 30 * SECOND).collect();
        let distinct: HashSet<_> = long.iter().collect();
        assert!(long.len() > 20 && distinct.len() > long.len() / 2, "they are alike: {pauses:?}");
        tokio::time::sleep(2 * SECOND).await;
        assert_eq!((held(&it.materials), it.state.borrow().held_until), (None, None));
        // Whom to believe is still known; and when the agent is back, it is heard within a quarter of a minute.
        assert_eq!(it.materials.load().bundle.roots().len(), 1);
        let say = agent.answer();
        say.send(says([svid_at(&ca, REVIEWS, agent.now(), HOUR)])).unwrap();
        tokio::time::sleep(16 * SECOND).await;
        assert_eq!(who(&it.materials).as_deref(), Some(REVIEWS));
    }
}

#[tokio::test(start_paused = true)]
async fn d10_a_call_that_is_silent_does_not_keep_a_certificate_alive() {
    let (ca, agent) = (authority("cluster.local"), Scripted::new());
    let say = agent.answer();
    say.send(says([svid_at(&ca, REVIEWS, agent.now(), HOUR)])).unwrap();
    let mut it = Running::start(agent.source(1));
    it.until(|state| state.received == 1).await;
    tokio::time::sleep(HOUR - 2 * SECOND).await;
    assert!(held(&it.materials).is_some());
    tokio::time::sleep(3 * SECOND).await;
    assert_eq!(held(&it.materials), None);
    // The call goes on, and what it says counts.
    say.send(says([svid_at(&ca, REVIEWS, agent.now(), HOUR)])).unwrap();
    it.until(|state| state.received == 2).await;
    assert!(held(&it.materials).is_some() && agent.asked().len() == 1);
}

#[tokio::test(start_paused = true)]
async fn pa_05_a_bad_svid_is_kept_out_and_the_last_good_one_stays() {
    let (ca, foreign) = (authority("cluster.local"), authority("evil.example"));
    let uri = |text: &str| rcgen::SanType::URI(text.try_into().unwrap());
    let named = |names: Vec<rcgen::SanType>| leaf(&ca, move |params| params.subject_alt_names = names);
    let changed = |change: &dyn Fn(&mut X509Svid)| {
        let mut svid = svid(&ca, REVIEWS);
        change(&mut svid);
        svid
    };
    let bad: Vec<(X509SvidResponse, &str)> = vec![
        (says([]), "there is no identity; there are: none"),
        (says([changed(&|one| one.key = svid(&ca, REVIEWS).key)]), "the key does not fit"),
        (says([changed(&|svid| svid.key = b"no key".to_vec().into())]), "the key does not fit"),
        (
            says([svid_of(&ca, REVIEWS, &named(vec![uri(REVIEWS), uri(PRODUCTPAGE)]))]),
            "the certificate has 2 URI names, not one",
        ),
        (says([svid_of(&ca, REVIEWS, &named(vec![]))]), "0 URI names"),
        (says([changed(&|svid| svid.spiffe_id = PRODUCTPAGE.to_owned())]), "sa/reviews, expected was"),
        (
            says([changed(&|svid| svid.spiffe_id = "https://a/b\n".to_owned())]),
            "https://a/b\\n is no SPIFFE ID",
        ),
        (
            says([svid(&foreign, "spiffe://evil.example/ns/a/sa/b")]),
            "is not of the trust domain cluster.local",
        ),
        (
            says([svid_of(&ca, "spiffe://cluster.local", &named(vec![uri("spiffe://cluster.local")]))]),
            "names a trust domain and no workload",
        ),
        (says([svid_at(&ca, REVIEWS, SystemTime::now() - 3 * HOUR, HOUR)]), "CertExpired"),
        (says([changed(&|svid| svid.bundle = foreign.0.root().to_vec())]), "of spiffe://cluster.local"),
        (says([changed(&|svid| svid.bundle.clear())]), "whom to believe"),
        (says([changed(&|svid| svid.bundle.truncate(100))]), "whom to believe"),
        (says([changed(&|svid| svid.chain.clear())]), "there is no certificate"),
        (says([changed(&|svid| svid.chain.push(0))]), "cannot be read"),
        (
            says([svid_of(
                &ca,
                REVIEWS,
                &leaf(&ca, |params| {
                    params.subject_alt_names = vec![rcgen::SanType::URI(REVIEWS.try_into().unwrap())];
                    params.key_usages.push(rcgen::KeyUsagePurpose::KeyCertSign);
                }),
            )]),
            "one that signs others",
        ),
        (
            {
                let mut answer = says([svid(&ca, REVIEWS)]);
                answer.crls.push(b"no list".to_vec());
                answer
            },
            "revocation list 0",
        ),
    ];
    let (good, agent) = (authority("cluster.local"), Scripted::new());
    let say = agent.answer();
    let mut it = Running::start(agent.source(1).trust_domain("cluster.local".parse().unwrap()));
    let mut first = None;
    let (early, late): (Vec<_>, Vec<_>) = bad.into_iter().enumerate().partition(|(at, _)| at % 2 == 0);
    for (_, (answer, reason)) in early {
        let failures = it.state.borrow().failures;
        say.send(answer).unwrap();
        it.until(|state| state.failures > failures).await;
        let error = it.state.borrow().last_error.clone().unwrap();
        assert!(error.contains(reason) && !error.contains('\n'), "{reason}: {error}");
        assert_eq!((who(&it.materials), it.state.borrow().received), (None, 0), "{reason}");
    }
    for (_, (answer, reason)) in late {
        if first.is_none() {
            say.send(says([svid_at(&good, REVIEWS, agent.now(), HOUR)])).unwrap();
            it.until(|state| state.received == 1).await;
            first = Some((chain(&it.materials), it.materials.generation()));
        }
        let failures = it.state.borrow().failures;
        say.send(answer).unwrap();
        it.until(|state| state.failures > failures).await;
        let error = it.state.borrow().last_error.clone().unwrap();
        assert!(error.contains(reason), "{reason}: {error}");
        assert_eq!(Some((chain(&it.materials), it.materials.generation())), first, "{reason}");
    }
    // The call was not left for any of them.
    assert_eq!(agent.asked().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn pa_05_the_trust_domain_of_the_first_identity_is_that_of_all() {
    let (ca, foreign, agent) = (authority("cluster.local"), authority("evil.example"), Scripted::new());
    let say = agent.answer();
    let mut it = Running::start(agent.source(1));
    say.send(says([svid(&ca, REVIEWS)])).unwrap();
    it.until(|state| state.received == 1).await;
    say.send(says([svid(&foreign, "spiffe://evil.example/ns/a/sa/b")])).unwrap();
    it.until(|state| state.failures == 1).await;
    assert_eq!(who(&it.materials).as_deref(), Some(REVIEWS));
    assert_eq!(*it.materials.trust_domains(), ["cluster.local"]);
}

#[tokio::test(start_paused = true)]
async fn pa_05_one_of_several_identities_is_chosen_by_hint_or_by_name() {
    let ca = authority("cluster.local");
    let ratings = "spiffe://cluster.local/ns/default/sa/ratings";
    let all = || {
        let hinted = |id: &str, hint: &str| {
            let mut svid = svid(&ca, id);
            svid.hint = hint.to_owned();
            svid
        };
        says([hinted(REVIEWS, "external"), hinted(PRODUCTPAGE, "internal"), hinted(ratings, "internal")])
    };
    let hint = |hint: &str| SvidChoice::Hint(hint.to_owned());
    for (choice, takes) in [
        (SvidChoice::First, Ok(REVIEWS)),
        (hint("internal"), Ok(PRODUCTPAGE)),
        (SvidChoice::Id(spiffe(ratings)), Ok(ratings)),
        (
            hint("other"),
            Err(
                "no identity has the hint \"other\"; there are: spiffe://cluster.local/ns/default/sa/reviews, ",
            ),
        ),
        (
            SvidChoice::Id(spiffe("spiffe://cluster.local/x")),
            Err("spiffe://cluster.local/x is not among the identities"),
        ),
    ] {
        let agent = Scripted::new();
        let say = agent.answer();
        let mut it = Running::start(agent.source(1).choose(choice));
        say.send(all()).unwrap();
        it.until(|state| state.received + u64::from(state.failures) == 1).await;
        match takes {
            Ok(id) => assert_eq!(who(&it.materials).as_deref(), Some(id)),
            Err(reason) => {
                let error = it.state.borrow().last_error.clone().unwrap();
                assert!(error.contains(reason) && who(&it.materials).is_none(), "{error}");
            }
        }
    }
}
