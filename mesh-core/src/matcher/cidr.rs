//! Sets of address blocks.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

/// A set of CIDR blocks and single addresses. An IPv4 address in IPv6 form is taken as IPv4.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CidrSet(Box<[IpNet]>);

/// Text that is neither an address nor a CIDR block.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither an IP address nor a CIDR block")]
pub struct InvalidCidr(String);

impl CidrSet {
    /// The set of these blocks.
    #[must_use]
    pub fn new(blocks: impl IntoIterator<Item = IpNet>) -> Self {
        Self(blocks.into_iter().collect())
    }

    /// Parses addresses and blocks; a block may have bits below its mask.
    ///
    /// # Errors
    /// The first text that is neither.
    pub fn parse<'a>(blocks: impl IntoIterator<Item = &'a str>) -> Result<Self, InvalidCidr> {
        blocks.into_iter().map(parse).collect::<Result<_, _>>().map(Self)
    }

    /// Whether the set contains `address`.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|block| block.contains(&address))
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn parse(text: &str) -> Result<IpNet, InvalidCidr> {
    IpNet::from_str(text)
        .or_else(|_| IpAddr::from_str(text).map(IpNet::from))
        .map_err(|_| InvalidCidr(text.to_owned()))
}

impl fmt::Display for CidrSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.iter().map(|block| format_args!("{block}").to_string())).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_blocks() {
        let set = CidrSet::parse(["10.1.0.0/16", "::1", "192.168.1.7"]).unwrap();
        for (address, inside) in [
            ("10.1.2.3", true),
            ("10.2.0.0", false),
            ("::1", true),
            ("::ffff:10.1.9.9", true),
            ("192.168.1.8", false),
        ] {
            assert_eq!(set.contains(address.parse().unwrap()), inside, "{address}");
        }
        assert!(CidrSet::parse(["10.0.0.0/33"]).is_err());
    }
}
