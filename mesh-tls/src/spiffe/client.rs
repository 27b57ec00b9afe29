//! Asks an agent over its Unix socket, and reads what it says for as long as it says something.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderName, HeaderValue, Request, StatusCode, Version};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;

use super::message::X509SvidResponse;
use super::source::{Subscribe, Updates};
use super::{MAX_MESSAGE, PATH};
use crate::grpc::{APPLICATION_GRPC, Code, FRAME_HEAD, Status, frame};

/// The variable that says where the socket is, as SPIFFE names it.
pub const ENDPOINT_SOCKET: &str = "SPIFFE_ENDPOINT_SOCKET";

/// How long the beginning of an answer may take. One that has begun may be silent for hours.
const PATIENCE: Duration = Duration::from_secs(30);

/// Says that whoever asks knows what is asked: a request that was forged by way of a browser cannot have it.
const WORKLOAD: HeaderName = HeaderName::from_static("workload.spiffe.io");

/// The client of one agent. Cloning shares nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadApi {
    socket: PathBuf,
}

/// Text is no address of an agent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidEndpoint {
    /// There is none.
    #[error("{ENDPOINT_SOCKET} is not set")]
    Missing,
    /// It would send keys in plaintext, and whoever connects cannot be told from others.
    #[error("keys are not taken over TCP: write unix:///path")]
    Tcp,
    /// It is no `unix:///path`.
    #[error("expected unix:///path, absolute and without escapes")]
    Form,
}

/// Why there is no answer, in words for whoever has to mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkloadApiError {
    /// There is no connection.
    #[error("cannot connect to {}: {error}", .socket.display())]
    Connect {
        /// The agent's.
        socket: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The connection broke off.
    #[error("the connection to {} broke off: {reason}", .socket.display())]
    Broken {
        /// The agent's.
        socket: PathBuf,
        /// Why.
        reason: String,
    },
    /// There was no answer in time.
    #[error("{} did not answer within {PATIENCE:?}", .socket.display())]
    TooLate {
        /// The agent's.
        socket: PathBuf,
    },
    /// The agent refuses.
    #[error("the Workload API refuses: {0}")]
    Refused(Status),
    /// What came is no answer, or not one that can be taken.
    #[error("the answer of the Workload API is not taken: {0}")]
    Answer(String),
}

impl WorkloadApi {
    /// The agent at `endpoint`: `unix:///path`, or `unix:/path`.
    ///
    /// # Errors
    /// When it is not one of these.
    pub fn new(endpoint: &str) -> Result<Self, InvalidEndpoint> {
        let (scheme, rest) = endpoint.split_once(':').ok_or(InvalidEndpoint::Form)?;
        if scheme.eq_ignore_ascii_case("tcp") {
            return Err(InvalidEndpoint::Tcp);
        }
        let path = match rest.strip_prefix("//") {
            Some(path) => path,
            None => rest,
        };
        let is_plain = path.len() > 1 && path.starts_with('/') && !path.starts_with("//");
        if !scheme.eq_ignore_ascii_case("unix") || !is_plain || path.contains(['%', '?', '#', '\0']) {
            return Err(InvalidEndpoint::Form);
        }
        Ok(Self { socket: PathBuf::from(path) })
    }

    /// The agent that [`ENDPOINT_SOCKET`] names.
    ///
    /// # Errors
    /// When it is not set, or no address.
    pub fn from_env() -> Result<Self, InvalidEndpoint> {
        match std::env::var(ENDPOINT_SOCKET) {
            Ok(endpoint) if !endpoint.is_empty() => Self::new(&endpoint),
            Ok(_) | Err(std::env::VarError::NotPresent) => Err(InvalidEndpoint::Missing),
            Err(std::env::VarError::NotUnicode(_)) => Err(InvalidEndpoint::Form),
        }
    }

    /// Where the socket is.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    async fn begin(&self) -> Result<SvidUpdates, WorkloadApiError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| WorkloadApiError::Connect { socket: self.socket.clone(), error })?;
        let (mut sender, connection) = Builder::new(TokioExecutor::new())
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(&self.socket, &error))?;
        let request = request().map_err(|error| WorkloadApiError::Answer(error.to_string()))?;
        // Its end is said by what it carries.
        let mut connection: Driven = Box::pin(async { drop(connection.await) });
        let response = {
            let mut response = pin!(sender.send_request(request));
            tokio::select! {
                biased;
                response = &mut response => response,
                // What the connection read before its end is still there for the response.
                () = &mut connection => response.await,
            }
        };
        let (head, body) = response.map_err(|error| broken(&self.socket, &error))?.into_parts();
        if head.status != StatusCode::OK {
            return Err(WorkloadApiError::Answer(format!("it is HTTP status {}", head.status)));
        }
        if let Some(status) = Status::read(&head.headers).filter(|status| status.code != Code::Ok) {
            return Err(WorkloadApiError::Refused(status));
        }
        let connection = Some(connection);
        let socket = self.socket.clone();
        Ok(SvidUpdates { socket, body, read: BytesMut::new(), connection, _sender: sender })
    }
}

