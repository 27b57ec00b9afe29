//! What is written down while a simulation runs. Reports are made of it when it has ended.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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
#[derive(Clone, Debug, Default)]
pub(super) struct Exchange {
    pub(super) load: usize,
    pub(super) at: Duration,
    pub(super) tries: u32,
    /// `None` until it has ended.
    pub(super) end: Option<End>,
}

#[derive(Clone, Debug)]
pub(super) struct End {
    pub(super) took: Duration,
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

impl Ledger {
    /// A request begins; its number.
    pub(super) fn begin(&self, load: usize, at: Duration) -> usize {
        let requests = &mut self.lock().requests;
        requests.push(Exchange { load, at, ..Exchange::default() });
        requests.len() - 1
    }

    pub(super) fn end(&self, request: usize, tries: u32, end: Option<End>) {
        if let Some(exchange) = self.lock().requests.get_mut(request) {
            (exchange.tries, exchange.end) = (tries, end);
        }
    }

    pub(super) fn tried(&self, addr: SocketAddr, at: Duration) {
        self.lock().tries.entry(addr).or_default().push(at);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
