//! Driving one connection: protocol detection, hyper, timers and the drain, in one future of one task.
//!
//! **Detection.** Any HTTP port speaks HTTP/1 and h2c: up to 24 bytes are read into an array in the transport until
//! they differ from HTTP/2's preface (for almost all of HTTP/1 that is the first byte) and are given to hyper again.
//! That costs one read per connection and no buffer; hyper-util's `auto` keeps a rewindable one, measured at 4 KiB
//! per idle connection. hyper's state itself is made when the first bytes are there, so that a connection which
//! never says anything costs a task and a timer.
//!
//! **Time.** The head of an HTTP/1 request has its timeout from its first byte, an idle connection a longer one.
//! Both are one timer that is moved only to an *earlier* moment; when it fires too early it is set again. So a
//! request that comes and goes within the timeouts costs no timer operation.
//!
//! **Drain** ([`Phase`]). HTTP/1 connections hear of it with their next response (the edge says so), HTTP/2 ones by
//! GOAWAY: hyper sends last id 2³¹−1, pings, and sends the real last id when the ping is back, so that no stream on
//! its way is lost. A connection accepted during the drain may make one request first. When it is time to close, an
//! idle connection gets [`LAST_LOOK`] longer, so that what has already arrived in the socket is still served, and one
//! from the listener's backlog gets [`FIRST_REQUEST`].

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use hyper::server::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use pin_project::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::connection::Connection;
use super::edge::{Edge, EdgeService, HttpStack, Spawn};
use crate::clock;
use crate::drain::Phase;

/// Which HTTP a listener speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/1, or HTTP/2 when the client begins with its preface.
    #[default]
    Auto,
    /// HTTP/1.0 and HTTP/1.1 only.
    Http1,
    /// HTTP/2 only.
    Http2,
}

impl Protocol {
    /// The word that configuration dumps use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Http1 => "http1",
            Self::Http2 => "http2",
        }
    }
}

/// What an HTTP/2 client says first.
const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long an idle connection is still listened to when it is time to close it. It has to outlast the time in
/// which the runtime looks for bytes that are already there.
pub(super) const LAST_LOOK: Duration = Duration::from_millis(20);

/// How long a connection that was accepted during a drain has for its request.
pub(super) const FIRST_REQUEST: Duration = Duration::from_secs(1);

/// How long an HTTP/2 peer has to answer the ping of a graceful shutdown once no stream is open.
const LAST_PING: Duration = Duration::from_secs(1);

const TIMED_OUT: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// Serves one connection to its end.
#[pin_project]
pub(crate) struct Drive<S: HttpStack, T> {
    codec: Codec<S, T>,
    edge: Arc<Edge<S>>,
    connection: Arc<Connection>,
    #[pin]
    timer: Option<Sleep>,
    /// When the timer fires.
    armed: Option<Instant>,
    waker: Option<Waker>,
    born: Instant,
    requests: u32,
    head_since: Option<Instant>,
    idle_since: Option<Instant>,
    /// Since when nothing is in flight while the connection is to close.
    closing_since: Option<Instant>,
    shut: bool,
    aged: bool,
}

#[allow(clippy::large_enum_variant, reason = "HTTP/1 is the common one, and idle connections are many")]
enum Codec<S: HttpStack, T> {
    Detect(Transport<T>, Protocol),
    Http1(Http1<S, T>),
    Http2(Pin<Box<Http2<S, T>>>),
    Done,
}

type Http1<S, T> = http1::UpgradeableConnection<TokioIo<Transport<T>>, EdgeService<S>>;
type Http2<S, T> = http2::Connection<TokioIo<Transport<T>>, EdgeService<S>, Spawn>;

impl<S, T> Drive<S, T>
where
    S: HttpStack,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    pub(crate) fn new(edge: Arc<Edge<S>>, connection: Arc<Connection>, io: T, protocol: Protocol) -> Self {
        let now = clock::now();
        Self {
            codec: Codec::Detect(Transport::new(io, Arc::clone(&connection)), protocol),
            edge,
            connection,
            timer: None,
            armed: None,
            waker: None,
            born: now,
            requests: 0,
            head_since: None,
            idle_since: Some(now),
            closing_since: None,
            shut: false,
            aged: false,
        }
    }
}

