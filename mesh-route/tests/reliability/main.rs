//! Faults of upstreams and of clients, by the numbers of their goals: nothing hangs, nothing leaks, every count is exact.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cancel;
mod connect;
mod dns;
mod http2;
mod limits;
mod races;
mod silent;
mod storm;
mod support;
mod unhealthy;
mod workers;
