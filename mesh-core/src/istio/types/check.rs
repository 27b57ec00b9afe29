//! Judgements on single values, as Istio's `pkg/config/validation` makes them.
//!
//! Each function says `Err(reason)`, without the field path, which [`Findings::check`] adds.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::IpAddr;

use ipnet::IpNet;
use regex::RegexBuilder;

use super::common::{Duration, StringMatch};
use crate::istio::findings::Findings;
use crate::matcher::re2;

/// What a judgement says: fine, or why not.
pub type Checked = Result<(), String>;

/// The longest regular expression that Istio accepts, in bytes.
pub const MAX_REGEX_LEN: usize = 1024;

/// What one compiled regular expression may take, in bytes.
pub const MAX_REGEX_SIZE: usize = 1 << 20;

const MAX_LABEL_LEN: usize = 63;
const MAX_DOMAIN_LEN: usize = 255;

impl Findings {
    /// Records the reason of `checked`, if it has one, as an error at `field`; returns whether it was fine.
    pub fn check(&mut self, field: &str, checked: Checked) -> bool {
        match checked {
            Ok(()) => true,
            Err(reason) => {
                self.error(field, reason);
                false
            }
        }
    }
}

/// A port number: 1..=65535.
///
/// # Errors
/// Outside that range.
pub fn port(number: u32) -> Checked {
    if (1..=65_535).contains(&number) {
        return Ok(());
    }
    Err(format!("port number {number} must be in the range 1..65535"))
}

/// An HTTP status: 100..=599.
///
/// # Errors
/// Outside that range.
pub fn http_status(status: u32) -> Checked {
    if (100..=599).contains(&status) { Ok(()) } else { Err(format!("{status} is not an HTTP status")) }
}

/// A timer: at least 1 ms, and whole milliseconds (X-02).
///
/// # Errors
/// Shorter, or finer.
pub fn duration(value: Duration) -> Checked {
    if value < Duration::from_millis(1) {
        return Err(format!("duration {value} must be at least 1ms"));
    }
    whole_millis(value)
}

/// A timer that may be zero, which is "off": whole milliseconds and not negative.
///
/// # Errors
/// Negative, or finer than a millisecond.
pub fn duration_or_zero(value: Duration) -> Checked {
    if value.is_negative() {
        return Err(format!("duration {value} must not be negative"));
    }
    whole_millis(value)
}

/// A timer within `min..=max`.
///
/// # Errors
/// Outside that range.
pub fn duration_range(value: Duration, min: Duration, max: Duration) -> Checked {
    if value < min || value > max {
        return Err(format!("duration {value} must be between {min} and {max}"));
    }
    Ok(())
}

fn whole_millis(value: Duration) -> Checked {
    if value.is_whole_millis() {
        return Ok(());
    }
    Err(format!("duration {value} is finer than 1ms; only whole milliseconds are supported"))
}

/// A percentage in whole numbers: 0..=100.
///
/// # Errors
/// Outside that range.
pub fn percent(value: i64) -> Checked {
    if (0..=100).contains(&value) {
        Ok(())
    } else {
        Err(format!("percentage {value} must be in the range 0..100"))
    }
}

/// No more than `most` of something, as the schema of the resource says. Records at `field`.
pub(crate) fn at_most(out: &mut Findings, field: &str, what: &str, count: usize, most: usize) {
    if count > most {
        out.error(field, format!("{count} {what} are too many (at most {most})"));
    }
}

/// Whether `label` is a DNS label as Istio reads RFC 1123: letters of either case, digits and inner hyphens, at most
/// 63 bytes.
#[must_use]
pub fn is_dns1123_label(label: &str) -> bool {
    let bytes = label.as_bytes();
    let alphanumeric_ends = matches!((bytes.first(), bytes.last()), (Some(first), Some(last))
        if first.is_ascii_alphanumeric() && last.is_ascii_alphanumeric());
    bytes.len() <= MAX_LABEL_LEN
        && alphanumeric_ends
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
}

/// A DNS label ([`is_dns1123_label`]).
///
/// # Errors
/// It is not.
pub fn dns1123_label(label: &str) -> Checked {
    if is_dns1123_label(label) {
        Ok(())
    } else {
        Err(format!("{label:?} is not a valid DNS label (RFC 1123)"))
    }
}

/// A fully or partly qualified domain name without wildcard. A trailing dot is allowed, an all-numeric last label is
/// not, so that no IPv4 address passes.
///
/// # Errors
/// Empty, too long, a numeric top level or a label that is not one.
pub fn fqdn(name: &str) -> Checked {
    domain_length(name)?;
    dns_labels(name, name)
}

