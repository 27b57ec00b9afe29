//! A page of metrics as text: its format, and passing it on by whole lines.

use bytes::{Bytes, BytesMut};
use http::HeaderValue;

/// The most bytes of the application's page that are passed on.
const MOST_PAGE: usize = 64 * 1024 * 1024;
/// The longest line of it.
const MOST_LINE: usize = 1024 * 1024;
/// How a page in OpenMetrics ends.
const EOF: &[u8] = b"# EOF";

/// The content type of a page in Prometheus' text format.
pub const TEXT_PAGE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The format of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Prometheus' own.
    Text,
    OpenMetrics001,
    OpenMetrics100,
}

impl Format {
    /// The format of a page with this content type; whatever is not OpenMetrics of a known version is taken for text.
    pub(super) fn of(content_type: Option<&HeaderValue>) -> Format {
        let mut parts =
            content_type.and_then(|value| value.to_str().ok()).unwrap_or("").split(';').map(str::trim);
        if !parts.next().is_some_and(|name| name.eq_ignore_ascii_case("application/openmetrics-text")) {
            return Format::Text;
        }
        let version = parts.find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            name.eq_ignore_ascii_case("version").then(|| value.trim_matches('"'))
        });
        match version {
            Some("1.0.0") => Format::OpenMetrics100,
            Some("0.0.1" | "") | None => Format::OpenMetrics001,
            Some(_) => Format::Text,
        }
    }

    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Text => TEXT_PAGE,
            Self::OpenMetrics001 => "application/openmetrics-text; version=0.0.1; charset=utf-8",
            Self::OpenMetrics100 => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// A page by its lines.
#[derive(Debug)]
pub(super) struct Lines {
    format: Format,
    /// What came of a line whose end has not come.
    held: BytesMut,
    /// How many bytes may still come.
    left: usize,
    /// Whether the last whole line was the end of a page in OpenMetrics.
    at_eof: bool,
}

impl Lines {
    pub(super) fn new(format: Format) -> Self {
        Self { format, held: BytesMut::new(), left: MOST_PAGE, at_eof: false }
    }

    /// The lines that `data` completes.
    pub(super) fn push(&mut self, data: &[u8]) -> Result<Bytes, String> {
        self.left =
            self.left.checked_sub(data.len()).ok_or_else(|| format!("it has more than {MOST_PAGE} bytes"))?;
        self.held.extend_from_slice(data);
        // What was held before has no end of a line.
        let Some(end) = data.iter().rposition(|byte| *byte == b'\n') else {
            return if self.held.len() > MOST_LINE {
                Err(format!("a line has more than {MOST_LINE} bytes"))
            } else {
                Ok(Bytes::new())
            };
        };
        let lines = self.held.split_to(self.held.len() - data.len() + end + 1).freeze();
        let text = &lines[..lines.len() - 1];
        let last = text.iter().rposition(|byte| *byte == b'\n').map_or(text, |before| &text[before + 1..]);
        self.at_eof = last == EOF;
        Ok(lines)
    }

    /// What follows the last line, `failed` or not, and what was wrong with the page.
    pub(super) fn end(&mut self, failed: Option<String>) -> (Bytes, Option<String>) {
        let is_open = self.format != Format::Text;
        let held = self.held.split().freeze();
        if failed.is_none() && (!is_open || held == EOF || (held.is_empty() && self.at_eof)) {
            return (held, None);
        }
        let failed = failed.unwrap_or_else(|| "it ends without # EOF".to_owned());
        let last = if is_open && !self.at_eof { Bytes::from_static(b"# EOF\n") } else { Bytes::new() };
        (last, Some(failed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(format: Format, pieces: &[&str], failed: Option<&str>) -> (String, Option<String>) {
        let mut lines = Lines::new(format);
        let mut all = Vec::new();
        for piece in pieces {
            let whole = lines.push(piece.as_bytes()).unwrap();
            assert!(whole.is_empty() || whole.ends_with(b"\n"), "{whole:?}");
            all.extend_from_slice(&whole);
        }
        let (last, failed) = lines.end(failed.map(str::to_owned));
        all.extend_from_slice(&last);
        (String::from_utf8(all).unwrap(), failed)
    }

    #[test]
    fn a_page_passes_as_it_is() {
        for format in [Format::Text, Format::OpenMetrics100] {
            for pieces in [
                &["a 1\nb 2\n# EOF\n"][..],
                &["a", " 1", "\nb 2\n#", " EO", "F\n"],
                &["a 1\nb 2\n", "# EOF\n"],
            ] {
                assert_eq!(
                    merged(format, pieces, None),
                    ("a 1\nb 2\n# EOF\n".to_owned(), None),
                    "{pieces:?}"
                );
            }
            assert_eq!(merged(format, &["a 1\n# EOF"], None), ("a 1\n# EOF".to_owned(), None));
        }
        assert_eq!(merged(Format::Text, &["a 1\nb 2"], None), ("a 1\nb 2".to_owned(), None));
        assert_eq!(merged(Format::Text, &[], None), (String::new(), None));
    }

    #[test]
    fn a_page_that_breaks_off_ends_with_a_whole_line() {
        let broken = || Some("broken".to_owned());
        assert_eq!(merged(Format::Text, &["a 1\nb", " 2"], Some("broken")), ("a 1\n".to_owned(), broken()));
        let open = Format::OpenMetrics001;
        assert_eq!(merged(open, &["a 1\nb", " 2"], Some("broken")), ("a 1\n# EOF\n".to_owned(), broken()));
        assert_eq!(merged(open, &["a 1\n# EOF\n"], Some("broken")), ("a 1\n# EOF\n".to_owned(), broken()));
        let (page, failed) = merged(open, &["a 1\n"], None);
        assert_eq!((page.as_str(), failed.is_some()), ("a 1\n# EOF\n", true), "the end is missing");
        let (page, failed) = merged(open, &["a 1\n", "b 2"], None);
        assert_eq!((page.as_str(), failed.is_some()), ("a 1\n# EOF\n", true), "cut within a line");
    }

    #[test]
    fn lines_and_pages_have_bounds() {
        let mut lines = Lines::new(Format::Text);
        assert!(lines.push(&vec![b'a'; MOST_LINE]).is_ok());
        assert!(lines.push(b"a").unwrap_err().contains("a line has more than"));
        let mut lines = Lines::new(Format::Text);
        lines.left = 4;
        assert_eq!(&lines.push(b"a 1\n").unwrap()[..], b"a 1\n");
        assert!(lines.push(b"\n").unwrap_err().contains("it has more than"));
    }

    #[test]
    fn the_format_is_that_of_the_application() {
        for (content_type, format) in [
            ("", Format::Text),
            ("text/plain; version=0.0.4", Format::Text),
            ("application/openmetrics-text; version=1.0.0; charset=utf-8", Format::OpenMetrics100),
            ("Application/OpenMetrics-Text;charset=utf-8;Version=\"1.0.0\"", Format::OpenMetrics100),
            ("application/openmetrics-text; version=0.0.1", Format::OpenMetrics001),
            ("application/openmetrics-text", Format::OpenMetrics001),
            ("application/openmetrics-text; version=2.0.0", Format::Text),
            ("application/openmetrics-textual", Format::Text),
        ] {
            let value = HeaderValue::from_static(content_type);
            assert_eq!(Format::of(Some(&value)), format, "{content_type}");
        }
        assert_eq!(Format::of(None), Format::Text);
    }
}
