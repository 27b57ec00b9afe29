//! HTTP/2 upstreams that leave, allow less than they did, or stop reading (A9, A10, A11), or answer
//! before they have been asked (B3).

use std::collections::HashSet;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body::Frame;
use mesh_core::Body;
use mesh_route::{PoolSettings, RetryOn, RetryPolicy, UpstreamProtocol};
use mesh_testkit::h2_upstream::{Act, Http2Upstream, INITIAL_WINDOW, MAX_STREAMS};
use mesh_testkit::until;
use tokio::task::JoinSet;

use crate::support::{Client, client, cluster_of, nothing_is_left, outcome};

fn put(number: usize) -> Request<Body> {
    Request::put("http://up/").body(Body::full(format!("request {number}"))).unwrap()
}

/// Sends these requests at once; what each came to is its own answer, or the reason why not.
fn send(client: &Client, numbers: std::ops::Range<usize>) -> JoinSet<(usize, String)> {
    let mut requests = JoinSet::new();
    for number in numbers {
        let client = client.clone();
        requests.spawn(async move { (number, outcome(&client, put(number)).await) });
    }
    requests
}

#[tokio::test]
async fn a9_of_a_hundred_streams_at_a_goaway_none_is_lost_and_none_is_done_twice() {
    for (name, graceful) in [("graceful", true), ("abrupt", false)] {
        let up = Http2Upstream::start(&[(MAX_STREAMS, 1000)], Act::Hold).await;
        let cluster = cluster_of(&[up.addr], |spec| spec.protocol = UpstreamProtocol::Http2);
        let client = client(&cluster, |route| route.retry(RetryPolicy::istio_default()));
        let requests = send(&client, 0..100);
        until("a hundred streams", async || up.whole() == 100).await;
        assert_eq!(up.connections(), 1);
        let on_first = up.requests();
        // It has looked at the first half. What comes on other connections is answered.
        let last = 99;
        up.set_act(Act::Answer);
        if graceful {
            // First that it will leave, then what it has looked at.
            up.go_away(0, (1 << 31) - 1, 0);
        }
        up.go_away(0, last, 0);
        let (kept, refused): (Vec<_>, Vec<_>) = on_first.iter().partition(|request| request.stream <= last);
        assert_eq!((kept.len(), refused.len()), (50, 50));
        until("the others to go elsewhere", async || up.whole() == 150).await;
        for request in &kept {
            up.answer(request);
        }
        if !graceful {
            up.close(0);
        }
        for (number, outcome) in requests.join_all().await {
            assert_eq!(outcome, format!("200 - request {number}"), "{name}");
        }
        let bodies = up.bodies();
        assert_eq!(bodies.len(), 100);
        let twice: HashSet<_> =
            bodies.into_iter().filter(|(_, count)| *count == 2).map(|(body, _)| body).collect();
        let were_refused: HashSet<_> = refused.iter().map(|request| request.body.clone()).collect();
        assert_eq!(twice, were_refused, "once more, and only what was not looked at");
        assert!(up.connections() >= 2);
        until("the old connection to end", async || {
            up.open() == cluster.runtime().unwrap().connections() as usize
        })
        .await;
        nothing_is_left(&cluster, || up.open()).await;
    }
}

#[tokio::test]
async fn a9_what_may_have_been_looked_at_is_not_sent_again() {
    let up = Http2Upstream::start(&[(MAX_STREAMS, 1000)], Act::Hold).await;
    let cluster = cluster_of(&[up.addr], |spec| spec.protocol = UpstreamProtocol::Http2);
    let client = client(&cluster, |route| route.retry(RetryPolicy::istio_default()));
    let requests = send(&client, 0..100);
    until("a hundred streams", async || up.whole() == 100).await;
    up.set_act(Act::Answer);
    // It has looked at every one of them, and goes without an answer.
    up.go_away(0, 199, 0);
    up.close(0);
    for (_, outcome) in requests.join_all().await {
        assert_eq!(outcome, "503 UC upstream_reset_before_response_started{connection_termination}");
    }
    assert_eq!(up.whole(), 100);
    nothing_is_left(&cluster, || up.open()).await;
}

const MOST_CONNECTIONS: u32 = 4;
const MOST_PENDING: u32 = 20;

