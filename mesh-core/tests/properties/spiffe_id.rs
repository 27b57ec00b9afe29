//! What holds of SPIFFE IDs for any bytes. Shared by the fuzz target and the replay of its corpus.

use mesh_core::identity::{SpiffeId, TrustDomain};

/// Panics where something does not hold.
pub(crate) fn holds(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let read = text.parse::<SpiffeId>();
    assert_eq!(read.is_ok(), is_one(text), "{text:?}: {read:?}");
    if let Ok(id) = read {
        assert_eq!(id.as_str(), text, "there is one spelling");
        assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
        assert_eq!(id.principal(), &text["spiffe://".len()..]);
        assert!(id.trust_domain().parse::<TrustDomain>().is_ok());
        if let (Some(namespace), Some(account)) = (id.namespace(), id.service_account()) {
            let domain = id.trust_domain().parse().unwrap_or_else(|error| panic!("{text:?}: {error}"));
            assert_eq!(SpiffeId::workload(&domain, namespace, account).as_ref(), Ok(&id));
        }
    }
    assert_eq!(text.parse::<TrustDomain>().is_ok(), text.len() <= 255 && is_name(text, false), "{text:?}");
}

/// The standard, read once more in another way (SPIFFE-ID §2).
fn is_one(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("spiffe://") else { return false };
    let mut parts = rest.split('/');
    let domain = parts.next().unwrap_or_default();
    text.len() <= 2048
        && domain.len() <= 255
        && is_name(domain, false)
        && parts.all(|part| is_name(part, true) && part != "." && part != "..")
}

fn is_name(name: &str, upper: bool) -> bool {
    let is_allowed =
        |c: char| matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_') || upper && c.is_ascii_uppercase();
    !name.is_empty() && name.chars().all(is_allowed)
}
