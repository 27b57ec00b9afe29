//! Locality (DR-LB06): which endpoints are near, as priorities and weights.
//!
//! What is near depends on the client, so a [`LocalityPreference`] is applied once, when the cluster is made: failover
//! becomes the priorities of the endpoints, distribution becomes the weights of their localities. A pick knows only
//! those. The rules are Istio's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::endpoint::Member;

/// The label of a region.
pub const REGION: &str = "topology.kubernetes.io/region";
/// The label of a zone.
pub const ZONE: &str = "topology.kubernetes.io/zone";
/// The label of a subzone.
pub const SUBZONE: &str = "topology.istio.io/subzone";

/// Which endpoints a client prefers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalityPreference {
    /// Shares by locality; the first whose `from` is the client's counts. Where there are any, nothing below does, not
    /// even for a client that has none.
    pub distribute: Vec<Distribution>,
    /// `(from, to)`: the region that takes the place of the client's own, before all others.
    pub failover: Vec<(String, String)>,
    /// Labels, `key` or `key=value`: endpoints that agree with the client, or with the value, in all of them come first,
    /// then those that agree in all but the last, and so on.
    pub failover_priority: Vec<String>,
}

/// Shares for the clients of a locality.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Distribution {
    /// The clients: `region/zone/subzone`, `*` in place of the last part.
    pub from: String,
    /// Shares by locality of the endpoints, with `*` as above. Endpoints elsewhere get nothing.
    pub to: BTreeMap<String, u32>,
}

/// Who a client is to a [`LocalityPreference`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientLocality {
    /// `region/zone/subzone`; empty when not known.
    pub locality: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// The weights of localities. One that has none gets nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalityWeights(BTreeMap<Arc<str>, u32>);

/// What a preference is decided by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) locality: &'a str,
    pub(crate) labels: &'a [(String, String)],
    pub(crate) weight: u32,
}

