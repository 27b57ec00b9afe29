//! The whole outbound stack over an in-memory transport: what it costs beside hyper alone, and what policies add that
//! are there and do nothing.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use criterion::{Criterion, criterion_group, criterion_main};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use mesh_benches::memory::serve;
use mesh_benches::stack::{ALL, ALL_ANSWERS, EACH, Idle, NONE, RETRY_ANSWERS, in_memory, request};
use mesh_core::Body;
use tower::{Service as _, ServiceExt as _};

const GROUP: &str = "outbound_stack_in_memory";

fn through_the_stack(c: &mut Criterion, idle: Idle) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut stack = in_memory(idle);
    c.benchmark_group(GROUP).bench_function(idle.name, |b| {
        b.iter(|| {
            runtime.block_on(async {
                let response = stack.ready().await.unwrap().call(request(Body::empty())).await.unwrap();
                response.into_body().collect().await.unwrap().to_bytes()
            })
        });
    });
}

fn hyper_alone(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut sender = runtime.block_on(async {
        let (sender, connection) =
            hyper::client::conn::http1::handshake::<_, Body>(TokioIo::new(serve())).await.unwrap();
        tokio::spawn(connection);
        sender
    });
    c.benchmark_group(GROUP).bench_function("hyper alone", |b| {
        b.iter(|| {
            runtime.block_on(async {
                sender.ready().await.unwrap();
                let response = sender.send_request(request(Body::empty())).await.unwrap();
                response.into_body().collect().await.unwrap().to_bytes()
            })
        });
    });
}

fn policies(c: &mut Criterion) {
    hyper_alone(c);
    through_the_stack(c, NONE);
    EACH.iter().chain([&RETRY_ANSWERS, &ALL, &ALL_ANSWERS]).for_each(|idle| through_the_stack(c, *idle));
}

criterion_group!(benches, policies);
criterion_main!(benches);
