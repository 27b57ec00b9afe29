//! Which kinds are loaded, and where they are kept.
//!
//! **Adding a kind** is one line in the table below and two things that the compiler then asks for: the struct
//! derives `Deserialize` (with `#[serde(rename_all = "camelCase", default)]`) and implements
//! [`Validate`](super::findings::Validate). `Spec` says that the struct is the resource's `spec`; `Root` says that it
//! is the whole document beside `apiVersion`, `kind`, `metadata` and `status` (as Kubernetes' `EndpointSlice` is).
//! The versions that a group may have are in [`super::envelope::GROUPS`].

use serde::de::DeserializeOwned;

use super::findings::Validate;
use super::resource_set::{Body, Document, Resource, ResourceSet};
use super::types;

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
        }

        impl Stores {
            /// Puts the oldest first and gives back what the vectors grew beyond need.
            pub(super) fn finish(&mut self) {
                $(
                    self.$field.sort_by(|a, b| a.meta.age_key().cmp(b.meta.age_key()));
                    self.$field.shrink_to_fit();
                )*
            }

            pub(super) fn len(&self) -> usize {
                [$(self.$field.len()),*].into_iter().sum()
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
}
