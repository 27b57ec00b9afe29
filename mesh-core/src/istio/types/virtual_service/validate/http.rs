//! HTTP routes.

use std::collections::BTreeMap;

use base64::Engine as _;

use super::super::{
    CorsPolicy, FaultAbort, FaultDelay, HeaderOperations, Headers, HttpBody, HttpDirectResponse,
    HttpFaultInjection, HttpMatchRequest, HttpRedirect, HttpRetry, HttpRewrite, HttpRoute,
};
use super::{destination, required_destination, total_weight, weight};
use crate::istio::findings::Findings;
use crate::istio::types::check;
use crate::istio::types::common::{Percent, StringMatch, StringMatchKind};

const DEPRECATED: &str = "IST0002";

/// Pseudo-headers, which a match may name like headers.
const PSEUDO_HEADERS: [&str; 5] = [":method", ":scheme", ":authority", ":path", ":status"];

/// A header key with which a match looks at a claim of the validated JWT (VS-M07).
const CLAIM_PREFIX: &str = "@request.auth.claims";

pub(super) fn route(out: &mut Findings, route: &HttpRoute, in_delegate: bool, for_gateways: bool) {
    actions(out, route, in_delegate);
    for (index, matches) in route.matches.iter().enumerate() {
        out.item("match", index, |out| request_match(out, matches, for_gateways));
    }
    if let Some(ops) = &route.headers {
        headers(out, ops);
    }
    if let Some(policy) = &route.cors_policy {
        out.within("corsPolicy", |out| cors(out, policy));
    }
    if let Some(injection) = &route.fault {
        out.within("fault", |out| fault(out, injection));
    }
    mirrors(out, route);
    if let Some(redirection) = &route.redirect {
        out.within("redirect", |out| redirect(out, redirection, &route.matches));
    }
    if let Some(response) = &route.direct_response {
        out.within("directResponse", |out| direct_response(out, response));
    }
    if let Some(retries) = &route.retries {
        out.within("retries", |out| retry(out, retries));
    }
    if let Some(change) = &route.rewrite {
        out.within("rewrite", |out| rewrite(out, change));
        // A delegate may have its match from its root.
        let replaces = !matches!(change.uri.as_str(), "" | "/") && change.uri_regex_rewrite.is_none();
        if replaces && !in_delegate && !route.route.is_empty() && matches_any_path(&route.matches) {
            out.warning(
                "rewrite.uri",
                "without a match of the uri this replaces the prefix \"/\", so \"/a\" on \"/b\" becomes \"/ab\"",
            );
        }
    }
    authority_once(out, route);
    for (index, to) in route.route.iter().enumerate() {
        out.item("route", index, |out| {
            required_destination(out, to.destination.as_ref());
            weight(out, to.weight);
            if let Some(ops) = &to.headers {
                headers(out, ops);
            }
        });
    }
    total_weight(out, route.route.iter().map(|to| to.weight));
    if route.websocket_upgrade.is_some() {
        out.warning_code("websocketUpgrade", "deprecated; every route allows upgrades", DEPRECATED);
    }
    if let Some(timeout) = route.timeout {
        out.check("timeout", check::duration(timeout));
    }
}

/// Whether some request is taken whatever its path.
fn matches_any_path(matches: &[HttpMatchRequest]) -> bool {
    matches.is_empty() || matches.iter().any(|matches| matches.uri.is_none())
}

