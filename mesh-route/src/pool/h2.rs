//! HTTP/2: many requests on a connection; another connection only when the streams of all are taken.
//!
//! Whether an endpoint is there one request finds out, as over HTTP/1.1. Then as many connections are made at once as
//! those who wait will fill: where each takes few requests, they do not connect one after the other.

mod settings;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_core::clock::NEVER;
use mesh_core::{Body, Error, Spoken, Standing};
use tokio::sync::Notify;

use self::settings::Watched;
use super::dial::made;
use super::{ConnMeta, Dial, Handed, Slot, again, pending, upstream_error};
use crate::cluster::{Cluster, PoolSettings};
use crate::connect::{Opened, open};
use crate::endpoint::Endpoint;
use crate::runtime::ClusterRuntime;
use crate::shard::Shard;

/// Receive window of a stream; of a connection it is sixteen times that.
const STREAM_WINDOW: u32 = 64 * 1024;

/// The connections of one shard to one endpoint.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    conns: Vec<Conn>,
    /// Requests that wait for a stream.
    waiting: usize,
    /// Whether the endpoint is known to be there: a connection has been made, and none has failed without another open.
    proven: bool,
    connecting: usize,
    /// Connections that were begun, and the last of them that failed: who waited for it fails with it.
    attempts: u64,
    failed: Option<(u64, Arc<Error>)>,
    changed: Arc<Notify>,
}

#[derive(Debug)]
pub(crate) struct Conn {
    sender: http2::SendRequest<Body>,
    streams: Arc<AtomicU32>,
    max_streams: u32,
    /// What the peer's settings allow now.
    allowed: Arc<AtomicU32>,
    meta: ConnMeta,
    idle_since: Instant,
}

/// One stream of a connection.
#[derive(Debug)]
pub(crate) struct Lease {
    /// Until the request is sent, and no longer; see [`Lease::send`].
    sender: Option<http2::SendRequest<Body>>,
    local: Option<std::net::SocketAddr>,
    _stream: Stream,
}

#[derive(Debug)]
struct Stream {
    streams: Arc<AtomicU32>,
    changed: Arc<Notify>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
        self.changed.notify_one();
    }
}

impl Pool {
    /// Adds what its connections stand on, and is not judged by what is trusted now.
    pub(crate) fn unjudged(&self, found: &mut Vec<Arc<dyn Standing>>) {
        found.extend(self.conns.iter().filter_map(|conn| conn.meta.unjudged()));
    }

    /// Moves connections out that have been idle for too long; whether the pool is still needed.
    pub(crate) fn sweep(&mut self, now: Instant, expired: &mut Vec<Conn>) -> bool {
        expired.extend(self.conns.extract_if(.., |conn| {
            if conn.streams.load(Ordering::Relaxed) > 0 {
                conn.idle_since = now;
                return false;
            }
            let idle = now.saturating_duration_since(conn.idle_since);
            conn.sender.is_closed()
                || !conn.meta.is_fresh(|| now)
                || conn.meta.idle_timeout.is_some_and(|timeout| idle >= timeout)
        }));
        // Who waits for a connection that is being made holds `changed`, and finds here what came of it.
        self.connecting > 0 || Arc::strong_count(&self.changed) > 1 || !self.conns.is_empty()
    }

    /// A stream, if there is room for one. Connections that take no more requests are moved out: their streams end by
    /// themselves, and a request that was left in one comes back when it is dropped, which is not to be under the lock.
    fn checkout(&mut self, ended: &mut Vec<Conn>) -> Option<Lease> {
        let now = mesh_core::clock::now();
        ended
            .extend(self.conns.extract_if(.., |conn| conn.sender.is_closed() || !conn.meta.is_fresh(|| now)));
        let conn = self.conns.iter_mut().find(|conn| {
            let allowed = conn.allowed.load(Ordering::Relaxed).min(conn.max_streams);
            conn.sender.is_ready() && conn.streams.load(Ordering::Relaxed) < allowed
        })?;
        conn.idle_since = now;
        Some(conn.stream(&self.changed))
    }
}

impl Conn {
    /// One more stream.
    fn stream(&mut self, changed: &Arc<Notify>) -> Lease {
        self.streams.fetch_add(1, Ordering::Relaxed);
        self.meta.served = self.meta.served.saturating_add(1);
        Lease {
            sender: Some(self.sender.clone()),
            local: self.meta.local,
            _stream: Stream { streams: Arc::clone(&self.streams), changed: Arc::clone(changed) },
        }
    }
}

