//! One path for routing, authorization and forwarding (AP-07).
//!
//! A path can be written in many ways that a server takes for the same; a rule that looks at one of them is passed by
//! another. So the path is rewritten once, at the edge, and everybody reads the result, the upstream included.

use std::borrow::Cow;

/// How far a path is normalised. Istio's `pathNormalization.normalization`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PathNormalization {
    /// Not at all.
    None,
    /// RFC 3986: dot segments are removed, `\` becomes `/`, and unreserved characters are decoded. The default.
    #[default]
    Base,
    /// As [`Base`](Self::Base), and slashes in a row become one.
    MergeSlashes,
    /// As [`MergeSlashes`](Self::MergeSlashes), with `%2F` and `%5C` decoded before anything else.
    DecodeAndMergeSlashes,
}

impl PathNormalization {
    /// The normalised form of a path without query; borrowed when it is the path itself. Normalising twice changes
    /// nothing.
    #[must_use]
    pub fn apply(self, path: &str) -> Cow<'_, str> {
        if self == Self::None || is_normal(path) {
            return Cow::Borrowed(path);
        }
        let mut normal = self.pass(path);
        // Merged slashes can bring forth dot segments that were none, so that one pass is not always enough.
        loop {
            let next = self.pass(&normal);
            if next == normal {
                return if normal == path { Cow::Borrowed(path) } else { Cow::Owned(normal) };
            }
            normal = next;
        }
    }

    fn pass(self, path: &str) -> String {
        let decoded = decode(path, self == Self::DecodeAndMergeSlashes);
        let mut normal = remove_dot_segments(&decoded);
        if matches!(self, Self::MergeSlashes | Self::DecodeAndMergeSlashes) {
            merge_slashes(&mut normal);
        }
        normal
    }
}

/// Whether no mode changes the path: nothing is escaped or turned around, and no segment is empty or of dots.
fn is_normal(path: &str) -> bool {
    let bytes = path.as_bytes();
    bytes.first() == Some(&b'/')
        && !bytes.iter().any(|byte| matches!(byte, b'%' | b'\\'))
        && !bytes.windows(2).any(|pair| pair[0] == b'/' && matches!(pair[1], b'/' | b'.'))
}

/// Decodes unreserved characters and turns backslashes around; `slashes` decodes the escaped ones too. What decoding
/// brings forth (`%%32e`) is decoded with it: the end of what was written is looked at again, so that the work is that
/// of one pass however deep escapes are nested.
fn decode(path: &str, slashes: bool) -> String {
    let mut decoded: Vec<u8> = Vec::with_capacity(path.len());
    for byte in path.bytes() {
        decoded.push(if byte == b'\\' { b'/' } else { byte });
        while let [.., b'%', high, low] = decoded[..] {
            let plain = match hex(&[high, low]) {
                Some(byte) if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') => {
                    byte
                }
                Some(b'/' | b'\\') if slashes => b'/',
                _ => break,
            };
            decoded.truncate(decoded.len() - 3);
            decoded.push(plain);
        }
    }
    // Only ASCII was taken out and put in.
    String::from_utf8(decoded).unwrap_or_else(|_| path.to_owned())
}

fn hex(digits: &[u8]) -> Option<u8> {
    let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    match digits {
        [high, low] => Some(value(*high)? << 4 | value(*low)?),
        _ => None,
    }
}

/// RFC 3986 §5.2.4: an empty segment is a segment, so that `/a//..` is `/a/`.
fn remove_dot_segments(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.strip_prefix('/').unwrap_or(path).split('/').peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." | ".." => {
                if segment == ".." {
                    kept.pop();
                }
                if last {
                    kept.push("");
                }
            }
            other => kept.push(other),
        }
    }
    let mut normal = String::with_capacity(path.len() + 1);
    for segment in kept {
        normal.push('/');
        normal.push_str(segment);
    }
    if normal.is_empty() {
        normal.push('/');
    }
    normal
}

