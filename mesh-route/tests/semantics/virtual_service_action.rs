//! What is done to a request and its response on the way: VS-W01 … VS-W03, VS-H01, VS-T01, VS-X01.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body::Frame;
use http_body_util::BodyExt as _;
use mesh_core::{Body, ConnInfo, Direction, EdgeSettings, NormalizeLayer, RequestContext, Slot};
use mesh_route::{Clusters, HeadersLayer, SelectRouteLayer, Shard, dispatch};
use mesh_testkit::upstream::Echo;
use tokio::sync::mpsc::{Receiver, Sender};
use tower::{ServiceBuilder, ServiceExt as _};

use crate::support::*;

#[tokio::test]
async fn vs_w01_rewrite_uri() {
    let (_echo, services) = one_version().await;
    let to = "route: [{destination: {host: reviews}}]";
    let it = compile(
        &(services
            + &rules(&format!(
                "  - {{match: [{{uri: {{prefix: /old}}}}], rewrite: {{uri: /new}}, {to}}}\n  \
                 - {{match: [{{uri: {{exact: /exact}}}}], rewrite: {{uri: /whole}}, {to}}}\n  \
                 - {{match: [{{uri: {{regex: '/re.*'}}}}], rewrite: {{uri: /whole}}, {to}}}\n  \
                 - {{match: [{{uri: {{prefix: /kept}}}}], rewrite: {{uri: '', authority: reviews}}, {to}}}\n  \
                 - {{rewrite: {{uri: /v1}}, {to}}}\n"
            ))),
    );
    let client = it.client();
    for (target, expected, original) in [
        ("/old/a?q=1", "/new/a?q=1", Some("/old/a?q=1")),
        ("/older", "/newer", Some("/older")),
        ("/exact?q=1", "/whole?q=1", Some("/exact?q=1")),
        ("/regex/a?q", "/whole?q", Some("/regex/a?q")),
        ("/kept/a", "/kept/a", None),
        ("/a", "/v1a", Some("/a")),
    ] {
        let answer = send(&client, get(&format!("http://reviews{target}"))).await;
        assert_eq!(answer.saw()["url"].as_str(), Some(expected), "{target}");
        assert_eq!(answer.saw_header("x-envoy-original-path").as_deref(), original, "{target}");
    }
    // Without a match of the uri it behaves as the prefix "/", which is rarely meant.
    it.warns("spec.http[4].rewrite.uri", "prefix \"/\"");
}

#[tokio::test]
async fn vs_w02_rewrite_authority() {
    let (_echo, services) = one_version().await;
    let it = compile(
        &(services
            + &rules(
                "  - {match: [{uri: {exact: /rewrite}}], rewrite: {authority: new.example.com}, route: [{destination: {host: reviews}, headers: {request: {set: {Host: destination.example.com}}}}]}\n  \
                 - {match: [{uri: {exact: /set}}], headers: {request: {set: {':authority': set.example.com}}}, route: [{destination: {host: reviews}, headers: {request: {set: {host: destination.example.com}}}}]}\n  \
                 - {match: [{uri: {exact: /destination}}], route: [{destination: {host: reviews}, headers: {request: {set: {host: set.example.com}, add: {host: add.example.com}}}}]}\n  \
                 - {match: [{uri: {exact: /add}}], headers: {request: {add: {host: add.example.com}}}, route: [{destination: {host: reviews}}]}\n  \
                 - {route: [{destination: {host: reviews}}]}\n",
            )),
    );
    let client = it.client();
    for (path, expected) in [
        ("/rewrite", "new.example.com"),
        ("/set", "set.example.com"),
        ("/destination", "set.example.com"),
        ("/add", "add.example.com"),
        ("/", "reviews"),
    ] {
        let answer = send(&client, get(&format!("http://reviews{path}"))).await;
        assert_eq!(answer.saw()["host"].as_str(), Some(expected), "{path}");
    }
    let to = "route: [{destination: {host: reviews}}]";
    for (operation, name, at) in
        [("set", "host", "host"), ("add", "Host", "Host"), ("set", "':authority'", ":authority")]
    {
        let yaml = rules(&format!(
            "  - {{rewrite: {{authority: a.b}}, headers: {{request: {{{operation}: {{{name}: c.d}}}}}}, {to}}}\n"
        ));
        let at = if at.starts_with(':') { format!("[\"{at}\"]") } else { format!(".{at}") };
        refused(&yaml, &format!("spec.http[0].headers.request.{operation}{at}"), "more than once");
    }
}

