//! Kubernetes' secrets among the configuration.

use std::collections::BTreeMap;

use mesh_core::config::{Compile, CompileContext, Rejected};
use mesh_core::diagnostics::Diagnostics;
use mesh_core::istio::ResourceSet;
use mesh_core::istio::types::secret::Secret;

use crate::secret::SecretData;

/// The secrets of the workload's own namespace, by name: as with Istio, no other namespace's are its business.
#[derive(Clone, Debug, Default)]
pub struct Secrets(BTreeMap<String, Secret>);

impl Secrets {
    /// What the secret of this name has, with the authorities that `NAME-cacert` has for it; `None` when there is
    /// neither.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<SecretData> {
        let (own, authorities) = (self.0.get(name), self.0.get(&SecretData::authorities_of(name)));
        (own.is_some() || authorities.is_some()).then(|| {
            SecretData::read(
                |key| own.and_then(|secret| secret.value(key)),
                |key| authorities.and_then(|secret| secret.value(key)),
            )
        })
    }
}

impl Compile<ResourceSet> for Secrets {
    fn compile(set: &ResourceSet, cx: &CompileContext, _: &mut Diagnostics) -> Result<Self, Rejected> {
        let own = set.secrets().iter().filter(|secret| secret.meta.namespace == cx.workload.namespace);
        Ok(Self(own.map(|secret| (secret.meta.name.clone(), secret.spec.clone())).collect()))
    }

    fn closed(_: &CompileContext) -> Self {
        Self::default()
    }
}