/// A domain name whose first label may be `*`, or begin with `*` or `*-`.
///
/// # Errors
/// As [`fqdn`].
pub fn wildcard_domain(name: &str) -> Checked {
    domain_length(name)?;
    let (first, rest) = name.split_once('.').map_or((name, None), |(first, rest)| (first, Some(rest)));
    if !is_wildcard_label(first) {
        return Err(format!("domain name {name:?} invalid (label {first:?} invalid)"));
    }
    rest.map_or(Ok(()), |rest| dns_labels(name, rest))
}

/// Whether `label` is a DNS label, `*`, or a DNS label after `*` or `*-`.
#[must_use]
pub fn is_wildcard_label(label: &str) -> bool {
    if label.len() > MAX_LABEL_LEN {
        return false;
    }
    match label.strip_prefix('*') {
        None => is_dns1123_label(label),
        Some("") => true,
        Some(rest) => is_dns1123_label(rest.strip_prefix('-').unwrap_or(rest)),
    }
}

fn domain_length(name: &str) -> Checked {
    if name.is_empty() {
        return Err("a domain name must not be empty".to_owned());
    }
    if name.len() > MAX_DOMAIN_LEN {
        return Err(format!("domain name of {} bytes is too long (at most {MAX_DOMAIN_LEN})", name.len()));
    }
    Ok(())
}

/// The labels of `rest`, which is `name` or what follows its first label.
fn dns_labels(name: &str, rest: &str) -> Checked {
    let last = rest.rsplit('.').next().unwrap_or(rest);
    if !last.is_empty() && last.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("domain name {name:?} invalid (top level {last:?} must not be all digits)"));
    }
    let labels = rest.strip_suffix('.').unwrap_or(rest);
    match labels.split('.').find(|label| !is_dns1123_label(label)) {
        Some(label) => Err(format!("domain name {name:?} invalid (label {label:?} invalid)")),
        None => Ok(()),
    }
}

/// An IPv4 or IPv6 address.
///
/// # Errors
/// It is neither.
pub fn ip(address: &str) -> Checked {
    match address.parse::<IpAddr>() {
        Ok(_) => Ok(()),
        Err(_) => Err(format!("{address:?} is not a valid IP address")),
    }
}

/// A CIDR block (`10.0.0.0/8`).
///
/// # Errors
/// It is not.
pub fn cidr(block: &str) -> Checked {
    match block.parse::<IpNet>() {
        Ok(_) => Ok(()),
        Err(_) => Err(format!("{block:?} is not a valid CIDR block")),
    }
}

/// A CIDR block or an address.
///
/// # Errors
/// It is neither.
pub fn ip_or_cidr(subnet: &str) -> Checked {
    if subnet.contains('/') { cidr(subnet) } else { ip(subnet) }
}

/// The path of a unix domain socket: absolute, or in the abstract namespace (`@name`).
///
/// # Errors
/// Empty, relative or a directory.
pub fn unix_address(path: &str) -> Checked {
    if path.is_empty() {
        return Err("a unix address must not be empty".to_owned());
    }
    if path.starts_with('@') {
        return Ok(());
    }
    if !path.starts_with('/') || path.ends_with('/') {
        return Err(format!("{path:?} is not an absolute path or an abstract socket"));
    }
    Ok(())
}

/// A label key, with an optional DNS prefix before `/`.
///
/// # Errors
/// It is not one.
pub fn label_key(key: &str) -> Checked {
    let invalid = || Err(format!("label key {key:?} is invalid"));
    let name = match key.split_once('/') {
        None => key,
        Some((prefix, name)) => {
            if prefix.len() > 253 || !prefix.split('.').all(is_dns1123_label) {
                return invalid();
            }
            name
        }
    };
    if is_qualified_name(name) { Ok(()) } else { invalid() }
}

/// A label value, which may be empty.
///
/// # Errors
/// It is not one.
pub fn label_value(value: &str) -> Checked {
    if value.is_empty() || is_qualified_name(value) {
        return Ok(());
    }
    Err(format!("label value {value:?} is invalid"))
}

/// The keys and values of `labels`, each error at `field.key`.
pub fn labels(out: &mut Findings, field: &str, labels: &BTreeMap<String, String>) {
    out.within(field, |out| {
        for (key, value) in labels {
            out.check(&key_path(key), label_key(key));
            out.check(&key_path(key), label_value(value));
        }
    });
}

/// The key of a map as a step of a field path: bare if it looks like a field, else quoted in brackets.
#[must_use]
pub fn key_path(key: &str) -> String {
    let plain =
        !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    if plain { key.to_owned() } else { format!("[{key:?}]") }
}

