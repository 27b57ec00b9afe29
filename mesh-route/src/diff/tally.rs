//! What of the differences is noise. Pure: counts in, verdict out.
//!
//! What is known grows old: a version is rolled out, and what was noise is a regression now. So whoever counts for long
//! lets the counts fade ([`Tally::fade`]): at 4096 comparisons all of them are halved, and what no longer happens is
//! forgotten after a few halvings. So is what happens very seldom, until it is seen again.

use std::collections::BTreeMap;

use super::compare::{Difference, Kind};

/// The most places that are counted one by one; what comes after them is counted in `…`.
pub const MOST_PATHS: usize = 1_000;

/// The fewest comparisons of the primary with itself before anything is noise: what happened once is no habit.
pub const LEAST_BASELINES: u64 = 10;

/// The comparisons with the mirror after which [`Tally::fade`] halves the counts.
const FADES_AFTER: u64 = 4_096;

/// Where the places beyond [`MOST_PATHS`] are counted.
const OTHERS: &str = "…";

/// Differences by place, with the mirror and of the primary with itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Comparisons with the mirror that are remembered.
    pub compared: u64,
    /// Comparisons of the primary with itself that are remembered.
    pub baselines: u64,
    places: BTreeMap<(String, Kind), Place>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    differed: u64,
    baseline: u64,
}

/// What one comparison comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Nothing differs.
    Equal,
    /// What differs is noise.
    Noise,
    /// Something differs that is not.
    Different,
}

impl Verdict {
    /// As metrics name it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::Noise => "noise",
            Self::Different => "different",
        }
    }
}

impl Tally {
    /// Counts a comparison with the mirror.
    pub fn add(&mut self, differences: &[Difference]) {
        self.compared += 1;
        self.each(differences, |place| place.differed += 1);
    }

    /// Counts a comparison of the primary with itself.
    pub fn add_baseline(&mut self, differences: &[Difference]) {
        self.baselines += 1;
        self.each(differences, |place| place.baseline += 1);
    }

    /// Halves all counts when there are many, so that what happened long ago counts little. It leaves enough comparisons
    /// of the primary with itself to judge by.
    pub fn fade(&mut self) {
        if self.compared < FADES_AFTER || self.baselines < 2 * LEAST_BASELINES {
            return;
        }
        self.compared /= 2;
        self.baselines /= 2;
        self.places.retain(|_, place| {
            place.differed /= 2;
            place.baseline /= 2;
            place.differed > 0 || place.baseline > 0
        });
    }

    /// Each place once per comparison, however many items differ there.
    fn each(&mut self, differences: &[Difference], mut count: impl FnMut(&mut Place)) {
        let mut seen = Vec::new();
        for difference in differences {
            let mut key = (difference.place.clone(), difference.kind);
            if self.places.len() >= MOST_PATHS && !self.places.contains_key(&key) {
                key = (OTHERS.to_owned(), Kind::Value);
            }
            if !seen.contains(&key) {
                count(self.places.entry(key.clone()).or_default());
                seen.push(key);
            }
        }
    }

    /// Whether a difference is noise. Places are judged by how they differ: a field whose value always changes is still
    /// missed. Let `r` be the share of the comparisons with the mirror that differ there in that way, and `n` that of the
    /// primary with itself: it is noise when `n > 0` and either `r <= 1.5 n` or `r - n <= 0.03`. So where the primary never
    /// differs from itself nothing is noise, nor where it does so now and then and the mirror always. Before the primary
    /// was compared with itself [`LEAST_BASELINES`] times nothing is.
    #[must_use]
    pub fn is_noise(&self, difference: &Difference) -> bool {
        let place = self.places.get(&(difference.place.clone(), difference.kind));
        place.is_some_and(|place| self.judge(place))
    }

    fn judge(&self, place: &Place) -> bool {
        let (r, n) = (share(place.differed, self.compared), share(place.baseline, self.baselines));
        self.baselines >= LEAST_BASELINES && n > 0.0 && (r <= 1.5 * n || r - n <= 0.03)
    }

    /// What a comparison with these differences comes to, by what is known so far.
    #[must_use]
    pub fn verdict(&self, differences: &[Difference]) -> Verdict {
        match differences {
            [] => Verdict::Equal,
            all if all.iter().all(|difference| self.is_noise(difference)) => Verdict::Noise,
            _ => Verdict::Different,
        }
    }

