//! Cross-origin resource sharing: VS-C01 and VS-C02.

use http::{Method, Request};
use mesh_core::{Body, Direction, LocalReplyLayer};
use mesh_testkit::upstream::Echo;
use tower::{Layer as _, ServiceExt as _};

use crate::support::{Client, Compiled, compile, get, one_version, refused, reviews, rules, warned};

const APP: &str = "https://app.example.com";

fn with_policy(policy: &str) -> String {
    rules(&format!("  - {{corsPolicy: {policy}, route: [{{destination: {{host: reviews}}}}]}}\n"))
}

async fn compile_policy(policy: &str) -> (Echo, Compiled) {
    let (echo, services) = one_version().await;
    (echo, compile(&(services + &with_policy(policy))))
}

fn request(method: Method, origin: Option<&str>, asks: &[(&str, &str)]) -> Request<Body> {
    let mut request = Request::builder().method(method).uri("http://reviews/");
    if let Some(origin) = origin {
        request = request.header("origin", origin);
    }
    for (name, value) in asks {
        request = request.header(*name, *value);
    }
    request.body(Body::empty()).unwrap()
}

fn preflight(origin: &str) -> Request<Body> {
    request(
        Method::OPTIONS,
        Some(origin),
        &[("access-control-request-method", "PUT"), ("access-control-request-headers", "x-a,x-b")],
    )
}

/// The status, and the headers of CORS as `name: value`, without the prefix that all of them have.
async fn answer(client: &Client, request: Request<Body>) -> (u16, Vec<String>) {
    let service = LocalReplyLayer::new(Direction::Outbound).layer(client.clone());
    let response = service.oneshot(request).await.unwrap();
    let mut said: Vec<_> = response
        .headers()
        .iter()
        .filter_map(|(name, value)| {
            let name = name.as_str().strip_prefix("access-control-")?;
            Some(format!("{name}: {}", value.to_str().unwrap()))
        })
        .collect();
    said.sort();
    (response.status().as_u16(), said)
}

fn allowed(origin: &str) -> (u16, Vec<String>) {
    (200, vec![format!("allow-origin: {origin}")])
}

#[tokio::test]
async fn vs_c01_any_origin_that_matches_is_echoed() {
    let (echo, it) = compile_policy(
        "{allowOrigins: [{exact: 'https://app.example.com'}, {prefix: 'https://dev-'}, {regex: 'https://[a-z]+\\.test'}]}",
    )
    .await;
    assert_eq!(it.unenforced(), [""; 0]);
    let client = it.client();
    for origin in [APP, "https://dev-7.example.com", "https://a.test"] {
        assert_eq!(answer(&client, request(Method::GET, Some(origin), &[])).await, allowed(origin));
    }
    for origin in
        ["https://app.example.com.evil", "http://app.example.com", "https://a.test.evil", "null", ""]
    {
        assert_eq!(answer(&client, request(Method::GET, Some(origin), &[])).await, (200, vec![]), "{origin}");
    }
    assert_eq!(answer(&client, get("http://reviews/")).await, (200, vec![]));
    assert_eq!(echo.requests(), 9, "none of them was answered here");
}

#[tokio::test]
async fn vs_c01_the_deprecated_list_is_exact_or_everybody() {
    let (_echo, it) = compile_policy("{allowOrigin: ['https://app.example.com']}").await;
    let client = it.client();
    assert_eq!(answer(&client, request(Method::GET, Some(APP), &[])).await, allowed(APP));
    assert_eq!(answer(&client, request(Method::GET, Some("https://b"), &[])).await, (200, vec![]));

    for policy in
        ["{allowOrigin: ['*']}", "{allowOrigins: [{exact: '*'}]}", "{allowOrigins: [{regex: '.*'}]}"]
    {
        let (_echo, it) = compile_policy(policy).await;
        let said = answer(&it.client(), request(Method::GET, Some("https://b"), &[])).await;
        assert_eq!(said, allowed("https://b"), "{policy}");
    }
    // The new list wins over the old one.
    let (_echo, it) = compile_policy("{allowOrigin: ['*'], allowOrigins: [{exact: 'https://b'}]}").await;
    assert_eq!(answer(&it.client(), request(Method::GET, Some(APP), &[])).await, (200, vec![]));
    let both = reviews(&[1]) + &with_policy("{allowOrigin: ['*']}");
    warned(&both, "spec.http[0].corsPolicy.allowOrigin", "deprecated");
}

#[tokio::test]
async fn vs_c01_a_response_says_credentials_and_exposed_headers() {
    for (credentials, says) in
        [("", false), (", allowCredentials: false", false), (", allowCredentials: true", true)]
    {
        let (_echo, it) = compile_policy(&format!(
            "{{allowOrigins: [{{exact: '{APP}'}}], exposeHeaders: [x-one, x-two]{credentials}}}"
        ))
        .await;
        let mut expected = vec![format!("allow-origin: {APP}"), "expose-headers: x-one,x-two".to_owned()];
        if says {
            expected.insert(0, "allow-credentials: true".to_owned());
        }
        let client = it.client();
        assert_eq!(answer(&client, request(Method::POST, Some(APP), &[])).await, (200, expected));
        assert_eq!(answer(&client, request(Method::POST, Some("https://b"), &[])).await, (200, vec![]));
    }
}

