//! Rules that no request can reach, because an earlier one takes it.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

use super::super::{HttpMatchRequest, HttpRoute, L4MatchAttributes, TcpRoute, TlsMatchAttributes, TlsRoute};
use crate::istio::findings::Findings;
use crate::istio::types::common::{StringMatch, StringMatchKind};

/// `VirtualServiceUnreachableRule`.
const UNREACHABLE: &str = "IST0130";

/// `VirtualServiceIneffectiveMatch`.
const INEFFECTIVE: &str = "IST0131";

/// How many earlier matches of one prefix a match is compared with.
const COMPARED: usize = 100;

/// A match that can be compared with another.
trait Comparable: Clone + Eq + Hash {
    /// The match without what does not tell traffic apart.
    fn essence(&self) -> Self;
}

impl Comparable for HttpMatchRequest {
    fn essence(&self) -> Self {
        Self { name: String::new(), ..self.clone() }
    }
}

impl Comparable for TlsMatchAttributes {
    fn essence(&self) -> Self {
        self.clone()
    }
}

impl Comparable for L4MatchAttributes {
    fn essence(&self) -> Self {
        self.clone()
    }
}

pub(super) fn http(out: &mut Findings, routes: &[HttpRoute]) {
    let rules: Vec<&[HttpMatchRequest]> = routes.iter().map(|route| route.matches.as_slice()).collect();
    same(out, "http", &rules);
    let mut earlier: HashMap<&str, Vec<Prefixed<'_>>> = HashMap::new();
    let reached = rules.iter().position(|matches| matches.is_empty()).unwrap_or(rules.len());
    for (rule, matches) in rules[..reached].iter().enumerate() {
        for (at, matches) in matches.iter().enumerate() {
            let Some(later) = Prefixed::of(rule, at, matches) else { continue };
            let shorter = later.prefix.char_indices().skip(1).map(|(end, _)| &later.prefix[..end]);
            let covering = shorter
                .filter_map(|prefix| earlier.get(prefix))
                .flat_map(|same| same.iter().take(COMPARED))
                .find(|before| before.covers(&later));
            if let Some(before) = covering {
                let message = format!(
                    "has no effect: http[{}].match[{}] takes the prefix {:?} before",
                    before.rule, before.at, before.prefix
                );
                out.warning_code(&format!("http[{rule}].match[{at}]"), message, INEFFECTIVE);
            }
            earlier.entry(later.prefix).or_default().push(later);
        }
    }
}

pub(super) fn tcp(out: &mut Findings, routes: &[TcpRoute]) {
    let rules: Vec<&[L4MatchAttributes]> = routes.iter().map(|route| route.matches.as_slice()).collect();
    same(out, "tcp", &rules);
}

pub(super) fn tls(out: &mut Findings, routes: &[TlsRoute]) {
    let rules: Vec<&[TlsMatchAttributes]> = routes.iter().map(|route| route.matches.as_slice()).collect();
    same(out, "tls", &rules);
}

/// Rules after one without matches, and matches that an earlier rule has too.
fn same<M: Comparable>(out: &mut Findings, field: &str, rules: &[&[M]]) {
    let mut catch_all = None;
    let mut seen: HashMap<M, usize> = HashMap::new();
    for (rule, matches) in rules.iter().enumerate() {
        let at = format!("{field}[{rule}]");
        if let Some(before) = catch_all {
            let message = format!("is never used: {field}[{before}] has no match, and takes everything");
            out.warning_code(&at, message, UNREACHABLE);
            continue;
        }
        if matches.is_empty() {
            catch_all = Some(rule);
            continue;
        }
        let mut duplicates = 0;
        for (index, matches) in matches.iter().enumerate() {
            match seen.entry(matches.essence()) {
                Entry::Occupied(before) => {
                    let message = format!("has no effect: {field}[{}] has the same match", before.get());
                    out.warning_code(&format!("{at}.match[{index}]"), message, INEFFECTIVE);
                    duplicates += 1;
                }
                Entry::Vacant(free) => {
                    free.insert(rule);
                }
            }
        }
        if duplicates == matches.len() {
            out.warning_code(&at, "is never used: earlier rules have all of its matches", UNREACHABLE);
        }
    }
}

/// A match by prefix, as far as prefixes can be compared.
struct Prefixed<'a> {
    rule: usize,
    at: usize,
    prefix: &'a str,
    port: u32,
    method: Simple<'a>,
    authority: Simple<'a>,
    maps: [BTreeMap<&'a str, Simple<'a>>; 3],
}

