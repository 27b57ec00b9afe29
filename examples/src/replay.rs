//! `sidecar --replay`: captured requests asked of another version, and where its answers differ.
//!
//! The requests come from `/mirror_diff?captured` of a proxy that compares and captures (VS-P05), one JSON object a
//! line. Each is sent to `--against`, one after the other, with the authority and the headers that were kept of it. Its
//! answer is compared with the one that was captured, or, with `--baseline`, with what that version answers now; that is
//! then asked twice, so that it is known what is noise, which takes ten requests at least. What is neither GET nor HEAD
//! is asked of the baseline once.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::uri::Scheme;
use http::{Method, Request, Response, Uri};
use http_body_util::BodyExt as _;
use mesh_core::mirrored::MirrorId;
use mesh_core::{Body, ClusterName, Error, Slot};
use mesh_route::diff::{Answer, Captured, Difference, Tally, Verdict, compare};
use mesh_route::{
    Cluster, ClusterSpec, Clusters, Discovery, EndpointSpec, RouteBuilder, RouteTable, SelectRouteLayer,
    Shard, dispatch,
};
use tower::util::BoxCloneSyncService;
use tower::{ServiceBuilder, ServiceExt as _};

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The most bytes of a body that are compared.
const MOST_BODY: usize = 1024 * 1024;

/// The most requests that are shown one by one.
const MOST_SHOWN: usize = 10;

/// A version that is asked.
struct Version {
    client: BoxCloneSyncService<Request<Body>, Response<Body>, Error>,
    mark: MirrorId,
}

/// What came of a file.
#[derive(Debug, Default)]
pub struct Report {
    tally: Tally,
    compared: Vec<(String, Vec<Difference>)>,
    failed: Vec<String>,
    cut: usize,
}

/// Asks every request of a file of `against`, and of `baseline` too when there is one.
///
/// # Errors
/// When the file cannot be read, a line is no captured request, or a URL cannot be asked.
pub async fn run(file: &Path, against: &Uri, baseline: Option<&Uri>) -> Result<Report, String> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let mut requests = Vec::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let parsed = Captured::parse(line);
        requests.push(parsed.map_err(|error| format!("{}:{number}: {error}", file.display()))?);
    }
    let against = Version::at(against).await?;
    let baseline = match baseline {
        None => None,
        Some(url) => Some(Version::at(url).await?),
    };
    let mut report = Report::default();
    for captured in &requests {
        report.add(captured, &against, baseline.as_ref()).await;
    }
    Ok(report)
}

impl Version {
    async fn at(url: &Uri) -> Result<Self, String> {
        let authority = match url.authority() {
            Some(authority) if url.scheme() == Some(&Scheme::HTTP) && matches!(url.path(), "" | "/") => {
                authority
            }
            _ => {
                return Err(format!("{url}: expected http://HOST:PORT, whose requests have their own paths"));
            }
        };
        let to = (authority.host().trim_matches(['[', ']']), authority.port_u16().unwrap_or(80));
        let found = tokio::net::lookup_host(to).await.map_err(|error| format!("{url}: {error}"))?;
        let endpoints = found.map(EndpointSpec::new).collect();
        let spec = ClusterSpec::new(ClusterName::custom("replay"), Discovery::Static(endpoints));
        let cluster = Arc::new(Cluster::new(spec));
        Clusters::new().reconcile(std::slice::from_ref(&cluster));
        let route = RouteBuilder::new("replay").forward(cluster);
        let table = route.and_then(|route| RouteTable::builder().host("*", [route]).build());
        let table = table.map_err(|error| error.to_string())?;
        let client = ServiceBuilder::new()
            .layer(SelectRouteLayer::new(Slot::fixed(table)))
            .service(dispatch(Shard::new()));
        Ok(Self { client: BoxCloneSyncService::new(client), mark: MirrorId::new(0) })
    }

    /// Bounded here: a timeout of the route would be announced in a header, which is none of the request's.
    async fn ask(&self, captured: &Captured) -> Result<Answer, String> {
        let answer = tokio::time::timeout(TIMEOUT, self.exchange(captured)).await;
        answer.unwrap_or_else(|_| Err(format!("no answer within {} s", TIMEOUT.as_secs())))
    }

