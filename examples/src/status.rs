//! What Istio's agent answers on its status port (15020) beside health and statistics (PT-01).
//!
//! | path | who may ask | what it does |
//! |---|---|---|
//! | POST `/quitquitquit` | this host | ends the process as SIGTERM does; asked again it has no effect |
//! | POST `/drain` | this host | drains the listeners; the process stays until a signal or `/quitquitquit` |
//! | `/app-health/CONTAINER/{livez,readyz,startupz}` | anyone | asks the application what the kubelet would ask it |
//!
//! The injector rewrites the probes of a pod so that the kubelet, which has no certificate of the mesh, asks the agent, and
//! leaves what they were in `ISTIO_KUBE_APP_PROBERS`. The semantics are those of Istio's `pilot-agent/status/server.go`: the
//! kubelet's headers are passed on, the status and the first 10 KiB of the application's answer come back, a redirect that
//! leads elsewhere is a success, no answer in time is 500, and a path without a prober is 400. What differs: without
//! `timeoutSeconds` a probe takes Kubernetes' 1 s, not forever, and a probe by gRPC or HTTPS is answered with 501 and logged.
//!
//! Probes go to `INSTANCE_IP`, the address of the pod (default 127.0.0.1), from 127.0.0.6, which Istio's iptables rules do
//! not redirect to the proxy.
//!
//! A request only asks: [`Controls`] tells the loop that also hears the signals, once the answer is written.

use std::collections::BTreeMap;
use std::env::{self, VarError};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ALLOW, CONNECTION, CONTENT_LENGTH, HOST, LOCATION, TRANSFER_ENCODING, UPGRADE};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use mesh_core::{Body, BodyHook, EndOfBody, RequestContext};
use serde_json::Value;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// Where the injector leaves the probes of the application.
pub const PROBERS: &str = "ISTIO_KUBE_APP_PROBERS";
/// Where the injector leaves the address of the pod.
const INSTANCE_IP: &str = "INSTANCE_IP";
/// The source of what the agent itself sends to the application.
const FROM: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);
/// Kubernetes' default of `timeoutSeconds`.
const TIMEOUT: Duration = Duration::from_secs(1);
/// The most bytes of the application's answer that are passed on.
const MOST_BODY: usize = 10 * 1024;
/// After so many redirects a probe has failed.
const MOST_REDIRECTS: usize = 10;

/// What the status port asks of the process.
#[derive(Clone, Debug, Default)]
pub struct Controls {
    /// To drain and end.
    pub quit: Arc<Notify>,
    /// To drain and stay.
    pub drain: Arc<Notify>,
}

/// The probes of the application, by the path that the kubelet asks.
#[derive(Debug)]
pub struct Probers {
    probers: BTreeMap<String, Prober>,
    to: IpAddr,
}

#[derive(Debug)]
struct Prober {
    action: Action,
    timeout: Duration,
}

#[derive(Debug)]
enum Action {
    Http {
        port: u16,
        path: PathAndQuery,
        headers: HeaderMap,
    },
    Tcp {
        port: u16,
    },
    /// What is not probed, in words.
    Unsupported(&'static str),
}

impl Controls {
    /// The answer to `/quitquitquit` and `/drain`; `None` for every other path.
    #[must_use]
    pub fn answer(&self, head: &Parts) -> Option<Response<Body>> {
        let asked = match head.uri.path() {
            "/quitquitquit" => &self.quit,
            "/drain" => &self.drain,
            _ => return None,
        };
        let context = head.extensions.get::<RequestContext>();
        if !context.is_some_and(|cx| cx.conn().peer.ip().to_canonical().is_loopback()) {
            return Some(reply(StatusCode::FORBIDDEN, "only requests from localhost are allowed\n"));
        }
        if head.method != Method::POST {
            let mut response = reply(StatusCode::METHOD_NOT_ALLOWED, "this is asked for with POST\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
            return Some(response);
        }
        tracing::info!("{} was asked for", head.uri.path());
        // The process may end at once, so nothing is asked before the answer is on its way.
        Some(reply(StatusCode::OK, "OK").map(|body| body.with_hook(Ask(Arc::clone(asked)))))
    }
}

/// Asks when the body ends, be it read or not.
struct Ask(Arc<Notify>);

impl BodyHook for Ask {
    fn on_end(&mut self, _end: EndOfBody<'_>) {
        self.0.notify_one();
    }
}

impl Probers {
    /// The probes that the environment names; none when it names none.
    ///
    /// # Errors
    /// When a variable cannot be read; the error begins with its name.
    pub fn from_env() -> Result<Self, String> {
        let read = |name: &str| match env::var(name) {
            Ok(text) => Ok(text),
            Err(VarError::NotPresent) => Ok(String::new()),
            Err(error) => Err(format!("{name}: {error}")),
        };
        let probers = read(PROBERS)?;
        if probers.is_empty() {
            return Ok(Self { probers: BTreeMap::new(), to: Ipv4Addr::LOCALHOST.into() });
        }
        let to = match read(INSTANCE_IP)?.as_str() {
            "" => Ipv4Addr::LOCALHOST.into(),
            text => text.parse().map_err(|error| format!("{INSTANCE_IP}: `{text}`: {error}"))?,
        };
        Ok(Self { probers: parse(&probers).map_err(|error| format!("{PROBERS}: {error}"))?, to })
    }

