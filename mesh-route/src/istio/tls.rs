//! How the transport to a destination is secured: what its DestinationRule says (DR-TLS01, DR-TLS02), or else the mesh's
//! own mutual TLS wherever both sides have an identity (DR-TLS03).

use std::sync::Arc;

use mesh_core::istio::effective::destination_rule::EffectivePolicy;
use mesh_core::istio::types::destination_rule::{ClientTlsMode, ClientTlsSettings};
use mesh_core::registry::{Service, ServicePort};
use mesh_core::{ClientTls, Credential, CredentialFiles, UpstreamTls};

use super::mesh::Mesh;

/// How a cluster is secured. `Auto` is decided for each endpoint.
pub(super) fn upstream(
    policy: &EffectivePolicy<'_>,
    mesh: &Mesh<'_>,
    service: &Service,
    port: &ServicePort,
    subset: Option<&str>,
) -> UpstreamTls {
    let Some(settings) = policy.tls else {
        // Without an identity of our own there is nothing to show.
        let auto = mesh.config.auto_mtls() && mesh.cx.transport.has_identity;
        if !auto {
            return UpstreamTls::Disable;
        }
        return UpstreamTls::Auto(Arc::new(of_the_mesh(None, service, port, subset)));
    };
    match settings.mode {
        ClientTlsMode::Disable => UpstreamTls::Disable,
        ClientTlsMode::IstioMutual => {
            UpstreamTls::Tls(Arc::new(of_the_mesh(Some(settings), service, port, subset)))
        }
        ClientTlsMode::Simple | ClientTlsMode::Mutual => {
            UpstreamTls::Tls(Arc::new(of_the_outside(settings, service)))
        }
    }
}

/// Mutual TLS with the mesh's identities. The server name is the one by which Istio's gateways pass such connections on.
fn of_the_mesh(
    settings: Option<&ClientTlsSettings>,
    service: &Service,
    port: &ServicePort,
    subset: Option<&str>,
) -> ClientTls {
    let said = settings.map(|settings| settings.sni.clone()).filter(|sni| !sni.is_empty());
    let sni = said.unwrap_or_else(|| {
        format!("outbound_.{}_.{}_.{}", port.number, subset.unwrap_or_default(), service.host)
    });
    ClientTls {
        credential: Credential::Mesh,
        sni: Some(sni),
        host: service.host.to_string(),
        subject_alt_names: names(settings, service),
        insecure_skip_verify: false,
    }
}

fn of_the_outside(settings: &ClientTlsSettings, service: &Service) -> ClientTls {
    let credential = if settings.credential_name.is_empty() {
        Credential::Files(CredentialFiles {
            certificate: settings.client_certificate.clone(),
            key: settings.private_key.clone(),
            roots: settings.ca_certificates.clone(),
            revoked: settings.ca_crl.clone(),
        })
    } else {
        Credential::Secret(settings.credential_name.clone())
    };
    let host = service.host.to_string();
    let sni = if settings.sni.is_empty() { host.clone() } else { settings.sni.clone() };
    ClientTls {
        credential,
        // A wildcard is no name that could be asked for.
        sni: Some(sni).filter(|sni| !sni.starts_with('*')),
        host,
        subject_alt_names: names(Some(settings), service),
        insecure_skip_verify: settings.insecure_skip_verify.unwrap_or(false),
    }
}

/// The names of the rule come before those of the service.
fn names(settings: Option<&ClientTlsSettings>, service: &Service) -> Vec<String> {
    let said = settings.map(|settings| settings.subject_alt_names.as_slice()).unwrap_or_default();
    if said.is_empty() { service.subject_alt_names.clone() } else { said.to_vec() }
}
