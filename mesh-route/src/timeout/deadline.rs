//! The deadline of one exchange: its time starts when the whole request has been received. That of one that idles starts
//! at once, and again with each piece of the request that the upstream takes.
//!
//! What is here already has been received. Of a body that streams nobody knows before somebody asks for it, and nobody
//! does while a connection is made or waited for: until then the time runs, as for any other. It stands still from the
//! first time that the body is asked for, and starts again at its end, so that it does not cut an upload. A body that comes
//! back unread, for another try, is nobody's again, and the time that was left goes on.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::Body as _;
use mesh_core::{Body, BodyHook, EndOfBody, Error};
use tokio::time::Instant;

use super::timers::{Timer, Timers};

/// A limit on the time of an exchange, or of its head. One pointer wide, as it lies in the future of every request.
#[derive(Debug)]
pub(crate) struct Deadline(Option<Box<Timer>>);

/// What a timer measures.
#[derive(Debug)]
pub(super) struct Measured {
    /// Where the timer is kept afterwards.
    timers: Arc<Timers>,
    /// What puts it off: a request that is still to be received.
    received: Option<Arc<Received>>,
    /// Whether it runs while that is received too, and starts again with each piece that passes.
    idles: bool,
    /// Another one, which began at another time.
    beside: Option<Deadline>,
    error: fn() -> Error,
}

/// When a request had been received.
#[derive(Debug)]
struct Received {
    timeout: Duration,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    /// `None` while the time stands still.
    deadline: Option<Instant>,
    /// What was left when it began to.
    left: Duration,
    /// Whether the whole request has been received.
    whole: bool,
    waiting: Option<Waker>,
}

impl Deadline {
    /// A deadline for a request with this body; the body says when it has been received. `error` is what passes in the
    /// place of the exchange. One that is too far off for the clock never passes.
    pub(crate) fn new(
        timers: &Arc<Timers>,
        timeout: Duration,
        body: &mut Body,
        error: fn() -> Error,
    ) -> Self {
        let Some(at) = Instant::now().checked_add(timeout) else { return Self(None) };
        let mut timer = timers.take();
        timer.set(at);
        let mut received = None;
        if !body.is_end_stream() && body.as_full().is_none() {
            let progress = Progress { deadline: Some(at), left: timeout, whole: false, waiting: None };
            received = Some(Received::by(body, timeout, progress, false));
        }
        timer.of = Some(Measured { timers: Arc::clone(timers), received, idles: false, beside: None, error });
        Self(Some(timer))
    }

    /// A deadline that runs from now, and from each piece of this body that is taken; and another one beside it.
    pub(crate) fn idle(
        timers: &Arc<Timers>,
        timeout: Duration,
        body: &mut Body,
        beside: Option<Self>,
    ) -> Self {
        let Some(at) = Instant::now().checked_add(timeout) else { return beside.unwrap_or(Self(None)) };
        let mut timer = timers.take();
        timer.set(at);
        // What is here already is nobody's to wait for.
        let whole = body.as_full().is_some();
        let progress = Progress { deadline: Some(at), left: timeout, whole, waiting: None };
        timer.of = Some(Measured {
            timers: Arc::clone(timers),
            received: Some(Received::by(body, timeout, progress, true)),
            idles: true,
            beside,
            error: super::idle,
        });
        Self(Some(timer))
    }

    /// Whether it runs from one piece of the request to the next.
    pub(crate) fn idles(&self) -> bool {
        self.0.as_ref().and_then(|timer| timer.of.as_ref()).is_some_and(|measured| measured.idles)
    }

    /// The timer, with what puts it off.
    pub(super) fn into_timer(mut self) -> Option<Box<Timer>> {
        let mut timer = self.0.take()?;
        if let Some(measured) = &mut timer.of {
            measured.beside = None;
        }
        Some(timer)
    }

    /// Its error, when it has passed.
    pub(crate) fn poll_passed(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let Some(timer) = self.0.as_mut() else { return Poll::Pending };
        if let Some(Measured { beside: Some(beside), .. }) = &mut timer.of
            && let Poll::Ready(error) = beside.poll_passed(cx)
        {
            return Poll::Ready(error);
        }
        loop {
            ready!(timer.poll(cx));
            let Some(Measured { received, idles, error, .. }) = &timer.of else { return Poll::Pending };
            let Some(request) = received else { return Poll::Ready(error()) };
            // It was set for what was known then.
            let (at, whole) = ready!(request.poll(cx));
            if at <= Instant::now() {
                return Poll::Ready(if *idles && !whole { super::idle_request() } else { error() });
            }
            timer.set(at);
        }
    }
}

/// Runs an exchange, unless its deadline passes first. Awaited at one place whether there is a deadline or not, so that
/// the exchange lies once in the future of a request.
///
/// # Errors
/// The deadline's, when it has passed.
pub(crate) fn bound<F: Future>(
    deadline: &mut Option<Deadline>,
    mut exchange: Pin<&mut F>,
) -> impl Future<Output = Result<F::Output, Error>> {
    poll_fn(move |cx| match (exchange.as_mut().poll(cx), &mut *deadline) {
        (Poll::Ready(output), _) => Poll::Ready(Ok(output)),
        (Poll::Pending, None) => Poll::Pending,
        (Poll::Pending, Some(deadline)) => deadline.poll_passed(cx).map(Err),
    })
}

