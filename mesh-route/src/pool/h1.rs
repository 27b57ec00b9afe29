//! HTTP/1.1: one request at a time on a connection, the last one used first.
//!
//! **One probe.** Of an endpoint to which no connection has been made yet, or none since the last one failed, it is not
//! known whether it is there. Then one request connects and the others wait for what comes of it: a crowd knocks once
//! at a door that does not open, and fails together and not one after the other. As soon as one connection has been
//! made, requests connect side by side, and a connection that fails changes nothing of it while another is open.
//!
//! **Whichever comes first.** Who waits, for a connection of its own or for what a probe finds out, stands in the queue
//! for those that become free. No more connections are being made than there are requests that wait.

mod handle;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::iter;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1};
use hyper_util::rt::TokioIo;
use mesh_core::{Body, Error, Spoken, Standing};
use tokio::sync::{Notify, oneshot};

use self::handle::Handle;
use super::dial::made;
use super::{ConnMeta, Dial, Slot, again, pending, upstream_error};
use crate::cluster::{Cluster, PoolSettings};
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
    /// Requests that wait for a connection.
    waiting: usize,
    /// Connections, those that are being made among them.
    open: usize,
    /// Whether the endpoint is known to be there: a connection has been made, and none has failed without another open.
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
    handle: Handle,
    /// Apart, as a lease moves with its request.
    meta: Box<ConnMeta>,
}

/// What a sweep found: connections that have expired, and places in the queue that nobody holds any more.
#[derive(Debug, Default)]
pub(crate) struct Swept {
    idle: Vec<Idle>,
    waiters: Vec<oneshot::Sender<Conn>>,
}

/// A connection that one request has to itself.
#[derive(Debug)]
pub(crate) struct Lease {
    conn: Conn,
    endpoint: u64,
    shard: Arc<Shard>,
}

impl Pool {
    /// Adds what its idle connections stand on, and is not judged by what is trusted now.
    pub(crate) fn unjudged(&self, found: &mut Vec<Arc<dyn Standing>>) {
        found.extend(self.idle.iter().filter_map(|idle| idle.conn.meta.unjudged()));
    }

    /// Moves out what is of no use any more; whether the pool is still needed.
    pub(crate) fn sweep(&mut self, now: Instant, swept: &mut Swept) -> bool {
        swept.idle.extend(self.idle.extract_if(.., |idle| !idle.is_usable(now)));
        if self.waiters.iter().any(oneshot::Sender::is_closed) {
            let (gone, waiters): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.waiters).into_iter().partition(oneshot::Sender::is_closed);
            swept.waiters.extend(gone);
            self.waiters = waiters.into();
        }
        // Who waits for a connection that is being made holds `changed`, and finds here what came of it.
        let is_awaited = self.connecting > 0 || Arc::strong_count(&self.changed) > 1;
        self.open > 0 || is_awaited || !self.idle.is_empty() || !self.waiters.is_empty()
    }

    /// The last one used that is ready. Those that are of no use any more are moved out.
    fn checkout(&mut self, now: Instant, expired: &mut Vec<Idle>) -> Option<Conn> {
        let mut at = self.idle.len();
        while at > 0 {
            at -= 1;
            let idle = &self.idle[at];
            if !idle.is_usable(now) {
                expired.push(self.idle.swap_remove(at));
            } else if idle.conn.handle.is_ready() {
                // Not `swap_remove`: the last one used stays last.
                return Some(self.idle.remove(at).conn);
            }
        }
        None
    }

    /// Those whose last exchange has not ended on our side: their responses came before their requests had gone. Who is
    /// served by the first that ends gives back the others.
    fn checkout_busy(&mut self, busy: &mut Vec<Conn>) {
        let open = self.idle.extract_if(.., |idle| !idle.conn.handle.is_closed());
        busy.extend(open.map(|idle| idle.conn));
    }
}

impl Idle {
    fn is_usable(&self, now: Instant) -> bool {
        !self.conn.handle.is_closed()
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
        let mut expired = Vec::new();
        let conn = shard.lock().h1.get_mut(&endpoint.id())?.checkout(now, &mut expired)?;
        Some(Self { conn, endpoint: endpoint.id(), shard: Arc::clone(shard) })
    }

