//! What is known of a request, by the names that policies, expressions and telemetry ask for (X-11).
//!
//! Access rules, Mixer's expressions, access logs and metrics all speak of `source.ip` or `request.headers`. They must
//! mean the same by it, so there is one vocabulary, [`Attribute`], and one place that reads it, [`Attributes`]: from the
//! request as the edge made it, never from what the client sent, and from its context and connection.
//!
//! An attribute that is not known is absent, which is not the same as empty: an expression fails on it, a condition
//! does not hold. What this version never knows (identities, claims, what a platform would add) is absent always.
//!
//! Reading is lazy and borrows. Only what is put together allocates: a header that is repeated, a query parameter that
//! is escaped, the names that stand behind the context's lock.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use http::header::{HOST, REFERER, USER_AGENT};
use http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode, Uri};

use crate::config::Workload;
use crate::conn::Direction;
use crate::context::RequestContext;
use crate::matcher::{first_value, joined};
use crate::upstream::ClusterName;

mod vocabulary;

pub use vocabulary::{Attribute, AttributeType, UnknownAttribute};

/// A value of an attribute that is no map.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Value<'a> {
    /// Yes or no.
    Bool(bool),
    /// A number.
    Int(i64),
    /// Text.
    String(Cow<'a, str>),
    /// An address.
    Ip(IpAddr),
    /// A point in time.
    Timestamp(SystemTime),
    /// A length of time.
    Duration(Duration),
}

/// The attributes of one request, as far as they are known when they are read.
///
/// ```
/// use http::Request;
/// use mesh_core::attributes::{Attribute, Attributes, Value};
/// use mesh_core::{Direction, RequestContext};
///
/// let mut request = Request::get("http://reviews/a?user=jason").body(()).unwrap();
/// let context = RequestContext::ensure(request.extensions_mut(), Direction::Outbound);
/// let attributes = Attributes::new(&context).with_request(&request);
/// assert_eq!(attributes.get(Attribute::RequestUrlPath), Some(Value::String("/a".into())));
/// assert_eq!(attributes.entry(Attribute::RequestQueryParams, "user").as_deref(), Some("jason"));
/// assert_eq!(attributes.get(Attribute::ResponseCode), None, "there is no response yet");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a> {
    context: &'a RequestContext,
    workload: Option<&'a Workload>,
    request: Option<RequestHead<'a>>,
    response: Option<(StatusCode, &'a HeaderMap)>,
    received: Option<SystemTime>,
    duration: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct RequestHead<'a> {
    method: &'a Method,
    uri: &'a Uri,
    headers: &'a HeaderMap,
}

impl<'a> Attributes<'a> {
    /// What the context knows: the connection, the upstream, counts and flags.
    #[must_use]
    pub const fn new(context: &'a RequestContext) -> Self {
        Self { context, workload: None, request: None, response: None, received: None, duration: None }
    }

    /// With the workload that this process stands beside: the source of what goes out, the destination of what comes in.
    #[must_use]
    pub const fn with_workload(mut self, workload: &'a Workload) -> Self {
        self.workload = Some(workload);
        self
    }

    /// With the head of the request, as the edge made it.
    #[must_use]
    pub fn with_request<B>(mut self, request: &'a Request<B>) -> Self {
        self.request =
            Some(RequestHead { method: request.method(), uri: request.uri(), headers: request.headers() });
        self
    }

    /// With the head of the response.
    #[must_use]
    pub fn with_response<B>(mut self, response: &'a Response<B>) -> Self {
        self.response = Some((response.status(), response.headers()));
        self
    }

    /// With the moment at which the request was received, by the calendar.
    #[must_use]
    pub const fn with_received(mut self, received: SystemTime) -> Self {
        self.received = Some(received);
        self
    }

    /// With the time that the request took, from its head to the end of its response.
    #[must_use]
    pub const fn with_duration(mut self, duration: Duration) -> Self {
        self.duration = Some(duration);
        self
    }