fn is_qualified_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    let alphanumeric_ends = matches!((bytes.first(), bytes.last()), (Some(first), Some(last))
        if first.is_ascii_alphanumeric() && last.is_ascii_alphanumeric());
    bytes.len() <= MAX_LABEL_LEN
        && alphanumeric_ends
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
}

/// An expression that RE2 accepts and that stays small: at most [`MAX_REGEX_LEN`] bytes and [`MAX_REGEX_SIZE`]
/// compiled. Look-around and back-references are refused.
///
/// # Errors
/// Too long, too large, or not an RE2 expression.
pub fn regex(expression: &str) -> Checked {
    if expression.len() > MAX_REGEX_LEN {
        return Err(format!("regex of {} bytes is too long (at most {MAX_REGEX_LEN})", expression.len()));
    }
    let translated =
        re2::translate(expression).map_err(|reason| format!("regex {expression:?} is invalid: {reason}"))?;
    match RegexBuilder::new(&translated).size_limit(MAX_REGEX_SIZE).build() {
        Ok(_) => Ok(()),
        Err(regex::Error::CompiledTooBig(_)) => {
            Err(format!("regex {expression:?} is too large when compiled (at most {MAX_REGEX_SIZE} bytes)"))
        }
        Err(error) => Err(format!("regex {expression:?} is invalid: {}", last_line(&error.to_string()))),
    }
}

/// The regex crate prints the expression, a caret line, then `error: reason`.
fn last_line(message: &str) -> String {
    let line = message.lines().last().unwrap_or(message).trim();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

/// A [`StringMatch`] of which at most one member is set and whose regex is valid. Records at `field`.
pub fn string_match(out: &mut Findings, field: &str, matcher: &StringMatch) {
    let set = [&matcher.exact, &matcher.prefix, &matcher.regex].into_iter().flatten().count();
    if set > 1 {
        out.error(field, "only one of exact, prefix and regex may be set");
    }
    if let Some(expression) = &matcher.regex {
        out.within(field, |out| out.check("regex", regex(expression)));
    }
}

/// A header name for matching or for a list: lowercase letters, digits and hyphens are customary; what is refused is
/// what HTTP does not allow in a token (RFC 9110, 5.6.2).
///
/// # Errors
/// Empty, or not a token.
pub fn header_name(name: &str) -> Checked {
    if name.is_empty() {
        return Err("a header name must not be empty".to_owned());
    }
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)) {
        return Err(format!("header name {name:?} is not a valid header name"));
    }
    Ok(())
}

/// `exportTo` of any kind (X-04): `.`, `*`, `~` or namespace names, no duplicates, `*` alone, and `~` only for a
/// ServiceEntry and alone.
pub fn export_to(out: &mut Findings, field: &str, export_to: &[String], namespace: &str, kind: ExportToOf) {
    let mut seen: BTreeMap<&str, &str> = BTreeMap::new();
    for (index, entry) in export_to.iter().enumerate() {
        let at = format!("{field}[{index}]");
        let key = if entry == "." { namespace } else { entry.as_str() };
        match seen.entry(key) {
            Entry::Occupied(before) if *before.get() == entry => {
                out.error(&at, format!("duplicate entry {entry:?} in exportTo"));
            }
            Entry::Occupied(_) => {
                out.error(
                    &at,
                    format!("duplicate entries in exportTo: \".\" and the own namespace {namespace:?}"),
                );
            }
            Entry::Vacant(free) => {
                if !matches!(entry.as_str(), "." | "*" | "~") && !is_dns1123_label(entry) {
                    out.error(
                        &at,
                        format!(
                            "{entry:?} is not allowed in exportTo: only \".\", \"*\", \"~\" or a namespace"
                        ),
                    );
                }
                free.insert(entry);
            }
        }
    }
    if kind == ExportToOf::DestinationRuleWithSelector
        && export_to.iter().any(|entry| entry != "." && entry != namespace)
    {
        out.error(field, "a destination rule with a workload selector can only be exported to \".\"");
    }
    if export_to.len() > 1 && seen.contains_key("*") {
        out.error(field, "\"*\" in exportTo must stand alone");
    }
    if seen.contains_key("~") {
        if kind != ExportToOf::ServiceEntry {
            out.error(field, "\"~\" in exportTo is only allowed for a ServiceEntry");
        } else if export_to.len() > 1 {
            out.error(field, "\"~\" in exportTo must stand alone");
        }
    }
}

