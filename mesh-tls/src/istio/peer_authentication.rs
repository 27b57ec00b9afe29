//! PeerAuthentication, and the authentication policies of Istio 1.1, compiled into the modes of the inbound ports. What
//! selects whom is resolved in mesh-core.

use mesh_core::config::{Compile, CompileContext, Rejected, Role};
use mesh_core::diagnostics::Diagnostics;
use mesh_core::istio::ResourceSet;
use mesh_core::istio::effective::legacy_authentication::is_known;
use mesh_core::istio::effective::peer_authentication::MtlsModes;
use mesh_core::istio::types::peer_authentication::MutualTlsMode;
use mesh_core::server::DownstreamTls;

use crate::inbound::InboundTls;

const HONOURED: &[&str] = &["spec.selector", "spec.mtls", "spec.portLevelMtls"];

/// What is enforced of the policies of Istio 1.1: mTLS of peers. Tokens of end users are not, and are reported.
const HONOURED_LEGACY: &[&str] = &["spec.peers[*].mtls", "spec.peerIsOptional"];

impl Compile<ResourceSet> for InboundTls {
    fn compile(set: &ResourceSet, cx: &CompileContext, diags: &mut Diagnostics) -> Result<Self, Rejected> {
        // Without an identity nothing can be terminated: what is demanded then lets nobody in, and is reported.
        if cx.transport.terminates {
            for policy in set.peer_authentications() {
                diags.honour_all(policy.doc, HONOURED);
            }
            for policy in set.mesh_policies() {
                diags.honour_all(policy.doc, HONOURED_LEGACY);
            }
            for policy in set.authentication_policies() {
                diags.honour_all(policy.doc, HONOURED_LEGACY);
                if is_known(set, policy, &cx.workload) {
                    diags.honour(policy.doc, "spec.targets");
                }
            }
        }
        if cx.role == Role::Gateway {
            // The servers of a gateway say themselves what they accept.
            return Ok(Self::all(DownstreamTls::Disable));
        }
        let root = set.mesh_config().root_namespace();
        let modes = MtlsModes::of(set, &cx.workload, root);
        let mode = |of: MutualTlsMode| mode(of, cx.transport.terminates);
        let all = Self::all(mode(modes.default_mode()));
        Ok(modes.ports().fold(all, |all, (port, of_port)| all.port(port, mode(of_port))))
    }

    fn closed(_: &CompileContext) -> Self {
        Self::default()
    }
}

const fn mode(mode: MutualTlsMode, terminates: bool) -> DownstreamTls {
    match mode {
        MutualTlsMode::Permissive | MutualTlsMode::Unset if !terminates => DownstreamTls::Disable,
        MutualTlsMode::Disable => DownstreamTls::Disable,
        MutualTlsMode::Strict => DownstreamTls::Strict,
        // Nothing that is resolved is unset; at the top it means the same.
        MutualTlsMode::Permissive | MutualTlsMode::Unset => DownstreamTls::Permissive,
    }
}
