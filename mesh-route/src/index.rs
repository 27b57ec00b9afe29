//! Leaving out the routes of a virtual host whose path cannot match.
//!
//! The first route in order wins, so an index may only leave out routes that would not match; those that are left are
//! judged in order, by the same predicates as without it. Routes fall in classes by their path predicate: exact paths
//! are hashed, literal prefixes are hashed by length, regular expressions are asked all at once, and the rest always
//! stays. Short lists are walked.

use std::collections::HashMap;
use std::sync::Arc;

use regex::{RegexSet, RegexSetBuilder};

use crate::request_view::RequestView;
use crate::route::Route;

/// Lists up to this length are walked: building and asking an index costs more.
const WALKED: usize = 8;

/// Regular expressions from this number on are asked all at once.
const MANY_REGEXES: usize = 8;

/// Distinct prefix lengths that are hashed; further prefixes are judged like any other route.
const PREFIX_LENGTHS: usize = 24;

#[derive(Clone, Debug, Default)]
pub(crate) struct Index(Option<Box<Classes>>);

type ByLiteral = HashMap<Box<str>, Box<[u32]>, foldhash::fast::RandomState>;

#[derive(Clone, Debug)]
struct Classes {
    exact: ByLiteral,
    /// Ascending lengths, each with its prefixes.
    prefixes: Box<[(usize, ByLiteral)]>,
    regexes: Option<(RegexSet, Box<[u32]>)>,
    others: Box<[u32]>,
}

impl Index {
    pub(crate) fn new(routes: &[Arc<Route>]) -> Self {
        if routes.len() <= WALKED {
            return Self(None);
        }
        let mut exact: HashMap<&str, Vec<u32>> = HashMap::new();
        let mut prefix: HashMap<&str, Vec<u32>> = HashMap::new();
        let mut regexes = Vec::new();
        let mut others = Vec::new();
        for (number, route) in (0_u32..).zip(routes) {
            // Only predicates that regard case have a literal to hash; the others are judged one by one.
            match &route.matcher().path {
                Some(path) if path.as_exact().is_some() => {
                    exact.entry(path.as_exact().unwrap_or_default()).or_default().push(number);
                }
                Some(path) if path.as_prefix_with_case().is_some_and(|prefix| !prefix.is_empty()) => {
                    prefix.entry(path.as_prefix_with_case().unwrap_or_default()).or_default().push(number);
                }
                Some(path) if path.as_regex().is_some() => {
                    regexes.push((number, path.as_regex().unwrap_or_default().to_owned()));
                }
                _ => others.push(number),
            }
        }
        let mut lengths: Vec<_> = prefix.keys().map(|prefix| prefix.len()).collect();
        lengths.sort_unstable();
        lengths.dedup();
        for length in lengths.split_off(lengths.len().min(PREFIX_LENGTHS)) {
            others.extend(
                prefix.extract_if(|prefix, _| prefix.len() == length).flat_map(|(_, numbers)| numbers),
            );
        }
        let prefixes = lengths
            .into_iter()
            .map(|length| (length, frozen(prefix.iter().filter(|(prefix, _)| prefix.len() == length))))
            .collect();
        let regexes = Self::regex_set(regexes, &mut others);
        others.sort_unstable();
        Self(Some(Box::new(Classes { exact: frozen(&exact), prefixes, regexes, others: others.into() })))
    }

    pub(crate) fn select<'r>(
        &self,
        routes: &'r [Arc<Route>],
        request: &RequestView<'_>,
    ) -> Option<&'r Arc<Route>> {
        let takes =
            |number: &u32| routes.get(*number as usize).filter(|route| route.matcher().matches(request));
        let Some(classes) = &self.0 else {
            return routes.iter().find(|route| route.matcher().matches(request));
        };
        classes.select(request, takes)
    }

    fn regex_set(regexes: Vec<(u32, String)>, others: &mut Vec<u32>) -> Option<(RegexSet, Box<[u32]>)> {
        let numbers: Vec<_> = regexes.iter().map(|(number, _)| *number).collect();
        if regexes.len() >= MANY_REGEXES {
            let patterns = regexes.iter().map(|(_, pattern)| format!(r"\A(?:{pattern})\z"));
            let set = RegexSetBuilder::new(patterns).size_limit(64 << 20).build();
            if let Ok(set) = set {
                return Some((set, numbers.into()));
            }
        }
        others.extend(numbers);
        None
    }
}