#[tokio::test]
async fn vs_w03_uri_regex_rewrite() {
    let (_echo, services) = one_version().await;
    let to = "route: [{destination: {host: reviews}}]";
    let it = compile(
        &(services
            + &rules(&format!(
                "  - {{match: [{{uri: {{prefix: /}}}}], rewrite: {{uriRegexRewrite: {{match: '/v(\\d+)', rewrite: '/version-\\1'}}}}, {to}}}\n"
            ))),
    );
    let client = it.client();
    for (target, expected) in [("/v1/a/v22?x=/v3", "/version-1/a/version-22?x=/v3"), ("/nothing", "/nothing")]
    {
        let answer = send(&client, get(&format!("http://reviews{target}"))).await;
        assert_eq!(answer.saw()["url"].as_str(), Some(expected), "{target}");
    }
    let with = |rewrite: &str| rules(&format!("  - {{rewrite: {rewrite}, {to}}}\n"));
    refused(
        &with("{uri: /a, uriRegexRewrite: {match: /b, rewrite: /c}}"),
        "spec.http[0].rewrite.uriRegexRewrite",
        "only one of",
    );
    refused(
        &with("{uriRegexRewrite: {match: '/(?=b)', rewrite: /c}}"),
        "spec.http[0].rewrite.uriRegexRewrite.match",
        "",
    );
}

#[tokio::test]
async fn vs_h01_header_operations() {
    let (_echo, services) = one_version().await;
    let it = compile(
        &(services
            + &rules(
                "  - {headers: {request: {remove: [x-gone, x-both], set: {x-both: set, x-new: created, x-over: set, x-path: '%REQ(:path)%', x-empty: '%REQ(x-not-there)%', x-literal: '100%%'}, add: {x-both: added, x-more: added, x-first: added}}, \
                 response: {remove: [content-length, x-envoy-upstream-service-time], set: {y-new: created}, add: {y-new: added}}}, route: [{destination: {host: reviews}}]}\n",
            )),
    );
    let request = Request::get("http://reviews/p?q")
        .header("x-gone", "a")
        .header("x-both", "client")
        .header("x-over", "client")
        .header("x-more", "client")
        .header("x-empty", "client")
        .body(Body::empty())
        .unwrap();
    let answer = send(&it.client(), request).await;
    let saw = |name: &str| answer.saw_header(name);
    assert_eq!(saw("x-gone"), None);
    assert_eq!(saw("x-both").as_deref(), Some("set,added"), "removed first, then set, then added to");
    assert_eq!((saw("x-new").as_deref(), saw("x-over").as_deref()), (Some("created"), Some("set")));
    assert_eq!((saw("x-more").as_deref(), saw("x-first").as_deref()), (Some("client,added"), Some("added")));
    assert_eq!(saw("x-empty").as_deref(), Some("client"), "an empty value is skipped");
    assert_eq!(saw("x-literal").as_deref(), Some("100%"));
    assert_eq!(saw("x-path").as_deref(), Some("/p?q"));
    assert_eq!(answer.header("x-envoy-upstream-service-time"), None);
    let new: Vec<_> = answer.headers.get_all("y-new").iter().collect();
    assert_eq!(new, ["created", "added"]);

    let with = |side: &str, operation: &str| {
        rules(&format!(
            "  - {{headers: {{{side}: {{{operation}}}}}, route: [{{destination: {{host: reviews}}}}]}}\n"
        ))
    };
    for (side, operation, at) in [
        ("request", "set: {':path': /a}", "set[\":path\"]"),
        ("request", "add: {':method': PUT}", "add[\":method\"]"),
        ("request", "remove: [':path']", "remove[0]"),
        ("request", "remove: [Host]", "remove[0]"),
        ("request", "remove: [':authority']", "remove[0]"),
        ("response", "set: {':status': '200'}", "set[\":status\"]"),
        ("response", "set: {host: a}", "set.host"),
        ("response", "set: {':authority': a}", "set[\":authority\"]"),
        ("request", "set: {x: '%REQ(a'}", "set.x"),
        ("request", "set: {x: '100%'}", "set.x"),
    ] {
        refused(&with(side, operation), &format!("spec.http[0].headers.{side}.{at}"), "");
    }
    accepted(&with("request", "set: {':authority': a.b}"));
}

/// A body that ends when its sender is dropped.
struct Open(Receiver<Bytes>);

impl http_body::Body for Open {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|data| data.map(|data| Ok(Frame::data(data))))
    }
}

