//! The body that flows through the mesh: generic at the edge, concrete inside.
//!
//! The pool, the cluster registry and `Dispatch` use only this type, so that no layer multiplies the number of
//! types below it. What hyper read is carried as it is and never boxed; a foreign body is boxed once.
//!
//! Two things ride on a body, because only its end is the end of a request. A [`Meter`](Body::metered) counts
//! bytes into the [`RequestContext`] and costs no allocation. A [`BodyHook`] hears of data, trailers and the one
//! end, be it whole, failed or dropped; guards (permits, in-flight counts, a leased connection) live in hooks, so
//! that a cancel at any await leaves the counters exact.

use std::any::Any;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;

use crate::context::RequestContext;
use crate::error::{BoxError, Error, ErrorKind};
use crate::flags::ResponseFlags;

/// A request or response body.
pub struct Body {
    kind: Kind,
    /// What was read before the body was made.
    first: Option<Box<Result<Frame<Bytes>, Error>>>,
    meter: Option<Meter>,
    hook: Option<Box<dyn BodyHook>>,
}

enum Kind {
    Empty,
    Full(Option<Bytes>),
    Incoming(Incoming, Side),
    Boxed(UnsyncBoxBody<Bytes, Error>),
}

/// Which peer a body is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The client: the body of a request.
    Downstream,
    /// The server: the body of a response.
    Upstream,
}

/// How a body ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum EndOfBody<'a> {
    /// Whole, trailers included.
    Complete,
    /// The peer it is read from failed.
    Failed(&'a Error),
    /// Dropped before its end: whoever was to receive it went away.
    Dropped,
}

/// Hears what happens to a body. [`BodyHook::on_end`] is called exactly once.
pub trait BodyHook: Any + Send {
    /// Asked before each frame: an error ends the body there. A hook that has none yet wakes the task when it has.
    fn poll_end(&mut self, _cx: &mut Context<'_>) -> Poll<Error> {
        Poll::Pending
    }

    /// Asked when there is no frame yet: an error ends the body, as in [`BodyHook::poll_end`].
    fn poll_idle(&mut self, _cx: &mut Context<'_>) -> Poll<Error> {
        Poll::Pending
    }

    /// Whoever asked for frames has had none, and asks no more: the body is as good as new.
    fn on_given_back(&mut self) {}

    /// A data frame passed.
    fn on_data(&mut self, _data: &Bytes) {}

    /// The trailers passed; they may be changed.
    fn on_trailers(&mut self, _trailers: &mut HeaderMap) {}

    /// The body ended.
    fn on_end(&mut self, end: EndOfBody<'_>);
}

struct Meter {
    context: RequestContext,
    side: Side,
    /// What is still to come, when the length is known.
    left: Option<u64>,
}

impl Body {
    /// A body without data.
    #[must_use]
    pub const fn empty() -> Self {
        Self::of(Kind::Empty)
    }

    /// A body of one piece.
    #[must_use]
    pub fn full(data: impl Into<Bytes>) -> Self {
        let data = data.into();
        Self::of(if data.is_empty() { Kind::Empty } else { Kind::Full(Some(data)) })
    }

    /// The data of a body of one piece of which nothing has been read; `None` for any other.
    #[must_use]
    pub fn as_full(&self) -> Option<&Bytes> {
        match &self.kind {
            Kind::Full(data) if self.first.is_none() => data.as_ref(),
            _ => None,
        }
    }

    /// What hyper reads from a connection; never boxed. An error becomes one of the side it is read from.
    #[must_use]
    pub fn from_incoming(incoming: Incoming, side: Side) -> Self {
        if HttpBody::is_end_stream(&incoming) {
            return Self::empty();
        }
        Self::of(Kind::Incoming(incoming, side))
    }

    /// A foreign body, boxed once. A [`Body`] passes as it is.
    pub fn new<B>(body: B) -> Self
    where
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let mut body = Some(body);
        if let Some(ours) = (&mut body as &mut dyn Any).downcast_mut::<Option<Self>>().and_then(Option::take)
        {
            return ours;
        }
        let Some(body) = body else { return Self::empty() };
        if body.is_end_stream() {
            return Self::empty();
        }
        Self::of(Kind::Boxed(body.map_err(|error| Error::from(error.into())).boxed_unsync()))
    }

    /// The body whose first frame was read already, by someone who had to look at it.
    #[must_use]
    pub fn after(mut self, first: Result<Frame<Bytes>, Error>) -> Self {
        self.first = Some(Box::new(first));
        self
    }

