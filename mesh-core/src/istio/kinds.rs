//! Which kinds are loaded, and where they are kept.
//!
//! **Adding a kind** is one line in the table below and two things that the compiler then asks for: the struct
//! derives `Deserialize` (with `#[serde(rename_all = "camelCase", default)]`) and implements
//! [`Validate`](super::findings::Validate). `Spec` says that the struct is the resource's `spec`; `Root` says that it
//! is the whole document beside `apiVersion`, `kind`, `metadata` and `status` (as Kubernetes' `EndpointSlice` is).
//! The versions that a group may have are in [`super::envelope::GROUPS`].

use serde::de::DeserializeOwned;

use super::document::{Body, Document};
use super::findings::Validate;
use super::resource_set::{Resource, ResourceSet};
use super::types;
use super::types::mixer::{MixerResource, MixerRole};

/// A kind of resource that the set can hold.
pub trait Kind: DeserializeOwned + Validate {
    /// The API group; empty for Kubernetes' core group.
    const GROUP: &'static str;
    /// The kind.
    const KIND: &'static str;

    /// Every resource of this kind, oldest first.
    fn all(set: &ResourceSet) -> &[Resource<Self>];
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $field:ident: $type:ty => $group:literal, $kind:literal, $body:ident;)*) => {
        /// The resources by kind.
        #[derive(Debug, Default)]
        pub(super) struct Stores {
            $($field: Vec<Resource<$type>>,)*
            mixer: Vec<Resource<MixerResource>>,
        }

        impl Stores {
            /// Puts the oldest first and gives back what the vectors grew beyond need.
            pub(super) fn finish(&mut self) {
                $(
                    self.$field.sort_by(|a, b| a.meta.age_key().cmp(b.meta.age_key()));
                    self.$field.shrink_to_fit();
                )*
                self.mixer.sort_by(|a, b| a.meta.age_key().cmp(b.meta.age_key()));
            }

            pub(super) fn len(&self) -> usize {
                [$(self.$field.len(),)* self.mixer.len()].into_iter().sum()
            }
        }

        impl ResourceSet {
            $(
                $(#[$doc])*
                #[must_use]
                pub fn $field(&self) -> &[Resource<$type>] {
                    &self.stores.$field
                }
            )*

            /// The resources of Istio 1.1's Mixer, of all of its kinds, oldest first.
            #[must_use]
            pub fn mixer(&self) -> &[Resource<MixerResource>] {
                &self.stores.mixer
            }
        }

        $(
            impl Kind for $type {
                const GROUP: &'static str = $group;
                const KIND: &'static str = $kind;

                fn all(set: &ResourceSet) -> &[Resource<Self>] {
                    set.$field()
                }
            }
        )*

        /// What reads a document of this group and kind into the stores.
        pub(super) fn loader(group: &str, kind: &str) -> Option<fn(Document<'_, '_>, &mut Stores)> {
            match (group, kind) {
                $(($group, $kind) => Some(|document, stores| stores.$field.extend(document.read(Body::$body))),)*
                ("config.istio.io", kind) if MixerRole::of(kind).is_some() => {
                    Some(|document, stores| stores.mixer.extend(document.read_mixer()))
                }
                _ => None,
            }
        }
    };
}

kinds! {
    /// Virtual services, oldest first.
    virtual_services: types::virtual_service::VirtualService => "networking.istio.io", "VirtualService", Spec;
    /// Destination rules, oldest first.
    destination_rules: types::destination_rule::DestinationRule => "networking.istio.io", "DestinationRule", Spec;
    /// Gateways, oldest first.
    gateways: types::gateway::Gateway => "networking.istio.io", "Gateway", Spec;
    /// Service entries, oldest first.
    service_entries: types::service_entry::ServiceEntry => "networking.istio.io", "ServiceEntry", Spec;
    /// Workload entries, oldest first.
    workload_entries: types::workload_entry::WorkloadEntry => "networking.istio.io", "WorkloadEntry", Spec;
    /// Workload groups, oldest first.
    workload_groups: types::workload_group::WorkloadGroup => "networking.istio.io", "WorkloadGroup", Spec;
    /// Sidecars, oldest first.
    sidecars: types::sidecar::Sidecar => "networking.istio.io", "Sidecar", Spec;
    /// Envoy filters, which are not applied, oldest first.
    envoy_filters: types::envoy_filter::EnvoyFilter => "networking.istio.io", "EnvoyFilter", Spec;
    /// Proxy configurations, oldest first.
    proxy_configs: types::proxy_config::ProxyConfig => "networking.istio.io", "ProxyConfig", Spec;
    /// Authorization policies, oldest first.
    authorization_policies: types::authorization_policy::AuthorizationPolicy => "security.istio.io", "AuthorizationPolicy", Spec;
    /// Peer authentications, oldest first.
    peer_authentications: types::peer_authentication::PeerAuthentication => "security.istio.io", "PeerAuthentication", Spec;
    /// Request authentications, oldest first.
    request_authentications: types::request_authentication::RequestAuthentication => "security.istio.io", "RequestAuthentication", Spec;
    /// Telemetry settings, oldest first.
    telemetries: types::telemetry::Telemetry => "telemetry.istio.io", "Telemetry", Spec;
    /// WebAssembly plugins, oldest first.
    wasm_plugins: types::wasm_plugin::WasmPlugin => "extensions.istio.io", "WasmPlugin", Spec;
    /// WebAssembly and Lua extensions, oldest first.
    traffic_extensions: types::traffic_extension::TrafficExtension => "extensions.istio.io", "TrafficExtension", Spec;
    /// Kubernetes' services, oldest first.
    services: types::kubernetes::ServiceSpec => "", "Service", Spec;
    /// Kubernetes' endpoints, oldest first.
    endpoints: types::kubernetes::Endpoints => "", "Endpoints", Root;
    /// Kubernetes' secrets, oldest first.
    secrets: types::secret::Secret => "", "Secret", Root;
    /// Kubernetes' endpoint slices, oldest first.
    endpoint_slices: types::kubernetes::EndpointSlice => "discovery.k8s.io", "EndpointSlice", Root;
    /// Istio 1.1's configuration of authorization, under its older name, oldest first.
    rbac_configs: types::rbac::RbacConfig => "rbac.istio.io", "RbacConfig", Spec;
    /// Istio 1.1's configuration of authorization, oldest first.
    cluster_rbac_configs: types::rbac::ClusterRbacConfig => "rbac.istio.io", "ClusterRbacConfig", Spec;
    /// Istio 1.1's roles, oldest first.
    service_roles: types::rbac::ServiceRole => "rbac.istio.io", "ServiceRole", Spec;
    /// Istio 1.1's role bindings, oldest first.
    service_role_bindings: types::rbac::ServiceRoleBinding => "rbac.istio.io", "ServiceRoleBinding", Spec;
    /// Istio 1.1's authentication policies, oldest first.
    authentication_policies: types::authentication::AuthenticationPolicy => "authentication.istio.io", "Policy", Spec;
    /// Istio 1.1's authentication policies of the mesh, oldest first.
    mesh_policies: types::authentication::MeshPolicy => "authentication.istio.io", "MeshPolicy", Spec;
    /// Scenarios of the simulator, a kind of ours, oldest first.
    scenarios: types::scenario::Scenario => "mesh.rs", "Scenario", Spec;
}
