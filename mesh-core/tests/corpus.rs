//! What the fuzz targets hold of any bytes, on their corpora and on random ones: the loader, the sniffer, SPIFFE IDs.
#![cfg(feature = "istio")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "properties/sniff.rs"]
mod sniff;
#[path = "properties/spiffe_id.rs"]
mod spiffe_id;

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

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
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
    let files = corpus("load");
    assert!(files.len() >= 10, "{} files", files.len());
    for (_, bytes) in &files {
        load(bytes);
    }
}

#[test]
fn the_corpora_of_first_bytes_and_of_identities_hold() {
    for (target, holds) in [("sniff", sniff::holds as fn(&[u8])), ("spiffe_id", spiffe_id::holds)] {
        let files = corpus(target);
        assert!(files.len() >= 10, "{target}: {} files", files.len());
        for (name, bytes) in &files {
            assert!(std::panic::catch_unwind(|| holds(bytes)).is_ok(), "{name}");
        }
    }
}

/// What the first bytes of connections are made of.
const BEGINNINGS: &[&[u8]] = &[
    b"\x16\x03\x01\0",
    b"\x16\x03\x03\0\x05",
    b"\x01\0\0",
    b"\x03\x03",
    b"\0\0",
    b"\0\x04",
    b"\x16",
    b"GET ",
    b"OPTIONS *",
    b"CONNECT ",
    b"/",
    b"http://",
    b"PRI * HTTP/2.0",
    b"\r\n",
    b"\r\n\r\nSM\r\n\r\n",
    b" HTTP/1.1",
    b"a.example",
    b"\xff",
    b"\0",
];

/// What identities are made of.
const NAMES: &[&str] = &[
    "spiffe://",
    "spiffe:",
    "/",
    "//",
    ".",
    "..",
    "td",
    "TD",
    "ns",
    "sa",
    "%61",
    "?",
    "#",
    "@",
    ":80",
    "-",
    "_",
    "é",
    " ",
    "a",
];

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
    fn any_first_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        sniff::holds(&bytes);
    }

    #[test]
    fn any_beginnings(pieces in proptest::collection::vec(proptest::sample::select(BEGINNINGS), 0..24)) {
        sniff::holds(&pieces.concat());
    }

    #[test]
    fn any_identity(pieces in proptest::collection::vec(proptest::sample::select(NAMES), 0..12), begins in any::<bool>()) {
        let text = pieces.concat();
        spiffe_id::holds(if begins { format!("spiffe://{text}") } else { text }.as_bytes());
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
        let files = corpus("load");
        let mut bytes = files[file.index(files.len())].1.clone();
        for (at, cut, piece) in damage {
            let at = at.index(bytes.len() + 1);
            let end = (at + cut).min(bytes.len());
            bytes.splice(at..end, piece.bytes());
        }
        load(&bytes);
    }
}
