//! Cross-origin resource sharing (VS-C01, VS-C02): what a browser is told about scripts of other origins.
//!
//! The semantics are those of Envoy's filter, as Istio configures it: a preflight of an origin that is allowed is
//! answered here; any other request of such an origin passes, and its response, whoever made it, gets the headers that
//! let the script read it. They take the place of what the upstream says of the same. Like Envoy, the layer adds no
//! `vary`; a cache between it and the browser needs one that the upstream or a header operation adds.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use mesh_core::matcher::StringMatcher;
use mesh_core::{Error, RequestContext, ResponseFlags};
use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::route::{Route, policies};

/// Which origins may do what, with the values of the headers that say so.
#[derive(Clone, Debug)]
pub struct CorsPolicy {
    origins: Box<[StringMatcher]>,
    /// One of the matchers takes `*`, which Envoy takes for every origin.
    any_origin: bool,
    methods: Option<Listed>,
    headers: Option<Listed>,
    expose: Option<HeaderValue>,
    max_age: Option<HeaderValue>,
    credentials: bool,
    unmatched: UnmatchedPreflights,
}

/// A list that a preflight is told.
#[derive(Clone, Debug)]
enum Listed {
    /// `*`: whatever it asks for.
    Asked,
    These(HeaderValue),
}

/// What becomes of a preflight whose origin is not allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum UnmatchedPreflights {
    /// It passes. The default.
    #[default]
    Forward,
    /// It is answered here, without an origin that is allowed.
    Ignore,
}

/// Builds a [`CorsPolicy`].
#[derive(Clone, Debug, Default)]
pub struct CorsPolicyBuilder {
    origins: Vec<StringMatcher>,
    methods: Vec<String>,
    headers: Vec<String>,
    expose: Vec<String>,
    max_age: Option<Duration>,
    credentials: bool,
    unmatched: UnmatchedPreflights,
}

/// A policy that is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidCors {
    /// A list holds what no header can.
    #[error("{header}: {value:?} cannot stand in a header")]
    Value {
        /// The header of the list.
        header: HeaderName,
        /// The list.
        value: String,
    },
    /// The header counts whole seconds.
    #[error("a preflight is kept for whole seconds, not {0:?}")]
    MaxAge(Duration),
}

impl CorsPolicy {
    /// A policy that allows no origin yet.
    #[must_use]
    pub fn builder() -> CorsPolicyBuilder {
        CorsPolicyBuilder::default()
    }

    /// What becomes of a request.
    fn judge(&self, method: &Method, request: &HeaderMap) -> Verdict {
        let mut origins = request.get_all(ORIGIN).iter().filter(|origin| !origin.is_empty());
        let Some(origin) = origins.next() else { return Verdict::Pass };
        // Of several nobody knows which one the browser would compare.
        let allowed = origins.next().is_none() && self.allows(origin);
        let preflight = *method == Method::OPTIONS
            && request.get(ACCESS_CONTROL_REQUEST_METHOD).is_some_and(|value| !value.is_empty());
        match (preflight, allowed) {
            (false, false) => Verdict::Pass,
            (false, true) => Verdict::Allow(origin.clone()),
            (true, false) if self.unmatched == UnmatchedPreflights::Forward => Verdict::Pass,
            (true, _) => Verdict::Answer(self.answer(request, allowed.then_some(origin))),
        }
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        let allowed = |origin: &str| self.origins.iter().any(|allowed| allowed.matches(origin));
        self.any_origin || origin.to_str().is_ok_and(allowed)
    }

    /// The answer to a preflight.
    fn answer(&self, request: &HeaderMap, origin: Option<&HeaderValue>) -> Error {
        let mut reply = Error::local_reply(StatusCode::OK, ResponseFlags::NONE, "cors_response");
        let headers = reply.headers_mut();
        let mut list = |name, listed: &Option<Listed>, asked| {
            let value = match listed {
                Some(Listed::These(value)) => Some(value),
                Some(Listed::Asked) => request.get(asked),
                None => None,
            };
            if let Some(value) = value {
                headers.insert(name, value.clone());
            }
        };
        list(ACCESS_CONTROL_ALLOW_METHODS, &self.methods, ACCESS_CONTROL_REQUEST_METHOD);
        list(ACCESS_CONTROL_ALLOW_HEADERS, &self.headers, ACCESS_CONTROL_REQUEST_HEADERS);
        if let Some(age) = &self.max_age {
            headers.insert(ACCESS_CONTROL_MAX_AGE, age.clone());
        }
        match origin {
            Some(origin) => self.allow(origin, headers),
            None => self.allow_credentials(headers),
        }
        reply
    }

    /// What the response to a request of an allowed origin says.
    fn allow(&self, origin: &HeaderValue, response: &mut HeaderMap) {
        response.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        self.allow_credentials(response);
        if let Some(names) = &self.expose {
            response.insert(ACCESS_CONTROL_EXPOSE_HEADERS, names.clone());
        }
    }

