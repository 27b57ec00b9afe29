//! `networking.istio.io` WorkloadEntry (WE-01), which is also an endpoint of a ServiceEntry and the template of a
//! WorkloadGroup.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::check;
use super::gateway::UNIX_PREFIX;
use super::target;
use crate::istio::findings::{Findings, Validate};

/// One workload that Kubernetes does not know: a VM, or an endpoint outside the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadEntry {
    /// An IP address, a fully qualified name (with DNS resolution), or `unix:///absolute/path`; may be empty when
    /// `network` is set.
    pub address: String,
    /// Port of the workload by name of the service's port; beats the service's `targetPort`.
    pub ports: BTreeMap<String, u32>,
    /// Labels, for subsets and selectors.
    pub labels: BTreeMap<String, String>,
    /// The L3 network that the address belongs to.
    pub network: String,
    /// `region/zone/subzone`.
    pub locality: String,
    /// Share of the traffic among the endpoints; 0 is unset, which counts as 1 (DR-LB09).
    pub weight: u32,
    /// The service account whose identity the workload has.
    pub service_account: String,
}

impl Validate for WorkloadEntry {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        self.validate_as_endpoint(out, None, true);
    }
}

impl WorkloadEntry {
    /// Judges an endpoint of a service whose ports have these names (`None`: the service is not known).
    pub(crate) fn validate_as_endpoint(
        &self,
        out: &mut Findings,
        service_ports: Option<&BTreeSet<&str>>,
        names_allowed: bool,
    ) {
        if self.address.is_empty() {
            if self.network.is_empty() {
                out.error("address", "address is required, unless network is set");
                return;
            }
            out.warning("address", format!("address is unset with network {:?}", self.network));
        }
        if self.validate_socket(out) {
            if service_ports.is_some_and(|ports| ports.len() != 1) {
                out.error("address", "a unix domain socket needs a service with exactly one port");
            }
        } else if !self.address.is_empty() && check::ip(&self.address).is_err() {
            if !names_allowed {
                out.error("address", format!("{:?} is not a valid IP address", self.address));
            } else if check::fqdn(&self.address).is_err() {
                out.error("address", not_an_address(&self.address));
            }
        }
        self.validate_ports(out, service_ports);
        self.validate_limits(out);
    }

    /// Judges an endpoint of a service that is resolved by DNS: an address or a name, never a socket.
    pub(crate) fn validate_as_dns_endpoint(&self, out: &mut Findings, service_ports: &BTreeSet<&str>) {
        if check::ip(&self.address).is_err() && check::fqdn(&self.address).is_err() {
            out.error("address", not_an_address(&self.address));
        }
        self.validate_ports(out, Some(service_ports));
        self.validate_limits(out);
    }

    /// Judges the template of a group, in which the address is filled in later.
    pub(crate) fn validate_as_template(&self, out: &mut Findings) {
        self.validate_socket(out);
        self.validate_ports(out, None);
        self.validate_limits(out);
    }

    /// The labels, and how long and how many the schema lets things be.
    fn validate_limits(&self, out: &mut Findings) {
        for (field, text, most) in [
            ("address", &self.address, 256),
            ("network", &self.network, 2048),
            ("locality", &self.locality, 2048),
            ("serviceAccount", &self.service_account, 253),
        ] {
            check::at_most(out, field, "characters", text.chars().count(), most);
        }
        check::at_most(out, "ports", "ports", self.ports.len(), 128);
        check::at_most(out, "labels", "labels", self.labels.len(), 256);
        check::labels(out, "labels", &self.labels);
    }

    /// Judges the address if it is a unix domain socket, and says whether it is one.
    fn validate_socket(&self, out: &mut Findings) -> bool {
        let Some(path) = self.address.strip_prefix(UNIX_PREFIX) else { return false };
        out.check("address", check::unix_address(path));
        if !self.ports.is_empty() {
            out.error("ports", "a unix domain socket has no ports");
        }
        true
    }

    fn validate_ports(&self, out: &mut Findings, service_ports: Option<&BTreeSet<&str>>) {
        out.within("ports", |out| {
            for (name, port) in &self.ports {
                let at = check::key_path(name);
                if service_ports.is_some_and(|ports| !ports.contains(name.as_str())) {
                    out.error(&at, format!("the service entry has no port of the name {name:?}"));
                }
                out.check(&at, port_name(name));
                out.check(&at, check::port(*port));
            }
        });
    }
}

/// A name of a port: a DNS label.
///
/// # Errors
/// It is not one.
pub(crate) fn port_name(name: &str) -> check::Checked {
    if check::is_dns1123_label(name) { Ok(()) } else { Err(format!("invalid port name {name:?}")) }
}

fn not_an_address(address: &str) -> String {
    format!("{address:?} is not a valid FQDN or an IP address")
}
