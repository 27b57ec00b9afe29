//! At random, by weight (DR-LB01, DR-LB09).

use rand::{Rng, RngExt as _};

use crate::endpoint::{EndpointSet, Member};

/// An endpoint by weight.
pub(super) fn pick<'e>(endpoints: &'e EndpointSet, rng: &mut impl Rng) -> Option<&'e Member> {
    if endpoints.is_empty() {
        return None;
    }
    endpoints.at_share(rng.random_range(0..endpoints.total()))
}
