//! `networking.istio.io` Gateway (GW-01 … GW-06).

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::check;
use super::host::{HostOf, namespaced_host};
use super::protocol::PortProtocol;
use super::target;
use crate::istio::findings::{Findings, Validate};

/// The prefix of an address that is a unix domain socket.
pub(crate) const UNIX_PREFIX: &str = "unix://";

/// Ports, protocols and hosts that a proxy at the edge of the mesh listens for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Gateway {
    /// The listeners; at least one.
    pub servers: Vec<Server>,
    /// Labels of the proxies that this is for, in any namespace; empty selects every gateway (GW-03).
    pub selector: BTreeMap<String, String>,
}

/// One listener.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Server {
    /// Where it listens, and what it speaks; required.
    pub port: Option<Port>,
    /// An IP address or `unix://` path; empty is every address.
    pub bind: String,
    /// `[namespace/]dnsName`; at least one.
    pub hosts: Vec<String>,
    /// TLS; required for HTTPS and TLS ports.
    pub tls: Option<ServerTlsSettings>,
    /// Not implemented by Istio.
    pub default_endpoint: String,
    /// A name for this server among all.
    pub name: String,
}

/// A port of a Gateway.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Port {
    /// 1..=65535, or 0 when `bind` is a unix socket.
    pub number: u32,
    /// One of [`PortProtocol`], in any case.
    pub protocol: String,
    /// Unique within the Gateway.
    pub name: String,
    /// Means nothing here and is refused.
    pub target_port: u32,
}

/// How TLS is terminated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServerTlsSettings {
    /// Answer every plain HTTP request with a 301 to HTTPS.
    pub https_redirect: bool,
    /// Who terminates, and whether clients show certificates.
    pub mode: ServerTlsMode,
    /// Path of the server's certificate chain.
    pub server_certificate: String,
    /// Path of the server's private key.
    pub private_key: String,
    /// Path of the CA certificates that clients are verified with.
    pub ca_certificates: String,
    /// Path of a certificate revocation list for client certificates.
    pub ca_crl: String,
    /// Name of the secret that holds key and certificates, in place of the paths.
    pub credential_name: String,
    /// Names of up to two such secrets (RSA and ECDSA).
    pub credential_names: Vec<String>,
    /// Up to two pairs of paths (RSA and ECDSA).
    pub tls_certificates: Vec<TlsCertificate>,
    /// Names of which a client certificate must have one.
    pub subject_alt_names: Vec<String>,
    /// Base64 SHA-256 of accepted public keys; either this or the next list matches.
    pub verify_certificate_spki: Vec<String>,
    /// Hexadecimal SHA-256 of accepted client certificates.
    pub verify_certificate_hash: Vec<String>,
    /// The lowest version; default TLS 1.2.
    pub min_protocol_version: TlsProtocol,
    /// The highest version; default TLS 1.3.
    pub max_protocol_version: TlsProtocol,
    /// Cipher suites in OpenSSL's names, for versions up to 1.2.
    pub cipher_suites: Vec<String>,
}

/// One certificate with its key, by path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TlsCertificate {
    /// Path of the certificate chain.
    pub server_certificate: String,
    /// Path of the private key.
    pub private_key: String,
    /// Path of CA certificates.
    pub ca_certificates: String,
}

/// Who terminates TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ServerTlsMode {
    /// The SNI name picks a route; TLS is not terminated. The default.
    #[default]
    Passthrough,
    /// Terminated with the server's certificate.
    Simple,
    /// And clients must show a certificate.
    Mutual,
    /// The SNI name is the name of a cluster.
    AutoPassthrough,
    /// Mutual, with the workload's own identity.
    IstioMutual,
    /// Clients may show a certificate.
    OptionalMutual,
}

impl ServerTlsMode {
    /// Whether TLS reaches the upstream unterminated.
    #[must_use]
    pub const fn is_passthrough(self) -> bool {
        matches!(self, Self::Passthrough | Self::AutoPassthrough)
    }

    /// The name in YAML.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Passthrough => "PASSTHROUGH",
            Self::Simple => "SIMPLE",
            Self::Mutual => "MUTUAL",
            Self::AutoPassthrough => "AUTO_PASSTHROUGH",
            Self::IstioMutual => "ISTIO_MUTUAL",
            Self::OptionalMutual => "OPTIONAL_MUTUAL",
        }
    }
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub enum TlsProtocol {
    /// The proxy's choice.
    #[default]
    #[serde(rename = "TLS_AUTO")]
    Auto,
    /// TLS 1.0.
    #[serde(rename = "TLSV1_0")]
    V1_0,
    /// TLS 1.1.
    #[serde(rename = "TLSV1_1")]
    V1_1,
    /// TLS 1.2.
    #[serde(rename = "TLSV1_2")]
    V1_2,
    /// TLS 1.3.
    #[serde(rename = "TLSV1_3")]
    V1_3,
}

