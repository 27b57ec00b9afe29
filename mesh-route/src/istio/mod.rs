//! Istio's resources compiled into the routing models.
//!
//! No type of a resource is defined here, and no request is seen: this is the meaning of VirtualService,
//! DestinationRule, ServiceEntry, Gateway, Sidecar and Kubernetes' services, as a pure function of the resources and
//! of the workload they are compiled for. Each part marks the fields that it gives meaning to; what is left is
//! reported as not enforced.

mod annotations;
mod attach;
mod canary;
mod clusters;
mod cors;
mod delegate;
mod fault;
mod gateway;
mod honour;
mod http;
mod l4;
mod load_balancer;
mod mesh;
mod mirror;
mod outbound;
mod policy;
mod retry;
mod tls;
mod zone_aware;

use mesh_core::Direction;
use mesh_core::config::{Compile, CompileContext, Rejected, Role};
use mesh_core::diagnostics::Diagnostics;
use mesh_core::istio::ResourceSet;

use crate::table::{KeyedBy, RouteTable};

/// The outbound routes of a sidecar, or the routes of a gateway.
impl Compile<ResourceSet> for RouteTable {
    fn compile(set: &ResourceSet, cx: &CompileContext, diags: &mut Diagnostics) -> Result<Self, Rejected> {
        honour::honour(set, cx, diags);
        fault::annotations(set, diags);
        load_balancer::check(set, diags);
        mirror::check(set, diags);
        attach::check(set, diags);
        let mesh = mesh::Mesh::new(set, cx);
        canary::check(&mesh, diags);
        let mut clusters = clusters::Clusters::new(&mesh);
        let mut table = match cx.role {
            Role::Sidecar => outbound::table(&mesh, &mut clusters, diags),
            Role::Gateway => gateway::table(&mesh, &mut clusters, diags),
        };
        table.set_clusters(clusters.into_all());
        Ok(table)
    }

    fn closed(cx: &CompileContext) -> Self {
        Self::empty(match cx.role {
            Role::Sidecar => KeyedBy::from(Direction::Outbound),
            Role::Gateway => KeyedBy::from(Direction::Gateway),
        })
    }
}