impl<S, T> Future for Drive<S, T>
where
    S: HttpStack,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if !self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.connection.driven_by(cx.waker().clone());
            *self.as_mut().project().waker = Some(cx.waker().clone());
        }
        loop {
            let mut this = self.as_mut().project();
            if this.connection.phase() == Phase::Cut {
                *this.codec = Codec::Done;
                return Poll::Ready(());
            }
            if this.codec.poll(cx, this.edge, this.connection).is_ready() {
                return Poll::Ready(());
            }
            if self.as_mut().announce() {
                continue;
            }
            let Some((due, _)) = self.as_mut().due() else { return Poll::Pending };
            this = self.as_mut().project();
            if this.armed.is_none_or(|armed| due < armed) {
                *this.armed = Some(due);
                match this.timer.as_mut().as_pin_mut() {
                    Some(timer) => timer.reset(due.into()),
                    None => this.timer.set(Some(tokio::time::sleep_until(due.into()))),
                }
            }
            match this.timer.as_pin_mut() {
                Some(timer) => ready!(timer.poll(cx)),
                None => return Poll::Pending,
            }
            *this.armed = None;
            if self.as_mut().time_out() {
                return Poll::Ready(());
            }
        }
    }
}

/// What time brings.
enum Due {
    /// The head of a request has taken too long.
    SlowHead,
    /// Nothing has happened for too long, or it is time to close and nothing is in flight.
    Close,
    /// The connection is old.
    Age,
    /// Something was in flight; see whether it still is.
    Look,
}

impl<S, T> Drive<S, T>
where
    S: HttpStack,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    /// Says GOAWAY when the drain has come to this connection. True when it did just now.
    fn announce(self: Pin<&mut Self>) -> bool {
        let this = self.project();
        let Codec::Http2(http2) = this.codec else { return false };
        let now = !*this.shut
            && match this.connection.phase() {
                Phase::Serving => false,
                // Who came during the drain may ask once before hearing of it.
                _ => !this.connection.was_born_draining() || this.connection.requests() > 0,
            };
        if now {
            *this.shut = true;
            http2.as_mut().graceful_shutdown();
        }
        now
    }

    /// What time brings next, and when.
    fn due(self: Pin<&mut Self>) -> Option<(Instant, Due)> {
        let this = self.project();
        let limits = &this.edge.limits;
        let closing = *this.shut || this.connection.phase() >= Phase::Closing;
        let busy = this.connection.in_flight() > 0;
        let requests = this.connection.requests();
        if *this.requests != requests {
            *this.requests = requests;
            *this.idle_since = None;
            *this.head_since = None;
            if !busy {
                // What was read since was the rest of a request that is over.
                this.connection.ended_request();
            }
        }
        let age = limits.max_connection_age.filter(|_| !*this.aged);
        let age = age.map(|age| (clock::after(*this.born, age), Due::Age));
        if busy {
            *this.idle_since = None;
            *this.head_since = None;
            *this.closing_since = None;
            // The end of the last request need not wake this future.
            let look = match limits.idle_timeout {
                _ if closing => Some(clock::now() + LAST_PING),
                Some(idle) => Some(this.armed.unwrap_or_else(|| clock::after(clock::now(), idle))),
                None => None,
            };
            return earliest([age, look.map(|at| (at, Due::Look))]);
        }
        let idle_since = *this.idle_since.get_or_insert_with(clock::now);
        if !matches!(this.codec, Codec::Http2(_)) && this.connection.is_reading_head() {
            let since = *this.head_since.get_or_insert_with(clock::now);
            return earliest([age, Some((clock::after(since, limits.head_timeout), Due::SlowHead))]);
        }
        *this.head_since = None;
        let close = closing.then(|| {
            let since = *this.closing_since.get_or_insert_with(clock::now);
            let newcomer = this.connection.was_born_draining() && requests == 0;
            let patience = match this.codec {
                _ if newcomer && !*this.shut => FIRST_REQUEST,
                Codec::Http2(_) => LAST_PING,
                _ => LAST_LOOK,
            };
            (since + patience, Due::Close)
        });
        let idle = limits.idle_timeout.map(|idle| (clock::after(idle_since, idle), Due::Close));
        earliest([age, close, idle])
    }

    /// Does what is due. True when the connection is over.
    fn time_out(mut self: Pin<&mut Self>) -> bool {
        let Some((at, what)) = self.as_mut().due() else { return false };
        let now = clock::now();
        if at > now {
            return false;
        }
        let this = self.project();
        match what {
            Due::SlowHead => {
                this.codec.refuse_slow_head();
                true
            }
            Due::Close if !*this.shut && !matches!(this.codec, Codec::Detect(..)) => {
                *this.shut = true;
                *this.closing_since = Some(now);
                this.codec.graceful_shutdown();
                false
            }
            Due::Close => true,
            Due::Age => {
                *this.aged = true;
                this.connection.tell(Phase::Draining);
                false
            }
            Due::Look => false,
        }
    }
}

