//! Going away without anyone noticing: the phases of a drain, and what is still open.
//!
//! | phase | enters | listeners | connections |
//! |---|---|---|---|
//! | [`Serving`](Phase::Serving) | at start | accept | live |
//! | [`Draining`](Phase::Draining) | at the signal | accept: whoever routes here has not heard yet; readiness fails | HTTP/1 responses say `Connection: close`; HTTP/2 gets GOAWAY(2³¹−1), and the real last id a round trip later |
//! | [`Closing`](Phase::Closing) | after [`DrainTimes::drain_time`], or as soon as nothing is open | empty their backlog, then close | idle ones close, the others finish what is in flight |
//! | [`Cut`](Phase::Cut) | after [`DrainTimes::deadline`], or when a second signal comes | – | cut, with response flags `DC,SI` |
//!
//! An idle HTTP/1 connection stays open while `Draining`: closing it would race with a request that is already on
//! its way, and a client may not send that again. It hears of the drain with its next response instead.
//!
//! A [`Drain`] is shared by all workers: the phase travels by a `watch` channel, and what is open is counted with
//! [`Token`]s, one atomic operation per connection and none per request. A tunnel keeps its connection's token
//! through its request context, so an upgraded connection counts until both of its ends are done. A listener that
//! configuration removes drains by a `Drain` of its own, with the same states.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout, timeout_at};

/// How long what was cut may take to let go before [`Drain::run`] returns without it.
const CUT_GRACE: Duration = Duration::from_millis(100);

/// Where a drain stands. Phases only ever advance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Phase {
    /// Nothing drains.
    Serving,
    /// Everyone is told to go elsewhere; everything is served.
    Draining,
    /// Nothing new comes in; what is in flight ends.
    Closing,
    /// What is still open is cut.
    Cut,
}

impl Phase {
    pub(crate) const fn from_u8(phase: u8) -> Self {
        match phase {
            0 => Self::Serving,
            1 => Self::Draining,
            2 => Self::Closing,
            _ => Self::Cut,
        }
    }
}

/// How long a drain takes at most. Both are measured from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainTimes {
    /// How long listeners go on accepting. Default 5 s (Istio's `terminationDrainDuration`).
    pub drain_time: Duration,
    /// When everything is cut. Default 45 s (Istio's `drainDuration`).
    pub deadline: Duration,
}

impl Default for DrainTimes {
    fn default() -> Self {
        Self { drain_time: Duration::from_secs(5), deadline: Duration::from_secs(45) }
    }
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Everything came to its own end.
    Finished,
    /// The deadline passed; this many connections were cut.
    Cut(usize),
    /// A second signal came; this many connections were cut.
    AtOnce(usize),
}

/// The phase of a drain, and the count of what it waits for. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Drain(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    phase: watch::Sender<Phase>,
    open: AtomicUsize,
    accepting: AtomicUsize,
    fewer: Notify,
}

impl Drain {
    /// Nothing is open and nothing drains.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            phase: watch::Sender::new(Phase::Serving),
            open: AtomicUsize::new(0),
            accepting: AtomicUsize::new(0),
            fewer: Notify::new(),
        }))
    }

    /// The current phase. Readiness is `phase() == Phase::Serving`.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.0.phase.borrow()
    }

    /// Hears of every change of the phase.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Phase> {
        self.0.phase.subscribe()
    }

    /// Counts something as open until the token is dropped.
    #[must_use]
    pub fn token(&self) -> Token {
        self.0.open.fetch_add(1, Ordering::Relaxed);
        Token(Arc::clone(&self.0))
    }

    /// How many tokens there are.
    #[must_use]
    pub fn open(&self) -> usize {
        self.0.open.load(Ordering::Acquire)
    }

    /// Counts a listener that accepts until the value is dropped.
    pub(crate) fn accepting(&self) -> Accepting {
        self.0.accepting.fetch_add(1, Ordering::Relaxed);
        Accepting(Arc::clone(&self.0))
    }

    /// Waits until no listener accepts any more.
    pub(crate) async fn accepts_no_more(&self) {
        self.until(|shared| shared.accepting.load(Ordering::Acquire) == 0).await;
    }

    /// Goes through the phases, and returns as soon as nothing is open. `at_once` cuts the rest short when it
    /// completes: the second signal. Calling it again joins the drain where it stands.
    pub async fn run(&self, times: DrainTimes, at_once: impl Future<Output = ()>) -> Drained {
        let start = Instant::now();
        let in_time = tokio::select! {
            biased;
            () = at_once => None,
            in_time = self.until_closed(start, times) => Some(in_time),
        };
        let left = self.open();
        self.enter(Phase::Cut);
        match in_time {
            Some(true) => return Drained::Finished,
            Some(false) => tracing::warn!(connections = left, "the drain deadline passed, cutting"),
            None => tracing::warn!(connections = left, "asked to end at once, cutting"),
        }
        // Nobody waits for these but the process's exit; what they hold is freed either way.
        let _ = timeout(CUT_GRACE, self.until(|shared| shared.open.load(Ordering::Acquire) == 0)).await;
        if in_time.is_some() { Drained::Cut(left) } else { Drained::AtOnce(left) }
    }

    async fn until_closed(&self, start: Instant, times: DrainTimes) -> bool {
        self.enter(Phase::Draining);
        let nothing_open = self.until(|shared| shared.open.load(Ordering::Acquire) == 0);
        // Both outcomes lead to the next phase.
        let _ = timeout_at(start + times.drain_time.min(times.deadline), nothing_open).await;
        self.enter(Phase::Closing);
        // A listener that empties its backlog takes tokens before it says that it accepts no more.
        let nothing_left = self.until(|shared| {
            shared.accepting.load(Ordering::Acquire) == 0 && shared.open.load(Ordering::Acquire) == 0
        });
        timeout_at(start + times.deadline, nothing_left).await.is_ok()
    }

    fn enter(&self, phase: Phase) {
        self.0.phase.send_if_modified(|current| {
            let advances = *current < phase;
            *current = phase.max(*current);
            advances
        });
    }

    async fn until(&self, reached: impl Fn(&Shared) -> bool) {
        loop {
            let mut fewer = pin!(self.0.fewer.notified());
            fewer.as_mut().enable();
            if reached(&self.0) {
                return;
            }
            fewer.await;
        }
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self::new()
    }
}