impl Validate for Gateway {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        let name = out.subject().name.clone();
        out.at_root("metadata", |out| {
            out.check("name", check::dns1123_label(&name));
        });
        if self.servers.is_empty() {
            out.error("servers", "a gateway must have at least one server");
        }
        let mut names = BTreeSet::new();
        for (index, server) in self.servers.iter().enumerate() {
            out.item("servers", index, |out| {
                server.validate(out);
                if let Some(port) = &server.port
                    && !names.insert(port.name.as_str())
                {
                    out.error(
                        "port.name",
                        format!("port name {:?} is not unique in this gateway", port.name),
                    );
                }
            });
        }
    }
}

impl Validate for Server {
    fn validate(&self, out: &mut Findings) {
        if self.hosts.is_empty() {
            out.error("hosts", "a server must have at least one host");
        }
        for (index, host) in self.hosts.iter().enumerate() {
            namespaced_host(out, &format!("hosts[{index}]"), host, HostOf::Gateway);
        }
        self.validate_bind(out);
        let port_is_fine = match &self.port {
            Some(port) => out.within("port", |out| port.is_fine(out, &self.bind)),
            None => {
                out.error("port", "a server must have a port");
                false
            }
        };
        if let Some(tls) = &self.tls {
            out.within("tls", |out| tls.validate(out));
        }
        let protocol = self.port.as_ref().and_then(|port| PortProtocol::parse(&port.protocol));
        if let Some(protocol) = protocol.filter(|_| port_is_fine) {
            self.validate_tls_fits(out, protocol);
        }
        if self.tls.as_ref().is_some_and(|tls| tls.https_redirect)
            && self.port.is_some()
            && !protocol.is_some_and(PortProtocol::is_http)
        {
            out.warning("tls.httpsRedirect", "tls.httpsRedirect should only be used with http servers");
        }
    }
}

impl Server {
    fn validate_bind(&self, out: &mut Findings) {
        if let Some(path) = self.bind.strip_prefix(UNIX_PREFIX) {
            out.check("bind", check::unix_address(path));
            if self.port.as_ref().is_some_and(|port| port.number != 0) {
                out.error("port.number", "must be 0 when bind is a unix domain socket");
            }
        } else if !self.bind.is_empty() {
            out.check("bind", check::ip(&self.bind));
        }
    }

    fn validate_tls_fits(&self, out: &mut Findings, protocol: PortProtocol) {
        match &self.tls {
            None if protocol.is_tls() => {
                out.error("tls", "a server must have TLS settings for HTTPS and TLS ports");
            }
            Some(tls) if protocol.is_http() && !tls.is_only_redirect() => {
                out.error("tls", "a server cannot have TLS settings on a plain text HTTP port");
            }
            Some(_) if !protocol.is_tls() && !protocol.is_http() => {
                out.error("tls", "a server cannot have TLS settings on a port that is neither HTTPS nor TLS");
            }
            _ => {}
        }
    }
}

impl Port {
    fn is_fine(&self, out: &mut Findings, bind: &str) -> bool {
        let mut fine = true;
        if PortProtocol::parse(&self.protocol).is_none() {
            out.error(
                "protocol",
                format!(
                    "invalid protocol {:?}, supported are HTTP, HTTPS, GRPC, GRPC-WEB, HTTP2, MONGO, REDIS, MYSQL, TCP \
                     and TLS",
                    self.protocol
                ),
            );
            fine = false;
        }
        if self.number > 0 || !bind.starts_with(UNIX_PREFIX) {
            fine &= out.check("number", check::port(self.number));
        }
        if self.target_port > 0 {
            out.error("targetPort", "has no effect on a gateway");
            fine = false;
        }
        if self.name.is_empty() {
            out.error("name", "the port name must be set");
            fine = false;
        }
        fine
    }
}

impl ServerTlsSettings {
    fn is_only_redirect(&self) -> bool {
        self.mode.is_passthrough()
            && self.ca_certificates.is_empty()
            && self.private_key.is_empty()
            && self.server_certificate.is_empty()
    }

    fn has_secret(&self) -> bool {
        !self.credential_name.is_empty() || !self.credential_names.is_empty()
    }

    fn validate_versions(&self, out: &mut Findings) {
        if matches!(self.min_protocol_version, TlsProtocol::V1_0 | TlsProtocol::V1_1)
            && self.cipher_suites.is_empty()
        {
            out.warning(
                "minProtocolVersion",
                "TLS versions below TLSV1_2 need compatible cipherSuites, which are no longer there by default",
            );
        }
        let mut seen = BTreeSet::new();
        for (index, suite) in self.cipher_suites.iter().enumerate() {
            let at = format!("cipherSuites[{index}]");
            if !is_cipher_suite(suite) {
                out.warning(&at, format!("invalid cipher suite {suite:?} is ignored"));
            } else if !seen.insert(suite.as_str()) {
                out.warning(&at, format!("duplicate cipher suite {suite:?} is ignored"));
            }
        }
    }

