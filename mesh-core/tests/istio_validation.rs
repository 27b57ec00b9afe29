//! Istio's own validation tables: every row must be judged as Istio judges it.
//!
//! The tables are not part of the project; without them the tests say loudly that they were skipped.
#![cfg(feature = "istio")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use mesh_core::diagnostics::{Diagnostics, Severity};
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};
use serde_json::Value;

/// Rows that are not judged as the table says, each with the reason.
const EXCEPTIONS: &[(&str, &str)] = &[(
    "serviceentry-valid#0",
    "the fixture's unquoted IPv6 address is a YAML mapping, which no reader of JSON takes for a string",
)];

#[test]
fn every_row_of_istios_validation_tests() {
    judge_table("open.json");
}

#[test]
fn every_row_of_the_crd_cases() {
    judge_table("crd-cases-open.json");
}

fn judge_table(name: &str) {
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/istio-validation").join(name);
    let Ok(text) = std::fs::read_to_string(&path) else {
        eprintln!("SKIPPED: {name} of Istio's validation tables is not at hand ({})", path.display());
        return;
    };
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    let mut tally: BTreeMap<&str, usize> = BTreeMap::new();
    let mut failures = Vec::new();
    for row in &rows {
        let id = row["id"].as_str().unwrap();
        let outcome = if row["expect"]["ambiguous"].as_bool() == Some(true)
            || row["ambiguous"].as_bool() == Some(true)
        {
            "ambiguous"
        } else if let Some((_, reason)) = EXCEPTIONS.iter().find(|(exception, _)| *exception == id) {
            println!("declared out of scope: {id}: {reason}");
            "out of scope"
        } else if let Err(why) = judge(row) {
            failures.push(format!("{id} ({}): {why}\n  {}", row["name"], row["config"]));
            "failed"
        } else {
            "passed"
        };
        *tally.entry(outcome).or_default() += 1;
    }
    println!("{name}: {tally:?} of {}", rows.len());
    assert!(failures.is_empty(), "{} rows of {name} failed:\n{}", failures.len(), failures.join("\n"));
}

fn judge(row: &Value) -> Result<(), String> {
    let files: Vec<SourceFile> = row["config"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(index, document)| SourceFile::new(format!("{index}.json"), document.to_string()))
        .collect();
    let (_, diags) = ResourceSet::load(&files, &LoadOptions::default());
    let expected = &row["expect"];
    let valid = expected["valid"].as_bool().unwrap();
    if valid == diags.has_errors() {
        return Err(format!("expected valid: {valid}, found:\n{diags}"));
    }
    if let Some(warning) = expected["warning"].as_bool() {
        let found = warnings(&diags) > 0;
        if valid && warning != found {
            return Err(format!("expected a warning: {warning}, found:\n{diags}"));
        }
    }
    Ok(())
}

fn warnings(diags: &Diagnostics) -> usize {
    diags.iter().filter(|item| item.severity == Severity::Warning).count()
}