fn open_request(url: &str) -> (Sender<Bytes>, Request<Body>) {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    (sender, Request::post(url).body(Body::new(Open(receiver))).unwrap())
}

#[tokio::test]
async fn vs_t01_timeout() {
    let (echo, services) = one_version().await;
    let it = compile(
        &(services
            + &rules(
                "  - {match: [{uri: {prefix: /gate/none}}], route: [{destination: {host: reviews}}]}\n  \
                 - {timeout: 600s, route: [{destination: {host: reviews}}]}\n",
            )),
    );
    let client = it.client();
    let seen = |count: usize| {
        let echo = &echo;
        async move { until(|| echo.requests() == count).await }
    };
    // Off by default; 0 cannot be written.
    let to = "route: [{destination: {host: reviews}}]";
    for bad in ["0s", "0.5ms", "1.5ms"] {
        refused(&rules(&format!("  - {{timeout: {bad}, {to}}}\n")), "spec.http[0].timeout", "1ms");
    }
    let sent = tokio::spawn({
        let client = client.clone();
        async move { send(&client, get("http://reviews/gate/none")).await.status }
    });
    seen(1).await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(1_000_000)).await;
    tokio::time::resume();
    assert!(!sent.is_finished());
    echo.gate.add_permits(1);
    assert_eq!(ended(sent).await, 200);
    // On expiry 504 UT, not a moment before.
    let sent = tokio::spawn({
        let client = client.clone();
        async move { fail(&client, get("http://reviews/gate/late")).await }
    });
    seen(2).await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(500)).await;
    assert!(!sent.is_finished());
    tokio::time::advance(Duration::from_secs(101)).await;
    tokio::time::resume();
    assert_eq!(ended(sent).await, "504 UT response_timeout");
    // It covers the body of the response.
    let response = client.clone().oneshot(get("http://reviews/slow")).await.unwrap();
    assert_eq!(response.status(), 200);
    tokio::time::pause();
    let error = response.into_body().collect().await.map(|_| ()).unwrap_err();
    tokio::time::resume();
    assert!(error.to_string().contains("response_timeout"), "{error}");
    // It begins when the request has come whole.
    let (sender, request) = open_request("http://reviews/upload");
    let sent = tokio::spawn({
        let client = client.clone();
        async move { send(&client, request).await.status }
    });
    sender.send(Bytes::from_static(b"half")).await.unwrap();
    seen(4).await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(100_000)).await;
    tokio::time::resume();
    assert!(!sent.is_finished());
    drop(sender);
    assert_eq!(ended(sent).await, 200);
}

#[tokio::test]
async fn vs_t01_grpc_timeout_is_honoured_and_capped_by_the_timeout() {
    let (echo, services) = one_version().await;
    let it = compile(
        &(services
            + &rules(
                "  - {match: [{uri: {prefix: /gate/capped}}], timeout: 600s, route: [{destination: {host: reviews}}]}\n  \
                 - {route: [{destination: {host: reviews}}]}\n",
            )),
    );
    let client = it.client();
    for (count, (path, header, content_type, seconds)) in (1..).zip([
        ("capped", Some("100S"), "application/grpc", Some(100)),
        ("capped", Some("1H"), "application/grpc+proto", Some(600)),
        ("capped", None, "application/grpc", Some(600)),
        ("capped", Some("0m"), "application/grpc", Some(600)),
        ("capped", Some("soon"), "application/grpc", Some(600)),
        ("capped", Some("100S"), "text/plain", Some(600)),
        ("none", Some("2M"), "application/grpc", Some(120)),
        ("none", Some("5000m"), "application/grpc", Some(5)),
        ("none", Some("100S"), "text/plain", None),
        ("none", None, "application/grpc", None),
    ]) {
        let mut request =
            Request::post(format!("http://reviews/gate/{path}")).header("content-type", content_type);
        if let Some(header) = header {
            request = request.header("grpc-timeout", header);
        }
        let request = request.body(Body::empty()).unwrap();
        let sent = tokio::spawn({
            let client = client.clone();
            async move { client.oneshot(request).await.map(|_| ()).map_err(|error| error.flags().to_string()) }
        });
        until(|| echo.requests() == count).await;
        let what = format!("{path} {header:?} {content_type}");
        tokio::time::pause();
        // Within a second of it: what passed before the clock stopped counts too.
        tokio::time::advance(Duration::from_secs(seconds.unwrap_or(1_000_000) - 1)).await;
        assert!(!sent.is_finished(), "{what}");
        tokio::time::advance(Duration::from_secs(1)).await;
        tokio::time::resume();
        match seconds {
            Some(_) => assert_eq!(ended(sent).await, Err("UT".to_owned()), "{what}"),
            None => {
                echo.gate.add_permits(1);
                assert_eq!(ended(sent).await, Ok(()), "{what}");
            }
        }
    }
}

