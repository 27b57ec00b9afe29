//! The application's page of metrics behind our own, so that one scrape of the status port gets both.
//!
//! The injector points Prometheus at the status port, and leaves what the pod's `prometheus.io/` annotations said in
//! `ISTIO_PROMETHEUS_ANNOTATIONS`: `{"scrape":"true","path":"/metrics","port":"9090"}`. As in Istio's agent the pages are
//! written one after the other, the application's last, because one in OpenMetrics ends the whole; its content type is
//! that of the whole. An application that fails costs its own metrics only: that is logged and counted
//! (`mesh_application_scrape_failures_total`), and the scrape succeeds.
//!
//! The application's page is passed on while it comes and never held as a whole. It ends with its last whole line where it
//! breaks off, takes too long or gets too long, and with `# EOF` all the same where it is OpenMetrics.
//!
//! What differs from Istio: the application has nine tenths of the scraper's time, or ours would come too late as well; it
//! is not offered protobuf, which cannot follow text; and a redirect is followed only at the same port and without TLS.

use std::convert::Infallible;
use std::env::{self, VarError};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{StreamExt as _, unfold};
use http::header::{ACCEPT, CONTENT_ENCODING, CONTENT_TYPE, HOST, USER_AGENT};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Incoming;
use mesh_core::Body;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::http::{MOST_REQUESTS, get, in_words, redirect};
use super::location::Location;
use super::page::{Format, Lines};

/// Where the injector leaves the annotations of the pod.
pub const ANNOTATIONS: &str = "ISTIO_PROMETHEUS_ANNOTATIONS";
/// How Prometheus says how long it waits.
const SCRAPE_TIMEOUT: &str = "x-prometheus-scrape-timeout-seconds";
/// Prometheus' default of `scrape_timeout`, for a scraper that does not say.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The longest that anybody is waited for, whatever the scraper says.
const MOST_TIME: Duration = Duration::from_secs(300);

/// The application's metrics.
#[derive(Debug)]
pub struct Metrics {
    /// `None` when nobody asked for them.
    of: Option<Location>,
    failures: Arc<AtomicU64>,
}

impl Metrics {
    /// No application's.
    #[must_use]
    pub fn none() -> Self {
        Self { of: None, failures: Arc::default() }
    }

    /// Those that the environment names; none when it names none, or when it says `"scrape":"false"`.
    ///
    /// # Errors
    /// When the variable cannot be read; the error begins with its name.
    pub fn from_env() -> Result<Self, String> {
        let of = match env::var(ANNOTATIONS) {
            Err(VarError::NotPresent) => None,
            Ok(text) if text.is_empty() => None,
            Ok(text) => parse(&text).map_err(|error| format!("{ANNOTATIONS}: {error}"))?,
            Err(error) => return Err(format!("{ANNOTATIONS}: {error}")),
        };
        Ok(Self { of, ..Self::none() })
    }

    /// Refuses to scrape a port of our own that has metrics: each scrape would ask for the next.
    ///
    /// # Errors
    /// When the application's port is `own`.
    pub fn refuse(&self, own: u16) -> Result<(), String> {
        match &self.of {
            Some(of) if of.port == own => Err(format!(
                "{ANNOTATIONS}: port {own} is our own and not the application's: it would be scraped for ever"
            )),
            _ => Ok(()),
        }
    }

    /// How many pages of the application did not come, or not whole.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Our `own` page, and behind it that of the application.
    pub async fn merge(&self, own: String, head: &Parts) -> Response<Body> {
        let Some(of) = &self.of else { return page(Format::Text, Body::from(own)) };
        let time = time_of(&head.headers);
        let deadline = Instant::now() + time;
        let asked = timeout_at(deadline, ask(of, &head.headers)).await;
        match asked.unwrap_or_else(|_| Err(format!("no answer within {time:?}"))) {
            Ok((response, driver)) => {
                let format = Format::of(response.headers().get(CONTENT_TYPE));
                let rest = Rest {
                    body: response.into_body(),
                    deadline,
                    lines: Lines::new(format),
                    failures: Arc::clone(&self.failures),
                    ended: false,
                    _driver: driver,
                };
                let pieces = unfold((Some(own), rest), piece);
                let frames = pieces.map(|data| Ok::<_, Infallible>(Frame::data(data)));
                page(format, Body::new(StreamBody::new(frames)))
            }
            Err(error) => {
                failed(&self.failures, &error);
                page(Format::Text, Body::from(own))
            }
        }
    }
}

