//! The aliases of a trust domain: identities of which one policy speaks under several names (AP-12).

/// The parts of `td/ns/NS/sa/SA`.
const PARTS: usize = 5;

/// The trust domain that stands for the local one in every policy, whatever the mesh's is called.
const LOCAL: &str = "cluster.local";

/// The trust domains of a mesh: its own, and those that are taken for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustDomains {
    domains: Vec<String>,
}

impl TrustDomains {
    /// The mesh's own trust domain with its aliases, in that order.
    #[must_use]
    pub fn new(own: &str, aliases: &[String]) -> Self {
        let mut domains = vec![own.to_owned()];
        domains.extend(aliases.iter().filter(|alias| *alias != own).cloned());
        Self { domains }
    }

    /// Whether an identity of trust domain `name` is one of the mesh's own.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.domains.iter().any(|domain| domain == name)
    }

    /// Every principal that `principal` of a policy means: the same identity in each of the trust domains. A principal
    /// that says nothing about the trust domain, or that names another one, means itself.
    #[must_use]
    pub fn expand(&self, principal: &str) -> Vec<String> {
        let same = || vec![principal.to_owned()];
        let Some((domain, rest)) = principal
            .split_once('/')
            .filter(|(domain, _)| *domain != "*" && principal.split('/').count() == PARTS)
        else {
            return same();
        };
        if domain != LOCAL && !self.domains.iter().any(|own| pattern_matches(domain, own)) {
            return same();
        }
        let mut principals = Vec::with_capacity(self.domains.len());
        for own in &self.domains {
            // `*.local/ns/…` already speaks of this one, and of others that end like it.
            let keep = domain.starts_with('*') && pattern_matches(domain, own);
            let expanded = if keep { principal.to_owned() } else { format!("{own}/{rest}") };
            if !principals.contains(&expanded) {
                principals.push(expanded);
            }
        }
        principals
    }
}

/// `*`, `*suffix`, `prefix*`, or equal.
fn pattern_matches(pattern: &str, value: &str) -> bool {
    if let Some(suffix) = pattern.strip_prefix('*') {
        return value.ends_with(suffix);
    }
    match pattern.strip_suffix('*') {
        Some(prefix) => value.starts_with(prefix),
        None => pattern == value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand(own: &str, aliases: &[&str], principal: &str) -> Vec<String> {
        let aliases: Vec<_> = aliases.iter().map(|alias| (*alias).to_owned()).collect();
        TrustDomains::new(own, &aliases).expand(principal)
    }

    #[test]
    fn ap_12_aliases_expand_principals() {
        assert_eq!(expand("td1", &["td2"], "td1/ns/a/sa/b"), ["td1/ns/a/sa/b", "td2/ns/a/sa/b"]);
        assert_eq!(expand("td1", &["td2"], "td2/ns/a/sa/b"), ["td1/ns/a/sa/b", "td2/ns/a/sa/b"]);
        assert_eq!(expand("td1", &["td2"], "cluster.local/ns/a/sa/*"), ["td1/ns/a/sa/*", "td2/ns/a/sa/*"]);
        assert_eq!(expand("td1", &["td2"], "td3/ns/a/sa/b"), ["td3/ns/a/sa/b"]);
    }

    #[test]
    fn ap_12_principals_without_a_trust_domain_stay() {
        for principal in ["*", "*/ns/a/sa/b", "*/sa/b", "td1", "td1/ns/a"] {
            assert_eq!(expand("td1", &["td2"], principal), [principal]);
        }
    }

    #[test]
    fn ap_12_a_wildcard_domain_keeps_what_it_matches() {
        assert_eq!(expand("some.local", &["td2"], "*local/ns/a/sa/b"), ["*local/ns/a/sa/b", "td2/ns/a/sa/b"]);
    }
}
