//! The route table: from an authority to a virtual host, from a request to the first route that takes it.
//!
//! A table is made once per configuration and never changes. Hosts are found by hashing, so that the cost does not
//! grow with their number. Within a virtual host the first route in order wins; an index leaves out the routes whose
//! path cannot match, so that a thousand routes cost little more than the few that could.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use mesh_core::matcher::{DuplicateHost, HostMap};
use mesh_core::{ConnInfo, Direction};

use crate::canary::Split;
use crate::cluster::Cluster;
use crate::index::Index;
use crate::redirect::split_port;
use crate::request_view::RequestView;
use crate::route::{ActionKind, Route};

/// Every virtual host of one direction.
#[derive(Clone, Debug)]
pub struct RouteTable {
    ports: HashMap<u16, HostMap<Arc<VirtualHost>>, foldhash::fast::RandomState>,
    any_port: HostMap<Arc<VirtualHost>>,
    keyed_by: KeyedBy,
    unknown: Option<Arc<Route>>,
    clusters: Box<[Arc<Cluster>]>,
}

/// Which port picks the virtual hosts of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyedBy {
    /// The port of the listener: gateways, and servers that embed the table.
    #[default]
    Listener,
    /// The port before a redirect, else the port in the authority: a sidecar's outbound side. An authority without a
    /// port is looked up among the hosts that answer at any port.
    Destination,
}

/// The hosts that share a list of routes.
#[derive(Clone, Debug)]
pub struct VirtualHost {
    name: Arc<str>,
    routes: Box<[Arc<Route>]>,
    index: Index,
}

/// Where a request was looked for.
#[derive(Clone, Copy, Debug)]
pub struct Lookup<'a> {
    /// The port that picked the virtual hosts; `None` for those that answer at any port.
    pub port: Option<u16>,
    /// The virtual host of the authority.
    pub virtual_host: Option<&'a Arc<VirtualHost>>,
}

impl RouteTable {
    /// A table without hosts: every request is answered 404 `NR`.
    #[must_use]
    pub fn empty(keyed_by: KeyedBy) -> Self {
        Self {
            ports: HashMap::default(),
            any_port: HostMap::new(),
            keyed_by,
            unknown: None,
            clusters: Box::new([]),
        }
    }

    /// Adds a virtual host under a pattern: at `port`, or at any port for `None`.
    ///
    /// # Errors
    /// [`DuplicateHost`] when the pattern is there at that port; the table keeps the first.
    pub fn insert(
        &mut self,
        port: Option<u16>,
        pattern: &str,
        virtual_host: Arc<VirtualHost>,
    ) -> Result<(), DuplicateHost> {
        match port {
            Some(port) => self.ports.entry(port).or_default().insert(pattern, virtual_host),
            None => self.any_port.insert(pattern, virtual_host),
        }
    }

    /// What happens to requests for a host that no virtual host answers to; without it they are 404 `NR`.
    pub fn set_unknown(&mut self, route: Arc<Route>) {
        self.unknown = Some(route);
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

    /// What every rule with a canary has, as often as the rule is in the table.
    pub(crate) fn canaries(&self) -> impl Iterator<Item = &Split> {
        let hosts = self.ports.values().chain([&self.any_port]).flat_map(HostMap::iter);
        let routes = hosts.flat_map(|(_, host)| host.routes()).chain(&self.unknown);
        routes.filter_map(|route| match &route.action().kind {
            ActionKind::Forward(forward) => forward.canary.as_deref(),
            _ => None,
        })
    }

    /// The route that takes a request.
    #[must_use]
    pub fn select(&self, request: &RequestView<'_>, conn: &ConnInfo) -> Option<&Arc<Route>> {
        match self.lookup(request, conn).virtual_host {
            Some(virtual_host) => virtual_host.select(request),
            None => self.unknown.as_ref(),
        }
    }

    /// The virtual host that answers to a request's authority.
    #[must_use]
    pub fn lookup(&self, request: &RequestView<'_>, conn: &ConnInfo) -> Lookup<'_> {
        let port = match self.keyed_by {
            KeyedBy::Listener => Some(conn.port),
            KeyedBy::Destination => match conn.original_dst {
                Some(original) => Some(original.port()),
                None => split_port(request.authority).1.and_then(|port| port.parse().ok()),
            },
        };
        let at_port =
            port.and_then(|port| self.ports.get(&port)).and_then(|hosts| hosts.get(request.authority));
        if at_port.is_some() {
            return Lookup { port, virtual_host: at_port };
        }
        // A destination with a port that no service has is unknown there, whatever answers without one.
        if self.keyed_by == KeyedBy::Destination && port.is_some() {
            return Lookup { port, virtual_host: None };
        }
        Lookup { port: None, virtual_host: self.any_port.get(request.authority) }
    }

    /// The route for hosts that no virtual host answers to.
    #[must_use]
    pub fn unknown(&self) -> Option<&Arc<Route>> {
        self.unknown.as_ref()
    }

    /// How many patterns there are, over all ports.
    #[must_use]
    pub fn hosts(&self) -> usize {
        self.ports.values().map(HostMap::len).sum::<usize>() + self.any_port.len()
    }

    /// The ports that have virtual hosts of their own, in order.
    #[must_use]
    pub fn ports(&self) -> Vec<u16> {
        let mut ports: Vec<_> = self.ports.keys().copied().collect();
        ports.sort_unstable();
        ports
    }

    /// Every pattern with its virtual host, by port and pattern; for dumps.
    pub fn iter(&self) -> impl Iterator<Item = (Option<u16>, String, &Arc<VirtualHost>)> {
        let mut all = Vec::with_capacity(self.hosts());
        let ports = self.ports().into_iter().filter_map(|port| Some((Some(port), self.ports.get(&port)?)));
        for (port, hosts) in ports.chain([(None, &self.any_port)]) {
            let mut entries: Vec<_> = hosts.iter().collect();
            entries.sort_by(|left, right| left.0.cmp(&right.0));
            all.extend(entries.into_iter().map(|(pattern, host)| (port, pattern, host)));
        }
        all.into_iter()
    }
}

impl VirtualHost {
    /// A virtual host with its routes in order.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>, routes: impl IntoIterator<Item = Arc<Route>>) -> Self {
        let routes: Box<[_]> = routes.into_iter().collect();
        let index = Index::new(&routes);
        Self { name: name.into(), routes, index }
    }

    /// The name that dumps show.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The routes in order.
    #[must_use]
    pub fn routes(&self) -> &[Arc<Route>] {
        &self.routes
    }

    /// The first route that takes the request.
    #[must_use]
    pub fn select(&self, request: &RequestView<'_>) -> Option<&Arc<Route>> {
        self.index.select(&self.routes, request)
    }
}

impl fmt::Display for KeyedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Listener => "listener port",
            Self::Destination => "destination port",
        })
    }
}

/// The side of a request that a table of this direction routes by.
impl From<Direction> for KeyedBy {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Outbound => Self::Destination,
            Direction::Inbound | Direction::Gateway => Self::Listener,
        }
    }
}
