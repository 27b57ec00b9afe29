//! The deadline of one exchange: its time starts when the whole request has been received. That of one that idles starts
//! at once, and again with each piece of the request that the upstream takes.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
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
    /// What it waits for before it starts.
    received: Option<Arc<Received>>,
    /// Whether it runs meanwhile too, and starts again with each piece that passes.
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

#[derive(Debug, Default)]
struct Progress {
    deadline: Option<Instant>,
    /// Whether the whole request has been received.
    whole: bool,
    waiting: Option<Waker>,
}

impl Deadline {
    /// A deadline for a request with this body; the body says when it has been received. `error` is what passes in the
    /// place of the exchange.
    pub(crate) fn new(
        timers: &Arc<Timers>,
        timeout: Duration,
        body: &mut Body,
        error: fn() -> Error,
    ) -> Self {
        let mut timer = timers.take();
        let mut received = None;
        if body.is_end_stream() {
            timer.set(Instant::now() + timeout);
        } else {
            let request = Arc::new(Received { timeout, progress: Mutex::default() });
            let hook = OnReceived { request: Arc::clone(&request), by_piece: false };
            *body = std::mem::take(body).with_hook(hook);
            received = Some(request);
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
        let mut timer = timers.take();
        let at = Instant::now() + timeout;
        timer.set(at);
        // What is here already is nobody's to wait for.
        let whole = body.as_full().is_some();
        let progress = Progress { deadline: Some(at), whole, waiting: None };
        let request = Arc::new(Received { timeout, progress: Mutex::new(progress) });
        let hook = OnReceived { request: Arc::clone(&request), by_piece: true };
        *body = std::mem::take(body).with_hook(hook);
        timer.of = Some(Measured {
            timers: Arc::clone(timers),
            received: Some(request),
            idles: true,
            beside,
            error: super::idle,
        });
        Self(Some(timer))
    }

    /// Its error, when it has passed.
    pub(crate) fn poll_passed(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let Some(timer) = self.0.as_mut() else { return Poll::Pending };
        let Some(Measured { received, idles, beside, error, .. }) = &mut timer.of else {
            return Poll::Pending;
        };
        if let Some(beside) = beside
            && let Poll::Ready(error) = beside.poll_passed(cx)
        {
            return Poll::Ready(error);
        }
        let error = *error;
        if *idles && let Some(request) = received {
            let request = Arc::clone(request);
            loop {
                ready!(timer.poll(cx));
                let (at, whole) = request.progress();
                if at.is_none_or(|at| at <= Instant::now()) {
                    return Poll::Ready(if whole { error() } else { super::idle_request() });
                }
                at.into_iter().for_each(|at| timer.set(at));
            }
        }
        if let Some(request) = received {
            let at = ready!(request.poll(cx));
            *received = None;
            timer.set(at);
        }
        timer.poll(cx).map(|()| error())
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

impl Received {
    /// Until when it may idle, and whether the request is whole.
    fn progress(&self) -> (Option<Instant>, bool) {
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        (progress.deadline, progress.whole)
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<Instant> {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        match progress.deadline {
            Some(deadline) => Poll::Ready(deadline),
            None => {
                progress.waiting = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

struct OnReceived {
    request: Arc<Received>,
    by_piece: bool,
}

impl OnReceived {
    fn start(&self, whole: bool) {
        let waiting = {
            let mut progress = self.request.progress.lock().unwrap_or_else(PoisonError::into_inner);
            progress.deadline = Some(Instant::now() + self.request.timeout);
            progress.whole |= whole;
            progress.waiting.take()
        };
        if let Some(waker) = waiting {
            waker.wake();
        }
    }
}

impl BodyHook for OnReceived {
    fn on_data(&mut self, _: &Bytes) {
        if self.by_piece {
            self.start(false);
        }
    }

    fn on_end(&mut self, end: EndOfBody<'_>) {
        self.start(matches!(end, EndOfBody::Complete));
    }
}

/// Ends the body of a response when it has passed.
impl BodyHook for Deadline {
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        self.poll_passed(cx)
    }

    fn on_end(&mut self, _: EndOfBody<'_>) {}
}
