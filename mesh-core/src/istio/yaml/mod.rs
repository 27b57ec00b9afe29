//! YAML and JSON as a tree with positions, and a serde deserializer over it.
//!
//! A configuration's errors are worth as much as their positions, and all of them are wanted at once. No serde front
//! end gives that: it stops at the first error, loses positions in maps, and calls an unknown field an error of its
//! parent. So the documents are parsed into a tree of our own, every node with line and column, from the events of
//! `granit-parser` (the parser under serde-saphyr: no `unsafe`, limits on nesting), and structs are read from the
//! tree by a [`serde::Deserializer`] that
//!
//! - puts position and field path on every error, cuts out the node that it is about, and goes on;
//! - reports fields that a struct does not have, and accepts snake_case for those that it has;
//! - is as loose as protobuf's JSON form: numbers in strings, enums by number, `null` for "absent".
//!
//! The tree lives only while its document is loaded.

mod de;
mod tree;
mod words;

pub(crate) use de::{Problem, read};
pub(crate) use tree::{Entry, Node, Reader, Value};
