//! What was found so far, bounded, for whoever asks.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use super::DiffPolicy;
use super::captured::Captured;
use super::compare::{Answer, Difference, compare};
use super::tally::{Tally, Verdict};

/// The last comparisons that differ which are kept.
pub const MOST_SAMPLES: usize = 100;

/// The last compared requests that are kept, so that they can be asked again.
pub const MOST_CAPTURED: usize = 256;

/// The most bytes that those take.
pub const MOST_CAPTURED_BYTES: usize = 8 * 1024 * 1024;

/// The most pairs of route and mirror that are counted: names change with configuration.
const MOST_PAIRS: usize = 1_000;

/// The comparisons of a process. Cloning shares them. Its lock is taken where answers are compared and where somebody
/// asks, never where requests pass.
#[derive(Clone, Debug, Default)]
pub struct Diffs(Arc<Mutex<Found>>);

/// What the comparisons of a route's answers with those of one mirror came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    /// The name of the route.
    pub route: String,
    /// The name of the mirror's cluster.
    pub mirror: String,
    /// How many were `equal`, `noise`, `different` and `uncompared`, in this order.
    pub verdicts: [(&'static str, u64); 4],
}

#[derive(Debug, Default)]
struct Found {
    pairs: BTreeMap<(String, String), Pair>,
    samples: VecDeque<Sample>,
    captured: VecDeque<Captured>,
    captured_bytes: usize,
}

#[derive(Debug, Default)]
struct Pair {
    tally: Tally,
    equal: u64,
    noise: u64,
    different: u64,
    uncompared: u64,
}

#[derive(Debug)]
struct Sample {
    captured: Captured,
    verdict: Verdict,
    other: Answer,
    differences: Vec<Difference>,
}

/// One comparison: what was asked and answered by the primary, and what others answered.
#[derive(Clone, Debug)]
pub(crate) struct Comparison {
    pub(crate) captured: Captured,
    /// Whether the body of the request was kept whole.
    pub(crate) request_cut: bool,
    pub(crate) other: Answer,
    pub(crate) baseline: Option<Answer>,
}

impl Diffs {
    /// Compares, and counts what comes of it.
    pub(crate) fn record(&self, policy: &DiffPolicy, comparison: Comparison) {
        let Comparison { captured, request_cut, other, baseline } = comparison;
        let primary = &captured.response;
        let cut = primary.cut || other.cut;
        let differences = compare(&policy.headers, primary, &other);
        let with_itself = baseline
            .filter(|baseline| !primary.cut && !baseline.cut)
            .map(|baseline| compare(&policy.headers, primary, &baseline));
        let mut found = self.lock();
        let pair = found.pair(&captured.route, &captured.mirror);
        if let Some(differences) = with_itself {
            pair.tally.add_baseline(&differences);
        }
        // What is not known whole may still differ in its head.
        if cut && differences.is_empty() {
            pair.uncompared += 1;
            return;
        }
        pair.tally.add(&differences);
        let verdict = pair.tally.verdict(&differences);
        match verdict {
            Verdict::Equal => pair.equal += 1,
            Verdict::Noise => pair.noise += 1,
            Verdict::Different => pair.different += 1,
        }
        if !request_cut && !primary.cut {
            found.capture(captured.clone());
        }
        if verdict == Verdict::Different {
            if found.samples.len() >= MOST_SAMPLES {
                found.samples.pop_front();
            }
            found.samples.push_back(Sample { captured, verdict, other, differences });
        }
    }

    /// Counts a comparison that came to nothing: one of the two gave no whole answer.
    pub(crate) fn uncompared(&self, route: &str, mirror: &str) {
        self.lock().pair(route, mirror).uncompared += 1;
    }

    /// Everything, as the admin endpoint shows it. Places are judged by what is known now; the counts were when their
    /// comparison was made.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let found = self.lock();
        let pairs: Vec<_> = found
            .pairs
            .iter()
            .map(|((route, mirror), pair)| {
                json!({
                    "route": route,
                    "mirror": mirror,
                    "compared": pair.tally.compared,
                    "baselines": pair.tally.baselines,
                    "equal": pair.equal,
                    "noise": pair.noise,
                    "different": pair.different,
                    "uncompared": pair.uncompared,
                    "places": places(&pair.tally),
                })
            })
            .collect();
        json!({
            "comparisons": pairs,
            "samples": found.samples.iter().rev().map(sample).collect::<Vec<_>>(),
            "captured": found.captured.len(),
        })
    }

    /// The compared requests that are kept, a line each ([`Captured`]), the oldest first.
    #[must_use]
    pub fn captured(&self) -> String {
        self.lock().captured.iter().fold(String::new(), |mut lines, captured| {
            lines.push_str(&captured.to_line());
            lines.push('\n');
            lines
        })
    }

    /// What comparisons came to, by route and mirror.
    #[must_use]
    pub fn counts(&self) -> Vec<Counts> {
        let each = |((route, mirror), pair): (&(String, String), &Pair)| Counts {
            route: route.clone(),
            mirror: mirror.clone(),
            verdicts: [
                (Verdict::Equal.as_str(), pair.equal),
                (Verdict::Noise.as_str(), pair.noise),
                (Verdict::Different.as_str(), pair.different),
                ("uncompared", pair.uncompared),
            ],
        };
        self.lock().pairs.iter().map(each).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Found> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Found {
    fn pair(&mut self, route: &str, mirror: &str) -> &mut Pair {
        let key = (route.to_owned(), mirror.to_owned());
        if self.pairs.len() >= MOST_PAIRS && !self.pairs.contains_key(&key) {
            self.pairs.pop_first();
        }
        self.pairs.entry(key).or_default()
    }

    fn capture(&mut self, captured: Captured) {
        self.captured_bytes += captured.bytes();
        self.captured.push_back(captured);
        while self.captured.len() > MOST_CAPTURED || self.captured_bytes > MOST_CAPTURED_BYTES {
            let Some(oldest) = self.captured.pop_front() else { break };
            self.captured_bytes -= oldest.bytes();
        }
    }
}

fn places(tally: &Tally) -> Vec<Value> {
    let place = |(place, kind, differed, baseline, noise): (&str, super::Kind, u64, u64, bool)| json!({"place": place, "kind": kind.as_str(), "differed": differed, "baseline": baseline, "noise": noise});
    tally.places().into_iter().map(place).collect()
}

/// The most bytes of a body that a sample shows.
const SHOWN: usize = 1_024;

fn sample(sample: &Sample) -> Value {
    let answer = |answer: &Answer| {
        let shown = &answer.body[..answer.body.len().min(SHOWN)];
        json!({
            "status": answer.status.as_u16(),
            "body": String::from_utf8_lossy(shown),
            "cut": answer.cut || shown.len() < answer.body.len(),
        })
    };
    let difference = |difference: &Difference| {
        json!({
            "path": difference.path,
            "kind": difference.kind.as_str(),
            "primary": difference.primary,
            "mirror": difference.other,
        })
    };
    let captured = &sample.captured;
    json!({
        "route": captured.route,
        "cluster": captured.mirror,
        "method": captured.method.as_str(),
        "authority": captured.authority,
        "path": captured.path.as_str(),
        "verdict": sample.verdict.as_str(),
        "differences": sample.differences.iter().map(difference).collect::<Vec<_>>(),
        "primary": answer(&captured.response),
        "mirror": answer(&sample.other),
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::{HeaderMap, Method};

    use super::*;

    fn answer(body: impl Into<Bytes>) -> Answer {
        Answer { body: body.into(), ..Answer::default() }
    }

    fn comparison(primary: Answer, other: Answer, baseline: Option<Answer>) -> Comparison {
        let captured = Captured {
            route: "r".to_owned(),
            mirror: "m".to_owned(),
            method: Method::GET,
            authority: "a".to_owned(),
            path: "/".parse().unwrap(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            compare: Vec::new(),
            response: primary,
        };
        Comparison { captured, request_cut: false, other, baseline }
    }

    #[test]
    fn vs_p05_comparisons_are_counted_and_bounded() {
        let (diffs, policy) = (Diffs::default(), DiffPolicy::default());
        let record = |primary, other, baseline| diffs.record(&policy, comparison(primary, other, baseline));
        let id = |id: u32| answer(format!("{{\"id\":{id}}}"));
        record(id(1), id(1), None);
        record(id(1), id(2), Some(id(3)));
        record(id(1), id(2), None);
        record(id(1), answer("{}"), None);
        let cut = Answer { cut: true, ..answer("{") };
        record(cut.clone(), id(2), None);
        diffs.uncompared("r", "m");
        let counts = diffs.counts();
        assert_eq!(
            counts[0].verdicts,
            [("equal", 1), ("noise", 2), ("different", 1), ("uncompared", 2)],
            "{:#}",
            diffs.to_json()
        );
        record(answer("{\"a\":1}"), answer("{\"a\":2}"), None);
        let shown = diffs.to_json();
        assert_eq!(shown["samples"][0]["differences"][0]["path"], "$.a");
        assert_eq!(
            shown["comparisons"][0]["places"][0],
            json!({"place": "$.id", "kind": "value", "differed": 2, "baseline": 1, "noise": true})
        );

        for number in 0..MOST_CAPTURED + 50 {
            record(answer("1"), answer(format!("\"{number}\"")), None);
        }
        assert_eq!(diffs.lock().samples.len(), MOST_SAMPLES);
        assert_eq!(diffs.captured().lines().count(), MOST_CAPTURED);
        for _ in 0..20 {
            record(answer(vec![b'x'; 1024 * 1024]), answer("y"), None);
        }
        assert_eq!(diffs.captured().lines().count(), 8);
        assert!(diffs.to_json()["samples"][0]["primary"]["body"].as_str().unwrap().len() == SHOWN);
    }
}
