//! A [`serde::Deserializer`] over the tree that collects instead of stopping.

use std::cell::RefCell;
use std::fmt::{self, Display, Write as _};

use serde::de::value::{BorrowedStrDeserializer, StringDeserializer};
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

use super::tree::{Entry, Node, Number, Scalar, Value};
use super::words::{describe, range_message, unknown_message};
use crate::documents::{is_plain_key, snake_to_camel};

/// After so many errors in one document the rest is not worth reading.
const MAX_PROBLEMS: usize = 50;

/// Something wrong at a place of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) path: String,
    pub(crate) line: u32,
    pub(crate) column: u32,
    pub(crate) message: String,
}

impl Problem {
    /// A problem whose path is not known yet.
    pub(crate) fn new(message: impl Into<String>, line: u32, column: u32) -> Self {
        Self { path: String::new(), line, column, message: message.into() }
    }
}

/// What was read.
pub(crate) struct Read<T> {
    /// The value; `None` if there was any error.
    pub(crate) value: Option<T>,
    /// What is left of it without the values of a wrong type, if there were such.
    pub(crate) partial: Option<T>,
    /// Every value of a wrong type.
    pub(crate) errors: Vec<Problem>,
    /// Every field that its struct does not have.
    pub(crate) unknown: Vec<Problem>,
}

/// Reads a `T` from `node`, whose path is `path`. Fields named in `envelope` are no business of the outermost struct.
pub(crate) fn read<T: DeserializeOwned>(node: &Node, path: &str, envelope: &[&str]) -> Read<T> {
    let mut errors: Vec<Problem> = Vec::new();
    loop {
        let cx = Context { unknown: RefCell::default(), envelope };
        let root = Path::Root(path);
        let result = T::deserialize(NodeReader { node, path: &root, cx: &cx });
        let unknown = cx.unknown.into_inner();
        match result {
            Ok(value) if errors.is_empty() => {
                return Read { value: Some(value), partial: None, errors, unknown };
            }
            Ok(value) => return Read { value: None, partial: Some(value), errors, unknown },
            Err(error) => {
                let cut = error.problem.is_some();
                errors.push(error.problem.unwrap_or_else(|| Problem {
                    path: root.to_string(),
                    line: node.line,
                    column: node.column,
                    message: error.message,
                }));
                if !cut || errors.len() >= MAX_PROBLEMS {
                    return Read { value: None, partial: None, errors, unknown };
                }
            }
        }
    }
}

struct Context<'a> {
    unknown: RefCell<Vec<Problem>>,
    envelope: &'a [&'a str],
}

/// The path to a node, as a chain of stack frames.
enum Path<'a> {
    Root(&'a str),
    Field(&'a Path<'a>, &'a str),
    Item(&'a Path<'a>, usize),
}

impl Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root(root) => f.write_str(root),
            Self::Item(parent, index) => write!(f, "{parent}[{index}]"),
            Self::Field(parent, key) if !is_plain_key(key) => write!(f, "{parent}[{key:?}]"),
            Self::Field(Path::Root(""), key) => f.write_str(key),
            Self::Field(parent, key) => write!(f, "{parent}.{key}"),
        }
    }
}

/// An error on its way to the nearest place that knows where it happened.
#[derive(Debug)]
struct Error {
    message: String,
    problem: Option<Problem>,
}

impl Error {
    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), problem: None }
    }

    /// Gives the error its place, and cuts out the node, unless a place further in has done so.
    fn at(mut self, node: &Node, path: &Path<'_>, line: u32, column: u32) -> Self {
        if self.problem.is_none() {
            node.cut.set(true);
            let message = std::mem::take(&mut self.message);
            self.problem = Some(Problem { path: path.to_string(), line, column, message });
        }
        self
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: Display>(message: T) -> Self {
        Self::new(message.to_string())
    }
}

#[derive(Clone, Copy)]
struct NodeReader<'a> {
    node: &'a Node,
    path: &'a Path<'a>,
    cx: &'a Context<'a>,
}