/// Exactly one of route, redirect, directResponse and delegate (VS-R01, VS-G01).
fn actions(out: &mut Findings, route: &HttpRoute, in_delegate: bool) {
    let conflict = |out: &mut Findings, what: &str, others: &[(&str, bool)]| {
        for (field, _) in others.iter().filter(|(_, present)| *present) {
            out.error(field, format!("must not stand beside {what}"));
        }
    };
    let forwards = ("route", !route.route.is_empty());
    let faults = ("fault", route.fault.is_some());
    let rewrites = ("rewrite", route.rewrite.is_some());
    let redirects = ("redirect", route.redirect.is_some());
    let responds = ("directResponse", route.direct_response.is_some());
    if route.delegate.is_some() {
        if in_delegate {
            out.error("delegate", "a delegate must not delegate further");
        } else {
            conflict(out, "delegate", &[redirects, forwards]);
        }
        return;
    }
    if route.redirect.is_some() {
        conflict(out, "redirect", &[forwards, faults, rewrites, responds]);
    } else if route.direct_response.is_some() {
        conflict(out, "directResponse", &[forwards, faults, rewrites]);
    } else if route.route.is_empty() {
        out.error("", "one of route, redirect and directResponse is required");
    }
    if route.mirror.is_some() && !route.mirrors.is_empty() {
        out.error("mirrors", "must not stand beside mirror");
    }
}

fn request_match(out: &mut Findings, matches: &HttpMatchRequest, for_gateways: bool) {
    if *matches == HttpMatchRequest::default() {
        out.warning("", "an empty match is forbidden by Istio's API; it matches every request");
    }
    if let Some(uri) = &matches.uri {
        string_match(out, "uri", uri, true, false);
    }
    for (field, matcher) in
        [("scheme", &matches.scheme), ("method", &matches.method), ("authority", &matches.authority)]
    {
        if let Some(matcher) = matcher {
            string_match(out, field, matcher, false, false);
        }
    }
    for (field, map) in [("headers", &matches.headers), ("withoutHeaders", &matches.without_headers)] {
        header_matches(out, field, map, for_gateways);
    }
    for (name, matcher) in &matches.query_params {
        string_match(out, &join("queryParams", name), matcher, false, true);
    }
    if matches.port != 0 {
        out.check("port", check::port(matches.port));
    }
    check::labels(out, "sourceLabels", &matches.source_labels);
    check::gateway_names(out, "gateways", &matches.gateways);
    if !matches.source_namespace.is_empty() {
        out.check("sourceNamespace", check::dns1123_label(&matches.source_namespace));
    }
}

fn header_matches(out: &mut Findings, field: &str, map: &BTreeMap<String, StringMatch>, for_gateways: bool) {
    for (name, matcher) in map {
        let at = join(field, name);
        if is_claim(name) {
            if !for_gateways {
                out.error(&at, "matching a claim of a JWT is only possible on gateways");
            }
        } else if !PSEUDO_HEADERS.contains(&name.as_str()) {
            out.check(&at, check::header_name(name));
        }
        string_match(out, &at, matcher, false, true);
    }
}

/// `@request.auth.claims.x` or `@request.auth.claims[x][y]`.
fn is_claim(name: &str) -> bool {
    let prefix =
        name.get(..CLAIM_PREFIX.len()).is_some_and(|prefix| prefix.eq_ignore_ascii_case(CLAIM_PREFIX));
    let rest = name.get(CLAIM_PREFIX.len()..).unwrap_or_default();
    prefix && rest.len() > 1 && (rest.starts_with('.') || (rest.starts_with('[') && rest.ends_with(']')))
}

fn join(field: &str, key: &str) -> String {
    let key = check::key_path(key);
    if key.starts_with('[') { format!("{field}{key}") } else { format!("{field}.{key}") }
}

/// `empty_prefix`: the empty prefix is one that every text has; Envoy takes it for paths alone. `presence`: the regex
/// `*` stands for "present", and nothing at all does too.
fn string_match(out: &mut Findings, field: &str, matcher: &StringMatch, empty_prefix: bool, presence: bool) {
    match matcher.kind() {
        StringMatchKind::Regex("*") if presence => {}
        StringMatchKind::Regex("") => out.error(&format!("{field}.regex"), "a regex must not be empty"),
        StringMatchKind::Prefix("") if !empty_prefix => {
            out.error(&format!("{field}.prefix"), "a prefix must not be empty here");
        }
        _ => check::string_match(out, field, matcher),
    }
}

