//! Routing of connections that are not HTTP: by where they were going, and by the server name of their TLS.
//!
//! A [`TcpRouteTable`] is to connections what a [`RouteTable`](crate::RouteTable) is to requests: compiled once, never
//! changed, asked by a pure function. It looks first at the port, then at the destination's address, where the most
//! specific block counts, then at the server name, where the exact name comes before the longest wildcard, as Envoy's
//! filter chains do; the order of rules decides only between rules that take the same connections.
//!
//! It also knows what to [`Expect`] at a destination, HTTP included, so that a connection is sniffed only where the
//! protocol is not declared (PT-04).

mod dispatch;
mod relay;

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use mesh_core::matcher::HostMap;
use mesh_core::server::Expect;
use mesh_core::{ClusterName, ConnInfo};

pub use self::dispatch::{TcpDispatch, TcpReport};

use crate::cluster::Cluster;
use crate::table::KeyedBy;
use crate::weighted::Weighted;

/// The port of TLS where none is known.
const HTTPS: u16 = 443;

/// The port of plain HTTP, where HTTP may be spoken to hosts that nobody knows.
const HTTP: u16 = 80;

/// Every L4 route of one direction.
#[derive(Clone, Debug)]
pub struct TcpRouteTable {
    ports: HashMap<u16, Port, foldhash::fast::RandomState>,
    ended: HashMap<u16, Ended, foldhash::fast::RandomState>,
    keyed_by: KeyedBy,
    unknown: Option<Arc<TcpRoute>>,
    patience: Option<Duration>,
    clusters: Box<[Arc<Cluster>]>,
}

/// One match with its destinations.
#[derive(Clone, Debug)]
pub struct TcpRoute {
    name: Arc<str>,
    matcher: TcpMatch,
    destinations: Weighted<TcpDestination>,
}

/// What a connection must be like. Nothing at all matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TcpMatch {
    /// Server names, of which the client must ask for one: exact, `*.suffix` or `*`. Empty: any or none, TLS or not.
    pub sni_hosts: Vec<String>,
    /// Blocks of addresses, one of which the destination must be in. Empty: anywhere.
    pub destinations: Vec<IpNet>,
}

/// Where connections are sent.
#[derive(Clone, Debug)]
pub struct TcpDestination {
    /// The cluster; `None` is a destination that is not known: the connection is reset, `NC`.
    pub cluster: Option<Arc<Cluster>>,
    /// Its name, known or not.
    pub name: ClusterName,
    /// Whether a connection goes on to the address that it was going to, by the cluster's settings: an instance of a
    /// headless service that the client chose by itself.
    pub keeps_address: bool,
}

/// A connection that another route of the same port takes already.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("connections to {}{} are taken by the route {taken_by:?}", Block(*.destination), Name(.sni.as_deref()))]
pub struct TcpConflict {
    /// The block of destinations; `None` is anywhere.
    pub destination: Option<IpNet>,
    /// The server name; `None` is any.
    pub sni: Option<String>,
    /// The route that has it.
    pub taken_by: Arc<str>,
}

/// What is spoken at a port of a destination, where it may be HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpPort {
    /// HTTP, as declared.
    Declared,
    /// Perhaps HTTP.
    Sniffed,
}

#[derive(Clone, Debug, Default)]
struct Port {
    addresses: HashMap<IpAddr, Chains, foldhash::fast::RandomState>,
    /// The longest prefix first.
    blocks: Vec<(IpNet, Chains)>,
    any: Chains,
}

/// The servers of one port that answers TLS. What is behind one of them is had by its own handshake alone: neither by that
/// of another server, nor by TLS that is passed on.
#[derive(Clone, Debug, Default)]
struct Ended {
    names: HostMap<usize>,
    servers: Vec<Port>,
}

/// What is known of one block of destinations at one port.
#[derive(Clone, Debug, Default)]
struct Chains {
    http: Option<HttpPort>,
    names: HostMap<Arc<TcpRoute>>,
    rest: Option<Arc<TcpRoute>>,
}