#[tokio::test]
async fn vs_x01_headers_that_the_router_and_the_edge_set() {
    let (_echo, services) = one_version().await;
    let edge = "{servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}";
    let rule = "{hosts: [reviews.default.svc.cluster.local], gateways: [mesh, edge], http: [{route: [{destination: {host: reviews}}]}]}";
    let yaml = services + &resource("Gateway", "edge", edge) + &resource("VirtualService", "v", rule);
    for (it, direction) in
        [(compile(&yaml), Direction::Outbound), (compile_gateway(&yaml), Direction::Gateway)]
    {
        Clusters::new().reconcile(it.table.clusters());
        let stack = ServiceBuilder::new()
            .layer(NormalizeLayer::new(Slot::fixed(EdgeSettings::default()), direction).seed(1))
            .layer(SelectRouteLayer::new(Slot::fixed_shared(it.table.clone())))
            .layer(HeadersLayer::new())
            .service(dispatch(Shard::seeded(1)));
        let client = tower::util::BoxCloneSyncService::new(stack);
        let request = |headers: &[(&str, &str)]| {
            let mut request = Request::get("http://reviews.default.svc.cluster.local/");
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let mut request = request.body(Body::empty()).unwrap();
            let conn =
                ConnInfo { peer: "10.1.1.1:5".parse().unwrap(), port: 80, ..ConnInfo::unknown(direction) };
            let cx = RequestContext::new(conn.into(), None, mesh_core::clock::now());
            request.extensions_mut().insert(cx);
            request
        };
        let first = send(&client, request(&[])).await;
        let second = send(&client, request(&[])).await;
        let id = first.saw_header("x-request-id").unwrap();
        assert_eq!((id.len(), id.matches('-').count()), (36, 4), "a UUID: {id}");
        assert_ne!(Some(id), second.saw_header("x-request-id"));
        assert_eq!(first.saw_header("x-envoy-attempt-count").as_deref(), Some("1"));
        assert_eq!(first.saw_header("x-forwarded-proto").as_deref(), Some("http"));
        assert!(first.header("x-envoy-upstream-service-time").unwrap().parse::<u64>().is_ok());
        let said = request(&[
            ("x-request-id", "mine"),
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-client-cert", "By=spiffe://evil"),
        ]);
        let said = send(&client, said).await;
        assert_eq!(said.saw_header("x-request-id").as_deref(), Some("mine"), "made only when it is absent");
        assert_eq!(said.saw_header("x-forwarded-client-cert"), None, "nobody verified a certificate");
        let gateway = direction == Direction::Gateway;
        let forwarded = if gateway { "1.2.3.4,10.1.1.1" } else { "1.2.3.4" };
        assert_eq!(said.saw_header("x-forwarded-for").as_deref(), Some(forwarded));
        assert_eq!(
            first.saw_header("x-forwarded-for").as_deref(),
            gateway.then_some("10.1.1.1"),
            "a gateway appends its peer"
        );
    }
}

