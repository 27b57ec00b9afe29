//! The idle timeout of a response: nothing of its body was received for too long, and nothing of its request either where
//! that is still on its way.

use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use mesh_core::{BodyHook, EndOfBody, Error};
use tokio::time::Instant;

use super::deadline::{Deadline, Measured};
use super::timers::{Timer, Timers};

/// Ends a body of which nothing is received for `timeout`. The time between frames in which nobody asked for one is not
/// the upstream's.
#[derive(Debug)]
pub(crate) struct Idle {
    timeout: Duration,
    /// There, once it was waited for; at once where a request puts it off.
    timer: Option<Box<Timer>>,
    timers: Arc<Timers>,
    waiting: bool,
}

impl Idle {
    pub(crate) fn new(timers: &Arc<Timers>, timeout: Duration) -> Self {
        Self { timeout, timer: None, timers: Arc::clone(timers), waiting: false }
    }

    /// Put off too by what passes of the request, as the time until the head was.
    pub(crate) fn beside(mut self, head: Option<Deadline>) -> Self {
        self.timer = head.filter(Deadline::idles).and_then(Deadline::into_timer);
        self
    }

    /// A frame passed.
    pub(crate) fn received(&mut self) {
        self.waiting = false;
    }
}

impl BodyHook for Idle {
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        if !std::mem::replace(&mut self.waiting, true)
            && let Some(at) = Instant::now().checked_add(self.timeout)
        {
            self.timer.get_or_insert_with(|| self.timers.take()).set(at);
        }
        // None where the end is too far off for the clock.
        let Some(timer) = &mut self.timer else { return Poll::Pending };
        loop {
            ready!(timer.poll(cx));
            match timer.of.as_ref().and_then(Measured::put_off).filter(|at| *at > Instant::now()) {
                Some(at) => timer.set(at),
                None => return Poll::Ready(super::idle()),
            }
        }
    }

    fn on_data(&mut self, _: &Bytes) {
        self.received();
    }

    fn on_trailers(&mut self, _: &mut HeaderMap) {
        self.received();
    }

    fn on_end(&mut self, _: EndOfBody<'_>) {}
}

impl Drop for Idle {
    fn drop(&mut self) {
        if let Some(timer) = self.timer.take() {
            self.timers.keep(timer);
        }
    }
}
