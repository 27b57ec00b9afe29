//! Copying between two connections, with half-close, until both have ended, are idle, or have to end.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use mesh_core::ResponseFlags;
use mesh_core::clock;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};

/// How a relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Both sides said that they have no more.
    Closed,
    /// The downstream broke the connection.
    Downstream,
    /// The upstream broke the connection.
    Upstream,
    /// No byte came or went for too long.
    Idle,
    /// It has lasted for as long as it may.
    Expired,
    /// A drain cut it.
    Cut,
}

impl End {
    pub(super) fn flags(self) -> ResponseFlags {
        match self {
            Self::Closed => ResponseFlags::NONE,
            Self::Downstream => ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION,
            Self::Upstream => ResponseFlags::UPSTREAM_CONNECTION_TERMINATION,
            Self::Idle => ResponseFlags::STREAM_IDLE_TIMEOUT,
            Self::Expired => ResponseFlags::DURATION_TIMEOUT,
            Self::Cut => {
                ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION | ResponseFlags::STREAM_IDLE_TIMEOUT
            }
        }
    }
}

/// How long a relay may be idle, and how long it may last.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Limits {
    pub(super) idle: Option<Duration>,
    pub(super) duration: Option<Duration>,
}

/// What went through so far. Every byte of either direction passes the downstream, so that is where they are counted.
#[derive(Debug)]
pub(super) struct Meter {
    begun: Instant,
    /// Nanoseconds after the beginning.
    last: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    failed: AtomicBool,
}

impl Meter {
    pub(super) fn new() -> Self {
        Self {
            begun: clock::now(),
            last: AtomicU64::new(0),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            failed: AtomicBool::new(false),
        }
    }

    /// Bytes from the downstream.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Bytes to the downstream.
    pub(super) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Since the beginning.
    pub(super) fn elapsed(&self) -> Duration {
        clock::now().saturating_duration_since(self.begun)
    }

