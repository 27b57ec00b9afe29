//! HTTP/1.1: one request at a time on a connection, the last one used first.
//!
//! **One probe.** Of an endpoint to which no connection has been made yet, or none since the last one failed, it is not
//! known whether it is there. Then one request connects and the others wait for what comes of it: a crowd knocks once
//! at a door that does not open, and fails together and not one after the other. As soon as one connection has been
//! made, requests connect side by side.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1};
use hyper_util::rt::TokioIo;
use mesh_core::{Body, Error, Spoken};
use tokio::sync::{Notify, oneshot};

use super::{ConnMeta, Slot, again, pending, upstream_error};
use crate::cluster::ClusterSpec;
use crate::connect::open;
use crate::endpoint::Endpoint;
use crate::runtime::ClusterRuntime;
use crate::shard::Shard;

/// The most bytes that a connection reads ahead or holds back, which is also the longest head of a response. With less,
/// large bodies cost more calls to the kernel; with hyper's 400 KiB, a hundred downloads cost 50 MiB.
const BUFFER: usize = 160 * 1024;

/// The connections of one shard to one endpoint.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    idle: Vec<Idle>,
    waiters: VecDeque<oneshot::Sender<Conn>>,
    open: usize,
    /// Whether the last connection that was begun and ended was made.
    proven: bool,
    connecting: usize,
    /// Connections that were begun, and the last of them that failed: who waited for it fails with it.
    attempts: u64,
    failed: Option<(u64, Arc<Error>)>,
    /// Told when a connection has been made, or will not be.
    changed: Arc<Notify>,
}

#[derive(Debug)]
pub(crate) struct Idle {
    conn: Conn,
    since: Instant,
}

#[derive(Debug)]
struct Conn {
    sender: http1::SendRequest<Body>,
    meta: ConnMeta,
}

/// A connection that one request has to itself.
#[derive(Debug)]
pub(crate) struct Lease {
    conn: Conn,
    endpoint: u64,
    shard: Arc<Shard>,
}

impl Pool {
    /// Moves expired connections out; whether the pool is still needed.
    pub(crate) fn sweep(&mut self, now: Instant, expired: &mut Vec<Idle>) -> bool {
        expired.extend(self.idle.extract_if(.., |idle| !idle.is_usable(now)));
        self.waiters.retain(|waiter| !waiter.is_closed());
        // Who waits for a connection that is being made holds `changed`, and finds here what came of it.
        let is_awaited = self.connecting > 0 || Arc::strong_count(&self.changed) > 1;
        self.open > 0 || is_awaited || !self.idle.is_empty() || !self.waiters.is_empty()
    }

    fn checkout(&mut self, now: Instant) -> Option<Conn> {
        let mut at = self.idle.len();
        while at > 0 {
            at -= 1;
            let idle = &self.idle[at];
            if !idle.is_usable(now) {
                self.idle.swap_remove(at);
            } else if idle.conn.sender.is_ready() {
                // Not `swap_remove`: the last one used stays last.
                return Some(self.idle.remove(at).conn);
            }
        }
        None
    }

    /// A connection whose last exchange has not ended on our side: its response came before its request had gone.
    fn checkout_busy(&mut self) -> Option<Conn> {
        let at = self.idle.iter().position(|idle| !idle.conn.sender.is_closed())?;
        Some(self.idle.remove(at).conn)
    }

    fn give_back(&mut self, mut conn: Conn, now: Instant) {
        while let Some(waiter) = self.waiters.pop_front() {
            match waiter.send(conn) {
                Ok(()) => return,
                Err(back) => conn = back,
            }
        }
        self.idle.push(Idle { conn, since: now });
    }
}

impl Idle {
    fn is_usable(&self, now: Instant) -> bool {
        !self.conn.sender.is_closed()
            && self.conn.meta.is_fresh(|| now)
            && self
                .conn
                .meta
                .idle_timeout
                .is_none_or(|timeout| now.saturating_duration_since(self.since) < timeout)
    }
}

