//! The loader takes any bytes without a panic: the fuzz corpus, and configurations with random damage.
#![cfg(feature = "istio")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::PathBuf;

use mesh_core::diagnostics::Severity;
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};
use proptest::prelude::*;

/// What the fuzz target does.
fn load(bytes: &[u8]) -> usize {
    let (set, mut diags) = ResourceSet::load(&[SourceFile::new("any.yaml", bytes)], &LoadOptions::default());
    assert!(diags.iter().all(|item| item.position.is_some()), "{diags}");
    for service in set.virtual_services() {
        diags.honour(service.doc, "spec.http[*].route[*].destination");
    }
    let _ = diags.unhonoured(Severity::Error);
    diags.to_string().len()
}

fn corpus() -> Vec<(String, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/load");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.display().to_string(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn the_corpus_loads_without_a_panic() {
    let files = corpus();
    assert!(files.len() >= 10, "{} files", files.len());
    for (_, bytes) in &files {
        load(bytes);
    }
}

/// What YAML and our types care about.
const PIECES: &[&str] = &[
    "\n",
    "  ",
    "- ",
    ": ",
    "[",
    "]",
    "{",
    "}",
    "'",
    "\"",
    "|\n",
    ">\n",
    "&a ",
    "*a",
    "<<: ",
    "!!str ",
    "---\n",
    "...\n",
    "# ",
    "\t",
    "null",
    "0",
    "-1",
    "1e400",
    "true",
    "\u{feff}",
    "\0",
    "é",
    "%YAML 1.2\n",
    "? ",
    "apiVersion",
    "kind",
    "spec",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        load(&bytes);
    }

    #[test]
    fn any_pieces(pieces in proptest::collection::vec(proptest::sample::select(PIECES), 0..64)) {
        load(pieces.concat().as_bytes());
    }

    #[test]
    fn damaged_configurations(
        file in any::<proptest::sample::Index>(),
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), 0..20_usize, proptest::sample::select(PIECES)), 1..6),
    ) {
        let files = corpus();
        let mut bytes = files[file.index(files.len())].1.clone();
        for (at, cut, piece) in damage {
            let at = at.index(bytes.len() + 1);
            let end = (at + cut).min(bytes.len());
            bytes.splice(at..end, piece.bytes());
        }
        load(&bytes);
    }
}