fn headers(out: &mut Findings, ops: &Headers) {
    out.within("headers", |out| {
        if let Some(request) = &ops.request {
            out.within("request", |out| header_operations(out, request, true));
        }
        if let Some(response) = &ops.response {
            out.within("response", |out| header_operations(out, response, false));
        }
    });
}

fn header_operations(out: &mut Findings, ops: &HeaderOperations, authority: bool) {
    for (field, map) in [("set", &ops.set), ("add", &ops.add)] {
        for (name, value) in map {
            let at = join(field, name);
            out.check(&at, operated_header(name, authority));
            out.check(&at, header_value(value));
        }
    }
    for (index, name) in ops.remove.iter().enumerate() {
        out.check(&format!("remove[{index}]"), operated_header(name, false));
    }
}

/// A header that may be changed; `:authority` and `Host` only where `authority` says so (VS-H01).
fn operated_header(name: &str, authority: bool) -> check::Checked {
    if name.is_empty() {
        return Err("a header name must not be empty".to_owned());
    }
    if is_authority(name) && authority {
        return Ok(());
    }
    if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
        return Err(format!("header {name:?} must not be changed here"));
    }
    Ok(())
}

fn is_authority(name: &str) -> bool {
    name.eq_ignore_ascii_case(":authority") || name.eq_ignore_ascii_case("host")
}

/// A header value as Envoy's formatter reads it: `%%` is a percent sign, `%NAME%`, `%NAME(text)%` and
/// `%NAME(["a", "b"])%` are variables. A backslash takes the meaning from the character after it.
fn header_value(value: &str) -> check::Checked {
    #[derive(Clone, Copy, PartialEq)]
    enum In {
        Literal,
        Name,
        ArgumentStart,
        ItemStart,
        Text,
        ItemEnd,
        ArgumentEnd,
        End,
    }
    let wrong = |what: &str| Err(format!("header value {value:?}: {what}; write %% for a percent sign"));
    if value.bytes().any(|byte| byte.is_ascii_control() && byte != b'\t') {
        return Err(format!("header value {value:?} holds a control character"));
    }
    let mut at = In::Literal;
    let mut bytes = value.bytes().peekable();
    while let Some(byte) = bytes.next() {
        at = match (at, byte) {
            (In::Literal, b'%') if bytes.next_if_eq(&b'%').is_some() => In::Literal,
            (In::Literal, b'%') => In::Name,
            (In::Literal, _) => In::Literal,
            (In::Name, b'%') | (In::End, b'%') => In::Literal,
            (In::Name, b'(') => In::ArgumentStart,
            (In::ArgumentStart, b'[') | (In::ItemEnd, b',') => In::ItemStart,
            (In::ItemStart, b'"') => In::Text,
            (In::Text, b'\\') => match bytes.next() {
                Some(_) => In::Text,
                None => return wrong("ends in a backslash"),
            },
            (In::Text | In::ArgumentEnd, b')') => In::End,
            (In::Text, b'"') => In::ItemEnd,
            (In::ArgumentStart, byte) if byte != b' ' => In::Text,
            (In::ItemEnd, b']') => In::ArgumentEnd,
            (In::Name | In::Text, _) | (_, b' ') => at,
            (In::ItemStart, _) => return wrong("expected '\"'"),
            (In::ItemEnd, _) => return wrong("expected ',' or ']'"),
            (In::ArgumentEnd, _) => return wrong("expected ')'"),
            _ => return wrong("expected '%' after ')'"),
        };
    }
    if at == In::Literal { Ok(()) } else { wrong("a variable is not closed") }
}

/// Only one place may set the authority (VS-W02).
fn authority_once(out: &mut Findings, route: &HttpRoute) {
    let rewritten = route.rewrite.as_ref().is_some_and(|rewrite| !rewrite.authority.is_empty());
    let Some(request) = route.headers.as_ref().and_then(|headers| headers.request.as_ref()) else { return };
    let mut set_before = rewritten;
    for (field, map) in [("set", &request.set), ("add", &request.add)] {
        for name in map.keys().filter(|name| is_authority(name)) {
            if set_before {
                out.error(
                    &format!("headers.request.{}", join(field, name)),
                    "the authority is set more than once",
                );
            }
            set_before = true;
        }
    }
}

