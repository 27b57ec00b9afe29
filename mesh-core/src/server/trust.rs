//! Trust in peers whose connections are open: judged again whenever it may have changed (D9).
//!
//! A handshake judges a peer by what is trusted at that moment, and the connection may live for weeks. So each listener of
//! each worker has one task, [`OpenConnections::judge_by`], that hears of new generations and of changes of trust (roots,
//! revocations, trust domains), and asks of every open connection whether it would be let in now. Requests pay nothing
//! for it but one look at a byte of their connection.
//!
//! Who would not be let in is told to close: an idle HTTP/1 connection closes, an HTTP/2 one says GOAWAY, a request that
//! comes in between is refused, and what is in flight has [`LAST_WORD`] to end. Bytes of which we know no beginning and
//! no end (raw TCP, tunnels) are cut, the former at once.
//!
//! **No gap.** A connection is looked at only once it was let in, since before that it is nobody yet. The number of
//! rounds closes the gap between: it goes up before a round looks at anything, and whoever finds it changed between the
//! beginning of his handshake and its end is judged again by what is trusted now.
//!
//! **Time.** That a certificate ends while its connection lives changes nothing, as with Envoy: peers renew theirs long
//! before, and a connection is as old as its handshake. So a judge takes certificates as of the last moment at which they
//! were valid, and a new revocation list does not close the connections of everybody who has been connected for a day.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::watch;

use super::connection::{Connection, Connections};
use super::edge::Edge;
use crate::conn::ConnInfo;
use crate::drain::Phase;
use crate::snapshot::{Pinned, Snapshots};

/// How long requests that are in flight may still take when their client is no longer trusted.
pub(crate) const LAST_WORD: Duration = Duration::from_secs(1);

/// How many connections are looked at in one go, where that costs nothing.
const SLICE: usize = 256;

/// Judges peers whose connections are open.
pub trait Judge: Send + Sync + 'static {
    /// Whether this peer would be let in now, by the newest snapshot. Asked once per certificate and change. Default yes.
    ///
    /// # Errors
    /// When it would not; the words are for the log.
    fn judge(&self, info: &ConnInfo, snapshot: Option<&Pinned>) -> Result<(), String> {
        let _ = (info, snapshot);
        Ok(())
    }

    /// By what this peer is judged, as a number: while it is the same, so is the verdict, and it is not asked for. 0, the
    /// default, says nothing.
    fn generation(&self, info: &ConnInfo, snapshot: Option<&Pinned>) -> u64 {
        let _ = (info, snapshot);
        0
    }

    /// What tells of changes of trust that come without a new snapshot. Asked anew after each change. Default nothing.
    fn changes(&self) -> Vec<watch::Receiver<u64>> {
        Vec::new()
    }
}

/// The open connections of one listener on one worker.
pub struct OpenConnections {
    edge: Weak<dyn Held>,
    snapshots: Option<Snapshots>,
}

/// What is known of an edge without its stack.
trait Held: Send + Sync {
    fn connections(&self) -> &Arc<Connections>;
    fn pinned(&self) -> Option<Pinned>;
    fn pin(&self, pinned: Pinned);
}

impl<S: Send> Held for Edge<S> {
    fn connections(&self) -> &Arc<Connections> {
        &self.connections
    }

    fn pinned(&self) -> Option<Pinned> {
        Self::pinned(self)
    }

    fn pin(&self, pinned: Pinned) {
        Self::pin(self, pinned);
    }
}

impl OpenConnections {
    pub(crate) fn of<S: Send + 'static>(edge: &Arc<Edge<S>>, snapshots: Option<Snapshots>) -> Self {
        let edge: Weak<Edge<S>> = Arc::downgrade(edge);
        Self { edge, snapshots }
    }

    /// Asks `judge` of every open connection, at each new snapshot and each change of trust. Ends with the listener, at
    /// the next of them.
    pub async fn judge_by(self, judge: Arc<impl Judge>) {
        let mut generations = self.snapshots.as_ref().map(Snapshots::subscribe);
        loop {
            // First what tells of the next change, then what there is now: nothing falls between.
            let changes = judge.changes();
            if let Some(generations) = &mut generations {
                generations.mark_unchanged();
            }
            let Some(edge) = self.edge.upgrade() else { return };
            if let Some(snapshots) = &self.snapshots {
                // Whoever is let in from here on is let in by the newest.
                edge.pin(Arc::new(snapshots.load()));
            }
            let open = edge.connections().begin_round();
            let snapshot = edge.pinned();
            drop(edge);
            round(&*judge, open, snapshot).await;
            any(changes, generations.as_mut()).await;
        }
    }
}

