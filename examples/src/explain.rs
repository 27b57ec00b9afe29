//! `/explain`: what would become of a request, in JSON.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use http::{HeaderName, HeaderValue, Method, Request, Uri};
use std::sync::Arc;

use mesh_core::attributes::{Attribute, Attributes, Value as AttributeValue};
use mesh_core::config::Workload;
use mesh_core::forwarded;
use mesh_core::sanitize::{self, Underscores};
use mesh_core::{ConnInfo, Direction, EdgeSettings, RequestContext};
use mesh_route::{RequestView, RouteTable, explain};
use serde_json::{Value, json};

/// The parameters of a question.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) direction: Option<Direction>,
    request: Request<()>,
    pub(crate) port: Option<u16>,
    source_ip: Option<IpAddr>,
}

/// The parameters that are known. What only policies read is taken too; routing does not look at it.
const KNOWN: [&str; 9] =
    ["direction", "method", "url", "header", "port", "source_ip", "principal", "namespace", "jwt"];

impl Question {
    /// Parses a query string.
    ///
    /// # Errors
    /// What is wrong with it, naming the parameter.
    pub(crate) fn parse(query: &str) -> Result<Self, String> {
        let mut direction = None;
        let mut method = Method::GET;
        let mut url = None;
        let mut headers = Vec::new();
        let mut port = None;
        let mut source_ip = None;
        let mut given = Vec::new();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            if name != "header" && given.contains(&name) {
                return Err(format!("{name}: is given more than once; only header may be"));
            }
            match &*name {
                "direction" => {
                    direction = Some(match &*value {
                        "outbound" => Direction::Outbound,
                        "inbound" => Direction::Inbound,
                        _ => return Err(format!("direction: expected outbound or inbound, not {value:?}")),
                    });
                }
                "method" => {
                    method = Method::from_bytes(value.as_bytes())
                        .map_err(|_| format!("method: {value:?} is no method"))?;
                }
                "url" => {
                    url = Some(value.parse::<Uri>().map_err(|error| format!("url: {value:?}: {error}"))?);
                }
                "header" => {
                    let (name, value) = value
                        .split_once(':')
                        .ok_or_else(|| format!("header: expected NAME:VALUE, not {value:?}"))?;
                    let name = HeaderName::try_from(name.trim())
                        .map_err(|_| format!("header: {name:?} is no header name"))?;
                    let value = HeaderValue::try_from(value.trim())
                        .map_err(|_| format!("header: {value:?} is no header value"))?;
                    headers.push((name, value));
                }
                "port" => {
                    port = Some(value.parse().map_err(|_| format!("port: {value:?} is no port"))?);
                }
                "source_ip" => {
                    source_ip =
                        Some(value.parse().map_err(|_| format!("source_ip: {value:?} is no IP address"))?);
                }
                "principal" | "namespace" | "jwt" => {}
                other => {
                    return Err(format!("{other}: unknown parameter; known are {}", KNOWN.join(", ")));
                }
            }
            given.push(name);
        }
        let url = url.ok_or("url: is missing; for example url=http://reviews/")?;
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = url;
        for (name, value) in headers {
            request.headers_mut().append(name, value);
        }
        Ok(Self { direction, request, port, source_ip })
    }

    /// The answer of a table, for the request as the edge makes it.
    pub(crate) fn answer(
        self,
        table: &RouteTable,
        direction: Direction,
        edge: EdgeSettings,
        workload: &Workload,
        seed: u64,
    ) -> Value {
        let mut conn = ConnInfo::unknown(direction);
        if let Some(ip) = self.source_ip {
            conn.peer = SocketAddr::new(ip, 0);
        }
        let port = self.port.or_else(|| match direction {
            Direction::Gateway => table.ports().first().copied(),
            _ => None,
        });
        if let Some(port) = port {
            conn.port = port;
            // A port asks what a redirected connection to it would get.
            conn.original_dst =
                (direction == Direction::Outbound).then(|| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
        }
        let underscores = match direction {
            Direction::Gateway => Underscores::Reject,
            Direction::Inbound => Underscores::Drop,
            Direction::Outbound => Underscores::Keep,
        };
        let (mut parts, ()) = self.request.into_parts();
        if let Err(refused) = sanitize::request(&mut parts, edge.normalization, underscores) {
            let decision = json!({
                "status": refused.status.as_u16(),
                "details": refused.details,
                "reason": refused.reason,
            });
            return json!({ "decision": decision });
        }
        // As the edge does; the id of a request is the only thing that is made up.
        let id = || HeaderValue::from_static("00000000-0000-4000-8000-000000000000");
        forwarded::apply(&mut parts.headers, &conn, edge.trusted_proxies, id);
        let view = RequestView::from_parts(&parts, &conn);
        let mut answer = explain(table, &view, &conn, seed).to_json();
        if let Some(answer) = answer.as_object_mut() {
            answer.insert(
                "request".to_owned(),
                json!({
                    "direction": direction.as_str(),
                    "method": view.method,
                    "authority": view.authority,
                    "path": view.path,
                    "query": view.query,
                }),
            );
            let context = RequestContext::new(Arc::new(conn), None, mesh_core::clock::now());
            let request = Request::from_parts(parts.clone(), ());
            let known = Attributes::new(&context).with_workload(workload).with_request(&request);
            answer.insert("attributes".to_owned(), attributes(&known));
        }
        answer
    }
}

/// What policies and telemetry would read of the request before it is sent anywhere, but for maps.
fn attributes(known: &Attributes<'_>) -> Value {
    let values = Attribute::ALL.iter().filter_map(|attribute| {
        let value = match known.get(*attribute)? {
            AttributeValue::Bool(value) => json!(value),
            AttributeValue::Int(value) => json!(value),
            AttributeValue::String(value) => json!(value),
            AttributeValue::Ip(value) => json!(value),
            _ => return None,
        };
        Some((attribute.name().to_owned(), value))
    });
    Value::Object(values.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_parameter_is_named() {
        let error = Question::parse("url=http://a/&colour=red").unwrap_err();
        assert!(error.starts_with("colour: unknown parameter"), "{error}");
        assert!(Question::parse("method=GET").unwrap_err().starts_with("url: is missing"));
        assert!(Question::parse("url=http://a/&port=x").unwrap_err().starts_with("port:"));
        assert!(Question::parse("url=http://a/&header=x").unwrap_err().starts_with("header:"));
        assert!(Question::parse("url=http://a/&url=http://b/").unwrap_err().starts_with("url: is given"));
        let whole = "url=http://a/b%3Fc&direction=inbound&method=POST&header=X-A:1&header=X-A:2&port=80&source_ip=10.0.0.1&principal=p&namespace=n&jwt=j";
        assert!(Question::parse(whole).is_ok());
    }
}