fn merge_slashes(path: &mut String) {
    let mut slash = false;
    path.retain(|next| {
        let again = slash && next == '/';
        slash = next == '/';
        !again
    });
}

#[cfg(feature = "istio")]
impl From<crate::istio::types::mesh_config::NormalizationType> for PathNormalization {
    fn from(kind: crate::istio::types::mesh_config::NormalizationType) -> Self {
        use crate::istio::types::mesh_config::NormalizationType as Kind;
        match kind {
            Kind::None => Self::None,
            Kind::Default | Kind::Base => Self::Base,
            Kind::MergeSlashes => Self::MergeSlashes,
            Kind::DecodeAndMergeSlashes => Self::DecodeAndMergeSlashes,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MODES: [PathNormalization; 4] = [
        PathNormalization::None,
        PathNormalization::Base,
        PathNormalization::MergeSlashes,
        PathNormalization::DecodeAndMergeSlashes,
    ];

    #[test]
    fn ap_07_the_modes() {
        for (path, base, merged, decoded) in [
            ("/", "/", "/", "/"),
            ("/app/../admin", "/admin", "/admin", "/admin"),
            ("/app//../admin", "/app/admin", "/app/admin", "/app/admin"),
            ("/app//../../admin", "/admin", "/admin", "/admin"),
            ("/../../a", "/a", "/a", "/a"),
            ("/a/.", "/a/", "/a/", "/a/"),
            ("/a/..", "/", "/", "/"),
            ("/app//", "/app//", "/app/", "/app/"),
            ("/app/%2f", "/app/%2f", "/app/%2f", "/app/"),
            ("/%61dmin", "/admin", "/admin", "/admin"),
            ("/app/%2E./admin", "/admin", "/admin", "/admin"),
            ("/app\\admin", "/app/admin", "/app/admin", "/app/admin"),
            ("/%2Fapp%5cadmin", "/%2Fapp%5cadmin", "/%2Fapp%5cadmin", "/app/admin"),
            ("/a%252fb", "/a%252fb", "/a%252fb", "/a%252fb"),
            ("/%%32e%%32e/x", "/x", "/x", "/x"),
            ("/a%2f..%2fb", "/a%2f..%2fb", "/a%2f..%2fb", "/b"),
            ("/100%", "/100%", "/100%", "/100%"),
            ("/a;b/..;/c", "/a;b/..;/c", "/a;b/..;/c", "/a;b/..;/c"),
        ] {
            for (mode, expected) in MODES.iter().zip([path, base, merged, decoded]) {
                assert_eq!(mode.apply(path), expected, "{mode:?} {path}");
            }
        }
    }

    #[test]
    fn what_is_normal_is_borrowed() {
        for mode in MODES {
            assert!(matches!(mode.apply("/api/v1/items.json"), Cow::Borrowed(_)));
            assert!(matches!(mode.apply("/a/b%20c"), Cow::Borrowed(_)));
        }
    }

    proptest! {
        #[test]
        fn f1_normalising_twice_changes_nothing(path in "(/|\\\\|%2f|%2F|%5c|%2e|%2E|%25|%|32|\\.|\\.\\.|a|admin|;|%61|%7e|é){0,14}") {
            let path = format!("/{path}");
            for mode in MODES {
                let once = mode.apply(&path).into_owned();
                prop_assert_eq!(mode.apply(&once), once.as_str());
                if mode != PathNormalization::None {
                    prop_assert!(once.starts_with('/') && !once.contains('\\'));
                    prop_assert!(!once.split('/').any(|segment| segment == "." || segment == ".."), "{}", once);
                }
                if matches!(mode, PathNormalization::MergeSlashes | PathNormalization::DecodeAndMergeSlashes) {
                    prop_assert!(!once.contains("//"), "{}", once);
                }
            }
        }
    }
}
