//! Two answers, laid side by side. Pure.

use std::fmt::Write as _;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, StatusCode};
use serde_json::{Number, Value};

use super::captured::is_secret;

/// The most differences that one comparison tells.
const MOST: usize = 64;

/// The most characters of a value that a difference shows.
const SHOWN: usize = 120;

/// The most bytes of a path that a difference shows. A longer one is shown by its beginning and its end. Places are
/// told apart by what is left.
const LONGEST_PATH: usize = 256;

/// What is kept of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers, those that are compared at least.
    pub headers: HeaderMap,
    /// Its body, or the beginning of it.
    pub body: Bytes,
    /// Whether the body is longer than what was kept of it.
    pub cut: bool,
}

/// A place where two answers differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where: `status`, `header:NAME`, `body`, or a path into JSON such as `$.items[3].id`, shortened to 256 bytes.
    pub path: String,
    /// The place among others of its kind: `$.items[*].id`. What is noise is learned by it.
    pub place: String,
    /// How.
    pub kind: Kind,
    /// What the primary says, shortened.
    pub primary: Option<String>,
    /// What the other says, shortened.
    pub other: Option<String>,
}

/// How two answers differ at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The other does not have it.
    Missing,
    /// Only the other has it.
    Added,
    /// They have values of different types there.
    Type,
    /// They have different values there.
    Value,
}

impl Kind {
    /// As reports name it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Added => "added",
            Self::Type => "type",
            Self::Value => "value",
        }
    }
}

/// Where another answer differs from that of the primary, in these headers and otherwise everywhere. At most 64 places
/// are told; what comes after them is not looked at. Of a body that was cut nothing is said, and of `authorization`,
/// `proxy-authorization`, `cookie` and `set-cookie` no value is shown.
#[must_use]
pub fn compare(headers: &[HeaderName], primary: &Answer, other: &Answer) -> Vec<Difference> {
    let mut out = Vec::new();
    if primary.status != other.status {
        let (primary, other) = (primary.status.as_u16().to_string(), other.status.as_u16().to_string());
        out.push(Difference::new("status", Kind::Value, Some(primary), Some(other)));
    }
    for name in headers {
        if out.len() >= MOST {
            break;
        }
        let joined = |answer: &Answer| {
            let values: Vec<_> = answer
                .headers
                .get_all(name)
                .iter()
                .map(|value| String::from_utf8_lossy(value.as_bytes()))
                .collect();
            (!values.is_empty()).then(|| values.join(","))
        };
        let (primary, other) = (joined(primary), joined(other));
        if primary != other {
            let kind = Kind::of_presence(primary.is_some(), other.is_some());
            let (primary, other) = if is_secret(name) { (None, None) } else { (primary, other) };
            out.push(Difference::new(&format!("header:{name}"), kind, primary, other));
        }
    }
    if out.len() < MOST && !primary.cut && !other.cut && primary.body != other.body {
        bodies(&primary.body, &other.body, &mut out);
    }
    out
}

fn bodies(primary: &Bytes, other: &Bytes, out: &mut Vec<Difference>) {
    let json = |body: &Bytes| serde_json::from_slice::<Value>(body).ok();
    match (json(primary), json(other)) {
        (Some(primary), Some(other)) => {
            values(&mut Path { exact: "$".to_owned(), general: "$".to_owned() }, &primary, &other, out);
        }
        _ => {
            let text = |body: &Bytes| (!body.is_empty()).then(|| String::from_utf8_lossy(body).into_owned());
            let kind = Kind::of_presence(!primary.is_empty(), !other.is_empty());
            out.push(Difference::new("body", kind, text(primary), text(other)));
        }
    }
}

/// A place in JSON, as it is and without the numbers of items.
struct Path {
    exact: String,
    general: String,
}

impl Path {
    fn within(&mut self, write: impl Fn(&mut String, bool), then: impl FnOnce(&mut Self)) {
        let lengths = (self.exact.len(), self.general.len());
        write(&mut self.exact, true);
        write(&mut self.general, false);
        then(self);
        self.exact.truncate(lengths.0);
        self.general.truncate(lengths.1);
    }

    fn key(&mut self, key: &str, then: impl FnOnce(&mut Self)) {
        let plain = !key.is_empty()
            && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
        let write = |out: &mut String, _| {
            // Writing to a String cannot fail.
            let _ = if plain { write!(out, ".{key}") } else { write!(out, "[{}]", Value::from(key)) };
        };
        self.within(write, then);
    }

    fn item(&mut self, at: usize, then: impl FnOnce(&mut Self)) {
        let write = |out: &mut String, exact| {
            // Writing to a String cannot fail.
            let _ = if exact { write!(out, "[{at}]") } else { write!(out, "[*]") };
        };
        self.within(write, then);
    }

