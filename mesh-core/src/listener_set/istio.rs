//! `Gateway` compiled into listeners (GW-01 … GW-06).

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{ClientCertificate, GatewayListener, GatewayServer, ListenerSet, ServerTls, Servers, TlsVersion};
use crate::config::{Compile, CompileContext, Rejected, Role, Transport};
use crate::diagnostics::{Diagnostics, DocId};
use crate::istio::ResourceSet;
use crate::istio::effective::scope::is_subset;
use crate::istio::types::gateway::{Server, ServerTlsMode, ServerTlsSettings, TlsProtocol};
use crate::istio::types::protocol::PortProtocol;
use crate::server::{ListenerProtocol, Protocol, Within};
use crate::upstream::{Credential, CredentialFiles};

impl Server {
    /// Whether a server is plain HTTP, which needs no TLS: also one that only redirects to it.
    #[must_use]
    pub fn is_plain_http(&self) -> bool {
        use PortProtocol::{Grpc, GrpcWeb, Http, Http2};
        matches!(self.protocol(), Some(Http | Http2 | Grpc | GrpcWeb))
            && self.tls.as_ref().is_none_or(|tls| tls.https_redirect)
    }

    /// Whether a server takes bytes as they come: opaque TCP without TLS of its own.
    #[must_use]
    pub fn is_plain_tcp(&self) -> bool {
        use PortProtocol::{Mongo, Mysql, Redis, Tcp};
        matches!(self.protocol(), Some(Tcp | Mongo | Mysql | Redis)) && self.tls.is_none()
    }

    /// Whether a server routes TLS by its server name and leaves it as it is (GW-04), by rules or by what the name says.
    #[must_use]
    pub fn is_passthrough(&self) -> bool {
        self.passes_on(ServerTlsMode::Passthrough) || self.is_auto_passthrough()
    }

    /// Whether the server name itself says where TLS is passed on to: `outbound_.PORT_.SUBSET_.HOST`.
    #[must_use]
    pub fn is_auto_passthrough(&self) -> bool {
        self.passes_on(ServerTlsMode::AutoPassthrough)
    }

    fn passes_on(&self, mode: ServerTlsMode) -> bool {
        matches!(self.protocol(), Some(PortProtocol::Tls | PortProtocol::Https))
            && self.tls.as_ref().is_some_and(|tls| tls.mode == mode && !tls.https_redirect)
    }

    /// Whether a server ends TLS and serves the HTTP within, and a stack like this can do it.
    #[must_use]
    pub fn is_terminated(&self, transport: Transport) -> bool {
        self.protocol() == Some(PortProtocol::Https) && self.ends_tls(transport)
    }

    /// Whether a server ends TLS and passes on the bytes within, and a stack like this can do it.
    #[must_use]
    pub fn is_terminated_bytes(&self, transport: Transport) -> bool {
        self.protocol() == Some(PortProtocol::Tls) && self.ends_tls(transport)
    }

    fn ends_tls(&self, transport: Transport) -> bool {
        transport.terminates_servers
            && self.tls.as_ref().is_some_and(|tls| match tls.mode {
                ServerTlsMode::Passthrough | ServerTlsMode::AutoPassthrough => false,
                ServerTlsMode::Simple | ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual => true,
                ServerTlsMode::IstioMutual => transport.has_identity,
            })
    }

    /// How a server ends TLS; `None` for one that does not.
    #[must_use]
    pub fn server_tls(&self, transport: Transport) -> Option<ServerTls> {
        let within = match self.is_terminated_bytes(transport) {
            true => Within::Bytes,
            false if self.is_terminated(transport) => Within::Http,
            false => return None,
        };
        self.tls.as_ref().map(|tls| ServerTls { within, ..server_tls(tls) })
    }

    /// The server names by which clients reach the server: its hosts. With `AUTO_PASSTHROUGH` those names have more in front,
    /// so an exact host stands for what is below it.
    pub fn server_names(&self) -> impl Iterator<Item = String> {
        let is_auto = self.is_auto_passthrough();
        self.hosts.iter().map(|host| host.split_once('/').map_or(&**host, |(_, host)| host)).map(
            move |host| match is_auto && !host.starts_with('*') {
                true => format!("*.{host}"),
                false => host.to_owned(),
            },
        )
    }