#[tokio::test]
async fn a10_fewer_streams_in_mid_load_mean_more_connections_then_a_bounded_queue() {
    let up = Http2Upstream::start(&[(MAX_STREAMS, 100)], Act::Answer).await;
    let cluster = cluster_of(&[up.addr], |spec| {
        spec.protocol = UpstreamProtocol::Http2;
        spec.pool = PoolSettings {
            max_connections: MOST_CONNECTIONS,
            max_pending_requests: MOST_PENDING,
            ..PoolSettings::default()
        };
    });
    let runtime = cluster.runtime().unwrap();
    let client = client(&cluster, |route| route);
    // The first has to wait for its connection; the others find it.
    assert_eq!(outcome(&client, put(0)).await, "200 - request 0");
    up.set_act(Act::Hold);
    let mut requests = send(&client, 1..50);
    until("fifty streams", async || up.whole() == 50).await;
    assert_eq!(up.connections(), 1, "a hundred are allowed");

    // 100 to 1: what is open goes on, and each further request needs a connection of its own, up to the limit.
    up.set_settings(&[(MAX_STREAMS, 1)]);
    until("the settings to be in force", async || up.is_settled()).await;
    for at in 1..MOST_CONNECTIONS {
        let number = 49 + at as usize;
        let mut one = send(&client, number..number + 1);
        until("a stream on another connection", async || up.whole() == 50 + at as usize).await;
        assert_eq!(up.connections(), 1 + at as usize);
        until("the settings to be in force", async || up.is_settled()).await;
        requests.spawn(async move { one.join_next().await.unwrap().unwrap() });
    }
    let queued = send(&client, 100..100 + MOST_PENDING as usize);
    until("a full queue", async || runtime.pending() == MOST_PENDING).await;
    for (_, outcome) in send(&client, 200..300).join_all().await {
        assert_eq!(outcome, "503 UO upstream_reset_before_response_started{overflow}");
    }
    assert_eq!((runtime.pending(), up.connections()), (MOST_PENDING, MOST_CONNECTIONS as usize));

    // 1 to 0: nothing moves any more, and nothing is lost.
    up.set_settings(&[(MAX_STREAMS, 0)]);
    until("the settings to be in force", async || up.is_settled()).await;
    up.answer_all();
    for (number, outcome) in requests.join_all().await {
        assert_eq!(outcome, format!("200 - request {number}"), "what was open ends well");
    }
    assert_eq!(runtime.pending(), MOST_PENDING);
    let whole = up.whole();
    for (_, outcome) in send(&client, 300..310).join_all().await {
        assert_eq!(outcome, "503 UO upstream_reset_before_response_started{overflow}");
    }
    assert_eq!(up.whole(), whole, "nobody opens a stream that is not allowed");

    // 0 to 1: the queue goes on by itself, one after the other.
    up.set_act(Act::Answer);
    up.set_settings(&[(MAX_STREAMS, 1)]);
    for (number, outcome) in queued.join_all().await {
        assert_eq!(outcome, format!("200 - request {number}"));
    }
    assert_eq!((up.too_many(), up.connections()), (0, MOST_CONNECTIONS as usize));
    assert!(up.bodies().values().all(|count| *count == 1));
    nothing_is_left(&cluster, || up.open()).await;
}

#[tokio::test]
async fn a10_settings_that_change_all_the_time_lose_nothing() {
    let up = Http2Upstream::start(&[(MAX_STREAMS, 100)], Act::Answer).await;
    let cluster = cluster_of(&[up.addr], |spec| {
        spec.protocol = UpstreamProtocol::Http2;
        spec.pool.max_connections = MOST_CONNECTIONS;
    });
    let client = client(&cluster, |route| route);
    let mut requests = send(&client, 0..0);
    for round in 0..200 {
        requests = {
            let mut more = send(&client, round * 20..round * 20 + 20);
            while let Some(ended) = requests.try_join_next() {
                let (number, outcome) = ended.unwrap();
                assert_eq!(outcome, format!("200 - request {number}"));
            }
            while let Some(left) = requests.join_next().await {
                more.spawn(async move { left.unwrap() });
            }
            more
        };
        up.set_settings(&[(MAX_STREAMS, [100, 1, 0, 7][round % 4])]);
        tokio::task::yield_now().await;
        // With none allowed only the next settings let anything go on.
        if round % 4 == 2 {
            up.set_settings(&[(MAX_STREAMS, 2)]);
        }
    }
    for (number, outcome) in requests.join_all().await {
        assert_eq!(outcome, format!("200 - request {number}"));
    }
    assert_eq!(up.too_many(), 0);
    assert_eq!(up.bodies().len(), 4000);
    assert!(up.bodies().values().all(|count| *count == 1));
    nothing_is_left(&cluster, || up.open()).await;
}