impl LocalityPreference {
    /// The priority of each endpoint, from 0 without gaps.
    pub(crate) fn priorities(&self, client: &ClientLocality, places: &[Place<'_>]) -> Vec<u32> {
        let by_labels = |place: &Place<'_>| label_priority(client, &self.failover_priority, place);
        let by_region = |place: &Place<'_>| region_priority(&client.locality, place.locality, &self.failover);
        Self::without_gaps(places, |place| {
            match (self.failover_priority.is_empty(), self.failover.is_empty()) {
                (true, _) => (0, by_region(place)),
                (false, true) => (by_labels(place), 0),
                (false, false) => (by_labels(place), by_region(place)),
            }
        })
    }

    /// The same for zone aware routing (DR-LB07): within what the labels make of it, regions alone are told apart.
    pub(crate) fn regions(&self, client: &ClientLocality, places: &[Place<'_>]) -> Vec<u32> {
        Self::without_gaps(places, |place| {
            let region = region_priority(&client.locality, place.locality, &self.failover);
            (label_priority(client, &self.failover_priority, place), region.max(2))
        })
    }

    fn without_gaps(places: &[Place<'_>], of: impl Fn(&Place<'_>) -> (u32, u32)) -> Vec<u32> {
        let raw: Vec<_> = places.iter().map(of).collect();
        let known: BTreeSet<_> = raw.iter().copied().collect();
        raw.iter().map(|priority| known.range(..priority).count() as u32).collect()
    }

    /// The weights of the localities for a client; `None` when it has no shares.
    pub(crate) fn weights(&self, client: &ClientLocality, places: &[Place<'_>]) -> Option<LocalityWeights> {
        let shares = self.distribute.iter().find(|shares| is_in(&client.locality, &shares.from))?;
        let mut left: BTreeMap<&str, u64> = BTreeMap::new();
        for place in places {
            *left.entry(place.locality).or_default() += u64::from(place.weight);
        }
        let mut weights = BTreeMap::new();
        // What is more specific comes first, should two name the same.
        for (to, share) in shares.to.iter().rev() {
            let (chosen, others) = left.into_iter().partition(|(locality, _)| is_in(locality, to));
            left = others;
            let chosen: BTreeMap<_, u64> = chosen;
            let total: u64 = chosen.values().sum();
            for (locality, weight) in chosen {
                // In thousandths, so that what one share is divided into stays exact enough.
                let weight = (u64::from(*share) * 1000 * weight).checked_div(total).unwrap_or(0).max(1);
                weights.insert(Arc::from(locality), u32::try_from(weight).unwrap_or(u32::MAX));
            }
        }
        Some(LocalityWeights(weights))
    }
}

impl LocalityWeights {
    /// Weights by locality.
    #[must_use]
    pub fn new(weights: impl IntoIterator<Item = (Arc<str>, u32)>) -> Self {
        Self(weights.into_iter().collect())
    }

    /// Whether no locality has a weight.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The weights by locality.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, u32)> {
        self.0.iter().map(|(locality, weight)| (&**locality, *weight))
    }

    /// The members of each locality that has a weight, in order of locality.
    pub(super) fn split(&self, members: &[Member]) -> Vec<(u32, Vec<Member>)> {
        let in_ = |locality: &Arc<str>| members.iter().filter(|m| m.locality == *locality).cloned().collect();
        let split = self.0.iter().map(|(locality, weight)| (*weight, in_(locality)));
        split.filter(|(weight, members): &(_, Vec<_>)| *weight > 0 && !members.is_empty()).collect()
    }
}

/// The members of each locality, in order of locality and without weights.
pub(super) fn group(members: &[Member]) -> Vec<(u32, Vec<Member>)> {
    let mut groups: BTreeMap<Arc<str>, Vec<Member>> = BTreeMap::new();
    for member in members {
        groups.entry(Arc::clone(&member.locality)).or_default().push(member.clone());
    }
    groups.into_values().map(|members| (0, members)).collect()
}

/// The members with the weights of their localities in theirs.
pub(super) fn flatten(localities: Vec<(u32, Vec<Member>)>) -> Vec<Member> {
    let scaled = |(weight, mut members): (u32, Vec<Member>)| {
        let total: u64 = members.iter().map(|member| u64::from(member.weight)).sum();
        for member in &mut members {
            let share = u64::from(weight) * u64::from(member.weight) * 100;
            let share = share.checked_div(total).unwrap_or(0).max(u64::from(member.weight > 0));
            member.weight = u32::try_from(share).unwrap_or(u32::MAX);
        }
        members
    };
    localities.into_iter().flat_map(scaled).collect()
}

/// Whether a locality is in a pattern: parts that the pattern has not, or has as `*`, are any.
#[must_use]
pub fn is_in(locality: &str, pattern: &str) -> bool {
    parts(locality)
        .iter()
        .zip(parts(pattern))
        .enumerate()
        .all(|(at, (part, wanted))| wanted == "*" || wanted == *part || (at > 0 && wanted.is_empty()))
}

/// Region, zone and subzone.
fn parts(locality: &str) -> [&str; 3] {
    let mut parts = locality.splitn(3, '/');
    [(); 3].map(|()| parts.next().unwrap_or(""))
}

/// 0 for the same subzone, 1 for the same zone, 2 for the same region, 3 elsewhere; with a region that takes the place
/// of the client's, 3 there and 4 elsewhere.
fn region_priority(client: &str, endpoint: &str, failover: &[(String, String)]) -> u32 {
    let (client, endpoint) = (parts(client), parts(endpoint));
    let same = client.iter().zip(endpoint).take_while(|(client, endpoint)| *client == endpoint).count();
    if same > 0 {
        return 3 - same as u32;
    }
    let next = failover.iter().find(|(from, _)| from == client[0]);
    if next.is_some_and(|(_, to)| to != endpoint[0]) { 4 } else { 3 }
}

/// How many labels, from the first that differs, do not count.
fn label_priority(client: &ClientLocality, wanted: &[String], endpoint: &Place<'_>) -> u32 {
    let agree = wanted.iter().take_while(|label| {
        let (key, value) = match label.split_once('=') {
            Some((key, value)) => (key, value),
            None => (label.as_str(), client.label(label)),
        };
        endpoint.label(key) == value
    });
    (wanted.len() - agree.count()) as u32
}

/// The part of a locality that a label of the topology names.
fn topology<'a>(locality: &'a str, key: &str) -> &'a str {
    let [region, zone, subzone] = parts(locality);
    match key {
        REGION => region,
        ZONE => zone,
        SUBZONE => subzone,
        _ => "",
    }
}