    fn tell(&self, kind: Kind, primary: Option<&Value>, other: Option<&Value>, out: &mut Vec<Difference>) {
        if out.len() >= MOST {
            return;
        }
        let text = |value: Option<&Value>| value.map(|value| shown(value.to_string()));
        out.push(Difference {
            path: shortened(&self.exact),
            place: shortened(&self.general),
            kind,
            primary: text(primary),
            other: text(other),
        });
    }
}

fn values(path: &mut Path, primary: &Value, other: &Value, out: &mut Vec<Difference>) {
    if out.len() >= MOST {
        return;
    }
    match (primary, other) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for (key, value) in ours {
                if out.len() >= MOST {
                    return;
                }
                path.key(key, |path| match theirs.get(key) {
                    Some(theirs) => values(path, value, theirs, out),
                    None => path.tell(Kind::Missing, Some(value), None, out),
                });
            }
            for (key, value) in theirs.iter().filter(|(key, _)| !ours.contains_key(*key)) {
                if out.len() >= MOST {
                    return;
                }
                path.key(key, |path| path.tell(Kind::Added, None, Some(value), out));
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            for at in 0..ours.len().max(theirs.len()) {
                if out.len() >= MOST {
                    return;
                }
                path.item(at, |path| match (ours.get(at), theirs.get(at)) {
                    (Some(ours), Some(theirs)) => values(path, ours, theirs, out),
                    (ours @ Some(_), None) => path.tell(Kind::Missing, ours, None, out),
                    (_, theirs) => path.tell(Kind::Added, None, theirs, out),
                });
            }
        }
        (Value::Number(ours), Value::Number(theirs)) if is_same(ours, theirs) => {}
        _ if std::mem::discriminant(primary) != std::mem::discriminant(other) => {
            path.tell(Kind::Type, Some(primary), Some(other), out);
        }
        _ if primary != other => path.tell(Kind::Value, Some(primary), Some(other), out),
        _ => {}
    }
}

/// 1 and 1.0 are one number. Whole ones are compared exactly: ids have more digits than a float.
fn is_same(ours: &Number, theirs: &Number) -> bool {
    if ours.is_f64() || theirs.is_f64() { ours.as_f64() == theirs.as_f64() } else { ours == theirs }
}

impl Kind {
    const fn of_presence(primary: bool, other: bool) -> Self {
        match (primary, other) {
            (true, false) => Self::Missing,
            (false, true) => Self::Added,
            _ => Self::Value,
        }
    }
}

impl Difference {
    fn new(path: &str, kind: Kind, primary: Option<String>, other: Option<String>) -> Self {
        let (path, place) = (shortened(path), shortened(path));
        Self { path, place, kind, primary: primary.map(shown), other: other.map(shown) }
    }
}

/// A path that is too long is known by where it begins and what it ends in.
fn shortened(path: &str) -> String {
    if path.len() <= LONGEST_PATH {
        return path.to_owned();
    }
    let half = LONGEST_PATH / 2;
    let (beginning, end) = (path.floor_char_boundary(half), path.ceil_char_boundary(path.len() - half));
    format!("{}…{}", &path[..beginning], &path[end..])
}

