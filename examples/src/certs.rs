//! Every certificate in force, in the form of Envoy's `/certs`: what dashboards and scripts for it read works here.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_tls::Material;
use mesh_tls::certificate::Leaf;
use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// What certificates are called, and what they are now.
pub type Named = (String, Arc<Material>);

/// The document of `/certs`: for each of what has a name, the authorities that it believes and the chain that it shows.
#[must_use]
pub fn dump(all: &[Named], now: SystemTime) -> Value {
    let certificates: Vec<_> = all
        .iter()
        .map(|(name, material)| {
            let chain = material.identity.iter().flat_map(|identity| identity.chain());
            json!({
                "ca_cert": list(name, material.bundle.roots().iter(), now),
                "cert_chain": list(name, chain, now),
            })
        })
        .collect();
    json!({ "certificates": certificates })
}

fn list<'c>(
    name: &str,
    certificates: impl Iterator<Item = &'c CertificateDer<'static>>,
    now: SystemTime,
) -> Vec<Value> {
    certificates
        .filter_map(|certificate| Leaf::read(certificate).ok())
        .map(|leaf| one(name, &leaf, now))
        .collect()
}

fn one(name: &str, leaf: &Leaf, now: SystemTime) -> Value {
    let uris = leaf.uri_sans.iter().map(|uri| json!({ "uri": uri }));
    let dns = leaf.dns_sans.iter().map(|name| json!({ "dns": name }));
    let addresses = leaf.ip_sans.iter().map(|address| json!({ "ip_address": address.to_string() }));
    // Whole days, as Envoy counts them; 0 on the last day and after it.
    let days = leaf.not_after.duration_since(now).unwrap_or_default().as_secs() / DAY.as_secs();
    json!({
        "path": name,
        "serial_number": leaf.serial.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
        "subject_alt_names": uris.chain(dns).chain(addresses).collect::<Vec<_>>(),
        "days_until_expiration": days.to_string(),
        "valid_from": humantime::format_rfc3339_seconds(leaf.not_before).to_string(),
        "expiration_time": humantime::format_rfc3339_seconds(leaf.not_after).to_string(),
    })
}

#[cfg(test)]
mod tests {
    use mesh_tls::TrustBundle;
    use mesh_tls::ca::Authority;

    use super::*;

    #[test]
    fn certificates_are_told_as_envoy_tells_them() {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let now = SystemTime::now();
        let ca = Authority::new("cluster.local".parse().unwrap(), now, 10 * DAY).unwrap();
        let id = "spiffe://cluster.local/ns/default/sa/a".parse().unwrap();
        let identity = ca.issue(&id, now, 3 * DAY).unwrap().identity(&provider).unwrap();
        let serial = Leaf::read(&identity.chain()[0]).unwrap().serial;
        let bundle = Arc::new(TrustBundle::new([ca.root().clone()]).unwrap());
        let material = Material { identity: Some(identity), bundle };
        let told = dump(&[("a".to_owned(), Arc::new(material))], now + Duration::from_secs(60));
        let [one] = told["certificates"].as_array().unwrap().as_slice() else { panic!("{told}") };
        let (own, root) = (&one["cert_chain"][0], &one["ca_cert"][0]);
        assert_eq!(own["subject_alt_names"], json!([{ "uri": "spiffe://cluster.local/ns/default/sa/a" }]));
        assert_eq!(own["days_until_expiration"], "2");
        assert_eq!(own["path"], "a");
        let hex = own["serial_number"].as_str().unwrap();
        assert_eq!(u8::from_str_radix(&hex[..2], 16).unwrap(), serial[0]);
        assert_eq!(hex.len(), serial.len() * 2);
        assert_eq!(root["days_until_expiration"], "9");
        assert_eq!(root["subject_alt_names"], json!([{ "uri": "spiffe://cluster.local" }]));
        let expired = dump(&[("a".to_owned(), Arc::new(Material::default()))], now);
        assert_eq!(expired, json!({ "certificates": [{ "ca_cert": [], "cert_chain": [] }] }));
        assert!(own["expiration_time"].as_str().unwrap().ends_with('Z'));
    }
}