#[tokio::test]
async fn vs_c01_replies_of_our_own_say_it_too_and_take_the_place_of_what_was_said() {
    // A cluster that is not known is answered here; a header operation stands for what an upstream says.
    let it = compile(
        &(reviews(&[1])
            + &rules(&format!(
                "  - {{corsPolicy: {{allowOrigins: [{{exact: '{APP}'}}]}}, \
                 headers: {{response: {{set: {{access-control-allow-origin: '*', access-control-allow-methods: GET}}}}}}, \
                 route: [{{destination: {{host: nowhere}}}}]}}\n"
            ))),
    );
    let client = it.client();
    let (status, said) = answer(&client, request(Method::GET, Some(APP), &[])).await;
    assert_eq!((status, said), (503, vec!["allow-methods: GET".to_owned(), format!("allow-origin: {APP}")]));
    let (status, said) = answer(&client, request(Method::GET, Some("https://b"), &[])).await;
    assert_eq!((status, said), (503, vec!["allow-methods: GET".to_owned(), "allow-origin: *".to_owned()]));
}

#[tokio::test]
async fn vs_c02_a_preflight_is_answered_here() {
    let (echo, it) = compile_policy(&format!(
        "{{allowOrigins: [{{exact: '{APP}'}}], allowMethods: [GET, PUT], allowHeaders: [x-a, x-b], exposeHeaders: [x-c], \
         maxAge: 1h, allowCredentials: true}}"
    ))
    .await;
    let client = it.client();
    let all = [
        "allow-credentials: true",
        "allow-headers: x-a,x-b",
        "allow-methods: GET,PUT",
        &format!("allow-origin: {APP}"),
        "expose-headers: x-c",
        "max-age: 3600",
    ];
    let (status, said) = answer(&client, preflight(APP)).await;
    assert_eq!((status, said), (200, all.map(str::to_owned).to_vec()));
    assert_eq!(echo.requests(), 0);
    let error = client.clone().oneshot(preflight(APP)).await.unwrap_err();
    assert_eq!((error.details(), error.flags().is_empty()), ("cors_response", true));

    // No preflight without the method that is asked for, nor with another method than OPTIONS.
    let simple = ["allow-credentials: true", &format!("allow-origin: {APP}"), "expose-headers: x-c"];
    for plain in [
        request(Method::OPTIONS, Some(APP), &[]),
        request(Method::OPTIONS, Some(APP), &[("access-control-request-method", "")]),
        request(Method::GET, Some(APP), &[("access-control-request-method", "PUT")]),
    ] {
        assert_eq!(answer(&client, plain).await, (200, simple.map(str::to_owned).to_vec()));
    }
    assert_eq!(echo.requests(), 3);
}

#[tokio::test]
async fn vs_c02_a_preflight_is_told_no_more_than_the_policy_has() {
    let (_echo, it) = compile_policy(&format!("{{allowOrigins: [{{exact: '{APP}'}}]}}")).await;
    assert_eq!(answer(&it.client(), preflight(APP)).await, allowed(APP));
    // A star echoes what is asked for, as Envoy does.
    let (_echo, it) = compile_policy(
        "{allowOrigins: [{exact: '*'}], allowMethods: ['*'], allowHeaders: ['*'], maxAge: 1s}",
    )
    .await;
    let (_, said) = answer(&it.client(), preflight(APP)).await;
    assert_eq!(
        said,
        ["allow-headers: x-a,x-b", "allow-methods: PUT", &format!("allow-origin: {APP}"), "max-age: 1"]
    );
    let fraction = reviews(&[1]) + &with_policy("{allowOrigins: [{exact: '*'}], maxAge: 1.5s}");
    refused(&fraction, "spec.http[0].corsPolicy.maxAge", "whole seconds");
}

#[tokio::test]
async fn vs_c02_a_preflight_that_does_not_match_passes_or_is_answered_without_an_origin() {
    let policy =
        |unmatched: &str| format!("{{allowOrigins: [{{exact: '{APP}'}}], allowMethods: [GET]{unmatched}}}");
    for unmatched in ["", ", unmatchedPreflights: FORWARD", ", unmatchedPreflights: UNSPECIFIED"] {
        let (echo, it) = compile_policy(&policy(unmatched)).await;
        assert_eq!(answer(&it.client(), preflight("https://b")).await, (200, vec![]), "{unmatched}");
        assert_eq!(echo.requests(), 1, "{unmatched}");
    }
    let (echo, it) = compile_policy(&policy(", unmatchedPreflights: IGNORE")).await;
    let client = it.client();
    assert_eq!(answer(&client, preflight("https://b")).await, (200, vec!["allow-methods: GET".to_owned()]));
    assert_eq!(echo.requests(), 0);
    // Only preflights are kept back.
    assert_eq!(answer(&client, request(Method::OPTIONS, Some("https://b"), &[])).await, (200, vec![]));
    assert_eq!(echo.requests(), 1);
}
