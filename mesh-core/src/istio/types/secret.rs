//! Kubernetes' `Secret`: certificates and keys that gateways and destinations name.
//!
//! What is in it is for handshakes alone. It is never printed: `Debug` tells the keys and nothing else, and no message
//! of the validator quotes a value.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::istio::findings::{Findings, Validate};

/// `v1` Secret.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Secret {
    /// `kubernetes.io/tls`, `Opaque` or another word; what counts is which keys there are.
    #[serde(rename = "type")]
    pub secret_type: String,
    /// Values in base64.
    data: BTreeMap<String, String>,
    /// Values as they are; they stand above `data`.
    string_data: BTreeMap<String, String>,
}

impl Secret {
    /// The bytes under a key; `None` where there are none.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<Vec<u8>> {
        let value = match self.string_data.get(key) {
            Some(text) => text.clone().into_bytes(),
            None => decode(self.data.get(key)?)?,
        };
        (!value.is_empty()).then_some(value)
    }
}

/// As Kubernetes reads it: line ends do not count.
fn decode(text: &str) -> Option<Vec<u8>> {
    let text: String = text.chars().filter(|character| !character.is_ascii_whitespace()).collect();
    STANDARD.decode(text).ok()
}

impl Validate for Secret {
    fn validate(&self, out: &mut Findings) {
        for (key, value) in &self.data {
            if decode(value).is_none() {
                out.error(&format!("data[{key:?}]"), "not valid base64");
            }
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret")
            .field("type", &self.secret_type)
            .field("keys", &self.data.keys().chain(self.string_data.keys()).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use crate::istio::{LoadOptions, ResourceSet, SourceFile};

    #[test]
    fn gw_05_values_are_read_and_never_told() {
        let text = "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\ntype: Opaque\nimmutable: true\ndata:\n  a: aHVudGVyMg==\n  b: |\n    aHVu\n    dGVyMg==\nstringData: {b: plain, c: ''}\n";
        let (set, diags) = ResourceSet::load(&[SourceFile::new("a.yaml", text)], &LoadOptions::default());
        assert!(diags.iter().next().is_none(), "{diags}");
        let secret = &set.secrets()[0].spec;
        let value = |key: &str| secret.value(key).map(|value| String::from_utf8(value).unwrap());
        assert_eq!(value("a").as_deref(), Some("hunter2"));
        assert_eq!(value("b").as_deref(), Some("plain"));
        assert_eq!((value("c"), value("d")), (None, None));
        let told = format!("{set:?}");
        assert!(!told.contains("hunter2") && !told.contains("aHVu") && !told.contains("plain"), "{told}");
        let broken = text.replace("aHVudGVyMg==", "hunter2!");
        let (_, diags) = ResourceSet::load(&[SourceFile::new("a.yaml", broken)], &LoadOptions::default());
        let said = diags.to_string();
        assert!(said.contains("data[\"a\"]: not valid base64") && !said.contains("hunter2"), "{said}");
    }
}