/// A body of which a piece comes from time to time, and which does not end.
fn endless(every: Duration) -> Body {
    Body::new(Endless { every, sleep: Box::pin(tokio::time::sleep(every)) })
}

struct Endless {
    every: Duration,
    sleep: Pin<Box<tokio::time::Sleep>>,
}

impl http_body::Body for Endless {
    type Data = Bytes;
    type Error = mesh_core::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, mesh_core::Error>>> {
        std::task::ready!(self.sleep.as_mut().poll(cx));
        self.sleep = Box::pin(tokio::time::sleep(self.every));
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[7; 1024])))))
    }
}

const IDLE: Duration = Duration::from_millis(300);

#[tokio::test]
async fn a11_an_upstream_that_stops_reading_is_given_up_when_it_has_been_idle() {
    let up = Http2Upstream::start(&[(MAX_STREAMS, 1000), (INITIAL_WINDOW, 0)], Act::Hold).await;
    let cluster = cluster_of(&[up.addr], |spec| spec.protocol = UpstreamProtocol::Http2);
    let client = client(&cluster, |route| route.idle_timeout(IDLE));
    let mut requests = JoinSet::new();
    for number in 0..100 {
        let client = client.clone();
        requests.spawn(async move {
            let is_here = number % 2 == 0;
            let body = if is_here { Body::full(vec![7; 1 << 20]) } else { endless(Duration::from_millis(1)) };
            (is_here, outcome(&client, Request::put("http://up/").body(body).unwrap()).await)
        });
    }
    for (is_here, outcome) in requests.join_all().await {
        // Of a request that is not whole it is not known who is late.
        let status = if is_here { 504 } else { 408 };
        assert_eq!(outcome, format!("{status} SI stream_idle_timeout"));
    }
    assert_eq!(up.requests().iter().map(|request| request.body.len()).sum::<usize>(), 0);
    nothing_is_left(&cluster, || up.open()).await;
}

#[tokio::test]
async fn a11_an_upload_that_goes_on_is_not_idle() {
    let up = Http2Upstream::start(&[], Act::Hold).await;
    let cluster = cluster_of(&[up.addr], |spec| spec.protocol = UpstreamProtocol::Http2);
    let client = client(&cluster, |route| route.idle_timeout(IDLE));
    let upload = tokio::spawn(async move {
        outcome(&client, Request::put("http://up/").body(endless(IDLE / 10)).unwrap()).await
    });
    // Three times as long as it may be idle.
    until("a long upload", async || {
        up.requests().first().is_some_and(|request| request.body.len() >= 30 << 10)
    })
    .await;
    up.close(0);
    assert_eq!(
        upload.await.unwrap(),
        "503 UC upstream_reset_before_response_started{connection_termination}",
        "no timeout ended it"
    );
    nothing_is_left(&cluster, || up.open()).await;
}

#[tokio::test]
async fn b3_a_body_that_still_streams_is_not_sent_again() {
    let up = Http2Upstream::start(&[], Act::Hold).await;
    let cluster = cluster_of(&[up.addr], |spec| spec.protocol = UpstreamProtocol::Http2);
    let retry = RetryPolicy::new(3, RetryOn::parse("5xx").unwrap());
    let client = client(&cluster, |route| route.retry(retry));
    let upload = tokio::spawn(async move {
        outcome(&client, Request::put("http://up/").body(endless(Duration::from_millis(5))).unwrap()).await
    });
    until("a part of it", async || up.requests().first().is_some_and(|request| !request.body.is_empty()))
        .await;
    up.fail(&up.requests()[0]);
    let outcome = upload.await.unwrap();
    assert!(outcome.starts_with("500 - "), "{outcome}");
    assert_eq!((up.requests().len(), up.whole()), (1, 0), "sent once, and never as if it were whole");
    nothing_is_left(&cluster, || up.open()).await;
}