    /// A connection: an idle one, a new one, or one that another request gives back when no more may be made.
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
        // Held for as long as the request waits: the pool stays.
        let change = Arc::clone(&shard.lock().h1.entry(endpoint.id()).or_default().changed);
        let mut waiting = Waiting::new(shard, endpoint.id());
        let mut busy = Busy { conns: Vec::new(), endpoint: endpoint.id(), shard };
        let mut dial: Option<Dial<'_, Self>> = None;
        // The connection of another that is waited for: who waited for one that failed fails with it.
        let mut waited = u64::MAX;
        // A connection that was handed over is all but free: another is made only when there is news.
        let mut is_news = true;
        loop {
            let mut changed = std::pin::pin!(change.notified());
            let mut freed = std::pin::pin!(runtime.freed.notified());
            // From here on nothing that changes is missed, nor a slot that becomes free.
            changed.as_mut().enable();
            freed.as_mut().enable();
            waiting.queue();
            if dial.is_none() && is_news {
                let mut expired = Vec::new();
                let first = {
                    let mut inner = shard.lock();
                    let pool = inner.h1.entry(endpoint.id()).or_default();
                    if let Some(conn) = pool.checkout(mesh_core::clock::now(), &mut expired) {
                        return Ok(Self { conn, endpoint: endpoint.id(), shard: Arc::clone(shard) });
                    }
                    if busy.conns.is_empty()
                        && let Some((attempt, error)) = &pool.failed
                        && *attempt >= waited
                    {
                        return Err(again(error));
                    }
                    let is_probed = !pool.proven && pool.connecting > 0;
                    waited = if is_probed { pool.attempts } else { u64::MAX };
                    (!is_probed && pool.connecting < pool.waiting).then_some(pool.open == 0)
                };
                drop(expired);
                if let Some(first) = first {
                    if let Some(slot) = Slot::acquire(runtime, endpoint, settings, first) {
                        let making = Self::make(Arc::clone(shard), settings, endpoint, slot);
                        dial = Some(Dial::new(cluster, runtime, endpoint, making, Self::give_back));
                    } else {
                        shard.lock().h1.entry(endpoint.id()).or_default().checkout_busy(&mut busy.conns);
                    }
                }
            }
            let is_dialling = dial.is_some();
            is_news = true;
            tokio::select! {
                // The same events in the same order: what happens can be replayed.
                biased;
                ready = busy.ready() => {
                    if let Some(conn) = ready {
                        return Ok(Self { conn, endpoint: endpoint.id(), shard: Arc::clone(shard) });
                    }
                }
                Some(conn) = waiting.given() => {
                    is_news = false;
                    busy.conns.push(conn);
                }
                made = made(&mut dial) => return made,
                () = changed, if !is_dialling => {}
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
    ) -> impl Future<Output = Result<Self, Error>> + Send + use<> {
        let connecting = Connecting::new(&shard, endpoint.id());
        let opened = Opened::new(&shard, endpoint.id(), slot);
        let (settings, endpoint) = (settings.clone(), Arc::clone(endpoint));
        async move {
            let made = Self::connect(&shard, &settings, &endpoint, opened).await;
            connecting.ended(made.as_ref().err());
            made
        }
    }

    async fn connect(
        shard: &Arc<Shard>,
        settings: &PoolSettings,
        endpoint: &Arc<Endpoint>,
        opened: Opened,
    ) -> Result<Self, Error> {
        let made = open(shard, &endpoint.target(Spoken::Http1), settings).await?;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(BUFFER)
            .handshake(TokioIo::new(made.stream))
            .await
            .map_err(upstream_error)?;
        let (handle, end) = Handle::new(sender);
        tokio::spawn(async move {
            // What ends it is seen by whoever holds the handle.
            let _ = connection.with_upgrades().await;
            drop(end);
            drop(opened);
        });
        shard.sweep();
        let meta = ConnMeta::new(made.local, made.standing, endpoint, settings);
        let conn = Conn { handle, meta: Box::new(meta) };
        Ok(Self { conn, endpoint: endpoint.id(), shard: Arc::clone(shard) })
    }

    /// Sends the request, now; the future is that of its response. Called once.
    pub(crate) fn send(
        &mut self,
        request: Request<Body>,
    ) -> impl Future<Output = Result<Response<Incoming>, TrySendError<Request<Body>>>> + use<> {
        self.conn.meta.served = self.conn.meta.served.saturating_add(1);
        self.conn.handle.send(request)
    }

    /// What the connection is.
    pub(crate) fn meta(&mut self) -> &mut ConnMeta {
        &mut self.conn.meta
    }

    /// Gives the connection back when the response has ended whole. Dropping the lease instead closes it.
    pub(crate) fn give_back(mut self) {
        if !self.conn.handle.take_back() || !self.conn.meta.is_fresh(mesh_core::clock::now) {
            return;
        }
        let Self { mut conn, endpoint, shard } = self;
        let since = mesh_core::clock::now();
        loop {
            let mut inner = shard.lock();
            let pool = inner.h1.entry(endpoint).or_default();
            let Some(waiter) = pool.waiters.pop_front() else {
                pool.idle.push(Idle { conn, since });
                return;
            };
            drop(inner);
            // Outside the lock: it wakes who waits.
            match waiter.send(conn) {
                Ok(()) => return,
                Err(back) => conn = back,
            }
        }
    }
}

/// Connections that will be free when their last requests have gone. Nobody says when, and it may take as long as an
/// upload does, so whoever wants one waits for all that there are, and in the queue for others. They go back to the pool
/// with the one that waits.
struct Busy<'s> {
    conns: Vec<Conn>,
    endpoint: u64,
    shard: &'s Arc<Shard>,
}

