//! Copies of requests for another version, of which its users notice nothing (VS-P01 … VS-P04).
//!
//! **Fire and forget.** A copy is made where the request has got its last form: after the header operations and the
//! rewrite of its destination, before its first try. It runs in a task of its own on the same worker, and the request
//! goes on without looking back. The mirror's answer is read and thrown away, up to a mebibyte, so that its connection
//! can be kept; a longer one is cut.
//!
//! **As any request of its cluster.** A copy takes its place in the limits of the mirror's cluster and tells its
//! outlier detection, but it is never tried again, and of the primary it changes no counter. It may take as long as the
//! route allows, and a minute where the route allows everything, both from the whole request on. How many there are at
//! a time is bounded by [`Mirroring`]: what a hung mirror holds is a number, not a leak. What is left when a process
//! ends goes with it.
//!
//! **The same bytes.** The body is teed while it streams to the primary. A mirror that leaves more than 64 KiB unread
//! loses its copy; a primary that breaks off takes its copies along. Upgrades are not mirrored.
//!
//! **Nobody copies a copy.** Copies are marked ([`mesh_core::mirrored`]), so mirrors that mirror to each other stop.
//! They are sampled by no trace (VS-P02): what their headers say of sampling is taken back, and
//! [`is_mirror`](mesh_core::RequestContext::is_mirror) says so to telemetry.

mod count;
mod layer;
mod send;
mod tee;
mod unsampled;

use std::sync::Arc;

use http::{HeaderValue, Request};
use mesh_core::{ClusterName, ConnInfo};
use rand::Rng;

pub use count::{MOST_IN_FLIGHT, MirrorCounters, MirrorOutcome, Mirroring};
pub use layer::{MirrorLayer, MirrorRequests};
pub(crate) use send::{discard, start};
pub(crate) use tee::charge;

use crate::cluster::Cluster;
use crate::diff::DiffPolicy;
use crate::forward::set_authority;
use crate::hash_policy::{HashPolicy, xxhash};
use crate::headers::HeaderOps;
use crate::percentage::Percentage;
use crate::request_view::RequestView;

/// A destination that gets copies of the requests of a route.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// The cluster; `None` is one that is not known, to which nothing is copied.
    pub cluster: Option<Arc<Cluster>>,
    /// Its name, known or not.
    pub name: ClusterName,
    /// The share of the requests that is copied, drawn for each mirror by itself. Default all.
    pub percentage: Percentage,
    /// What decides whether a request is one of the share: the same key always gives the same answer, and a larger share
    /// takes the keys of a smaller one too. Requests without it are drawn. `None`, the default, draws every request.
    pub sample_by: Option<HashPolicy>,
    /// The authority of the copies. Default that of the request.
    pub authority: MirrorAuthority,
    /// Operations on the headers of the copies, after all others. Default none.
    pub request_headers: HeaderOps,
    /// Whether and how its answers are compared with those of the primary (VS-P05). Default they are thrown away.
    pub diff: Option<Arc<DiffPolicy>>,
}

/// The authority of a copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum MirrorAuthority {
    /// That of the request as the primary gets it, as Istio since 1.28.
    #[default]
    Keep,
    /// `-shadow` at the end of its host, `foo:80` is `foo-shadow:80`, as Istio before (VS-P03). An IPv6 address stays as
    /// it is.
    Shadow,
    /// Another.
    Replace(HeaderValue),
}

impl Mirror {
    /// Copies every request to this cluster.
    #[must_use]
    pub fn new(cluster: Arc<Cluster>) -> Self {
        let name = cluster.name().clone();
        Self { cluster: Some(cluster), ..Self::unknown(name) }
    }

    /// A cluster that is not known: nothing is copied, and nobody is told (VS-P02).
    #[must_use]
    pub fn unknown(name: ClusterName) -> Self {
        Self {
            cluster: None,
            name,
            percentage: Percentage::ALWAYS,
            sample_by: None,
            authority: MirrorAuthority::Keep,
            request_headers: HeaderOps::default(),
            diff: None,
        }
    }

    /// Copies this share.
    #[must_use]
    pub fn percentage(mut self, percentage: Percentage) -> Self {
        self.percentage = percentage;
        self
    }

    /// Copies all requests of a key or none.
    #[must_use]
    pub fn sample_by(mut self, key: HashPolicy) -> Self {
        self.sample_by = Some(key);
        self
    }

    /// Changes the authority of the copies.
    #[must_use]
    pub fn authority(mut self, authority: MirrorAuthority) -> Self {
        self.authority = authority;
        self
    }

    /// Changes the headers of the copies.
    #[must_use]
    pub fn request_headers(mut self, operations: HeaderOps) -> Self {
        self.request_headers = operations;
        self
    }

    /// Compares the answers of the mirror with those of the primary ([`diff`](crate::diff)).
    #[must_use]
    pub fn diff(mut self, policy: DiffPolicy) -> Self {
        self.diff = Some(Arc::new(policy));
        self
    }

    /// Whether this request is copied: by its key if it has one, else by a draw.
    pub fn draw(&self, request: &RequestView<'_>, conn: &ConnInfo, rng: &mut impl Rng) -> bool {
        match self.sample_by.as_ref().and_then(|key| key.hash(request, conn)) {
            // With the name in it, so that two mirrors do not always copy the same users.
            Some(key) => self.percentage.takes(xxhash(self.name.as_str().as_bytes(), key)),
            None => self.percentage.draw(rng),
        }
    }
}

impl MirrorAuthority {
    fn apply<B>(&self, request: &mut Request<B>) {
        let authority = match self {
            Self::Keep => return,
            Self::Shadow => match shadow(request) {
                Some(authority) => authority,
                None => return,
            },
            Self::Replace(authority) => authority.clone(),
        };
        set_authority(request, authority);
    }
}

/// The authority of a request with the suffix.
fn shadow<B>(request: &Request<B>) -> Option<HeaderValue> {
    let authority = match request.uri().authority() {
        Some(authority) => authority.as_str(),
        None => request.headers().get(http::header::HOST)?.to_str().ok()?,
    };
    if authority.starts_with('[') {
        return None;
    }
    let shadowed = match authority.split_once(':') {
        Some((host, port)) => format!("{host}-shadow:{port}"),
        None => format!("{authority}-shadow"),
    };
    HeaderValue::try_from(shadowed).ok()
}

/// The head of a copy.
fn copy_of<B>(request: &Request<B>) -> Request<()> {
    let mut copy = Request::new(());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vs_p03_the_suffix_stands_before_the_port() {
        let shadowed = |host: &str| {
            let mut request = Request::get("/").header("host", host).body(()).unwrap();
            MirrorAuthority::Shadow.apply(&mut request);
            request.headers()["host"].to_str().unwrap().to_owned()
        };
        for (host, expected) in [
            ("foo", "foo-shadow"),
            ("foo:80", "foo-shadow:80"),
            ("foo.bar.svc.cluster.local:9080", "foo.bar.svc.cluster.local-shadow:9080"),
            ("10.0.0.1:80", "10.0.0.1-shadow:80"),
            ("[::1]:80", "[::1]:80"),
        ] {
            assert_eq!(shadowed(host), expected);
        }
        let mut request = Request::get("http://foo:80/a?b").body(()).unwrap();
        MirrorAuthority::Shadow.apply(&mut request);
        assert_eq!(
            (request.uri().to_string().as_str(), &request.headers()["host"]),
            ("/a?b", &"foo-shadow:80".parse::<HeaderValue>().unwrap())
        );
    }
}