impl TcpRouteTable {
    /// A table without routes: every connection is reset, `NR`.
    #[must_use]
    pub fn empty(keyed_by: KeyedBy) -> Self {
        Self {
            ports: HashMap::default(),
            ended: HashMap::default(),
            keyed_by,
            unknown: None,
            patience: None,
            clusters: Box::new([]),
        }
    }

    /// Adds a route at a port. What it takes that another route has already stays the other's, and is returned.
    pub fn insert(&mut self, port: u16, route: &Arc<TcpRoute>) -> Vec<TcpConflict> {
        self.ports.entry(port).or_default().insert(route)
    }

    /// Adds a server of a port that answers TLS, whether or not it ends it, with the names by which clients reach it; which
    /// of the port it is. A name that an older one has stays with that one, as in
    /// [`Servers`](mesh_core::Servers).
    pub fn insert_server(&mut self, port: u16, names: impl IntoIterator<Item = String>) -> usize {
        let ended = self.ended.entry(port).or_default();
        let at = ended.servers.len();
        ended.servers.push(Port::default());
        for name in names {
            // The listener says which names are taken.
            let _ = ended.names.insert(&name, at);
        }
        at
    }

    /// Adds a route for the bytes within TLS that a server of a port ended. What it takes that another route of the server
    /// has already stays the other's, and is returned.
    pub fn insert_within(&mut self, port: u16, server: usize, route: &Arc<TcpRoute>) -> Vec<TcpConflict> {
        let server = self.ended.get_mut(&port).and_then(|ended| ended.servers.get_mut(server));
        server.map_or_else(Vec::new, |server| server.insert(route))
    }

    /// The route that takes the bytes of a connection whose TLS was ended under this server name.
    #[must_use]
    pub fn select_within(&self, conn: &ConnInfo, sni: Option<&str>) -> Option<&Arc<TcpRoute>> {
        let (port, address) = self.place(conn);
        let ended = self.ended.get(&port)?;
        // As the handshake does: without a name it is the server that answers to any.
        let server = ended.servers.get(*ended.names.get(sni.unwrap_or_default())?)?;
        server.candidates(address).find_map(|chains| chains.rest.as_ref())
    }

    /// Says that HTTP is, or may be, spoken at a port of these destinations; `None` is anywhere.
    pub fn insert_http(&mut self, port: u16, destination: Option<IpNet>, http: HttpPort) {
        let known = &mut self.ports.entry(port).or_default().chains(destination).http;
        // Where one of several is not declared, it has to be found out.
        *known = match (*known, http) {
            (Some(HttpPort::Sniffed), _) | (_, HttpPort::Sniffed) => Some(HttpPort::Sniffed),
            _ => Some(HttpPort::Declared),
        };
    }

    /// What happens to redirected connections to destinations that nobody knows; without it they are reset, `NR`.
    pub fn set_unknown(&mut self, route: Arc<TcpRoute>) {
        self.unknown = Some(route);
    }

    /// How long a client that has not spoken is waited for where it is sniffed (Istio's `protocolDetectionTimeout`).
    /// Default `None`: without end.
    pub fn set_patience(&mut self, patience: Option<Duration>) {
        self.patience = patience;
    }

    /// The clusters that the routes name, for the runtime registry and for dumps.
    pub fn set_clusters(&mut self, clusters: impl IntoIterator<Item = Arc<Cluster>>) {
        self.clusters = clusters.into_iter().collect();
    }

    /// The clusters that the routes name.
    #[must_use]
    pub fn clusters(&self) -> &[Arc<Cluster>] {
        &self.clusters
    }

    /// The route that takes a connection.
    #[must_use]
    pub fn select(&self, conn: &ConnInfo, sni: Option<&str>) -> Option<&Arc<TcpRoute>> {
        let (port, address) = self.place(conn);
        let known = self.ports.get(&port).and_then(|port| {
            port.candidates(address)
                .find_map(|chains| sni.and_then(|sni| chains.names.get(sni)).or(chains.rest.as_ref()))
        });
        known.or_else(|| self.unknown.as_ref().filter(|_| conn.original_dst.is_some()))
    }