fn shown(mut text: String) -> String {
    if text.len() > SHOWN {
        text.truncate(text.floor_char_boundary(SHOWN));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(status: u16, headers: &[(&'static str, &'static str)], body: &str) -> Answer {
        Answer {
            status: StatusCode::from_u16(status).unwrap(),
            headers: headers.iter().map(|(n, v)| (HeaderName::from_static(n), v.parse().unwrap())).collect(),
            body: Bytes::from(body.to_owned()),
            cut: false,
        }
    }

    fn said(primary: &str, other: &str) -> Vec<String> {
        let found = compare(&[], &answer(200, &[], primary), &answer(200, &[], other));
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        found
            .iter()
            .map(|d| format!("{} {} {}|{}", d.path, d.kind.as_str(), text(&d.primary), text(&d.other)))
            .collect()
    }

    #[test]
    fn vs_p05_json_differs_by_path() {
        let same = r#"{"a": 1, "b": [1, {"c": null}], "d": "x"}"#;
        assert_eq!(
            said(same, r#"{"d":"x","b":[1.0,{"c":null}],"a":1}"#),
            [""; 0],
            "neither order nor spaces count"
        );
        assert_eq!(
            said(same, r#"{"a": "1", "b": [2, {"c": null, "e": true}, 3], "f g": 0}"#),
            [
                "$.a type 1|\"1\"",
                "$.b[0] value 1|2",
                "$.b[1].e added |true",
                "$.b[2] added |3",
                "$.d missing \"x\"|",
                "$[\"f g\"] added |0",
            ]
        );
        let ids = said("9007199254740993", "9007199254740992");
        assert_eq!(ids, ["$ value 9007199254740993|9007199254740992"]);
        assert_eq!(said("[1, 2]", "[1]"), ["$[1] missing 2|"]);
        assert_eq!(said("null", "0"), ["$ type null|0"]);
        assert_eq!(said("{}", "nothing"), ["body value {}|nothing"]);
        assert_eq!(said("text", ""), ["body missing text|"]);
        let place =
            &compare(&[], &answer(200, &[], r#"{"a":[{"b":1}]}"#), &answer(200, &[], r#"{"a":[{"b":2}]}"#))
                [0];
        assert_eq!((place.path.as_str(), place.place.as_str()), ("$.a[0].b", "$.a[*].b"));
    }

    #[test]
    fn vs_p05_status_and_the_headers_of_the_list() {
        let names = [HeaderName::from_static("content-type"), HeaderName::from_static("etag")];
        let primary = answer(200, &[("content-type", "text/plain"), ("date", "now"), ("etag", "1")], "");
        let other = answer(503, &[("content-type", "text/html"), ("date", "then")], "");
        let paths: Vec<_> = compare(&names, &primary, &other)
            .into_iter()
            .map(|d| format!("{} {}", d.path, d.kind.as_str()))
            .collect();
        assert_eq!(paths, ["status value", "header:content-type value", "header:etag missing"]);
    }

    #[test]
    fn bug_cookies_that_differ_were_shown() {
        let with = |value| answer(200, &[("set-cookie", value)], "");
        let found = compare(&[http::header::SET_COOKIE], &with("id=1"), &with("id=2"));
        let expected = Difference::new("header:set-cookie", Kind::Value, None, None);
        assert_eq!(found, [expected], "that they differ is told, not what they are");
    }

    #[test]
    fn vs_p05_what_is_told_is_bounded_and_what_was_cut_is_not_judged() {
        let many = |from: u32| serde_json::to_string(&(from..from + 10_000).collect::<Vec<_>>()).unwrap();
        assert_eq!(said(&many(0), &many(1)).len(), MOST);
        let long = said(&"ä".repeat(500), "b");
        assert!(long[0].len() < 200, "{long:?}");
        let cut = Answer { cut: true, ..answer(200, &[], "{\"a\": 1") };
        assert!(compare(&[], &cut, &answer(200, &[], "{}")).is_empty());
    }

    #[test]
    fn bug_items_under_a_long_key_took_a_gigabyte() {
        let key = "k".repeat(32 * 1024);
        let items = format!("{{\"{key}\":[{}]}}", vec!["1"; 1_000].join(","));
        let fields: serde_json::Map<_, _> =
            (0..100).map(|number| (format!("{number}{key}"), Value::from(1))).collect();
        let fields = Value::Object(fields).to_string();
        let no_items = format!("{{\"{key}\":[]}}");
        for (primary, other) in
            [(&*items, &*no_items), (&*no_items, &*items), (&*fields, "{}"), ("{}", &*fields)]
        {
            let mut out = Vec::new();
            bodies(&Bytes::from(primary.to_owned()), &Bytes::from(other.to_owned()), &mut out);
            assert_eq!(out.len(), MOST, "no more is told, not even for a while");
            let longest = out.iter().map(|told| told.path.len().max(told.place.len())).max();
            assert!(longest < Some(264), "{longest:?}");
        }
        let told = said(&items, &no_items);
        assert!(told[63].starts_with("$.kkk") && told[63].contains("kkk[63] missing"), "{}", told[63]);
    }

    proptest! {
        #[test]
        fn vs_p05_an_answer_does_not_differ_from_itself_and_any_change_is_seen(
            keys in proptest::collection::btree_map("[a-z. ]{0,4}", 0..5_i64, 1..6),
            at in any::<proptest::sample::Index>(),
        ) {
            let body = |map: &std::collections::BTreeMap<String, i64>| serde_json::to_string(&serde_json::json!([map])).unwrap();
            prop_assert!(said(&body(&keys), &body(&keys)).is_empty());
            let mut changed = keys.clone();
            let key = keys.keys().nth(at.index(keys.len())).unwrap().clone();
            changed.insert(key.clone(), 9);
            prop_assert_eq!(said(&body(&keys), &body(&changed)).len(), 1);
            changed.remove(&key);
            prop_assert_eq!(said(&body(&keys), &body(&changed)).len(), 1);
        }
    }
}