/// Something that a drain waits for: a connection, a tunnel.
#[derive(Debug)]
pub struct Token(Arc<Shared>);

impl Drop for Token {
    fn drop(&mut self) {
        if self.0.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.fewer.notify_waiters();
        }
    }
}

/// A listener that accepts.
#[derive(Debug)]
pub(crate) struct Accepting(Arc<Shared>);

impl Drop for Accepting {
    fn drop(&mut self) {
        if self.0.accepting.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.fewer.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::{advance, sleep};

    use super::*;

    fn times() -> DrainTimes {
        DrainTimes::default()
    }

    #[tokio::test(start_paused = true)]
    async fn pt_05_ends_at_once_when_nothing_is_open() {
        let start = Instant::now();
        assert_eq!(Drain::new().run(times(), pending()).await, Drained::Finished);
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn pt_05_listeners_accept_for_the_drain_time_and_then_the_last_request_decides() {
        let drain = Drain::new();
        let (accepting, token) = (drain.accepting(), drain.token());
        let start = Instant::now();
        let running = tokio::spawn({
            let drain = drain.clone();
            async move { drain.run(times(), pending()).await }
        });
        let mut phase = drain.subscribe();
        phase.wait_for(|phase| *phase == Phase::Draining).await.unwrap();
        assert_eq!(start.elapsed(), Duration::ZERO);
        phase.wait_for(|phase| *phase == Phase::Closing).await.unwrap();
        assert_eq!(start.elapsed(), Duration::from_secs(5));
        // The backlog held one more.
        let late = drain.token();
        drop(accepting);
        drop(token);
        sleep(Duration::from_secs(7)).await;
        assert!(!running.is_finished());
        drop(late);
        assert_eq!(running.await.unwrap(), Drained::Finished);
        assert_eq!(start.elapsed(), Duration::from_secs(12));
    }

    #[tokio::test(start_paused = true)]
    async fn pt_05_closes_early_when_the_last_connection_goes() {
        let drain = Drain::new();
        let token = drain.token();
        let start = Instant::now();
        let running = tokio::spawn({
            let drain = drain.clone();
            async move { drain.run(times(), pending()).await }
        });
        sleep(Duration::from_secs(1)).await;
        assert_eq!(drain.phase(), Phase::Draining);
        drop(token);
        assert_eq!(running.await.unwrap(), Drained::Finished);
        assert_eq!(start.elapsed(), Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn h2_what_never_ends_is_cut_at_the_deadline() {
        let drain = Drain::new();
        let token = drain.token();
        let start = Instant::now();
        let cut = tokio::spawn({
            let mut phase = drain.subscribe();
            async move {
                phase.wait_for(|phase| *phase == Phase::Cut).await.unwrap();
                drop(token);
                start.elapsed()
            }
        });
        assert_eq!(drain.run(times(), pending()).await, Drained::Cut(1));
        assert_eq!(start.elapsed(), Duration::from_secs(45));
        assert_eq!(cut.await.unwrap(), Duration::from_secs(45));
    }

    #[tokio::test(start_paused = true)]
    async fn h2_what_ignores_the_cut_is_not_waited_for() {
        let drain = Drain::new();
        let _token = drain.token();
        let start = Instant::now();
        assert_eq!(drain.run(times(), pending()).await, Drained::Cut(1));
        assert_eq!(start.elapsed(), Duration::from_secs(45) + CUT_GRACE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_signal_ends_it_at_once() {
        let drain = Drain::new();
        let token = drain.token();
        let start = Instant::now();
        let letting_go = tokio::spawn({
            let mut phase = drain.subscribe();
            async move {
                phase.wait_for(|phase| *phase == Phase::Cut).await.unwrap();
                drop(token);
            }
        });
        let drained = drain.run(times(), sleep(Duration::from_secs(2))).await;
        assert_eq!(drained, Drained::AtOnce(1));
        assert_eq!(start.elapsed(), Duration::from_secs(2));
        letting_go.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_shorter_than_the_drain_time_wins() {
        let drain = Drain::new();
        let _token = drain.token();
        let start = Instant::now();
        let times = DrainTimes { drain_time: Duration::from_secs(5), deadline: Duration::from_secs(1) };
        assert_eq!(drain.run(times, pending()).await, Drained::Cut(1));
        assert_eq!(start.elapsed(), Duration::from_secs(1) + CUT_GRACE);
        advance(Duration::from_secs(10)).await;
        assert_eq!(drain.phase(), Phase::Cut);
    }
}