impl ClientLocality {
    fn label(&self, key: &str) -> &str {
        self.labels.get(key).map_or_else(|| topology(&self.locality, key), String::as_str)
    }
}

impl Place<'_> {
    fn label(&self, key: &str) -> &str {
        let own = self.labels.iter().find(|(name, _)| name == key);
        own.map_or_else(|| topology(self.locality, key), |(_, value)| value.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(locality: &str) -> ClientLocality {
        ClientLocality { locality: locality.to_owned(), labels: BTreeMap::new() }
    }

    fn places<'a>(localities: &[&'a str]) -> Vec<Place<'a>> {
        localities.iter().map(|locality| Place { locality, labels: &[], weight: 1 }).collect()
    }

    #[test]
    fn dr_lb06_what_is_near_by_default() {
        let here = client("us/east/1");
        let places = places(&["us/east/1", "us/east/2", "us/west/1", "eu/east/1", ""]);
        let preference = LocalityPreference::default();
        assert_eq!(preference.priorities(&here, &places), [0, 1, 2, 3, 3]);
        assert_eq!(preference.priorities(&here, &places[2..]), [0, 1, 1], "without gaps");
        assert_eq!(preference.priorities(&client(""), &places), [1, 1, 1, 1, 0]);
    }

    #[test]
    fn dr_lb06_failover_names_the_next_region() {
        let preference = LocalityPreference {
            failover: vec![("us".into(), "eu".into()), ("eu".into(), "us".into())],
            ..LocalityPreference::default()
        };
        let places = places(&["us/east/1", "eu/x/1", "asia/x/1"]);
        assert_eq!(preference.priorities(&client("us/east/1"), &places), [0, 1, 2]);
        assert_eq!(preference.priorities(&client("asia/y/1"), &places), [1, 1, 0]);
    }

    #[test]
    fn dr_lb06_failover_priority_counts_the_first_labels_that_agree() {
        let preference = LocalityPreference {
            failover_priority: vec![REGION.into(), "version=v2".into(), "rack".into()],
            ..LocalityPreference::default()
        };
        let here = ClientLocality {
            locality: "us/east/1".into(),
            labels: BTreeMap::from([("rack".into(), "7".into()), ("version".into(), "v1".into())]),
        };
        let labels = |version: &str, rack: &str| {
            [("version".to_owned(), version.to_owned()), ("rack".to_owned(), rack.to_owned())]
        };
        let (all, no_rack, no_version) = (labels("v2", "7"), labels("v2", "8"), labels("v1", "7"));
        let at = |locality, labels| Place { locality, labels, weight: 1 };
        let places = [
            at("us/west/1", &all[..]),
            at("us/west/1", &no_rack),
            at("us/west/1", &no_version),
            at("eu/east/1", &all),
        ];
        assert_eq!(preference.priorities(&here, &places), [0, 1, 2, 3]);
    }

    #[test]
    fn dr_lb06_distribute_divides_a_share_by_the_weights_of_what_it_covers() {
        let preference = LocalityPreference {
            distribute: vec![Distribution {
                from: "us/east/*".into(),
                to: BTreeMap::from([("us/east/*".into(), 80), ("us/west".into(), 20)]),
            }],
            ..LocalityPreference::default()
        };
        let mut places = places(&["us/east/1", "us/east/2", "us/west/1", "eu/x/1"]);
        places[0].weight = 3;
        let weights = preference.weights(&client("us/east/9"), &places).unwrap();
        assert_eq!(
            weights.iter().collect::<Vec<_>>(),
            [("us/east/1", 60_000), ("us/east/2", 20_000), ("us/west/1", 20_000)]
        );
        assert_eq!(preference.weights(&client("us/west/1"), &places), None);
    }

    #[test]
    fn dr_lb06_patterns() {
        for (locality, pattern, expected) in [
            ("us/east/1", "us/east/1", true),
            ("us/east/1", "us/east", true),
            ("us/east/1", "us/*", true),
            ("us/east/1", "*", true),
            ("us/east/1", "us/west/*", false),
            ("", "us", false),
            ("us", "us/east", false),
        ] {
            assert_eq!(is_in(locality, pattern), expected, "{locality} in {pattern}");
        }
    }
}
