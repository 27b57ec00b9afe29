//! Whether another version answers as this one does (VS-P05): an extension, on for mirrors that ask for it.
//!
//! Of the requests that are mirrored a share is *compared*: the answer that the client got from the primary, and that of
//! the mirror, which is otherwise thrown away. Three things are looked at: the status, the headers of an allow-list,
//! and the body; where both bodies are JSON, by structure ([`compare`]). Bodies are kept up to a bound; one that is
//! longer is not compared.
//!
//! **Noise.** Ids, times and the order of what is chosen by chance differ between any two answers. So for a share of the
//! compared requests a second copy goes to the *primary's* cluster, and the primary is compared with itself. A path that
//! differs there about as often as it does with the mirror is noise ([`Tally::is_noise`]), once the primary was compared
//! with itself [`LEAST_BASELINES`] times; what is known fades ([`Tally::fade`]). As the second copy is a
//! second request to a service in use, only GET and HEAD are asked twice unless the policy says otherwise.
//!
//! **Off the path.** What is compared is copied while it passes to the client, up to the bound of the policy. The
//! comparison waits in the mirror's task and runs on a thread for work that blocks. Other routes have none of it.
//!
//! [`Diffs`] keeps the counts, the last differences with at most 1 KiB of each body, and, for policies that ask for it
//! ([`DiffPolicy::capture`]), the last compared requests with the answers of the primary, which can be written down
//! ([`Captured`]) and asked of another version later.

mod capture;
mod captured;
mod compare;
mod store;
mod tally;
mod trial;

pub use captured::{Captured, InvalidCapture};
pub use compare::{Answer, Difference, Kind, compare};
pub use store::{Counts, Diffs, MOST_CAPTURED, MOST_CAPTURED_BYTES, MOST_SAMPLES};
pub use tally::{LEAST_BASELINES, MOST_PATHS, Tally, Verdict};
pub(crate) use trial::{Trial, Watch, keep};

use http::{HeaderName, Method};

use crate::percentage::Percentage;

/// What is compared, and how much of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiffPolicy {
    /// The share of the mirrored requests that is compared. Default all.
    pub percentage: Percentage,
    /// The headers that are compared. Default none.
    pub headers: Vec<HeaderName>,
    /// The share of the compared requests that the primary is asked twice, to learn what is noise. Default 10 %.
    pub baseline: Percentage,
    /// Whether the primary is asked twice what is neither GET nor HEAD. Default no.
    pub baseline_any_method: bool,
    /// Whether the compared requests are kept with the answers of the primary, so that they can be asked again
    /// ([`Captured`]). Whoever may read the admin port may read them then, with their bodies. Default no.
    pub capture: bool,
    /// The most bytes of a body that are kept until it was compared. Default 64 KiB.
    pub body_bytes: usize,
}

impl Default for DiffPolicy {
    fn default() -> Self {
        Self {
            percentage: Percentage::ALWAYS,
            headers: Vec::new(),
            baseline: Percentage::from_millionths(100_000),
            baseline_any_method: false,
            capture: false,
            body_bytes: 64 * 1024,
        }
    }
}

impl DiffPolicy {
    /// Whether a request of this method may be asked twice.
    pub(crate) fn may_ask_twice(&self, method: &Method) -> bool {
        self.baseline_any_method || matches!(*method, Method::GET | Method::HEAD)
    }
}
