//! What was found so far, bounded in number and in bytes, for whoever asks.
//!
//! One lock holds all of it, and no worker ever waits for it. Answers are compared, and what they came to is counted, on
//! a thread for work that blocks; a comparison that came to nothing is counted by the worker if the lock is free, else on
//! such a thread as well. Whoever asks takes out what it shows under the lock, and renders it without.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use bytes::Bytes;
use http::HeaderMap;
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

/// The comparisons of a process. Cloning shares them.
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
    samples: VecDeque<Arc<Sample>>,
    captured: VecDeque<Arc<Captured>>,
    captured_bytes: usize,
}

#[derive(Clone, Debug, Default)]
struct Pair {
    tally: Tally,
    baselines: u64,
    equal: u64,
    noise: u64,
    different: u64,
    uncompared: u64,
}

/// A comparison that differs, with no more of it than is shown.
#[derive(Debug)]
struct Sample {
    route: String,
    mirror: String,
    method: String,
    authority: String,
    path: String,
    verdict: Verdict,
    primary: Answer,
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
            pair.baselines += 1;
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
        pair.tally.fade();
        if verdict == Verdict::Different {
            if found.samples.len() >= MOST_SAMPLES {
                found.samples.pop_front();
            }
            found.samples.push_back(Arc::new(Sample::of(&captured, verdict, &other, differences)));
        }
        if policy.capture && !request_cut && !captured.response.cut {
            found.capture(captured.without_secrets());
        }
    }

    /// Counts a comparison that came to nothing: one of the two gave no whole answer.
    pub(crate) async fn uncompared(self, route: String, mirror: String) {
        match self.0.try_lock() {
            Ok(mut found) => return found.pair(&route, &mirror).uncompared += 1,
            Err(TryLockError::Poisoned(found)) => {
                return found.into_inner().pair(&route, &mirror).uncompared += 1;
            }
            Err(TryLockError::WouldBlock) => {}
        }
        let count = move || self.lock().pair(&route, &mirror).uncompared += 1;
        if let Err(error) = tokio::task::spawn_blocking(count).await {
            tracing::error!(%error, "a comparison could not be counted");
        }
    }

    /// Everything, as the admin endpoint shows it. Places are judged by what is remembered now; the counts were when
    /// their comparison was made.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let (names, samples, captured) = {
            let found = self.lock();
            let names: Vec<_> = found.pairs.keys().cloned().collect();
            (names, found.samples.clone(), found.captured.len())
        };
        // One at a time, so that nobody waits for all.
        let pairs = names.into_iter().filter_map(|(route, mirror)| {
            let key = (route, mirror);
            let pair = self.lock().pairs.get(&key).cloned()?;
            Some(json!({
                "route": key.0,
                "mirror": key.1,
                "compared": pair.equal + pair.noise + pair.different,
                "baselines": pair.baselines,
                "equal": pair.equal,
                "noise": pair.noise,
                "different": pair.different,
                "uncompared": pair.uncompared,
                "remembered": {"compared": pair.tally.compared, "baselines": pair.tally.baselines},
                "places": places(&pair.tally),
            }))
        });
        json!({
            "comparisons": pairs.collect::<Vec<_>>(),
            "samples": samples.iter().rev().map(|sample| sample.to_json()).collect::<Vec<_>>(),
            "captured": captured,
        })
    }

    /// The compared requests that are kept, a line each ([`Captured`]), the oldest first.
    #[must_use]
    pub fn captured(&self) -> String {
        let captured = self.lock().captured.clone();
        captured.iter().fold(String::new(), |mut lines, captured| {
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
        self.captured.push_back(Arc::new(captured));
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

/// The most bytes of a body, or of a path, that a sample keeps.
const SHOWN: usize = 1_024;

impl Sample {
    fn of(captured: &Captured, verdict: Verdict, other: &Answer, differences: Vec<Difference>) -> Self {
        let answer = |answer: &Answer| Answer {
            status: answer.status,
            headers: HeaderMap::new(),
            // Copied, so that the rest of it is let go.
            body: Bytes::copy_from_slice(&answer.body[..answer.body.len().min(SHOWN)]),
            cut: answer.cut || answer.body.len() > SHOWN,
        };
        let text = |text: &str| text[..text.floor_char_boundary(SHOWN)].to_owned();
        Self {
            route: captured.route.clone(),
            mirror: captured.mirror.clone(),
            method: text(captured.method.as_str()),
            authority: text(&captured.authority),
            path: text(captured.path.as_str()),
            verdict,
            primary: answer(&captured.response),
            other: answer(other),
            differences,
        }
    }

    fn to_json(&self) -> Value {
        let answer = |answer: &Answer| {
            json!({
                "status": answer.status.as_u16(),
                "body": String::from_utf8_lossy(&answer.body),
                "cut": answer.cut,
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
        json!({
            "route": self.route,
            "cluster": self.mirror,
            "method": self.method,
            "authority": self.authority,
            "path": self.path,
            "verdict": self.verdict.as_str(),
            "differences": self.differences.iter().map(difference).collect::<Vec<_>>(),
            "primary": answer(&self.primary),
            "mirror": answer(&self.other),
        })
    }
}

#[cfg(test)]
mod tests {
    use http::Method;

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

    #[tokio::test]
    async fn vs_p05_comparisons_are_counted_and_bounded() {
        let (diffs, policy) = (Diffs::default(), DiffPolicy { capture: true, ..DiffPolicy::default() });
        let record = |primary, other, baseline| diffs.record(&policy, comparison(primary, other, baseline));
        let id = |id: u32| answer(format!("{{\"id\":{id}}}"));
        for _ in 0..9 {
            record(id(1), id(1), Some(id(3)));
        }
        record(id(1), id(2), Some(id(3)));
        record(id(1), id(2), None);
        record(id(1), answer("{}"), None);
        let cut = Answer { cut: true, ..answer("{") };
        record(cut.clone(), id(2), None);
        diffs.clone().uncompared("r".to_owned(), "m".to_owned()).await;
        let counts = diffs.counts();
        assert_eq!(
            counts[0].verdicts,
            [("equal", 9), ("noise", 2), ("different", 1), ("uncompared", 2)],
            "{:#}",
            diffs.to_json()
        );
        record(answer("{\"a\":1}"), answer("{\"a\":2}"), None);
        let shown = diffs.to_json();
        assert_eq!(shown["samples"][0]["differences"][0]["path"], "$.a");
        assert_eq!(
            shown["comparisons"][0]["places"][0],
            json!({"place": "$.id", "kind": "value", "differed": 2, "baseline": 10, "noise": true})
        );

        for number in 0..MOST_CAPTURED + 50 {
            record(answer("1"), answer(format!("\"{number}\"")), None);
        }
        assert_eq!(diffs.lock().samples.len(), MOST_SAMPLES);
        assert_eq!(diffs.captured().lines().count(), MOST_CAPTURED);
        for _ in 0..20 {
            record(answer(vec![b'x'; 1024 * 1024]), answer("y"), None);
        }
        assert_eq!(diffs.captured().lines().count(), 7, "an eighth with its names would be more than 8 MiB");
        assert!(diffs.to_json()["samples"][0]["primary"]["body"].as_str().unwrap().len() == SHOWN);
    }

    #[test]
    fn bug_samples_kept_whole_bodies_and_requests_were_kept_unasked() {
        let (diffs, policy) = (Diffs::default(), DiffPolicy::default());
        let large = || answer(vec![b'x'; 1024 * 1024]);
        let mut comparison = comparison(large(), answer("y"), None);
        comparison.captured.path = format!("/{}", "p".repeat(10_000)).parse().unwrap();
        comparison.captured.body = Bytes::from(vec![b'z'; 1024 * 1024]);
        diffs.record(&policy, comparison);
        let found = diffs.lock();
        assert!(found.captured.is_empty(), "nobody asked for it");
        let sample = &found.samples[0];
        assert_eq!((sample.primary.body.len(), sample.path.len()), (SHOWN, SHOWN));
        assert!(sample.primary.cut && !sample.other.cut);
    }

    #[tokio::test]
    async fn bug_a_reader_of_the_differences_blocked_a_worker() {
        let diffs = Diffs::default();
        let held = diffs.clone();
        let (locked, is_locked) = tokio::sync::oneshot::channel();
        let (release, released) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let _guard = held.lock();
            locked.send(()).unwrap();
            released.recv_timeout(std::time::Duration::from_secs(10)).is_ok()
        });
        is_locked.await.unwrap();
        let counted = tokio::spawn(diffs.clone().uncompared("r".to_owned(), "m".to_owned()));
        // That the worker comes back here is what is shown.
        tokio::task::yield_now().await;
        // Whoever waited for the reader gave up on this.
        let _ = release.send(());
        counted.await.unwrap();
        assert!(reader.join().unwrap(), "the worker waited until the reader gave up");
        assert_eq!(diffs.counts()[0].verdicts[3], ("uncompared", 1));
    }
}
