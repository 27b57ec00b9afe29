//! Istio's table of normalised paths, through the pure function.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;

use mesh_core::PathNormalization;

#[test]
fn ap_07_istios_table() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/istio-normalization/open.json");
    let Ok(text) = std::fs::read_to_string(&file) else {
        eprintln!("SKIPPED ap_07_istios_table: {} is not there", file.display());
        return;
    };
    // The table is JSON, which mesh-core reads only with a feature; its rows are one line of four fields each.
    let mut rows = 0;
    for row in text.split("\"mode\"").skip(1) {
        let field = |name: &str| {
            let at = row.find(&format!("\"{name}\"")).unwrap() + name.len() + 2;
            let value = row[at..].split_once('"').unwrap().1;
            let mut end = 0;
            while value.as_bytes()[end] != b'"' {
                end += if value.as_bytes()[end] == b'\\' { 2 } else { 1 };
            }
            value[..end].replace("\\\\", "\\")
        };
        let mode = match row.split('"').nth(1).unwrap() {
            "NONE" => PathNormalization::None,
            "BASE" | "DEFAULT" => PathNormalization::Base,
            "MERGE_SLASHES" => PathNormalization::MergeSlashes,
            "DECODE_AND_MERGE_SLASHES" => PathNormalization::DecodeAndMergeSlashes,
            other => panic!("unknown mode {other}"),
        };
        let path = field("request_path");
        let path = path.split('#').next().unwrap();
        assert_eq!(mode.apply(path), field("upstream_path"), "{mode:?} {path}");
        rows += 1;
    }
    println!("istio-normalization: {rows} passed, 0 failed");
    assert_eq!(rows, 32);
}