fn earliest<const N: usize>(candidates: [Option<(Instant, Due)>; N]) -> Option<(Instant, Due)> {
    candidates.into_iter().flatten().min_by_key(|(at, _)| *at)
}

impl<S, T> Codec<S, T>
where
    S: HttpStack,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    fn poll(&mut self, cx: &mut Context<'_>, edge: &Arc<Edge<S>>, connection: &Arc<Connection>) -> Poll<()> {
        let ended = loop {
            match self {
                Self::Detect(transport, protocol) => {
                    let http2 = match (ready!(transport.poll_detect(cx)), *protocol) {
                        (Ok(None), _) => break Ok(()),
                        (Ok(Some(_)), Protocol::Http1) => false,
                        (Ok(Some(_)), Protocol::Http2) => true,
                        (Ok(Some(http2)), Protocol::Auto) => http2,
                        (Err(error), _) => {
                            tracing::debug!(%error, "connection failed before its first request");
                            break Ok(());
                        }
                    };
                    let Self::Detect(transport, _) = std::mem::replace(self, Self::Done) else {
                        break Ok(());
                    };
                    let io = TokioIo::new(transport);
                    let service = EdgeService::new(Arc::clone(edge), Arc::clone(connection));
                    *self = if http2 {
                        Self::Http2(Box::pin(edge.http2.serve_connection(io, service)))
                    } else {
                        Self::Http1(edge.http1.serve_connection(io, service).with_upgrades())
                    };
                }
                Self::Http1(http1) => break ready!(Pin::new(http1).poll(cx)),
                Self::Http2(http2) => break ready!(http2.as_mut().poll(cx)),
                Self::Done => break Ok(()),
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, peer = %connection.info().peer, "connection failed");
        }
        *self = Self::Done;
        Poll::Ready(())
    }

    fn graceful_shutdown(&mut self) {
        match self {
            Self::Http1(http1) => Pin::new(http1).graceful_shutdown(),
            Self::Http2(http2) => http2.as_mut().graceful_shutdown(),
            Self::Detect(..) | Self::Done => {}
        }
    }

    /// Answers 408, as far as the socket takes it without waiting.
    fn refuse_slow_head(&mut self) {
        let Self::Http1(http1) = std::mem::replace(self, Self::Done) else { return };
        let Some(parts) = http1.into_parts() else { return };
        let mut io = parts.io.into_inner();
        let mut cx = Context::from_waker(Waker::noop());
        // The connection ends here whether or not the client hears why.
        let _ = Pin::new(&mut io).poll_write(&mut cx, TIMED_OUT);
        let _ = Pin::new(&mut io).poll_flush(&mut cx);
        let _ = Pin::new(&mut io).poll_shutdown(&mut cx);
    }
}

/// The transport under hyper: gives detected bytes again, and notes when bytes come.
struct Transport<T> {
    io: T,
    connection: Arc<Connection>,
    first: [u8; PREFACE.len()],
    filled: u8,
    given: u8,
}

impl<T: AsyncRead + Unpin> Transport<T> {
    const fn new(io: T, connection: Arc<Connection>) -> Self {
        Self { io, connection, first: [0; PREFACE.len()], filled: 0, given: 0 }
    }

