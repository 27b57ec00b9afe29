//! Probes by HTTP and HTTPS, and what both they and a scrape of the application need of a client.
//!
//! Each request has a connection of its own, as those of the kubelet have: what is asked is whether the application takes
//! one. The client follows redirects that stay at the same host, as the kubelet does. To another port or by another scheme
//! only the probe's own headers go along, and the user agent; and never to a port of ours, as what answers there is for
//! this host alone.

use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, LOCATION, TE, TRANSFER_ENCODING, UPGRADE, USER_AGENT};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::{Body, RequestContext};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;

use super::location::{self, Location};
use super::probers::Pod;
use super::reply;
use super::unverified::Unverified;

/// The most bytes of the application's answer that are passed on.
const MOST_BODY: usize = 10 * 1024;
/// The most requests of one probe, redirects and all; those of Go's client.
pub(super) const MOST_REQUESTS: usize = 10;
/// What is of one connection only and not passed on.
static HOP_BY_HOP: [HeaderName; 7] = [
    CONNECTION,
    CONTENT_LENGTH,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// A probe by GET.
#[derive(Debug)]
pub(super) struct HttpGet {
    pub(super) secure: bool,
    pub(super) port: u16,
    pub(super) path: PathAndQuery,
    pub(super) headers: HeaderMap,
}

impl HttpGet {
    pub(super) async fn probe(
        &self,
        pod: Pod,
        tls: &Unverified,
        head: &Parts,
        is_own: impl Fn(u16) -> bool,
    ) -> Result<Response<Body>, String> {
        let mut headers = self.headers_with(&head.headers);
        headers.insert(HOST, host(head, pod.at(self.port))?);
        let (secure, port, path) = (self.secure, self.port, self.path.clone());
        let mut at = Location { secure, host: pod.ip.to_string(), port, path };
        for _ in 0..MOST_REQUESTS {
            let stream = pod.connect(at.port).await?;
            let (response, _driver) = if at.secure {
                let (stream, http2) = tls.connect(pod.ip, stream).await?;
                if http2 {
                    http2_get(stream, &at, &headers).await?
                } else {
                    get(stream, &at, &headers).await?
                }
            } else {
                get(stream, &at, &headers).await?
            };
            if !response.status().is_redirection() {
                return pass_on(response).await;
            }
            match redirect(&response, &at)? {
                Some((next, keeps_host)) if next.host.parse() == Ok(pod.ip) => {
                    let is_elsewhere = (next.secure, next.port) != (at.secure, at.port);
                    if is_elsewhere && is_own(next.port) {
                        return Err(format!("a redirect leads to port {}, which is our own", next.port));
                    }
                    if is_elsewhere {
                        // Whoever listens there, or hears what is no secret any more, gets nothing of the caller.
                        let host = headers.remove(HOST);
                        headers = self.headers_with(&HeaderMap::new());
                        if let Some(user_agent) = head.headers.get(USER_AGENT) {
                            headers.entry(USER_AGENT).or_insert_with(|| user_agent.clone());
                        }
                        headers.extend(host.map(|host| (HOST, host)));
                    }
                    if !keeps_host {
                        headers.insert(HOST, host_value(&next.authority())?);
                    }
                    at = next;
                }
                _ => return Ok(reply(StatusCode::OK, "")),
            }
        }
        Err(format!("more than {MOST_REQUESTS} requests, as each was answered with a redirect"))
    }

    /// Those of the probe beside the caller's, which are the kubelet's and have the last word.
    fn headers_with(&self, callers: &HeaderMap) -> HeaderMap {
        let mut headers = callers.clone();
        for (name, value) in self.headers.iter().filter(|(name, _)| !callers.contains_key(*name)) {
            headers.append(name, value.clone());
        }
        for name in &HOP_BY_HOP {
            headers.remove(name);
        }
        headers
    }
}

/// Where a response sends its client, and whether the same host is asked for there; `None` when nowhere over HTTP.
///
/// # Errors
/// When that cannot be read.
pub(super) fn redirect<B>(
    response: &Response<B>,
    from: &Location,
) -> Result<Option<(Location, bool)>, String> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let Some(location) = response.headers().get(LOCATION).filter(|location| !location.is_empty()) else {
        return Ok(None);
    };
    let location = location.to_str().map_err(|_| "the location of a redirect cannot be read")?;
    Ok(from.resolve(location)?.map(|next| (next, !location::is_absolute(location))))
}

/// One GET over HTTP/1.1 with these headers, among them `Host`. What comes with the response drives its connection, and
/// closes it when it is dropped.
pub(super) async fn get(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    at: &Location,
    headers: &HeaderMap,
) -> Result<(Response<Incoming>, JoinSet<()>), String> {
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = Uri::from(at.path.clone());
    *request.headers_mut() = headers.clone();
    let exchange = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = exchange.map_err(in_words)?;
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        // The response, or the lack of one, says how it went.
        let _ = connection.await;
    });
    let response = sender.send_request(request).await.map_err(in_words)?;
    Ok((response, driver))
}

async fn http2_get(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    at: &Location,
    headers: &HeaderMap,
) -> Result<(Response<Incoming>, JoinSet<()>), String> {
    let mut headers = headers.clone();
    let host = headers.remove(HOST);
    let authority = host.and_then(|host| Authority::try_from(host.as_bytes()).ok());
    let authority = authority.map_or_else(|| at.authority(), |authority| authority.to_string());
    let uri = Uri::builder().scheme(Scheme::HTTPS).authority(authority).path_and_query(at.path.clone());
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = uri.build().map_err(|error| error.to_string())?;
    *request.headers_mut() = headers;
    let exchange = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = exchange.map_err(in_words)?;
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        let _ = connection.await;
    });
    let response = sender.send_request(request).await.map_err(in_words)?;
    Ok((response, driver))
}

/// An error of hyper with what caused it, which it does not say itself.
pub(super) fn in_words(error: hyper::Error) -> String {
    let mut words = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    words
}

/// The host that the kubelet asked for, with the port of the application in the place of ours.
fn host(head: &Parts, app: SocketAddr) -> Result<HeaderValue, String> {
    let asked = head.headers.get(HOST).and_then(|host| host.to_str().ok());
    let asked = asked.or_else(|| head.uri.authority().map(Authority::as_str));
    let Some(asked) = asked else { return host_value(&app.to_string()) };
    let own = head.extensions.get::<RequestContext>().map(|cx| cx.conn().local.port());
    match asked.parse::<Authority>() {
        Ok(authority) if own.is_some() && authority.port_u16() == own => {
            host_value(&format!("{}:{}", authority.host(), app.port()))
        }
        _ => host_value(asked),
    }
}

async fn pass_on(response: Response<Incoming>) -> Result<Response<Body>, String> {
    let (status, mut body, mut kept) = (response.status(), response.into_body(), BytesMut::new());
    while let Some(frame) = body.frame().await {
        // The status is what counts; a body that breaks off is passed on as far as it came.
        let Ok(frame) = frame else { break };
        let data = frame.into_data().unwrap_or_default();
        kept.extend_from_slice(&data[..data.len().min(MOST_BODY - kept.len())]);
        if kept.len() == MOST_BODY {
            break;
        }
    }
    Ok(reply(status, kept.freeze()))
}

fn host_value(host: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_str(host).map_err(|error| format!("host `{host}`: {error}"))
}
