//! A SPIFFE ID is what an independent reading of the standard takes it for, and has one spelling.
//!
//! `cargo +nightly fuzz run spiffe_id` in `mesh-core`; `tests/corpus.rs` replays the committed corpus.
#![no_main]

#[path = "../../tests/properties/spiffe_id.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::holds(bytes));
