//! What is kept of a request that may have to be sent again.
//!
//! A body is kept as the pieces that passed, which are shared with the first try. They are bounded as those of a
//! mirrored copy are: a piece is charged for 512 bytes at least, as it costs more than its bytes. So of a body that
//! comes in small pieces at most 128 are kept; one of more is not sent again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Uri, Version};
use http_body::{Body as _, Frame};
use mesh_core::{Body, BodyHook, EndOfBody, Error};

use crate::mirror::charge;

/// The largest body that is kept, as its pieces are charged.
pub(crate) const MOST_BYTES: usize = 64 * 1024;

/// A copy of a request: its head, and what has passed of its body.
#[derive(Debug)]
pub(crate) struct Replay {
    method: Method,
    uri: Uri,
    version: Version,
    headers: HeaderMap,
    /// `None` for a request without a body.
    body: Option<Record>,
}

#[derive(Clone, Debug, Default)]
struct Record(Arc<Mutex<Recorded>>);

#[derive(Debug, Default)]
struct Recorded {
    pieces: Vec<Bytes>,
    bytes: usize,
    /// What the pieces are charged for.
    charged: usize,
    trailers: Option<HeaderMap>,
    state: State,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Passing,
    Whole,
    /// Too large, or broken off.
    Lost,
}

impl Replay {
    /// Copies the head, and has the body recorded while it passes.
    pub(crate) fn of(request: &mut Request<Body>) -> Self {
        let body = (!request.body().is_end_stream()).then(|| {
            let record = Record::default();
            let body = std::mem::take(request.body_mut());
            if body.size_hint().lower() > MOST_BYTES as u64 {
                record.lock().lose();
                *request.body_mut() = body;
            } else if let Some(data) = body.as_full() {
                // It is all there, so it need not pass first.
                record.lock().keep(data.clone());
                *request.body_mut() = body;
            } else {
                *request.body_mut() = body.with_hook(record.clone());
            }
            record
        });
        Self { body, ..Self::of_head(request) }
    }

    /// Copies the head alone.
    pub(crate) fn of_head<B>(request: &Request<B>) -> Self {
        Self {
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            headers: request.headers().clone(),
            body: None,
        }
    }

    /// The request once more; `None` when its body was not kept whole.
    pub(crate) fn request(&self) -> Option<Request<Body>> {
        Some(self.with_body(match &self.body {
            None => Body::empty(),
            Some(record) => record.lock().replayed()?,
        }))
    }

    /// The head once more, with this body.
    pub(crate) fn with_body<B>(&self, body: B) -> Request<B> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = self.version;
        *request.headers_mut() = self.headers.clone();
        request
    }
}

impl Record {
    fn lock(&self) -> MutexGuard<'_, Recorded> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Recorded {
    fn lose(&mut self) {
        self.state = State::Lost;
        self.pieces = Vec::new();
    }

    fn keep(&mut self, whole: Bytes) {
        self.bytes = whole.len();
        self.pieces.push(whole);
        self.state = State::Whole;
    }

    fn replayed(&self) -> Option<Body> {
        if self.state != State::Whole {
            return None;
        }
        if let ([piece], None) = (self.pieces.as_slice(), &self.trailers) {
            return Some(Body::full(piece.clone()));
        }
        let frames = self.pieces.iter().cloned().map(Frame::data);
        let frames: Vec<_> = frames.chain(self.trailers.clone().map(Frame::trailers)).collect();
        Some(Body::new(Frames { left: self.bytes as u64, frames: frames.into_iter() }))
    }
}

impl BodyHook for Record {
    fn on_data(&mut self, data: &Bytes) {
        let mut recorded = self.lock();
        if recorded.state != State::Passing || data.is_empty() {
            return;
        }
        let charged = recorded.charged.saturating_add(charge(data));
        if charged > MOST_BYTES {
            recorded.lose();
        } else {
            recorded.bytes += data.len();
            recorded.charged = charged;
            recorded.pieces.push(data.clone());
        }
    }

    fn on_trailers(&mut self, trailers: &mut HeaderMap) {
        self.lock().trailers = Some(trailers.clone());
    }

