//! What first bytes look like does not depend on how they are cut, never changes once it is decided, and is decided in
//! time.
//!
//! `cargo +nightly fuzz run sniff` in `mesh-core`; `tests/corpus.rs` replays the committed corpus.
#![no_main]

#[path = "../../tests/properties/sniff.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::holds(bytes));