    /// Every place: its name, how it differs, how often with the mirror, how often with the primary, and whether
    /// that is noise. Those that differ most come first.
    #[must_use]
    pub fn places(&self) -> Vec<(&str, Kind, u64, u64, bool)> {
        let mut all: Vec<_> = self
            .places
            .iter()
            .map(|((name, kind), place)| {
                (name.as_str(), *kind, place.differed, place.baseline, self.judge(place))
            })
            .collect();
        all.sort_by_key(|(_, _, differed, ..)| std::cmp::Reverse(*differed));
        all
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    fn at(place: &str) -> Difference {
        Difference {
            path: place.to_owned(),
            place: place.to_owned(),
            kind: Kind::Value,
            primary: None,
            other: None,
        }
    }

    #[test]
    fn vs_p05_noise_is_what_the_primary_does_to_itself() {
        let mut tally = Tally::default();
        let mut rng = SmallRng::seed_from_u64(1);
        for number in 0..1_000 {
            let sometimes = |rng: &mut SmallRng, share: f64| rng.random_bool(share);
            // `id` always differs, `flaky` in one of ten, `order` in one of three; `rating` only with the mirror.
            let mut with_mirror = vec![at("id"), at("broken")];
            with_mirror.extend(sometimes(&mut rng, 0.1).then(|| at("flaky")));
            with_mirror.extend(sometimes(&mut rng, 1.0 / 3.0).then(|| at("order")));
            with_mirror.extend(sometimes(&mut rng, 0.02).then(|| at("rating")));
            tally.add(&with_mirror);
            if number % 5 == 0 {
                let mut with_itself = vec![at("id")];
                with_itself.extend(sometimes(&mut rng, 0.1).then(|| at("flaky")));
                with_itself.extend(sometimes(&mut rng, 1.0 / 3.0).then(|| at("order")));
                // The primary fails here now and then, the mirror always.
                with_itself.extend(sometimes(&mut rng, 0.2).then(|| at("broken")));
                tally.add_baseline(&with_itself);
            }
        }
        for (place, noise) in
            [("id", true), ("flaky", true), ("order", true), ("rating", false), ("broken", false)]
        {
            assert_eq!(tally.is_noise(&at(place)), noise, "{place}: {:?}", tally.places());
        }
        assert!(!tally.is_noise(&at("unknown")));
        assert_eq!(tally.verdict(&[]), Verdict::Equal);
        assert_eq!(tally.verdict(&[at("id"), at("order")]), Verdict::Noise);
        assert_eq!(tally.verdict(&[at("id"), at("rating")]), Verdict::Different);
        assert_eq!(tally.places()[0].2, 1_000);
    }

    #[test]
    fn vs_p05_nothing_is_noise_before_it_was_learned() {
        let mut tally = Tally::default();
        tally.add(&[at("id"), at("id")]);
        assert_eq!(tally.places(), [("id", Kind::Value, 1, 0, false)], "once per comparison");
        for baselines in 1..=10 {
            tally.add_baseline(&[at("id")]);
            assert_eq!(
                tally.is_noise(&at("id")),
                baselines == 10,
                "{baselines}: what happened once is no habit"
            );
        }
        assert!(
            !tally.is_noise(&Difference { kind: Kind::Missing, ..at("id") }),
            "that it is gone is another thing"
        );
    }

    #[test]
    fn bug_what_was_noise_once_was_noise_for_ever() {
        let mut tally = Tally::default();
        for _ in 0..LEAST_BASELINES {
            tally.add(&[at("rating")]);
            tally.add_baseline(&[at("rating")]);
        }
        assert!(tally.is_noise(&at("rating")));
        // The primary is mended; the mirror still fails in one of fifty.
        let mut after = 0;
        while tally.is_noise(&at("rating")) {
            after += 1;
            assert!(after < 20_000, "{:?}", tally.places());
            let differs = (after % 50 == 0).then(|| at("rating"));
            tally.add(differs.as_slice());
            if after % 10 == 0 {
                tally.add_baseline(&[]);
            }
            tally.fade();
        }
        assert!(tally.compared <= FADES_AFTER, "{}", tally.compared);
        assert!(tally.places().iter().all(|place| place.2 > 0), "what still happens is remembered");
    }

    #[test]
    fn vs_p05_counts_do_not_fade_below_what_is_judged_by() {
        let mut tally = Tally::default();
        for number in 0..FADES_AFTER * 8 {
            tally.add(&[at("id")]);
            if number % 1_000 == 0 {
                tally.add_baseline(&[at("id")]);
            }
            tally.fade();
            assert!(number < 10_000 || tally.is_noise(&at("id")), "{number}: {:?}", tally.places());
        }
    }

    #[test]
    fn vs_p05_places_are_bounded() {
        let mut tally = Tally::default();
        for number in 0..MOST_PATHS * 2 {
            tally.add(&[at(&format!("$.{number}"))]);
        }
        assert_eq!(tally.places().len(), MOST_PATHS + 1);
        assert_eq!(tally.places()[0], (OTHERS, Kind::Value, MOST_PATHS as u64, 0, false));
    }
}