impl Lease {
    /// An idle connection, if there is one.
    pub(crate) fn idle(shard: &Arc<Shard>, endpoint: &Endpoint) -> Option<Self> {
        let now = mesh_core::clock::now();
        let conn = shard.lock().h1.get_mut(&endpoint.id())?.checkout(now)?;
        Some(Self { conn, endpoint: endpoint.id(), shard: Arc::clone(shard) })
    }

    /// A connection: an idle one, a new one, or one that another request gives back when no more may be made.
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
        Self::after_probe(shard, endpoint).await?;
        loop {
            let mut freed = std::pin::pin!(runtime.freed.notified());
            // From here on a slot that becomes free is not missed.
            freed.as_mut().enable();
            let first = shard.lock().h1.entry(endpoint.id()).or_default().open == 0;
            if let Some(slot) = Slot::acquire(runtime, endpoint, &spec.pool, first) {
                return Self::make(shard, spec, endpoint, slot).await;
            }
            let (waiting, busy) = {
                let mut inner = shard.lock();
                let pool = inner.h1.entry(endpoint.id()).or_default();
                if let Some(conn) = pool.checkout(mesh_core::clock::now()) {
                    return Ok(Self { conn, endpoint: endpoint.id(), shard: Arc::clone(shard) });
                }
                let (give, waiting) = oneshot::channel();
                pool.waiters.push_back(give);
                (waiting, pool.checkout_busy())
            };
            let mut waiting = Waiting { receiver: waiting, endpoint: endpoint.id(), shard };
            let mut busy = Busy { conn: busy, endpoint: endpoint.id(), shard };
            tokio::select! {
                // The same events in the same order: what happens can be replayed.
                biased;
                () = busy.ready() => {
                    if let Some(conn) = busy.conn.take() {
                        return Ok(Self { conn, endpoint: endpoint.id(), shard: Arc::clone(shard) });
                    }
                }
                Ok(mut conn) = &mut waiting.receiver => {
                    if conn.sender.ready().await.is_ok() && conn.meta.is_fresh(mesh_core::clock::now) {
                        return Ok(Self { conn, endpoint: endpoint.id(), shard: Arc::clone(shard) });
                    }
                }
                () = freed => {}
            }
        }
    }

    /// Waits while another request finds out whether the endpoint is there.
    async fn after_probe(shard: &Shard, endpoint: &Endpoint) -> Result<(), Error> {
        let mut waited = u64::MAX;
        let change = Arc::clone(&shard.lock().h1.entry(endpoint.id()).or_default().changed);
        loop {
            let mut changed = std::pin::pin!(change.notified());
            // From here on nothing that changes is missed.
            changed.as_mut().enable();
            {
                let mut inner = shard.lock();
                let pool = inner.h1.entry(endpoint.id()).or_default();
                if let Some((attempt, error)) = &pool.failed
                    && *attempt >= waited
                {
                    return Err(again(error));
                }
                if pool.proven || pool.connecting == 0 {
                    return Ok(());
                }
                waited = pool.attempts;
            }
            changed.await;
        }
    }

    async fn make(
        shard: &Arc<Shard>,
        spec: &ClusterSpec,
        endpoint: &Arc<Endpoint>,
        slot: Slot,
    ) -> Result<Self, Error> {
        let connecting = Connecting::new(shard, endpoint.id());
        let made = Self::connect(shard, spec, endpoint, slot).await;
        connecting.ended(made.as_ref().err());
        made
    }

    async fn connect(
        shard: &Arc<Shard>,
        spec: &ClusterSpec,
        endpoint: &Arc<Endpoint>,
        slot: Slot,
    ) -> Result<Self, Error> {
        let opened = Opened::new(shard, endpoint.id(), slot);
        let (stream, local) = open(shard, &endpoint.target(Spoken::Http1), &spec.pool).await?;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(BUFFER)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(upstream_error)?;
        tokio::spawn(async move {
            // What ends it is seen by whoever holds the sender.
            let _ = connection.with_upgrades().await;
            drop(opened);
        });
        shard.sweep();
        let conn = Conn { sender, meta: ConnMeta::new(local, endpoint, &spec.pool) };
        Ok(Self { conn, endpoint: endpoint.id(), shard: Arc::clone(shard) })
    }

    /// Sends the request, now; the future is that of its response.
    pub(crate) fn send(
        &mut self,
        request: Request<Body>,
    ) -> impl Future<Output = Result<Response<Incoming>, TrySendError<Request<Body>>>> + use<> {
        self.conn.meta.served = self.conn.meta.served.saturating_add(1);
        self.conn.sender.try_send_request(request)
    }

    /// What the connection is.
    pub(crate) fn meta(&mut self) -> &mut ConnMeta {
        &mut self.conn.meta
    }

    /// Gives the connection back when the response has ended whole. Dropping the lease instead closes it.
    pub(crate) fn give_back(self) {
        if self.conn.sender.is_closed() || !self.conn.meta.is_fresh(mesh_core::clock::now) {
            return;
        }
        let now = mesh_core::clock::now();
        let mut inner = self.shard.lock();
        inner.h1.entry(self.endpoint).or_default().give_back(self.conn, now);
    }
}