impl Lease {
    /// A stream on an open connection, if one has room.
    pub(crate) fn idle(shard: &Shard, endpoint: &Endpoint) -> Option<Self> {
        let mut ended = Vec::new();
        shard.lock().h2.get_mut(&endpoint.id())?.checkout(&mut ended)
    }

    /// A stream: on an open connection, on one that is being made, or on a new one.
    pub(crate) async fn acquire(
        shard: &Arc<Shard>,
        cluster: &Cluster,
        runtime: &Arc<ClusterRuntime>,
        endpoint: &Arc<Endpoint>,
    ) -> Result<Self, Error> {
        if let Some(lease) = Self::idle(shard, endpoint) {
            return Ok(lease);
        }
        let settings = &cluster.spec().pool;
        let _pending = pending(runtime, settings)?;
        let mut waited = u64::MAX;
        let change = Arc::clone(&shard.lock().h2.entry(endpoint.id()).or_default().changed);
        let _waiting = Waiting::new(shard, endpoint.id());
        // What a connection is good for, as far as we know before the peer has said.
        let room =
            settings.max_concurrent_streams.min(settings.max_requests_per_connection.unwrap_or(u32::MAX));
        let room = usize::try_from(room.max(1)).unwrap_or(usize::MAX);
        let mut dial: Option<Dial<'_, Made>> = None;
        loop {
            let mut changed = std::pin::pin!(change.notified());
            let mut freed = std::pin::pin!(runtime.freed.notified());
            // From here on nothing that changes is missed.
            changed.as_mut().enable();
            freed.as_mut().enable();
            let mut ended = Vec::new();
            let first = {
                let mut inner = shard.lock();
                let pool = inner.h2.entry(endpoint.id()).or_default();
                if let Some(lease) = pool.checkout(&mut ended) {
                    drop(inner);
                    // One notification wakes one request; there may be room for the next.
                    change.notify_one();
                    return Ok(lease);
                }
                if dial.is_some() {
                    // Its own connection is what it waits for, or a stream that becomes free.
                    None
                } else if let Some((attempt, error)) = &pool.failed
                    && *attempt >= waited
                {
                    return Err(again(error));
                } else {
                    let is_served = if pool.proven {
                        pool.connecting.saturating_mul(room) >= pool.waiting
                    } else {
                        pool.connecting > 0
                    };
                    waited = if is_served { pool.attempts } else { u64::MAX };
                    (!is_served).then_some(pool.conns.is_empty() && pool.connecting == 0)
                }
            };
            drop(ended);
            if let Some(first) = first
                && let Some(slot) = Slot::acquire(runtime, endpoint, settings, first)
            {
                let making = Self::make(Arc::clone(shard), settings, endpoint, slot);
                dial = Some(Dial::new(cluster, runtime, endpoint, making, Made::keep));
            }
            let is_dialling = dial.is_some();
            tokio::select! {
                // The same events in the same order: what happens can be replayed.
                biased;
                made = made(&mut dial) => return made.map(Made::stream),
                () = changed => {}
                () = freed, if !is_dialling => {}
            }
        }
    }

    /// Makes a connection. It begins at once: what is returned is the rest.
    fn make(
        shard: Arc<Shard>,
        settings: &PoolSettings,
        endpoint: &Arc<Endpoint>,
        slot: Slot,
    ) -> impl Future<Output = Result<Made, Error>> + Send + use<> {
        let connecting = Connecting::new(&shard, endpoint.id());
        let (settings, endpoint) = (settings.clone(), Arc::clone(endpoint));
        async move {
            match Self::connect(&shard, &settings, &endpoint, slot).await {
                Ok(conn) => Ok(Made { conn, connecting }),
                Err(error) => {
                    connecting.failed(&error);
                    Err(error)
                }
            }
        }
    }

