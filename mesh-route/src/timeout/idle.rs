//! The idle timeout of a response: nothing of its body was received for too long.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use mesh_core::{BodyHook, EndOfBody, Error};
use tokio::time::Instant;

use super::timers::{Timer, Timers};

/// Ends a body of which nothing is received for `timeout`. The time between frames in which nobody asked for one is not
/// the upstream's.
#[derive(Debug)]
pub(crate) struct Idle {
    timeout: Duration,
    /// There, once it was waited for.
    timer: Option<Box<Timer>>,
    timers: Arc<Timers>,
    waiting: bool,
}

impl Idle {
    pub(crate) fn new(timers: &Arc<Timers>, timeout: Duration) -> Self {
        Self { timeout, timer: None, timers: Arc::clone(timers), waiting: false }
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
        // Without one where the end is too far off for the clock.
        self.timer.as_mut().map_or(Poll::Pending, |timer| timer.poll(cx).map(|()| super::idle()))
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
