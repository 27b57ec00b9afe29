//! One open downstream connection as the rest of its worker sees it: what is in flight on it, and a handle to end it.
//!
//! Whoever has to reach open connections (a drain, later a policy that changed) walks [`Connections`], a slab that
//! belongs to one listener of one worker, and tells each its new [`Phase`]. That is one word and a waker per
//! connection, and nothing at all on the request path.
//!
//! A request counts as in flight while anything of it lives: its context holds an [`InFlight`], and request body,
//! response body and tunnels hold the context. So there is no separate guard to forget, and a
//! tunnel keeps its connection counted after HTTP has let go of it.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::Waker;

use tokio::sync::Notify;

use crate::conn::ConnInfo;
use crate::drain::{Phase, Token};
use crate::listener::{Open, Stats};

/// An open connection.
#[derive(Debug)]
pub(crate) struct Connection {
    accepted: Arc<ConnInfo>,
    /// What is known once TLS was terminated.
    secured: OnceLock<Arc<ConnInfo>>,
    /// The phase when it was accepted: what came during a drain has not been told yet.
    born: Phase,
    in_flight: AtomicUsize,
    requests: AtomicU32,
    reading_head: AtomicBool,
    phase: AtomicU8,
    trust: AtomicU8,
    /// The round of judgement when it was accepted.
    round: usize,
    /// By what its peer was judged last.
    judged: AtomicU64,
    driver: Mutex<Option<Waker>>,
    cut: Notify,
    registry: Arc<Connections>,
    seat: usize,
    permits: Permits,
}

/// What is thought of a connection's peer. Only ever goes up.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
enum Trust {
    /// It is not known yet who it is, or nobody asks.
    Unasked,
    /// It was let in, and speaks HTTP.
    LetIn,
    /// It was let in, and what it speaks is not known: it has no end but its own.
    LetInAsBytes,
    /// It would not be let in again.
    Distrusted,
}

/// What is given back when a connection is gone.
#[derive(Debug)]
pub(crate) struct Permits {
    pub(crate) open: Open,
    pub(crate) _load: Option<Loaded>,
    pub(crate) _tokens: (Option<Token>, Token),
}

impl Connection {
    pub(crate) fn new(info: ConnInfo, registry: &Arc<Connections>, permits: Permits) -> Arc<Self> {
        let phase = registry.phase();
        let round = registry.round.load(Ordering::SeqCst);
        let seat = registry.take_seat();
        let connection = Arc::new(Self {
            accepted: Arc::new(info),
            secured: OnceLock::new(),
            born: phase,
            in_flight: AtomicUsize::new(0),
            requests: AtomicU32::new(0),
            reading_head: AtomicBool::new(false),
            phase: AtomicU8::new(phase as u8),
            trust: AtomicU8::new(Trust::Unasked as u8),
            round,
            judged: AtomicU64::new(0),
            driver: Mutex::default(),
            cut: Notify::new(),
            registry: Arc::clone(registry),
            seat,
            permits,
        });
        registry.sit(seat, &connection);
        // The phase may have advanced between reading it and taking the seat.
        connection.tell(registry.phase());
        connection
    }

    pub(crate) fn info(&self) -> &Arc<ConnInfo> {
        self.secured.get().unwrap_or(&self.accepted)
    }

    /// Adds what the end of a handshake told, before anything is served.
    pub(crate) fn secure(&self, info: ConnInfo) {
        // There is one handshake; a second one would be told of nothing.
        let _ = self.secured.set(Arc::new(info));
    }

    /// Says that its peer was let in, by what was trusted at the beginning of the connection or later. True when trust may
    /// have changed since: then nobody but the caller judges it by what is trusted now.
    #[must_use]
    pub(crate) fn let_in(&self, as_bytes: bool) -> bool {
        let trust = if as_bytes { Trust::LetInAsBytes } else { Trust::LetIn };
        self.trust.fetch_max(trust as u8, Ordering::SeqCst);
        self.registry.round.load(Ordering::SeqCst) != self.round
    }

    /// Whether its peer was let in, and is trusted still.
    pub(crate) fn is_let_in(&self) -> bool {
        let trust = self.trust.load(Ordering::SeqCst);
        trust == Trust::LetIn as u8 || trust == Trust::LetInAsBytes as u8
    }

    /// Whether its peer was not judged by this yet, which from now on it is. By 0 it never was.
    pub(crate) fn is_news(&self, generation: u64) -> bool {
        self.judged.swap(generation, Ordering::Relaxed) != generation || generation == 0
    }

    /// Whether its peer would not be let in again.
    pub(crate) fn is_distrusted(&self) -> bool {
        self.trust.load(Ordering::Relaxed) == Trust::Distrusted as u8
    }

    /// Serves no request any more, and closes.
    pub(crate) fn distrust(&self) {
        let before = self.trust.swap(Trust::Distrusted as u8, Ordering::SeqCst);
        self.tell(if before == Trust::LetInAsBytes as u8 { Phase::Cut } else { Phase::Closing });
    }

    /// What is counted of its listener.
    pub(crate) fn stats(&self) -> &Arc<Stats> {
        self.permits.open.stats()
    }

    pub(crate) fn phase(&self) -> Phase {
        Phase::from_u8(self.phase.load(Ordering::Acquire))
    }

    pub(crate) fn was_born_draining(&self) -> bool {
        self.born > Phase::Serving
    }

    /// Advances the phase and wakes whoever drives the connection.
    pub(crate) fn tell(&self, phase: Phase) {
        if self.phase.fetch_max(phase as u8, Ordering::AcqRel) >= phase as u8 {
            return;
        }
        if let Some(waker) = self.driver().as_ref() {
            waker.wake_by_ref();
        }
        if phase == Phase::Cut {
            self.cut.notify_waiters();
        }
    }

