//! Load with a ledger: every request has an id, and every answer must be its own, whole, once.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// What a run of load saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Answers of status 200 that were whole and the request's own.
    pub whole: u64,
    /// Answers of other statuses.
    pub refused: u64,
    /// Answers that were another's, or not what was asked for.
    pub wrong: u64,
    /// Requests that ended in an error on a connection that had not been closed before.
    pub broken: u64,
    /// Connections that were made.
    pub connections: u64,
}

/// Load that runs until it is stopped.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    clients: JoinSet<Totals>,
}

impl Load {
    /// Starts `clients`, each with one keep-alive connection at a time, that send requests with `body` bytes to `host`
    /// through `proxy`. The upstream is an [`Echo`](crate::upstream::Echo).
    #[must_use]
    pub fn start(proxy: SocketAddr, host: &str, clients: usize, body: usize) -> Self {
        let (stop, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let mut set = JoinSet::new();
        for client in 0..clients {
            set.spawn(run(proxy, host.to_owned(), client, body, Arc::clone(&stop), Arc::clone(&done)));
        }
        Self { stop, done, clients: set }
    }

    /// Requests that have ended so far.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Ends the load and adds up what it saw.
    ///
    /// # Panics
    /// When a client panicked.
    pub async fn stop(mut self) -> Totals {
        self.stop.store(true, Ordering::Relaxed);
        let mut totals = Totals::default();
        while let Some(client) = self.clients.join_next().await {
            let client = client.expect("a client");
            totals.whole += client.whole;
            totals.refused += client.refused;
            totals.wrong += client.wrong;
            totals.broken += client.broken;
            totals.connections += client.connections;
        }
        totals
    }
}

async fn run(
    proxy: SocketAddr,
    host: String,
    client: usize,
    body: usize,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
) -> Totals {
    let mut totals = Totals::default();
    let payload = Bytes::from(vec![b'x'; body]);
    let mut number = 0_u64;
    'connections: while !stop.load(Ordering::Relaxed) {
        // A proxy that is going away refuses new connections, which breaks no request.
        let Ok(stream) = TcpStream::connect(proxy).await else { break };
        let Ok((mut sender, connection)) = http1::handshake(TokioIo::new(stream)).await else { break };
        tokio::spawn(connection);
        totals.connections += 1;
        while !stop.load(Ordering::Relaxed) {
            // A connection that the proxy closed after a whole answer is replaced.
            if sender.ready().await.is_err() {
                continue 'connections;
            }
            number += 1;
            let id = format!("{client}-{number}");
            let request = Request::post("/echo")
                .header("host", &host)
                .header("x-id", &id)
                .body(Full::new(payload.clone()))
                .expect("a request");
            let Ok(response) = sender.send_request(request).await else {
                totals.broken += 1;
                continue 'connections;
            };
            let status = response.status();
            match response.into_body().collect().await.map(|body| body.to_bytes()) {
                Ok(_) if status != 200 => totals.refused += 1,
                Ok(text) if is_own(&text, &id, body) => totals.whole += 1,
                Ok(_) => totals.wrong += 1,
                Err(_) => totals.broken += 1,
            }
            done.fetch_add(1, Ordering::Relaxed);
        }
    }
    totals
}

fn is_own(text: &[u8], id: &str, body: usize) -> bool {
    let Ok(saw) = serde_json::from_slice::<Value>(text) else { return false };
    saw["headers"]["x-id"] == *id && saw["body_bytes"] == body
}
