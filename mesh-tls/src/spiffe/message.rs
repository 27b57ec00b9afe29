//! The message of the call, in protobuf. What is asked with has no fields.

use std::collections::BTreeMap;

use rustls::pki_types::PrivatePkcs8KeyDer;

use crate::protobuf::{Fields, InvalidMessage, Value, text};

/// All that holds from now on.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct X509SvidResponse {
    /// Who the workload is; the first is the default. Field 1.
    pub svids: Vec<X509Svid>,
    /// Lists of revoked certificates, each in DER. Field 2.
    pub crls: Vec<Vec<u8>>,
    /// Certificates in DER, one after the other, by the SPIFFE ID of the foreign trust domain that they vouch for. Field 3.
    pub federated_bundles: BTreeMap<String, Vec<u8>>,
}

/// One of the identities of a workload.
#[derive(Debug)]
#[non_exhaustive]
pub struct X509Svid {
    /// Whose it is. Field 1.
    pub spiffe_id: String,
    /// Certificates in DER, one after the other, the workload's own first. Field 2.
    pub chain: Vec<u8>,
    /// The key. It is not shown, and is overwritten when it is dropped. Field 3.
    pub key: PrivatePkcs8KeyDer<'static>,
    /// The authorities of its trust domain in DER, one after the other. Field 4.
    pub bundle: Vec<u8>,
    /// What it is for, in the operator's words; may be empty. Field 5.
    pub hint: String,
}

impl X509SvidResponse {
    /// From bytes.
    ///
    /// # Errors
    /// When they are no such message.
    pub fn decode(bytes: &[u8]) -> Result<Self, InvalidMessage> {
        let mut message = Self::default();
        let mut fields = Fields(bytes);
        while let Some((field, value)) = fields.next()? {
            match (field, value) {
                (1, Value::Bytes(svid)) => message.svids.push(X509Svid::decode(svid)?),
                (2, Value::Bytes(crl)) => message.crls.push(crl.to_vec()),
                (3, Value::Bytes(entry)) => {
                    let (domain, bundle) = entry_of(entry)?;
                    message.federated_bundles.insert(domain, bundle);
                }
                (1..=3, _) => return Err(InvalidMessage),
                _ => {}
            }
        }
        Ok(message)
    }
}

impl X509Svid {
    /// An identity without a hint.
    #[must_use]
    pub fn new(
        spiffe_id: impl Into<String>,
        chain: Vec<u8>,
        key: PrivatePkcs8KeyDer<'static>,
        bundle: Vec<u8>,
    ) -> Self {
        Self { spiffe_id: spiffe_id.into(), chain, key, bundle, hint: String::new() }
    }

    fn decode(bytes: &[u8]) -> Result<Self, InvalidMessage> {
        let mut svid = Self::new("", Vec::new(), Vec::new().into(), Vec::new());
        let mut fields = Fields(bytes);
        while let Some((field, value)) = fields.next()? {
            match (field, value) {
                (1, Value::Bytes(id)) => svid.spiffe_id = text(id)?,
                (2, Value::Bytes(chain)) => svid.chain = chain.to_vec(),
                (3, Value::Bytes(key)) => svid.key = key.to_vec().into(),
                (4, Value::Bytes(bundle)) => svid.bundle = bundle.to_vec(),
                (5, Value::Bytes(hint)) => svid.hint = text(hint)?,
                (1..=5, _) => return Err(InvalidMessage),
                _ => {}
            }
        }
        Ok(svid)
    }
}

/// An entry of a map is a message of key and value.
fn entry_of(bytes: &[u8]) -> Result<(String, Vec<u8>), InvalidMessage> {
    let (mut domain, mut bundle) = (String::new(), Vec::new());
    let mut fields = Fields(bytes);
    while let Some((field, value)) = fields.next()? {
        match (field, value) {
            (1, Value::Bytes(key)) => domain = text(key)?,
            (2, Value::Bytes(value)) => bundle = value.to_vec(),
            (1 | 2, _) => return Err(InvalidMessage),
            _ => {}
        }
    }
    Ok((domain, bundle))
}

#[cfg(test)]
mod tests {
    use super::*;

    // As protobuf encodes it; field 9 is one of a later version.
    const BYTES: &[u8] = b"\x0a\x1a\x0a\x0cspiffe://a/b\x12\x01C\x1a\x01K\x22\x01B\x2a\x01h\
        \x12\x03crl\x1a\x0f\x0a\x0aspiffe://f\x12\x01F\x48\x01";

    #[test]
    fn pa_05_the_message_is_that_of_spiffe() {
        let message = X509SvidResponse::decode(BYTES).unwrap();
        let svid = &message.svids[0];
        assert_eq!((svid.spiffe_id.as_str(), svid.hint.as_str()), ("spiffe://a/b", "h"));
        assert_eq!(
            (&svid.chain[..], svid.key.secret_pkcs8_der(), &svid.bundle[..]),
            (&b"C"[..], &b"K"[..], &b"B"[..])
        );
        assert_eq!(message.crls, [b"crl"]);
        assert_eq!(message.federated_bundles["spiffe://f"], b"F");
        assert!(X509SvidResponse::decode(b"").unwrap().svids.is_empty());
    }

    #[test]
    fn a_key_is_not_shown() {
        let key = b"SECRETSECRET".to_vec();
        let shown = format!("{:?}", X509Svid::new("spiffe://a/b", Vec::new(), key.into(), Vec::new()));
        assert!(!shown.contains("SECRET") && !shown.contains("83, 69"), "{shown}");
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bytes in
            [&b"\x08\x01"[..], b"\x0a\x02\x08\x01", b"\x0a\x03\x0a\x01\xff", b"\x1a\x02\x08\x01", b"\x12"]
        {
            assert_eq!(X509SvidResponse::decode(bytes).map(drop), Err(InvalidMessage), "{bytes:?}");
        }
        // Half of a message ends within a field, or is the shorter message that it is.
        let read = (0..BYTES.len()).filter(|end| X509SvidResponse::decode(&BYTES[..*end]).is_ok()).count();
        assert_eq!(read, 4);
    }
}