impl std::fmt::Debug for OpenConnections {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenConnections").finish_non_exhaustive()
    }
}

/// Judges one connection that was let in, and tells it to close.
pub(crate) fn judge_one(judge: &impl Judge, connection: &Arc<Connection>, snapshot: Option<&Pinned>) {
    if let Err(reason) = judge.judge(connection.info(), snapshot) {
        distrust(vec![refuse(connection, &reason)]);
    }
}

/// Asks of each connection once, and of each certificate once.
async fn round(judge: &impl Judge, open: Vec<Weak<Connection>>, snapshot: Option<Pinned>) {
    let mut verdicts = Verdicts::default();
    let mut refused = Vec::new();
    let mut looked = 0;
    for connection in open {
        let Some(connection) = connection.upgrade() else { continue };
        if !connection.is_let_in() {
            continue;
        }
        let generation = judge.generation(connection.info(), snapshot.as_ref());
        if !connection.is_news(generation) {
            continue;
        }
        let (verdict, is_new) = verdicts.of(judge, connection.info(), snapshot.as_ref());
        if let Err(reason) = verdict {
            refused.push(refuse(&connection, &reason));
        }
        drop(connection);
        looked += 1;
        if is_new || looked % SLICE == 0 {
            // Requests come first: a signature takes a tenth of a millisecond.
            tokio::task::yield_now().await;
        }
    }
    distrust(refused);
}

/// What was found so far in a round.
#[derive(Default)]
struct Verdicts(HashMap<Key, Vec<Verdict>>);

/// Of one chain.
type Verdict = (Arc<[Vec<u8>]>, Result<(), String>);

type Key = (u16, Option<Arc<str>>, [u8; 32]);

impl Verdicts {
    /// The verdict, and whether it had to be found.
    fn of(
        &mut self,
        judge: &impl Judge,
        info: &ConnInfo,
        snapshot: Option<&Pinned>,
    ) -> (Result<(), String>, bool) {
        let Some(peer) = &info.identity else { return (judge.judge(info, snapshot), false) };
        let known = self.0.entry((info.port, info.sni.clone(), peer.fingerprint)).or_default();
        if let Some((_, verdict)) = known.iter().find(|(chain, _)| *chain == peer.chain) {
            return (verdict.clone(), false);
        }
        let verdict = judge.judge(info, snapshot);
        known.push((Arc::clone(&peer.chain), verdict.clone()));
        (verdict, true)
    }
}

fn refuse(connection: &Arc<Connection>, reason: &str) -> Weak<Connection> {
    let info = connection.info();
    tracing::info!(peer = %info.peer, listener = &*info.listener, "closing a connection: {reason}");
    connection.stats().distrusted.fetch_add(1, Ordering::Relaxed);
    connection.distrust();
    Arc::downgrade(connection)
}

/// Cuts what has not ended by itself in time.
fn distrust(refused: Vec<Weak<Connection>>) {
    if refused.is_empty() {
        return;
    }
    tokio::spawn(async move {
        tokio::time::sleep(LAST_WORD).await;
        for connection in refused.iter().filter_map(Weak::upgrade) {
            connection.tell(Phase::Cut);
        }
    });
}

/// Waits for whatever changes first.
async fn any(changes: Vec<watch::Receiver<u64>>, generations: Option<&mut watch::Receiver<u64>>) {
    type Waiting<'w> = Pin<Box<dyn Future<Output = ()> + Send + 'w>>;
    let own = changes
        .into_iter()
        .map(|mut changes| Box::pin(async move { changed(&mut changes).await }) as Waiting<'_>);
    let snapshots = generations.map(|generations| Box::pin(changed(generations)) as Waiting<'_>);
    let mut all: Vec<Waiting<'_>> = own.chain(snapshots).collect();
    poll_fn(|cx| {
        let is_one = all.iter_mut().any(|waiting| waiting.as_mut().poll(cx).is_ready());
        if is_one { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// What will never change again never has.
async fn changed(changes: &mut watch::Receiver<u64>) {
    if changes.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