const METHODS: [&str; 10] =
    ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "*"];

fn cors(out: &mut Findings, policy: &CorsPolicy) {
    if !policy.allow_origin.is_empty() {
        out.warning_code("allowOrigin", "deprecated; use allowOrigins", DEPRECATED);
    }
    for (index, origin) in policy.allow_origins.iter().enumerate() {
        let at = format!("allowOrigins[{index}]");
        match origin.kind() {
            StringMatchKind::Unset
            | StringMatchKind::Exact("")
            | StringMatchKind::Prefix("")
            | StringMatchKind::Regex("") => out.error(&at, "needs exact, prefix or regex"),
            _ => check::string_match(out, &at, origin),
        }
    }
    for (index, method) in policy.allow_methods.iter().enumerate() {
        if !METHODS.contains(&method.as_str()) {
            out.error(&format!("allowMethods[{index}]"), format!("{method:?} is not an HTTP method"));
        }
    }
    for (field, names) in [("allowHeaders", &policy.allow_headers), ("exposeHeaders", &policy.expose_headers)]
    {
        for (index, name) in names.iter().enumerate().filter(|(_, name)| *name != "*") {
            out.check(&format!("{field}[{index}]"), check::header_name(name));
        }
    }
    if let Some(age) = policy.max_age {
        if age.as_nanos() % 1_000_000_000 != 0 {
            out.error("maxAge", format!("duration {age} must be whole seconds"));
        } else {
            out.check("maxAge", check::duration(age));
        }
    }
}

fn fault(out: &mut Findings, injection: &HttpFaultInjection) {
    if injection.delay.is_none() && injection.abort.is_none() {
        out.error("", "a fault needs a delay or an abort");
    }
    if let Some(abort) = &injection.abort {
        out.within("abort", |out| fault_abort(out, abort));
    }
    if let Some(delay) = &injection.delay {
        out.within("delay", |out| fault_delay(out, delay));
    }
}

fn fault_abort(out: &mut Findings, abort: &FaultAbort) {
    fault_share(out, abort.percent, abort.percentage);
    let set = [abort.http_status.is_some(), abort.grpc_status.is_some(), abort.http2_error.is_some()];
    match set.into_iter().filter(|set| *set).count() {
        0 => out.warning("", "neither httpStatus nor grpcStatus is set, so nothing is aborted"),
        1 => {}
        _ => out.error("", "only one of httpStatus, grpcStatus and http2Error may be set"),
    }
    if let Some(status) = abort.http_status {
        reply_status(out, "httpStatus", status.into());
    }
    if let Some(status) = &abort.grpc_status
        && !GRPC_STATUSES.contains(&status.as_str())
    {
        out.error(
            "grpcStatus",
            format!("{status:?} is not the name of a gRPC status, such as \"NOT_FOUND\""),
        );
    }
    if abort.http2_error.is_some() {
        out.error("http2Error", "is not supported");
    }
}

/// The status of a reply that no upstream gives. Istio says 200..599 and lets 600 pass; HTTP has no 600.
fn reply_status(out: &mut Findings, field: &str, status: i64) {
    if !(200..=599).contains(&status) {
        out.error(field, format!("HTTP status {status} must be in the range 200..599"));
    }
}

fn fault_delay(out: &mut Findings, delay: &FaultDelay) {
    fault_share(out, delay.percent, delay.percentage);
    if delay.fixed_delay.is_some() && delay.exponential_delay.is_some() {
        out.error("", "only one of fixedDelay and exponentialDelay may be set");
    }
    if let Some(fixed) = delay.fixed_delay {
        out.check("fixedDelay", check::duration(fixed));
    }
    if delay.exponential_delay.is_some() {
        out.error("exponentialDelay", "is not supported");
    }
}

