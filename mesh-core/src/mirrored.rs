//! The mark of a copy, so that nobody copies a copy.
//!
//! Two services that mirror to each other would send one request round for ever. So a mirrored copy carries
//! `x-mesh-mirrored`, the list of the processes that have copied it, each by a number that it made up when it began.
//!
//! * A process never copies what it has copied before. Its number cannot be guessed, so this holds whoever is asked,
//!   and it ends every ring, of gateways too.
//! * Inside the mesh any mark is believed, so that the first proxy after the one that copied stops already. A service
//!   that passes the header on to what it calls keeps the calls of a copy from being copied as well.
//! * At a gateway a mark may come from outside, and who could make one up would hide from whoever watches the copies.
//!   So a gateway does not believe it, and writes `~` before each number: from there on nobody believes it but the
//!   process whose number it is.

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue};

/// The header of the mark.
pub const MARK: HeaderName = HeaderName::from_static("x-mesh-mirrored");

/// The most numbers that a mark keeps; the oldest go first.
const MOST: usize = 16;

/// Written before a number that came from outside.
const DISTRUSTED: char = '~';

/// The number of a process that copies requests.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MirrorId(u64);

impl MirrorId {
    /// This number. Whoever knows it can keep requests from being copied, so it is to be random.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Whether this process must not copy a request with these headers.
    #[must_use]
    pub fn declines(self, headers: &HeaderMap) -> bool {
        headers.contains_key(MARK) && numbers(headers).any(|(number, believed)| believed || number == self)
    }

    /// Marks a copy that this process has made.
    pub fn mark(self, headers: &mut HeaderMap) {
        let mut all: Vec<_> = numbers(headers).collect();
        all.push((self, true));
        write(headers, &all);
    }
}

/// Prints sixteen hexadecimal digits.
impl fmt::Display for MirrorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A number that others must not know is not logged.
impl fmt::Debug for MirrorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MirrorId(..)")
    }
}

/// Takes the belief from a mark that came from outside.
pub(crate) fn distrust(headers: &mut HeaderMap) {
    if headers.contains_key(MARK) {
        let all: Vec<_> = numbers(headers).map(|(number, _)| (number, false)).collect();
        write(headers, &all);
    }
}

/// The numbers of a mark, each with whether it is believed. What is no number is left out.
fn numbers(headers: &HeaderMap) -> impl Iterator<Item = (MirrorId, bool)> {
    let tokens = headers.get_all(MARK).into_iter().filter_map(|value| value.to_str().ok());
    tokens.flat_map(|value| value.split(',')).filter_map(|token| {
        let token = token.trim();
        let digits = token.trim_start_matches(DISTRUSTED);
        let is_number = digits.len() == 16 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        let number = is_number.then(|| u64::from_str_radix(digits, 16).ok()).flatten()?;
        Some((MirrorId(number), digits.len() == token.len()))
    })
}

fn write(headers: &mut HeaderMap, numbers: &[(MirrorId, bool)]) {
    let kept = &numbers[numbers.len().saturating_sub(MOST)..];
    let text: Vec<_> = kept
        .iter()
        .map(
            |(number, believed)| if *believed { number.to_string() } else { format!("{DISTRUSTED}{number}") },
        )
        .collect();
    headers.remove(MARK);
    if let (false, Ok(value)) = (text.is_empty(), HeaderValue::try_from(text.join(","))) {
        headers.insert(MARK, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: MirrorId = MirrorId::new(0xa);
    const B: MirrorId = MirrorId::new(0xb);

    fn marked(value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(MARK, HeaderValue::from_static(value))])
    }

    #[test]
    fn vs_p04_nobody_in_the_mesh_copies_a_copy() {
        let mut headers = HeaderMap::new();
        assert!(!A.declines(&headers));
        A.mark(&mut headers);
        assert_eq!(headers[MARK], "000000000000000a");
        assert!(A.declines(&headers) && B.declines(&headers));
    }

    #[test]
    fn vs_p04_a_mark_from_outside_is_believed_only_by_whose_it_is() {
        let mut headers = marked("000000000000000a");
        distrust(&mut headers);
        assert_eq!(headers[MARK], "~000000000000000a");
        assert!(A.declines(&headers), "its own copy came back");
        assert!(!B.declines(&headers), "anybody could have sent this");
        B.mark(&mut headers);
        assert_eq!(headers[MARK], "~000000000000000a,000000000000000b");
        distrust(&mut headers);
        distrust(&mut headers);
        assert_eq!(headers[MARK], "~000000000000000a,~000000000000000b");
        assert!(A.declines(&headers) && B.declines(&headers));
        assert!(!MirrorId::new(0xc).declines(&headers));
    }

    #[test]
    fn vs_p04_what_is_no_mark_marks_nothing() {
        for value in ["", "1", "yes", "~", "zzzzzzzzzzzzzzzz", "000000000000000a0", "+00000000000000a "] {
            let mut headers = marked(value);
            assert!(!A.declines(&headers), "{value}");
            distrust(&mut headers);
            assert!(!headers.contains_key(MARK), "{value}");
        }
    }

    #[test]
    fn vs_p04_a_mark_stays_short() {
        let mut headers = HeaderMap::new();
        for number in 0..100 {
            MirrorId::new(number).mark(&mut headers);
        }
        assert_eq!(numbers(&headers).count(), MOST);
        assert!(numbers(&headers).any(|(number, _)| number == MirrorId::new(99)));
    }
}