    /// What to expect of a connection before anything of it is read.
    ///
    /// A destination at a port of which nothing is known gets its bytes as they come, so that a client that waits for
    /// its server is not waited for; but at port 80 HTTP is looked for.
    #[must_use]
    pub fn expect(&self, conn: &ConnInfo) -> Expect {
        let (port, address) = self.place(conn);
        let patience = self.patience;
        let redirected = conn.original_dst.is_some();
        let known =
            self.ports.get(&port).and_then(|port| port.candidates(address).find(|chains| !chains.is_empty()));
        if self.keyed_by == KeyedBy::Destination && !redirected {
            return if known.is_some_and(|chains| !chains.names.is_empty()) {
                Expect::HttpOrTls
            } else {
                Expect::Http
            };
        }
        let Some(chains) = known else {
            return match self.keyed_by {
                KeyedBy::Destination if port == HTTP => Expect::Sniff { patience },
                KeyedBy::Destination => Expect::Tcp,
                KeyedBy::Listener => Expect::Http,
            };
        };
        match (chains.http, chains.names.is_empty(), &chains.rest) {
            (Some(HttpPort::Declared), true, None) => Expect::Http,
            (Some(_), ..) => Expect::Sniff { patience },
            (None, true, _) => Expect::Tcp,
            (None, false, _) => Expect::Tls { patience },
        }
    }

    /// What happens to redirected connections to destinations that nobody knows.
    #[must_use]
    pub fn unknown(&self) -> Option<&Arc<TcpRoute>> {
        self.unknown.as_ref()
    }

    /// Every route with what it takes, by port; for dumps. A route at several ports is there several times.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &Arc<TcpRoute>)> {
        let within = self
            .ended
            .iter()
            .flat_map(|(number, ended)| ended.servers.iter().map(move |port| (number, port)));
        let mut ports: Vec<_> = self.ports.iter().chain(within).collect();
        ports.sort_by_key(|(number, _)| **number);
        ports.into_iter().flat_map(|(number, port)| {
            let mut routes: Vec<&Arc<TcpRoute>> = port
                .addresses
                .values()
                .chain(port.blocks.iter().map(|(_, chains)| chains))
                .chain([&port.any])
                .flat_map(|chains| chains.names.iter().map(|(_, route)| route).chain(&chains.rest))
                .collect();
            routes.sort_by(|a, b| a.name.cmp(&b.name).then_with(|| Arc::as_ptr(a).cmp(&Arc::as_ptr(b))));
            routes.dedup_by(|a, b| Arc::ptr_eq(a, b));
            routes.into_iter().map(|route| (*number, route))
        })
    }

    /// Port and address that a connection is looked up by. TLS without a destination is looked up where HTTPS is.
    fn place(&self, conn: &ConnInfo) -> (u16, Option<IpAddr>) {
        match (self.keyed_by, conn.original_dst) {
            (_, Some(original)) if self.keyed_by == KeyedBy::Destination => {
                (original.port(), Some(original.ip().to_canonical()))
            }
            (KeyedBy::Destination, _) => (HTTPS, None),
            (KeyedBy::Listener, original) => {
                (conn.port, Some(original.unwrap_or(conn.local).ip().to_canonical()))
            }
        }
    }
}

impl Port {
    fn insert(&mut self, route: &Arc<TcpRoute>) -> Vec<TcpConflict> {
        let blocks: Vec<_> = match route.matcher.destinations.as_slice() {
            [] => vec![None],
            blocks => blocks.iter().copied().map(Some).collect(),
        };
        let mut conflicts = Vec::new();
        for block in blocks {
            let chains = self.chains(block);
            if route.matcher.sni_hosts.is_empty() {
                match &chains.rest {
                    Some(taken) => conflicts.push(TcpConflict {
                        destination: block,
                        sni: None,
                        taken_by: Arc::clone(&taken.name),
                    }),
                    None => chains.rest = Some(Arc::clone(route)),
                }
            }
            for name in &route.matcher.sni_hosts {
                if chains.names.insert(name, Arc::clone(route)).is_err() {
                    let taken = chains.names.get_pattern(&name.to_ascii_lowercase());
                    conflicts.push(TcpConflict {
                        destination: block,
                        sni: Some(name.clone()),
                        taken_by: taken.map_or_else(|| Arc::from(""), |taken| Arc::clone(&taken.name)),
                    });
                }
            }
        }
        conflicts
    }