    fn allow_credentials(&self, response: &mut HeaderMap) {
        if self.credentials {
            response.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
    }
}

/// What becomes of a request.
enum Verdict {
    /// Nothing: it is not cross-origin, or its origin is not allowed.
    Pass,
    /// It passes, and its response is for this origin.
    Allow(HeaderValue),
    /// It is a preflight, and this answers it.
    Answer(Error),
}

impl CorsPolicyBuilder {
    /// An origin that is allowed, as `https://app.example.com`; one that matches `*` stands for every origin.
    #[must_use]
    pub fn allow_origin(mut self, origin: StringMatcher) -> Self {
        self.origins.push(origin);
        self
    }

    /// Methods that are allowed; `*` alone allows the one that is asked for. Default: a preflight is told none.
    #[must_use]
    pub fn allow_methods<T: Into<String>>(mut self, methods: impl IntoIterator<Item = T>) -> Self {
        self.methods.extend(methods.into_iter().map(Into::into));
        self
    }

    /// Headers of requests that are allowed; `*` alone allows those that are asked for. Default: a preflight is told none.
    #[must_use]
    pub fn allow_headers<T: Into<String>>(mut self, names: impl IntoIterator<Item = T>) -> Self {
        self.headers.extend(names.into_iter().map(Into::into));
        self
    }

    /// Headers of responses that scripts may read. Default: those that browsers always show.
    #[must_use]
    pub fn expose_headers<T: Into<String>>(mut self, names: impl IntoIterator<Item = T>) -> Self {
        self.expose.extend(names.into_iter().map(Into::into));
        self
    }

    /// How long a browser may keep the answer to a preflight, in whole seconds. Default: what browsers do unasked.
    #[must_use]
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age = Some(age);
        self
    }

    /// Whether requests may carry credentials. Default no, which says nothing and takes nothing away from what an
    /// upstream says.
    #[must_use]
    pub fn allow_credentials(mut self, allow: bool) -> Self {
        self.credentials = allow;
        self
    }

    /// What becomes of a preflight whose origin is not allowed. Default [`UnmatchedPreflights::Forward`].
    #[must_use]
    pub fn unmatched_preflights(mut self, what: UnmatchedPreflights) -> Self {
        self.unmatched = what;
        self
    }

    /// The policy.
    ///
    /// # Errors
    /// When a list holds what no header can, or the age has parts of a second.
    pub fn build(self) -> Result<CorsPolicy, InvalidCors> {
        let joined = |header: HeaderName, items: &[String]| {
            let value = items.join(",");
            match HeaderValue::try_from(&value) {
                Ok(joined) => Ok((!joined.is_empty()).then_some(joined)),
                Err(_) => Err(InvalidCors::Value { header, value }),
            }
        };
        let listed = |header, items: &[String]| {
            Ok(joined(header, items)?
                .map(|value| if value == "*" { Listed::Asked } else { Listed::These(value) }))
        };
        if let Some(age) = self.max_age.filter(|age| age.subsec_nanos() != 0) {
            return Err(InvalidCors::MaxAge(age));
        }
        Ok(CorsPolicy {
            any_origin: self.origins.iter().any(|origin| origin.matches("*")),
            methods: listed(ACCESS_CONTROL_ALLOW_METHODS, &self.methods)?,
            headers: listed(ACCESS_CONTROL_ALLOW_HEADERS, &self.headers)?,
            expose: joined(ACCESS_CONTROL_EXPOSE_HEADERS, &self.expose)?,
            max_age: self.max_age.map(|age| HeaderValue::from(age.as_secs())),
            origins: self.origins.into_boxed_slice(),
            credentials: self.credentials,
            unmatched: self.unmatched,
        })
    }
}

/// Applies the CORS policy of the pinned route. Expects [`SelectRouteLayer`](crate::SelectRouteLayer) above it, and
/// above that what makes replies of errors ([`LocalReplyLayer`](mesh_core::LocalReplyLayer)), for a preflight is
/// answered as one. Whoever authenticates requests has to let preflights pass: browsers send them without credentials.
///
/// ```
/// use http::{Request, Response};
/// use mesh_core::matcher::StringMatcher;
/// use mesh_core::{Body, Direction, Error, LocalReplyLayer, Slot};
/// use mesh_route::{CorsLayer, CorsPolicy, RouteBuilder, RouteTable, SelectRouteLayer};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = CorsPolicy::builder()
///     .allow_origin(StringMatcher::exact("https://app.example.com"))
///     .allow_methods(["GET", "POST"])
///     .build()?;
/// let route = RouteBuilder::new("api").cors(policy).respond(200, "")?;
/// let table = RouteTable::builder().host("*", [route]).build()?;
/// let service = ServiceBuilder::new()
///     .layer(LocalReplyLayer::new(Direction::Inbound))
///     .layer(SelectRouteLayer::new(Slot::fixed(table)))
///     .layer(CorsLayer::new())
///     .service_fn(|_: Request<Body>| async { Ok::<_, Error>(Response::new(Body::from("hello"))) });
/// let preflight = Request::options("http://api/")
///     .header("origin", "https://app.example.com")
///     .header("access-control-request-method", "POST")
///     .body(Body::empty())?;
/// let answer = service.clone().oneshot(preflight).await?;
/// assert_eq!(answer.headers()["access-control-allow-methods"], "GET,POST");
/// let request = Request::get("http://api/").header("origin", "https://app.example.com").body(Body::empty())?;
/// let response = service.oneshot(request).await?;
/// assert_eq!(response.headers()["access-control-allow-origin"], "https://app.example.com");
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct CorsLayer(());

