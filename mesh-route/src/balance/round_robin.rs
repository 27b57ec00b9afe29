//! In turn, exactly by weight (DR-LB01, DR-LB09).

use rand::Rng;

use super::random;
use crate::endpoint::{EndpointSet, Member};

/// How far a worker is in the turns of a cluster, by part: a priority, or a locality of one.
#[derive(Clone, Debug, Default)]
pub struct Cursors {
    start: usize,
    first: usize,
    others: Vec<usize>,
}

impl Cursors {
    /// Turns that begin at `start`. Workers begin at different places, or each would send its first request to the same
    /// endpoint.
    #[must_use]
    pub fn new(start: usize) -> Self {
        Self { start, first: start, others: Vec::new() }
    }

    /// The turn of a part, which moves on. Grows with the first pick of a part and never again.
    pub(super) fn next(&mut self, part: usize) -> usize {
        let cursor = match part.checked_sub(1) {
            None => &mut self.first,
            Some(at) => {
                if self.others.len() <= at {
                    self.others.resize(at + 1, self.start);
                }
                &mut self.others[at]
            }
        };
        let turn = *cursor;
        *cursor = turn.wrapping_add(1);
        turn
    }
}

/// The endpoint of this turn; by chance where the weights have no common period that is worth laying out.
pub(super) fn pick<'e>(endpoints: &'e EndpointSet, turn: usize, rng: &mut impl Rng) -> Option<&'e Member> {
    endpoints.at_turn(turn).or_else(|| random::pick(endpoints, rng))
}
