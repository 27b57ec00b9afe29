//! The probes of the application that the kubelet asks the agent for.
//!
//! The injector rewrites the probes of a pod so that the kubelet, which has no certificate of the mesh, asks the agent, and
//! leaves what they were in `ISTIO_KUBE_APP_PROBERS`. Here they are read, and what all of them share is done: finding the
//! prober, its time, and the connection to the application.

use std::collections::BTreeMap;
use std::env::{self, VarError};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::header::USER_AGENT;
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use mesh_core::Body;
use rustls::crypto::CryptoProvider;
use serde_json::Value;
use tokio::net::{TcpSocket, TcpStream};

use super::http::HttpGet;
use super::unverified::Unverified;
use super::{grpc, reply};

/// Where the injector leaves the probes of the application.
pub const PROBERS: &str = "ISTIO_KUBE_APP_PROBERS";
/// Where the injector leaves the address of the pod.
const INSTANCE_IP: &str = "INSTANCE_IP";
/// The sources of what the agent itself sends to the application.
const FROM_V4: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);
const FROM_V6: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);
/// Kubernetes' default of `timeoutSeconds`.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The probes of the application, by the path that the kubelet asks.
#[derive(Debug)]
pub struct Probers {
    probers: BTreeMap<String, Prober>,
    pod: Pod,
    tls: Unverified,
}

#[derive(Debug)]
struct Prober {
    action: Action,
    timeout: Duration,
}

#[derive(Debug)]
enum Action {
    Http(HttpGet),
    Tcp { port: u16 },
    Grpc { port: u16, service: String },
}

/// The pod whose application is probed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pod {
    pub(super) ip: IpAddr,
}

impl Probers {
    /// The probes that the environment names; none when it names none. HTTPS probes use `provider`.
    ///
    /// # Errors
    /// When a variable cannot be read; the error begins with its name.
    pub fn from_env(provider: Arc<CryptoProvider>) -> Result<Self, String> {
        let read = |name: &str| match env::var(name) {
            Ok(text) => Ok(text),
            Err(VarError::NotPresent) => Ok(String::new()),
            Err(error) => Err(format!("{name}: {error}")),
        };
        let tls = Unverified::new(provider)?;
        let probers = read(PROBERS)?;
        if probers.is_empty() {
            return Ok(Self { probers: BTreeMap::new(), pod: Pod { ip: Ipv4Addr::LOCALHOST.into() }, tls });
        }
        let ip = match read(INSTANCE_IP)?.as_str() {
            "" => Ipv4Addr::LOCALHOST.into(),
            text => text.parse().map_err(|error| format!("{INSTANCE_IP}: `{text}`: {error}"))?,
        };
        let probers = parse(&probers).map_err(|error| format!("{PROBERS}: {error}"))?;
        Ok(Self { probers, pod: Pod { ip }, tls })
    }

    /// Whether a path is one of probes, known or not.
    #[must_use]
    pub fn owns(path: &str) -> bool {
        path.starts_with("/app-health/") || path.starts_with("/app-lifecycle/")
    }

    /// Probes the application for the kubelet.
    ///
    /// No redirect is followed to a port that `is_own`.
    pub async fn answer(&self, head: &Parts, is_own: impl Fn(u16) -> bool) -> Response<Body> {
        let path = head.uri.path();
        let Some(prober) = self.probers.get(path) else {
            // Whoever reaches the port may ask, so it is not to fill the log.
            tracing::debug!("there is no prober for {path}");
            return reply(StatusCode::BAD_REQUEST, format!("there is no prober for {path}\n"));
        };
        let probing = async {
            match &prober.action {
                Action::Http(get) => get.probe(self.pod, &self.tls, head, is_own).await,
                Action::Tcp { port } => self.pod.connect(*port).await.map(|_| reply(StatusCode::OK, "")),
                Action::Grpc { port, service } => {
                    let stream = self.pod.connect(*port).await?;
                    let user_agent = head.headers.get(USER_AGENT);
                    let to = self.pod.at(*port);
                    grpc::check(stream, to, service, user_agent, prober.timeout).await?;
                    Ok(reply(StatusCode::OK, ""))
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
}

impl Pod {
    pub(super) fn at(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip, port)
    }

    /// Connects as Istio's agent does, from an address that its iptables rules do not redirect to the proxy.
    pub(super) async fn connect(self, port: u16) -> Result<TcpStream, String> {
        let to = self.at(port);
        let connecting = async {
            let (socket, from) = match self.ip {
                IpAddr::V4(_) => (TcpSocket::new_v4()?, IpAddr::V4(FROM_V4)),
                IpAddr::V6(_) => (TcpSocket::new_v6()?, IpAddr::V6(FROM_V6)),
            };
            // A system that does not have the address has none of Istio's rules either.
            let _ = socket.bind(SocketAddr::new(from, 0));
            socket.connect(to).await
        };
        connecting.await.map_err(|error| format!("{to}: {error}"))
    }
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
        (http @ Value::Object(_), Value::Null, Value::Null) => Action::Http(http_get(http)?),
        (Value::Null, tcp @ Value::Object(_), Value::Null) => Action::Tcp { port: port_of(tcp)? },
        (Value::Null, Value::Null, grpc @ Value::Object(_)) => {
            let service = match &grpc["service"] {
                Value::Null => String::new(),
                Value::String(service) => service.clone(),
                other => return Err(format!("service: {other} is not a name")),
            };
            Action::Grpc { port: port_of(grpc)?, service }
        }
        _ => return Err("expected one of httpGet, tcpSocket and grpc".to_owned()),
    };
    Ok(Prober { action, timeout })
}

fn http_get(http: &Value) -> Result<HttpGet, String> {
    let port = port_of(http)?;
    let secure = match http["scheme"].as_str() {
        None | Some("" | "HTTP") => false,
        Some("HTTPS") => true,
        Some(other) => return Err(format!("scheme: `{other}` is neither HTTP nor HTTPS")),
    };
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
    Ok(HttpGet { secure, port, path, headers })
}

fn port_of(action: &Value) -> Result<u16, String> {
    let port = action["port"].as_u64().and_then(|port| u16::try_from(port).ok());
    port.filter(|port| *port != 0).ok_or_else(|| format!("port: {} is not a port number", action["port"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pt_01_probers_that_cannot_be_meant_are_refused() {
        for (text, reason) in [
            ("{", "EOF"),
            ("[]", "expected an object"),
            (r#"{"/healthz":{"tcpSocket":{"port":1}}}"#, "/healthz: expected /app-health/"),
            (r#"{"/app-health/a/livez":{}}"#, "expected one of"),
            (r#"{"/app-health/a/livez":{"grpc":{"port":1},"tcpSocket":{"port":1}}}"#, "expected one of"),
            (r#"{"/app-health/a/livez":{"httpGet":{"port":"http"}}}"#, "\"http\" is not a port number"),
            (r#"{"/app-health/a/livez":{"httpGet":{"port":1,"scheme":"FTP"}}}"#, "`FTP` is neither"),
            (r#"{"/app-health/a/livez":{"tcpSocket":{"port":70000}}}"#, "70000 is not a port number"),
            (r#"{"/app-health/a/livez":{"grpc":{"port":"grpc"}}}"#, "\"grpc\" is not a port number"),
            (r#"{"/app-health/a/livez":{"grpc":{"port":1,"service":2}}}"#, "service: 2 is not a name"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert_eq!(parse(r#"{"/app-lifecycle/a/prestopz":{"httpGet":{"port":1}}}"#).unwrap().len(), 1);
    }
}