impl<'a> NodeReader<'a> {
    fn mismatch(&self, expected: &str) -> Error {
        let mut message = format!("expected {expected}, found {}", describe(self.node));
        if expected == "a string"
            && let Value::Scalar(scalar) = &self.node.value
        {
            let _ = write!(message, "; write it in quotes: \"{}\"", scalar.text);
        }
        Error::new(message)
    }

    fn scalar(&self, expected: &str) -> Result<&'a Scalar, Error> {
        match &self.node.value {
            Value::Scalar(scalar) => Ok(scalar),
            _ => Err(self.mismatch(expected)),
        }
    }

    fn string(&self) -> Result<&'a str, Error> {
        self.node.as_str().ok_or_else(|| self.mismatch("a string"))
    }

    fn integer<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.scalar("a whole number")?.as_number() {
            Some(Number::Unsigned(number)) => visitor.visit_u64(number),
            Some(Number::Signed(number)) => visitor.visit_i64(number),
            // Protobuf's JSON form takes 8e1 and 80.0 for 80; the bounds keep the casts exact.
            Some(Number::Float(number)) if number.fract() == 0.0 && number.abs() < 9e15 => {
                visitor.visit_i64(number as i64)
            }
            _ => Err(self.mismatch("a whole number")),
        }
        .map_err(|error: Error| Error::new(range_message(error.message)))
    }

    fn float<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.scalar("a number")?.as_number() {
            Some(Number::Unsigned(number)) => visitor.visit_f64(number as f64),
            Some(Number::Signed(number)) => visitor.visit_f64(number as f64),
            Some(Number::Float(number)) => visitor.visit_f64(number),
            None => Err(self.mismatch("a number")),
        }
    }
}

impl<'de> Deserializer<'de> for NodeReader<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::List(_) => self.deserialize_seq(visitor),
            Value::Map(_) => self.deserialize_map(visitor),
            Value::Scalar(scalar) if !scalar.plain => visitor.visit_str(&scalar.text),
            Value::Scalar(scalar) => match (scalar.as_bool(), scalar.as_number()) {
                (Some(boolean), _) => visitor.visit_bool(boolean),
                (None, Some(Number::Unsigned(number))) => visitor.visit_u64(number),
                (None, Some(Number::Signed(number))) => visitor.visit_i64(number),
                (None, Some(Number::Float(number))) => visitor.visit_f64(number),
                (None, None) => visitor.visit_str(&scalar.text),
            },
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let scalar = self.scalar("true or false")?;
        // YAML 1.1, which Kubernetes' tools read, has more words for it.
        let boolean = scalar.as_bool().or(match scalar.text.as_str() {
            "yes" | "Yes" | "YES" | "on" | "On" | "ON" if scalar.plain => Some(true),
            "no" | "No" | "NO" | "off" | "Off" | "OFF" if scalar.plain => Some(false),
            _ => None,
        });
        visitor.visit_bool(boolean.ok_or_else(|| self.mismatch("true or false"))?)
    }

    fn deserialize_i8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_i16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.float(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.float(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.string()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.string()?)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.node.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.node.value {
            Value::List(items) => visitor.visit_seq(Items { items, next: 0, reader: self }),
            _ => Err(self.mismatch("a list")),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.node.value {
            Value::Map(entries) => {
                let fields = entries.iter().map(|entry| (entry.key.clone(), entry)).collect();
                visitor.visit_map(Fields { fields, next: 0, skip_null: false, reader: self })
            }
            _ => Err(self.mismatch("a mapping")),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        names: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let Value::Map(entries) = &self.node.value else { return Err(self.mismatch("a mapping")) };
        let at_root = matches!(self.path, Path::Root(_));
        let mut fields: Vec<(String, &Entry)> = Vec::with_capacity(entries.len());
        for entry in entries {
            if at_root && self.cx.envelope.contains(&entry.key.as_str()) {
                continue;
            }
            let name = if names.contains(&entry.key.as_str()) {
                entry.key.clone()
            } else {
                snake_to_camel(&entry.key)
            };
            let path = Path::Field(self.path, &entry.key);
            if !names.contains(&name.as_str()) {
                self.cx.unknown.borrow_mut().push(Problem {
                    path: path.to_string(),
                    line: entry.line,
                    column: entry.column,
                    message: unknown_message(&name, names),
                });
            } else if let Some((_, other)) = fields.iter().find(|(known, _)| *known == name)
                && !entry.value.cut.get()
            {
                let message = format!("{:?} and {:?} are the same field", other.key, entry.key);
                return Err(Error::new(message).at(&entry.value, &path, entry.line, entry.column));
            } else {
                fields.push((name, entry));
            }
        }
        visitor.visit_map(Fields { fields, next: 0, skip_null: true, reader: self })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let scalar = self.scalar("a name")?;
        let name = match scalar.as_number() {
            Some(Number::Unsigned(number)) => {
                usize::try_from(number).ok().and_then(|at| variants.get(at)).copied()
            }
            _ => variants.iter().find(|variant| **variant == scalar.text).copied(),
        };
        match name {
            Some(name) => visitor.visit_enum(BorrowedStrDeserializer::<Error>::new(name)),
            None => Err(Error::new(format!(
                "expected one of {}, found {}",
                variants.join(", "),
                describe(self.node)
            ))),
        }
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit unit_struct tuple tuple_struct
    }
}

struct Items<'a> {
    items: &'a [Node],
    next: usize,
    reader: NodeReader<'a>,
}