impl Drop for Deadline {
    fn drop(&mut self) {
        if let Some(mut timer) = self.0.take()
            && let Some(Measured { timers, .. }) = timer.of.take()
        {
            timers.keep(timer);
        }
    }
}

impl Measured {
    /// Until when nothing of the request need pass.
    pub(super) fn put_off(&self) -> Option<Instant> {
        self.received.as_ref().and_then(|request| request.lock().deadline)
    }
}

impl Received {
    /// Told by this body, with each of its pieces or when it begins and ends.
    fn by(body: &mut Body, timeout: Duration, progress: Progress, by_piece: bool) -> Arc<Self> {
        let request = Arc::new(Self { timeout, progress: Mutex::new(progress) });
        let hook = OnReceived { request: Arc::clone(&request), by_piece, begun: false };
        // A body that is sent again has those of the tries before, whose deadlines are gone.
        match body.find_hook::<OnReceived>(|hook| Arc::strong_count(&hook.request) == 1) {
            Some(over) => *over = hook,
            None => *body = std::mem::take(body).with_hook(hook),
        }
        request
    }

    /// Until when there is time, and whether the request is whole.
    fn poll(&self, cx: &Context<'_>) -> Poll<(Instant, bool)> {
        // Cloned and dropped outside the lock: whoever is the last to hold a task ends it, and with it this body.
        let mut waiting = None;
        loop {
            let mut progress = self.lock();
            if let Some(deadline) = progress.deadline {
                let known = (deadline, progress.whole);
                drop(progress);
                return Poll::Ready(known);
            }
            if progress.waiting.as_ref().is_some_and(|waiting| waiting.will_wake(cx.waker())) {
                return Poll::Pending;
            }
            if waiting.is_some() {
                std::mem::swap(&mut progress.waiting, &mut waiting);
                drop(progress);
                return Poll::Pending;
            }
            drop(progress);
            waiting = Some(cx.waker().clone());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct OnReceived {
    request: Arc<Received>,
    by_piece: bool,
    /// Whether the body was asked for.
    begun: bool,
}

impl OnReceived {
    fn start(&self, whole: bool) {
        self.go_on(|progress| {
            progress.whole |= whole;
            self.request.timeout
        });
    }

    /// Lets the time run, for as long as this says.
    fn go_on(&self, time: impl FnOnce(&mut Progress) -> Duration) {
        let waiting = {
            let mut progress = self.request.lock();
            let time = time(&mut progress);
            progress.deadline = Instant::now().checked_add(time);
            progress.waiting.take()
        };
        if let Some(waker) = waiting {
            waker.wake();
        }
    }
}

impl BodyHook for OnReceived {
    fn poll_end(&mut self, _: &mut Context<'_>) -> Poll<Error> {
        if !std::mem::replace(&mut self.begun, true) && !self.by_piece {
            let mut progress = self.request.lock();
            if let Some(deadline) = progress.deadline.take() {
                progress.left = deadline.saturating_duration_since(Instant::now());
            }
        }
        Poll::Pending
    }

    fn on_given_back(&mut self) {
        if std::mem::take(&mut self.begun) && !self.by_piece {
            self.go_on(|progress| progress.left);
        }
    }

    fn on_data(&mut self, _: &Bytes) {
        if self.by_piece {
            self.start(false);
        }
    }

    fn on_end(&mut self, end: EndOfBody<'_>) {
        // The time of one that nobody asked for runs already.
        if self.begun || self.by_piece {
            self.start(matches!(end, EndOfBody::Complete));
        }
    }
}

/// Ends the body of a response when it has passed.
impl BodyHook for Deadline {
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        self.poll_passed(cx)
    }

    fn on_end(&mut self, _: EndOfBody<'_>) {}
}

#[cfg(test)]
mod tests {
    use http_body_util::channel::Channel;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn bug_the_deadlines_of_tries_that_were_over_stayed_on_the_body() {
        let timers = Arc::default();
        let second = Duration::from_secs(1);
        let (_sender, body) = Channel::<Bytes, Error>::new(1);
        let mut body = Body::new(body);
        let route = Deadline::new(&timers, 9 * second, &mut body, crate::timeout::route);
        let hooks = |body: &mut Body| {
            let mut count = 0;
            let none = body.find_hook::<OnReceived>(|_| {
                count += 1;
                false
            });
            assert!(none.is_none());
            count
        };
        for _ in 0..4 {
            let per_try = Deadline::new(&timers, 2 * second, &mut body, crate::timeout::per_try);
            let both = Deadline::idle(&timers, second, &mut body, Some(per_try));
            assert_eq!(hooks(&mut body), 3);
            drop(both);
        }
        // And they still tell it who lives.
        let mut per_try = Deadline::new(&timers, 2 * second, &mut body, crate::timeout::per_try);
        let started = Instant::now();
        poll_fn(|cx| per_try.poll_passed(cx)).await;
        assert_eq!(started.elapsed(), 2 * second);
        drop((route, per_try));
    }
}
