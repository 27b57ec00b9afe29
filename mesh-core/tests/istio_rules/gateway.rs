//! Gateway.

use super::{Fine, NETWORKING, Refused, Verdict, Warns, judge, load};

fn gateway(frame: &str, cases: &[(&str, Verdict)]) {
    judge(NETWORKING, "Gateway", frame, cases);
}

#[test]
fn gw_01_servers() {
    gateway(
        "$",
        &[
            ("{}", Refused("servers")),
            ("{servers: [{}]}", Refused("servers[0].hosts")),
            ("{servers: [{}]}", Refused("servers[0].port")),
            (
                "{servers: [{hosts: [a.b], port: {number: 80, name: a, protocol: HTTP}}, \
              {hosts: [c.d], port: {number: 81, name: a, protocol: HTTP}}]}",
                Refused("servers[1].port.name"),
            ),
            (
                "{servers: [{hosts: [a.b], port: {number: 80, name: a, protocol: HTTP}}, \
              {hosts: [c.d], port: {number: 80, name: b, protocol: HTTP}}]}",
                Fine,
            ),
        ],
    );
    let dotted = load(
        "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: a.b, namespace: ns}\n\
         spec: {servers: [{hosts: [a.b], port: {number: 80, name: a, protocol: HTTP}}]}\n",
    );
    assert!(dotted.has_errors(), "a name with a dot: {dotted}");
}

#[test]
fn gw_02_hosts() {
    gateway(
        "{servers: [{hosts: [$], port: {number: 80, name: a, protocol: HTTP}}]}",
        &[
            ("a.b", Fine),
            ("'*'", Fine),
            ("'*.a.b'", Fine),
            ("10.0.0.1", Fine),
            ("ns/a.b", Fine),
            ("./a.b", Fine),
            ("'*/a.b'", Fine),
            ("'*/*'", Fine),
            ("'~/a.b'", Refused("hosts[0]")),
            ("a", Refused("hosts[0]")),
            ("ns/a", Refused("hosts[0]")),
            ("a.*.b", Refused("hosts[0]")),
            ("'*a.b'", Refused("hosts[0]")),
            ("'*-a.b'", Refused("hosts[0]")),
            ("ns/*a.b", Refused("hosts[0]")),
            ("/a.b", Refused("hosts[0]")),
            ("ns/", Refused("hosts[0]")),
            ("a_b/c.d", Refused("hosts[0]")),
        ],
    );
}

#[test]
fn gw_03_port_and_bind() {
    gateway(
        "{servers: [{hosts: [a.b], $}]}",
        &[
            ("port: {number: 65535, name: a, protocol: grpc-web}", Fine),
            ("port: {number: 80, name: a, protocol: http}, bind: 127.0.0.1", Fine),
            ("port: {number: 80, name: a, protocol: http}, bind: '::1'", Fine),
            ("port: {name: a, protocol: http}, bind: 'unix:///a/b'", Fine),
            ("port: {name: a, protocol: http}, bind: 'unix://@a'", Fine),
            ("port: {number: 80, name: a, protocol: http}, bind: 'unix://@a'", Refused("port.number")),
            ("port: {name: a, protocol: http}, bind: 'unix://a'", Refused("bind")),
            ("port: {name: a, protocol: http}, bind: 'unix:///a/'", Refused("bind")),
            ("port: {name: a, protocol: http}, bind: 'uds:///a'", Refused("port.number")),
            ("port: {number: 80, name: a, protocol: http}, bind: a.b", Refused("bind")),
            ("port: {number: 80, name: a, protocol: kafka}", Refused("port.protocol")),
            ("port: {number: 80, name: a}", Refused("port.protocol")),
            ("port: {number: 80, protocol: http}", Refused("port.name")),
            ("port: {name: a, protocol: http}", Refused("port.number")),
            ("port: {number: 65536, name: a, protocol: http}", Refused("port.number")),
            ("port: {number: 80, name: a, protocol: http, targetPort: 8080}", Refused("port.targetPort")),
        ],
    );
}

#[test]
fn gw_04_tls_fits_the_protocol() {
    gateway(
        "{servers: [{hosts: [a.b], port: {number: 80, name: a, $}]}",
        &[
            ("protocol: HTTPS}", Refused("tls")),
            ("protocol: TLS}", Refused("tls")),
            ("protocol: TLS}, tls: {mode: PASSTHROUGH}", Fine),
            ("protocol: TCP}, tls: {mode: PASSTHROUGH}", Refused("tls")),
            ("protocol: HTTP}, tls: {httpsRedirect: true}", Fine),
            ("protocol: HTTP}, tls: {mode: SIMPLE, credentialName: a}", Refused("tls")),
            ("protocol: HTTP}, tls: {caCertificates: a}", Refused("tls")),
            ("protocol: HTTPS}, tls: {httpsRedirect: true}", Warns("tls.httpsRedirect")),
        ],
    );
}

