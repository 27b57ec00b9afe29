//! Which listeners configuration asks for: the servers of a gateway, and how each of them ends TLS.
//!
//! A model of its own, because two crates join here: routing keys its tables by the port, and whoever terminates TLS
//! needs the same port's settings. It is plain data. Certificates are named, never held: what a name stands for may
//! change while the model stays.
//!
//! **One listener for each port**, with all of its servers. On a port of TLS the name that a client asks for chooses the
//! server, before anything is decrypted: the exact name, else the longest wildcard, else `*`; who asks for none gets `*`
//! ([`Servers::of`]). No server, no handshake. Servers that end TLS and servers that pass it on share a port.
//!
//! **A name belongs to one server.** Once it is decrypted, a connection could ask for the host of another server than the
//! one that shook hands: one that would have asked for a client's certificate, say. Such a request is misdirected
//! ([`Servers::is_misdirected`]), unless the other server's handshake would have been the same.
//!
//! A server whose TLS nothing in the build can terminate is *never* served some other way: it has no listener, its `tls` is
//! reported as not enforced, and on a port that others share its names are not theirs.

#[cfg(feature = "istio")]
mod istio;

use std::net::IpAddr;
use std::sync::Arc;

use crate::conn::ConnInfo;
use crate::matcher::HostMap;
use crate::server::{ListenerProtocol, Within};
use crate::upstream::Credential;

/// The listeners of a gateway, one for each port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListenerSet {
    /// In order of port.
    pub listeners: Vec<GatewayListener>,
}

/// One listener of a gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayListener {
    /// The port that servers name.
    pub port: u16,
    /// The name of the first server's port.
    pub name: String,
    /// What it speaks.
    pub protocol: ListenerProtocol,
    /// The address that a server asks for; `None` leaves it to the proxy.
    pub bind: Option<IpAddr>,
    /// The servers of a port of TLS; none elsewhere.
    pub servers: Servers,
}

/// The servers of one port of TLS, found by name.
#[derive(Clone, Debug, Default)]
pub struct Servers {
    all: Vec<GatewayServer>,
    by_host: HostMap<usize>,
    /// Whether one of them lets nobody in without a certificate.
    demanding: bool,
}

/// One server of a port of TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayServer {
    /// The names that it answers to: exact, `*.example.com`, or `*`.
    pub hosts: Vec<String>,
    /// How it ends TLS; `None` passes TLS on as it is.
    pub tls: Option<Arc<ServerTls>>,
}

/// How a server ends TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ServerTls {
    /// The certificates that it shows, of which the client's algorithms choose; the authorities for clients are those of
    /// the first. Without one no handshake is answered. [`Credential::Mesh`] is the workload's own identity, and its clients are workloads of the mesh.
    pub credentials: Vec<Credential>,
    /// What is within. Default HTTP.
    pub within: Within,
    /// Whether clients show a certificate.
    pub client_certificate: ClientCertificate,
    /// The names of which a client's certificate must have one, as written; empty for any.
    pub subject_alt_names: Vec<String>,
    /// The SHA-256 of public keys that clients may have. With [`certificate_hashes`](Self::certificate_hashes), one of
    /// either matches; both empty for any.
    pub spki_hashes: Vec<[u8; 32]>,
    /// The SHA-256 of certificates that clients may have.
    pub certificate_hashes: Vec<[u8; 32]>,
    /// The lowest version. Default 1.2, which is the lowest there is.
    pub min_version: TlsVersion,
    /// The highest version; `None` for the highest there is.
    pub max_version: Option<TlsVersion>,
    /// Cipher suites of versions up to 1.2 in OpenSSL's names, the best first; empty for those that are safe.
    pub cipher_suites: Vec<String>,
}

/// Whether clients show a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ClientCertificate {
    /// They are not asked for one.
    #[default]
    None,
    /// They are asked; one that is shown has to hold.
    Optional,
    /// Nobody comes in without one.
    Required,
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TlsVersion {
    /// A version below 1.2, which is not spoken: as the lowest it means 1.2, as the highest nothing is left.
    Older,
    /// TLS 1.2.
    #[default]
    V1_2,
    /// TLS 1.3.
    V1_3,
}

impl ListenerSet {
    /// The listener of a port.
    #[must_use]
    pub fn port(&self, port: u16) -> Option<&GatewayListener> {
        let at = self.listeners.binary_search_by_key(&port, |listener| listener.port).ok()?;
        self.listeners.get(at)
    }

    /// How the servers of all ports end TLS.
    pub fn terminating(&self) -> impl Iterator<Item = &Arc<ServerTls>> {
        self.listeners
            .iter()
            .flat_map(|listener| listener.servers.iter())
            .filter_map(|server| server.tls.as_ref())
    }
}

impl GatewayServer {
    fn demands(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.client_certificate == ClientCertificate::Required)
    }
}

impl Servers {
    /// Adds a server. A name that an older server has stays with that one; such names are returned.
    pub fn push(&mut self, server: GatewayServer) -> Vec<String> {
        let at = self.all.len();
        let taken =
            server.hosts.iter().filter(|host| self.by_host.insert(host, at).is_err()).cloned().collect();
        self.demanding |= server.demands();
        self.all.push(server);
        taken
    }