/// Whose `exportTo` is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportToOf {
    /// A ServiceEntry, which may be exported to nobody (`~`).
    ServiceEntry,
    /// A DestinationRule with a workload selector, which is private.
    DestinationRuleWithSelector,
    /// Any other kind.
    Other,
}

/// A selector of workloads by labels (X-05): an empty key or value and a `*` are errors, no label at all is a
/// warning. `what` names it in the warning.
pub fn selector_labels(out: &mut Findings, field: &str, labels: &BTreeMap<String, String>) {
    if labels.is_empty() {
        out.warning(field, "the workload selector has no labels, so it selects every workload in its scope");
    }
    out.within(field, |out| {
        for (key, value) in labels {
            if key.is_empty() {
                out.error(&key_path(key), "a key of a workload selector must not be empty");
            }
            if key.contains('*') || value.contains('*') {
                out.error(
                    &key_path(key),
                    format!("wildcards are not supported in a workload selector: \"{key}={value}\""),
                );
            }
            at_most(out, &key_path(key), "characters", value.chars().count(), MAX_LABEL_LEN);
        }
    });
}

/// The names of gateways, `namespace/name` or `name` or the reserved `mesh`. The old dotted form is a warning.
pub fn gateway_names(out: &mut Findings, field: &str, names: &[String]) {
    for (index, name) in names.iter().enumerate() {
        let at = format!("{field}[{index}]");
        match name.split_once('/') {
            None => {
                if let Some((first, rest)) = name.split_once('.') {
                    let namespace = rest.split('.').next().unwrap_or(rest);
                    out.warning(
                        &at,
                        format!("{name:?} is the old form of a gateway name; prefer \"{namespace}/{first}\""),
                    );
                }
                out.check(&at, fqdn(name));
            }
            Some((namespace, gateway)) => {
                if namespace.is_empty() || gateway.is_empty() {
                    out.error(&at, format!("{name:?}: neither namespace nor name of a gateway may be empty"));
                    continue;
                }
                out.check(&at, dns1123_label(namespace));
                out.check(&at, dns1123_label(gateway));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domains() {
        for name in
            ["a", "a.b", "reviews.default.svc.cluster.local", "istio.io.", "A-b.c", "127.0.0.1.nip.io"]
        {
            assert_eq!(fqdn(name), Ok(()), "{name}");
        }
        for name in ["", "a..b", "-a.b", "a_b.c", "10.0.0.1", "*.a", "a.*", &"a.".repeat(128)] {
            assert!(fqdn(name).is_err(), "{name}");
        }
        for name in ["*", "*.foo.com", "*-a.foo.com", "*a.foo.com", "foo.com"] {
            assert_eq!(wildcard_domain(name), Ok(()), "{name}");
        }
        for name in ["a.*.com", "**.com", "f*.com", "*.*.com", "10.0.0.1", "*--"] {
            assert!(wildcard_domain(name).is_err(), "{name}");
        }
    }

    #[test]
    fn x_04_export_to() {
        let judge = |entries: &[&str], kind| {
            let mut out = Findings::default();
            let entries: Vec<_> = entries.iter().map(|entry| (*entry).to_owned()).collect();
            export_to(&mut out, "exportTo", &entries, "ns5", kind);
            !out.has_errors()
        };
        assert!(
            judge(&[], ExportToOf::Other)
                && judge(&["."], ExportToOf::Other)
                && judge(&["*"], ExportToOf::Other)
        );
        assert!(judge(&["a", "."], ExportToOf::Other) && judge(&["~"], ExportToOf::ServiceEntry));
        for bad in [&["*", "a"][..], &[".", "ns5"], &["a", "a"], &["~"], &["a b"], &["*", "."]] {
            assert!(!judge(bad, ExportToOf::Other), "{bad:?}");
        }
        assert!(!judge(&["~", "."], ExportToOf::ServiceEntry));
        assert!(!judge(&["*"], ExportToOf::DestinationRuleWithSelector));
    }

    #[test]
    fn regexes_are_re2() {
        assert_eq!(regex(r"(?i)^/v[0-9]+/.*$"), Ok(()));
        for bad in ["(", "a(?=b)", r"(a)\1", "(a{1,1000}){1,1000}", &"a".repeat(1025)] {
            assert!(regex(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn x_05_selectors() {
        let mut out = Findings::default();
        let labels =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        selector_labels(&mut out, "labels", &labels(&[]));
        assert!(!out.has_errors() && out.iter().count() == 1);
        selector_labels(&mut out, "labels", &labels(&[("app", "a*")]));
        assert_eq!(out.iter().filter(|f| f.path == "labels.app").count(), 1);
    }
}