    fn chains(&mut self, block: Option<IpNet>) -> &mut Chains {
        let Some(block) = block else { return &mut self.any };
        if block.prefix_len() == block.max_prefix_len() {
            return self.addresses.entry(block.addr().to_canonical()).or_default();
        }
        let block = block.trunc();
        let at = match self.blocks.iter().position(|(known, _)| *known == block) {
            Some(at) => at,
            None => {
                let at = self.blocks.partition_point(|(known, _)| known.prefix_len() >= block.prefix_len());
                self.blocks.insert(at, (block, Chains::default()));
                at
            }
        };
        &mut self.blocks[at].1
    }

    /// What is known of a destination, the most specific first.
    fn candidates(&self, address: Option<IpAddr>) -> impl Iterator<Item = &Chains> {
        let exact = address.and_then(|address| self.addresses.get(&address));
        let blocks = self
            .blocks
            .iter()
            .filter(move |(block, _)| address.is_some_and(|address| block.contains(&address)))
            .map(|(_, chains)| chains);
        exact.into_iter().chain(blocks).chain([&self.any])
    }
}

impl Chains {
    fn is_empty(&self) -> bool {
        self.http.is_none() && self.names.is_empty() && self.rest.is_none()
    }
}

impl TcpRoute {
    /// A route by the name that logs show.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>, matcher: TcpMatch, destinations: Weighted<TcpDestination>) -> Self {
        Self { name: name.into(), matcher, destinations }
    }

    /// Everything to one cluster.
    #[must_use]
    pub fn forward(name: impl Into<Arc<str>>, matcher: TcpMatch, cluster: Arc<Cluster>) -> Self {
        Self::new(name, matcher, Weighted::single(TcpDestination::new(cluster)))
    }

    /// The name that logs show.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a connection must be like.
    #[must_use]
    pub fn matcher(&self) -> &TcpMatch {
        &self.matcher
    }

    /// Where a connection is sent.
    #[must_use]
    pub fn destinations(&self) -> &Weighted<TcpDestination> {
        &self.destinations
    }
}

impl TcpDestination {
    /// To a cluster.
    #[must_use]
    pub fn new(cluster: Arc<Cluster>) -> Self {
        Self { name: cluster.name().clone(), cluster: Some(cluster), keeps_address: false }
    }

    /// A destination whose cluster is not known.
    #[must_use]
    pub fn unknown(name: ClusterName) -> Self {
        Self { cluster: None, name, keeps_address: false }
    }
}

/// As configuration says it.
impl fmt::Display for TcpMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.sni_hosts.as_slice(), self.destinations.as_slice()) {
            ([], []) => f.write_str("any connection"),
            (names, []) => write!(f, "sniHosts {}", names.join(", ")),
            (names, blocks) => {
                f.write_str("destinationSubnets ")?;
                for (at, block) in blocks.iter().enumerate() {
                    write!(f, "{}{block}", if at == 0 { "" } else { ", " })?;
                }
                if names.is_empty() { Ok(()) } else { write!(f, ", sniHosts {}", names.join(", ")) }
            }
        }
    }
}

struct Block(Option<IpNet>);

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(block) => write!(f, "{block}"),
            None => f.write_str("any address"),
        }
    }
}

