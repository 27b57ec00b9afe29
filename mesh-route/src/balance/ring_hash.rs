//! A ring (DR-LB04): Ketama with Envoy's sizes and hash, xxHash64.
//!
//! Each endpoint stands at many places of the circle of numbers, as many as its weight deserves; a key belongs to the
//! first place at or after it. While one endpoint is out only its keys move, to those that stand behind its places. When
//! it leaves the set, the ring keeps its size, so that others get its places, and about as many keys move again: that is
//! the price of Envoy's sizes; Maglev's table moves fewer.

use crate::endpoint::{Endpoint, EndpointSet};
use std::fmt::Write as _;
use std::sync::Arc;

use crate::hash_policy::xxhash;

/// `minimumRingSize` where none is given.
pub const MINIMUM_SIZE: u64 = 1024;

/// Most places on a ring. Envoy's.
pub const MAXIMUM_SIZE: u64 = 8 * 1024 * 1024;

/// The places on the circle, in order, each with the index of its endpoint.
#[derive(Debug)]
pub(super) struct Ring(Box<[(u64, u32)]>);

impl Ring {
    pub(super) fn new(endpoints: &EndpointSet, minimum_size: u64) -> Self {
        let Some(least) = endpoints.members().map(|member| member.weight).min() else {
            return Self(Box::default());
        };
        // The lightest endpoint has a whole number of places, and all together at least the minimum.
        let lightest = f64::from(least) / endpoints.total() as f64;
        let size = ((lightest * minimum_size as f64).ceil() / lightest).min(MAXIMUM_SIZE as f64);
        let mut places = Vec::with_capacity(size as usize + 1);
        let mut key = String::new();
        let mut wanted = 0.0;
        for (index, member) in (0_u32..).zip(endpoints.members()) {
            wanted += size * f64::from(member.weight) / endpoints.total() as f64;
            let mut replica = 0_u32;
            while (places.len() as f64) < wanted {
                key.clear();
                let _ = write!(key, "{}_{replica}", member.endpoint.addr());
                places.push((xxhash(key.as_bytes(), 0), index));
                replica += 1;
            }
        }
        places.sort_unstable();
        Self(places.into_boxed_slice())
    }

    /// The endpoint of a key; where `wanted` refuses it, the next on the ring.
    pub(super) fn pick<'e>(
        &self,
        hash: u64,
        endpoints: &'e EndpointSet,
        wanted: impl Fn(&Endpoint) -> bool,
    ) -> Option<&'e Arc<Endpoint>> {
        let from = self.0.partition_point(|(place, _)| *place < hash);
        let (before, after) = self.0.split_at(from);
        after
            .iter()
            .chain(before)
            .filter_map(|(_, index)| Some(&endpoints.at(*index as usize)?.endpoint))
            .find(|endpoint| wanted(endpoint))
    }
}
