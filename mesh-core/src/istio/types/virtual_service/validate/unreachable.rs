//! Rules that no request can reach, because an earlier one takes it.

use std::collections::BTreeMap;

use super::super::{HttpMatchRequest, HttpRoute, L4MatchAttributes, TcpRoute, TlsMatchAttributes, TlsRoute};
use crate::istio::findings::Findings;
use crate::istio::types::common::{StringMatch, StringMatchKind};

/// `VirtualServiceUnreachableRule`.
const UNREACHABLE: &str = "IST0130";

/// `VirtualServiceIneffectiveMatch`.
const INEFFECTIVE: &str = "IST0131";

/// A match that can be compared with another.
trait Comparable {
    /// Whether the same traffic matches.
    fn is_same(&self, other: &Self) -> bool;
}

impl Comparable for HttpMatchRequest {
    fn is_same(&self, other: &Self) -> bool {
        let unnamed = |matches: &Self| Self { name: String::new(), ..matches.clone() };
        unnamed(self) == unnamed(other)
    }
}

impl Comparable for TlsMatchAttributes {
    fn is_same(&self, other: &Self) -> bool {
        self == other
    }
}

impl Comparable for L4MatchAttributes {
    fn is_same(&self, other: &Self) -> bool {
        self == other
    }
}

pub(super) fn http(out: &mut Findings, routes: &[HttpRoute]) {
    let rules: Vec<&[HttpMatchRequest]> = routes.iter().map(|route| route.matches.as_slice()).collect();
    same(out, "http", &rules);
    let matches: Vec<Prefixed<'_>> = rules
        .iter()
        .enumerate()
        .flat_map(|(rule, matches)| matches.iter().enumerate().map(move |(at, matches)| (rule, at, matches)))
        .filter_map(|(rule, at, matches)| Prefixed::of(rule, at, matches))
        .collect();
    for (index, earlier) in matches.iter().enumerate() {
        for later in &matches[index + 1..] {
            if later.prefix != earlier.prefix && earlier.covers(later) {
                let message = format!(
                    "has no effect: http[{}].match[{}] takes the prefix {:?} before",
                    earlier.rule, earlier.at, earlier.prefix
                );
                out.warning_code(&format!("http[{}].match[{}]", later.rule, later.at), message, INEFFECTIVE);
            }
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
    let mut seen: Vec<(usize, &M)> = Vec::new();
    for (rule, matches) in rules.iter().enumerate() {
        let at = format!("{field}[{rule}]");
        if matches.is_empty() {
            if let Some(before) = catch_all {
                let message = format!("is never used: {field}[{before}] has no match, and takes everything");
                out.warning_code(&at, message, UNREACHABLE);
            }
            catch_all = Some(rule);
            continue;
        }
        let mut duplicates = 0;
        for (index, matches) in matches.iter().enumerate() {
            match seen.iter().find(|(_, earlier)| earlier.is_same(matches)) {
                Some((before, _)) => {
                    let message = format!("has no effect: {field}[{before}] has the same match");
                    out.warning_code(&format!("{at}.match[{index}]"), message, INEFFECTIVE);
                    duplicates += 1;
                }
                None => seen.push((rule, matches)),
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
