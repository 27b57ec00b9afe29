//! What holds of the sniffer for any bytes. Shared by the fuzz target and the replay of its corpus.

use mesh_core::sniff::{MAX_BYTES, MAX_HELLO_BYTES, Sniffed, Sniffer};

/// Panics where something does not hold.
pub(crate) fn holds(bytes: &[u8]) {
    let at_once = Sniffer::new().look(bytes);
    // Byte by byte where that is quick, and in growing steps where it is not.
    let mut sniffer = Sniffer::new();
    let mut decided: Option<(usize, Sniffed)> = None;
    let mut end = 0;
    while end < bytes.len() {
        end = (end + 1 + end / 64).min(bytes.len());
        let seen = sniffer.look(&bytes[..end]);
        match &decided {
            None if seen != Sniffed::Undecided => decided = Some((end, seen)),
            None => {}
            Some((_, before)) => assert_eq!(seen, *before, "what is decided does not change"),
        }
    }
    let in_pieces = decided.as_ref().map_or(Sniffed::Undecided, |(_, seen)| seen.clone());
    assert_eq!(in_pieces, at_once, "how it is cut does not matter");
    let gave_up = Sniffer::new().give_up(bytes);
    match &at_once {
        Sniffed::Undecided => {
            assert!(bytes.len() < MAX_HELLO_BYTES);
            assert!(bytes.len() < MAX_BYTES || bytes[0] == 22, "only a ClientHello may be long");
            assert!(matches!(gave_up, Sniffed::Tls(None) | Sniffed::Other));
        }
        Sniffed::Tls(name) => {
            assert_eq!(bytes[0], 22, "a record of a handshake");
            assert_eq!(gave_up, Sniffed::Tls(None));
            if let Some(name) = name {
                assert!(!name.is_empty() && name.len() <= 255 && !name.ends_with('.'));
                assert!(name.bytes().all(|byte| byte.is_ascii_graphic() && !byte.is_ascii_uppercase()));
            }
        }
        Sniffed::Http2 => assert!(bytes.starts_with(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")),
        Sniffed::Http1 => assert!(bytes.contains(&b' ')),
        Sniffed::Other => {}
    }
}