    /// What a listener for the server speaks; `None` for one that nothing in such a stack can serve.
    #[must_use]
    pub fn listener_protocol(&self, transport: Transport) -> Option<ListenerProtocol> {
        if self.is_plain_http() {
            // A client of any HTTP port may speak h2c; no port refuses HTTP/1.
            Some(Protocol::Auto.into())
        } else if self.is_plain_tcp() {
            Some(ListenerProtocol::Tcp)
        } else if self.is_terminated(transport) || self.is_terminated_bytes(transport) {
            Some(ListenerProtocol::Https)
        } else {
            self.is_passthrough().then_some(ListenerProtocol::Tls)
        }
    }

    fn protocol(&self) -> Option<PortProtocol> {
        PortProtocol::parse(&self.port.as_ref()?.protocol)
    }
}

fn server_tls(tls: &ServerTlsSettings) -> ServerTls {
    let client_certificate = match tls.mode {
        ServerTlsMode::Mutual | ServerTlsMode::IstioMutual => ClientCertificate::Required,
        ServerTlsMode::OptionalMutual => ClientCertificate::Optional,
        _ => ClientCertificate::None,
    };
    let hex = |text: &String| hash_of_hex(text);
    let base64 = |text: &String| STANDARD.decode(text).ok()?.try_into().ok();
    ServerTls {
        credentials: credentials(tls),
        within: Within::default(),
        client_certificate,
        subject_alt_names: tls.subject_alt_names.clone(),
        spki_hashes: tls.verify_certificate_spki.iter().filter_map(base64).collect(),
        certificate_hashes: tls.verify_certificate_hash.iter().filter_map(hex).collect(),
        min_version: version(tls.min_protocol_version).unwrap_or_default(),
        max_version: version(tls.max_protocol_version),
        cipher_suites: tls.cipher_suites.clone(),
    }
}

fn credentials(tls: &ServerTlsSettings) -> Vec<Credential> {
    if tls.mode == ServerTlsMode::IstioMutual {
        return vec![Credential::Mesh];
    }
    if !tls.credential_name.is_empty() {
        return vec![Credential::Secret(tls.credential_name.clone())];
    }
    if !tls.credential_names.is_empty() {
        return tls.credential_names.iter().take(2).cloned().map(Credential::Secret).collect();
    }
    let files = |certificate: &str, key: &str| CredentialFiles {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
        // Of a server that asks for no certificate of its clients nothing depends on authorities.
        roots: if tls.mode == ServerTlsMode::Simple { String::new() } else { tls.ca_certificates.clone() },
        revoked: if tls.mode == ServerTlsMode::Simple { String::new() } else { tls.ca_crl.clone() },
    };
    if tls.tls_certificates.is_empty() {
        return vec![Credential::Files(files(&tls.server_certificate, &tls.private_key))];
    }
    let pairs = tls.tls_certificates.iter().take(2);
    pairs.map(|pair| Credential::Files(files(&pair.server_certificate, &pair.private_key))).collect()
}

/// 32 bytes as openssl prints a fingerprint: in hexadecimal of either case, with or without colons.
fn hash_of_hex(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|byte| *byte != b':')
        .map(|byte| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high << 4 | low).collect();
    bytes.try_into().ok().filter(|_| rest.is_empty())
}

const fn version(protocol: TlsProtocol) -> Option<TlsVersion> {
    match protocol {
        TlsProtocol::Auto => None,
        TlsProtocol::V1_0 | TlsProtocol::V1_1 => Some(TlsVersion::Older),
        TlsProtocol::V1_2 => Some(TlsVersion::V1_2),
        TlsProtocol::V1_3 => Some(TlsVersion::V1_3),
    }
}

