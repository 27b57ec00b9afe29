//! How long the head of a response is waited for.

use std::sync::Arc;
use std::time::Duration;

use http_body::Body as _;
use mesh_core::{Body, Error};

use super::{Deadline, Timers};

/// How long a try may take, from the whole request to the head of its response.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Limits {
    /// For the try.
    pub(crate) per_try: Option<Duration>,
    /// Without anything that passes either way; goes on while the body of the response is received.
    pub(crate) idle: Option<Duration>,
}

impl Limits {
    /// The deadline of a try that is about to be sent with this body.
    pub(crate) fn deadline(&self, timers: &Arc<Timers>, body: &mut Body) -> Option<Deadline> {
        let (timeout, error): (_, fn() -> Error) = match (self.per_try, self.idle) {
            (per_try, Some(idle)) if !body.is_end_stream() => {
                // Of a body that is still to come the two do not begin together.
                let per_try = per_try.map(|per_try| Deadline::new(timers, per_try, body, super::per_try));
                return Some(Deadline::idle(timers, idle, body, per_try));
            }
            (Some(per_try), Some(idle)) if idle < per_try => (idle, super::idle),
            (Some(per_try), _) => (per_try, super::per_try),
            (None, Some(idle)) => (idle, super::idle),
            (None, None) => return None,
        };
        Some(Deadline::new(timers, timeout, body, error))
    }
}
