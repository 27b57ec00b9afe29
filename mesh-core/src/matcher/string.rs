//! One string against exact, prefix, suffix, presence or a regular expression.

use std::fmt;

use regex::{Regex, RegexBuilder};

/// Longest regular expression that is accepted, in characters, as Istio's.
const MAX_PATTERN: usize = 1024;

/// Bound on the compiled size of a regular expression: `(a{1,1000}){1,1000}` is refused, not compiled.
const SIZE_LIMIT: usize = 1 << 20;

/// A compiled string predicate.
#[derive(Clone, Debug)]
pub struct StringMatcher(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Any,
    Present,
    Exact(Box<str>),
    ExactIgnoreCase(Box<str>),
    Prefix(Box<str>),
    PrefixIgnoreCase(Box<str>),
    Suffix(Box<str>),
    Regex { full: Regex, pattern: Box<str> },
}

/// A regular expression that is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidPattern {
    /// Not a regular expression of the RE2 kind: no look-around, no back-references, bounded size.
    #[error("invalid regular expression: {0}")]
    Syntax(String),
    /// Longer than 1,024 characters.
    #[error("a regular expression has at most {MAX_PATTERN} characters, this one has {0}")]
    TooLong(usize),
}

impl StringMatcher {
    /// Matches everything.
    #[must_use]
    pub const fn any() -> Self {
        Self(Kind::Any)
    }

    /// Matches whatever is not empty.
    #[must_use]
    pub const fn present() -> Self {
        Self(Kind::Present)
    }

    /// Matches `value` alone, case-sensitively.
    #[must_use]
    pub fn exact(value: impl Into<Box<str>>) -> Self {
        Self(Kind::Exact(value.into()))
    }

    /// Matches what begins with `value`, byte for byte: `/foo` matches `/foobar`.
    #[must_use]
    pub fn prefix(value: impl Into<Box<str>>) -> Self {
        Self(Kind::Prefix(value.into()))
    }

    /// Matches what ends with `value`.
    #[must_use]
    pub fn suffix(value: impl Into<Box<str>>) -> Self {
        Self(Kind::Suffix(value.into()))
    }

    /// Matches the *whole* string against an RE2 expression: `\d+$` does not match `a123`.
    ///
    /// # Errors
    /// [`InvalidPattern`] when the expression is too long, malformed or too large when compiled.
    pub fn regex(pattern: &str) -> Result<Self, InvalidPattern> {
        // Compiled alone first: `a)(b` must not become sound by the group that is put around it.
        let part = compile_re2(pattern)?;
        let full = compile(&full_match(part.as_str()))?;
        Ok(Self(Kind::Regex { full, pattern: pattern.into() }))
    }

    /// The same predicate without regard to ASCII case. Regular expressions say that themselves (`(?i)`) and do not
    /// change.
    #[must_use]
    pub fn ignore_case(self) -> Self {
        Self(match self.0 {
            Kind::Exact(value) => Kind::ExactIgnoreCase(value),
            Kind::Prefix(value) => Kind::PrefixIgnoreCase(value),
            other => other,
        })
    }

    /// Whether `value` matches.
    #[must_use]
    pub fn matches(&self, value: &str) -> bool {
        match &self.0 {
            Kind::Any => true,
            Kind::Present => !value.is_empty(),
            Kind::Exact(expected) => value == &**expected,
            Kind::ExactIgnoreCase(expected) => value.eq_ignore_ascii_case(expected),
            Kind::Prefix(prefix) => value.starts_with(&**prefix),
            Kind::PrefixIgnoreCase(prefix) => value
                .as_bytes()
                .get(..prefix.len())
                .is_some_and(|head| head.eq_ignore_ascii_case(prefix.as_bytes())),
            Kind::Suffix(suffix) => value.ends_with(&**suffix),
            Kind::Regex { full, .. } => full.is_match(value),
        }
    }

    /// The value of an exact predicate that regards case.
    #[must_use]
    pub fn as_exact(&self) -> Option<&str> {
        match &self.0 {
            Kind::Exact(value) => Some(value),
            _ => None,
        }
    }

    /// The value of a prefix predicate, with or without regard to case.
    #[must_use]
    pub fn as_prefix(&self) -> Option<&str> {
        match &self.0 {
            Kind::Prefix(value) | Kind::PrefixIgnoreCase(value) => Some(value),
            _ => None,
        }
    }