/// The next piece of the whole, with what follows it.
async fn piece((own, mut rest): (Option<String>, Rest)) -> Option<(Bytes, (Option<String>, Rest))> {
    let data = match own {
        Some(own) => Bytes::from(own),
        None => rest.next().await?,
    };
    Some((data, (None, rest)))
}

/// What is still to come of the application's page.
struct Rest {
    body: Incoming,
    deadline: Instant,
    lines: Lines,
    failures: Arc<AtomicU64>,
    ended: bool,
    /// Closes the connection when it is dropped.
    _driver: JoinSet<()>,
}

impl Rest {
    async fn next(&mut self) -> Option<Bytes> {
        while !self.ended {
            let error = match timeout_at(self.deadline, self.body.frame()).await {
                Err(_) => Some("it was not at its end in time".to_owned()),
                Ok(Some(Err(error))) => Some(in_words(error)),
                Ok(Some(Ok(frame))) => match self.lines.push(&frame.into_data().unwrap_or_default()) {
                    Ok(lines) if lines.is_empty() => continue,
                    Ok(lines) => return Some(lines),
                    Err(error) => Some(error),
                },
                Ok(None) => None,
            };
            self.ended = true;
            let (last, error) = self.lines.end(error);
            if let Some(error) = error {
                failed(&self.failures, &error);
            }
            return Some(last).filter(|last| !last.is_empty());
        }
        None
    }
}

fn failed(failures: &AtomicU64, error: &str) {
    failures.fetch_add(1, Ordering::Relaxed);
    tracing::error!("the application's metrics are not all there: {error}");
}

/// Asks the application for its page.
async fn ask(of: &Location, scraper: &HeaderMap) -> Result<(Response<Incoming>, JoinSet<()>), String> {
    let mut headers = HeaderMap::new();
    for name in [USER_AGENT.as_str(), SCRAPE_TIMEOUT] {
        if let Some(value) = scraper.get(name) {
            headers.insert(name, value.clone());
        }
    }
    if let Some(accepted) = accepted(scraper) {
        headers.insert(ACCEPT, accepted);
    }
    let mut at = of.clone();
    for _ in 0..MOST_REQUESTS {
        let host = HeaderValue::try_from(at.authority()).map_err(|error| error.to_string())?;
        headers.insert(HOST, host);
        let both = [
            SocketAddr::from((Ipv4Addr::LOCALHOST, at.port)),
            SocketAddr::from((Ipv6Addr::LOCALHOST, at.port)),
        ];
        let stream =
            TcpStream::connect(&both[..]).await.map_err(|error| format!("{}: {error}", at.authority()))?;
        let (response, driver) = get(stream, &at, &headers).await?;
        match redirect(&response, &at)? {
            Some((next, _)) if next.authority() == of.authority() && !next.secure => at = next,
            Some((next, _)) => return Err(format!("a redirect leads to {}", next.authority())),
            None if response.status() != StatusCode::OK => {
                return Err(format!("the status of {} is {}", at.path, response.status()));
            }
            None => return mergeable(response).map(|response| (response, driver)),
        }
    }
    Err(format!("more than {MOST_REQUESTS} requests, as each was answered with a redirect"))
}

/// Refuses a page that is not text as it stands.
fn mergeable<B>(response: Response<B>) -> Result<Response<B>, String> {
    let header = |name| response.headers().get(name).map_or(&b""[..], HeaderValue::as_bytes);
    let encoding = header(CONTENT_ENCODING);
    if !encoding.is_empty() && !encoding.eq_ignore_ascii_case(b"identity") {
        return Err(format!(
            "it is encoded as {}, which was not asked for",
            String::from_utf8_lossy(encoding)
        ));
    }
    if is_protobuf(header(CONTENT_TYPE)) {
        return Err("it is protobuf, which was not asked for".to_owned());
    }
    Ok(response)
}

/// What the scraper accepts, without protobuf.
fn accepted(scraper: &HeaderMap) -> Option<HeaderValue> {
    let all = scraper.get_all(ACCEPT).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let kept: Vec<_> =
        all.map(<[u8]>::trim_ascii).filter(|range| !range.is_empty() && !is_protobuf(range)).collect();
    HeaderValue::from_bytes(&kept.join(&b","[..])).ok().filter(|value| !value.is_empty())
}

fn is_protobuf(media_type: &[u8]) -> bool {
    let name = media_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    name.eq_ignore_ascii_case(b"application/vnd.google.protobuf")
}