impl Classes {
    /// Walks the candidate lists together, in ascending order.
    fn select<'r>(
        &self,
        request: &RequestView<'_>,
        takes: impl Fn(&u32) -> Option<&'r Arc<Route>>,
    ) -> Option<&'r Arc<Route>> {
        let hits: Box<[u32]> = match &self.regexes {
            Some((set, numbers)) if set.is_match(request.path) => {
                set.matches(request.path).iter().filter_map(|at| numbers.get(at).copied()).collect()
            }
            _ => Box::default(),
        };
        let mut lists: [&[u32]; PREFIX_LENGTHS + 3] = [&[]; PREFIX_LENGTHS + 3];
        lists[0] = &self.others;
        lists[1] = &hits;
        lists[2] = self.exact.get(request.path).map_or(&[], |numbers| numbers);
        let mut used = 3;
        for (length, prefixes) in &self.prefixes {
            let Some(prefix) = request.path.get(..*length) else {
                // Too short, or not between characters: no prefix of this length can match.
                continue;
            };
            if let Some(numbers) = prefixes.get(prefix) {
                lists[used] = numbers;
                used += 1;
            }
        }
        let lists = &mut lists[..used];
        loop {
            let next = lists.iter_mut().filter(|list| !list.is_empty()).min_by_key(|list| list[0])?;
            let (number, rest) = next.split_first()?;
            *next = rest;
            if let Some(route) = takes(number) {
                return Some(route);
            }
        }
    }
}

fn frozen<'a>(lists: impl IntoIterator<Item = (&'a &'a str, &'a Vec<u32>)>) -> ByLiteral {
    lists.into_iter().map(|(literal, numbers)| ((*literal).into(), numbers.as_slice().into())).collect()
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use mesh_core::matcher::StringMatcher;
    use proptest::prelude::*;

    use super::*;
    use crate::route::{ActionKind, RouteAction, RouteMatch};

    fn path() -> impl Strategy<Value = StringMatcher> {
        let text = "(/[ab]{0,2}){1,3}";
        prop_oneof![
            text.prop_map(StringMatcher::exact),
            text.prop_map(StringMatcher::prefix),
            text.prop_map(|text| StringMatcher::exact(text).ignore_case()),
            text.prop_map(|text| StringMatcher::prefix(text.to_uppercase()).ignore_case()),
            text.prop_map(|text| StringMatcher::regex(&format!("{text}.?")).unwrap()),
            Just(StringMatcher::prefix("")),
        ]
    }

    proptest! {
        #[test]
        fn vs_03_the_index_takes_the_same_route_as_a_walk(
            paths in proptest::collection::vec((proptest::option::weighted(0.9, path()), any::<bool>()), 0..60),
            target in "(/[abAB]{0,2}){1,3}",
        ) {
            let action = Arc::new(RouteAction::new(ActionKind::Redirect(Default::default())));
            let routes: Vec<_> = paths.into_iter().enumerate().map(|(number, (path, post))| {
                let method = post.then(|| StringMatcher::exact("POST"));
                let matcher = RouteMatch { path, method, ..RouteMatch::default() };
                Arc::new(Route::new(number.to_string(), matcher, Arc::clone(&action)))
            }).collect();
            let headers = HeaderMap::new();
            let view = RequestView { method: "GET", scheme: "http", authority: "a", path: &target, query: "", target: &target, headers: &headers };
            let walked = routes.iter().find(|route| route.matcher().matches(&view)).map(|route| route.name());
            let indexed = Index::new(&routes);
            prop_assert_eq!(indexed.select(&routes, &view).map(|route| route.name()), walked);
        }
    }
}
