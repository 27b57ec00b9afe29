//! Load with a ledger: every request has an id, and every answer must be its own, whole, once.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;

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
    /// Of paced load, how long each whole answer took from the moment that its request was due, in microseconds.
    pub latencies: Vec<u32>,
}

impl Totals {
    /// The latency below which `share` (0.0 to 1.0) of the whole answers of paced load were; 0 without any.
    #[must_use]
    pub fn percentile(&mut self, share: f64) -> u32 {
        self.latencies.sort_unstable();
        let last = self.latencies.len().saturating_sub(1);
        self.latencies.get((last as f64 * share).round() as usize).copied().unwrap_or(0)
    }

    /// Whether every request was answered by status 200, whole and its own.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        (self.wrong, self.broken, self.refused) == (0, 0, 0)
    }
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
        Self::spawn(proxy, host, clients, body, None)
    }

    /// [`start`](Self::start) at `per_second` requests per second in all. A request that is late is sent at once, and
    /// its latency counts from when it was due.
    #[must_use]
    pub fn paced(proxy: SocketAddr, host: &str, clients: usize, body: usize, per_second: u32) -> Self {
        let every =
            Duration::from_secs(1) * u32::try_from(clients).expect("some clients") / per_second.max(1);
        Self::spawn(proxy, host, clients, body, Some(every))
    }

    fn spawn(proxy: SocketAddr, host: &str, clients: usize, body: usize, every: Option<Duration>) -> Self {
        let (stop, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (mut set, began) = (JoinSet::new(), Instant::now());
        for client in 0..clients {
            // In turn and not all at the same moment, or each client's next request would come with all others'.
            let from = every.map(|every| began + every * client as u32 / clients as u32);
            let pace = every.zip(from);
            let client = Client { proxy, host: host.to_owned(), client, body, pace };
            set.spawn(client.run(Arc::clone(&stop), Arc::clone(&done)));
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
            totals.latencies.extend(client.latencies);
        }
        totals
    }
}

struct Client {
    proxy: SocketAddr,
    host: String,
    client: usize,
    body: usize,
    /// How often, and from when on.
    pace: Option<(Duration, Instant)>,
}

impl Client {
    async fn run(self, stop: Arc<AtomicBool>, done: Arc<AtomicU64>) -> Totals {
        let Self { proxy, host, client, body, pace } = self;
        let mut pace = pace.map(|(every, from)| tokio::time::interval_at(from, every));
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
                let due = match &mut pace {
                    Some(pace) => pace.tick().await,
                    None => Instant::now(),
                };
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
                    Ok(text) if is_own(&text, &id, body) => {
                        totals.whole += 1;
                        if pace.is_some() {
                            totals
                                .latencies
                                .push(u32::try_from(due.elapsed().as_micros()).unwrap_or(u32::MAX));
                        }
                    }
                    Ok(_) => totals.wrong += 1,
                    Err(_) => totals.broken += 1,
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
        totals
    }
}

fn is_own(text: &[u8], id: &str, body: usize) -> bool {
    let Ok(saw) = serde_json::from_slice::<Value>(text) else { return false };
    // Where a generation puts its name into a header and into the path, both must be of one generation.
    let mixed = saw["headers"]["x-generation"].as_str().is_some_and(|generation| {
        saw["url"].as_str().and_then(|url| url.split('/').nth(1)) != Some(generation)
    });
    saw["headers"]["x-id"] == *id && saw["body_bytes"] == body && !mixed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_two_generations_are_wrong() {
        let answer = |generation: &str, url: &str| {
            serde_json::json!({"url": url, "body_bytes": 3, "headers": {"x-id": "1", "x-generation": generation}})
                .to_string()
        };
        assert!(is_own(answer("g7", "/g7/echo").as_bytes(), "1", 3));
        assert!(!is_own(answer("g7", "/g8/echo").as_bytes(), "1", 3));
        assert!(!is_own(answer("g7", "/g7/echo").as_bytes(), "2", 3));
        assert!(!is_own(answer("g7", "/g7/echo").as_bytes(), "1", 4));
    }
}
