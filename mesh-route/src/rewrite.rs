//! Rewriting path and authority before a request is forwarded (VS-W01, VS-W02, VS-W03).

use http::uri::PathAndQuery;
use http::{HeaderValue, Request, StatusCode, Uri};
use mesh_core::matcher::compile_re2;
use mesh_core::{Error, ResponseFlags, vendor};
use regex::Regex;

/// What is changed in path and authority. The default changes nothing.
#[derive(Clone, Debug, Default)]
pub struct Rewrite {
    /// What becomes of the path.
    pub path: PathRewrite,
    /// The new authority; `None` keeps it.
    pub authority: Option<HeaderValue>,
}

/// What becomes of the path. The query always stays.
#[derive(Clone, Debug, Default)]
pub enum PathRewrite {
    /// It stays.
    #[default]
    Keep,
    /// The matched prefix of this length is replaced.
    Prefix(usize, Box<str>),
    /// The whole path is replaced: the match was exact or a regular expression.
    Full(Box<str>),
    /// Every match of the expression is replaced; groups as `\1`.
    Regex(Box<RegexRewrite>),
}

/// A substitution by regular expression.
#[derive(Clone, Debug)]
pub struct RegexRewrite {
    expression: Regex,
    replacement: Box<str>,
}

impl RegexRewrite {
    /// Compiles an RE2 expression and a replacement in RE2's syntax: `\1` is a group, `\\` a backslash.
    ///
    /// # Errors
    /// The reason why the expression or the replacement is not accepted.
    pub fn new(expression: &str, replacement: &str) -> Result<Self, String> {
        let expression = compile_re2(expression).map_err(|error| error.to_string())?;
        let mut translated = String::with_capacity(replacement.len());
        let mut chars = replacement.chars();
        while let Some(next) = chars.next() {
            match next {
                '\\' => match chars.next() {
                    Some(digit @ '0'..='9') => {
                        let group = digit as usize - '0' as usize;
                        if group >= expression.captures_len() {
                            return Err(format!("\\{digit} names a group that the expression does not have"));
                        }
                        translated.push_str("${");
                        translated.push(digit);
                        translated.push('}');
                    }
                    Some('\\') => translated.push('\\'),
                    _ => return Err("a backslash stands before a digit or a backslash".to_owned()),
                },
                '$' => translated.push_str("$$"),
                other => translated.push(other),
            }
        }
        Ok(Self { expression, replacement: translated.into() })
    }
}

impl Rewrite {
    /// Whether nothing is changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.authority.is_none() && matches!(self.path, PathRewrite::Keep)
    }

    /// Changes the path of a request and keeps the old one in `x-envoy-original-path`. The authority is the
    /// dispatcher's business: a header operation may have set another.
    ///
    /// # Errors
    /// 500 when the result is no path.
    pub fn apply_path<B>(&self, request: &mut Request<B>) -> Result<(), Error> {
        let path = match request.uri().path() {
            "" => "/",
            path => path,
        };
        let rewritten = match &self.path {
            PathRewrite::Keep => return Ok(()),
            PathRewrite::Prefix(length, prefix) => {
                let mut rewritten = String::with_capacity(prefix.len() + path.len());
                rewritten.push_str(prefix);
                rewritten.push_str(path.get(*length..).unwrap_or(""));
                rewritten
            }
            PathRewrite::Full(path) => path.to_string(),
            PathRewrite::Regex(regex) => regex.expression.replace_all(path, &*regex.replacement).into_owned(),
        };
        if rewritten == path {
            return Ok(());
        }
        let mut target = rewritten;
        if !target.starts_with('/') {
            target.insert(0, '/');
        }
        if let Some(query) = request.uri().query() {
            target.push(if target.contains('?') { '&' } else { '?' });
            target.push_str(query);
        }
        let original = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
        if let Ok(original) = HeaderValue::from_str(original) {
            vendor::ORIGINAL_PATH.insert(request.headers_mut(), original);
        }
        let mut uri = std::mem::take(request.uri_mut()).into_parts();
        uri.path_and_query = Some(PathAndQuery::try_from(target).map_err(invalid)?);
        *request.uri_mut() = Uri::from_parts(uri).map_err(invalid)?;
        Ok(())
    }
}

fn invalid(error: impl Into<mesh_core::BoxError>) -> Error {
    Error::local_reply(StatusCode::INTERNAL_SERVER_ERROR, ResponseFlags::NONE, "invalid_rewrite")
        .with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(path: PathRewrite, uri: &str) -> (String, Option<String>) {
        let mut request = Request::get(uri).body(()).unwrap();
        Rewrite { path, authority: None }.apply_path(&mut request).unwrap();
        let original =
            request.headers().get("x-envoy-original-path").map(|value| value.to_str().unwrap().to_owned());
        (request.uri().to_string(), original)
    }

    #[test]
    fn vs_w01_a_prefix_match_replaces_the_prefix_only() {
        let prefix = |length, with: &str| PathRewrite::Prefix(length, with.into());
        assert_eq!(
            rewritten(prefix(4, "/new"), "/old/a?q=1"),
            ("/new/a?q=1".into(), Some("/old/a?q=1".into()))
        );
        assert_eq!(rewritten(prefix(1, "/v1"), "/a"), ("/v1a".into(), Some("/a".into())));
        assert_eq!(rewritten(prefix(4, "/"), "/old"), ("/".into(), Some("/old".into())));
    }

    #[test]
    fn vs_w01_an_exact_or_regex_match_replaces_the_whole_path() {
        assert_eq!(
            rewritten(PathRewrite::Full("/new/path".into()), "http://b/foo?key=value"),
            ("http://b/new/path?key=value".into(), Some("/foo?key=value".into()))
        );
    }

    #[test]
    fn vs_w03_regex_replaces_every_match_with_groups() {
        let regex = RegexRewrite::new("/v([0-9]+)", r"/\1$").unwrap();
        assert_eq!(rewritten(PathRewrite::Regex(regex.into()), "/v1/a/v22?v3").0, "/1$/a/22$?v3");
        // As RE2 reads it: digits are ASCII, and a brace that begins no repetition is a character.
        let regex = RegexRewrite::new(r"/{\d+}", "/n").unwrap();
        assert_eq!(rewritten(PathRewrite::Regex(regex.into()), "/{1}/{x}").0, "/n/{x}");
        assert!(RegexRewrite::new("/a", r"\1").is_err());
        assert!(RegexRewrite::new("(?=a)", "b").is_err());
    }

    #[test]
    fn vs_w01_nothing_to_change_leaves_no_trace() {
        assert_eq!(rewritten(PathRewrite::Keep, "/a"), ("/a".into(), None));
        assert_eq!(rewritten(PathRewrite::Full("/a".into()), "/a?b"), ("/a?b".into(), None));
    }
}