    /// Counts the bytes of this body into `context`, as request bytes for [`Side::Downstream`] and as response
    /// bytes for [`Side::Upstream`]. The flags of an error that ends it are added too, and `DC` when a response
    /// body is dropped before its end: whoever was to receive it is gone.
    #[must_use]
    pub fn metered(self, context: RequestContext, side: Side) -> Self {
        let length = self.size_hint().exact();
        self.metered_for(context, side, length)
    }

    /// [`Body::metered`] for a reader that stops after `length` bytes.
    #[must_use]
    pub(crate) fn metered_for(mut self, context: RequestContext, side: Side, length: Option<u64>) -> Self {
        self.meter = Some(Meter { context, side, left: length });
        self
    }

    /// Adds a hook. Hooks hear of every event in the order in which they were added.
    #[must_use]
    pub fn with_hook(mut self, hook: impl BodyHook + 'static) -> Self {
        let hook: Box<dyn BodyHook> = Box::new(hook);
        self.hook = Some(match self.hook.take() {
            Some(first) => Box::new(Both(first, hook)),
            None => hook,
        });
        self
    }

    /// The hook, if there is one only and it is an `H`, for whoever has more to tell it.
    pub fn hook_mut<H: BodyHook>(&mut self) -> Option<&mut H> {
        let hook: &mut dyn Any = self.hook.as_deref_mut()?;
        hook.downcast_mut()
    }

    /// The first of the hooks that is an `H` and of which `is` says yes.
    pub fn find_hook<H: BodyHook>(&mut self, mut is: impl FnMut(&H) -> bool) -> Option<&mut H> {
        find(self.hook.as_deref_mut()?, &mut is)
    }

    /// Tells the hooks that nobody asks for frames any more, of whom none has been read: the body goes to somebody else.
    pub fn give_back(&mut self) {
        if let Some(hook) = &mut self.hook {
            hook.on_given_back();
        }
    }

    const fn of(kind: Kind) -> Self {
        Self { kind, first: None, meter: None, hook: None }
    }

    fn fail(&mut self, error: Error) -> Error {
        self.end(EndOfBody::Failed(&error));
        self.kind = Kind::Empty;
        error
    }

