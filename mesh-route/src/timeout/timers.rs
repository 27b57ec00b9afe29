//! Timers that are used again, so that a request with a limit on its time allocates none.
//!
//! A timer of tokio's is a large thing with a place in the runtime's wheel. Most never fire, and putting one off is
//! cheap, so those of requests that are done are kept for the next. A kept timer may still fire: it wakes through a
//! [`Relay`], which has forgotten whom.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use tokio::runtime::{Handle, Id};
use tokio::time::{Instant, Sleep, sleep};

use super::deadline::Measured;

/// Timers that are kept at most.
const MOST: usize = 1024;

/// The timers of a shard, or of one layer's service and its clones. Whoever else is at them just now is not waited for.
#[derive(Debug, Default)]
#[allow(
    clippy::vec_box,
    reason = "whoever takes one holds a pointer, and moving it out of its box would be a copy"
)]
pub(crate) struct Timers(Mutex<Vec<Box<Timer>>>);

/// A timer, for the runtime that made it.
#[derive(Debug)]
pub(super) struct Timer {
    sleep: Pin<Box<Sleep>>,
    runtime: Id,
    relay: Arc<Relay>,
    waker: Waker,
    /// What it measures; `None` while it is kept.
    pub(super) of: Option<Measured>,
}

impl Timers {
    /// A timer, which has to be set.
    pub(super) fn take(&self) -> Box<Timer> {
        let runtime = Handle::current().id();
        match self.0.try_lock().ok().and_then(|mut kept| kept.pop()) {
            Some(kept) if kept.runtime == runtime => kept,
            _ => {
                let relay = Arc::new(Relay::default());
                let waker = Waker::from(Arc::clone(&relay));
                Box::new(Timer { sleep: Box::pin(sleep(Duration::MAX)), runtime, relay, waker, of: None })
            }
        }
    }

    /// Keeps a timer that nobody waits for any more.
    pub(super) fn keep(&self, mut timer: Box<Timer>) {
        timer.of = None;
        timer.relay.set(None);
        if let Ok(mut kept) = self.0.try_lock()
            && kept.len() < MOST
        {
            kept.push(timer);
        }
    }
}

impl Timer {
    /// Fires at `at`, and not before.
    pub(super) fn set(&mut self, at: Instant) {
        self.sleep.as_mut().reset(at);
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.relay.set(Some(cx.waker()));
        self.sleep.as_mut().poll(&mut Context::from_waker(&self.waker))
    }
}

/// Wakes the task that waits now.
#[derive(Debug, Default)]
pub(super) struct Relay(Mutex<Option<Waker>>);

impl Relay {
    pub(super) fn set(&self, waker: Option<&Waker>) {
        if let Some(waker) = waker
            && self.lock().as_ref().is_some_and(|waiting| waiting.will_wake(waker))
        {
            return;
        }
        let waiting = waker.cloned();
        let before = std::mem::replace(&mut *self.lock(), waiting);
        // Outside the lock: whoever is the last to hold a task ends it.
        drop(before);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Waker>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Relay {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let waiting = self.lock().take();
        if let Some(waker) = waiting {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Woken(Mutex<u32>);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            *self.0.lock().unwrap() += 1;
        }
    }

    fn after(timer: &mut Timer, secs: u64) -> impl Future<Output = Duration> {
        let started = Instant::now();
        timer.set(started + Duration::from_secs(secs));
        std::future::poll_fn(move |cx| timer.poll(cx).map(|()| started.elapsed()))
    }

    #[tokio::test(start_paused = true)]
    async fn vs_t01_a_timer_is_used_again_and_forgets_whom_it_would_have_woken() {
        let timers = Timers::default();
        let woken = Arc::new(Woken::default());
        let mut timer = timers.take();
        let first = std::ptr::from_ref(&*timer);
        timer.set(Instant::now() + Duration::from_secs(1));
        assert!(timer.poll(&mut Context::from_waker(&Arc::clone(&woken).into())).is_pending());
        timers.keep(timer);
        assert_eq!(Arc::strong_count(&woken), 1, "what waited is not held");
        sleep(Duration::from_secs(2)).await;
        assert_eq!(*woken.0.lock().unwrap(), 0);
        let mut timer = timers.take();
        assert_eq!(std::ptr::from_ref(&*timer), first);
        assert_eq!(after(&mut timer, 3).await, Duration::from_secs(3), "it fired before, and fires again");
        assert_eq!(after(&mut timers.take(), 5).await, Duration::from_secs(5));
    }

    #[test]
    fn a_timer_of_another_runtime_is_not_used() {
        let timers = Timers::default();
        for _ in 0..2 {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            runtime.enable_time().start_paused(true).build().unwrap().block_on(async {
                let mut timer = timers.take();
                assert_eq!(after(&mut timer, 1).await, Duration::from_secs(1));
                timers.keep(timer);
            });
        }
    }
}
