//! A body that is read twice, at the pace of the first reader.
//!
//! The primary's body tells a hook of what passes, and the hook puts it where the copy finds it: the pieces are
//! shared, not copied. The primary never waits, so the copy has to keep up. What it has not read is bounded
//! ([`UNREAD`]); a copy that falls further behind is lost, and whoever receives it sees a reset and never an end. The
//! same becomes of it when the primary's body breaks off: half a request must not pass for a whole one.
//!
//! A piece costs more than its bytes: its place in the queue, and a buffer that it keeps alive. So each is charged for
//! [`PIECE`] bytes at least, and a copy leaves at most 128 pieces unread however small they are.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};
use mesh_core::{Body, BodyHook, EndOfBody, Error, ErrorKind, ResponseFlags};
use tokio::sync::Notify;

/// The most bytes that a copy leaves unread, as pieces are charged. One piece that is larger is taken when nothing else is unread: it is
/// shared with the primary, which has read it.
pub(crate) const UNREAD: usize = 64 * 1024;

/// The bytes that a piece is charged for when it has fewer.
pub(crate) const PIECE: usize = 512;

/// What a piece is charged for.
pub(crate) fn charge(piece: &Bytes) -> usize {
    piece.len().max(PIECE)
}

/// Why a copy was not made whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// It was read too slowly.
    Overflow,
    /// The primary's body broke off.
    Cancelled,
}

/// Between the body of the primary and that of its copy.
#[derive(Clone)]
pub(crate) struct Tee(Arc<Shared>);

struct Shared {
    most: usize,
    queue: Mutex<Queue>,
    lost: Notify,
}

#[derive(Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    unread: usize,
    trailers: Option<HeaderMap>,
    state: State,
    reader: Option<Waker>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Passing,
    Whole,
    Lost(Lost),
    /// Nobody reads any more.
    Unwanted,
}

impl Tee {
    /// The body once more, and `copies` copies of it, each with what tells that it was lost. A body without data has
    /// none to tell.
    pub(crate) fn split(body: Body, copies: usize, most: usize) -> (Body, Vec<(Body, Option<Self>)>) {
        if body.is_end_stream() {
            return (body, (0..copies).map(|_| (Body::empty(), None)).collect());
        }
        let length = body.size_hint().exact();
        let tees: Vec<_> = (0..copies).map(|_| Self::new(most)).collect();
        let copied =
            tees.iter().map(|tee| (Body::new(Copied { tee: tee.clone(), left: length }), Some(tee.clone())));
        let copied = copied.collect();
        (body.with_hook(Writers(tees)), copied)
    }

    fn new(most: usize) -> Self {
        Self(Arc::new(Shared { most, queue: Mutex::default(), lost: Notify::new() }))
    }

    /// Completes when the copy is lost.
    pub(crate) async fn lost(&self) -> Lost {
        loop {
            let notified = self.0.lost.notified();
            if let State::Lost(why) = self.lock().state {
                return why;
            }
            notified.await;
        }
    }