    fn on_end(&mut self, end: EndOfBody<'_>) {
        let mut recorded = self.lock();
        match end {
            EndOfBody::Complete if recorded.state == State::Passing => recorded.state = State::Whole,
            EndOfBody::Complete => {}
            _ => recorded.lose(),
        }
    }
}

/// Frames that are there already.
struct Frames {
    frames: std::vec::IntoIter<Frame<Bytes>>,
    left: u64,
}

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Error>>> {
        let frame = self.frames.next();
        let bytes = frame.as_ref().and_then(Frame::data_ref).map_or(0, Bytes::len);
        self.left = self.left.saturating_sub(bytes as u64);
        std::task::Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.frames.as_slice().is_empty()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.left)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    fn streamed(frames: Vec<Frame<Bytes>>) -> Body {
        let left = frames.iter().filter_map(Frame::data_ref).map(Bytes::len).sum::<usize>() as u64;
        Body::new(Frames { frames: frames.into_iter(), left })
    }

    #[tokio::test]
    async fn vs_y08_what_passed_whole_is_replayed_with_its_trailers() {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", "3".parse().unwrap());
        let frames = || {
            vec![
                Frame::data(Bytes::from_static(b"ab")),
                Frame::data(Bytes::from_static(b"c")),
                Frame::trailers(trailers.clone()),
            ]
        };
        let mut request = Request::post("http://a/b?c").header("x-a", "1").body(streamed(frames())).unwrap();
        let replay = Replay::of(&mut request);
        assert!(replay.request().is_none(), "nothing has passed yet");
        let first = request.into_body().collect().await.unwrap();
        for _ in 0..2 {
            let again = replay.request().unwrap();
            assert_eq!((again.method(), again.uri().to_string()), (&Method::POST, "http://a/b?c".to_owned()));
            assert_eq!(again.headers()["x-a"], "1");
            let collected = again.into_body().collect().await.unwrap();
            assert_eq!(collected.trailers(), first.trailers());
            assert_eq!(collected.to_bytes(), "abc");
        }
    }

    #[tokio::test]
    async fn b3_too_large_and_broken_bodies_are_not_replayed() {
        let piece = || Frame::data(Bytes::from(vec![0; MOST_BYTES]));
        let mut request = Request::new(streamed(vec![piece(), piece()]));
        let replay = Replay::of(&mut request);
        request.into_body().collect().await.unwrap();
        assert!(replay.request().is_none());
        let mut request = Request::new(Body::full(vec![0; MOST_BYTES]));
        let replay = Replay::of(&mut request);
        request.into_body().collect().await.unwrap();
        assert!(replay.request().is_some(), "as much as is allowed");
        let mut request = Request::new(streamed(vec![Frame::data(Bytes::from_static(b"abc"))]));
        let replay = Replay::of(&mut request);
        drop(request);
        assert!(replay.request().is_none(), "it was dropped before it had passed");
    }

    #[tokio::test]
    async fn bug_pieces_of_one_byte_cost_thirty_times_the_bound() {
        let most = MOST_BYTES / charge(&Bytes::new());
        for (pieces, kept) in [(most, true), (most + 1, false)] {
            let frames = (0..pieces).map(|_| Frame::data(Bytes::from_static(b"1"))).collect();
            let mut request = Request::new(streamed(frames));
            let replay = Replay::of(&mut request);
            request.into_body().collect().await.unwrap();
            let again = replay.request();
            assert_eq!(again.is_some(), kept, "{pieces} pieces");
            if let Some(again) = again {
                assert_eq!(again.body().size_hint().exact(), Some(pieces as u64));
            }
        }
    }

    #[tokio::test]
    async fn bug_a_body_of_one_piece_was_lost_when_its_connection_died_before_it_was_read() {
        let mut request = Request::new(Body::full("abc"));
        let replay = Replay::of(&mut request);
        drop(request);
        let again = replay.request().unwrap();
        assert_eq!(again.into_body().collect().await.unwrap().to_bytes(), "abc");
    }
}
