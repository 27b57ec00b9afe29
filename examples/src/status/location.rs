//! Where a redirect leads: the reference in `Location`, resolved against the place that answered with it (RFC 3986 §5.2).

use std::borrow::Cow;

use http::uri::{Authority, PathAndQuery};

/// A place that is asked over HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Location {
    /// Whether it is asked over TLS.
    pub(super) secure: bool,
    /// Its host; an IPv6 address without brackets.
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) path: PathAndQuery,
}

impl Location {
    /// Where `reference` leads from here; `None` when that is nothing of HTTP.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn resolve(&self, reference: &str) -> Result<Option<Self>, String> {
        let unreadable = || format!("the location {reference:?} cannot be read");
        let (whole, _) = reference.split_once('#').unwrap_or((reference, ""));
        let (secure, rest) = match scheme(whole) {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (false, rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (true, rest),
            Some(_) => return Ok(None),
            None => (self.secure, whole),
        };
        if let Some(rest) = rest.strip_prefix("//") {
            let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
            let authority: Authority = authority.parse().map_err(|_| unreadable())?;
            let path = match path {
                "" => Cow::Borrowed("/"),
                query if query.starts_with('?') => Cow::Owned(format!("/{query}")),
                path => Cow::Borrowed(path),
            };
            return Ok(Some(Self {
                secure,
                host: authority.host().trim_matches(['[', ']']).to_owned(),
                port: port(&authority, secure).ok_or_else(unreadable)?,
                path: without_dots(&path).try_into().map_err(|_| unreadable())?,
            }));
        }
        if rest.len() != whole.len() {
            // `http:path` means different things to different readers.
            return Err(unreadable());
        }
        let path = if rest.starts_with('/') {
            Cow::Borrowed(rest)
        } else if rest.is_empty() {
            Cow::Borrowed(self.path.as_str())
        } else if rest.starts_with('?') {
            Cow::Owned(format!("{}{rest}", self.path.path()))
        } else {
            let (folder, _) = self.path.path().rsplit_once('/').unwrap_or_default();
            Cow::Owned(format!("{folder}/{rest}"))
        };
        let path = without_dots(&path).try_into().map_err(|_| unreadable())?;
        Ok(Some(Self { path, ..self.clone() }))
    }

    /// The same place by its authority, the port always named.
    pub(super) fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// Whether a reference names its scheme, and so leaves nothing of the place that it is resolved against.
pub(super) fn is_absolute(reference: &str) -> bool {
    scheme(reference).is_some()
}

/// The scheme of a reference, and what follows its colon.
fn scheme(reference: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = reference.split_once(':')?;
    let known = scheme.starts_with(|first: char| first.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
    known.then_some((scheme, rest))
}

/// The port of an authority, or that of its scheme; `None` for what is no port.
fn port(authority: &Authority, secure: bool) -> Option<u16> {
    let (_, address) = authority.as_str().rsplit_once('@').unwrap_or(("", authority.as_str()));
    match address.strip_prefix(authority.host())? {
        "" | ":" => Some(if secure { 443 } else { 80 }),
        port => port.strip_prefix(':')?.parse().ok(),
    }
}

/// The path without `.` and `..`; its query as it is.
fn without_dots(reference: &str) -> String {
    let (path, query) = reference.split_at(reference.find('?').unwrap_or(reference.len()));
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        match segment {
            "." | ".." => {
                if segment == ".." {
                    kept.pop();
                }
                if is_last {
                    kept.push("");
                }
            }
            segment => kept.push(segment),
        }
    }
    format!("/{}{query}", kept.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str) -> Location {
        Location {
            secure: false,
            host: "10.0.0.1".to_owned(),
            port: 8080,
            path: PathAndQuery::try_from(path).unwrap(),
        }
    }

    #[test]
    fn a_reference_is_resolved_as_the_standard_says() {
        let from = at("/b/c/d?q");
        for (reference, authority, path) in [
            ("g", "10.0.0.1:8080", "/b/c/g"),
            ("./g", "10.0.0.1:8080", "/b/c/g"),
            ("g/", "10.0.0.1:8080", "/b/c/g/"),
            ("/g", "10.0.0.1:8080", "/g"),
            ("//g", "g:80", "/"),
            ("?y", "10.0.0.1:8080", "/b/c/d?y"),
            ("g?y", "10.0.0.1:8080", "/b/c/g?y"),
            ("#s", "10.0.0.1:8080", "/b/c/d?q"),
            ("g#s", "10.0.0.1:8080", "/b/c/g"),
            ("", "10.0.0.1:8080", "/b/c/d?q"),
            (".", "10.0.0.1:8080", "/b/c/"),
            ("..", "10.0.0.1:8080", "/b/"),
            ("../g", "10.0.0.1:8080", "/b/g"),
            ("../../../g", "10.0.0.1:8080", "/g"),
            ("/./g", "10.0.0.1:8080", "/g"),
            ("g;x=1/../y", "10.0.0.1:8080", "/b/c/y"),
            ("g?y/../x", "10.0.0.1:8080", "/b/c/g?y/../x"),
            ("http://h:1/x", "h:1", "/x"),
            ("HTTP://h", "h:80", "/"),
            ("http://[::1]:2/x?y", "[::1]:2", "/x?y"),
            ("http://h?y", "h:80", "/?y"),
            ("http://user:1@h/", "h:80", "/"),
            ("http://user:1@h:2/", "h:2", "/"),
            ("http://h:/x", "h:80", "/x"),
        ] {
            let to = from.resolve(reference).unwrap().unwrap();
            assert_eq!((to.authority().as_str(), to.path.as_str()), (authority, path), "{reference:?}");
            assert!(!to.secure);
        }
        let to = from.resolve("https://10.0.0.1/x").unwrap().unwrap();
        assert_eq!((to.secure, to.port), (true, 443));
        assert!(to.resolve("y").unwrap().unwrap().secure, "it stays on TLS");
        assert_eq!(at("/").resolve("a:b").unwrap(), None, "another scheme");
        assert_eq!(at("/x").resolve("y").unwrap().unwrap().path.as_str(), "/y");
        for reference in ["http:g", "http://", "http://a b/", "/a b", "http://h:99999/"] {
            assert!(from.resolve(reference).is_err(), "{reference:?}");
        }
    }
}