    /// The value of an attribute; `None` when it is not known, and for maps.
    #[must_use]
    pub fn get(&self, attribute: Attribute) -> Option<Value<'a>> {
        use Attribute as A;
        let conn = self.context.conn();
        match attribute {
            A::SourceIp | A::OriginIp => known(conn.peer).map(|peer| Value::Ip(peer.ip())),
            A::SourceNamespace | A::SourceWorkloadNamespace => text(&self.source()?.namespace),
            A::SourceWorkloadName => text(&self.source()?.name),
            A::SourceServiceAccount => text(&self.source()?.service_account),
            A::DestinationIp => Some(Value::Ip(self.destination_address()?.ip())),
            A::DestinationPort => Some(Value::Int(self.destination_port()?.into())),
            A::DestinationNamespace | A::DestinationWorkloadNamespace => text(&self.destination()?.namespace),
            A::DestinationWorkloadName => text(&self.destination()?.name),
            A::DestinationServiceAccount => text(&self.destination()?.service_account),
            A::DestinationServiceHost => self.service().map(|host| Value::String(host.into())),
            A::DestinationServiceName => self.service_part(0),
            A::DestinationServiceNamespace => self.service_part(1),
            // With TLS it depends on the client's certificate, of which nothing is known here.
            A::ConnectionMtls => (!conn.tls).then_some(Value::Bool(false)),
            A::ContextProtocol => Some(Value::String(self.protocol().into())),
            A::ContextProxyErrorCode => Some(Value::String(self.context.flags().to_string().into())),
            A::ContextReporterKind => Some(Value::String(
                match conn.direction {
                    Direction::Inbound => "inbound",
                    Direction::Outbound | Direction::Gateway => "outbound",
                }
                .into(),
            )),
            A::RequestMethod => text(self.request?.method.as_str()),
            A::RequestPath => text(self.request?.uri.path_and_query().map_or("/", |path| path.as_str())),
            A::RequestUrlPath => text(self.request?.uri.path()),
            A::RequestScheme => {
                text(self.request?.uri.scheme_str().unwrap_or(if conn.tls { "https" } else { "http" }))
            }
            A::RequestHost => match self.request?.uri.authority() {
                Some(authority) => text(authority.as_str()),
                None => self.request_header(&HOST),
            },
            A::RequestId => self.request_header(&HeaderName::from_static("x-request-id")),
            A::RequestReferer => self.request_header(&REFERER),
            A::RequestUseragent => self.request_header(&USER_AGENT),
            A::RequestSize => Some(count(self.context.request_bytes())),
            A::RequestTime => self.received.map(Value::Timestamp),
            A::ResponseCode => Some(Value::Int(self.response?.0.as_u16().into())),
            A::ResponseSize => self.response.map(|_| count(self.context.response_bytes())),
            A::ResponseDuration => self.duration.map(Value::Duration),
            A::ResponseTime => Some(Value::Timestamp(self.received?.checked_add(self.duration?)?)),
            A::ResponseGrpcStatus => self.response_header("grpc-status"),
            A::ResponseGrpcMessage => self.response_header("grpc-message"),
            _ => None,
        }
    }

    /// An entry of an attribute that is a map; `None` when it has none of this key, and for what is no map.
    ///
    /// Of a header that is repeated all values count, joined with `,`. Of a query parameter the first one does.
    #[must_use]
    pub fn entry(&self, attribute: Attribute, key: &str) -> Option<Cow<'a, str>> {
        let header = |headers| joined(headers, &HeaderName::try_from(key).ok()?);
        let label = |workload: &'a Workload| workload.labels.get(key).map(|value| Cow::from(value.as_str()));
        match attribute {
            Attribute::RequestHeaders => header(self.request?.headers),
            Attribute::ResponseHeaders => header(self.response?.1),
            Attribute::RequestQueryParams => first_value(self.request?.uri.query()?, key),
            Attribute::SourceLabels => label(self.source()?),
            Attribute::DestinationLabels => label(self.destination()?),
            _ => None,
        }
    }

    fn source(&self) -> Option<&'a Workload> {
        self.workload.filter(|_| self.context.conn().direction != Direction::Inbound)
    }

    fn destination(&self) -> Option<&'a Workload> {
        self.workload.filter(|_| self.context.conn().direction == Direction::Inbound)
    }

    /// Where what comes in was going, and where what goes out went.
    fn destination_address(&self) -> Option<SocketAddr> {
        let conn = self.context.conn();
        match conn.direction {
            Direction::Inbound => known(conn.original_dst.unwrap_or(conn.local)),
            Direction::Outbound | Direction::Gateway => self.context.upstream()?.endpoint,
        }
    }

    /// The port of the workload: the application's for what comes in.
    fn destination_port(&self) -> Option<u16> {
        let conn = self.context.conn();
        match conn.direction {
            Direction::Inbound => Some(conn.port).filter(|port| *port != 0),
            Direction::Outbound | Direction::Gateway => Some(self.destination_address()?.port()),
        }
    }

    /// The host of the service that the request was sent to.
    fn service(&self) -> Option<String> {
        let cluster = ClusterName::custom(self.context.upstream()?.cluster);
        cluster.host().filter(|host| !host.is_empty()).map(str::to_owned)
    }

    /// The name or the namespace of a service of the platform: `name.namespace.svc.…`.
    fn service_part(&self, part: usize) -> Option<Value<'a>> {
        let host = self.service()?;
        let mut labels = host.split('.');
        let found = labels.clone().nth(part)?;
        (labels.nth(2) == Some("svc")).then(|| Value::String(found.to_owned().into()))
    }

    fn protocol(&self) -> &'static str {
        match self.request {
            None => "tcp",
            Some(_) if self.context.is_grpc() => "grpc",
            Some(_) => "http",
        }
    }

    fn request_header(&self, name: &HeaderName) -> Option<Value<'a>> {
        joined(self.request?.headers, name).map(Value::String)
    }

    fn response_header(&self, name: &'static str) -> Option<Value<'a>> {
        joined(self.response?.1, &HeaderName::from_static(name)).map(Value::String)
    }
}