/// A connection that will be free when its last request has gone. Nobody says when, so whoever wants it next waits for
/// it; it goes back to the pool if that one is served otherwise.
struct Busy<'s> {
    conn: Option<Conn>,
    endpoint: u64,
    shard: &'s Arc<Shard>,
}

impl Busy<'_> {
    /// Completes when the connection can be used, or has ended; never without one.
    async fn ready(&mut self) {
        match &mut self.conn {
            None => std::future::pending().await,
            Some(conn) => {
                if conn.sender.ready().await.is_err() || !conn.meta.is_fresh(mesh_core::clock::now) {
                    self.conn = None;
                }
            }
        }
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take() {
            Lease { conn, endpoint: self.endpoint, shard: Arc::clone(self.shard) }.give_back();
        }
    }
}

/// A place in the queue. A connection that was handed over while the request was cancelled goes to the next.
struct Waiting<'s> {
    receiver: oneshot::Receiver<Conn>,
    endpoint: u64,
    shard: &'s Arc<Shard>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.receiver.close();
        if let Ok(conn) = self.receiver.try_recv() {
            Lease { conn, endpoint: self.endpoint, shard: Arc::clone(self.shard) }.give_back();
        }
    }
}

/// Counts a connection of this shard until it has ended.
struct Opened {
    shard: std::sync::Weak<Shard>,
    endpoint: u64,
    _slot: Slot,
}

impl Opened {
    fn new(shard: &Arc<Shard>, endpoint: u64, slot: Slot) -> Self {
        shard.lock().h1.entry(endpoint).or_default().open += 1;
        Self { shard: Arc::downgrade(shard), endpoint, _slot: slot }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(shard) = self.shard.upgrade()
            && let Some(pool) = shard.lock().h1.get_mut(&self.endpoint)
        {
            pool.open = pool.open.saturating_sub(1);
        }
    }
}

/// One connection being made; whoever waits for it hears of its end, good or bad.
struct Connecting<'s> {
    shard: &'s Shard,
    endpoint: u64,
    attempt: u64,
}

impl<'s> Connecting<'s> {
    fn new(shard: &'s Shard, endpoint: u64) -> Self {
        let mut inner = shard.lock();
        let pool = inner.h1.entry(endpoint).or_default();
        pool.connecting += 1;
        pool.attempts += 1;
        Self { shard, endpoint, attempt: pool.attempts }
    }

    /// What came of it.
    fn ended(self, error: Option<&Error>) {
        if let Some(pool) = self.shard.lock().h1.get_mut(&self.endpoint) {
            pool.proven = error.is_none();
            if let Some(error) = error {
                pool.failed = Some((self.attempt, Arc::new(again(error))));
            }
        }
    }
}

impl Drop for Connecting<'_> {
    fn drop(&mut self) {
        if let Some(pool) = self.shard.lock().h1.get_mut(&self.endpoint) {
            pool.connecting = pool.connecting.saturating_sub(1);
            pool.changed.notify_waiters();
        }
    }
}