impl ListenerSet {
    /// The listeners of the gateways that select the workload, oldest first, as far as such a stack can serve them.
    #[must_use]
    pub fn of(set: &ResourceSet, cx: &CompileContext, diags: &mut Diagnostics) -> Self {
        let mut listeners: BTreeMap<u16, GatewayListener> = BTreeMap::new();
        let mut unserved = Vec::new();
        let selected =
            set.gateways().iter().filter(|gateway| is_subset(&gateway.spec.selector, &cx.workload.labels));
        for gateway in selected {
            for (at, server) in gateway.spec.servers.iter().enumerate() {
                let protocol = server.listener_protocol(cx.transport);
                let Some(asked) = &server.port else { continue };
                let Some(port) = u16::try_from(asked.number).ok().filter(|port| *port != 0) else {
                    continue;
                };
                let Some(protocol) = protocol else {
                    unserved.push((port, names(server)));
                    continue;
                };
                let listener = listeners.entry(port).or_insert_with(|| GatewayListener {
                    port,
                    name: asked.name.clone(),
                    protocol,
                    bind: server.bind.parse().ok(),
                    servers: Servers::default(),
                });
                match (listener.protocol, protocol) {
                    (own, other) if own == other => {}
                    // By its name a connection finds the server that ends TLS or the one that passes it on.
                    (ListenerProtocol::Tls | ListenerProtocol::Https, ListenerProtocol::Https) => {
                        listener.protocol = ListenerProtocol::Https;
                    }
                    (ListenerProtocol::Https, ListenerProtocol::Tls) => {}
                    (own, _) => {
                        let message = format!(
                            "the port speaks {} for an older server: this one is not served",
                            own.as_str()
                        );
                        diags.warning_at(gateway.doc, format!("spec.servers[{at}].port"), message);
                        continue;
                    }
                }
                if !matches!(protocol, ListenerProtocol::Tls | ListenerProtocol::Https) {
                    continue;
                }
                let tls = server.server_tls(cx.transport).map(Arc::new);
                if let (Some(tls), Some(settings)) = (&tls, &server.tls) {
                    check(tls, settings, gateway.doc, &format!("spec.servers[{at}].tls"), diags);
                }
                let server = GatewayServer { hosts: names(server), tls };
                for taken in listener.servers.push(server) {
                    let message = format!("an older server of port {port} has {taken:?}, and keeps it");
                    diags.warning_at(gateway.doc, format!("spec.servers[{at}].hosts"), message);
                }
            }
        }
        for (port, hosts) in unserved {
            if let Some(listener) = listeners.get_mut(&port)
                && listener.protocol == ListenerProtocol::Https
            {
                // Without a certificate it answers no handshake, and neither does another for it.
                listener.servers.push(GatewayServer { hosts, tls: Some(Arc::default()) });
            }
        }
        Self { listeners: listeners.into_values().collect() }
    }
}

/// The names of a server. Which namespaces may bind them is a matter of routes.
fn names(server: &Server) -> Vec<String> {
    server.server_names().collect()
}

/// The suites of TLS 1.2 with forward secrecy and authenticated encryption: there are no others.
const SUITES: [&str; 6] = [
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-RSA-CHACHA20-POLY1305",
];

/// What is wrong with settings beyond what the API server refuses. A pin that cannot be read would let nobody in, which
/// is an error; a version that is not spoken is only said.
fn check(tls: &ServerTls, settings: &ServerTlsSettings, doc: DocId, path: &str, diags: &mut Diagnostics) {
    if tls.spki_hashes.len() != settings.verify_certificate_spki.len() {
        diags.error_at(
            doc,
            format!("{path}.verifyCertificateSpki"),
            "expected the SHA-256 of public keys in base64",
        );
    }
    if tls.certificate_hashes.len() != settings.verify_certificate_hash.len() {
        let message = "expected the SHA-256 of certificates in hexadecimal";
        diags.error_at(doc, format!("{path}.verifyCertificateHash"), message);
    }
    if tls.min_version == TlsVersion::Older {
        let message = "versions below TLSV1_2 are not spoken: the lowest is TLSV1_2";
        diags.warning_at(doc, format!("{path}.minProtocolVersion"), message);
    }
    for (at, suite) in settings.cipher_suites.iter().enumerate() {
        if suite.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
            && suite != "ALL"
            && !SUITES.contains(&suite.as_str())
        {
            let message = format!("{suite:?} is not offered; offered are {}", SUITES.join(", "));
            diags.warning_at(doc, format!("{path}.cipherSuites[{at}]"), message);
        }
    }
    let lowest = tls.min_version.max(TlsVersion::V1_2);
    if tls.max_version.is_some_and(|highest| highest < lowest) {
        let message = "no version is left that is spoken: this server answers no handshake";
        diags.warning_at(doc, format!("{path}.maxProtocolVersion"), message);
    }
}