#[test]
fn gw_04_certificates_by_mode() {
    const PAIR: &str = "{serverCertificate: a, privateKey: b}";
    let three = format!("mode: SIMPLE, tlsCertificates: [{PAIR}, {PAIR}, {PAIR}]");
    let two = format!("mode: MUTUAL, caCertificates: c, tlsCertificates: [{PAIR}, {PAIR}]");
    let pair_and_list =
        format!("mode: SIMPLE, serverCertificate: a, privateKey: b, tlsCertificates: [{PAIR}]");
    let secret_and_list = format!("mode: SIMPLE, credentialName: s, tlsCertificates: [{PAIR}]");
    let names_and_list = format!("mode: SIMPLE, credentialNames: [s], tlsCertificates: [{PAIR}]");
    gateway(
        "{servers: [{hosts: [a.b], port: {number: 443, name: a, protocol: HTTPS}, tls: {$}}]}",
        &[
            ("mode: SIMPLE, serverCertificate: a, privateKey: b", Fine),
            ("mode: SIMPLE, serverCertificate: a, privateKey: b, caCertificates: c", Fine),
            ("mode: SIMPLE, credentialName: s", Fine),
            ("mode: SIMPLE, credentialName: s, serverCertificate: a", Fine),
            ("mode: SIMPLE, credentialName: s, privateKey: b", Fine),
            ("mode: SIMPLE, credentialName: s, caCrl: d", Fine),
            ("mode: SIMPLE", Refused("tls.serverCertificate")),
            ("mode: SIMPLE", Refused("tls.privateKey")),
            ("mode: SIMPLE, serverCertificate: a, privateKey: b, caCrl: d", Refused("tls.caCrl")),
            ("mode: SIMPLE, serverCertificate: a, privateKey: b, credentialName: s", Refused("tls")),
            ("mode: SIMPLE, credentialName: s, credentialNames: [t]", Refused("tls")),
            (&three, Warns("tls.tlsCertificates")),
            (&two, Fine),
            (&pair_and_list, Refused("tls")),
            (&secret_and_list, Refused("tls")),
            (&names_and_list, Refused("tls")),
            (
                "mode: SIMPLE, tlsCertificates: [{privateKey: b}]",
                Refused("tls.tlsCertificates[0].serverCertificate"),
            ),
            (
                "mode: SIMPLE, tlsCertificates: [{serverCertificate: a}]",
                Refused("tls.tlsCertificates[0].privateKey"),
            ),
            ("mode: MUTUAL, serverCertificate: a, privateKey: b, caCertificates: c", Fine),
            ("mode: MUTUAL, serverCertificate: a, privateKey: b, caCertificates: c, caCrl: d", Fine),
            ("mode: MUTUAL, serverCertificate: a, privateKey: b", Refused("tls.caCertificates")),
            ("mode: MUTUAL, privateKey: b, caCertificates: c", Refused("tls.serverCertificate")),
            ("mode: MUTUAL, credentialNames: [s, t]", Fine),
            ("mode: OPTIONAL_MUTUAL", Refused("tls.caCertificates")),
            ("mode: OPTIONAL_MUTUAL, credentialName: s", Fine),
            ("mode: PASSTHROUGH", Fine),
            ("mode: PASSTHROUGH, credentialName: s", Warns("tls")),
            ("mode: PASSTHROUGH, caCrl: d", Warns("tls")),
            ("mode: AUTO_PASSTHROUGH, serverCertificate: a", Warns("tls")),
            ("mode: ISTIO_MUTUAL", Fine),
            ("mode: ISTIO_MUTUAL, serverCertificate: a", Refused("tls.serverCertificate")),
            ("mode: ISTIO_MUTUAL, privateKey: a", Refused("tls.privateKey")),
            ("mode: ISTIO_MUTUAL, caCertificates: a", Refused("tls.caCertificates")),
            ("mode: ISTIO_MUTUAL, credentialName: a", Refused("tls.credentialName")),
            ("mode: ISTIO_MUTUAL, credentialNames: [a]", Refused("tls.credentialNames")),
            ("mode: ISTIO_MUTUAL, tlsCertificates: [{}]", Refused("tls.tlsCertificates")),
            ("mode: MAYBE", Refused("tls.mode")),
        ],
    );
}

#[test]
fn gw_04_versions_and_ciphers() {
    gateway(
        "{servers: [{hosts: [a.b], port: {number: 443, name: a, protocol: HTTPS}, \
          tls: {mode: SIMPLE, credentialName: s, $}}]}",
        &[
            ("minProtocolVersion: TLSV1_2", Fine),
            ("minProtocolVersion: TLSV1_1", Warns("tls.minProtocolVersion")),
            ("minProtocolVersion: TLSV1_0, cipherSuites: [AES128-SHA]", Fine),
            (
                "cipherSuites: [ECDHE-RSA-AES256-GCM-SHA384, '-AES128-SHA', ALL, '[AES128-SHA|AES256-SHA]']",
                Fine,
            ),
            ("cipherSuites: [ROT13]", Warns("tls.cipherSuites[0]")),
            ("cipherSuites: [AES128-SHA, AES128-SHA]", Warns("tls.cipherSuites[1]")),
        ],
    );
}
