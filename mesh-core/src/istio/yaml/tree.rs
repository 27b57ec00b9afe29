//! The tree and its parser, with budgets.

use std::cell::Cell;
use std::collections::HashSet;

use granit_parser::{Event, Marker, Parser, ScalarStyle, ScanError, StrInput};

use super::de::Problem;
use crate::documents::is_plain_key;

/// How deep mappings and lists may nest. Istio's own deepest field is a dozen levels down.
const MAX_DEPTH: usize = 100;

/// How many nodes the anchors and aliases of one file may stand for.
const MAX_ALIASED_NODES: usize = 100_000;

/// How many documents of one file may be broken before the rest is given up.
const MAX_BROKEN_DOCUMENTS: usize = 100;

/// A value with its position.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) line: u32,
    pub(crate) column: u32,
    pub(crate) value: Value,
    /// Left out from now on, since it has been reported.
    pub(crate) cut: Cell<bool>,
}

/// What a node holds.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// Nothing: `null`, `~` or no text.
    Null,
    /// A scalar that is not null.
    Scalar(Scalar),
    /// A list.
    List(Vec<Node>),
    /// A mapping, in the order of the file, without duplicate keys.
    Map(Vec<Entry>),
}

/// A scalar as it was written.
#[derive(Clone, Debug)]
pub(crate) struct Scalar {
    pub(crate) text: String,
    /// Written without quotes, so that it may be a number or a boolean.
    pub(crate) plain: bool,
}

/// A key with its value.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) line: u32,
    pub(crate) column: u32,
    pub(crate) value: Node,
}

impl Entry {
    /// Where a reader looks for the field: at a scalar's value, else at the key.
    pub(crate) fn place(&self) -> (u32, u32) {
        match self.value.value {
            Value::Scalar(_) => (self.value.line, self.value.column),
            _ => (self.line, self.column),
        }
    }
}

impl Node {
    fn new(value: Value, line: u32, column: u32) -> Self {
        Self { line, column, value, cut: Cell::new(false) }
    }

    /// A mapping without entries, for what was not written.
    pub(crate) fn empty_map(line: u32, column: u32) -> Self {
        Self::new(Value::Map(Vec::new()), line, column)
    }

    /// The value of `key`, if this is a mapping that has it and it is not null.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        self.entry(key).map(|entry| &entry.value).filter(|node| !matches!(node.value, Value::Null))
    }

    /// The entry of `key`, null or not.
    pub(crate) fn entry(&self, key: &str) -> Option<&Entry> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|entry| entry.key == key),
            _ => None,
        }
    }

    /// The text, if this is a scalar that reads as a string.
    pub(crate) fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar(scalar) if scalar.is_string() => Some(&scalar.text),
            _ => None,
        }
    }

    fn size(&self) -> usize {
        1 + match &self.value {
            Value::Null | Value::Scalar(_) => 0,
            Value::List(items) => items.iter().map(Self::size).sum(),
            Value::Map(entries) => entries.iter().map(|entry| entry.value.size()).sum(),
        }
    }
}

impl Scalar {
    /// Whether it is text, and not a number or a boolean.
    pub(crate) fn is_string(&self) -> bool {
        !self.plain || (self.as_bool().is_none() && self.as_number().is_none())
    }

    /// The boolean of YAML's core schema that it is.
    pub(crate) fn as_bool(&self) -> Option<bool> {
        match self.text.as_str() {
            _ if !self.plain => None,
            "true" | "True" | "TRUE" => Some(true),
            "false" | "False" | "FALSE" => Some(false),
            _ => None,
        }
    }

    /// The number that it is, by YAML's core schema, in quotes or not.
    pub(crate) fn as_number(&self) -> Option<Number> {
        let text = self.text.as_str();
        let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
        let first = digits.bytes().next()?;
        if !first.is_ascii_digit() && first != b'.' {
            return None;
        }
        if let Some(hex) = digits.strip_prefix("0x") {
            return u64::from_str_radix(hex, 16).ok().map(Number::Unsigned);
        }
        if let Some(octal) = digits.strip_prefix("0o") {
            return u64::from_str_radix(octal, 8).ok().map(Number::Unsigned);
        }
        // `012` is octal to some parsers and decimal to others: not a number to us.
        let ambiguous = digits.len() > 1 && first == b'0' && digits.bytes().all(|byte| byte.is_ascii_digit());
        if ambiguous {
            return None;
        }
        let unsigned = || text.strip_prefix('+').unwrap_or(text).parse().ok().map(Number::Unsigned);
        let signed = || text.parse().ok().map(Number::Signed);
        unsigned().or_else(signed).or_else(|| text.parse().ok().map(Number::Float))
    }
}

/// A number as it was written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Number {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
}

/// The documents of a file, one after the other, so that only one tree is in memory at a time.
pub(crate) struct Reader<'a> {
    parser: Parser<'a, StrInput<'a>>,
    builder: Builder,
    broken: usize,
    done: bool,
}