/// The semantics of Envoy's route tables, as its route checker asks for them, in the words of a virtual service.
#[tokio::test]
async fn vs_w01_path_host_and_cluster_of_a_route_table() {
    let (api, other) = (Echo::start("api").await, Echo::start("other").await);
    let services = service_in("default", "api", &[api.addr.port()])
        + &service_in("default", "other", &[other.addr.port()]);
    let gateway = resource(
        "Gateway",
        "edge",
        "{servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}",
    );
    let table = |name: &str, hosts: &str, http: &str| {
        resource("VirtualService", name, &format!("  hosts: [{hosts}]\n  gateways: [edge]\n  http:\n{http}"))
    };
    let named = table(
        "named",
        "example.com, www.example.com",
        "  - {match: [{uri: {prefix: /new}}], rewrite: {uri: /api/new}, route: [{destination: {host: api}}]}\n  \
         - {match: [{uri: {exact: /}}], route: [{destination: {host: other}}]}\n  \
         - {match: [{uri: {prefix: /}}], route: [{destination: {host: api}}]}\n",
    );
    let any = table(
        "any",
        "'*'",
        "  - {match: [{uri: {exact: /places}, ignoreUriCase: true}], rewrite: {uri: /rewritten}, route: [{destination: {host: api}}]}\n  \
         - {match: [{uri: {exact: /Fruit}}], rewrite: {uri: /Vegetable}, route: [{destination: {host: api}}]}\n  \
         - {match: [{uri: {prefix: /guest}}], rewrite: {authority: host.example.net}, route: [{destination: {host: api}}]}\n  \
         - {match: [{headers: {x_pattern: {regex: '^user-\\d+$'}}}], route: [{destination: {host: api}}]}\n  \
         - {match: [{headers: {x_there: {}}}], route: [{destination: {host: api}}]}\n  \
         - {match: [{headers: {x_a: {exact: a}, x_b: {exact: b}}}], route: [{destination: {host: api}}]}\n  \
         - {route: [{destination: {host: other}}]}\n",
    );
    let it = compile_gateway(&(services + &gateway + &named + &any));
    let (client, conn) = (it.client(), std::sync::Arc::new(it.conn(80)));
    for (host, target, headers, by, url, authority) in [
        ("example.com", "/new/a", &[][..], "api", "/api/new/a", "example.com"),
        ("www.example.com", "/newer?q=1", &[], "api", "/api/newer?q=1", "www.example.com"),
        ("www.example.com", "/", &[], "other", "/", "www.example.com"),
        ("www.example.com", "/?q=1", &[], "other", "/?q=1", "www.example.com"),
        ("www.example.com:8080", "/a", &[], "api", "/a", "www.example.com:8080"),
        ("ww.example.com", "/new/a", &[], "other", "/new/a", "ww.example.com"),
        ("a.test", "/PLACES?q=1", &[], "api", "/rewritten?q=1", "a.test"),
        ("a.test", "/placesX", &[], "other", "/placesX", "a.test"),
        ("a.test", "/Fruit", &[], "api", "/Vegetable", "a.test"),
        ("a.test", "/fruit", &[], "other", "/fruit", "a.test"),
        ("a.test", "/guest/a", &[], "api", "/guest/a", "host.example.net"),
        ("a.test", "/Guest/a", &[], "other", "/Guest/a", "a.test"),
        ("a.test", "/", &[("x_pattern", "user-12")], "api", "/", "a.test"),
        ("a.test", "/", &[("x_pattern", "a user-12")], "other", "/", "a.test"),
        ("a.test", "/", &[("x_there", "")], "api", "/", "a.test"),
        ("a.test", "/", &[("x_a", "a")], "other", "/", "a.test"),
        ("a.test", "/", &[("x_a", "a"), ("x_b", "b")], "api", "/", "a.test"),
    ] {
        let mut request = get(&format!("http://{host}{target}"));
        let cx = RequestContext::new(std::sync::Arc::clone(&conn), None, mesh_core::clock::now());
        request.extensions_mut().insert(cx);
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        let answer = send(&client, request).await;
        let saw = answer.saw();
        assert_eq!(
            (answer.by().as_str(), saw["url"].as_str().unwrap(), saw["host"].as_str().unwrap()),
            (by, url, authority),
            "{host}{target} {headers:?}"
        );
    }
}

#[tokio::test]
async fn h10_a_grpc_deadline_shrinks_with_each_hop() {
    let (_echo, services) = one_version().await;
    let it = compile(&(services + &rules("  - {timeout: 600s, route: [{destination: {host: reviews}}]}\n")));
    let client = it.client();
    let mut deadline = "100S".to_owned();
    for left in [70_000, 40_000, 10_000] {
        let mut request = Request::post("http://reviews/p.Service/Method")
            .header("content-type", "application/grpc")
            .header("grpc-timeout", &deadline)
            .body(Body::empty())
            .unwrap();
        let conn = ConnInfo::unknown(Direction::Outbound);
        request.extensions_mut().insert(RequestContext::new(conn.into(), None, mesh_core::clock::now()));
        // The hop takes its time before it sends the request on.
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(30)).await;
        tokio::time::resume();
        let answer = send(&client, request).await;
        deadline = answer.saw_header("grpc-timeout").unwrap();
        let told: u64 = deadline.strip_suffix('m').unwrap().parse().unwrap();
        assert!((left - 9_000..=left).contains(&told), "{deadline} of {left}m");
        let expected = answer.saw_header("x-envoy-expected-rq-timeout-ms").unwrap();
        assert_eq!(expected, told.to_string());
    }
}