struct Name<'a>(Option<&'a str>);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(name) => write!(f, " with the server name {name:?}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use mesh_core::Direction;
    use proptest::prelude::*;

    use super::*;

    fn route(name: &str, sni: &[&str], blocks: &[&str]) -> Arc<TcpRoute> {
        let matcher = TcpMatch {
            sni_hosts: sni.iter().map(|name| (*name).to_owned()).collect(),
            destinations: blocks.iter().map(|block| block.parse().unwrap()).collect(),
        };
        let destination = TcpDestination::unknown(ClusterName::custom(name));
        Arc::new(TcpRoute::new(name, matcher, Weighted::single(destination)))
    }

    fn to(address: &str) -> ConnInfo {
        let original = Some(address.parse::<SocketAddr>().unwrap());
        ConnInfo { original_dst: original, ..ConnInfo::unknown(Direction::Outbound) }
    }

    fn taken<'t>(table: &'t TcpRouteTable, address: &str, sni: Option<&str>) -> Option<&'t str> {
        table.select(&to(address), sni).map(|route| route.name())
    }

    #[test]
    fn the_most_specific_block_then_the_most_specific_name() {
        let mut table = TcpRouteTable::empty(KeyedBy::Destination);
        for route in [
            route("any", &[], &[]),
            route("block", &[], &["10.0.0.0/8"]),
            route("narrow", &[], &["10.1.0.0/16"]),
            route("address", &[], &["10.1.2.3/32"]),
            route("suffix", &["*.com"], &[]),
            route("long", &["*.example.com"], &[]),
            route("exact", &["a.example.com", "b.example.com"], &[]),
            route("named-in-block", &["a.example.com"], &["10.0.0.0/8"]),
        ] {
            assert_eq!(table.insert(443, &route), []);
        }
        for (address, sni, expected) in [
            ("192.0.2.1:443", None, "any"),
            ("192.0.2.1:443", Some("foo.example.org"), "any"),
            ("192.0.2.1:443", Some("foo.com"), "suffix"),
            ("192.0.2.1:443", Some("foo.bar.com"), "suffix"),
            ("192.0.2.1:443", Some("c.example.com"), "long"),
            ("192.0.2.1:443", Some("b.example.com"), "exact"),
            ("10.9.9.9:443", None, "block"),
            ("10.9.9.9:443", Some("a.example.com"), "named-in-block"),
            ("10.9.9.9:443", Some("b.example.com"), "block"),
            ("10.1.9.9:443", None, "narrow"),
            ("10.1.2.3:443", Some("a.example.com"), "address"),
            ("[::ffff:10.1.2.3]:443", None, "address"),
        ] {
            assert_eq!(taken(&table, address, sni), Some(expected), "{address} {sni:?}");
        }
        assert_eq!(taken(&table, "10.1.2.3:444", None), None);
    }

    #[test]
    fn the_first_route_keeps_what_it_takes() {
        let mut table = TcpRouteTable::empty(KeyedBy::Destination);
        assert_eq!(table.insert(443, &route("one", &["a.com", "b.com"], &["10.0.0.1/32"])), []);
        let conflicts = table.insert(443, &route("two", &["B.com", "c.com"], &["10.0.0.1/32"]));
        assert_eq!(
            conflicts.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["connections to 10.0.0.1/32 with the server name \"B.com\" are taken by the route \"one\""]
        );
        assert_eq!(taken(&table, "10.0.0.1:443", Some("b.com")), Some("one"));
        assert_eq!(taken(&table, "10.0.0.1:443", Some("c.com")), Some("two"));
        assert_eq!(table.insert(1, &route("one", &[], &[])), []);
        assert_eq!(table.insert(1, &route("two", &[], &[])).len(), 1);
        let shown: Vec<_> = table.iter().map(|(port, route)| (port, route.name())).collect();
        assert_eq!(shown, [(1, "one"), (443, "one"), (443, "two")]);
    }

    #[test]
    fn pt_04_what_to_expect() {
        let patience = Some(Duration::from_secs(5));
        let mut table = TcpRouteTable::empty(KeyedBy::Destination);
        table.set_patience(patience);
        table.insert_http(80, None, HttpPort::Declared);
        table.insert_http(81, None, HttpPort::Sniffed);
        table.insert(81, &route("also-bytes", &[], &[]));
        table.insert(82, &route("bytes", &[], &[]));
        table.insert(443, &route("names", &["a.com"], &[]));
        // At a virtual address of its own the same port speaks something else.
        table.insert(80, &route("bytes", &[], &["10.0.0.1/32"]));
        for (address, expected) in [
            ("192.0.2.1:80", Expect::Http),
            ("10.0.0.1:80", Expect::Tcp),
            ("192.0.2.1:81", Expect::Sniff { patience }),
            ("192.0.2.1:82", Expect::Tcp),
            ("192.0.2.1:443", Expect::Tls { patience }),
            ("192.0.2.1:25", Expect::Tcp),
        ] {
            assert_eq!(table.expect(&to(address)), expected, "{address}");
        }
        let unredirected = ConnInfo { port: 82, ..ConnInfo::unknown(Direction::Outbound) };
        assert_eq!(table.expect(&unredirected), Expect::HttpOrTls);
        assert_eq!(table.select(&unredirected, Some("a.com")).map(|route| route.name()), Some("names"));
        let empty = TcpRouteTable::empty(KeyedBy::Destination);
        assert_eq!(empty.expect(&unredirected), Expect::Http);
        assert_eq!(empty.expect(&to("192.0.2.1:80")), Expect::Sniff { patience: None });
        let mut listener = TcpRouteTable::empty(KeyedBy::Listener);
        assert_eq!(listener.expect(&unredirected), Expect::Http);
        listener.insert(82, &route("bytes", &[], &[]));
        assert_eq!(listener.expect(&unredirected), Expect::Tcp);
    }

    proptest! {
        /// The index answers as a scan does that ranks every route by its specificity.
        #[test]
        fn equals_a_scan(
            rules in proptest::collection::vec(
                (proptest::option::of(0_u8..3), proptest::option::of("(\\*\\.)?[ab](\\.[ab]){0,2}")), 1..10),
            address in 0_u8..4,
            sni in proptest::option::of("[ab](\\.[ab]){0,3}"),
        ) {
            let blocks = ["10.0.0.0/8", "10.0.0.0/16", "10.0.0.1/32"];
            let mut table = TcpRouteTable::empty(KeyedBy::Destination);
            let mut kept: Vec<(Option<IpNet>, Option<String>, String)> = Vec::new();
            for (at, (block, name)) in rules.into_iter().enumerate() {
                let block = block.map(|block| blocks[usize::from(block)]);
                let (name, own): (Option<&str>, String) = (name.as_deref(), at.to_string());
                let names: Vec<&str> = name.into_iter().collect();
                let within: Vec<&str> = block.into_iter().collect();
                let block: Option<IpNet> = block.map(|block| block.parse().unwrap());
                if table.insert(1, &route(&own, &names, &within)).is_empty() {
                    kept.push((block, name.map(str::to_owned), own));
                }
            }
            let address: IpAddr = ["10.0.0.1", "10.0.0.2", "10.9.9.9", "192.0.2.1"][usize::from(address)].parse().unwrap();
            let fits = |pattern: &Option<String>| match (pattern, &sni) {
                (None, _) => true,
                (Some(_), None) => false,
                (Some(pattern), Some(sni)) => match pattern.strip_prefix('*') {
                    Some(suffix) => sni.len() > suffix.len() && sni.ends_with(suffix),
                    None => pattern == sni,
                },
            };
            let rank = |pattern: &Option<String>| match pattern {
                None => (0, 0),
                Some(pattern) if pattern.starts_with('*') => (1, pattern.len()),
                Some(_) => (2, 0),
            };
            let scan = kept
                .iter()
                .filter(|(block, name, _)| block.is_none_or(|block| block.contains(&address)) && fits(name))
                .max_by_key(|(block, name, _)| (block.map(|block| block.prefix_len() + 1), rank(name)))
                .map(|(.., own)| own.as_str());
            prop_assert_eq!(taken(&table, &SocketAddr::new(address, 1).to_string(), sni.as_deref()), scan);
        }
    }
}