    fn validate_istio_mutual(&self, out: &mut Findings) {
        for (field, set, what) in [
            ("serverCertificate", !self.server_certificate.is_empty(), "server certificate"),
            ("privateKey", !self.private_key.is_empty(), "private key"),
            ("caCertificates", !self.ca_certificates.is_empty(), "CA bundle"),
            ("tlsCertificates", !self.tls_certificates.is_empty(), "tlsCertificates"),
            ("credentialName", !self.credential_name.is_empty(), "credentialName"),
            ("credentialNames", !self.credential_names.is_empty(), "credentialNames"),
        ] {
            if set {
                out.error(field, format!("ISTIO_MUTUAL TLS cannot have associated {what}"));
            }
        }
    }

    fn validate_sources(&self, out: &mut Findings) {
        let sources = [
            !self.server_certificate.is_empty() && !self.private_key.is_empty(),
            !self.credential_name.is_empty(),
            !self.credential_names.is_empty(),
            !self.tls_certificates.is_empty(),
        ];
        if sources.into_iter().filter(|set| *set).count() > 1 {
            out.error(
                "",
                "only one of credential_name, credential_names, server_certificate/private_key, tls_certificates \
                 should be specified",
            );
        }
    }

    fn validate_files(&self, out: &mut Findings) {
        let mutual = matches!(self.mode, ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual);
        let what = if mutual { "MUTUAL TLS" } else { "SIMPLE TLS" };
        if mutual && self.ca_certificates.is_empty() {
            out.error("caCertificates", format!("{what} requires a client CA bundle"));
        }
        if self.tls_certificates.len() > 2 {
            out.warning("tlsCertificates", format!("{what} can support up to 2 server certificates"));
        }
        let mut pair = |at: &str, certificate: &str, key: &str| {
            if certificate.is_empty() {
                out.error(&format!("{at}serverCertificate"), format!("{what} requires a server certificate"));
            }
            if key.is_empty() {
                out.error(&format!("{at}privateKey"), format!("{what} requires a private key"));
            }
        };
        if self.tls_certificates.is_empty() {
            pair("", &self.server_certificate, &self.private_key);
        }
        for (index, certificate) in self.tls_certificates.iter().enumerate() {
            let at = format!("tlsCertificates[{index}].");
            pair(&at, &certificate.server_certificate, &certificate.private_key);
        }
    }
}

impl Validate for ServerTlsSettings {
    fn validate(&self, out: &mut Findings) {
        self.validate_versions(out);
        if self.mode == ServerTlsMode::IstioMutual {
            self.validate_istio_mutual(out);
            return;
        }
        let files = !self.ca_crl.is_empty()
            || !self.server_certificate.is_empty()
            || !self.private_key.is_empty()
            || !self.ca_certificates.is_empty()
            || !self.tls_certificates.is_empty();
        if self.mode.is_passthrough() && (files || self.has_secret()) {
            out.warning(
                "",
                format!("{} mode does not use certificates, they will be ignored", self.mode.name()),
            );
        }
        self.validate_sources(out);
        if !self.mode.is_passthrough() {
            if self.has_secret() {
                // Everything comes with the secret.
                return;
            }
            self.validate_files(out);
        }
        if !self.ca_crl.is_empty() {
            if !self.credential_name.is_empty() {
                out.error("caCrl", "is not supported with credentialName: the list belongs into the secret");
            }
            if self.mode == ServerTlsMode::Simple {
                out.error("caCrl", "is not supported with SIMPLE TLS");
            }
        }
    }
}

/// Whether BoringSSL knows the suite, or it is an expression of its list syntax (`-NAME`, `[A|B]`).
fn is_cipher_suite(suite: &str) -> bool {
    const SUITES: [&str; 15] = [
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-RSA-CHACHA20-POLY1305",
        "ECDHE-ECDSA-AES128-SHA",
        "ECDHE-RSA-AES128-SHA",
        "ECDHE-ECDSA-AES256-SHA",
        "ECDHE-RSA-AES256-SHA",
        "AES128-GCM-SHA256",
        "AES256-GCM-SHA384",
        "AES128-SHA",
        "AES256-SHA",
        "DES-CBC3-SHA",
    ];
    match suite.as_bytes().first() {
        None => true,
        Some(first) => suite == "ALL" || !first.is_ascii_alphanumeric() || SUITES.contains(&suite),
    }
}
