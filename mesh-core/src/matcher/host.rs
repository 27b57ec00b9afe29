//! Which of many hosts, in time that does not depend on how many there are.
//!
//! Exact names first, then the **longest** suffix wildcard, then `*`. Names are compared without regard to case, a
//! trailing dot and the port of the request are ignored. Exact names and suffixes are hashed; a lookup hashes the
//! name once, and once more for each of its labels when no exact name matched. The keys come from configuration and
//! the hash is seeded per map, so a client cannot aim at one bucket.

use std::collections::HashMap;

/// Longest host that is looked up; a longer one is no DNS name and matches only `*`.
const MAX_HOST: usize = 255;

/// A map from host patterns (`a.example.com`, `*.example.com`, `*`) to values.
#[derive(Clone, Debug)]
pub struct HostMap<T> {
    exact: HashMap<Box<str>, T, foldhash::fast::RandomState>,
    suffix: HashMap<Box<str>, T, foldhash::fast::RandomState>,
    any: Option<T>,
    longest_suffix: usize,
}

/// A pattern that the map has already.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("host {0:?} stands twice")]
pub struct DuplicateHost(pub String);

impl<T> HostMap<T> {
    /// A map without hosts.
    #[must_use]
    pub fn new() -> Self {
        Self { exact: HashMap::default(), suffix: HashMap::default(), any: None, longest_suffix: 0 }
    }

    /// Adds a pattern.
    ///
    /// # Errors
    /// [`DuplicateHost`] when the pattern is there; the map keeps its first value.
    pub fn insert(&mut self, pattern: &str, value: T) -> Result<(), DuplicateHost> {
        let pattern = pattern.strip_suffix('.').unwrap_or(pattern).to_ascii_lowercase();
        let duplicate = DuplicateHost(pattern.clone());
        if pattern == "*" {
            if self.any.is_some() {
                return Err(duplicate);
            }
            self.any = Some(value);
            return Ok(());
        }
        // `*.foo.com` is kept as `.foo.com`; `*-suffix.foo.com` as `-suffix.foo.com`.
        let suffix = pattern.strip_prefix('*').map(str::len);
        let map = if suffix.is_some() { &mut self.suffix } else { &mut self.exact };
        let key = pattern.trim_start_matches('*');
        if map.contains_key(key) {
            return Err(duplicate);
        }
        map.insert(key.into(), value);
        self.longest_suffix = self.longest_suffix.max(suffix.unwrap_or(0));
        Ok(())
    }

    /// The value for the host of a request, which may have a port.
    #[must_use]
    pub fn get(&self, authority: &str) -> Option<&T> {
        let host = without_port(authority);
        let host = host.strip_suffix('.').unwrap_or(host);
        if host.len() > MAX_HOST {
            return self.any.as_ref();
        }
        let mut buffer = [0_u8; MAX_HOST];
        let host = lower(host, &mut buffer);
        self.exact.get(host).or_else(|| self.longest_suffix(host)).or(self.any.as_ref())
    }

    /// The value of an exact pattern, wildcards aside.
    #[must_use]
    pub fn get_pattern(&self, pattern: &str) -> Option<&T> {
        match pattern.strip_prefix('*') {
            Some("") => self.any.as_ref(),
            Some(suffix) => self.suffix.get(suffix),
            None => self.exact.get(pattern),
        }
    }

    /// Every pattern with its value, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (String, &T)> {
        let exact = self.exact.iter().map(|(pattern, value)| (pattern.to_string(), value));
        let suffix = self.suffix.iter().map(|(suffix, value)| (format!("*{suffix}"), value));
        exact.chain(suffix).chain(self.any.iter().map(|value| ("*".to_owned(), value)))
    }

    /// How many patterns there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.exact.len() + self.suffix.len() + usize::from(self.any.is_some())
    }

    /// Whether there is no pattern.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn longest_suffix(&self, host: &str) -> Option<&T> {
        if self.longest_suffix == 0 {
            return None;
        }
        // At least one character stands for the star.
        let first = host.len().saturating_sub(self.longest_suffix).max(1);
        (first..host.len()).filter(|at| host.is_char_boundary(*at)).find_map(|at| {
            // A suffix begins at a label, but for the rare `*-suffix`; the hash is asked only where one can begin.
            matches!(host.as_bytes()[at], b'.' | b'-').then(|| self.suffix.get(&host[at..])).flatten()
        })
    }
}

