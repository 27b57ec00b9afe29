//! Retries: a request that failed is sent again, if its policy says so and its cluster can bear it.
//!
//! Three limits stack (VS-Y09): the attempts of the route, the budget and `maxRetries` of the cluster, and the timeout
//! of the route, which covers every try and the time between. A retry that a limit refuses leaves the answer as it was
//! and adds a flag: `URX` for the attempts, `UO` for the cluster.
//!
//! **What a retry costs before it happens.** Istio retries by default, so the default must be nearly free. A policy
//! compiles to a [`RetryClass`]: for *Connect* nothing is kept, because what was not written comes back by itself;
//! for *Head* the head is cloned, as the request has no body; for *Replay* a body is recorded too while it passes. What
//! is more than 64 KiB (a piece counts for 512 bytes at least), or has not ended when the answer comes, is not sent
//! again (VS-Y08).

mod admission;
mod backoff;
mod budget;
mod layer;
mod lent;
mod policy;
mod replay;
mod state;

use mesh_core::Error;

pub(crate) use self::admission::Retries;
pub use self::backoff::Backoff;
pub use self::budget::RetryBudget;
pub(crate) use self::layer::PreviousHosts;
pub use self::layer::{Retry, RetryLayer};
pub use self::policy::{Outcome, RetryClass, RetryOn, RetryPolicy, UnknownCondition, is_idempotent};
pub(crate) use self::replay::Replay;
pub use self::state::RetryState;

/// The reply says, as Envoy's does, that this was not the only try.
pub(crate) fn after_retries(error: Error) -> Error {
    const ONE: &str = "reset reason: ";
    let Some(text) = std::str::from_utf8(error.body()).ok().filter(|text| text.contains(ONE)) else {
        return error;
    };
    let text = text.replacen(ONE, "retried and the latest reset reason: ", 1);
    error.with_body(text)
}
