//! Answers of mirrors compared with those of the primary: VS-P05.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt as _;
use mesh_core::Body;
use mesh_route::Clusters;
use mesh_route::diff::Captured;
use mesh_testkit::scripted::{Reply, Scripted};
use tokio::net::TcpListener;

use crate::mirror::{mirroring, services, stack};
use crate::support::*;

/// Everything to `reviews`, with this for mirrors, and answers compared.
fn compared(mirror: &str, policy: &str) -> String {
    mirroring(mirror).replace(
        "namespace: default}\nspec:",
        &format!("namespace: default, annotations: {{mesh.rs/mirror-diff: '{policy}'}}}}\nspec:"),
    )
}

/// An upstream that answers with this JSON; `N` becomes the number of the request.
async fn json_upstream(text: &'static str) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let counted = Arc::clone(&counted);
            let answer = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                let counted = Arc::clone(&counted);
                async move {
                    request.into_body().collect().await.unwrap();
                    let number = counted.fetch_add(1, Ordering::SeqCst);
                    let body = text.replace('N', &number.to_string());
                    let mut response = http::Response::new(http_body_util::Full::new(Bytes::from(body)));
                    response.headers_mut().insert("etag", number.into());
                    response.headers_mut().insert("set-cookie", format!("secret={number}").parse().unwrap());
                    response.headers_mut().insert("content-type", "application/json".parse().unwrap());
                    Ok::<_, std::convert::Infallible>(response)
                }
            });
            let io = hyper_util::rt::TokioIo::new(stream);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, answer));
        }
    });
    (port, count)
}

#[tokio::test]
async fn vs_p05_answers_are_compared_and_noise_is_learned_from_the_primary() {
    let (primary, asked) = json_upstream(r#"{"id": N, "rating": 5, "items": [{"a": 1}]}"#).await;
    let (mirror, _) = json_upstream(r#"{"id": 7N, "rating": 4, "items": [{"a": 1, "b": 2}]}"#).await;
    let policy = r#"{"baseline": 50, "headers": ["content-type", "etag", "set-cookie"], "capture": true}"#;
    let it = compile(&(services(primary, &[mirror]) + &compared("mirror: {host: a}", policy)));
    assert_eq!((it.diags.iter().count(), it.unenforced()), (0, vec![]), "{}", it.diags);
    let clusters = Clusters::new();
    let client = stack(&it, &clusters);
    for _ in 0..80 {
        let answer = send(&client, get("http://reviews/rate?q=1")).await;
        assert!(answer.text.contains("\"rating\": 5"), "the client gets what it always got");
    }
    let post = Request::post("http://reviews/rate")
        .header("cookie", "secret")
        .header("x-api-key", "secret")
        .header("accept", "a/b")
        .body(Body::from("hi"))
        .unwrap();
    send(&client, post).await;
    let diffs = clusters.mirroring().diffs();
    until(|| diffs.to_json()["comparisons"][0]["compared"] == 81).await;
    let shown = diffs.to_json();
    let comparison = &shown["comparisons"][0];
    assert_eq!(comparison["mirror"], "outbound|80||a.default.svc.cluster.local");
    let baselines = comparison["baselines"].as_u64().unwrap();
    assert!((16..65).contains(&baselines), "{baselines} of 80");
    assert_eq!(asked.load(Ordering::SeqCst) as u64, 81 + baselines, "a POST is not asked twice");
    let places: Vec<_> = comparison["places"]
        .as_array()
        .unwrap()
        .iter()
        .map(|place| {
            format!(
                "{} {} {}",
                place["place"].as_str().unwrap(),
                place["kind"].as_str().unwrap(),
                place["noise"]
            )
        })
        .collect();
    for expected in ["$.id value true", "$.rating value false", "$.items[*].b added false"] {
        assert!(places.iter().any(|place| place == expected), "{expected} in {places:?}");
    }
    // Both count up; that they agree now and then is chance.
    assert!(
        places.iter().filter(|place| place.starts_with("header:")).all(|place| {
            ["header:etag value true", "header:set-cookie value true"].contains(&place.as_str())
        }),
        "{places:?}"
    );
    assert_eq!(diffs.counts()[0].verdicts[2], ("different", 81));
    let sample = &shown["samples"][0];
    assert_eq!((sample["method"].as_str(), sample["primary"]["status"].as_u64()), (Some("POST"), Some(200)));
    let lines = diffs.captured();
    let captured: Vec<_> = lines.lines().map(|line| Captured::parse(line).unwrap()).collect();
    assert_eq!(captured.len(), 81);
    let post = captured.iter().find(|captured| captured.method == "POST").unwrap();
    assert_eq!(
        (post.authority.as_str(), post.path.as_str(), &post.body[..]),
        ("reviews", "/rate", &b"hi"[..])
    );
    assert!(post.headers.contains_key("accept"));
    assert!(!lines.contains("secret") && !shown.to_string().contains("secret"));
    assert!(post.response.headers.contains_key("etag"));
}

#[tokio::test]
async fn bug_compared_requests_were_shown_to_whoever_asked() {
    let (primary, _) = json_upstream(r#"{"rating": 5}"#).await;
    let (mirror, _) = json_upstream(r#"{"rating": 4}"#).await;
    let it = compile(&(services(primary, &[mirror]) + &compared("mirror: {host: a}", "{}")));
    let clusters = Clusters::new();
    let client = stack(&it, &clusters);
    let post = Request::post("http://reviews/rate").header("x-user", "jane").body(Body::from("hi")).unwrap();
    assert_eq!(send(&client, post).await.status, 200);
    let diffs = clusters.mirroring().diffs();
    until(|| diffs.to_json()["comparisons"][0]["different"] == 1).await;
    assert_eq!((diffs.captured().as_str(), &diffs.to_json()["captured"]), ("", &0.into()));
    assert!(!diffs.to_json().to_string().contains("jane"));
}

#[tokio::test]
async fn vs_p05_what_is_not_whole_or_not_asked_for_is_not_compared() {
    let (primary, _) = json_upstream(r#"{"id": N}"#).await;
    let failing = Scripted::start("mirror", |_| Reply::Reset).await;
    let (mirror, _) = json_upstream(r#"{"id": N}"#).await;
    // A mirror that fails; a body that is longer than what is kept; a share of nothing.
    for (mirror, policy, uncompared) in [
        (failing.addr.port(), "{}", 1),
        (mirror, r#"{"bodyBytes": 3}"#, 1),
        (mirror, r#"{"percentage": 0}"#, 0),
    ] {
        let it = compile(&(services(primary, &[mirror]) + &compared("mirror: {host: a}", policy)));
        let clusters = Clusters::new();
        let client = stack(&it, &clusters);
        assert_eq!(send(&client, get("http://reviews/")).await.status, 200);
        let diffs = clusters.mirroring().diffs();
        until(|| diffs.counts().iter().map(|counts| counts.verdicts[3].1).sum::<u64>() == uncompared).await;
        until(|| clusters.mirroring().in_flight() == 0).await;
        assert_eq!(diffs.counts().len(), usize::from(uncompared > 0));
        assert_eq!(diffs.captured(), "");
    }
    compile(&(reviews(&[1]) + &compared("timeout: 1s", "{}")))
        .warns("metadata.annotations.mesh.rs/mirror-diff", "no rule mirrors");
}
