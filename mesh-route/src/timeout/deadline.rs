//! The deadline of one exchange: its time starts when the whole request has been received.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

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
            *body = std::mem::take(body).with_hook(OnReceived(Arc::clone(&request)));
            received = Some(request);
        }
        timer.of = Some(Measured { timers: Arc::clone(timers), received, error });
        Self(Some(timer))
    }

    /// Its error, when it has passed.
    pub(crate) fn poll_passed(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let Some(timer) = self.0.as_mut() else { return Poll::Pending };
        let Some(Measured { received, error, .. }) = &mut timer.of else { return Poll::Pending };
        let error = *error;
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

struct OnReceived(Arc<Received>);

impl BodyHook for OnReceived {
    fn on_end(&mut self, _: EndOfBody<'_>) {
        let waiting = {
            let mut progress = self.0.progress.lock().unwrap_or_else(PoisonError::into_inner);
            progress.deadline = Some(Instant::now() + self.0.timeout);
            progress.waiting.take()
        };
        if let Some(waker) = waiting {
            waker.wake();
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
