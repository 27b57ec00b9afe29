//! E2: what we forward, read by somebody else.
//!
//! Messages are mutated at random and sent to the gateway. The upstream counts requests by a strict reading of its
//! own. It must never count more than we answered, and never see a message with both framings.

use std::time::Duration;

use mesh_testkit::process::ConfigDir;
use mesh_testkit::raw::counted;
use mesh_testkit::upstream::Recorder;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinSet;

use crate::proxy::{service, start};

/// Gateways that are tried at once, each with an upstream of its own.
const LANES: u64 = 8;

/// What mutations begin with.
const SEEDS: [&str; 6] = [
    "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    "POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n5;e=1\r\nhello\r\n0\r\nx: y\r\n\r\n",
    "GET /d HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "PUT /e HTTP/1.0\r\nHost: a\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n",
];

/// What is put in: the words and bytes by which readers have disagreed.
const PIECES: [&str; 24] = [
    "Content-Length: 5\r\n",
    "Content-Length: 0\r\n",
    "Content-Length: +5\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: identity\r\n",
    "Transfer-Encoding:\tchunked\r\n",
    "transfer-encoding : chunked\r\n",
    "Transfer-Encoding: chunked, chunked\r\n",
    "Connection: content-length\r\n",
    "Expect: 100-continue\r\n",
    "\r\n",
    "\n",
    "\r",
    "\0",
    " ",
    "\t",
    ":",
    ",",
    ";",
    "0\r\n\r\n",
    "0\n\n",
    "ffffffffffffffff\r\n",
    "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/1.0",
];

pub(crate) async fn run(time: Duration, seed: u64) -> bool {
    println!("e2: seed {seed}");
    let mut lanes = JoinSet::new();
    for lane in 0..LANES {
        lanes.spawn(run_lane(time, SmallRng::seed_from_u64(seed.wrapping_add(lane))));
    }
    let (mut messages, mut broken) = (0, false);
    while let Some(lane) = lanes.join_next().await {
        match lane {
            Ok((count, None)) => messages += count,
            Ok((count, Some(message))) => {
                messages += count;
                broken = true;
                println!("e2: more requests upstream than answers: {}", message.escape_ascii());
            }
            Err(panic) => {
                broken = true;
                println!("e2: {panic}");
            }
        }
    }
    println!("e2: {messages} messages (goal: 0 read in two ways)");
    !broken
}

async fn run_lane(time: Duration, mut rng: SmallRng) -> (u64, Option<Vec<u8>>) {
    let upstream = Recorder::start(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", false).await;
    let dir = ConfigDir::new();
    dir.write(
        "mesh.yaml",
        &format!(
            "{}apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: edge}}\nspec: {{servers: [{{port: {{number: 80, name: http, protocol: HTTP}}, hosts: ['*']}}]}}\n---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: edge}}\nspec: {{hosts: ['*'], gateways: [edge], http: [{{route: [{{destination: {{host: app}}}}]}}]}}\n",
            service(&[upstream.addr])
        ),
    );
    let config = dir.file("mesh.yaml");
    let args = [
        "--config",
        &config,
        "--bind",
        "127.0.0.1",
        "--map-port",
        "80=0",
        "--admin",
        "127.0.0.1:0",
        "--workers",
        "1",
        "--log",
        "error",
    ];
    let gateway = start("gateway", &args);
    let address = gateway.address("http");
    let started = tokio::time::Instant::now();
    let mut count = 0;
    while started.elapsed() < time {
        let message = mutate(&mut rng);
        let (forwarded, answered) = counted(address, &upstream, &message).await;
        count += 1;
        if forwarded > answered {
            return (count, Some(message));
        }
    }
    (count, None)
}

fn mutate(rng: &mut SmallRng) -> Vec<u8> {
    let mut message = SEEDS[rng.random_range(0..SEEDS.len())].as_bytes().to_vec();
    for _ in 0..rng.random_range(1..6) {
        let at = rng.random_range(0..=message.len());
        match rng.random_range(0..5) {
            0 => {
                let piece = PIECES[rng.random_range(0..PIECES.len())].as_bytes();
                message.splice(at..at, piece.iter().copied());
            }
            // Headers go where headers are.
            1 => {
                let line = message.windows(2).position(|end| end == b"\r\n").map_or(at, |line| line + 2);
                let piece = PIECES[rng.random_range(0..PIECES.len())].as_bytes();
                message.splice(line..line, piece.iter().copied());
            }
            2 => {
                let end = (at + rng.random_range(1..5)).min(message.len());
                message.drain(at..end);
            }
            3 if at < message.len() => message[at] = rng.random(),
            _ => {
                let next = SEEDS[rng.random_range(0..SEEDS.len())].as_bytes();
                message.extend_from_slice(next);
            }
        }
    }
    message
}
