//! POST `/quitquitquit` and `/drain`.
//!
//! A request only asks: [`Controls`] tells the loop that also hears the signals, once the answer is written.

use std::sync::Arc;

use http::header::ALLOW;
use http::request::Parts;
use http::{HeaderValue, Method, Response, StatusCode};
use mesh_core::{Body, BodyHook, EndOfBody, RequestContext};
use tokio::sync::Notify;

use super::reply;

/// What the status port asks of the process.
#[derive(Clone, Debug, Default)]
pub struct Controls {
    /// To drain and end.
    pub quit: Arc<Notify>,
    /// To drain and stay.
    pub drain: Arc<Notify>,
}

impl Controls {
    /// The answer to `/quitquitquit` and `/drain`; `None` for every other path.
    #[must_use]
    pub fn answer(&self, head: &Parts) -> Option<Response<Body>> {
        let asked = match head.uri.path() {
            "/quitquitquit" => &self.quit,
            "/drain" => &self.drain,
            _ => return None,
        };
        let context = head.extensions.get::<RequestContext>();
        if !context.is_some_and(|cx| cx.conn().peer.ip().to_canonical().is_loopback()) {
            return Some(reply(StatusCode::FORBIDDEN, "only requests from localhost are allowed\n"));
        }
        if head.method != Method::POST {
            let mut response = reply(StatusCode::METHOD_NOT_ALLOWED, "this is asked for with POST\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
            return Some(response);
        }
        tracing::info!("{} was asked for", head.uri.path());
        // The process may end at once, so nothing is asked before the answer is on its way.
        Some(reply(StatusCode::OK, "OK").map(|body| body.with_hook(Ask(Arc::clone(asked)))))
    }
}

/// Asks when the body ends, be it read or not.
struct Ask(Arc<Notify>);

impl BodyHook for Ask {
    fn on_end(&mut self, _end: EndOfBody<'_>) {
        self.0.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use http::Request;
    use mesh_core::{ConnInfo, Direction};

    use super::*;

    #[test]
    fn pt_01_only_this_host_may_end_the_process() {
        let controls = Controls::default();
        let status = |peer: &str, path: &str| {
            let mut conn = ConnInfo::unknown(Direction::Inbound);
            conn.peer = peer.parse().unwrap();
            let mut request = Request::post(path).body(()).unwrap();
            let context = RequestContext::new(Arc::new(conn), None, mesh_core::clock::now());
            request.extensions_mut().insert(context);
            controls.answer(&request.into_parts().0).unwrap().status()
        };
        for path in ["/quitquitquit", "/drain"] {
            for (peer, expected) in [
                ("127.0.0.1:1", StatusCode::OK),
                ("[::1]:1", StatusCode::OK),
                ("[::ffff:127.0.0.1]:1", StatusCode::OK),
                ("10.0.0.1:1", StatusCode::FORBIDDEN),
                ("[2001:db8::1]:1", StatusCode::FORBIDDEN),
            ] {
                assert_eq!(status(peer, path), expected, "{peer} {path}");
            }
        }
    }
}
