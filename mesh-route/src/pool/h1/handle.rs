//! hyper's handle of a connection, in a place where the connection finds it when it ends.
//!
//! In a runtime of several threads a request may be handed over just when its connection ends on another. hyper then
//! leaves it between the two, and gives it back only when the handle is dropped; but whoever waits for the answer holds
//! the handle, for the next request. So it is lent while a request is under way, and the end of the connection drops it.

use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::SendRequest;
use mesh_core::Body;

use crate::pool::Handed;

/// The handle of a connection.
#[derive(Debug)]
pub(super) struct Handle {
    /// There between requests.
    sender: Option<SendRequest<Body>>,
    /// Where it is while a request is under way.
    lent: Arc<Lent>,
}

/// What the connection looks into when it ends.
#[derive(Debug, Default)]
struct Lent(Mutex<State>);

/// Held by what drives the connection: with it, the connection has ended.
pub(super) struct End(Arc<Lent>);

#[derive(Debug, Default)]
enum State {
    #[default]
    Nothing,
    Sender(SendRequest<Body>),
    Ended,
}

impl Lent {
    fn lend(&self, sender: SendRequest<Body>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, State::Ended) {
            // Dropped outside the lock: a request may come back by it.
            drop(state);
            drop(sender);
        } else {
            *state = State::Sender(sender);
        }
    }

    /// What is there; nothing is left but the end.
    fn take(&self) -> Option<SendRequest<Body>> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::take(&mut *state) {
            State::Sender(sender) => Some(sender),
            State::Nothing => None,
            State::Ended => {
                *state = State::Ended;
                None
            }
        }
    }

    fn end(&self) -> State {
        std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), State::Ended)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // A request that was left comes back: by this, or as soon as the handle is lent.
        drop(self.0.end());
    }
}

impl Handle {
    pub(super) fn new(sender: SendRequest<Body>) -> (Self, End) {
        let lent = Arc::<Lent>::default();
        (Self { sender: Some(sender), lent: Arc::clone(&lent) }, End(lent))
    }

    /// Whether it takes no more requests. One that is lent takes none either.
    pub(super) fn is_closed(&self) -> bool {
        self.sender.as_ref().is_none_or(SendRequest::is_closed)
    }

    /// Whether it takes a request now.
    pub(super) fn is_ready(&self) -> bool {
        self.sender.as_ref().is_some_and(SendRequest::is_ready)
    }

    /// Ready when it takes a request; false when it takes no more.
    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let Some(sender) = &mut self.sender else { return Poll::Ready(false) };
        sender.poll_ready(cx).map(|ready| ready.is_ok())
    }

    /// Hands the request over, now; the future is that of its response. Called once until it is taken back; again, there
    /// is nothing to wait for.
    pub(super) fn send(
        &mut self,
        request: Request<Body>,
    ) -> impl Future<Output = Result<Response<Incoming>, TrySendError<Request<Body>>>> + use<> {
        let sending = self.sender.take().map(|mut sender| {
            let sending = sender.try_send_request(request);
            self.lent.lend(sender);
            sending
        });
        Handed(sending)
    }

    /// Takes it back after a request; whether it takes more.
    pub(super) fn take_back(&mut self) -> bool {
        if self.sender.is_none() {
            self.sender = self.lent.take();
        }
        !self.is_closed()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // The connection holds the place where it is lent, and is to end without it.
        drop(self.lent.take());
    }
}

#[cfg(test)]
mod tests {
    use hyper::client::conn::http1;
    use hyper_util::rt::TokioIo;
    use tokio::io::DuplexStream;

    use super::*;

    type Connection = http1::Connection<TokioIo<DuplexStream>, Body>;

    /// A handle whose connection is not driven, and the other end of it.
    async fn handle() -> (Handle, End, Connection, DuplexStream) {
        let (client, server) = tokio::io::duplex(1024);
        let (sender, connection) = http1::handshake(TokioIo::new(client)).await.unwrap();
        let (handle, end) = Handle::new(sender);
        (handle, end, connection, server)
    }

    fn kept(lent: &Lent) -> &'static str {
        match &*lent.0.lock().unwrap() {
            State::Nothing => "nothing",
            State::Sender(_) => "a sender",
            State::Ended => "the end",
        }
    }

    #[tokio::test]
    async fn a_handle_is_lent_while_a_request_is_under_way() {
        let (mut handle, _end, _connection, _server) = handle().await;
        assert_eq!((kept(&handle.lent), handle.is_closed()), ("nothing", false));
        let sending = handle.send(Request::new(Body::empty()));
        assert_eq!((kept(&handle.lent), handle.is_closed(), handle.is_ready()), ("a sender", true, false));
        assert!(handle.take_back());
        assert_eq!((kept(&handle.lent), handle.is_closed()), ("nothing", false));
        assert!(handle.take_back(), "again, it is there already");
        drop(sending);
    }

    #[tokio::test]
    async fn a_handle_that_is_lent_after_the_end_of_its_connection_is_dropped_and_its_request_comes_back() {
        let (mut handle, end, connection, _server) = handle().await;
        drop(end);
        // What hyper has taken it leaves between the two: the sender is all that holds it.
        let sending = handle.send(Request::get("/left").body(Body::empty()).unwrap());
        assert_eq!(kept(&handle.lent), "the end", "it is not kept");
        drop(connection);
        let mut error = sending.await.unwrap_err();
        assert_eq!(error.take_message().unwrap().uri(), "/left");
        assert!(!handle.take_back() && !handle.take_back(), "nor given back");
        assert_eq!(kept(&handle.lent), "the end");
    }

    #[tokio::test]
    async fn a_connection_that_ends_before_its_handle_is_taken_back_drops_it() {
        let (mut handle, end, connection, _server) = handle().await;
        let sending = handle.send(Request::get("/left").body(Body::empty()).unwrap());
        assert_eq!(kept(&handle.lent), "a sender");
        drop(end);
        assert_eq!(kept(&handle.lent), "the end");
        drop(connection);
        assert!(sending.await.unwrap_err().take_message().is_some());
        assert!(!handle.take_back() && handle.is_closed());
        assert_eq!(kept(&handle.lent), "the end", "taking it back does not undo it");
    }

    #[tokio::test]
    async fn a_handle_that_is_dropped_lets_its_connection_end() {
        let (mut handle, _end, connection, _server) = handle().await;
        let sending = handle.send(Request::new(Body::empty()));
        drop((handle, sending));
        // Without a sender there is nothing to wait for: the request was cancelled before it was written.
        connection.await.unwrap();
    }
}