    /// Whom to wake when the phase advances.
    pub(crate) fn driven_by(&self, waker: Waker) {
        *self.driver() = Some(waker);
    }

    /// Waits until the connection is to be cut.
    pub(crate) async fn cut(&self) {
        loop {
            let mut cut = pin!(self.cut.notified());
            cut.as_mut().enable();
            if self.phase() == Phase::Cut {
                return;
            }
            cut.await;
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// How many requests there were so far. It wraps.
    pub(crate) fn requests(&self) -> u32 {
        self.requests.load(Ordering::Relaxed)
    }

    /// A request's head is complete.
    pub(crate) fn count_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.reading_head.store(false, Ordering::Relaxed);
    }

    /// Bytes came. When no request is in flight they begin one.
    pub(crate) fn read_some(&self) {
        if self.in_flight() == 0 {
            self.reading_head.store(true, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_reading_head(&self) -> bool {
        self.reading_head.load(Ordering::Relaxed)
    }

    pub(crate) fn ended_request(&self) {
        self.reading_head.store(false, Ordering::Relaxed);
    }

    fn driver(&self) -> MutexGuard<'_, Option<Waker>> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.registry.leave(self.seat);
    }
}

/// A request on a connection, or what is left of it.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Connection>);

impl InFlight {
    pub(crate) fn on(connection: Arc<Connection>) -> Self {
        connection.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(connection)
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Release);
    }
}

/// The open connections of one listener of one worker, and the phase that new ones begin in.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    phase: AtomicU8,
    /// How often the peers of open connections were judged again.
    round: AtomicUsize,
    seats: Mutex<Seats>,
}

#[derive(Debug, Default)]
struct Seats {
    taken: Vec<Weak<Connection>>,
    free: Vec<usize>,
}

impl Connections {
    pub(crate) fn phase(&self) -> Phase {
        Phase::from_u8(self.phase.load(Ordering::Acquire))
    }

    /// Tells every connection that `phase` has come.
    pub(crate) fn tell(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
        // Telling wakes, and the last holder of a connection may be here: neither with the seats locked.
        let open: Vec<_> = self.seats().taken.iter().filter_map(Weak::upgrade).collect();
        for connection in open {
            connection.tell(phase);
        }
    }

    /// Begins a round of judgement: whoever is let in from here on was judged by what is trusted now, or finds out that a
    /// round has begun. The connections that are to be judged in it.
    pub(crate) fn begin_round(&self) -> Vec<Weak<Connection>> {
        self.round.fetch_add(1, Ordering::SeqCst);
        self.seats().taken.clone()
    }

    fn take_seat(&self) -> usize {
        let mut seats = self.seats();
        seats.free.pop().unwrap_or_else(|| {
            seats.taken.push(Weak::new());
            seats.taken.len() - 1
        })
    }

    fn sit(&self, seat: usize, connection: &Arc<Connection>) {
        if let Some(taken) = self.seats().taken.get_mut(seat) {
            *taken = Arc::downgrade(connection);
        }
    }

    fn leave(&self, seat: usize) {
        let mut seats = self.seats();
        if let Some(taken) = seats.taken.get_mut(seat) {
            *taken = Weak::new();
            seats.free.push(seat);
        }
    }

    fn seats(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many connections each worker has, so that an accepted socket goes to a worker that has few.
#[derive(Debug)]
pub(crate) struct Loads(Box<[AtomicUsize]>);

impl Loads {
    pub(crate) fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| AtomicUsize::new(0)).collect())
    }

    /// Who takes a connection that `worker` accepted: itself, unless it would then have more than one more than
    /// the least loaded.
    pub(crate) fn choose(&self, worker: usize) -> usize {
        let load =
            |worker: &usize| self.0.get(*worker).map_or(usize::MAX, |load| load.load(Ordering::Relaxed));
        let mine = load(&worker);
        let least = (0..self.0.len()).min_by_key(load).unwrap_or(worker);
        if mine.saturating_add(1).saturating_sub(load(&least)) > 1 { least } else { worker }
    }

    /// Counts a connection of `worker` until the value is dropped.
    pub(crate) fn load(self: &Arc<Self>, worker: usize) -> Loaded {
        if let Some(load) = self.0.get(worker) {
            load.fetch_add(1, Ordering::Relaxed);
        }
        Loaded { loads: Arc::clone(self), worker }
    }

    pub(crate) fn of(&self, worker: usize) -> usize {
        self.0.get(worker).map_or(0, |load| load.load(Ordering::Relaxed))
    }
}

/// A connection that a worker has.
#[derive(Debug)]
pub(crate) struct Loaded {
    loads: Arc<Loads>,
    worker: usize,
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Some(load) = self.loads.0.get(self.worker) {
            load.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_go_to_the_least_loaded_when_the_acceptor_has_more() {
        let loads = Arc::new(Loads::new(3));
        let mut held = Vec::new();
        for _ in 0..7 {
            // The kernel hands every connection to worker 0.
            held.push(loads.load(loads.choose(0)));
        }
        assert_eq!([loads.of(0), loads.of(1), loads.of(2)], [3, 2, 2]);
        held.clear();
        assert_eq!(loads.choose(2), 2);
    }

    #[test]
    fn one_worker_keeps_everything() {
        let loads = Arc::new(Loads::new(1));
        let _held: Vec<_> = (0..5).map(|_| loads.load(loads.choose(0))).collect();
        assert_eq!(loads.choose(0), 0);
    }
}