    /// Whether a path is one of probes, known or not.
    #[must_use]
    pub fn owns(path: &str) -> bool {
        path.starts_with("/app-health/") || path.starts_with("/app-lifecycle/")
    }

    /// Probes the application for the kubelet.
    pub async fn answer(&self, head: &Parts) -> Response<Body> {
        let path = head.uri.path();
        let Some(prober) = self.probers.get(path) else {
            tracing::error!("there is no prober for {path}");
            return reply(StatusCode::BAD_REQUEST, format!("there is no prober for {path}\n"));
        };
        let probing = async {
            match &prober.action {
                Action::Http { port, path, headers } => self.http(head, *port, path, headers).await,
                Action::Tcp { port } => self.connect(*port).await.map(|_| reply(StatusCode::OK, "")),
                Action::Unsupported(what) => {
                    tracing::error!("{path}: {what} is not probed");
                    Ok(reply(StatusCode::NOT_IMPLEMENTED, format!("{what} is not probed\n")))
                }
            }
        };
        let probed = tokio::time::timeout(prober.timeout, probing).await;
        let probed = probed.unwrap_or_else(|_| Err(format!("no answer within {:?}", prober.timeout)));
        probed.unwrap_or_else(|error| {
            tracing::error!("{path}: the probe of the application failed: {error}");
            reply(StatusCode::INTERNAL_SERVER_ERROR, "")
        })
    }

    async fn connect(&self, port: u16) -> Result<TcpStream, String> {
        let connecting = async {
            let socket = if self.to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            if self.to.is_ipv4() {
                // A system that has not all of 127.0.0.0/8 has no iptables either.
                let _ = socket.bind(SocketAddr::from((FROM, 0)));
            }
            socket.connect(SocketAddr::new(self.to, port)).await
        };
        connecting.await.map_err(|error| format!("{}: {error}", SocketAddr::new(self.to, port)))
    }

    async fn http(
        &self,
        head: &Parts,
        mut port: u16,
        path: &PathAndQuery,
        configured: &HeaderMap,
    ) -> Result<Response<Body>, String> {
        let mut headers = head.headers.clone();
        for (name, value) in configured {
            // The kubelet sends these too, and it has the last word.
            headers.entry(name).or_insert_with(|| value.clone());
        }
        for name in [CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE] {
            headers.remove(name);
        }
        headers.insert(HOST, self.host(head, port)?);
        let mut path = path.clone();
        for _ in 0..=MOST_REDIRECTS {
            let mut request = Request::new(Empty::<Bytes>::new());
            *request.uri_mut() = Uri::from(path.clone());
            *request.headers_mut() = headers.clone();
            let stream = self.connect(port).await?;
            let exchange = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
            let (mut sender, connection) = exchange.map_err(|error| error.to_string())?;
            // Aborted when it is dropped, and with it the connection is closed: each probe has its own.
            let mut driver = JoinSet::new();
            driver.spawn(connection);
            let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
            if !response.status().is_redirection() {
                return pass_on(response).await;
            }
            let Some((next_port, next)) = self.redirect(&response, port) else {
                return Ok(reply(StatusCode::OK, ""));
            };
            // What follows is asked of the address that the redirect names.
            (port, path) = (next_port, next);
            headers.insert(HOST, host_value(&SocketAddr::new(self.to, port).to_string())?);
        }
        Err(format!("more than {MOST_REDIRECTS} redirects"))
    }

    /// The host that the kubelet asked for, with the port of the application in the place of ours.
    fn host(&self, head: &Parts, port: u16) -> Result<HeaderValue, String> {
        let asked = head.headers.get(HOST).and_then(|host| host.to_str().ok());
        let asked = asked.or_else(|| head.uri.authority().map(Authority::as_str));
        let Some(asked) = asked else { return host_value(&SocketAddr::new(self.to, port).to_string()) };
        let own = head.extensions.get::<RequestContext>().map(|cx| cx.conn().local.port());
        match asked.parse::<Authority>() {
            Ok(authority) if own.is_some() && authority.port_u16() == own => {
                host_value(&format!("{}:{port}", authority.host()))
            }
            _ => host_value(asked),
        }
    }