impl<'a> Reader<'a> {
    /// A reader of the documents in `text`.
    pub(crate) fn new(text: &'a str) -> Self {
        let options = granit_parser::options! {
            emit_comments: false,
            flow_nesting_limit: MAX_DEPTH,
            block_nesting_limit: MAX_DEPTH,
        };
        let parser = Parser::new_from_str_with_options(text, options);
        Self { parser, builder: Builder::default(), broken: 0, done: false }
    }

    /// The next document that is not empty. A document with a syntax error is left out and the one after it is read;
    /// [`Reader::problems`] then says why.
    pub(crate) fn document(&mut self) -> Option<Node> {
        while !self.done {
            match self.builder.document(&mut self.parser) {
                Ok(Some(document)) => return Some(document),
                Ok(None) => self.done = true,
                Err(problem) => {
                    let path = self.builder.path();
                    self.builder.problems.push(Problem { path, ..problem });
                    self.builder.reset();
                    self.broken += 1;
                    self.done = self.broken >= MAX_BROKEN_DOCUMENTS
                        || !self.parser.proceed_next_document().unwrap_or(false);
                }
            }
        }
        None
    }

    /// What was wrong with the documents since the last call: syntax and duplicate keys.
    pub(crate) fn problems(&mut self) -> Vec<Problem> {
        std::mem::take(&mut self.builder.problems)
    }
}

#[derive(Default)]
struct Builder {
    frames: Vec<Frame>,
    anchors: Vec<(usize, Node, usize)>,
    aliased: usize,
    problems: Vec<Problem>,
}

/// A mapping or list that is still open.
struct Frame {
    line: u32,
    column: u32,
    anchor: usize,
    content: Content,
}

enum Content {
    List(Vec<Node>),
    Map {
        entries: Vec<Entry>,
        /// The key whose value comes next.
        key: Option<(String, u32, u32)>,
        /// Beyond a few keys, they are looked up by hash.
        seen: HashSet<String>,
    },
}

const FEW_KEYS: usize = 16;

