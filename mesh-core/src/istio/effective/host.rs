//! Names of services as rules write them, and which names one pattern covers.

use std::borrow::Cow;
use std::net::IpAddr;

/// The full name that `host` stands for in a resource of `namespace`: a name without a dot is a service of the
/// **rule's** namespace. Addresses, `*` and names with a dot stand for themselves.
#[must_use]
pub fn resolve<'a>(host: &'a str, namespace: &str, cluster_domain: &str) -> Cow<'a, str> {
    if host.is_empty() || host == "*" || host.contains('.') || host.parse::<IpAddr>().is_ok() {
        return Cow::Borrowed(host);
    }
    let mut name = host.to_owned();
    for part in [namespace, "svc", cluster_domain] {
        name.push('.');
        name.push_str(part);
    }
    Cow::Owned(name)
}

/// Whether every host that `inner` names is named by `outer` too. Both may be exact names, `*.suffix` or `*`; case does
/// not count.
#[must_use]
pub fn is_covered_by(inner: &str, outer: &str) -> bool {
    let Some(suffix) = outer.strip_prefix('*') else { return inner.eq_ignore_ascii_case(outer) };
    let inner = inner.strip_prefix('*').map_or(inner, |rest| if rest.is_empty() { "*" } else { rest });
    if inner == "*" {
        // Only `*` itself covers `*`.
        return suffix.is_empty();
    }
    ends_with_ignore_case(inner, suffix)
}

/// Whether some host is named by both patterns.
#[must_use]
pub fn overlap(a: &str, b: &str) -> bool {
    is_covered_by(a, b) || is_covered_by(b, a)
}

fn ends_with_ignore_case(text: &str, suffix: &str) -> bool {
    text.len() >= suffix.len()
        && text.is_char_boundary(text.len() - suffix.len())
        && text[text.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn x_03_short_names_take_the_namespace_of_the_rule() {
        let full = |host| resolve(host, "default", "cluster.local").into_owned();
        assert_eq!(full("reviews"), "reviews.default.svc.cluster.local");
        for host in
            ["reviews.prod", "reviews.prod.svc.cluster.local", "*", "*.com", "10.0.0.1", "fd00::1", ""]
        {
            assert_eq!(full(host), host);
        }
    }

    #[test]
    fn x_06_a_wildcard_covers_what_ends_like_it() {
        for (inner, outer) in [
            ("a.foo.com", "*.foo.com"),
            ("A.Foo.com", "*.foo.COM"),
            ("*.a.foo.com", "*.foo.com"),
            ("*.foo.com", "*.foo.com"),
            ("a", "*"),
            ("*", "*"),
            ("a.b", "a.b"),
        ] {
            assert!(is_covered_by(inner, outer), "{inner} {outer}");
        }
        for (inner, outer) in
            [("foo.com", "*.foo.com"), ("*.foo.com", "a.foo.com"), ("*", "*.com"), ("xfoo.com", "*.foo.com")]
        {
            assert!(!is_covered_by(inner, outer), "{inner} {outer}");
        }
        assert!(overlap("*.foo.com", "a.foo.com") && !overlap("*.foo.com", "*.bar.com"));
    }
}
