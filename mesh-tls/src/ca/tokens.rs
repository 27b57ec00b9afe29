//! Bootstrap tokens: how a workload that has no certificate yet proves who it is.
//!
//! A token is a secret of 256 bits that belongs to one service account until a moment. What is kept of it is its SHA-256,
//! so that a list of tokens lets nobody in; a line of the list is
//!
//! ```text
//! SHA256-IN-HEX NAMESPACE SERVICE-ACCOUNT 2026-12-31T00:00:00Z
//! ```
//!
//! and `#` begins a comment. A token may be used until its end, as a workload that restarts has forgotten its certificate;
//! who takes its line away ends it at once. Tokens are compared in constant time with every line, and are never printed.

use std::fmt;
use std::time::{Duration, SystemTime};

use mesh_core::identity::{InvalidSpiffeId, SpiffeId, TrustDomain};
use rustls::crypto::CryptoProvider;
use subtle::ConstantTimeEq as _;

use super::last;
use crate::certificate::sha256;

/// What every token begins with, so that one that leaked is found by whoever looks for secrets.
const PREFIX: &str = "mesh-bootstrap-";

/// How long a line is kept after its end: a clock that is wrong for a moment takes no token away that is good.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// A secret. Printed only by [`expose`](Self::expose), and compared only by its hash, in constant time.
#[derive(Clone)]
pub struct BootstrapToken(String);

/// A list of tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootstrapTokens(Vec<Entry>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    hash: [u8; 32],
    namespace: String,
    service_account: String,
    until: SystemTime,
}

/// A list of tokens cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct InvalidTokens {
    /// Which line, from 1.
    pub line: usize,
    /// What is wrong with it; nothing of it is quoted.
    pub reason: &'static str,
}

/// A token proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenRefusal {
    /// It is not in the list.
    #[error("the bootstrap token is not known")]
    Unknown,
    /// Its time is over.
    #[error("the bootstrap token has expired")]
    Expired,
    /// What it stands for is no identity of this trust domain.
    #[error("the bootstrap token stands for no identity: {0}")]
    NoIdentity(InvalidSpiffeId),
}

impl BootstrapToken {
    /// A new token; `None` when the provider has no randomness.
    #[must_use]
    pub fn new(provider: &CryptoProvider) -> Option<Self> {
        let mut bytes = [0; 32];
        provider.secure_random.fill(&mut bytes).ok()?;
        Some(Self(format!("{PREFIX}{}", hex(&bytes))))
    }

    /// The secret itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Its line for a list; `None` when namespace or service account can be no part of an identity, the end is after the
    /// year 9999, or from a provider without SHA-256. With its end.
    #[must_use]
    pub fn line(
        &self,
        namespace: &str,
        service_account: &str,
        until: SystemTime,
        provider: &CryptoProvider,
    ) -> Option<String> {
        if until > last() {
            return None;
        }
        let any: TrustDomain = "any".parse().ok()?;
        SpiffeId::workload(&any, namespace, service_account).ok()?;
        let hash = hex(&sha256(self.0.as_bytes(), provider)?);
        Some(format!("{hash} {namespace} {service_account} {}\n", humantime::format_rfc3339_seconds(until)))
    }
}

impl fmt::Debug for BootstrapToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BootstrapToken").finish_non_exhaustive()
    }
}

impl BootstrapTokens {
    /// Reads a list.
    ///
    /// # Errors
    /// The first line that is not one of a token: half a list is not taken.
    pub fn parse(text: &str) -> Result<Self, InvalidTokens> {
        let mut entries = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line_number = at + 1;
            let line = line.split('#').next().unwrap_or_default();
            if line.trim().is_empty() {
                continue;
            }
            entries.push(entry(line).map_err(|reason| InvalidTokens { line: line_number, reason })?);
        }
        Ok(Self(entries))
    }

    /// A list without the lines of tokens that have been over for a day. Everything else of it stays as it is, what cannot
    /// be read too.
    #[must_use]
    pub fn without_expired(text: &str, now: SystemTime) -> String {
        let is_over = |line: &str| {
            let line = line.split('#').next().unwrap_or_default();
            let until = entry(line).ok().map(|entry| entry.until);
            until.and_then(|until| until.checked_add(KEPT)).is_some_and(|kept| kept <= now)
        };
        text.split_inclusive('\n').filter(|line| !is_over(line)).collect()
    }

    /// Whose a token is.
    ///
    /// # Errors
    /// When it is nobody's, or its time is over.
    pub fn find(
        &self,
        token: &str,
        trust_domain: &TrustDomain,
        now: SystemTime,
        provider: &CryptoProvider,
    ) -> Result<SpiffeId, TokenRefusal> {
        let hash = sha256(token.as_bytes(), provider).ok_or(TokenRefusal::Unknown)?;
        let mut found = None;
        for entry in &self.0 {
            // No early end: how long this takes tells nothing.
            if bool::from(entry.hash.ct_eq(&hash)) {
                found = Some(entry);
            }
        }
        let entry = found.ok_or(TokenRefusal::Unknown)?;
        if now >= entry.until {
            return Err(TokenRefusal::Expired);
        }
        SpiffeId::workload(trust_domain, &entry.namespace, &entry.service_account)
            .map_err(TokenRefusal::NoIdentity)
    }

    /// How many there are, those that are over among them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn entry(line: &str) -> Result<Entry, &'static str> {
    let mut words = line.split_whitespace();
    let mut word = || words.next().ok_or("expected SHA256 NAMESPACE SERVICE-ACCOUNT END");
    let (hash, namespace, service_account, until) = (word()?, word()?, word()?, word()?);
    if words.next().is_some() {
        return Err("there is something after the end");
    }
    Ok(Entry {
        hash: unhex(hash).ok_or("the first word is no SHA-256 in hex")?,
        namespace: namespace.to_owned(),
        service_account: service_account.to_owned(),
        until: humantime::parse_rfc3339(until).map_err(|_| "the end is no time like 2026-12-31T00:00:00Z")?,
    })
}

fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut out, byte| {
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let text = text.as_bytes();
    if text.len() != 64 {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn provider() -> CryptoProvider {
        rustls::crypto::aws_lc_rs::default_provider()
    }

    #[test]
    fn a_token_is_of_one_service_account_until_its_end() {
        let (provider, now) = (provider(), SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000));
        let until = now + Duration::from_secs(3600);
        let (one, two) = (BootstrapToken::new(&provider).unwrap(), BootstrapToken::new(&provider).unwrap());
        assert_ne!(one.expose(), two.expose());
        let list = format!(
            "# who may ask\n{}\n{} # the other one\n",
            one.line("default", "reviews", until, &provider).unwrap(),
            two.line("shop", "cart", until, &provider).unwrap().trim_end(),
        );
        assert!(!list.contains(one.expose()) && !format!("{one:?}").contains(one.expose()));
        let tokens = BootstrapTokens::parse(&list).unwrap();
        assert_eq!(tokens.len(), 2);
        let domain = "cluster.local".parse().unwrap();
        let find = |token: &str, now| tokens.find(token, &domain, now, &provider).map(|id| id.to_string());
        assert_eq!(find(one.expose(), now).unwrap(), "spiffe://cluster.local/ns/default/sa/reviews");
        assert_eq!(find(two.expose(), now).unwrap(), "spiffe://cluster.local/ns/shop/sa/cart");
        assert_eq!(find(one.expose(), until), Err(TokenRefusal::Expired));
        let last = one.expose().len() - 1;
        for strange in ["", "x", &one.expose()[..last], &format!("{}0", one.expose())] {
            assert_eq!(find(strange, now), Err(TokenRefusal::Unknown));
        }
        // Nor does the line of a list let anybody in.
        assert_eq!(
            find(list.lines().nth(1).unwrap().split(' ').next().unwrap(), now),
            Err(TokenRefusal::Unknown)
        );
    }

    #[test]
    fn bug_lists_of_tokens_grew_until_they_were_cut() {
        let (provider, now) = (provider(), SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000));
        let line = |until| BootstrapToken::new(&provider).unwrap().line("a", "b", until, &provider).unwrap();
        let (over, lately, good) = (line(now - KEPT), line(now - KEPT / 2), line(now + KEPT));
        let kept = format!("# tokens\nnonsense\n{lately}\n{good}");
        let list = format!("# tokens\n{over}nonsense\n{lately}\n{good}");
        assert_eq!(BootstrapTokens::without_expired(&list, now), kept);
        // A token that never ends has no line that could be read again.
        assert_eq!(BootstrapToken::new(&provider).unwrap().line("a", "b", last() + KEPT, &provider), None);
    }

    #[test]
    fn a_list_that_cannot_be_read_is_said_by_its_line_and_quotes_nothing() {
        let hash = "ab".repeat(32);
        let until = "2026-12-31T00:00:00Z";
        for (line, reason) in [
            (format!("{hash} a b"), "expected SHA256"),
            (format!("{hash} a b {until} c"), "after the end"),
            (format!("{}g a b {until}", &hash[1..]), "no SHA-256"),
            (format!("{hash}00 a b {until}"), "no SHA-256"),
            (format!("{hash} a b tomorrow"), "no time"),
        ] {
            let error = BootstrapTokens::parse(&format!("\n{line}\n")).unwrap_err();
            assert_eq!(error.line, 2);
            assert!(error.to_string().contains(reason) && !error.to_string().contains("ab"), "{error}");
        }
        assert!(BootstrapTokens::parse("").unwrap().is_empty());
        let token = BootstrapToken::new(&provider()).unwrap();
        for part in ["", "a b", "a/b", ".."] {
            assert!(token.line(part, "b", SystemTime::now(), &provider()).is_none(), "{part:?}");
        }
    }
}