    /// Reads until it is known whether the client speaks HTTP/2. `None`: it closed before it spoke.
    fn poll_detect(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<bool>>> {
        loop {
            let filled = usize::from(self.filled);
            if self.first[..filled] != PREFACE[..filled] {
                return Poll::Ready(Ok(Some(false)));
            }
            if filled == PREFACE.len() {
                return Poll::Ready(Ok(Some(true)));
            }
            let mut rest = ReadBuf::new(&mut self.first[filled..]);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut rest))?;
            let read = rest.filled().len();
            if read == 0 {
                return Poll::Ready(Ok((filled > 0).then_some(false)));
            }
            self.filled += read as u8;
            self.connection.read_some();
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Transport<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        let again = &this.first[usize::from(this.given)..usize::from(this.filled)];
        let again = &again[..again.len().min(buf.remaining())];
        buf.put_slice(again);
        this.given += again.len() as u8;
        // What was detected goes up together with what follows it: 24 bytes alone would make hyper parse twice and
        // double its buffer for the rest.
        let given = buf.filled().len();
        match Pin::new(&mut this.io).poll_read(cx, buf) {
            Poll::Pending if given == before => return Poll::Pending,
            // An error comes again with the next read.
            Poll::Ready(Err(error)) if given == before => return Poll::Ready(Err(error)),
            _ => {}
        }
        if buf.filled().len() > given {
            this.connection.read_some();
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Transport<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bytes::Bytes;
    use http::{Request, Response};
    use http_body_util::{BodyExt as _, Full};
    use hyper_util::rt::TokioExecutor;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio::time::Instant;
    use tower::service_fn;

    use super::*;
    use crate::body::Body;
    use crate::conn::{ConnInfo, Direction};
    use crate::drain::Drain;
    use crate::listener::Stats;
    use crate::panic::Panics;
    use crate::server::ServerLimits;
    use crate::server::connection::Permits;

    const HOUR: Duration = Duration::from_secs(3600);

    async fn hello(_: Request<Body>) -> Result<Response<Body>, Infallible> {
        Ok(Response::new(Body::full("hello")))
    }

    /// Our end of a connection that is served in memory, where paused time is exact, and how to tell it of a drain.
    fn served(limits: ServerLimits) -> (DuplexStream, Arc<Connection>) {
        let edge = Arc::new(Edge::new(service_fn(hello), None, limits, Panics::default()));
        let permits = Permits {
            open: Arc::new(Stats::default()).open(1).unwrap(),
            _load: None,
            _tokens: (None, Drain::new().token()),
        };
        let connection = Connection::new(ConnInfo::unknown(Direction::Inbound), &edge.connections, permits);
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        tokio::spawn(Drive::new(edge, Arc::clone(&connection), theirs, Protocol::Auto));
        (ours, connection)
    }

    async fn to_end(mut stream: impl AsyncRead + Unpin) -> (String, Duration) {
        let start = Instant::now();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        (answer, start.elapsed())
    }

    fn get() -> Request<Full<Bytes>> {
        Request::builder().uri("http://test/").header("host", "test").body(Full::default()).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn g1_a_slow_head_is_answered_408_when_its_time_is_over() {
        let (mut stream, _) = served(ServerLimits::default());
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
        // Its time begins with its own first byte, and is not renewed by others.
        let (read, mut write) = tokio::io::split(stream);
        tokio::spawn(async move {
            for byte in b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" {
                if write.write_all(&[*byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(700)).await;
            }
        });
        let (answer, elapsed) = to_end(read).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("helloHTTP/1.1 408 Request Timeout\r\nconnection: close\r\n"), "{answer}");
        assert_eq!(elapsed.as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn g1_a_head_that_begins_in_time_is_served() {
        let (stream, _) = served(ServerLimits::default());
        let (mut read, mut write) = tokio::io::split(stream);
        for byte in b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" {
            write.write_all(&[*byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        let mut answer = [0; 15];
        read.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
    }

    #[tokio::test(start_paused = true)]
    async fn g1_a_preface_that_never_ends_is_no_way_to_stay() {
        let (mut stream, _) = served(ServerLimits::default());
        stream.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
        let (answer, elapsed) = to_end(stream).await;
        assert_eq!((answer.as_str(), elapsed.as_secs()), ("", 10));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_closes_after_an_hour() {
        let (stream, _) = served(ServerLimits::default());
        let (answer, elapsed) = to_end(stream).await;
        assert_eq!((answer.as_str(), elapsed.as_secs()), ("", 3600));
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_closes_an_hour_after_its_last_request() {
        let (stream, _) = served(ServerLimits::default());
        let (mut send, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let ended = tokio::spawn(async move { (connection.await.is_ok(), Instant::now()) });
        for _ in 0..5 {
            tokio::time::sleep(HOUR / 2).await;
            send.ready().await.unwrap();
            send.send_request(get()).await.unwrap().into_body().collect().await.unwrap();
        }
        let start = Instant::now();
        let (clean, end) = ended.await.unwrap();
        assert_eq!((clean, (end - start).as_secs()), (true, 3600));
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_http2_connection_says_goaway_an_hour_after_its_last_request() {
        let (stream, _) = served(ServerLimits::default());
        let (mut send, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        let ended = tokio::spawn(async move { (connection.await.is_ok(), Instant::now()) });
        for _ in 0..5 {
            tokio::time::sleep(HOUR / 2).await;
            send.send_request(get()).await.unwrap().into_body().collect().await.unwrap();
        }
        let start = Instant::now();
        let (clean, end) = ended.await.unwrap();
        assert_eq!((clean, (end - start).as_secs()), (true, 3600));
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_connection_is_drained_with_its_next_response() {
        let limits =
            ServerLimits { max_connection_age: Some(Duration::from_secs(60)), ..ServerLimits::default() };
        let (mut stream, _) = served(limits);
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_secs(61)).await;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let (answer, _) = to_end(stream).await;
        assert_eq!(answer.matches("200 OK").count(), 2);
        assert_eq!(answer.matches("connection: close").count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn bug_limits_that_no_clock_can_tell_panicked() {
        let limits = ServerLimits {
            head_timeout: Duration::MAX,
            idle_timeout: Some(Duration::MAX),
            max_connection_age: Some(Duration::MAX),
            ..ServerLimits::default()
        };
        let (mut stream, _) = served(limits);
        for _ in 0..2 {
            stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
            tokio::time::sleep(Duration::from_secs(1000)).await;
            stream.write_all(b"host: a\r\n\r\n").await.unwrap();
            tokio::time::sleep(Duration::from_secs(1000)).await;
        }
        stream.shutdown().await.unwrap();
        assert_eq!(to_end(stream).await.0.matches("200 OK").count(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn h1_an_idle_connection_outlives_draining_and_closes_after_a_last_look() {
        let (mut stream, connection) = served(ServerLimits::default());
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        connection.tell(Phase::Draining);
        tokio::time::sleep(Duration::from_secs(60)).await;
        connection.tell(Phase::Closing);
        let (answer, elapsed) = to_end(stream).await;
        assert!(!answer.contains("connection: close"));
        assert_eq!(elapsed.as_millis() / 10, LAST_LOOK.as_millis() / 10);
    }

    #[tokio::test(start_paused = true)]
    async fn h1_a_head_on_its_way_when_it_is_time_to_close_is_served() {
        let (mut stream, connection) = served(ServerLimits::default());
        stream.write_all(b"GET / HTTP/1.1\r\nho").await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        connection.tell(Phase::Closing);
        tokio::time::sleep(Duration::from_secs(1)).await;
        stream.write_all(b"st: a\r\n\r\n").await.unwrap();
        let (answer, _) = to_end(stream).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\nconnection: close\r\n"), "{answer}");
    }

    #[tokio::test(start_paused = true)]
    async fn h2_a_peer_that_does_not_answer_the_last_ping_is_not_waited_for() {
        let (mut stream, connection) = served(ServerLimits::default());
        // The preface and empty settings, and nothing ever after.
        stream.write_all(&PREFACE).await.unwrap();
        stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        connection.tell(Phase::Closing);
        let start = Instant::now();
        let mut frames = Vec::new();
        stream.read_to_end(&mut frames).await.unwrap();
        assert_eq!(start.elapsed().as_secs(), LAST_PING.as_secs());
        // GOAWAY: 8 bytes, type 7, stream 0, last id 2^31 - 1, NO_ERROR.
        let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0];
        assert!(frames.windows(goaway.len()).any(|window| window == goaway), "{frames:?}");
    }
}