    fn end(&mut self, end: EndOfBody<'_>) {
        if let Some(meter) = self.meter.take() {
            match &end {
                EndOfBody::Complete => {}
                EndOfBody::Failed(error) => meter.context.add_flags(error.flags()),
                EndOfBody::Dropped if meter.side == Side::Upstream => meter.context.downstream_left(),
                EndOfBody::Dropped => {}
            }
        }
        if let Some(mut hook) = self.hook.take() {
            hook.on_end(end);
        }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = &mut *self;
        // First, so that a body that always has more does not outrun a limit.
        if let Some(hook) = &mut this.hook
            && let Poll::Ready(error) = hook.poll_end(cx)
        {
            this.first = None;
            return Poll::Ready(Some(Err(this.fail(error))));
        }
        let frame = match (this.first.take(), &mut this.kind) {
            (Some(first), _) => Some(*first),
            (None, kind) => match (poll_kind(kind, cx), &mut this.hook) {
                (Poll::Ready(frame), _) => frame,
                (Poll::Pending, None) => return Poll::Pending,
                (Poll::Pending, Some(hook)) => Some(Err(ready!(hook.poll_idle(cx)))),
            },
        };
        Poll::Ready(match frame {
            Some(Ok(mut frame)) => {
                if let Some(data) = frame.data_ref() {
                    if let Some(meter) = &mut this.meter {
                        meter.count(data.len());
                    }
                    if let Some(hook) = &mut this.hook {
                        hook.on_data(data);
                    }
                } else if let Some(trailers) = frame.trailers_mut() {
                    if let Some(hook) = &mut this.hook {
                        hook.on_trailers(trailers);
                    }
                    // Nothing follows them, and over HTTP/2 nobody asks whether something does.
                    this.end(EndOfBody::Complete);
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => Some(Err(this.fail(error))),
            None => {
                this.end(EndOfBody::Complete);
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        if self.first.is_some() {
            return false;
        }
        match &self.kind {
            Kind::Empty | Kind::Full(None) => true,
            Kind::Full(Some(_)) => false,
            Kind::Incoming(incoming, _) => incoming.is_end_stream(),
            Kind::Boxed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        let rest = match &self.kind {
            Kind::Empty | Kind::Full(None) => SizeHint::with_exact(0),
            Kind::Full(Some(data)) => SizeHint::with_exact(data.len() as u64),
            Kind::Incoming(incoming, _) => incoming.size_hint(),
            Kind::Boxed(body) => body.size_hint(),
        };
        let Some(Ok(first)) = self.first.as_deref() else { return rest };
        let read = first.data_ref().map_or(0, Bytes::len) as u64;
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(read));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(read));
        }
        hint
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if self.hook.is_some() || self.meter.is_some() {
            // A reader that knows the length does not ask for the end, it stops.
            let whole =
                self.is_end_stream() || self.meter.as_ref().is_some_and(|meter| meter.left == Some(0));
            self.end(if whole { EndOfBody::Complete } else { EndOfBody::Dropped });
        }
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

impl From<Bytes> for Body {
    fn from(data: Bytes) -> Self {
        Self::full(data)
    }
}

impl From<String> for Body {
    fn from(data: String) -> Self {
        Self::full(data)
    }
}

impl From<&'static str> for Body {
    fn from(data: &'static str) -> Self {
        Self::full(data)
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.kind {
            Kind::Empty => "Empty",
            Kind::Full(_) => "Full",
            Kind::Incoming(..) => "Incoming",
            Kind::Boxed(_) => "Boxed",
        };
        f.debug_struct("Body")
            .field("kind", &kind)
            .field("size_hint", &self.size_hint())
            .finish_non_exhaustive()
    }
}

impl Meter {
    fn count(&mut self, bytes: usize) {
        self.left = self.left.map(|left| left.saturating_sub(bytes as u64));
        match self.side {
            Side::Downstream => self.context.add_request_bytes(bytes as u64),
            Side::Upstream => self.context.add_response_bytes(bytes as u64),
        }
    }
}

struct Both(Box<dyn BodyHook>, Box<dyn BodyHook>);

impl BodyHook for Both {
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        match self.0.poll_end(cx) {
            Poll::Pending => self.1.poll_end(cx),
            end => end,
        }
    }

    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        match self.0.poll_idle(cx) {
            Poll::Pending => self.1.poll_idle(cx),
            end => end,
        }
    }

    fn on_given_back(&mut self) {
        self.0.on_given_back();
        self.1.on_given_back();
    }

    fn on_data(&mut self, data: &Bytes) {
        self.0.on_data(data);
        self.1.on_data(data);
    }

    fn on_trailers(&mut self, trailers: &mut HeaderMap) {
        self.0.on_trailers(trailers);
        self.1.on_trailers(trailers);
    }

    fn on_end(&mut self, end: EndOfBody<'_>) {
        let again = match &end {
            EndOfBody::Complete => EndOfBody::Complete,
            EndOfBody::Failed(error) => EndOfBody::Failed(error),
            EndOfBody::Dropped => EndOfBody::Dropped,
        };
        self.0.on_end(again);
        self.1.on_end(end);
    }
}

fn find<'h, H: BodyHook>(hook: &'h mut dyn BodyHook, is: &mut impl FnMut(&H) -> bool) -> Option<&'h mut H> {
    let hook: &mut dyn Any = hook;
    if hook.is::<Both>() {
        let Both(first, second) = hook.downcast_mut()?;
        return find(&mut **first, is).or_else(|| find(&mut **second, is));
    }
    hook.downcast_mut().filter(|hook| is(hook))
}

fn poll_kind(kind: &mut Kind, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
    Poll::Ready(match kind {
        Kind::Empty => None,
        Kind::Full(data) => data.take().map(|data| Ok(Frame::data(data))),
        Kind::Incoming(incoming, side) => ready!(Pin::new(incoming).poll_frame(cx))
            .map(|frame| frame.map_err(|error| read_error(error, *side))),
        Kind::Boxed(body) => ready!(Pin::new(body).poll_frame(cx)),
    })
}