    fn count(&self, direction: &AtomicU64, bytes: usize) {
        if bytes > 0 {
            direction.fetch_add(bytes as u64, Ordering::Relaxed);
            self.last.store(u64::try_from(self.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
    }

    /// Waits until nothing has passed for this long.
    async fn idle(&self, idle: Option<Duration>) {
        let Some(idle) = idle else { return std::future::pending().await };
        loop {
            let last = self.begun + Duration::from_nanos(self.last.load(Ordering::Relaxed));
            let due = clock::after(last, idle);
            if due <= clock::now() {
                return;
            }
            tokio::time::sleep_until(due.into()).await;
        }
    }
}

/// Copies until the end.
pub(super) async fn relay<D, U>(
    downstream: D,
    mut upstream: U,
    meter: &Meter,
    limits: Limits,
    cut: impl Future<Output = ()>,
) -> End
where
    D: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let mut downstream = Metered { io: downstream, meter };
    let expired = async {
        match limits.duration {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    let (cut, expired) = (pin!(cut), pin!(expired));
    tokio::select! {
        copied = copy_bidirectional(&mut downstream, &mut upstream) => match copied {
            Ok(_) => End::Closed,
            Err(error) => {
                tracing::debug!(%error, "a relayed connection broke");
                if meter.failed.load(Ordering::Relaxed) { End::Downstream } else { End::Upstream }
            }
        },
        () = meter.idle(limits.idle) => End::Idle,
        () = expired => End::Expired,
        () = cut => End::Cut,
    }
}

/// The downstream, counted.
struct Metered<'m, T> {
    io: T,
    meter: &'m Meter,
}

impl<T> Metered<'_, T> {
    fn note<V>(&self, polled: io::Result<V>) -> io::Result<V> {
        if polled.is_err() {
            self.meter.failed.store(true, Ordering::Relaxed);
        }
        polled
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Metered<'_, T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = ready!(Pin::new(&mut self.io).poll_read(cx, buf));
        self.meter.count(&self.meter.received, buf.filled().len() - before);
        Poll::Ready(self.note(polled))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Metered<'_, T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = ready!(Pin::new(&mut self.io).poll_write(cx, buf));
        if let Ok(written) = polled {
            self.meter.count(&self.meter.sent, written);
        }
        Poll::Ready(self.note(polled))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = ready!(Pin::new(&mut self.io).poll_flush(cx));
        Poll::Ready(self.note(polled))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = ready!(Pin::new(&mut self.io).poll_shutdown(cx));
        Poll::Ready(self.note(polled))
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;

    type Ended = tokio::task::JoinHandle<(End, u64, u64, Duration)>;

    fn relayed(
        limits: Limits,
        cut: impl Future<Output = ()> + Send + 'static,
    ) -> (DuplexStream, DuplexStream, Ended) {
        let (client, downstream) = tokio::io::duplex(64);
        let (server, upstream) = tokio::io::duplex(64);
        let ended = tokio::spawn(async move {
            let (meter, begun) = (Meter::new(), clock::now());
            let end = relay(downstream, upstream, &meter, limits, cut).await;
            (end, meter.received(), meter.sent(), clock::now() - begun)
        });
        (client, server, ended)
    }

    #[tokio::test]
    async fn a_side_that_has_no_more_still_hears_the_other() {
        let (mut client, mut server, ended) = relayed(Limits::default(), pending());
        client.write_all(b"ask").await.unwrap();
        client.shutdown().await.unwrap();
        let mut asked = Vec::new();
        server.read_to_end(&mut asked).await.unwrap();
        assert_eq!(asked, b"ask");
        server.write_all(b"answer").await.unwrap();
        server.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        let (end, received, sent, _) = ended.await.unwrap();
        assert_eq!((end, received, sent), (End::Closed, 3, 6));
    }

    #[tokio::test(start_paused = true)]
    async fn idle_is_measured_from_the_last_byte_of_either_side() {
        let idle = Limits { idle: Some(Duration::from_secs(60)), duration: None };
        let (mut client, mut server, ended) = relayed(idle, pending());
        for from_client in [true, false, true] {
            tokio::time::sleep(Duration::from_secs(50)).await;
            let writer = if from_client { &mut client } else { &mut server };
            writer.write_all(b"x").await.unwrap();
        }
        let (end, received, sent, elapsed) = ended.await.unwrap();
        assert_eq!((end, received, sent, elapsed.as_secs()), (End::Idle, 2, 1, 210));
        assert_eq!(client.read(&mut [0; 4]).await.unwrap(), 1, "what came is there, and then the end");
        assert_eq!(client.read(&mut [0; 4]).await.unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn without_limits_nothing_ends_it() {
        let (client, server, ended) = relayed(Limits::default(), pending());
        tokio::time::sleep(Duration::from_secs(1_000_000)).await;
        assert!(!ended.is_finished());
        drop((client, server));
        ended.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn bug_a_limit_that_no_clock_can_tell_panicked() {
        let limits = Limits { idle: Some(Duration::MAX), duration: Some(Duration::MAX) };
        let (client, server, ended) = relayed(limits, pending());
        tokio::time::sleep(Duration::from_secs(1_000_000)).await;
        assert!(!ended.is_finished());
        drop((client, server));
        assert_eq!(ended.await.unwrap().0, End::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_duration_and_a_cut_end_it_in_the_middle() {
        let limits = Limits { idle: None, duration: Some(Duration::from_secs(10)) };
        let (mut client, _server, ended) = relayed(limits, pending());
        for _ in 0..9 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            client.write_all(b"x").await.unwrap();
        }
        let (end, _, _, elapsed) = ended.await.unwrap();
        assert_eq!((end, elapsed.as_secs()), (End::Expired, 10));
        let (_client, _server, ended) =
            relayed(Limits::default(), tokio::time::sleep(Duration::from_secs(3)));
        let (end, _, _, elapsed) = ended.await.unwrap();
        assert_eq!((end, elapsed.as_secs()), (End::Cut, 3));
    }
}