impl<T> Default for HostMap<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// The host of an authority: without userinfo it never has, and without its port.
#[must_use]
pub(crate) fn without_port(authority: &str) -> &str {
    if authority.starts_with('[') {
        return authority.find(']').map_or(authority, |end| &authority[..=end]);
    }
    match authority.rsplit_once(':') {
        // More than one colon without brackets is an IPv6 address, not a port.
        Some((host, port)) if !host.contains(':') && port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    }
}

fn lower<'a>(host: &'a str, buffer: &'a mut [u8; MAX_HOST]) -> &'a str {
    if !host.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return host;
    }
    let lowered = &mut buffer[..host.len()];
    lowered.copy_from_slice(host.as_bytes());
    lowered.make_ascii_lowercase();
    // Lowering ASCII letters keeps UTF-8 sound.
    std::str::from_utf8(lowered).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map(patterns: &[&'static str]) -> HostMap<&'static str> {
        let mut map = HostMap::new();
        for pattern in patterns {
            map.insert(pattern, *pattern).unwrap();
        }
        map
    }

    #[test]
    fn x_06_exact_then_longest_suffix_then_any() {
        let map = map(&["a.foo.com", "*.foo.com", "*.bar.foo.com", "*.com", "*"]);
        for (host, expected) in [
            ("a.foo.com", "a.foo.com"),
            ("A.Foo.COM:8080", "a.foo.com"),
            ("a.foo.com.", "a.foo.com"),
            ("b.foo.com", "*.foo.com"),
            ("x.bar.foo.com", "*.bar.foo.com"),
            ("bar.foo.com", "*.foo.com"),
            ("foo.com", "*.com"),
            ("com", "*"),
            ("[::1]:80", "*"),
        ] {
            assert_eq!(map.get(host), Some(&expected), "{host}");
        }
    }

    #[test]
    fn x_06_a_wildcard_does_not_match_its_parent() {
        assert_eq!(map(&["*.foo.com"]).get("foo.com"), None);
        assert_eq!(map(&["*.foo.com"]).get(".foo.com"), None);
    }

    #[test]
    fn a_second_value_for_a_pattern_is_refused() {
        let mut map = map(&["*.Foo.com", "*"]);
        assert_eq!(map.insert("*.foo.COM", "x"), Err(DuplicateHost("*.foo.com".to_owned())));
        assert_eq!(map.insert("*", "x"), Err(DuplicateHost("*".to_owned())));
        assert_eq!(map.len(), 2);
    }

    #[test]
    fn ports_are_ignored_and_addresses_kept() {
        for (authority, host) in [
            ("a:80", "a"),
            ("a", "a"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
            ("::1", "::1"),
            ("a:b", "a:b"),
        ] {
            assert_eq!(without_port(authority), host);
        }
    }

    proptest! {
        #[test]
        fn equals_a_scan(
            patterns in proptest::collection::btree_set("(\\*\\.)?[ab](\\.[ab]){0,3}|\\*", 0..12),
            host in "[abAB](\\.[abAB]){0,4}",
        ) {
            let mut map = HostMap::new();
            for pattern in &patterns {
                map.insert(pattern, pattern.clone()).unwrap();
            }
            let lowered = host.to_ascii_lowercase();
            let scan = patterns.iter().filter(|p| **p == lowered).max_by_key(|p| p.len())
                .or_else(|| patterns.iter().filter(|p| p.strip_prefix('*').is_some_and(|s| !s.is_empty() && lowered.ends_with(s))).max_by_key(|p| p.len()))
                .or_else(|| patterns.get("*"));
            prop_assert_eq!(map.get(&host), scan);
        }
    }
}
