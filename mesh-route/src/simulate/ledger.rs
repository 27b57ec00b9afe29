//! What is written down while a simulation runs. Reports are made of it when it has ended.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_core::RequestContext;

use super::report::Event;

#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<Book>);

/// Everything that happened, each in the order in which it did.
#[derive(Debug, Default)]
pub(super) struct Book {
    pub(super) requests: Vec<Exchange>,
    /// Tries as the endpoints saw them.
    pub(super) tries: BTreeMap<SocketAddr, Vec<Duration>>,
    pub(super) samples: Vec<Sample>,
    pub(super) events: Vec<Event>,
}

/// One request.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) load: usize,
    pub(super) at: Duration,
    pub(super) state: State,
}

#[derive(Debug)]
pub(super) enum State {
    UnderWay(RequestContext),
    Ended(End),
}

#[derive(Clone, Debug)]
pub(super) struct End {
    pub(super) took: Duration,
    pub(super) tries: u32,
    /// Why it failed: Envoy's flags, else the status.
    pub(super) failure: Option<String>,
}

/// The state of the clusters at one time.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    pub(super) at: Duration,
    pub(super) ejected: Vec<SocketAddr>,
    pub(super) panic: Vec<String>,
    /// What limits refused since the sample before.
    pub(super) overflows: u64,
    pub(super) retry_overflows: u64,
    /// The share of each canary, in percent, by its route.
    pub(super) canaries: BTreeMap<String, u8>,
}

impl Exchange {
    /// How often it was tried so far.
    pub(super) fn tries(&self) -> u32 {
        match &self.state {
            State::UnderWay(context) => context.attempts(),
            State::Ended(end) => end.tries,
        }
    }
}

impl Ledger {
    /// A request begins; its number.
    pub(super) fn begin(&self, load: usize, at: Duration, context: RequestContext) -> usize {
        let requests = &mut self.lock().requests;
        requests.push(Exchange { load, at, state: State::UnderWay(context) });
        requests.len() - 1
    }

    pub(super) fn end(&self, request: usize, end: End) {
        let before = self
            .lock()
            .requests
            .get_mut(request)
            .map(|exchange| std::mem::replace(&mut exchange.state, State::Ended(end)));
        // What it held goes outside the lock.
        drop(before);
    }

    pub(super) fn tried(&self, addr: SocketAddr, at: Duration) {
        self.lock().tries.entry(addr).or_default().push(at);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