/// What hyper says of a body that broke off, as an error of the side it is read from.
#[must_use]
pub fn read_error(error: hyper::Error, side: Side) -> Error {
    match side {
        Side::Downstream => Error::new(
            ErrorKind::DownstreamReset,
            StatusCode::BAD_REQUEST,
            ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION,
            "downstream_remote_disconnect",
        ),
        Side::Upstream => Error::new(
            ErrorKind::UpstreamReset,
            StatusCode::SERVICE_UNAVAILABLE,
            ResponseFlags::UPSTREAM_CONNECTION_TERMINATION,
            "upstream_reset_after_response_started{connection_termination}",
        ),
    }
    .with_source(error)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::Mutex;

    use http_body_util::BodyExt as _;

    use super::*;
    use crate::conn::{ConnInfo, Direction};

    #[derive(Clone, Default)]
    struct Record(Arc<Mutex<Vec<String>>>);

    impl BodyHook for Record {
        fn on_data(&mut self, data: &Bytes) {
            self.0.lock().unwrap().push(format!("data {}", data.len()));
        }

        fn on_end(&mut self, end: EndOfBody<'_>) {
            let end = match end {
                EndOfBody::Complete => "complete".to_owned(),
                EndOfBody::Failed(error) => format!("failed {error}"),
                EndOfBody::Dropped => "dropped".to_owned(),
            };
            self.0.lock().unwrap().push(end);
        }
    }

    fn context() -> RequestContext {
        RequestContext::new(Arc::new(ConnInfo::unknown(Direction::Outbound)), None, crate::clock::now())
    }

    #[tokio::test]
    async fn hooks_hear_of_one_end() {
        let (first, second) = (Record::default(), Record::default());
        let cx = context();
        let body = Body::full("hello")
            .metered(cx.clone(), Side::Downstream)
            .with_hook(first.clone())
            .with_hook(second.clone());
        assert_eq!(body.collect().await.unwrap().to_bytes(), "hello");
        assert_eq!(*first.0.lock().unwrap(), ["data 5", "complete"]);
        assert_eq!(*second.0.lock().unwrap(), ["data 5", "complete"]);
        assert_eq!(cx.request_bytes(), 5);
        assert_eq!(cx.response_bytes(), 0);
    }

    #[test]
    fn a_dropped_body_says_so() {
        let record = Record::default();
        drop(Body::full("hello").with_hook(record.clone()));
        assert_eq!(*record.0.lock().unwrap(), ["dropped"]);
    }

    #[test]
    fn a_reader_that_stops_at_the_known_end_completes() {
        let record = Record::default();
        drop(Body::empty().with_hook(record.clone()));
        assert_eq!(*record.0.lock().unwrap(), ["complete"]);
    }

    #[tokio::test]
    async fn trailers_are_the_end() {
        let (record, cx) = (Record::default(), context());
        let frames = [Ok::<_, Error>(Frame::data(Bytes::from("a"))), Ok(Frame::trailers(HeaderMap::new()))];
        let body = http_body_util::StreamBody::new(futures_util::stream::iter(frames));
        let mut body = Body::new(body).metered(cx.clone(), Side::Upstream).with_hook(record.clone());
        for _ in 0..2 {
            body.frame().await.unwrap().unwrap();
        }
        // As hyper does over HTTP/2, which asks no further.
        drop(body);
        assert_eq!(*record.0.lock().unwrap(), ["data 1", "complete"]);
        assert_eq!(cx.flags(), ResponseFlags::NONE, "nobody went away");
    }

    #[tokio::test]
    async fn a_foreign_error_becomes_ours() {
        let record = Record::default();
        let failing =
            http_body_util::StreamBody::new(futures_once(Err::<Frame<Bytes>, BoxError>("boom".into())));
        let body = Body::new(failing).with_hook(record.clone());
        assert!(body.collect().await.is_err());
        assert_eq!(*record.0.lock().unwrap(), ["failed internal_error (500): boom"]);
    }

    /// Ends the body when it is asked the second time.
    #[derive(Default)]
    struct Impatient(u32);

    impl BodyHook for Impatient {
        fn poll_end(&mut self, _: &mut Context<'_>) -> Poll<Error> {
            self.0 += 1;
            if self.0 < 2 { Poll::Pending } else { Poll::Ready(Error::internal("enough")) }
        }

        fn on_end(&mut self, _: EndOfBody<'_>) {}
    }

    #[tokio::test]
    async fn a_hook_ends_a_body() {
        let record = Record::default();
        let frames =
            ["a", "b"].map(|data| Ok::<_, BoxError>(Frame::data(Bytes::from_static(data.as_bytes()))));
        let body = Body::new(http_body_util::StreamBody::new(futures_util::stream::iter(frames)));
        let mut body = body.with_hook(record.clone());
        assert!(body.hook_mut::<Record>().is_some() && body.hook_mut::<Impatient>().is_none());
        let mut body = body.with_hook(Impatient::default());
        assert!(body.hook_mut::<Record>().is_none(), "there are two");
        let mut body = body.with_hook(Record::default());
        let mut seen = 0;
        let second = body.find_hook::<Record>(|_| {
            seen += 1;
            seen == 2
        });
        assert!(second.is_some_and(|second| !Arc::ptr_eq(&second.0, &record.0)));
        assert!(body.find_hook::<Impatient>(|hook| hook.0 == 0).is_some());
        assert!(body.find_hook::<Impatient>(|hook| hook.0 == 1).is_none());
        assert!(body.frame().await.unwrap().is_ok());
        assert!(body.frame().await.unwrap().is_err());
        assert!(body.frame().await.is_none());
        assert_eq!(*record.0.lock().unwrap(), ["data 1", "failed internal_error (500): enough"]);
    }

    fn futures_once<T>(item: T) -> impl futures_util::Stream<Item = T> {
        futures_util::stream::iter([item])
    }
}
