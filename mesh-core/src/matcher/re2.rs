//! RE2's syntax in terms of the regex crate's.
//!
//! Both are linear and know neither look-around nor back-references, but they read some expressions differently, and
//! a route must match what it matches in Envoy:
//!
//! | | RE2 | regex |
//! |---|---|---|
//! | `\d` `\w` `\s` `\b` | ASCII | Unicode |
//! | `{` that begins no repetition | a character | an error |
//! | `[` in a class; `&&`, `--`, `~~` | characters | a nested class; operators |
//! | `\<` | a character | the start of a word |
//! | `\Q…\E` | literal text | an error |
//! | `a**`, `a{2}{3}`, `a{1001}`, the flags `x`, `u`, `R` | an error | accepted |

use std::iter::Peekable;
use std::str::CharIndices;

/// The largest count of a repetition.
const MAX_REPEAT: u32 = 1000;

/// `pattern` in the syntax of the regex crate.
///
/// # Errors
/// The reason why RE2 refuses what the regex crate would not; what both refuse is left to the regex crate.
pub(crate) fn translate(pattern: &str) -> Result<String, String> {
    let mut translation = Translation {
        pattern,
        rest: pattern.char_indices().peekable(),
        out: String::with_capacity(pattern.len()),
    };
    translation.run()?;
    Ok(translation.out)
}

struct Translation<'a> {
    pattern: &'a str,
    rest: Peekable<CharIndices<'a>>,
    out: String,
}

impl Translation<'_> {
    fn run(&mut self) -> Result<(), String> {
        let mut repeated = false;
        while let Some((at, c)) = self.rest.next() {
            let was_repeated = std::mem::take(&mut repeated);
            match c {
                '\\' => self.escape(at)?,
                '[' => self.class(at)?,
                '(' => self.group(at)?,
                '*' | '+' | '?' => {
                    self.out.push(c);
                    repeated = self.repeats(was_repeated)?;
                }
                '{' => match repetition(&self.pattern[at..]) {
                    None => self.out.push_str("\\{"),
                    Some(Repetition { len, max }) => {
                        if max > MAX_REPEAT {
                            return Err(format!("a repetition of more than {MAX_REPEAT}"));
                        }
                        self.out.push_str(&self.pattern[at..at + len]);
                        self.skip(at + len);
                        repeated = self.repeats(was_repeated)?;
                    }
                },
                _ => self.out.push(c),
            }
        }
        Ok(())
    }

    /// After a repetition, and the `?` that makes it lazy, there must be no other.
    fn repeats(&mut self, was_repeated: bool) -> Result<bool, String> {
        if was_repeated {
            return Err("a repetition of a repetition".to_owned());
        }
        if self.rest.next_if(|(_, c)| *c == '?').is_some() {
            self.out.push('?');
        }
        Ok(true)
    }

    fn escape(&mut self, at: usize) -> Result<(), String> {
        let Some((_, c)) = self.rest.next() else {
            self.out.push('\\');
            return Ok(());
        };
        match c {
            'd' => self.out.push_str("[0-9]"),
            'D' => self.out.push_str("[^0-9]"),
            'w' => self.out.push_str("[0-9A-Za-z_]"),
            'W' => self.out.push_str("[^0-9A-Za-z_]"),
            's' => self.out.push_str(r"[\t\n\f\r ]"),
            'S' => self.out.push_str(r"[^\t\n\f\r ]"),
            'b' => self.out.push_str(r"(?-u:\b)"),
            '<' | '>' => self.out.push(c),
            'Q' => self.quoted(at),
            _ => self.kept(c),
        }
        Ok(())
    }

    /// An escape that means the same, with the braces of `\p{Greek}` or `\x{1F600}`.
    fn kept(&mut self, c: char) {
        self.out.push('\\');
        self.out.push(c);
        if matches!(c, 'p' | 'P' | 'x') && self.rest.next_if(|(_, next)| *next == '{').is_some() {
            self.out.push('{');
            while let Some((_, inner)) = self.rest.next_if(|(_, next)| *next != '}') {
                self.out.push(inner);
            }
        }
    }

    /// The text after `\Q`, up to `\E` or the end.
    fn quoted(&mut self, at: usize) {
        let text = &self.pattern[at + 2..];
        let (literal, end) = match text.find("\\E") {
            Some(end) => (&text[..end], at + 2 + end + 2),
            None => (text, self.pattern.len()),
        };
        self.out.push_str(&regex::escape(literal));
        self.skip(end);
    }

    fn group(&mut self, at: usize) -> Result<(), String> {
        self.out.push('(');
        if let Some(flags) = self.pattern[at..].strip_prefix("(?") {
            let flags = flags.split([':', ')', '<', 'P', '=', '!', '#']).next().unwrap_or_default();
            if let Some(flag) = flags.chars().find(|flag| matches!(flag, 'x' | 'u' | 'R')) {
                return Err(format!("the flag {flag:?} is not supported"));
            }
            self.out.push('?');
            self.skip(at + 2);
        }
        Ok(())
    }

    fn class(&mut self, at: usize) -> Result<(), String> {
        self.out.push('[');
        if self.rest.next_if(|(_, c)| *c == '^').is_some() {
            self.out.push('^');
        }
        if self.rest.next_if(|(_, c)| *c == ']').is_some() {
            self.out.push_str("\\]");
        }
        while let Some((inner, c)) = self.rest.next() {
            let doubled =
                matches!(c, '&' | '-' | '~') && self.rest.peek().is_some_and(|(_, next)| *next == c);
            match c {
                ']' => {
                    self.out.push(']');
                    return Ok(());
                }
                '[' => match posix_class(&self.pattern[inner..]) {
                    Some(name) => {
                        self.out.push_str(name);
                        self.skip(inner + name.len());
                    }
                    None => self.out.push_str("\\["),
                },
                '\\' => match self.rest.next() {
                    Some((_, 'd')) => self.out.push_str("0-9"),
                    Some((_, 'w')) => self.out.push_str("0-9A-Za-z_"),
                    Some((_, 's')) => self.out.push_str(r"\t\n\f\r "),
                    Some((_, 'D')) => self.out.push_str("[^0-9]"),
                    Some((_, 'W')) => self.out.push_str("[^0-9A-Za-z_]"),
                    Some((_, 'S')) => self.out.push_str(r"[^\t\n\f\r ]"),
                    Some((_, c)) => self.kept(c),
                    None => self.out.push('\\'),
                },
                _ if doubled => {
                    // `+--` is a range that ends in a hyphen; a backslash before the second keeps it one.
                    self.rest.next();
                    self.out.extend([c, '\\', c]);
                }
                _ => self.out.push(c),
            }
        }
        Err(format!("missing ] after {:?}", &self.pattern[at..]))
    }

    /// Goes on at the byte `to`.
    fn skip(&mut self, to: usize) {
        while self.rest.next_if(|(at, _)| *at < to).is_some() {}
    }
}