/// The servers of the gateways that select the workload, as far as this stack can serve them; a sidecar has none.
impl Compile<ResourceSet> for ListenerSet {
    fn compile(set: &ResourceSet, cx: &CompileContext, diags: &mut Diagnostics) -> Result<Self, Rejected> {
        if cx.role != Role::Gateway {
            return Ok(Self::default());
        }
        Ok(Self::of(set, cx, diags))
    }

    fn closed(_: &CompileContext) -> Self {
        Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istio::{LoadOptions, SourceFile};

    fn compile(servers: &str) -> (ListenerSet, Vec<String>) {
        let text = format!(
            "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: edge}}\nspec: {{servers: [{servers}]}}\n"
        );
        let (set, mut diags) = ResourceSet::load(&[SourceFile::new("a.yaml", text)], &LoadOptions::default());
        assert!(!diags.has_errors(), "{diags}");
        let mut cx = CompileContext::new(Role::Gateway);
        cx.transport.terminates_servers = true;
        let listeners = ListenerSet::compile(&set, &cx, &mut diags).unwrap();
        (listeners, diags.iter().map(|found| format!("{}: {}", found.path, found.message)).collect())
    }

    fn https(hosts: &str, tls: &str) -> String {
        format!(
            "{{port: {{number: 443, name: https{}, protocol: HTTPS}}, hosts: {hosts}, tls: {{{tls}}}}}",
            hosts.len()
        )
    }

    fn one(tls: &str) -> (ServerTls, Vec<String>) {
        let (set, said) = compile(&https("['*']", tls));
        let tls = set.terminating().next().map(|tls| ServerTls::clone(tls)).unwrap();
        (tls, said)
    }

    #[test]
    fn gw_04_servers_of_tls_share_a_port_and_no_other_does() {
        let passthrough = https("[p.example.com]", "mode: PASSTHROUGH");
        let simple = https("[ns/a.example.com]", "mode: SIMPLE, credentialName: a");
        for servers in [format!("{passthrough}, {simple}"), format!("{simple}, {passthrough}")] {
            let (set, said) = compile(&servers);
            assert!(said.is_empty(), "{said:?}");
            let listener = set.port(443).unwrap();
            assert_eq!((set.listeners.len(), listener.protocol), (1, ListenerProtocol::Https));
            let ends = |name: &str| listener.servers.of(Some(name)).map(|server| server.tls.is_some());
            assert_eq!(ends("p.example.com"), Some(false));
            assert_eq!(ends("a.example.com"), Some(true));
            assert_eq!(ends("b.example.com"), None);
        }
        let plain = "{port: {number: 443, name: http, protocol: HTTP}, hosts: ['*']}";
        let (set, said) = compile(&format!("{simple}, {plain}"));
        assert_eq!(set.port(443).unwrap().protocol, ListenerProtocol::Https);
        assert!(said[0].contains("spec.servers[1].port: the port speaks https"), "{said:?}");
        // What cannot be served is not served by the one that answers to all.
        let any = https("['*']", "mode: SIMPLE, credentialName: a");
        let (set, _) = compile(&format!("{any}, {}", https("[m.example.com]", "mode: ISTIO_MUTUAL")));
        let servers = &set.port(443).unwrap().servers;
        let credentials = |name: &str| servers.of(Some(name))?.tls.as_ref().map(|tls| tls.credentials.len());
        assert_eq!((credentials("a.example.com"), credentials("m.example.com")), (Some(1), Some(0)));
        let again = https("[b.example.com, a.example.com]", "mode: SIMPLE, credentialName: b");
        let (_, said) = compile(&format!("{simple}, {again}"));
        assert_eq!(
            said,
            ["spec.servers[1].hosts: an older server of port 443 has \"a.example.com\", and keeps it"]
        );
    }

    #[test]
    fn gw_04_what_is_within_follows_the_protocol_of_the_port() {
        let tls = |hosts: &str, tls: &str| https(hosts, tls).replace("HTTPS", "TLS");
        let simple = "mode: SIMPLE, credentialName: a";
        let (set, said) = compile(&format!(
            "{}, {}, {}, {}",
            https("[h.example.com]", simple),
            tls("[bytes.example.com]", simple),
            tls("[exact.local, '*.wide.local']", "mode: AUTO_PASSTHROUGH"),
            tls("[passed.example.com]", "mode: PASSTHROUGH"),
        ));
        assert!(said.is_empty(), "{said:?}");
        let listener = set.port(443).unwrap();
        assert_eq!(listener.protocol, ListenerProtocol::Https);
        let within = |name: &str| {
            listener.servers.of(Some(name)).map(|server| server.tls.as_ref().map(|tls| tls.within))
        };
        assert_eq!(within("h.example.com"), Some(Some(Within::Http)));
        assert_eq!(within("bytes.example.com"), Some(Some(Within::Bytes)));
        for passed_on in
            ["outbound_.80_._.exact.local", "outbound_.80_.v1_.a.wide.local", "passed.example.com"]
        {
            assert_eq!(within(passed_on), Some(None), "{passed_on}");
        }
        assert_eq!(within("exact.local"), None);
        // Bytes and HTTP are not the same handshake, whatever the certificate.
        let ended: Vec<_> = set.terminating().collect();
        assert_ne!(ended[0], ended[1]);
    }

    #[test]
    fn gw_05_where_certificates_are() {
        let secret = |name: &str| Credential::Secret(name.to_owned());
        let (tls, _) = one("mode: SIMPLE, credentialName: a");
        assert_eq!((tls.credentials, tls.client_certificate), (vec![secret("a")], ClientCertificate::None));
        let (tls, _) = one("mode: OPTIONAL_MUTUAL, credentialNames: [a, b]");
        assert_eq!(tls.credentials, [secret("a"), secret("b")]);
        assert_eq!(tls.client_certificate, ClientCertificate::Optional);
        let files = |certificate: &str, key: &str, roots: &str, revoked: &str| {
            let [certificate, key, roots, revoked] = [certificate, key, roots, revoked].map(str::to_owned);
            Credential::Files(CredentialFiles { certificate, key, roots, revoked })
        };
        let (tls, _) = one("mode: MUTUAL, serverCertificate: c, privateKey: k, caCertificates: r, caCrl: l");
        assert_eq!(
            (tls.credentials, tls.client_certificate),
            (vec![files("c", "k", "r", "l")], ClientCertificate::Required)
        );
        let (tls, _) = one(
            "mode: SIMPLE, tlsCertificates: [{serverCertificate: c, privateKey: k}, {serverCertificate: d, privateKey: l}]",
        );
        assert_eq!(tls.credentials, [files("c", "k", "", ""), files("d", "l", "", "")]);
    }

    #[test]
    fn gw_06_hashes_and_versions() {
        let hex = "AB:".repeat(31) + "cd";
        let base64 = STANDARD.encode([7; 32]);
        let (tls, said) = one(&format!(
            "mode: MUTUAL, credentialName: a, verifyCertificateSpki: ['{base64}'], verifyCertificateHash: ['{hex}']"
        ));
        assert!(said.is_empty(), "{said:?}");
        assert_eq!(tls.spki_hashes, [[7; 32]]);
        assert_eq!((tls.certificate_hashes[0][0], tls.certificate_hashes[0][31]), (0xab, 0xcd));
        assert_eq!((tls.min_version, tls.max_version), (TlsVersion::V1_2, None));
        for (field, value) in [("verifyCertificateSpki", "YWJj"), ("verifyCertificateHash", "abc")] {
            let (_, said) = one(&format!("mode: MUTUAL, credentialName: a, {field}: ['{value}']"));
            assert!(said[0].starts_with(&format!("spec.servers[0].tls.{field}: expected")), "{said:?}");
        }
        let (tls, said) = one(
            "mode: SIMPLE, credentialName: a, minProtocolVersion: TLSV1_1, maxProtocolVersion: TLSV1_1, cipherSuites: [ALL, AES128-SHA]",
        );
        assert_eq!((tls.min_version, tls.max_version), (TlsVersion::Older, Some(TlsVersion::Older)));
        for expected in
            ["cipherSuites[1]: \"AES128-SHA\" is not offered", "the lowest is TLSV1_2", "no version is left"]
        {
            assert!(said.iter().any(|said| said.contains(expected)), "{expected}: {said:?}");
        }
        let (tls, said) = one("mode: SIMPLE, credentialName: a, minProtocolVersion: TLSV1_3");
        assert_eq!((tls.min_version, said.len()), (TlsVersion::V1_3, 0));
    }
}