    /// The server that a name belongs to; without a name, the one that answers to any. A pattern belongs to the server
    /// of the narrowest pattern that covers it.
    #[must_use]
    pub fn of(&self, name: Option<&str>) -> Option<&GatewayServer> {
        // Only `*` covers what is no name at all.
        self.all.get(*self.by_host.get(name.unwrap_or_default())?)
    }

    /// Whether a request for `authority` came over a connection to another server than the one that the authority
    /// belongs to, whose handshake would have been another one; or over one that is older than the server's demand for
    /// certificates. Such a request is to be answered 421. One for a name that no server has is not: no route will take
    /// it.
    #[must_use]
    pub fn is_misdirected(&self, conn: &ConnInfo, authority: &str) -> bool {
        if self.demanding
            && conn.identity.is_none()
            && self.of(Some(authority)).is_some_and(GatewayServer::demands)
        {
            return true;
        }
        if conn.sni.as_deref().is_some_and(|sni| sni == authority) {
            return false;
        }
        match (self.of(conn.sni.as_deref()), self.of(Some(authority))) {
            (_, None) => false,
            (None, Some(_)) => true,
            (Some(shook), Some(asked)) => !std::ptr::eq(shook, asked) && shook.tls != asked.tls,
        }
    }

    /// The servers, oldest first.
    pub fn iter(&self) -> std::slice::Iter<'_, GatewayServer> {
        self.all.iter()
    }
}

impl PartialEq for Servers {
    fn eq(&self, other: &Self) -> bool {
        // The index follows from the list.
        self.all == other.all
    }
}

impl Eq for Servers {}

impl<'a> IntoIterator for &'a Servers {
    type Item = &'a GatewayServer;
    type IntoIter = std::slice::Iter<'a, GatewayServer>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn::Direction;

    fn server(hosts: &[&str], secret: &str) -> GatewayServer {
        let tls =
            ServerTls { credentials: vec![Credential::Secret(secret.to_owned())], ..ServerTls::default() };
        let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        GatewayServer { hosts, tls: (!secret.is_empty()).then(|| Arc::new(tls)) }
    }

    fn servers(all: &[(&[&str], &str)]) -> Servers {
        let mut servers = Servers::default();
        for (hosts, secret) in all {
            servers.push(server(hosts, secret));
        }
        servers
    }

    #[test]
    fn gw_04_the_narrowest_name_chooses_the_server() {
        let all = servers(&[
            (&["*.example.com"], "wide"),
            (&["a.example.com"], "exact"),
            (&["*.b.example.com"], "narrow"),
        ]);
        let secret = |name: Option<&str>| match &all.of(name)?.tls.as_ref()?.credentials[..] {
            [Credential::Secret(name)] => Some(name.clone()),
            _ => None,
        };
        for (name, expected) in [
            ("a.example.com", Some("exact")),
            ("A.Example.Com.", Some("exact")),
            ("x.example.com", Some("wide")),
            ("x.b.example.com", Some("narrow")),
            ("*.example.com", Some("wide")),
            ("example.com", None),
            ("other.com", None),
        ] {
            assert_eq!(secret(Some(name)).as_deref(), expected, "{name}");
        }
        assert_eq!(secret(None), None);
        let any = servers(&[(&["a.example.com"], "exact"), (&["*"], "any")]);
        assert!(std::ptr::eq(any.of(None).unwrap(), any.iter().nth(1).unwrap()));
    }

    #[test]
    fn gw_04_a_name_stays_with_the_server_that_had_it_first() {
        let mut all = servers(&[(&["a.example.com"], "first")]);
        let taken = all.push(server(&["b.example.com", "a.example.com"], "second"));
        assert_eq!(taken, ["a.example.com"]);
        assert_eq!(all.of(Some("a.example.com")), all.iter().next());
    }

    #[test]
    fn f6_a_request_for_the_host_of_another_server_is_misdirected() {
        let all = servers(&[
            (&["a.example.com", "c.example.com"], "one"),
            (&["b.example.com"], "two"),
            (&["d.example.com"], "one"),
            (&["p.example.com"], ""),
        ]);
        let mut conn = ConnInfo::unknown(Direction::Gateway);
        conn.sni = Some("a.example.com".into());
        for (authority, expected) in [
            ("a.example.com", false),
            ("A.example.com:443", false),
            ("c.example.com", false),
            ("b.example.com", true),
            ("B.example.com:8443", true),
            ("d.example.com", false),
            ("p.example.com", true),
            ("nobody.example.com", false),
        ] {
            assert_eq!(all.is_misdirected(&conn, authority), expected, "{authority}");
        }
        conn.sni = None;
        assert!(all.is_misdirected(&conn, "a.example.com"), "the server is gone that shook hands");
        // A connection from before the server asked for certificates.
        let mutual = ServerTls { client_certificate: ClientCertificate::Required, ..ServerTls::default() };
        let mut all = Servers::default();
        all.push(GatewayServer { hosts: vec!["a.example.com".to_owned()], tls: Some(Arc::new(mutual)) });
        conn.sni = Some("a.example.com".into());
        assert!(all.is_misdirected(&conn, "a.example.com"));
        let until = std::time::SystemTime::UNIX_EPOCH;
        conn.identity = Some(Arc::new(crate::identity::PeerInfo::new(None, until)));
        assert!(!all.is_misdirected(&conn, "a.example.com"));
    }
}