/// Nine tenths of what the scraper waits.
fn time_of(scraper: &HeaderMap) -> Duration {
    let said = scraper.get(SCRAPE_TIMEOUT).and_then(|value| value.to_str().ok()?.parse().ok());
    let said = said.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    said.unwrap_or(TIMEOUT).min(MOST_TIME) * 9 / 10
}

fn page(format: Format, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    response
}

fn parse(text: &str) -> Result<Option<Location>, String> {
    let parsed: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if !parsed.is_object() {
        return Err("expected an object with scrape, path and port".to_owned());
    }
    let field = |of: &Value, name: &str| match &of[name] {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        other => Err(format!("{name}: {other} is not a string")),
    };
    let or = |first: String, other: &dyn Fn() -> Result<String, String>| {
        if first.is_empty() { other() } else { Ok(first) }
    };
    if field(&parsed, "scrape")? == "false" {
        return Ok(None);
    }
    let targets = parsed["targets"].as_array().map(Vec::as_slice).unwrap_or_default();
    let first = targets.first().unwrap_or(&Value::Null);
    let port = or(field(&parsed, "port")?, &|| field(first, "port"))?;
    let path = or(field(&parsed, "path")?, &|| field(first, "path"))?;
    if targets.len() > 1 {
        tracing::warn!("{ANNOTATIONS}: of {} targets only the first is scraped", targets.len());
    }
    let port: u16 =
        if port.is_empty() { 80 } else { port.parse().map_err(|_| format!("port: {port:?} is no port"))? };
    if port == 0 {
        return Err("port: 0 is no port".to_owned());
    }
    let path = if path.is_empty() { "/metrics".to_owned() } else { path };
    let path = if path.starts_with('/') { path } else { format!("/{path}") };
    let path = PathAndQuery::try_from(path).map_err(|error| format!("path: {error}"))?;
    Ok(Some(Location { secure: false, host: "localhost".to_owned(), port, path }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protobuf_is_not_offered() {
        let accepted = |values: &[&'static str]| {
            let values = values.iter().map(|value| (ACCEPT, HeaderValue::from_static(value)));
            let mut headers = HeaderMap::new();
            values.for_each(|(name, value)| {
                headers.append(name, value);
            });
            accepted(&headers).map(|value| value.to_str().unwrap().to_owned())
        };
        let proto = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6";
        assert_eq!(accepted(&[]), None);
        assert_eq!(accepted(&[proto]), None);
        assert_eq!(accepted(&["text/plain;q=0.5, */*;q=0.1"]).unwrap(), "text/plain;q=0.5,*/*;q=0.1");
        assert_eq!(
            accepted(&[proto, "application/openmetrics-text;version=1.0.0;q=0.5"]).unwrap(),
            "application/openmetrics-text;version=1.0.0;q=0.5"
        );
    }

    #[test]
    fn the_application_has_nine_tenths_of_the_scrapers_time() {
        let time = |said: Option<&'static str>| {
            let said = said.map(|said| (SCRAPE_TIMEOUT.parse().unwrap(), HeaderValue::from_static(said)));
            time_of(&said.into_iter().collect())
        };
        assert_eq!(time(None), Duration::from_secs(9));
        assert_eq!(time(Some("1.5")), Duration::from_millis(1350));
        assert_eq!(time(Some("100000")), Duration::from_secs(270));
        for nonsense in ["", "soon", "-1", "NaN", "inf", "1e300"] {
            assert_eq!(time(Some(nonsense)), Duration::from_secs(9), "{nonsense:?}");
        }
    }

    #[test]
    fn annotations_have_istios_defaults_and_errors() {
        let at = |text: &str| parse(text).unwrap().map(|at| format!("{}{}", at.authority(), at.path));
        assert_eq!(at("{}").unwrap(), "localhost:80/metrics");
        assert_eq!(at(r#"{"scrape":"false","port":"no"}"#), None);
        assert_eq!(at(r#"{"scrape":"true","path":"/m?a=b","port":"9090"}"#).unwrap(), "localhost:9090/m?a=b");
        assert_eq!(at(r#"{"targets":[{"port":"1","path":"/a"},{"port":"2"}]}"#).unwrap(), "localhost:1/a");
        for (text, reason) in [
            ("{", "EOF"),
            ("[]", "expected an object"),
            (r#"{"port":9090}"#, "port: 9090 is not a string"),
            (r#"{"port":"http"}"#, "port: \"http\" is no port"),
            (r#"{"port":"0"}"#, "port: 0 is no port"),
            (r#"{"path":"/a b"}"#, "path: "),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