    /// Where a redirect leads, as long as it stays at the application.
    fn redirect(&self, response: &Response<Incoming>, port: u16) -> Option<(u16, PathAndQuery)> {
        let location: Uri = response.headers().get(LOCATION)?.to_str().ok()?.parse().ok()?;
        let path = location.path_and_query()?.clone();
        let Some(authority) = location.authority() else { return Some((port, path)) };
        let stays = location.scheme() == Some(&Scheme::HTTP)
            && authority.host().trim_matches(['[', ']']).parse() == Ok(self.to);
        stays.then(|| (authority.port_u16().unwrap_or(80), path))
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

fn reply(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::full(body));
    *response.status_mut() = status;
    response
}

fn parse(text: &str) -> Result<BTreeMap<String, Prober>, String> {
    let parsed: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let probers = parsed.as_object().ok_or("expected an object of probers by path")?;
    let one = |(path, prober): (&String, &Value)| {
        let prober = prober_of(path, prober).map_err(|error| format!("{path}: {error}"))?;
        Ok((path.clone(), prober))
    };
    probers.iter().map(one).collect()
}

fn prober_of(path: &str, prober: &Value) -> Result<Prober, String> {
    let mut segments = path.split('/');
    let known = segments.next() == Some("")
        && matches!(segments.next(), Some("app-health" | "app-lifecycle"))
        && segments.next().is_some_and(|container| !container.is_empty())
        && matches!(segments.next(), Some("livez" | "readyz" | "startupz" | "prestopz" | "poststartz"))
        && segments.next().is_none();
    if !known {
        return Err("expected /app-health/CONTAINER/livez, readyz or startupz".to_owned());
    }
    let timeout = match &prober["timeoutSeconds"] {
        Value::Null => TIMEOUT,
        value => match value.as_u64().ok_or("timeoutSeconds: expected a number of seconds")? {
            0 => TIMEOUT,
            seconds => Duration::from_secs(seconds),
        },
    };
    let action = match (&prober["httpGet"], &prober["tcpSocket"], &prober["grpc"]) {
        (http @ Value::Object(_), Value::Null, Value::Null) => http_get(http)?,
        (Value::Null, tcp @ Value::Object(_), Value::Null) => Action::Tcp { port: port_of(tcp)? },
        (Value::Null, Value::Null, Value::Object(_)) => Action::Unsupported("gRPC"),
        _ => return Err("expected one of httpGet, tcpSocket and grpc".to_owned()),
    };
    Ok(Prober { action, timeout })
}

fn http_get(http: &Value) -> Result<Action, String> {
    let port = port_of(http)?;
    match http["scheme"].as_str() {
        None | Some("" | "HTTP") => {}
        Some("HTTPS") => return Ok(Action::Unsupported("HTTPS")),
        Some(other) => return Err(format!("scheme: `{other}` is neither HTTP nor HTTPS")),
    }
    let path = http["path"].as_str().unwrap_or("");
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let path = PathAndQuery::try_from(path).map_err(|error| format!("path: {error}"))?;
    let mut headers = HeaderMap::new();
    for header in http["httpHeaders"].as_array().into_iter().flatten() {
        let text = |field: &str| header[field].as_str().ok_or(format!("httpHeaders: {field} is missing"));
        let name = HeaderName::try_from(text("name")?).map_err(|error| format!("httpHeaders: {error}"))?;
        let value = HeaderValue::try_from(text("value")?).map_err(|error| format!("httpHeaders: {error}"))?;
        headers.append(name, value);
    }
    Ok(Action::Http { port, path, headers })
}

fn port_of(action: &Value) -> Result<u16, String> {
    let port = action["port"].as_u64().and_then(|port| u16::try_from(port).ok());
    port.filter(|port| *port != 0).ok_or_else(|| format!("port: {} is not a port number", action["port"]))
}

#[cfg(test)]
mod tests {
    use mesh_core::{ConnInfo, Direction};

    use super::*;

    #[test]
    fn pt_01_only_this_host_may_end_the_process() {
        let controls = Controls::default();
        let status = |peer: &str, path: &str| {
            let mut conn = ConnInfo::unknown(Direction::Inbound);
            conn.peer = peer.parse().unwrap();
            let mut request = Request::post(path).body(()).unwrap();
            let context = RequestContext::new(Arc::new(conn), None, mesh_core::clock::now());
            request.extensions_mut().insert(context);
            controls.answer(&request.into_parts().0).unwrap().status()
        };
        for path in ["/quitquitquit", "/drain"] {
            for (peer, expected) in [
                ("127.0.0.1:1", StatusCode::OK),
                ("[::1]:1", StatusCode::OK),
                ("[::ffff:127.0.0.1]:1", StatusCode::OK),
                ("10.0.0.1:1", StatusCode::FORBIDDEN),
                ("[2001:db8::1]:1", StatusCode::FORBIDDEN),
            ] {
                assert_eq!(status(peer, path), expected, "{peer} {path}");
            }
        }
    }

    #[test]
    fn pt_01_probers_that_cannot_be_meant_are_refused() {
        for (text, reason) in [
            ("{", "EOF"),
            ("[]", "expected an object"),
            (r#"{"/healthz":{"tcpSocket":{"port":1}}}"#, "/healthz: expected /app-health/"),
            (r#"{"/app-health/a/livez":{}}"#, "expected one of"),
            (r#"{"/app-health/a/livez":{"httpGet":{"port":"http"}}}"#, "\"http\" is not a port number"),
            (r#"{"/app-health/a/livez":{"tcpSocket":{"port":70000}}}"#, "70000 is not a port number"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert_eq!(parse(r#"{"/app-lifecycle/a/prestopz":{"httpGet":{"port":1}}}"#).unwrap().len(), 1);
    }
}
