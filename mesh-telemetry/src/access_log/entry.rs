//! One line of the log: what is captured from the request, and Istio's default text format.

use std::fmt::{self, Display, Write as _};
use std::time::{Duration, SystemTime};

use http::header::{HOST, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};
use mesh_core::{RequestContext, vendor};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What the client sent, and when.
#[derive(Debug)]
pub(super) struct Entry {
    started: SystemTime,
    method: Method,
    uri: Uri,
    version: Version,
    host: Option<HeaderValue>,
    forwarded_for: Option<HeaderValue>,
    user_agent: Option<HeaderValue>,
    request_id: Option<HeaderValue>,
    service_time: Option<HeaderValue>,
    status: u16,
}

impl Entry {
    pub(super) fn capture<B>(request: &Request<B>) -> Self {
        let header = |name: &HeaderName| request.headers().get(name).cloned();
        Self {
            started: SystemTime::now(),
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            host: header(&HOST),
            forwarded_for: header(&FORWARDED_FOR),
            user_agent: header(&USER_AGENT),
            request_id: header(&REQUEST_ID),
            service_time: None,
            status: 0,
        }
    }

    pub(super) fn responded(&mut self, status: u16, headers: &HeaderMap) {
        self.status = status;
        self.service_time = vendor::UPSTREAM_SERVICE_TIME.get(headers).cloned();
    }

    /// The line, with its end of line. What the edge normalised or made (path, authority, request id, forwarded
    /// addresses) stands in the place of what the client sent.
    pub(super) fn line(&self, cx: &RequestContext, duration: Duration) -> String {
        let mut line = String::with_capacity(384);
        // Writing to a String cannot fail.
        let _ = self.write(&mut line, cx, duration);
        line
    }

    fn write(&self, out: &mut String, cx: &RequestContext, duration: Duration) -> fmt::Result {
        let facts = cx.normalized();
        let uri = facts.as_ref().map_or(&self.uri, |facts| &facts.uri);
        let path = uri.path_and_query().map_or("-", |path| path.as_str());
        // What the client's target says counts for more than its `Host`, as it does for routing; the edge takes it out of
        // an HTTP/1 target.
        let authority = match (self.uri.authority(), &self.host) {
            (Some(authority), _) => Some(authority.as_str().as_bytes()),
            (None, Some(host)) => Some(host.as_bytes()),
            (None, None) => None,
        };
        let forwarded_for = facts.as_ref().map_or(&self.forwarded_for, |facts| &facts.forwarded_for);
        let request_id = facts.as_ref().map_or(&self.request_id, |facts| &facts.request_id);
        let upstream = cx.upstream();
        let conn = cx.conn();

        write!(out, "[{}] \"{} ", humantime::format_rfc3339_millis(self.started), self.method)?;
        escape(out, path.as_bytes())?;
        write!(out, " {}\" {} {} ", protocol(self.version), self.status, cx.flags())?;
        match cx.details() {
            Some(details) => escape_words(out, details.as_bytes())?,
            None => out.push('-'),
        }
        out.push_str(" - ");
        quoted(out, cx.transport_failure().as_deref().map(str::as_bytes))?;
        write!(out, " {} {} {} ", cx.request_bytes(), cx.response_bytes(), duration.as_millis())?;
        escape_words(out, self.service_time.as_ref().map_or(b"-", HeaderValue::as_bytes))?;
        for value in [
            forwarded_for.as_ref().map(HeaderValue::as_bytes),
            self.user_agent.as_ref().map(HeaderValue::as_bytes),
            request_id.as_ref().map(HeaderValue::as_bytes),
            authority,
        ] {
            out.push(' ');
            quoted(out, value)?;
        }
        write!(out, " \"{}\" ", Dash(upstream.as_ref().and_then(|upstream| upstream.endpoint)))?;
        write!(out, "{} ", Dash(upstream.as_ref().map(|upstream| &*upstream.cluster)))?;
        write!(out, "{} ", Dash(upstream.as_ref().and_then(|upstream| upstream.local)))?;
        write!(out, "{} {} - ", conn.local, conn.peer)?;
        cx.with_route_name(|name| match name {
            Some(name) if !name.is_empty() => escape_words(out, name.as_bytes()),
            _ => out.write_char('-'),
        })?;
        out.push('\n');
        Ok(())
    }
}

pub(super) struct Dash<T>(pub(super) Option<T>);

impl<T: Display> Display for Dash<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("-"),
        }
    }
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_11 => "HTTP/1.1",
        Version::HTTP_2 => "HTTP/2",
        _ => "-",
    }
}

pub(super) fn quoted(out: &mut String, value: Option<&[u8]>) -> fmt::Result {
    out.push('"');
    escape(out, value.filter(|value| !value.is_empty()).unwrap_or(b"-"))?;
    out.push('"');
    Ok(())
}

/// What a client wrote must not end the field or the line, nor reach a terminal as a control sequence.
fn escape(out: &mut String, value: &[u8]) -> fmt::Result {
    for byte in value {
        match byte {
            b'"' | b'\\' => write!(out, "\\{}", char::from(*byte))?,
            b' '..=b'~' => out.push(char::from(*byte)),
            _ => write!(out, "\\x{byte:02x}")?,
        }
    }
    Ok(())
}

/// An unquoted field must not hold a space either; Envoy writes `_` there.
pub(super) fn escape_words(out: &mut String, value: &[u8]) -> fmt::Result {
    for byte in value {
        match byte {
            b' ' => out.push('_'),
            _ => escape(out, &[*byte])?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_cannot_forge_a_line() {
        let mut out = String::new();
        quoted(&mut out, Some(b"a\" 200\n[2024] \x1b[31m\\\xff")).unwrap();
        assert_eq!(out, r#""a\" 200\x0a[2024] \x1b[31m\\\xff""#);
        let mut out = String::new();
        escape_words(&mut out, b"two words").unwrap();
        assert_eq!(out, "two_words");
    }
}