impl Busy<'_> {
    /// The first that can be used, or `None` when the last of them has ended; waits for ever without one.
    async fn ready(&mut self) -> Option<Conn> {
        if self.conns.is_empty() {
            return std::future::pending().await;
        }
        poll_fn(|cx| {
            let mut at = 0;
            while let Some(conn) = self.conns.get_mut(at) {
                match conn.handle.poll_ready(cx) {
                    Poll::Pending => at += 1,
                    Poll::Ready(is_open) => {
                        let conn = self.conns.swap_remove(at);
                        if is_open && conn.meta.is_fresh(mesh_core::clock::now) {
                            return Poll::Ready(Some(conn));
                        }
                    }
                }
            }
            if self.conns.is_empty() { Poll::Ready(None) } else { Poll::Pending }
        })
        .await
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        for conn in self.conns.drain(..) {
            Lease { conn, endpoint: self.endpoint, shard: Arc::clone(self.shard) }.give_back();
        }
    }
}

/// A place in the queue. A connection that was handed over while the request was cancelled goes to the next.
struct Waiting<'s> {
    receiver: Option<oneshot::Receiver<Conn>>,
    endpoint: u64,
    shard: &'s Arc<Shard>,
}

impl<'s> Waiting<'s> {
    fn new(shard: &'s Arc<Shard>, endpoint: u64) -> Self {
        shard.lock().h1.entry(endpoint).or_default().waiting += 1;
        Self { receiver: None, endpoint, shard }
    }

    /// Takes a place at the end, if it has none.
    fn queue(&mut self) {
        if self.receiver.is_none() {
            let (give, receiver) = oneshot::channel();
            self.receiver = Some(receiver);
            self.shard.lock().h1.entry(self.endpoint).or_default().waiters.push_back(give);
        }
    }

