//! One header, all of its values taken together.

use std::borrow::Cow;
use std::fmt;

use http::{HeaderMap, HeaderName};

use super::StringMatcher;

/// A compiled predicate on a header.
///
/// Repeated headers are joined with `,` before they are judged, as Envoy does: judging only the first would let a
/// second value pass unseen. Values that are not UTF-8 are judged with their foreign bytes replaced.
#[derive(Clone, Debug)]
pub struct HeaderMatcher {
    name: HeaderName,
    value: Option<StringMatcher>,
    invert: bool,
}

impl HeaderMatcher {
    /// The header is there, with any value.
    #[must_use]
    pub fn present(name: HeaderName) -> Self {
        Self { name, value: None, invert: false }
    }

    /// The header is there and its joined value matches.
    #[must_use]
    pub fn value(name: HeaderName, value: StringMatcher) -> Self {
        Self { name, value: Some(value), invert: false }
    }

    /// Istio's `withoutHeaders` (VS-M08): matches when this matcher does not. An absent header counts as the empty
    /// string there, so a value predicate that accepts the empty string keeps the inverted one from matching.
    #[must_use]
    pub fn inverted(mut self) -> Self {
        self.invert = !self.invert;
        self
    }

    /// The name of the header.
    #[must_use]
    pub fn name(&self) -> &HeaderName {
        &self.name
    }

    /// Whether the headers match.
    #[must_use]
    pub fn matches(&self, headers: &HeaderMap) -> bool {
        let value = joined(headers, &self.name);
        match (&self.value, value) {
            (None, value) => value.is_some() != self.invert,
            (Some(matcher), Some(value)) => matcher.matches(&value) != self.invert,
            (Some(matcher), None) if self.invert => !matcher.matches(""),
            (Some(_), None) => false,
        }
    }
}

/// The values of a header joined with `,`; `None` when it is absent. Allocates only when it is repeated or not UTF-8.
pub(crate) fn joined<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, str>> {
    let mut values = headers.get_all(name).iter();
    let first = String::from_utf8_lossy(values.next()?.as_bytes());
    let mut values = values.peekable();
    if values.peek().is_none() {
        return Some(first);
    }
    let mut all = first.into_owned();
    for value in values {
        all.push(',');
        all.push_str(&String::from_utf8_lossy(value.as_bytes()));
    }
    Some(Cow::Owned(all))
}

impl fmt::Display for HeaderMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = if self.invert { "not " } else { "" };
        match &self.value {
            None => write!(f, "{not}header {} present", self.name),
            Some(value) => write!(f, "{not}header {} {value}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        values
            .iter()
            .map(|value| (HeaderName::from_static("x-a"), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    fn name() -> HeaderName {
        HeaderName::from_static("x-a")
    }

    #[test]
    fn vs_m06_repeated_values_are_joined() {
        let matcher = HeaderMatcher::value(name(), StringMatcher::exact("a,b"));
        assert!(matcher.matches(&headers(&["a", "b"])));
        assert!(!matcher.matches(&headers(&["a"])));
    }

    #[test]
    fn vs_m06_presence_takes_an_empty_value() {
        assert!(HeaderMatcher::present(name()).matches(&headers(&[""])));
        assert!(!HeaderMatcher::present(name()).matches(&headers(&[])));
    }

    #[test]
    fn vs_m08_an_absent_header_is_empty_and_then_inverted() {
        let without = |matcher| HeaderMatcher::value(name(), matcher).inverted();
        assert!(without(StringMatcher::exact("a")).matches(&headers(&[])));
        assert!(without(StringMatcher::prefix("a")).matches(&headers(&[])));
        assert!(!without(StringMatcher::regex(".*").unwrap()).matches(&headers(&[])));
        assert!(without(StringMatcher::regex(".+").unwrap()).matches(&headers(&[])));
        assert!(!without(StringMatcher::exact("a")).matches(&headers(&["a"])));
        let absent = HeaderMatcher::present(name()).inverted();
        assert!(absent.matches(&headers(&[])) && !absent.matches(&headers(&["a"])));
    }
}