impl CorsLayer {
    /// The layer; what it does is in the route.
    #[must_use]
    pub const fn new() -> Self {
        Self(())
    }
}

impl<S> Layer<S> for CorsLayer {
    type Service = Cors<S>;

    fn layer(&self, inner: S) -> Cors<S> {
        Cors { inner }
    }
}

/// The service of [`CorsLayer`].
#[derive(Clone, Debug)]
pub struct Cors<S> {
    inner: S,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Cors<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    S::Error: Into<Error>,
{
    type Response = S::Response;
    type Error = Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        if policies::has(&request, policies::CORS) {
            return self.call_with_policy(request);
        }
        ResponseFuture(State::Running { inner: self.inner.call(request), allowed: None })
    }
}

impl<S> Cors<S> {
    /// Apart, so that what has no policy passes without a call.
    #[inline(never)]
    fn call_with_policy<B>(&mut self, request: Request<B>) -> ResponseFuture<S::Future>
    where
        S: Service<Request<B>>,
    {
        let route = request.extensions().get::<RequestContext>().and_then(RequestContext::route::<Route>);
        let mut allowed = None;
        if let Some(route) = route
            && let Some(policy) = &route.action().cors
        {
            match policy.judge(request.method(), request.headers()) {
                Verdict::Pass => {}
                Verdict::Answer(answer) => return ResponseFuture(State::Answered(Some(answer))),
                Verdict::Allow(origin) => allowed = Some(Allowed { route, origin }),
            }
        }
        ResponseFuture(State::Running { inner: self.inner.call(request), allowed })
    }
}

/// The future of [`Cors`].
#[pin_project]
#[derive(Debug)]
pub struct ResponseFuture<F>(#[pin] State<F>);

#[pin_project(project = StateProjection)]
#[derive(Debug)]
enum State<F> {
    Running {
        #[pin]
        inner: F,
        allowed: Option<Allowed>,
    },
    Answered(Option<Error>),
}

/// The origin that the response is for, and the route whose policy allowed it.
#[derive(Debug)]
struct Allowed {
    route: Arc<Route>,
    origin: HeaderValue,
}

impl Allowed {
    fn apply(&self, headers: &mut HeaderMap) {
        if let Some(policy) = &self.route.action().cors {
            policy.allow(&self.origin, headers);
        }
    }
}

impl<F, ResBody, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<ResBody>, E>>,
    E: Into<Error>,
{
    type Output = Result<Response<ResBody>, Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().0.project() {
            StateProjection::Running { inner, allowed } => {
                // What has nothing to add passes the response on where it is.
                let Some(allowed) = allowed else { return inner.poll(cx).map_err(Into::into) };
                let mut result = ready!(inner.poll(cx)).map_err(Into::into);
                match &mut result {
                    Ok(response) => allowed.apply(response.headers_mut()),
                    Err(error) => allowed.apply(error.headers_mut()),
                }
                Poll::Ready(result)
            }
            StateProjection::Answered(answer) => match answer.take() {
                Some(answer) => Poll::Ready(Err(answer)),
                // Polled after it was ready, which the contract of futures forbids.
                None => Poll::Pending,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_accepted_says_why() {
        let wrong = CorsPolicy::builder().expose_headers(["x-a", "x\nb"]).build().unwrap_err();
        assert_eq!(
            wrong.to_string(),
            "access-control-expose-headers: \"x-a,x\\nb\" cannot stand in a header"
        );
        let wrong = CorsPolicy::builder().max_age(Duration::from_millis(1500)).build().unwrap_err();
        assert_eq!(wrong.to_string(), "a preflight is kept for whole seconds, not 1.5s");
        assert!(CorsPolicy::builder().build().is_ok());
    }

    #[test]
    fn several_origins_are_none_that_is_allowed() {
        let policy = CorsPolicy::builder().allow_origin(StringMatcher::exact("https://a")).build().unwrap();
        let mut headers = HeaderMap::new();
        headers.append(ORIGIN, HeaderValue::from_static("https://a"));
        assert!(matches!(policy.judge(&Method::GET, &headers), Verdict::Allow(_)));
        headers.append(ORIGIN, HeaderValue::from_static("https://b"));
        assert!(matches!(policy.judge(&Method::GET, &headers), Verdict::Pass));
    }
}
