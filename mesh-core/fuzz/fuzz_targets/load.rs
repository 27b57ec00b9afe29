//! Any bytes load without a panic, and every error has a place.
//!
//! `cargo +nightly fuzz run load` in `mesh-core`; `tests/corpus.rs` replays the committed corpus.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_core::diagnostics::Severity;
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};

fuzz_target!(|bytes: &[u8]| {
    let (set, mut diags) = ResourceSet::load(&[SourceFile::new("fuzz.yaml", bytes)], &LoadOptions::default());
    assert!(diags.iter().all(|item| item.position.is_some()));
    for service in set.virtual_services() {
        diags.honour(service.doc, "spec.http[*].route[*].destination");
    }
    let _ = diags.unhonoured(Severity::Error);
    let _ = diags.to_string();
});