impl Subscribe for WorkloadApi {
    type Updates = SvidUpdates;

    async fn subscribe(&self) -> Result<SvidUpdates, WorkloadApiError> {
        let begun = tokio::time::timeout(PATIENCE, self.begin()).await;
        begun.unwrap_or_else(|_| Err(WorkloadApiError::TooLate { socket: self.socket.clone() }))
    }
}

fn request() -> Result<Request<Full<Bytes>>, http::Error> {
    Request::post(format!("http://localhost{PATH}"))
        .version(Version::HTTP_2)
        .header(CONTENT_TYPE, APPLICATION_GRPC)
        .header(TE, HeaderValue::from_static("trailers"))
        .header(WORKLOAD, HeaderValue::from_static("true"))
        .body(Full::new(frame(b"")))
}

/// The connection, which moves only while it is waited for.
type Driven = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What an agent says, message by message. Dropping it ends the connection.
pub struct SvidUpdates {
    socket: PathBuf,
    body: Incoming,
    read: BytesMut,
    connection: Option<Driven>,
    /// Without it the connection ends when nothing is asked.
    _sender: SendRequest<Full<Bytes>>,
}

impl SvidUpdates {
    /// The next whole message of what was read.
    fn message(&mut self) -> Result<Option<X509SvidResponse>, WorkloadApiError> {
        let answer = |reason: &str| WorkloadApiError::Answer(reason.to_owned());
        let Some((head, rest)) = self.read.split_first_chunk::<FRAME_HEAD>() else { return Ok(None) };
        let [compressed, length @ ..] = *head;
        if compressed != 0 {
            return Err(answer("compressed messages are not read"));
        }
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if length > MAX_MESSAGE {
            return Err(answer("it is too long"));
        }
        let Some(message) = rest.get(..length) else { return Ok(None) };
        let message = X509SvidResponse::decode(message).map_err(|error| answer(&error.to_string()))?;
        self.read.advance(FRAME_HEAD + length);
        Ok(Some(message))
    }

    /// How the answer ended.
    fn end(&self, status: Option<Status>) -> Result<Option<X509SvidResponse>, WorkloadApiError> {
        match status {
            Some(status) if status.code != Code::Ok => Err(WorkloadApiError::Refused(status)),
            Some(_) if self.read.is_empty() => Ok(None),
            _ => Err(WorkloadApiError::Answer("it ends before it is whole".to_owned())),
        }
    }
}

impl Updates for SvidUpdates {
    async fn next(&mut self) -> Result<Option<X509SvidResponse>, WorkloadApiError> {
        loop {
            if let Some(message) = self.message()? {
                return Ok(Some(message));
            }
            let frame = tokio::select! {
                biased;
                frame = self.body.frame() => frame,
                () = drive(&mut self.connection) => {
                    self.connection = None;
                    continue;
                }
            };
            match frame {
                None => return self.end(None),
                Some(Err(error)) => return Err(broken(&self.socket, &error)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.read.extend_from_slice(&data),
                    Err(frame) => return self.end(frame.trailers_ref().and_then(Status::read)),
                },
            }
        }
    }
}

async fn drive(connection: &mut Option<Driven>) {
    match connection {
        Some(connection) => connection.await,
        None => std::future::pending().await,
    }
}

fn broken(socket: &Path, error: &hyper::Error) -> WorkloadApiError {
    use std::error::Error as _;
    // hyper does not say the cause itself.
    let reason = error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
    WorkloadApiError::Broken { socket: socket.to_owned(), reason }
}

impl fmt::Debug for SvidUpdates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SvidUpdates").field("socket", &self.socket).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pa_05_addresses_of_agents() {
        for endpoint in
            ["unix:///run/spire/agent.sock", "unix:/run/spire/agent.sock", "UNIX:///run/spire/agent.sock"]
        {
            let api = WorkloadApi::new(endpoint).unwrap();
            assert_eq!(api.socket(), Path::new("/run/spire/agent.sock"), "{endpoint}");
        }
        for endpoint in ["tcp://127.0.0.1:8081", "tcp:127.0.0.1:8081", "TCP:x"] {
            assert_eq!(WorkloadApi::new(endpoint), Err(InvalidEndpoint::Tcp), "{endpoint}");
        }
        for endpoint in [
            "",
            "/run/agent.sock",
            "unix:",
            "unix:run/agent.sock",
            "unix:///",
            "unix://host/agent.sock",
            "unix:////run/agent.sock",
            "unix:///run/agent.sock?a=b",
            "unix:///run/agent.sock#a",
            "unix:///a%20b",
            "http:///run/agent.sock",
        ] {
            assert_eq!(WorkloadApi::new(endpoint), Err(InvalidEndpoint::Form), "{endpoint}");
        }
    }
}