    async fn connect(
        shard: &Arc<Shard>,
        settings: &PoolSettings,
        endpoint: &Arc<Endpoint>,
        slot: Slot,
    ) -> Result<Conn, Error> {
        let Opened { stream, local, standing } =
            open(shard, &endpoint.target(Spoken::Http2), settings).await?;
        let allowed = Arc::new(AtomicU32::new(u32::MAX));
        let changed = Arc::clone(&shard.lock().h2.entry(endpoint.id()).or_default().changed);
        let stream = Watched::new(stream, slot, Arc::clone(&allowed), changed);
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(STREAM_WINDOW * 16);
        if let Some(keepalive) = settings.http2_keepalive {
            // Longer than a clock can tell, they would panic in hyper.
            builder
                .keep_alive_interval(keepalive.interval.min(NEVER))
                .keep_alive_timeout(keepalive.timeout.min(NEVER))
                .keep_alive_while_idle(true);
        }
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(upstream_error)?;
        let (pools, id) = (Arc::downgrade(shard), endpoint.id());
        tokio::spawn(async move {
            // What ends it is seen by whoever holds a sender.
            let _ = connection.await;
            let Some(shard) = pools.upgrade() else { return };
            let ended: Vec<_> = match shard.lock().h2.get_mut(&id) {
                Some(pool) => pool.conns.extract_if(.., |conn| conn.sender.is_closed()).collect(),
                None => Vec::new(),
            };
            // Outside the lock: a request that was not taken comes back by this.
            drop(ended);
        });
        shard.sweep();
        Ok(Conn {
            sender,
            streams: Arc::default(),
            max_streams: settings.max_concurrent_streams.max(1),
            allowed,
            meta: ConnMeta::new(local, standing, endpoint, settings),
            idle_since: mesh_core::clock::now(),
        })
    }

    /// Sends the request, now; the future is that of its response. Called once.
    ///
    /// A request that another thread is handing over just when its connection ends is left between the two, and comes
    /// back only when the last sender of that connection is gone. So neither a lease nor the pool keeps one.
    pub(crate) fn send(
        &mut self,
        request: Request<Body>,
    ) -> impl Future<Output = Result<Response<Incoming>, TrySendError<Request<Body>>>> + use<> {
        Handed(self.sender.take().map(|mut sender| sender.try_send_request(request)))
    }

    /// Our end of the connection.
    pub(crate) fn local(&self) -> Option<std::net::SocketAddr> {
        self.local
    }
}

/// A connection that has just been made. Whoever waits for it hears of it when it is in the pool.
struct Made {
    conn: Conn,
    connecting: Connecting,
}

impl Made {
    /// Its first stream: the request that made it has it, whatever became of the endpoint meanwhile.
    fn stream(self) -> Lease {
        self.put(|conn, changed| conn.stream(changed))
    }

    /// Without a stream: the request that made it is gone, and none of its requests is spent.
    fn keep(self) {
        self.put(|_, _| ());
    }

    fn put<T>(mut self, first: impl FnOnce(&mut Conn, &Arc<Notify>) -> T) -> T {
        let mut inner = self.connecting.shard.lock();
        let pool = inner.h2.entry(self.connecting.endpoint).or_default();
        pool.proven = true;
        let taken = first(&mut self.conn, &pool.changed);
        pool.conns.push(self.conn);
        taken
    }
}

/// Counts a request that waits for a stream.
struct Waiting<'s> {
    shard: &'s Arc<Shard>,
    endpoint: u64,
}

impl<'s> Waiting<'s> {
    fn new(shard: &'s Arc<Shard>, endpoint: u64) -> Self {
        shard.lock().h2.entry(endpoint).or_default().waiting += 1;
        Self { shard, endpoint }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(pool) = self.shard.lock().h2.get_mut(&self.endpoint) {
            pool.waiting = pool.waiting.saturating_sub(1);
        }
    }
}

/// One connection being made; whoever waits for it hears of its end, good or bad.
struct Connecting {
    shard: Arc<Shard>,
    endpoint: u64,
    attempt: u64,
}

impl Connecting {
    fn new(shard: &Arc<Shard>, endpoint: u64) -> Self {
        let mut inner = shard.lock();
        let pool = inner.h2.entry(endpoint).or_default();
        pool.connecting += 1;
        pool.attempts += 1;
        let attempt = pool.attempts;
        drop(inner);
        Self { shard: Arc::clone(shard), endpoint, attempt }
    }

    /// It came to nothing.
    fn failed(&self, error: &Error) {
        if let Some(pool) = self.shard.lock().h2.get_mut(&self.endpoint) {
            pool.failed = Some((self.attempt, Arc::new(again(error))));
            pool.proven = pool.proven && pool.conns.iter().any(|conn| !conn.sender.is_closed());
        }
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        let changed = self.shard.lock().h2.get_mut(&self.endpoint).map(|pool| {
            pool.connecting = pool.connecting.saturating_sub(1);
            Arc::clone(&pool.changed)
        });
        // Outside the lock: it wakes who waits.
        if let Some(changed) = changed {
            changed.notify_waiters();
        }
    }
}
