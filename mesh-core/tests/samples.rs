//! Everything that Istio ships as a sample, of 1.31 and of 1.1, loads without an error.
//!
//! The samples are not part of the project; without them the tests say loudly that they were skipped.
#![cfg(feature = "istio")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use mesh_core::diagnostics::Severity;
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};

#[test]
fn the_samples_of_istio_1_31_load() {
    load_each("istio-samples/samples");
}

#[test]
fn the_samples_of_istio_1_1_load() {
    load_each("istio-samples-1.1/samples");
}

/// The samples are alternatives of each other, so each file is a configuration by itself.
fn load_each(name: &str) {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data").join(name);
    if !root.is_dir() {
        eprintln!("SKIPPED: {name} is not at hand ({})", root.display());
        return;
    }
    let mut files = Vec::new();
    yaml_files(&root, &mut files);
    assert!(!files.is_empty());
    let (mut resources, mut warnings, mut skipped, mut failures) = (0, 0, 0, Vec::new());
    for path in &files {
        let name = path.strip_prefix(&root).unwrap().display().to_string();
        let file = SourceFile::new(name, std::fs::read(path).unwrap());
        let (set, diags) = ResourceSet::load(&[file], &LoadOptions::default());
        resources += set.len();
        skipped += set.skipped().values().sum::<usize>();
        for item in &diags {
            match item.severity {
                Severity::Warning => {
                    println!("{item}");
                    warnings += 1;
                }
                Severity::Error => failures.push(item.to_string()),
            }
        }
    }
    println!("{name}: {} files, {resources} resources, {skipped} skipped, {warnings} warnings", files.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn yaml_files(folder: &Path, out: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            yaml_files(&path, out);
        } else if path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml") {
            out.push(path);
        }
    }
}