impl<'de> de::SeqAccess<'de> for Items<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        while let Some(node) = self.items.get(self.next) {
            let index = self.next;
            self.next += 1;
            if node.cut.get() {
                continue;
            }
            let path = Path::Item(self.reader.path, index);
            let reader = NodeReader { node, path: &path, cx: self.reader.cx };
            return match seed.deserialize(reader) {
                Ok(value) => Ok(Some(value)),
                Err(error) => Err(error.at(node, &path, node.line, node.column)),
            };
        }
        Ok(None)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len() - self.next.min(self.items.len()))
    }
}

struct Fields<'a> {
    fields: Vec<(String, &'a Entry)>,
    next: usize,
    /// In a struct null is "absent"; in a map it is a value, and rarely a valid one.
    skip_null: bool,
    reader: NodeReader<'a>,
}

impl<'de> de::MapAccess<'de> for Fields<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        while let Some((name, entry)) = self.fields.get(self.next) {
            let null = matches!(entry.value.value, Value::Null);
            if entry.value.cut.get() || (null && self.skip_null) {
                self.next += 1;
                continue;
            }
            return match seed.deserialize(Key(name)) {
                Ok(key) => Ok(Some(key)),
                Err(error) => {
                    let path = Path::Field(self.reader.path, name);
                    Err(error.at(&entry.value, &path, entry.line, entry.column))
                }
            };
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let Some((name, entry)) = self.fields.get(self.next) else { return Err(Error::new("no value")) };
        self.next += 1;
        let node = &entry.value;
        let path = Path::Field(self.reader.path, name);
        seed.deserialize(NodeReader { node, path: &path, cx: self.reader.cx })
            .map_err(|error| error.at(node, &path, node.line, node.column))
    }
}

/// A key: a field's name, or the key of a map, which protobuf's JSON form also allows to be a number.
struct Key<'a>(&'a str);

impl Key<'_> {
    fn integer<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match (self.0.parse::<u64>(), self.0.parse::<i64>()) {
            (Ok(number), _) => visitor.visit_u64(number),
            (_, Ok(number)) => visitor.visit_i64(number),
            _ => Err(Error::new(format!("expected a whole number as key, found {:?}", self.0))),
        }
        .map_err(|error: Error| Error::new(range_message(error.message)))
    }
}

