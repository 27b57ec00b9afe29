//! A compared request with the answer of the primary, as a line of a file.
//!
//! Whoever may read the admin port may read these, so nothing is captured unless the policy asks for it
//! ([`DiffPolicy::capture`](super::DiffPolicy::capture)), and of the headers of a request only those are kept that
//! stand on a list: what an answer usually depends on, and what the policy names.
//!
//! One JSON object a line:
//!
//! | field | what |
//! |---|---|
//! | `route`, `mirror` | the names of the route and of the mirror's cluster |
//! | `method`, `authority`, `path` | the request, its path with the query |
//! | `headers` | its headers, pairs in order: `accept`, `accept-encoding`, `accept-language`, `content-type`, `traceparent`, `user-agent`, `x-request-id` and those that are compared; never `authorization`, `proxy-authorization`, `cookie` or `set-cookie` |
//! | `body` or `body_base64` | its body, as text where it is UTF-8; absent when it has none |
//! | `compare` | the headers of answers that are compared, without those that are never kept |
//! | `response` | what the primary answered: `status`, `headers` (those that are compared), `body` or `body_base64` |
//!
//! A request of which a body was longer than what is kept is left out: it could not be asked again as it was.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, ACCEPT_LANGUAGE, AUTHORIZATION, CONTENT_TYPE, COOKIE, PROXY_AUTHORIZATION,
    SET_COOKIE, USER_AGENT,
};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use mesh_core::mirrored::MARK;
use serde_json::{Map, Value, json};

use super::compare::Answer;

/// A request that was compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// The name of the route.
    pub route: String,
    /// The name of the mirror's cluster.
    pub mirror: String,
    /// Its method.
    pub method: Method,
    /// Its authority.
    pub authority: String,
    /// Its path with the query.
    pub path: PathAndQuery,
    /// Those of its headers that are kept.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
    /// The headers of answers that are compared.
    pub compare: Vec<HeaderName>,
    /// What the primary answered.
    pub response: Answer,
}

/// A line that is no captured request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidCapture(String);

/// The headers of a request that are kept, besides those that are compared.
const KEPT: [HeaderName; 7] = [
    ACCEPT,
    ACCEPT_ENCODING,
    ACCEPT_LANGUAGE,
    CONTENT_TYPE,
    USER_AGENT,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("x-request-id"),
];

/// The headers whose values are shown to nobody.
const SECRET: [HeaderName; 4] = [AUTHORIZATION, PROXY_AUTHORIZATION, COOKIE, SET_COOKIE];

/// Whether the values of a header are shown to nobody.
pub(super) fn is_secret(name: &HeaderName) -> bool {
    SECRET.contains(name)
}

/// What may be written down of the headers of a request.
pub(super) fn kept(headers: &HeaderMap, compared: &[HeaderName]) -> HeaderMap {
    let is_kept = |name: &HeaderName| {
        (KEPT.contains(name) || compared.contains(name)) && !is_secret(name) && *name != MARK
    };
    let mut kept = HeaderMap::new();
    for (name, value) in headers.iter().filter(|(name, _)| is_kept(name)) {
        kept.append(name.clone(), value.clone());
    }
    kept
}

impl Captured {
    /// Takes out what was compared, but may not be kept.
    pub(super) fn without_secrets(mut self) -> Self {
        for name in SECRET {
            self.response.headers.remove(name);
        }
        self
    }

    /// The line, without its end.
    #[must_use]
    pub fn to_line(&self) -> String {
        let mut line = json!({
            "route": self.route,
            "mirror": self.mirror,
            "method": self.method.as_str(),
            "authority": self.authority,
            "path": self.path.as_str(),
            "headers": pairs(&self.headers),
            "compare": self.compare.iter().map(HeaderName::as_str).collect::<Vec<_>>(),
        });
        put_body(&mut line, &self.body);
        let mut response =
            json!({"status": self.response.status.as_u16(), "headers": pairs(&self.response.headers)});
        put_body(&mut response, &self.response.body);
        line["response"] = response;
        line.to_string()
    }

    /// Reads a line.
    ///
    /// # Errors
    /// When it is not JSON, or a field is missing or no such thing.
    pub fn parse(line: &str) -> Result<Self, InvalidCapture> {
        let value: Value = serde_json::from_str(line).map_err(|error| InvalidCapture(error.to_string()))?;
        let Value::Object(fields) = value else { return Err(InvalidCapture("no JSON object".to_owned())) };
        let Some(Value::Object(response)) = fields.get("response") else { return Err(wrong("response")) };
        let status =
            response.get("status").and_then(Value::as_u64).and_then(|status| u16::try_from(status).ok());
        let compare = match fields.get("compare") {
            None => Vec::new(),
            Some(Value::Array(names)) => names
                .iter()
                .map(|name| name.as_str().and_then(|name| HeaderName::try_from(name).ok()))
                .collect::<Option<_>>()
                .ok_or_else(|| wrong("compare"))?,
            Some(_) => return Err(wrong("compare")),
        };
        let or_empty = |field: &str| text(&fields, field).unwrap_or_default().to_owned();
        Ok(Self {
            route: or_empty("route"),
            mirror: or_empty("mirror"),
            method: text(&fields, "method")
                .and_then(|method| Method::from_bytes(method.as_bytes()).ok())
                .ok_or_else(|| wrong("method"))?,
            authority: text(&fields, "authority").ok_or_else(|| wrong("authority"))?.to_owned(),
            path: text(&fields, "path").and_then(|path| path.parse().ok()).ok_or_else(|| wrong("path"))?,
            headers: headers(&fields)?,
            body: body(&fields)?,
            compare,
            response: Answer {
                status: status
                    .and_then(|status| StatusCode::from_u16(status).ok())
                    .ok_or_else(|| wrong("response.status"))?,
                headers: headers(response)?,
                body: body(response)?,
                cut: false,
            },
        })
    }