struct Repetition {
    /// The length in bytes, braces included.
    len: usize,
    /// The larger of its counts.
    max: u32,
}

/// The `{n}`, `{n,}` or `{n,m}` that `text` begins with.
fn repetition(text: &str) -> Option<Repetition> {
    let inner = text.strip_prefix('{')?.split_once('}')?.0;
    let (low, high) = inner.split_once(',').unwrap_or((inner, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if low.is_empty() || !digits(low) || !digits(high) {
        return None;
    }
    let count = |text: &str| if text.is_empty() { 0 } else { text.parse().unwrap_or(u32::MAX) };
    Some(Repetition { len: inner.len() + 2, max: count(low).max(count(high)) })
}

/// The `[:name:]` that `text` begins with.
fn posix_class(text: &str) -> Option<&str> {
    let name = text.strip_prefix("[:")?;
    let end = name.find(":]")?;
    let letters = name[..end].strip_prefix('^').unwrap_or(&name[..end]);
    letters.bytes().all(|byte| byte.is_ascii_lowercase()).then(|| &text[..end + 4])
}

#[cfg(test)]
mod tests {
    use regex::Regex;

    use super::*;

    #[track_caller]
    fn matches(pattern: &str, text: &str) -> bool {
        let translated = translate(pattern).unwrap();
        Regex::new(&format!("^(?:{translated})$"))
            .unwrap_or_else(|e| panic!("{pattern}: {translated}: {e}"))
            .is_match(text)
    }

    #[test]
    fn what_both_read_alike_is_left_alone() {
        for pattern in [
            "",
            "a|b",
            "^/v1/.*$",
            "(?i)abc",
            "(?P<n>a)(?:b)",
            "[a-z]+?",
            "a{2,3}",
            "[^/]+",
            r"\.\*\{",
            r"\pL\p{Greek}",
            r"\x41\x{1F600}",
            "[[:alpha:]-]",
            "a??",
            "(?s-i:.)",
            "é+",
        ] {
            assert_eq!(translate(pattern).unwrap(), pattern);
        }
    }

    #[test]
    fn perl_classes_are_ascii() {
        assert!(matches(r"\d+", "12") && !matches(r"\d", "٣"));
        assert!(matches(r"\w\s\w", "a b") && !matches(r"\w", "é") && !matches(r"\s", "\u{a0}"));
        assert!(
            matches(r"[\w.-]+", "a.b-c_1")
                && !matches(r"[\w]", "é")
                && matches(r"[^\W]", "a")
                && matches(r"\W", "é")
        );
        assert!(matches(r"a\b.*", "aé") && !matches(r"a\b.*", "ab"));
    }

    #[test]
    fn braces_and_brackets_are_characters() {
        assert!(matches("/users/{id}", "/users/{id}") && matches("a{,2}", "a{,2}") && matches("{", "{"));
        assert!(matches("[[a]+", "a[") && matches("[]a]+", "]a") && matches("[^]]", "a"));
        assert!(matches("[a&&b]+", "a&b") && matches("[+--]+", "+,-") && matches("[a~~]+", "~a"));
        assert!(matches(r"\<b\>", "<b>") && matches(r"\Qa.b\E.", "a.bc") && !matches(r"\Qa.b", "axb"));
    }

    #[test]
    fn what_re2_refuses() {
        for pattern in ["a**", "a+*", "a{2}{3}", "a???", "a{1001}", "a{1,1001}", "(?x)a", "(?u)a", "[a"] {
            assert!(translate(pattern).is_err(), "{pattern}");
        }
    }
}