    /// The connection that is handed over, and with it the place is gone; never without a place.
    async fn given(&mut self) -> Option<Conn> {
        let Some(receiver) = &mut self.receiver else { return std::future::pending().await };
        let given = receiver.await.ok();
        self.receiver = None;
        given
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(receiver) = &mut self.receiver {
            receiver.close();
        }
        let mut gone = Vec::new();
        if let Some(pool) = self.shard.lock().h1.get_mut(&self.endpoint) {
            pool.waiting = pool.waiting.saturating_sub(1);
            gone.extend(iter::from_fn(|| pool.waiters.pop_back_if(|last| last.is_closed())));
            gone.extend(iter::from_fn(|| pool.waiters.pop_front_if(|first| first.is_closed())));
        }
        // Outside the lock: each may be the last to hold the task that waited.
        drop(gone);
        if let Some(Ok(conn)) = self.receiver.take().map(|mut receiver| receiver.try_recv()) {
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
struct Connecting {
    shard: Arc<Shard>,
    endpoint: u64,
    attempt: u64,
}

impl Connecting {
    fn new(shard: &Arc<Shard>, endpoint: u64) -> Self {
        let mut inner = shard.lock();
        let pool = inner.h1.entry(endpoint).or_default();
        pool.connecting += 1;
        pool.attempts += 1;
        let attempt = pool.attempts;
        drop(inner);
        Self { shard: Arc::clone(shard), endpoint, attempt }
    }

    /// What came of it.
    fn ended(self, error: Option<&Error>) {
        if let Some(pool) = self.shard.lock().h1.get_mut(&self.endpoint) {
            // Those that are open count here, and one more that is being made: this one.
            pool.proven = error.is_none() || (pool.proven && pool.open >= pool.connecting);
            if let Some(error) = error {
                pool.failed = Some((self.attempt, Arc::new(again(error))));
            }
        }
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        let changed = self.shard.lock().h1.get_mut(&self.endpoint).map(|pool| {
            pool.connecting = pool.connecting.saturating_sub(1);
            Arc::clone(&pool.changed)
        });
        // Outside the lock: it wakes who waits.
        if let Some(changed) = changed {
            changed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::{Context, Wake, Waker};
    use std::time::Duration;

    use super::*;

    /// Counts how often it was woken or dropped, and how often of them under the lock of the shard.
    #[derive(Clone)]
    struct Foreign(Arc<Shard>, Arc<[AtomicU32; 2]>);

    impl Foreign {
        fn new(shard: &Arc<Shard>) -> (Self, Arc<[AtomicU32; 2]>) {
            let seen = Arc::<[AtomicU32; 2]>::default();
            (Self(Arc::clone(shard), Arc::clone(&seen)), seen)
        }

        fn called(&self) {
            self.1[0].fetch_add(1, Ordering::Relaxed);
            self.1[1].fetch_add(u32::from(!self.0.is_free()), Ordering::Relaxed);
        }
    }

    impl Wake for Foreign {
        fn wake(self: Arc<Self>) {
            self.called();
        }
    }

    impl Drop for Foreign {
        fn drop(&mut self) {
            self.called();
        }
    }

    fn polled<F: Future>(future: Pin<&mut F>, foreign: Foreign) {
        let waker = Waker::from(Arc::new(foreign));
        assert!(future.poll(&mut Context::from_waker(&waker)).is_pending());
    }

    fn counted(seen: &[AtomicU32; 2]) -> [u32; 2] {
        [0, 1].map(|at| seen[at].load(Ordering::Relaxed))
    }

    fn parts() -> (Arc<Shard>, Arc<Endpoint>) {
        (Shard::seeded(1), Arc::new(Endpoint::secured(([127, 0, 0, 1], 1).into(), None)))
    }

    #[tokio::test(start_paused = true)]
    async fn bug_who_waited_was_woken_and_dropped_under_the_lock_of_the_shard() {
        let (shard, endpoint) = parts();
        // Who is told that a connection has been made.
        let (foreign, seen) = Foreign::new(&shard);
        let change = Arc::clone(&shard.lock().h1.entry(endpoint.id()).or_default().changed);
        let connecting = Connecting::new(&shard, endpoint.id());
        let mut notified = std::pin::pin!(change.notified());
        polled(notified.as_mut(), foreign);
        drop(connecting);
        assert_eq!(counted(&seen), [2, 0], "woken and dropped");
        // Who is given a connection, after one that has given up.
        let mut waits: Vec<_> = (0..2).map(|_| Waiting::new(&shard, endpoint.id())).collect();
        let seen: Vec<_> = waits
            .iter_mut()
            .map(|waiting| {
                let (foreign, seen) = Foreign::new(&shard);
                waiting.queue();
                polled(std::pin::pin!(waiting.given()), foreign);
                seen
            })
            .collect();
        waits[0].receiver.as_mut().unwrap().close();
        let (client, _server) = tokio::io::duplex(1024);
        let (sender, _connection) = http1::handshake(TokioIo::new(client)).await.unwrap();
        let meta = ConnMeta::new(None, None, &endpoint, &PoolSettings::default());
        let conn = Conn { handle: Handle::new(sender).0, meta: Box::new(meta) };
        Lease { conn, endpoint: endpoint.id(), shard: Arc::clone(&shard) }.give_back();
        assert!(waits[1].given().await.is_some());
        drop(waits);
        for seen in seen {
            let [called, under] = counted(&seen);
            assert!(called > 0 && under == 0, "{called} {under}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn bug_a_sweep_dropped_who_had_waited_under_the_lock_of_the_shard() {
        let (shard, endpoint) = parts();
        let mut first = Waiting::new(&shard, endpoint.id());
        let mut gone = Waiting::new(&shard, endpoint.id());
        let mut last = Waiting::new(&shard, endpoint.id());
        let (foreign, seen) = Foreign::new(&shard);
        [&mut first, &mut gone, &mut last].into_iter().for_each(Waiting::queue);
        polled(std::pin::pin!(gone.given()), foreign);
        // In the middle, where it is left for the sweep.
        drop(gone);
        shard.sweep();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(counted(&seen), [1, 0]);
        // At an end it goes with the next that goes.
        let (foreign, seen) = Foreign::new(&shard);
        polled(std::pin::pin!(first.given()), foreign);
        first.receiver.as_mut().unwrap().close();
        drop(last);
        drop(first);
        assert_eq!(counted(&seen), [1, 0]);
    }
}
