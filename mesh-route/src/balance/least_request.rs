//! The less loaded of two random ones (DR-LB01): requests in flight, relative to the weight.

use rand::Rng;

use super::random;
use crate::endpoint::{EndpointSet, Member};

/// The less loaded of two that are drawn by weight.
pub(super) fn pick<'e>(endpoints: &'e EndpointSet, rng: &mut impl Rng) -> Option<&'e Member> {
    let first = random::pick(endpoints, rng)?;
    let second = random::pick(endpoints, rng)?;
    // Without dividing: a/v > b/w is a*w > b*v.
    let load = |member: &Member, weight: u32| u64::from(member.endpoint.in_flight()) * u64::from(weight);
    Some(if load(first, second.weight) > load(second, first.weight) { second } else { first })
}