    async fn exchange(&self, captured: &Captured) -> Result<Answer, String> {
        let uri = Uri::builder().scheme("http").authority(captured.authority.as_str());
        let uri = uri.path_and_query(captured.path.clone()).build().map_err(|error| error.to_string())?;
        let mut request = Request::new(Body::full(captured.body.clone()));
        *request.method_mut() = captured.method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = captured.headers.clone();
        // It is a copy, and nobody is to copy it.
        self.mark.mark(request.headers_mut());
        let response = self.client.clone().oneshot(request).await.map_err(|error| error.to_string())?;
        let (head, mut body) = response.into_parts();
        let (mut kept, mut cut) = (BytesMut::new(), false);
        while let Some(frame) = body.frame().await {
            let data = frame.map_err(|error| error.to_string())?.into_data().unwrap_or_else(|_| Bytes::new());
            let room = MOST_BODY - kept.len();
            kept.extend_from_slice(&data[..data.len().min(room)]);
            if data.len() > room {
                cut = true;
                break;
            }
        }
        Ok(Answer { status: head.status, headers: head.headers, body: kept.freeze(), cut })
    }
}

impl Report {
    async fn add(&mut self, captured: &Captured, against: &Version, baseline: Option<&Version>) {
        let name = format!("{} {}{}", captured.method, captured.authority, captured.path);
        let expected = match baseline {
            None => Ok(captured.response.clone()),
            Some(baseline) => baseline.ask(captured).await,
        };
        let (expected, other) = match (expected, against.ask(captured).await) {
            (Ok(expected), Ok(other)) => (expected, other),
            (Err(error), _) => {
                return self.failed.push(format!("{name}: the baseline gives no answer: {error}"));
            }
            (_, Err(error)) => return self.failed.push(format!("{name}: {error}")),
        };
        if let Some(baseline) = baseline.filter(|_| matches!(captured.method, Method::GET | Method::HEAD))
            && let Ok(again) = baseline.ask(captured).await
        {
            self.tally.add_baseline(&compare(&captured.compare, &expected, &again));
        }
        let differences = compare(&captured.compare, &expected, &other);
        if differences.is_empty() && (expected.cut || other.cut) {
            self.cut += 1;
            return;
        }
        self.tally.add(&differences);
        self.compared.push((name, differences));
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.compared.iter().filter(|(_, differences)| self.tally.verdict(differences) == verdict).count()
    }

    /// Whether every request was answered, and as it should be.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.failed.is_empty() && self.count(Verdict::Different) == 0
    }

    /// The table that is printed. Everything is judged by what is known at the end.
    #[must_use]
    pub fn table(&self) -> String {
        let mut out = format!(
            "{} requests: {} equal, {} differ by noise, {} differ, {} too large to compare, {} without an answer\n",
            self.compared.len() + self.cut + self.failed.len(),
            self.count(Verdict::Equal),
            self.count(Verdict::Noise),
            self.count(Verdict::Different),
            self.cut,
            self.failed.len(),
        );
        // Writing to a String cannot fail.
        let places = self.tally.places();
        if !places.is_empty() {
            let width = places.iter().map(|(place, ..)| place.chars().count()).max().unwrap_or(0).max(5);
            let _ = writeln!(out, "\n{:<width$}  how      differ  baseline", "place");
            for (place, kind, differed, baseline, noise) in places {
                let noise = if noise { "  noise" } else { "" };
                let _ = writeln!(
                    out,
                    "{place:<width$}  {:<7}  {differed:>6}  {baseline:>8}{noise}",
                    kind.as_str()
                );
            }
        }
        let different =
            self.compared.iter().filter(|(_, found)| self.tally.verdict(found) == Verdict::Different);
        for (name, differences) in different.take(MOST_SHOWN) {
            let _ = writeln!(out, "\n{name}");
            for difference in differences.iter().filter(|difference| !self.tally.is_noise(difference)) {
                let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".to_owned());
                let (ours, theirs) = (text(&difference.primary), text(&difference.other));
                let _ = writeln!(out, "  {}: {ours} is now {theirs}", difference.path);
            }
        }
        for failed in self.failed.iter().take(MOST_SHOWN) {
            let _ = writeln!(out, "\n{failed}");
        }
        out
    }
}