    /// The value of a prefix predicate that regards case.
    #[must_use]
    pub fn as_prefix_with_case(&self) -> Option<&str> {
        match &self.0 {
            Kind::Prefix(value) => Some(value),
            _ => None,
        }
    }

    /// The expression of a regular expression, in the syntax of the regex crate and anchored at both ends.
    #[must_use]
    pub fn as_regex(&self) -> Option<&str> {
        match &self.0 {
            Kind::Regex { full, .. } => Some(full.as_str()),
            _ => None,
        }
    }

    /// Whether every string matches.
    #[must_use]
    pub fn is_any(&self) -> bool {
        match &self.0 {
            Kind::Any => true,
            Kind::Prefix(prefix) => prefix.is_empty(),
            _ => false,
        }
    }
}

/// Compiles an RE2 expression that is looked for anywhere in a text.
///
/// # Errors
/// [`InvalidPattern`] when the expression is too long, malformed or too large when compiled.
pub fn compile_re2(pattern: &str) -> Result<Regex, InvalidPattern> {
    let length = pattern.chars().count();
    if length > MAX_PATTERN {
        return Err(InvalidPattern::TooLong(length));
    }
    compile(&super::re2::translate(pattern).map_err(InvalidPattern::Syntax)?)
}

fn compile(translated: &str) -> Result<Regex, InvalidPattern> {
    let built = RegexBuilder::new(translated).size_limit(SIZE_LIMIT).build();
    built.map_err(|error| InvalidPattern::Syntax(error.to_string()))
}

/// The expression that matches a whole string where `pattern` would match a part.
pub(crate) fn full_match(pattern: &str) -> String {
    format!(r"\A(?:{pattern})\z")
}

impl fmt::Display for StringMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Any => f.write_str("any"),
            Kind::Present => f.write_str("present"),
            Kind::Exact(value) => write!(f, "exact {value:?}"),
            Kind::ExactIgnoreCase(value) => write!(f, "exact {value:?} (any case)"),
            Kind::Prefix(value) => write!(f, "prefix {value:?}"),
            Kind::PrefixIgnoreCase(value) => write!(f, "prefix {value:?} (any case)"),
            Kind::Suffix(value) => write!(f, "suffix {value:?}"),
            Kind::Regex { pattern, .. } => write!(f, "regex {pattern:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vs_m02_prefix_is_raw() {
        let matcher = StringMatcher::prefix("/foo");
        assert!(matcher.matches("/foobar") && matcher.matches("/foo") && !matcher.matches("/fo"));
        assert!(StringMatcher::prefix("").matches(""));
    }

    #[test]
    fn vs_m03_regex_is_full_match() {
        let matcher = StringMatcher::regex(r"\d+$").unwrap();
        assert!(matcher.matches("123") && !matcher.matches("a123"));
        let alternatives = StringMatcher::regex("a|b").unwrap();
        assert!(alternatives.matches("b") && !alternatives.matches("ab"));
        assert!(StringMatcher::regex("(?i)/ABC").unwrap().matches("/abc"));
    }

    #[test]
    fn vs_m03_regex_is_bounded_and_has_no_look_around() {
        assert_eq!(StringMatcher::regex(&"a".repeat(1025)).unwrap_err(), InvalidPattern::TooLong(1025));
        assert!(StringMatcher::regex(&"a".repeat(1024)).is_ok());
        for pattern in ["(?=a)", r"(a)\1", "(a{1,1000}){1,1000}", "a)(b", "["] {
            assert!(matches!(StringMatcher::regex(pattern), Err(InvalidPattern::Syntax(_))), "{pattern}");
        }
    }

    #[test]
    fn vs_m04_case_is_ignored_for_exact_and_prefix_only() {
        assert!(StringMatcher::exact("/Foo").ignore_case().matches("/fOO"));
        assert!(StringMatcher::prefix("/Foo").ignore_case().matches("/fOObar"));
        assert!(!StringMatcher::prefix("/Foo").ignore_case().matches("/fé"));
        assert!(!StringMatcher::regex("/foo").unwrap().ignore_case().matches("/FOO"));
    }

    #[test]
    fn prints_itself_as_configuration_does() {
        assert_eq!(StringMatcher::prefix("/a").to_string(), r#"prefix "/a""#);
        assert_eq!(StringMatcher::regex(".*").unwrap().to_string(), r#"regex ".*""#);
    }
}