    /// Changes what is between the two, and wakes the reader. Both are tasks of one worker in a proxy.
    fn change(&self, change: impl FnOnce(&mut Queue)) {
        let (reader, lost) = {
            let mut queue = self.lock();
            if queue.state != State::Passing {
                return;
            }
            change(&mut queue);
            let lost = matches!(queue.state, State::Lost(_));
            if lost {
                queue.pieces = VecDeque::new();
            }
            (queue.reader.take(), lost)
        };
        // Whoever waits for the loss has to hear of it before the reader does.
        if lost {
            self.0.lost.notify_one();
        }
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    fn push(&self, data: &Bytes) {
        let most = self.0.most;
        self.change(|queue| {
            let unread = queue.unread.saturating_add(charge(data));
            if queue.unread > 0 && unread > most {
                queue.state = State::Lost(Lost::Overflow);
            } else {
                queue.unread = unread;
                queue.pieces.push_back(data.clone());
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Tee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queue = self.lock();
        f.debug_struct("Tee").field("unread", &queue.unread).field("state", &queue.state).finish()
    }
}

/// What the primary's body tells.
struct Writers(Vec<Tee>);

impl BodyHook for Writers {
    fn on_data(&mut self, data: &Bytes) {
        if !data.is_empty() {
            self.0.iter().for_each(|tee| tee.push(data));
        }
    }

    fn on_trailers(&mut self, trailers: &mut HeaderMap) {
        for tee in &self.0 {
            tee.change(|queue| queue.trailers = Some(trailers.clone()));
        }
    }

    fn on_end(&mut self, end: EndOfBody<'_>) {
        let state = match end {
            EndOfBody::Complete => State::Whole,
            _ => State::Lost(Lost::Cancelled),
        };
        for tee in &self.0 {
            tee.change(|queue| queue.state = state);
        }
    }
}

/// The body of the copy.
struct Copied {
    tee: Tee,
    /// What is still to come, when the length is known.
    left: Option<u64>,
}

impl HttpBody for Copied {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        // Cloned and dropped outside the lock: whoever is the last to hold a task ends it, and with it this body.
        let mut reader = None;
        let frame = loop {
            let mut queue = self.tee.lock();
            match (queue.state, queue.pieces.pop_front()) {
                (State::Lost(_), _) => return Poll::Ready(Some(Err(broken_off()))),
                (_, Some(piece)) => {
                    queue.unread = queue.unread.saturating_sub(charge(&piece));
                    break Frame::data(piece);
                }
                (State::Whole, None) => match queue.trailers.take() {
                    Some(trailers) => break Frame::trailers(trailers),
                    None => return Poll::Ready(None),
                },
                (State::Passing | State::Unwanted, None) => {
                    if queue.reader.as_ref().is_some_and(|reader| reader.will_wake(cx.waker())) {
                        return Poll::Pending;
                    }
                    if reader.is_some() {
                        std::mem::swap(&mut queue.reader, &mut reader);
                        return Poll::Pending;
                    }
                }
            }
            drop(queue);
            reader = Some(cx.waker().clone());
        };
        if let (Some(left), Some(data)) = (&mut self.left, frame.data_ref()) {
            *left = left.saturating_sub(data.len() as u64);
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        let queue = self.tee.lock();
        queue.state == State::Whole && queue.pieces.is_empty() && queue.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        let mut queue = self.tee.lock();
        queue.pieces = VecDeque::new();
        if queue.state == State::Passing {
            queue.state = State::Unwanted;
        }
    }
}

/// It is not the upstream's fault.
fn broken_off() -> Error {
    Error::new(
        ErrorKind::DownstreamReset,
        StatusCode::BAD_REQUEST,
        ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION,
        "mirror_body_broken_off",
    )
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use http_body_util::BodyExt as _;
    use http_body_util::channel::Channel;
    use tokio::task::yield_now;

    use super::*;

    type Feed = http_body_util::channel::Sender<Bytes, Error>;

    /// A body that is fed by hand, with its copies.
    fn fed(copies: usize) -> (Feed, Body, Vec<(Body, Option<Tee>)>) {
        let (feed, body) = Channel::new(64);
        let (primary, copied) = Tee::split(Body::new(body), copies, UNREAD);
        (feed, primary, copied)
    }

    async fn pass(primary: &mut Body) {
        primary.frame().await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn vs_p03_every_copy_has_the_same_bytes_and_trailers() {
        let (mut feed, mut primary, copied) = fed(2);
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        let readers: Vec<_> = copied.into_iter().map(|(body, _)| tokio::spawn(body.collect())).collect();
        for piece in ["one ", "", "two"] {
            feed.send_data(Bytes::from(piece)).await.unwrap();
            pass(&mut primary).await;
        }
        feed.send_trailers(trailers.clone()).await.unwrap();
        pass(&mut primary).await;
        drop(feed);
        assert!(primary.frame().await.is_none());
        for reader in readers {
            let collected = reader.await.unwrap().unwrap();
            assert_eq!(collected.trailers(), Some(&trailers));
            assert_eq!(collected.to_bytes(), "one two");
        }
    }

    #[tokio::test]
    async fn vs_p03_a_copy_that_falls_behind_is_lost_and_the_others_are_not() {
        let (mut feed, mut primary, mut copied) = fed(2);
        let piece = Bytes::from(vec![7; UNREAD / 4]);
        let (mut slow, lost) = copied.remove(0);
        let (mut quick, whole) = copied.remove(0);
        for _ in 0..4 {
            feed.send_data(piece.clone()).await.unwrap();
            pass(&mut primary).await;
            quick.frame().await.unwrap().unwrap();
        }
        let lost = lost.unwrap();
        assert_eq!(lost.lock().state, State::Passing, "as much as is allowed");
        feed.send_data(Bytes::from_static(b"1")).await.unwrap();
        pass(&mut primary).await;
        assert_eq!(lost.lost().await, Lost::Overflow);
        assert!(lost.lock().pieces.is_empty(), "what nobody will read is let go");
        assert!(slow.frame().await.unwrap().is_err());
        assert_eq!(quick.frame().await.unwrap().unwrap().into_data().unwrap(), "1");
        assert_eq!(whole.unwrap().lock().state, State::Passing);
    }

    #[tokio::test]
    async fn bug_pieces_of_one_byte_cost_thirty_times_the_bound() {
        let (mut feed, mut primary, mut copied) = fed(1);
        let (mut copy, tee) = copied.remove(0);
        let tee = tee.unwrap();
        for read in [true, false] {
            for _ in 0..UNREAD / PIECE {
                feed.send_data(Bytes::from_static(b"1")).await.unwrap();
                pass(&mut primary).await;
            }
            assert_eq!(tee.lock().state, State::Passing, "as many as are allowed");
            while read && tee.lock().unread > 0 {
                copy.frame().await.unwrap().unwrap();
            }
        }
        feed.send_data(Bytes::from_static(b"1")).await.unwrap();
        pass(&mut primary).await;
        assert_eq!(tee.lock().state, State::Lost(Lost::Overflow));
    }

    #[tokio::test]
    async fn vs_p03_a_primary_that_breaks_off_leaves_no_whole_copy() {
        for known in [false, true] {
            let (mut feed, mut primary, mut copied) = fed(1);
            let (mut copy, tee) = copied.remove(0);
            feed.send_data(Bytes::from_static(b"half")).await.unwrap();
            pass(&mut primary).await;
            if known {
                feed.abort(broken_off());
                assert!(primary.frame().await.unwrap().is_err());
            } else {
                drop(primary);
            }
            assert_eq!(tee.unwrap().lost().await, Lost::Cancelled);
            assert!(copy.frame().await.unwrap().is_err(), "what was not read yet is not given out either");
        }
    }

    #[tokio::test]
    async fn vs_p03_a_reader_that_waits_hears_of_the_loss() {
        let (_feed, primary, mut copied) = fed(1);
        let (mut copy, _) = copied.remove(0);
        let waiting = tokio::spawn(async move { copy.frame().await.unwrap().is_err() });
        yield_now().await;
        drop(primary);
        assert!(waiting.await.unwrap());
    }

    #[tokio::test]
    async fn vs_p03_the_length_is_kept_and_nothing_is_kept_for_nobody() {
        let (body, mut copied) = Tee::split(Body::full("hello"), 1, UNREAD);
        let (mut copy, tee) = copied.remove(0);
        assert_eq!(copy.size_hint().exact(), Some(5));
        assert!(!copy.is_end_stream());
        body.collect().await.unwrap();
        copy.frame().await.unwrap().unwrap();
        assert_eq!((copy.size_hint().exact(), copy.is_end_stream()), (Some(0), true));
        assert!(poll_fn(|cx| Pin::new(&mut copy).poll_frame(cx)).await.is_none());
        assert_eq!(tee.unwrap().lock().state, State::Whole);

        let (_, copied) = Tee::split(Body::empty(), 2, UNREAD);
        assert!(copied.iter().all(|(body, tee)| body.is_end_stream() && tee.is_none()));

        let (body, mut copied) = Tee::split(Body::full(vec![0; UNREAD * 2]), 1, UNREAD);
        let (copy, tee) = copied.remove(0);
        drop(copy);
        body.collect().await.unwrap();
        let tee = tee.unwrap();
        let queue = tee.lock();
        assert_eq!((queue.state, queue.unread), (State::Unwanted, 0));
    }

    #[tokio::test]
    async fn vs_p03_a_large_piece_passes_when_all_before_it_was_read() {
        let (body, mut copied) = Tee::split(Body::full(vec![1; UNREAD * 4]), 1, UNREAD);
        body.collect().await.unwrap();
        assert_eq!(copied.remove(0).0.collect().await.unwrap().to_bytes().len(), UNREAD * 4);
    }
}
