//! Maglev's table (DR-LB04), section 3.4 of the Maglev paper, with weights as Envoy has them.
//!
//! A key is looked up with one division. Endpoints fill the table in turns, each by its own permutation of the places.
//! The table holds every endpoint, those that are ejected too: a key whose endpoint is out is hashed again until it finds
//! one that is in, so that only the keys of that endpoint move, fewer than if the table were filled anew.

use crate::endpoint::{Endpoint, EndpointSet};
use std::sync::Arc;

use crate::hash_policy::xxhash;

/// `tableSize` where none is given.
pub const TABLE_SIZE: u32 = 65_537;

/// Draws for a key whose endpoint is out, before the table is walked through.
const DRAWS: u64 = 32;

/// The index of the endpoint at each place.
#[derive(Debug)]
pub(super) struct Maglev(Box<[u32]>);

struct Filler {
    key: String,
    index: u32,
    offset: u64,
    skip: u64,
    next: u64,
    weight: f64,
    target: f64,
}

impl Maglev {
    /// The table of these endpoints. `size` is a prime number.
    pub(super) fn new(endpoints: &EndpointSet, size: u32) -> Self {
        let size = u64::from(size.max(1));
        // Shares of the whole, and their greatest, as Envoy rounds them: with the same numbers the table is the same.
        let share = |weight: u32| f64::from(weight) / endpoints.total() as f64;
        let Some(most) = endpoints.members().map(|member| member.weight).max().map(share) else {
            return Self(Box::default());
        };
        let mut fillers: Vec<_> = (0_u32..)
            .zip(endpoints.members())
            .map(|(index, member)| {
                let key = member.endpoint.addr().to_string();
                Filler {
                    index,
                    offset: xxhash(key.as_bytes(), 0) % size,
                    skip: xxhash(key.as_bytes(), 1) % (size.max(2) - 1) + 1,
                    next: 0,
                    weight: share(member.weight),
                    target: 0.0,
                    key,
                }
            })
            .collect();
        // The turns go by address, as Envoy's: a resolver that answers in another order moves no key.
        fillers.sort_unstable_by(|left, right| left.key.cmp(&right.key));
        let mut table = vec![u32::MAX; size as usize];
        let mut left = table.len();
        let mut round = 1.0;
        while left > 0 {
            for filler in &mut fillers {
                if left == 0 {
                    break;
                }
                // A lighter one sits out rounds.
                if round * filler.weight < filler.target {
                    continue;
                }
                filler.target += most;
                let place = loop {
                    let place = ((filler.offset + filler.skip * filler.next) % size) as usize;
                    filler.next += 1;
                    if table[place] == u32::MAX {
                        break place;
                    }
                };
                table[place] = filler.index;
                left -= 1;
            }
            round += 1.0;
        }
        Self(table.into_boxed_slice())
    }

    /// The endpoint of a key; where `wanted` refuses it, the one of the key hashed again.
    pub(super) fn pick<'e>(
        &self,
        hash: u64,
        endpoints: &'e EndpointSet,
        wanted: impl Fn(&Endpoint) -> bool,
    ) -> Option<&'e Arc<Endpoint>> {
        let place = |hash: u64| hash.checked_rem(self.0.len() as u64);
        let at = |place: u64| endpoints.at(self.0[place as usize] as usize).map(|member| &member.endpoint);
        let first = at(place(hash)?)?;
        if wanted(first) {
            return Some(first);
        }
        let again = (1..=DRAWS).map(|draw| xxhash(&hash.to_le_bytes(), draw));
        again.filter_map(|hash| at(place(hash)?)).find(|endpoint| wanted(endpoint)).or_else(|| {
            let size = self.0.len() as u64;
            let from = place(hash)?;
            (0..size).filter_map(|step| at((from + step) % size)).find(|endpoint| wanted(endpoint))
        })
    }
}
