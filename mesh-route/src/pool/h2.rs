//! HTTP/2: many requests on a connection; another connection only when the streams of all are taken.

mod settings;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_core::clock::NEVER;
use mesh_core::{Body, Error, Spoken};
use pin_project::pin_project;
use tokio::sync::Notify;

use self::settings::Watched;
use super::{ConnMeta, Dial, Slot, again, pending, upstream_error};
use crate::cluster::{ClusterSpec, PoolSettings};
use crate::connect::open;
use crate::endpoint::Endpoint;
use crate::runtime::ClusterRuntime;
use crate::shard::Shard;

/// Receive window of a stream; of a connection it is sixteen times that.
const STREAM_WINDOW: u32 = 64 * 1024;

/// The connections of one shard to one endpoint.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    conns: Vec<Conn>,
    connecting: usize,
    /// Connections that were begun, and the last of them that failed: who waited for it fails with it.
    attempts: u64,
    failed: Option<(u64, Arc<Error>)>,
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Conn {
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
    /// Closes connections that have been idle for too long; whether the pool is still needed.
    pub(crate) fn sweep(&mut self, now: Instant) -> bool {
        self.conns.retain_mut(|conn| {
            if conn.streams.load(Ordering::Relaxed) > 0 {
                conn.idle_since = now;
                return true;
            }
            let idle = now.saturating_duration_since(conn.idle_since);
            !conn.sender.is_closed()
                && conn.meta.is_fresh(|| now)
                && conn.meta.idle_timeout.is_none_or(|timeout| idle < timeout)
        });
        // Who waits for a connection that is being made holds `changed`, and finds here what came of it.
        self.connecting > 0 || Arc::strong_count(&self.changed) > 1 || !self.conns.is_empty()
    }

    fn checkout(&mut self) -> Option<Lease> {
        let now = mesh_core::clock::now();
        // A connection that takes no more requests goes; its streams end by themselves.
        self.conns.retain(|conn| !conn.sender.is_closed() && conn.meta.is_fresh(|| now));
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
        shard.lock().h2.get_mut(&endpoint.id())?.checkout()
    }

    /// A stream: on an open connection, on one that is being made, or on a new one.
    pub(crate) async fn acquire(
        shard: &Arc<Shard>,
        runtime: &Arc<ClusterRuntime>,
        spec: &ClusterSpec,
        endpoint: &Arc<Endpoint>,
    ) -> Result<Self, Error> {
        if let Some(lease) = Self::idle(shard, endpoint) {
            return Ok(lease);
        }
        let _pending = pending(runtime, &spec.pool)?;
        let mut waited = u64::MAX;
        let change = Arc::clone(&shard.lock().h2.entry(endpoint.id()).or_default().changed);
        loop {
            let mut changed = std::pin::pin!(change.notified());
            let mut freed = std::pin::pin!(runtime.freed.notified());
            // From here on nothing that changes is missed.
            changed.as_mut().enable();
            freed.as_mut().enable();
            let (connecting, first) = {
                let mut inner = shard.lock();
                let pool = inner.h2.entry(endpoint.id()).or_default();
                if let Some(lease) = pool.checkout() {
                    // One notification wakes one request; there may be room for the next.
                    pool.changed.notify_one();
                    return Ok(lease);
                }
                if let Some((attempt, error)) = &pool.failed
                    && *attempt >= waited
                {
                    return Err(again(error));
                }
                waited = if pool.connecting > 0 { pool.attempts } else { u64::MAX };
                (pool.connecting > 0, pool.conns.is_empty())
            };
            if !connecting && let Some(slot) = Slot::acquire(runtime, endpoint, &spec.pool, first) {
                let making = Self::make(Arc::clone(shard), &spec.pool, endpoint, slot);
                // The connection is in the pool when it is made; the stream is what nobody needs any more.
                return Dial::new(making, drop).made().await;
            }
            tokio::select! {
                // The same events in the same order: what happens can be replayed.
                biased;
                () = changed => {}
                () = freed => {}
            }
        }
    }

    /// A stream on a connection that is made for it: the request that made it has it, whatever became of the endpoint
    /// meanwhile.
    fn make(
        shard: Arc<Shard>,
        settings: &PoolSettings,
        endpoint: &Arc<Endpoint>,
        slot: Slot,
    ) -> impl Future<Output = Result<Self, Error>> + Send + use<> {
        let connecting = Connecting::new(&shard, endpoint.id());
        let (settings, endpoint) = (settings.clone(), Arc::clone(endpoint));
        async move {
            let made = Self::connect(&shard, &settings, &endpoint, slot).await;
            if let Err(error) = &made {
                connecting.failed(error);
            }
            drop(connecting);
            made
        }
    }

    async fn connect(
        shard: &Arc<Shard>,
        settings: &PoolSettings,
        endpoint: &Arc<Endpoint>,
        slot: Slot,
    ) -> Result<Self, Error> {
        let (stream, local) = open(shard, &endpoint.target(Spoken::Http2), settings).await?;
        let allowed = Arc::new(AtomicU32::new(u32::MAX));
        let changed = Arc::clone(&shard.lock().h2.entry(endpoint.id()).or_default().changed);
        let stream = Watched::new(stream, slot, Arc::clone(&allowed), changed);
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(STREAM_WINDOW * 16);
        if let Some(keepalive) = settings.http2_keepalive {
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
        let mut inner = shard.lock();
        let pool = inner.h2.entry(endpoint.id()).or_default();
        let mut conn = Conn {
            sender,
            streams: Arc::default(),
            max_streams: settings.max_concurrent_streams.max(1),
            allowed,
            meta: ConnMeta::new(local, endpoint, settings),
            idle_since: mesh_core::clock::now(),
        };
        let lease = conn.stream(&pool.changed);
        pool.conns.push(conn);
        Ok(lease)
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

/// A request that was handed to its connection. Without one there is nothing to wait for, and no end of it.
#[pin_project]
struct Handed<F>(#[pin] Option<F>);

impl<F: Future> Future for Handed<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        match self.project().0.as_pin_mut() {
            Some(handed) => handed.poll(cx),
            None => Poll::Pending,
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
        }
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        if let Some(pool) = self.shard.lock().h2.get_mut(&self.endpoint) {
            pool.connecting = pool.connecting.saturating_sub(1);
            pool.changed.notify_waiters();
        }
    }
}