/// An address that says something: an embedded layer may not know its connection.
fn known(address: SocketAddr) -> Option<SocketAddr> {
    (address.port() != 0 || !address.ip().is_unspecified()).then_some(address)
}

fn text(value: &str) -> Option<Value<'_>> {
    (!value.is_empty()).then(|| Value::String(value.into()))
}

fn count(bytes: u64) -> Value<'static> {
    Value::Int(i64::try_from(bytes).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::conn::ConnInfo;
    use crate::context::UpstreamInfo;

    fn context(direction: Direction) -> RequestContext {
        let conn = ConnInfo {
            peer: "10.1.0.7:40000".parse().unwrap(),
            local: "10.1.0.8:15006".parse().unwrap(),
            port: 8080,
            ..ConnInfo::unknown(direction)
        };
        RequestContext::new(Arc::new(conn), None, crate::clock::now())
    }

    fn workload() -> Workload {
        Workload {
            name: "reviews-v1".to_owned(),
            namespace: "shop".to_owned(),
            labels: [("version".to_owned(), "v1".to_owned())].into(),
            ..Workload::default()
        }
    }

    fn request() -> Request<()> {
        Request::post("/a%20b?x=1&x=2&e=%2Fy&bare")
            .header("host", "reviews:9080")
            .header("x-request-id", "id-1")
            .header("user-agent", "curl")
            .header("role", "user")
            .header("role", "admin")
            .header("empty", "")
            .body(())
            .unwrap()
    }

    fn shown(attributes: &Attributes<'_>, name: &str) -> Option<String> {
        attributes.get(name.parse().unwrap()).map(|value| match value {
            Value::Bool(value) => value.to_string(),
            Value::Int(value) => value.to_string(),
            Value::String(value) => value.into_owned(),
            Value::Ip(value) => value.to_string(),
            Value::Timestamp(value) => format!("{:?}", value.duration_since(SystemTime::UNIX_EPOCH).unwrap()),
            Value::Duration(value) => format!("{value:?}"),
        })
    }

    #[test]
    fn x_11_what_comes_in_is_from_the_peer_and_to_the_workload() {
        let (context, workload, request) = (context(Direction::Inbound), workload(), request());
        let it = Attributes::new(&context).with_workload(&workload).with_request(&request);
        for (name, expected) in [
            ("source.ip", "10.1.0.7"),
            ("destination.ip", "10.1.0.8"),
            ("destination.port", "8080"),
            ("destination.workload.name", "reviews-v1"),
            ("destination.workload.namespace", "shop"),
            ("destination.namespace", "shop"),
            ("destination.serviceAccount", "default"),
            ("connection.mtls", "false"),
            ("context.protocol", "http"),
            ("context.reporter.kind", "inbound"),
            ("context.proxy_error_code", "-"),
            ("request.method", "POST"),
            ("request.path", "/a%20b?x=1&x=2&e=%2Fy&bare"),
            ("request.url_path", "/a%20b"),
            ("request.host", "reviews:9080"),
            ("request.scheme", "http"),
            ("request.id", "id-1"),
            ("request.useragent", "curl"),
            ("request.size", "0"),
        ] {
            assert_eq!(shown(&it, name).as_deref(), Some(expected), "{name}");
        }
        assert_eq!(it.entry(Attribute::DestinationLabels, "version").as_deref(), Some("v1"));
        assert_eq!(it.entry(Attribute::SourceLabels, "version"), None, "the peer is not known by its labels");
        assert_eq!(shown(&it, "source.namespace"), None);
    }

    #[test]
    fn x_11_what_goes_out_is_from_the_workload_and_to_the_endpoint() {
        let (context, workload, request) = (context(Direction::Outbound), workload(), request());
        let it = Attributes::new(&context).with_workload(&workload).with_request(&request);
        assert_eq!(shown(&it, "source.workload.name").as_deref(), Some("reviews-v1"));
        assert_eq!(it.entry(Attribute::SourceLabels, "version").as_deref(), Some("v1"));
        assert_eq!((shown(&it, "destination.ip"), shown(&it, "destination.service.host")), (None, None));
        let mut upstream = UpstreamInfo::new("outbound|9080|v1|ratings.shop.svc.cluster.local".into());
        upstream.endpoint = Some("10.1.0.9:8081".parse().unwrap());
        context.set_upstream(upstream);
        context.set_grpc(true);
        context.add_flags(crate::ResponseFlags::UPSTREAM_REQUEST_TIMEOUT);
        for (name, expected) in [
            ("destination.ip", "10.1.0.9"),
            ("destination.port", "8081"),
            ("destination.service.host", "ratings.shop.svc.cluster.local"),
            ("destination.service.name", "ratings"),
            ("destination.service.namespace", "shop"),
            ("context.reporter.kind", "outbound"),
            ("context.protocol", "grpc"),
            ("context.proxy_error_code", "UT"),
        ] {
            assert_eq!(shown(&it, name).as_deref(), Some(expected), "{name}");
        }
        context.set_upstream(UpstreamInfo::new("outbound|80||api.example.com".into()));
        assert_eq!(shown(&it, "destination.service.host").as_deref(), Some("api.example.com"));
        assert_eq!(shown(&it, "destination.service.name"), None, "no service of the platform");
    }

    #[test]
    fn x_11_maps_are_read_by_key() {
        let (context, request) = (context(Direction::Inbound), request());
        let it = Attributes::new(&context).with_request(&request);
        let header = |name| it.entry(Attribute::RequestHeaders, name);
        assert_eq!(header("role").as_deref(), Some("user,admin"), "a second value does not pass unseen");
        assert_eq!(header("ROLE").as_deref(), Some("user,admin"));
        assert_eq!((header("empty").as_deref(), header("absent")), (Some(""), None));
        assert_eq!(header("no header"), None);
        let parameter = |name| it.entry(Attribute::RequestQueryParams, name);
        assert_eq!(parameter("x").as_deref(), Some("1"));
        assert_eq!(parameter("bare").as_deref(), Some(""));
        assert_eq!(parameter("absent"), None);
        assert_eq!(it.get(Attribute::RequestHeaders), None, "a map has no value");
        assert_eq!(it.entry(Attribute::RequestMethod, "GET"), None, "and what is no map has no entries");
    }

    #[test]
    fn x_11_what_is_not_known_is_absent() {
        let unknown =
            RequestContext::new(Arc::new(ConnInfo::unknown(Direction::Inbound)), None, crate::clock::now());
        let it = Attributes::new(&unknown);
        let known: Vec<_> =
            Attribute::ALL.iter().filter(|name| it.get(**name).is_some()).map(|name| name.name()).collect();
        let of_the_context = [
            "request.size",
            "connection.mtls",
            "context.protocol",
            "context.proxy_error_code",
            "context.reporter.kind",
        ];
        assert_eq!(known, of_the_context);
        assert_eq!(shown(&it, "context.protocol").as_deref(), Some("tcp"));
    }

    #[test]
    fn x_11_a_response_brings_its_own() {
        let (context, request) = (context(Direction::Inbound), request());
        let response =
            Response::builder().status(418).header("grpc-status", "7").header("a", "b").body(()).unwrap();
        let it = Attributes::new(&context)
            .with_request(&request)
            .with_response(&response)
            .with_received(SystemTime::UNIX_EPOCH + Duration::from_secs(5))
            .with_duration(Duration::from_millis(1500));
        for (name, expected) in [
            ("response.code", "418"),
            ("response.size", "0"),
            ("response.duration", "1.5s"),
            ("response.time", "6.5s"),
            ("request.time", "5s"),
            ("response.grpc_status", "7"),
        ] {
            assert_eq!(shown(&it, name).as_deref(), Some(expected), "{name}");
        }
        assert_eq!(it.entry(Attribute::ResponseHeaders, "a").as_deref(), Some("b"));
        // Every value is of the type that the vocabulary says.
        for attribute in Attribute::ALL {
            let kind = it.get(*attribute).map(|value| match value {
                Value::Bool(_) => AttributeType::Bool,
                Value::Int(_) => AttributeType::Int,
                Value::String(_) => AttributeType::String,
                Value::Ip(_) => AttributeType::Ip,
                Value::Timestamp(_) => AttributeType::Timestamp,
                Value::Duration(_) => AttributeType::Duration,
            });
            assert!(kind.is_none_or(|kind| kind == attribute.kind()), "{attribute}: {kind:?}");
        }
    }
}
