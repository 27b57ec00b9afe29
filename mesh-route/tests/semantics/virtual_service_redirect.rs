//! Answers of the route itself: VS-D01 … VS-D04.

use crate::support::*;

/// A rule for paths under `/old` that redirects.
fn with_redirect(redirect: &str) -> String {
    reviews(&[1])
        + &rules(&format!(
            "  - {{match: [{{uri: {{prefix: /old}}}}], redirect: {redirect}}}\n  - {{name: rest, route: [{{destination: {{host: reviews}}}}]}}\n"
        ))
}

fn location(redirect: &str, url: &str) -> String {
    compile(&with_redirect(redirect)).redirect(url)
}

#[test]
fn vs_d01_redirect() {
    for (redirect, url, expected) in [
        ("{uri: /new}", "http://reviews/old/a", "http://reviews/new"),
        ("{uri: /new}", "http://reviews/old?q=1", "http://reviews/new?q=1"),
        ("{uri: '/new?r=2'}", "http://reviews/old?q=1", "http://reviews/new?r=2"),
        ("{authority: b.example.com}", "http://reviews/old/a?q", "http://b.example.com/old/a?q"),
        ("{scheme: https}", "http://reviews/old", "https://reviews/old"),
        ("{scheme: https}", "http://reviews:80/old", "https://reviews/old"),
        ("{port: 8080}", "http://reviews/old", "http://reviews:8080/old"),
        ("{port: 80}", "http://reviews/old", "http://reviews/old"),
        ("{scheme: https, port: 443}", "http://reviews/old", "https://reviews/old"),
        ("{scheme: https, port: 80}", "http://reviews/old", "https://reviews:80/old"),
        ("{scheme: http, port: 443}", "http://reviews/old", "http://reviews:443/old"),
        (
            "{scheme: https, derivePort: FROM_PROTOCOL_DEFAULT}",
            "http://reviews:80/old",
            "https://reviews/old",
        ),
        ("{scheme: https, derivePort: FROM_REQUEST_PORT}", "http://reviews:80/old", "https://reviews:80/old"),
        ("{scheme: http, derivePort: FROM_REQUEST_PORT}", "http://reviews/old", "http://reviews/old"),
        // What the client wrote stays when the port is the default anyway.
        ("{scheme: http, derivePort: FROM_REQUEST_PORT}", "http://reviews:80/old", "http://reviews:80/old"),
        ("{derivePort: FROM_REQUEST_PORT}", "http://reviews:80/old", "http://reviews:80/old"),
        ("{derivePort: FROM_PROTOCOL_DEFAULT, uri: /new}", "http://reviews:80/old", "http://reviews:80/new"),
    ] {
        assert_eq!(location(redirect, url), format!("301 {expected}"), "{redirect} {url}");
    }
    refused(&with_redirect("{scheme: ftp}"), "spec.http[0].redirect.scheme", "\"http\" or \"https\"");
    refused(
        &with_redirect("{port: 1, derivePort: FROM_REQUEST_PORT}"),
        "spec.http[0].redirect.derivePort",
        "only one of port and derivePort",
    );
    refused(&with_redirect("{port: 70000}"), "spec.http[0].redirect.port", "70000");
}

#[tokio::test]
async fn vs_d02_redirect_code() {
    assert!(location("{uri: /new}", "http://reviews/old").starts_with("301 "));
    for code in [301, 302, 303, 307, 308] {
        let yaml = with_redirect(&format!("{{uri: /new, redirectCode: {code}}}"));
        accepted(&yaml);
        let answer = send(&compile(&yaml).client(), get("http://reviews/old?q")).await;
        assert_eq!((answer.status, answer.header("location")), (code, Some("http://reviews/new?q")));
        assert_eq!(answer.text, "");
    }
    for code in [300, 304, 305] {
        let yaml = with_redirect(&format!("{{uri: /new, redirectCode: {code}}}"));
        warned(&yaml, "spec.http[0].redirect.redirectCode", "no effect");
        assert_eq!(compile(&yaml).route("http://reviews/old").as_deref(), Some("rest"), "no action");
    }
    for code in [200, 404] {
        let yaml = with_redirect(&format!("{{uri: /new, redirectCode: {code}}}"));
        refused(&yaml, "spec.http[0].redirect.redirectCode", "3xx");
    }
}

#[test]
fn vs_d03_prefix_rewrite_is_textual() {
    for (redirect, url, expected) in [
        ("{prefixRewrite: /}", "http://reviews/old/baz", "http://reviews//baz"),
        ("{prefixRewrite: /new}", "http://reviews/old/baz?q", "http://reviews/new/baz?q"),
        ("{prefixRewrite: /new}", "http://reviews/older", "http://reviews/newer"),
    ] {
        assert_eq!(location(redirect, url), format!("301 {expected}"), "{redirect} {url}");
    }
    for matched in ["", "match: [{method: {exact: GET}}], "] {
        let it = compile(
            &(reviews(&[1]) + &rules(&format!("  - {{{matched}redirect: {{prefixRewrite: /v1}}}}\n"))),
        );
        assert_eq!(it.redirect("http://reviews/a?q"), "301 http://reviews/v1a?q", "no path is the prefix /");
    }
    let path = "spec.http[0].redirect.prefixRewrite";
    for uri in ["exact", "regex"] {
        let yaml =
            rules(&format!("  - {{match: [{{uri: {{{uri}: /old}}}}], redirect: {{prefixRewrite: /new}}}}\n"));
        refused(&yaml, path, "needs a prefix match");
    }
    refused(&with_redirect("{uri: /a, prefixRewrite: /new}"), path, "only one of uri and prefixRewrite");
    for nothing in ["{}", "{redirectCode: 302}"] {
        refused(&with_redirect(nothing), "spec.http[0].redirect", "needs one of");
    }
    for one in ["{uri: /a}", "{prefixRewrite: /a}", "{authority: a.b}", "{scheme: https}", "{port: 81}"] {
        accepted(&with_redirect(one));
    }
}

fn with_response(response: &str) -> String {
    reviews(&[1]) + &rules(&format!("  - {{directResponse: {response}}}\n"))
}

#[tokio::test]
async fn vs_d04_direct_response() {
    for (response, status, body) in [
        ("{status: 503, body: {string: go away}}", 503, "go away"),
        ("{status: 200, body: {bytes: aGVsbG8=}}", 200, "hello"),
        ("{status: 599}", 599, ""),
        ("{status: 418, body: {string: ''}}", 418, ""),
    ] {
        let yaml = with_response(response);
        accepted(&yaml);
        let answer = send(&compile(&yaml).client(), get("http://reviews/")).await;
        assert_eq!((answer.status, answer.text.as_str()), (status, body), "{response}");
    }
    let path = "spec.http[0].directResponse";
    for status in [199, 600, 0] {
        refused(&with_response(&format!("{{status: {status}}}")), &format!("{path}.status"), "200..599");
    }
    let sized =
        |bytes: usize| with_response(&format!("{{status: 200, body: {{string: {}}}}}", "a".repeat(bytes)));
    accepted(&sized(100 * 1024));
    warned(&sized(100 * 1024 + 1), &format!("{path}.body"), "large");
    warned(&sized(1024 * 1024), &format!("{path}.body"), "large");
    refused(&sized(1024 * 1024 + 1), &format!("{path}.body"), "too large");
    refused(&with_response("{status: 200, body: {bytes: '%'}}"), &format!("{path}.body.bytes"), "base64");
    refused(
        &with_response("{status: 200, body: {string: a, bytes: aa==}}"),
        &format!("{path}.body"),
        "only one of",
    );
}
