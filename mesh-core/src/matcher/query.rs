//! One query parameter.

use std::borrow::Cow;
use std::fmt;

use super::StringMatcher;

/// A compiled predicate on a query parameter. The first of several values counts, as in Envoy; `?key` has the empty
/// value.
#[derive(Clone, Debug)]
pub struct QueryMatcher {
    name: Box<str>,
    value: Option<StringMatcher>,
}

impl QueryMatcher {
    /// The parameter is there, with any value.
    #[must_use]
    pub fn present(name: impl Into<Box<str>>) -> Self {
        Self { name: name.into(), value: None }
    }

    /// The parameter is there and its value matches.
    #[must_use]
    pub fn value(name: impl Into<Box<str>>, value: StringMatcher) -> Self {
        Self { name: name.into(), value: Some(value) }
    }

    /// The name of the parameter.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the query string (without its `?`) matches.
    #[must_use]
    pub fn matches(&self, query: &str) -> bool {
        match (first(query, &self.name), &self.value) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(value), Some(matcher)) => matcher.matches(&value),
        }
    }
}

/// The first value of a parameter. Allocates only when it is percent-encoded.
#[must_use]
pub(crate) fn first<'a>(query: &'a str, name: &str) -> Option<Cow<'a, str>> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(key) == name && !(key.is_empty() && value.is_empty())).then(|| decode(value))
    })
}

fn decode(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let [first, tail @ ..] = rest {
        match (first, tail) {
            (b'%', [high, low, after @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                decoded.push(hex(*high) << 4 | hex(*low));
                rest = after;
            }
            _ => {
                decoded.push(*first);
                rest = tail;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&decoded).into_owned())
}

const fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => (digit | 0x20) - b'a' + 10,
    }
}

impl fmt::Display for QueryMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            None => write!(f, "query {} present", self.name),
            Some(value) => write!(f, "query {} {value}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vs_m09_the_first_value_counts_and_a_bare_key_is_empty() {
        let exact = |value| QueryMatcher::value("key", StringMatcher::exact(value));
        assert!(exact("a").matches("x=1&key=a&key=b"));
        assert!(!exact("b").matches("key=a&key=b"));
        assert!(exact("").matches("key") && exact("").matches("key=") && !exact("").matches("x=1"));
        assert!(
            QueryMatcher::present("key").matches("key") && !QueryMatcher::present("key").matches("keys=1")
        );
        assert!(exact("a b").matches("key=a%20b") && exact("a%2").matches("key=a%2"));
        assert!(QueryMatcher::value("key", StringMatcher::regex(r"\d+").unwrap()).matches("key=12"));
    }
}
