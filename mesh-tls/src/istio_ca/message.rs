//! The two messages of the service, in protobuf.
//!
//! Fields that are not known are skipped, as protobuf asks for; so is the request's `metadata`, which names signers and
//! impersonated identities that nothing here has.

use crate::protobuf::{Fields, InvalidMessage, VARINT, Value, put_bytes, put_varint, text};

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CertificateRequest {
    /// The signing request in PEM. Field 1.
    pub csr: String,
    /// For how long, in seconds; what is not positive leaves it to the authority. Field 3.
    pub validity_duration: i64,
}

/// What is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CertificateResponse {
    /// Certificates in PEM, the workload's own first and whom to believe last. Field 1.
    pub cert_chain: Vec<String>,
}

impl CertificateRequest {
    /// Asks for a certificate for the key of `csr`, for so many seconds.
    #[must_use]
    pub const fn new(csr: String, validity_duration: i64) -> Self {
        Self { csr, validity_duration }
    }

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.csr.len() + 16);
        if !self.csr.is_empty() {
            put_bytes(&mut out, 1, self.csr.as_bytes());
        }
        if self.validity_duration != 0 {
            put_varint(&mut out, 3 << 3 | VARINT);
            put_varint(&mut out, self.validity_duration.cast_unsigned());
        }
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// When they are no such message.
    pub fn decode(bytes: &[u8]) -> Result<Self, InvalidMessage> {
        let mut message = Self::default();
        let mut fields = Fields(bytes);
        while let Some((field, value)) = fields.next()? {
            match (field, value) {
                (1, Value::Bytes(csr)) => message.csr = text(csr)?,
                (3, Value::Number(seconds)) => message.validity_duration = seconds.cast_signed(),
                (1 | 3, _) => return Err(InvalidMessage),
                _ => {}
            }
        }
        Ok(message)
    }
}

impl CertificateResponse {
    /// Gives these certificates.
    #[must_use]
    pub const fn new(cert_chain: Vec<String>) -> Self {
        Self { cert_chain }
    }

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.cert_chain.iter().map(|pem| pem.len() + 8).sum());
        for pem in &self.cert_chain {
            put_bytes(&mut out, 1, pem.as_bytes());
        }
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// When they are no such message.
    pub fn decode(bytes: &[u8]) -> Result<Self, InvalidMessage> {
        let mut message = Self::default();
        let mut fields = Fields(bytes);
        while let Some((field, value)) = fields.next()? {
            match (field, value) {
                (1, Value::Bytes(pem)) => message.cert_chain.push(text(pem)?),
                (1, _) => return Err(InvalidMessage),
                _ => {}
            }
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pa_05_the_messages_are_those_of_istio() {
        // What protoc's encoder writes for csr "CSR", validity_duration 86400, metadata {"CertSigner": "a"}.
        let bytes = b"\x0a\x03CSR\x18\x80\xa3\x05\x22\x13\x0a\x11\x0a\x0aCertSigner\x12\x03\x1a\x01a";
        let request = CertificateRequest::decode(bytes).unwrap();
        assert_eq!(request, CertificateRequest::new("CSR".to_owned(), 86_400));
        assert_eq!(request.encode(), bytes[..9]);
        let response = CertificateResponse::new(vec!["leaf".to_owned(), "root".to_owned()]);
        assert_eq!(response.encode(), b"\x0a\x04leaf\x0a\x04root");
        assert_eq!(CertificateResponse::decode(&response.encode()).unwrap(), response);
        assert_eq!(CertificateRequest::decode(b"").unwrap(), CertificateRequest::default());
        let negative = CertificateRequest::new(String::new(), -1);
        assert_eq!(CertificateRequest::decode(&negative.encode()).unwrap(), negative);
        // Fields of all widths that nobody knows are skipped, and the last of one that is known counts.
        let known = CertificateRequest::decode(b"\x79\0\0\0\0\0\0\0\0\x7d\0\0\0\0\x78\x01\x0a\x01a\x0a\x01b");
        assert_eq!(known.unwrap().csr, "b");
    }

    #[test]
    fn no_bytes_are_too_strange() {
        use rand::{RngExt as _, SeedableRng as _};
        let mut chance = rand::rngs::StdRng::seed_from_u64(1);
        let good = CertificateRequest::new("CSR".repeat(30), 86_400).encode();
        let mut read = 0;
        for _ in 0..100_000 {
            let mut bytes = good.clone();
            for _ in 0..chance.random_range(0..4) {
                let at = chance.random_range(0..bytes.len());
                bytes[at] = chance.random();
            }
            bytes.truncate(chance.random_range(0..=bytes.len()));
            if let Ok(message) = CertificateRequest::decode(&bytes) {
                assert_eq!(CertificateRequest::decode(&message.encode()), Ok(message));
                read += 1;
            }
            if let Ok(message) = CertificateResponse::decode(&bytes) {
                assert_eq!(CertificateResponse::decode(&message.encode()), Ok(message));
            }
        }
        assert!(read > 100, "{read}");
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bytes in [
            &b"\x0a"[..],                                       // no length
            b"\x0a\x05abc",                                     // too short
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01abc", // a length that no memory has
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",    // a number of more than 64 bits
            b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",    // a number without an end
            b"\x0a\x01\xff",                                    // no UTF-8
            b"\x08\x01",                                        // a number where bytes are expected
            b"\x00",                                            // field 0
            b"\x0b\x0c",                                        // a group
            b"\x79\0\0\0",                                      // a fixed width that ends early
        ] {
            assert_eq!(CertificateRequest::decode(bytes), Err(InvalidMessage), "{bytes:?}");
            assert_eq!(CertificateResponse::decode(bytes), Err(InvalidMessage), "{bytes:?}");
        }
        assert_eq!(CertificateRequest::decode(b"\x1a\x01a"), Err(InvalidMessage));
    }
}