fn fault_share(out: &mut Findings, percent: i32, percentage: Option<Percent>) {
    if percent != 0 {
        out.warning_code("percent", "deprecated; use percentage", DEPRECATED);
        out.check("percent", check::percent(percent.into()));
    }
    share(out, "percentage", percentage, true);
}

/// A share of requests. The finest that Envoy can draw is a ten-thousandth of a percent.
fn share(out: &mut Findings, field: &str, percentage: Option<Percent>, finest: bool) {
    let Some(Percent { value }) = percentage else { return };
    if !(0.0..=100.0).contains(&value) {
        out.error(&format!("{field}.value"), format!("percentage {value} must be in the range 0..100"));
    } else if finest && value > 0.0 && value < 0.0001 {
        out.error(&format!("{field}.value"), format!("percentage {value} is smaller than 0.0001"));
    }
}

/// The names of `google.rpc.Code`, in the order of their numbers.
pub(in super::super) const GRPC_STATUSES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

fn mirrors(out: &mut Findings, route: &HttpRoute) {
    if let Some(percent) = route.mirror_percent {
        out.warning_code("mirrorPercent", "deprecated; use mirrorPercentage", DEPRECATED);
        out.check("mirrorPercent", check::percent(percent.into()));
    }
    share(out, "mirrorPercentage", route.mirror_percentage, false);
    if let Some(to) = &route.mirror {
        out.within("mirror", |out| destination(out, to));
    }
    for (index, mirror) in route.mirrors.iter().enumerate() {
        out.item("mirrors", index, |out| {
            required_destination(out, mirror.destination.as_ref());
            share(out, "percentage", mirror.percentage, false);
        });
    }
}

fn redirect(out: &mut Findings, redirection: &HttpRedirect, matches: &[HttpMatchRequest]) {
    let port = redirection.port.is_some() || redirection.derive_port.is_some();
    let texts = [&redirection.uri, &redirection.prefix_rewrite, &redirection.authority, &redirection.scheme];
    if !port && texts.iter().all(|text| text.is_empty()) {
        out.error("", "a redirect needs one of uri, prefixRewrite, authority, scheme and port");
    }
    if redirection.port.is_some() && redirection.derive_port.is_some() {
        out.error("derivePort", "only one of port and derivePort may be set");
    }
    if !redirection.prefix_rewrite.is_empty() {
        if !redirection.uri.is_empty() {
            out.error("prefixRewrite", "only one of uri and prefixRewrite may be set");
        }
        let needs_prefix = |uri: &StringMatch| !matches!(uri.kind(), StringMatchKind::Prefix(_));
        if matches.iter().filter_map(|matches| matches.uri.as_ref()).any(needs_prefix) {
            out.error("prefixRewrite", "needs a prefix match of the uri");
        }
    }
    match redirection.redirect_code {
        0 | 301 | 302 | 303 | 307 | 308 => {}
        code @ 300..=399 => {
            out.warning("redirectCode", format!("{code} has no effect; use 301, 302, 303, 307 or 308"));
        }
        code => out.error("redirectCode", format!("{code} is not a redirect, which is 3xx")),
    }
    if !matches!(redirection.scheme.as_str(), "" | "http" | "https") {
        out.error("scheme", format!("{:?} must be \"http\" or \"https\"", redirection.scheme));
    }
    if let Some(port) = redirection.port.filter(|port| *port > 0) {
        out.check("port", check::port(port));
    }
}

const LARGE_BODY: usize = 100 * 1024;
const MAX_BODY: usize = 1024 * 1024;

fn direct_response(out: &mut Findings, response: &HttpDirectResponse) {
    reply_status(out, "status", response.status.into());
    let Some(HttpBody { string, bytes }) = &response.body else { return };
    if string.is_some() && bytes.is_some() {
        out.error("body", "only one of string and bytes may be set");
    }
    let mut size = string.as_deref().map_or(0, str::len);
    if let Some(bytes) = bytes {
        match base64::engine::general_purpose::STANDARD.decode(bytes) {
            Ok(decoded) => size = decoded.len(),
            Err(error) => out.error("body.bytes", format!("not valid base64: {error}")),
        }
    }
    if size > MAX_BODY {
        out.error("body", format!("the body of {size} bytes is too large (at most {MAX_BODY})"));
    } else if size > LARGE_BODY {
        out.warning("body", format!("the body of {size} bytes is large; it is kept in memory"));
    }
}