    /// What it takes of memory, about: its bodies, headers and names.
    pub(super) fn bytes(&self) -> usize {
        let headers = |headers: &HeaderMap| {
            headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>()
        };
        let names = self.route.len() + self.mirror.len() + self.authority.len() + self.path.as_str().len();
        names
            + self.body.len()
            + self.response.body.len()
            + headers(&self.headers)
            + headers(&self.response.headers)
    }
}

fn wrong(field: &str) -> InvalidCapture {
    InvalidCapture(format!("{field} is missing, or no such thing"))
}

fn text<'f>(fields: &'f Map<String, Value>, name: &str) -> Option<&'f str> {
    fields.get(name)?.as_str()
}

fn pairs(headers: &HeaderMap) -> Value {
    headers
        .iter()
        .map(|(name, value)| json!([name.as_str(), String::from_utf8_lossy(value.as_bytes())]))
        .collect()
}

fn headers(fields: &Map<String, Value>) -> Result<HeaderMap, InvalidCapture> {
    let Some(Value::Array(pairs)) = fields.get("headers") else { return Err(wrong("headers")) };
    let mut headers = HeaderMap::new();
    for pair in pairs {
        let name = pair.get(0).and_then(Value::as_str).and_then(|name| HeaderName::try_from(name).ok());
        let value = pair.get(1).and_then(Value::as_str).and_then(|value| HeaderValue::try_from(value).ok());
        let (name, value) = name.zip(value).ok_or_else(|| wrong("headers"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

fn put_body(object: &mut Value, body: &Bytes) {
    match std::str::from_utf8(body) {
        Ok("") => {}
        Ok(text) => object["body"] = text.into(),
        Err(_) => object["body_base64"] = STANDARD.encode(body).into(),
    }
}

fn body(fields: &Map<String, Value>) -> Result<Bytes, InvalidCapture> {
    match (fields.get("body"), fields.get("body_base64")) {
        (None, None) => Ok(Bytes::new()),
        (Some(Value::String(text)), None) => Ok(Bytes::from(text.clone())),
        (None, Some(Value::String(encoded))) => {
            STANDARD.decode(encoded).map(Bytes::from).map_err(|_| wrong("body_base64"))
        }
        _ => Err(wrong("body")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captured(body: &'static [u8]) -> Captured {
        let headers = HeaderMap::from_iter([
            (HeaderName::from_static("accept"), HeaderValue::from_static("a/b")),
            (HeaderName::from_static("accept"), HeaderValue::from_static("c/d")),
        ]);
        Captured {
            route: "default/reviews.0".to_owned(),
            mirror: "outbound|80||a".to_owned(),
            method: Method::PUT,
            authority: "reviews".to_owned(),
            path: PathAndQuery::from_static("/a?b=c"),
            headers,
            body: Bytes::from_static(body),
            compare: vec![HeaderName::from_static("etag")],
            response: Answer {
                status: StatusCode::CREATED,
                headers: HeaderMap::from_iter([(
                    HeaderName::from_static("etag"),
                    HeaderValue::from_static("1"),
                )]),
                body: Bytes::from_static(b"{\"id\":\n1}"),
                cut: false,
            },
        }
    }

    #[test]
    fn vs_p05_a_line_holds_what_was_captured() {
        for body in [&b""[..], b"hello", b"\xff\x00"] {
            let captured = captured(body);
            let line = captured.to_line();
            assert!(!line.contains('\n'), "{line}");
            assert_eq!(Captured::parse(&line), Ok(captured), "{line}");
        }
    }

    #[test]
    fn vs_p05_a_line_that_is_none_says_why() {
        let line = captured(b"").to_line();
        for (line, reason) in [
            ("", "EOF"),
            ("[]", "no JSON object"),
            (line.replace("\"PUT\"", "1").as_str(), "method"),
            (line.replace("/a?b=c", " ").as_str(), "path"),
            (line.replace("201", "99").as_str(), "response.status"),
            (line.replace("\"accept\"", "\"a b\"").as_str(), "headers"),
            (line.replace("\"etag\"]", "1]").as_str(), "compare"),
            (line.replace("\"authority\"", "\"authorty\"").as_str(), "authority"),
            (line.replace("\"body\"", "\"body_base64\"").as_str(), "body_base64"),
        ] {
            let said = Captured::parse(line).unwrap_err().to_string();
            assert!(said.contains(reason), "{line}: {said}");
        }
    }

    #[test]
    fn bug_only_some_credentials_were_left_out() {
        let mut headers = HeaderMap::new();
        for name in [
            "authorization",
            "cookie",
            "proxy-authorization",
            "set-cookie",
            "x-api-key",
            "x-mesh-mirrored",
            "accept",
            "traceparent",
            "x-user",
            "host",
        ] {
            headers.insert(name, HeaderValue::from_static("a"));
        }
        headers.append("accept", HeaderValue::from_static("b"));
        let compared = ["x-user", "cookie", "set-cookie", "x-mesh-mirrored"].map(HeaderName::from_static);
        let kept = kept(&headers, &compared);
        let mut names: Vec<_> = kept.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept", "traceparent", "x-user"]);
        assert_eq!(kept.get_all("accept").iter().count(), 2);
    }
}
