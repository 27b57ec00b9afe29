//! What policies add to a request that are there and have nothing to do: the outbound stack over an upstream in memory,
//! which works on the same thread. The stacks take turns, and time is that of the thread's processor, so that a machine
//! that does something else too disturbs all of them alike; the least of the rounds is what it costs.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use http_body_util::BodyExt as _;
use mesh_benches::stack::{ALL, ALL_ANSWERS, EACH, NONE, RETRY_ANSWERS, in_memory, request};
use mesh_core::Body;
use rustix::time::{ClockId, clock_gettime};
use tower::{Service as _, ServiceExt as _};

const ROUNDS: usize = 50;
const REQUESTS: u32 = 2_000;

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let idle: Vec<_> = [&NONE].into_iter().chain(EACH).chain([&RETRY_ANSWERS, &ALL, &ALL_ANSWERS]).collect();
    let mut stacks: Vec<_> = idle.iter().map(|idle| (in_memory(**idle), f64::MAX)).collect();
    for _ in 0..ROUNDS {
        for (stack, least) in &mut stacks {
            let before = nanoseconds();
            runtime.block_on(async {
                for _ in 0..REQUESTS {
                    let response = stack.ready().await.unwrap().call(request(Body::empty())).await.unwrap();
                    response.into_body().collect().await.unwrap();
                }
            });
            *least = least.min((nanoseconds() - before) as f64 / f64::from(REQUESTS));
        }
    }
    let without = stacks[0].1;
    println!("| | ns | added |\n|---|---:|---:|");
    for (idle, (_, took)) in idle.iter().zip(&stacks) {
        println!("| {} | {took:.0} | {:.0} |", idle.name, took - without);
    }
}

/// Of this thread's processor time.
fn nanoseconds() -> i64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}