fn retry(out: &mut Findings, retries: &HttpRetry) {
    if retries.attempts < 0 {
        out.error("attempts", format!("{} must not be negative", retries.attempts));
    }
    if retries.attempts == 0 && *retries != HttpRetry::default() {
        let refused = retries.per_try_timeout.is_some()
            || !retries.retry_on.is_empty()
            || retries.retry_remote_localities.is_some();
        if refused {
            out.error("attempts", "0 turns retries off, so nothing else may be set");
        } else {
            out.warning("attempts", "0 turns retries off, so what else is set has no effect");
        }
    }
    for (field, value) in [("perTryTimeout", retries.per_try_timeout), ("backoff", retries.backoff)] {
        if let Some(value) = value {
            out.check(field, check::duration(value));
        }
    }
    if !retries.retry_on.is_empty() {
        for condition in retries.retry_on.split(',') {
            if !RETRY_ON.contains(&condition) && !is_known_status(condition) {
                out.error("retryOn", format!("{condition:?} is not a condition of a retry"));
            }
        }
    }
}

/// VS-Y03.
const RETRY_ON: [&str; 16] = [
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "envoy-ratelimited",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
];

/// A status that IANA has registered.
fn is_known_status(text: &str) -> bool {
    text.parse::<u16>().is_ok_and(|status| {
        matches!(status, 100..=103 | 200..=208 | 226 | 300..=305 | 307 | 308 | 400..=418 | 421..=426 | 428 | 429 | 431
            | 451 | 500..=508 | 510 | 511)
    })
}

fn rewrite(out: &mut Findings, change: &HttpRewrite) {
    match &change.uri_regex_rewrite {
        None if change.uri.is_empty() && change.authority.is_empty() => {
            out.error("", "a rewrite needs one of uri, uriRegexRewrite and authority");
        }
        None => {}
        Some(regex) => {
            if !change.uri.is_empty() {
                out.error("uriRegexRewrite", "only one of uri and uriRegexRewrite may be set");
            }
            out.within("uriRegexRewrite", |out| {
                for (field, text) in [("match", &regex.pattern), ("rewrite", &regex.rewrite)] {
                    if text.is_empty() {
                        out.error(field, "is required");
                    }
                }
                out.check("match", check::regex(&regex.pattern));
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vs_h01_header_values_are_envoys_format() {
        for value in [
            "",
            "plain",
            "100%%",
            "%HOSTNAME%",
            "a %START_TIME(%s)% b",
            "%REQ(X-A?:path):10%",
            "%UPSTREAM_METADATA([\"ns\", \"key\"])%",
            "%UPSTREAM_METADATA( [ \"a\\\"b\" ] ) %",
        ] {
            let judged = header_value(value);
            assert_eq!(judged.is_ok(), value != "%REQ(X-A?:path):10%", "{value}: {judged:?}");
        }
        for value in
            ["%", "50%", "%NAME", "%NAME(", "%NAME(a)", "%NAME([a])%", "%NAME([\"a\" \"b\"])%", "%N(a\\"]
        {
            assert!(header_value(value).is_err(), "{value}");
        }
    }

    #[test]
    fn vs_m07_claims() {
        for name in ["@request.auth.claims.sub", "@Request.Auth.Claims[a][b]"] {
            assert!(is_claim(name), "{name}");
        }
        for name in [
            "@request.auth.claims",
            "@request.auth.claims.",
            "request.auth.claims.sub",
            "@request.auth.claim.é",
        ] {
            assert!(!is_claim(name), "{name}");
        }
    }
}