impl<'de> Deserializer<'de> for Key<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.0)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.integer(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let name: StringDeserializer<Error> = self.0.to_owned().into_deserializer();
        visitor.visit_enum(name)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i64 i128 u8 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::super::tree::Reader;
    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Sample {
        host_name: String,
        weight: i32,
        ratio: f64,
        on: Option<bool>,
        labels: BTreeMap<String, String>,
        ports: BTreeMap<u32, Sample>,
        items: Vec<Sample>,
        mode: Mode,
        any: serde_json::Value,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "SCREAMING_SNAKE_CASE")]
    enum Mode {
        #[default]
        Unset,
        RoundRobin,
    }

    fn sample(text: &str) -> Read<Sample> {
        let mut reader = Reader::new(text);
        let document = reader.document().unwrap();
        assert_eq!(reader.problems(), []);
        read(&document, "spec", &[])
    }

    fn lines(problems: &[Problem]) -> Vec<String> {
        problems.iter().map(|p| format!("{}:{} {}: {}", p.line, p.column, p.path, p.message)).collect()
    }

    #[test]
    fn x_01_camel_and_snake_case_for_fields_but_not_for_maps() {
        let read = sample("host_name: a\nlabels: {a_b: c}\nports: {80: {hostName: b}}\n");
        assert_eq!(lines(&read.errors), [""; 0]);
        let value = read.value.unwrap();
        assert_eq!((value.host_name.as_str(), value.ports[&80].host_name.as_str()), ("a", "b"));
        assert_eq!(value.labels.keys().collect::<Vec<_>>(), ["a_b"]);
    }

    #[test]
    fn protobuf_json_is_loose_about_numbers_enums_and_null() {
        let value = sample(
            "weight: \"80\"\nratio: 5\non: null\nmode: 1\nitems: [{weight: 8e1, mode: ROUND_ROBIN}]\n",
        )
        .value
        .unwrap();
        assert_eq!((value.weight, value.ratio, value.on, value.mode), (80, 5.0, None, Mode::RoundRobin));
        assert_eq!((value.items[0].weight, &value.items[0].mode), (80, &Mode::RoundRobin));
    }

    #[test]
    fn all_errors_at_once_with_place_and_path() {
        let read = sample(
            "hostName: 5\nweight: x\nitems:\n- weight: 99999999999\n- labels: {app.io/v: 1.0}\n- null\n- 7\n\
             mode: FAST\nports: {http: {}}\nhostNam: a\n",
        );
        assert!(read.value.is_none());
        insta::assert_snapshot!(lines(&read.errors).join("\n"), @r#"
        1:11 spec.hostName: expected a string, found the number 5; write it in quotes: "5"
        2:9 spec.weight: expected a whole number, found the string "x"
        4:11 spec.items[0].weight: out of range: `99999999999`, expected -2147483648..2147483647
        5:22 spec.items[1].labels["app.io/v"]: expected a string, found the number 1.0; write it in quotes: "1.0"
        6:3 spec.items[2]: expected a mapping, found null
        7:3 spec.items[3]: expected a mapping, found the number 7
        8:7 spec.mode: expected one of UNSET, ROUND_ROBIN, found the string "FAST"
        9:9 spec.ports.http: expected a whole number as key, found "http"
        "#);
        assert_eq!(lines(&read.unknown), ["10:1 spec.hostNam: unknown field; did you mean \"hostName\"?"]);
    }

    #[test]
    fn one_field_in_two_spellings_is_refused() {
        let read = sample("hostName: a\nhost_name: b\n");
        assert_eq!(
            lines(&read.errors),
            ["2:1 spec.host_name: \"hostName\" and \"host_name\" are the same field"]
        );
    }

    #[test]
    fn any_value_is_kept() {
        let value = sample("any: {a: [1, -2, 0.5, yes, true, '1', null]}\n").value.unwrap();
        assert_eq!(value.any, serde_json::json!({"a": [1, -2, 0.5, "yes", true, "1", null]}));
    }

    #[test]
    fn aliases_and_merge_keys() {
        let value = sample("items: [&a {weight: 1, hostName: a}, *a, {<<: *a, weight: 2}]\n").value.unwrap();
        let seen: Vec<_> = value.items.iter().map(|i| (i.weight, i.host_name.as_str())).collect();
        assert_eq!(seen, [(1, "a"), (1, "a"), (2, "a")]);
    }

    #[test]
    fn broken_documents_do_not_hide_the_next() {
        let mut reader = Reader::new("a: [1\n---\nb: {c: 1, c: 2}\n---\n# nothing\n---\nd: 1\n");
        assert_eq!(std::iter::from_fn(|| reader.document()).count(), 2);
        let found = lines(&reader.problems());
        assert!(found[0].contains("not valid YAML"), "{found:?}");
        assert_eq!(found[1], "3:11 b.c: duplicate key \"c\"");
    }
}
