//! Hosts as Gateway servers and Sidecar listeners name them: `namespace/dnsName`.

use super::check::{self, Checked};
use crate::istio::findings::Findings;

/// Whose host it is; the two differ in what the namespace part may be, and a Gateway may leave it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostOf {
    /// `servers[].hosts[]` (GW-02).
    Gateway,
    /// `egress[].hosts[]` (SC-01).
    Sidecar,
}

/// Judges one `namespace/dnsName` at `field`.
pub(crate) fn namespaced_host(out: &mut Findings, field: &str, host: &str, of: HostOf) {
    let Some((namespace, name)) = host.split_once('/') else {
        match of {
            HostOf::Gateway => dns_name(out, field, host, of),
            HostOf::Sidecar => out.error(field, format!("{host:?} must be of the form namespace/dnsName")),
        }
        return;
    };
    if namespace.is_empty() || name.is_empty() {
        out.error(field, format!("{host:?}: neither the namespace nor the name of a host may be empty"));
    }
    if !is_namespace(namespace, of) {
        out.error(field, format!("{host:?}: invalid namespace value {namespace:?}"));
    }
    dns_name(out, field, name, of);
}

fn is_namespace(namespace: &str, of: HostOf) -> bool {
    match (namespace, of) {
        ("*" | ".", _) | ("~", HostOf::Sidecar) => true,
        (_, HostOf::Sidecar) => check::is_dns1123_label(namespace.strip_prefix('~').unwrap_or(namespace)),
        (_, HostOf::Gateway) => check::is_dns1123_label(namespace),
    }
}

fn dns_name(out: &mut Findings, field: &str, name: &str, of: HostOf) {
    // A Gateway may name an address, which for IPv6 has no dot either.
    let address = of == HostOf::Gateway && check::ip(name).is_ok();
    if name != "*" && !name.contains('.') {
        out.error(field, format!("{name:?}: short names are not allowed, only fully qualified ones"));
    }
    if !address {
        out.check(field, check::wildcard_domain(name));
    }
    out.check(field, whole_wildcard(name));
}

/// A host whose `*`, if it has one, is the whole first label.
///
/// # Errors
/// `*bar.com`, `*-a.com`.
pub(crate) fn whole_wildcard(host: &str) -> Checked {
    if host.contains('*') && host != "*" && !host.starts_with("*.") {
        return Err(format!("partial wildcard {host:?} not allowed"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fine(host: &str, of: HostOf) -> bool {
        let mut out = Findings::default();
        namespaced_host(&mut out, "hosts[0]", host, of);
        !out.has_errors()
    }

    #[test]
    fn gw_02_hosts() {
        for host in ["*", "foo.bar.com", "*.bar.com", "ns/foo.com", "*/foo.com", "./*", "10.0.0.1"] {
            assert!(fine(host, HostOf::Gateway), "{host}");
        }
        for host in ["", "foo", "~/foo.com", "/foo.com", "ns/", "a b/foo.com", "*bar.com", "ns/f*.com"] {
            assert!(!fine(host, HostOf::Gateway), "{host}");
        }
    }

    #[test]
    fn sc_01_hosts() {
        for host in ["*/*", "./*", "~/*", "ns/*.bar.com", "~ns1/*", "ns/reviews.default.svc.cluster.local"] {
            assert!(fine(host, HostOf::Sidecar), "{host}");
        }
        for host in ["*", "foo.com", "ns/reviews", "~~a/*", "ns/10.0.0.1", "~a b/*", "ns/*foo.com"] {
            assert!(!fine(host, HostOf::Sidecar), "{host}");
        }
    }
}
