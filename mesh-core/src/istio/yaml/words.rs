//! What is wrong with a value, in the words of its author.

use super::tree::{Node, Value};

/// serde speaks of Rust types; the author of a file wants bounds.
pub(super) fn range_message(message: String) -> String {
    let bounds = [
        ("expected u16", "expected 0..65535"),
        ("expected u32", "expected 0..4294967295"),
        ("expected i32", "expected -2147483648..2147483647"),
        ("expected u64", "expected a number that is not negative"),
        ("invalid value: integer ", "out of range: "),
    ];
    bounds.iter().fold(message, |message, (from, to)| message.replace(from, to))
}

/// What a node is.
pub(super) fn describe(node: &Node) -> String {
    match &node.value {
        Value::Null => "null".to_owned(),
        Value::List(_) => "a list".to_owned(),
        Value::Map(_) => "a mapping".to_owned(),
        Value::Scalar(scalar) if scalar.is_string() => {
            let shown: String = scalar.text.chars().take(40).collect();
            let more = if shown.len() < scalar.text.len() { "…" } else { "" };
            format!("the string {shown:?}{more}")
        }
        Value::Scalar(scalar) if scalar.as_bool().is_some() => format!("the boolean {}", scalar.text),
        Value::Scalar(scalar) => format!("the number {}", scalar.text),
    }
}

/// A field that a struct does not have; `names` are those that it has.
pub(super) fn unknown_message(name: &str, names: &[&str]) -> String {
    let near = names.iter().map(|known| (distance(name, known), *known)).min();
    match near {
        Some((steps, known)) if steps <= 2 && steps < name.len() => {
            format!("unknown field; did you mean {known:?}?")
        }
        _ => "unknown field".to_owned(),
    }
}

/// How many letters to add, drop or change (Levenshtein), without regard to case.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.to_ascii_lowercase(), b.to_ascii_lowercase());
    if a.len().abs_diff(b.len()) > 2 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