impl Builder {
    /// The next document that is not empty.
    fn document<'a>(&mut self, parser: &mut Parser<'a, StrInput<'a>>) -> Result<Option<Node>, Problem> {
        while let Some(next) = parser.next_event() {
            let (event, span) = next.map_err(|error| syntax(&error))?;
            let (line, column) = position(&span.start);
            let complete = match event {
                Event::StreamEnd => return Ok(None),
                Event::DocumentStart(..) => {
                    self.reset();
                    None
                }
                Event::Scalar(text, style, anchor, tag) => {
                    let mut plain = matches!(style, ScalarStyle::Plain);
                    if let Some(tag) = tag {
                        plain = plain_of_tag(&tag, plain).ok_or_else(|| bad_tag(&tag, line, column))?;
                    }
                    if let Some(key) = self.awaits_key() {
                        *key = Some((text.into_owned(), line, column));
                        None
                    } else {
                        let null = plain && matches!(text.as_ref(), "" | "~" | "null" | "Null" | "NULL");
                        let value = if null {
                            Value::Null
                        } else {
                            Value::Scalar(Scalar { text: text.into_owned(), plain })
                        };
                        self.complete(Node::new(value, line, column), anchor)?
                    }
                }
                Event::SequenceStart(_, anchor, tag) => {
                    self.no_tag(tag.as_deref(), line, column)?;
                    self.open(Frame { line, column, anchor, content: Content::List(Vec::new()) })?;
                    None
                }
                Event::MappingStart(_, anchor, tag) => {
                    self.no_tag(tag.as_deref(), line, column)?;
                    let content = Content::Map { entries: Vec::new(), key: None, seen: HashSet::new() };
                    self.open(Frame { line, column, anchor, content })?;
                    None
                }
                Event::SequenceEnd | Event::MappingEnd => match self.frames.pop() {
                    None => None,
                    Some(frame) => {
                        let value = match frame.content {
                            Content::List(items) => Value::List(items),
                            Content::Map { entries, .. } => Value::Map(merge(entries)?),
                        };
                        self.complete(Node::new(value, frame.line, frame.column), frame.anchor)?
                    }
                },
                Event::Alias(anchor) => {
                    let node = self.alias(anchor, line, column)?;
                    self.complete(node, 0)?
                }
                _ => None,
            };
            if let Some(document) = complete
                && !matches!(document.value, Value::Null)
            {
                return Ok(Some(document));
            }
        }
        Ok(None)
    }

    /// Where the next scalar goes, if it is a key.
    fn awaits_key(&mut self) -> Option<&mut Option<(String, u32, u32)>> {
        match self.frames.last_mut().map(|frame| &mut frame.content) {
            Some(Content::Map { key, .. }) if key.is_none() => Some(key),
            _ => None,
        }
    }

    fn open(&mut self, frame: Frame) -> Result<(), Problem> {
        if self.awaits_key().is_some() {
            return Err(Problem::new(
                "a key must be text, not a mapping or a list",
                frame.line,
                frame.column,
            ));
        }
        self.frames.push(frame);
        Ok(())
    }

    /// Puts a complete node where it belongs; returns it if it is the document.
    fn complete(&mut self, node: Node, anchor: usize) -> Result<Option<Node>, Problem> {
        if anchor != 0 {
            let size = node.size();
            self.charge(size, node.line, node.column)?;
            self.anchors.push((anchor, node.clone(), size));
        }
        let path = self.frames.last().and_then(|frame| match &frame.content {
            Content::Map { entries, key: Some((key, ..)), seen } => {
                let duplicate = if seen.is_empty() {
                    entries.iter().any(|entry| entry.key == *key)
                } else {
                    seen.contains(key)
                };
                (duplicate && key != "<<").then(|| self.path())
            }
            _ => None,
        });
        let Some(frame) = self.frames.last_mut() else { return Ok(Some(node)) };
        match &mut frame.content {
            Content::List(items) => items.push(node),
            Content::Map { entries, key, seen } => match key.take() {
                None => return Err(Problem::new("a key must be text", node.line, node.column)),
                Some((key, line, column)) => {
                    if let Some(path) = path {
                        let message = format!("duplicate key {key:?}");
                        self.problems.push(Problem { path, line, column, message });
                    } else {
                        entries.push(Entry { key: key.clone(), line, column, value: node });
                        if !seen.is_empty() {
                            seen.insert(key);
                        } else if entries.len() > FEW_KEYS {
                            seen.extend(entries.iter().map(|entry| entry.key.clone()));
                        }
                    }
                }
            },
        }
        Ok(None)
    }

    fn alias(&mut self, anchor: usize, line: u32, column: u32) -> Result<Node, Problem> {
        if self.awaits_key().is_some() {
            return Err(Problem::new("a key must be text, not an alias", line, column));
        }
        let Some(at) = self.anchors.iter().rposition(|(id, ..)| *id == anchor) else {
            return Err(Problem::new("an alias must not stand inside of its own anchor", line, column));
        };
        // Before the copy, not after it.
        self.charge(self.anchors[at].2, line, column)?;
        let mut node = self.anchors[at].1.clone();
        (node.line, node.column) = (line, column);
        Ok(node)
    }

    fn charge(&mut self, nodes: usize, line: u32, column: u32) -> Result<(), Problem> {
        self.aliased += nodes;
        if self.aliased > MAX_ALIASED_NODES {
            let message = format!("anchors and aliases stand for more than {MAX_ALIASED_NODES} values");
            return Err(Problem::new(message, line, column));
        }
        Ok(())
    }

    fn no_tag(&self, tag: Option<&granit_parser::Tag>, line: u32, column: u32) -> Result<(), Problem> {
        match tag {
            Some(tag) if !tag.is_yaml_core_schema() => Err(bad_tag(tag, line, column)),
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.frames.clear();
        self.anchors.clear();
    }

    /// The path of the value that is being read.
    fn path(&self) -> String {
        let mut path = String::new();
        for frame in &self.frames {
            match &frame.content {
                Content::List(items) => path.push_str(&format!("[{}]", items.len())),
                Content::Map { key: Some((key, ..)), .. } if is_plain_key(key) => {
                    if !path.is_empty() {
                        path.push('.');
                    }
                    path.push_str(key);
                }
                Content::Map { key: Some((key, ..)), .. } => path.push_str(&format!("[{key:?}]")),
                Content::Map { key: None, .. } => break,
            }
        }
        path
    }
}

/// Resolves YAML 1.1's merge key, which Kubernetes' tools understand: what the mapping itself says wins.
fn merge(mut entries: Vec<Entry>) -> Result<Vec<Entry>, Problem> {
    let Some(at) = entries.iter().position(|entry| entry.key == "<<") else { return Ok(entries) };
    let merged = entries.remove(at);
    let sources = match merged.value.value {
        Value::Map(_) => vec![merged.value],
        Value::List(items) => items,
        _ => Vec::new(),
    };
    let mut keys: HashSet<String> = entries.iter().map(|entry| entry.key.clone()).collect();
    for source in sources {
        let Value::Map(more) = source.value else {
            let message = "a merge key needs a mapping or a list of mappings";
            return Err(Problem::new(message, merged.line, merged.column));
        };
        entries.extend(more.into_iter().filter(|entry| keys.insert(entry.key.clone())));
    }
    Ok(entries)
}

/// Whether a tagged scalar is plain: `!!str` makes it text, the other tags of the core schema leave it.
fn plain_of_tag(tag: &granit_parser::Tag, plain: bool) -> Option<bool> {
    match tag.core_suffix() {
        Some("str") => Some(false),
        Some("int" | "float" | "bool" | "null" | "timestamp") => Some(plain),
        _ => None,
    }
}

fn bad_tag(tag: &granit_parser::Tag, line: u32, column: u32) -> Problem {
    Problem::new(format!("the tag {} is not supported", tag.original()), line, column)
}

fn syntax(error: &ScanError) -> Problem {
    let (line, column) = position(error.marker());
    Problem::new(format!("not valid YAML: {}", error.info()), line, column)
}

fn position(marker: &Marker) -> (u32, u32) {
    (u32::try_from(marker.line()).unwrap_or(u32::MAX), u32::try_from(marker.col() + 1).unwrap_or(u32::MAX))
}