/// An exact or prefix match; anything else counts as nothing said.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Simple<'a> {
    Any,
    Exact(&'a str),
    Prefix(&'a str),
}

impl<'a> Simple<'a> {
    fn of(matcher: Option<&'a StringMatch>) -> Self {
        match matcher.map(StringMatch::kind) {
            Some(StringMatchKind::Exact(text)) if !text.is_empty() => Self::Exact(text),
            Some(StringMatchKind::Prefix(text)) if !text.is_empty() => Self::Prefix(text),
            _ => Self::Any,
        }
    }

    /// Whether whatever `other` matches, this matches. Istio's own comparison runs the other way round for prefixes;
    /// equality, which is what configurations have, is the same in both.
    fn covers(self, other: Self) -> bool {
        match (self, other) {
            (Self::Any, _) => true,
            (Self::Prefix(short), Self::Prefix(long) | Self::Exact(long)) => long.starts_with(short),
            _ => self == other,
        }
    }
}

impl<'a> Prefixed<'a> {
    fn of(rule: usize, at: usize, matches: &'a HttpMatchRequest) -> Option<Self> {
        let Some(StringMatchKind::Prefix(prefix)) = matches.uri.as_ref().map(StringMatch::kind) else {
            return None;
        };
        if prefix.is_empty() || matches.ignore_uri_case {
            return None;
        }
        let simple = |map: &'a BTreeMap<String, StringMatch>| {
            map.iter().map(|(name, matcher)| (name.as_str(), Simple::of(Some(matcher)))).collect()
        };
        Some(Self {
            rule,
            at,
            prefix,
            port: matches.port,
            method: Simple::of(matches.method.as_ref()),
            authority: Simple::of(matches.authority.as_ref()),
            maps: [simple(&matches.headers), simple(&matches.query_params), simple(&matches.without_headers)],
        })
    }

    fn covers(&self, later: &Self) -> bool {
        later.prefix.starts_with(self.prefix)
            && self.port == later.port
            && self.method.covers(later.method)
            && self.authority.covers(later.authority)
            && self.maps.iter().zip(&later.maps).all(|(own, later)| {
                own.len() == later.len()
                    && own
                        .iter()
                        .all(|(name, simple)| later.get(name).is_some_and(|other| simple.covers(*other)))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefixed(prefix: &str, header: Option<&str>) -> HttpRoute {
        let mut matches =
            HttpMatchRequest { uri: Some(StringMatch::prefix(prefix)), ..HttpMatchRequest::default() };
        if let Some(value) = header {
            matches.headers.insert("x".to_owned(), StringMatch::exact(value));
        }
        HttpRoute { matches: vec![matches], ..HttpRoute::default() }
    }

    fn found(routes: &[HttpRoute]) -> Vec<String> {
        let mut out = Findings::default();
        http(&mut out, routes);
        out.iter().map(|finding| format!("{} {}", finding.path, finding.code.unwrap_or_default())).collect()
    }

    #[test]
    fn what_an_earlier_rule_takes_is_said() {
        assert_eq!(found(&[HttpRoute::default(), HttpRoute::default()]), ["http[1] IST0130"]);
        assert_eq!(
            found(&[HttpRoute::default(), prefixed("/a", None), prefixed("/ab", None)]),
            ["http[1] IST0130", "http[2] IST0130"]
        );
        assert_eq!(found(&[prefixed("/a", None), prefixed("/ab", None)]), ["http[1].match[0] IST0131"]);
        assert_eq!(
            found(&[prefixed("/a", None), prefixed("/a", None)]),
            ["http[1].match[0] IST0131", "http[1] IST0130"]
        );
        let named = {
            let mut route = prefixed("/a", Some("1"));
            route.matches[0].name = "other".to_owned();
            route
        };
        assert_eq!(
            found(&[prefixed("/a", Some("1")), named]).len(),
            2,
            "the name does not tell matches apart"
        );
    }

    #[test]
    fn what_no_rule_takes_is_not() {
        let none: [&str; 0] = [];
        assert_eq!(found(&[prefixed("/ab", None), prefixed("/a", None), HttpRoute::default()]), none);
        assert_eq!(found(&[prefixed("/a", Some("1")), prefixed("/ab", Some("2"))]), none);
        assert_eq!(found(&[prefixed("/a", Some("1")), prefixed("/ab", None)]), none);
    }
}
