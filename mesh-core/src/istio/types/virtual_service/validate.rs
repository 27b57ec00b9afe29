//! What Istio's `ValidateVirtualService` refuses and warns about.

mod http;
mod unreachable;

pub(super) use http::GRPC_STATUSES;

use super::{
    Destination, L4MatchAttributes, RouteDestination, TcpRoute, TlsMatchAttributes, TlsRoute, VirtualService,
};
use crate::istio::findings::{Findings, Validate};
use crate::istio::types::check::{self, ExportToOf};
use crate::istio::types::target;

/// The gateway that stands for all sidecars.
const MESH: &str = "mesh";

impl Validate for VirtualService {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        let delegate = self.hosts.is_empty();
        if delegate {
            for (field, present) in [
                ("gateways", !self.gateways.is_empty()),
                ("tls", !self.tls.is_empty()),
                ("tcp", !self.tcp.is_empty()),
            ] {
                if present {
                    out.error(field, format!("a delegate, which has no hosts, must not have {field}"));
                }
            }
        }
        check::gateway_names(out, "gateways", &self.gateways);
        self.validate_hosts(out);
        if self.http.is_empty() && self.tls.is_empty() && self.tcp.is_empty() {
            out.error("", "http, tls or tcp is required");
        }
        for (index, route) in self.http.iter().enumerate() {
            out.item("http", index, |out| http::route(out, route, delegate, self.is_for_gateways()));
        }
        for (index, route) in self.tls.iter().enumerate() {
            out.item("tls", index, |out| tls_route(out, route, self));
        }
        for (index, route) in self.tcp.iter().enumerate() {
            out.item("tcp", index, |out| tcp_route(out, route));
        }
        let namespace = out.subject().namespace.clone();
        check::export_to(out, "exportTo", &self.export_to, &namespace, ExportToOf::Other);
        unreachable::http(out, &self.http);
        unreachable::tcp(out, &self.tcp);
        unreachable::tls(out, &self.tls);
    }
}

impl VirtualService {
    /// Whether no sidecar is among the gateways.
    fn is_for_gateways(&self) -> bool {
        !self.gateways.is_empty() && !self.gateways.iter().any(|gateway| gateway == MESH)
    }

    fn validate_hosts(&self, out: &mut Findings) {
        let for_gateways = self.is_for_gateways();
        let by_sni =
            self.tls.iter().flat_map(|route| &route.matches).any(|matches| !matches.sni_hosts.is_empty());
        let mut valid = true;
        for (index, host) in self.hosts.iter().enumerate() {
            let at = format!("hosts[{index}]");
            let judged = host_name(host, for_gateways && by_sni);
            match judged {
                Err(_) if check::ip(host).is_ok() => {
                    if self.gateways.iter().all(|gateway| gateway == MESH) {
                        out.warning(&at, format!("the IP address {host:?} is a host only at a gateway"));
                    }
                }
                Ok(()) if !for_gateways && host == "*" => {
                    out.error(&at, "\"*\" is not allowed for the mesh gateway");
                    valid = false;
                }
                judged => valid &= out.check(&at, judged),
            }
        }
        if !valid {
            return;
        }
        let hosts: Vec<String> = self.hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
        for (index, host) in hosts.iter().enumerate() {
            if let Some(before) = hosts[..index].iter().find(|before| overlap(before, host)) {
                out.error(&format!("hosts[{index}]"), format!("{host:?} and {before:?} overlap"));
            }
        }
    }
}

/// A host, or a name that istiod makes for SNI routing between clusters (`outbound_.80_.v1_.host`): it needs a digit in
/// the place of the port, and a letter in that of the host.
fn host_name(host: &str, sni: bool) -> check::Checked {
    let Some(rest) = host.strip_prefix("outbound_").filter(|_| sni) else {
        return check::wildcard_domain(host);
    };
    let mut parts = rest.split('_');
    let (port, name) = (parts.next().unwrap_or_default(), parts.nth(1).unwrap_or_default());
    if port.contains(|c: char| c.is_ascii_digit()) && name.contains(|c: char| c.is_ascii_alphabetic()) {
        return Ok(());
    }
    Err(format!("{host:?} must be of the form outbound_.<port>_._.<hostname>"))
}

/// Whether some name matches both hosts, which are in lower case.
fn overlap(a: &str, b: &str) -> bool {
    match (a.strip_prefix('*'), b.strip_prefix('*')) {
        (None, None) => a == b,
        (Some(suffix), None) => b.ends_with(suffix),
        (None, Some(suffix)) => a.ends_with(suffix),
        (Some(a), Some(b)) => a.ends_with(b) || b.ends_with(a),
    }
}

/// Whether every name that `inner` matches, `outer` matches.
fn is_within(inner: &str, outer: &str) -> bool {
    let (inner, outer) = (inner.to_ascii_lowercase(), outer.to_ascii_lowercase());
    match (inner.strip_prefix('*'), outer.strip_prefix('*')) {
        (_, None) => inner == outer,
        (None, Some(suffix)) => inner.ends_with(suffix),
        (Some(inner), Some(suffix)) => inner.ends_with(suffix),
    }
}

fn tls_route(out: &mut Findings, route: &TlsRoute, service: &VirtualService) {
    if route.matches.is_empty() {
        out.error("match", "a TLS route needs a match");
    }
    for (index, matches) in route.matches.iter().enumerate() {
        out.item("match", index, |out| tls_match(out, matches, service));
    }
    destinations(out, &route.route, "TLS");
}

fn tls_match(out: &mut Findings, matches: &TlsMatchAttributes, service: &VirtualService) {
    if matches.sni_hosts.is_empty() {
        out.error("sniHosts", "a TLS match needs a server name");
    }
    for (index, name) in matches.sni_hosts.iter().enumerate() {
        let at = format!("sniHosts[{index}]");
        match host_name(name, service.is_for_gateways()) {
            Err(_) if check::ip(name).is_ok() => {
                out.warning(
                    &at,
                    format!("{name:?} is an IP address, which clients do not send as server name"),
                );
            }
            Err(reason) => out.error(&at, reason),
            Ok(()) if service.hosts.iter().any(|host| is_within(name, host)) => {}
            Ok(()) => out.error(&at, format!("{name:?} is not within the hosts of the virtual service")),
        }
    }
    for (index, subnet) in matches.destination_subnets.iter().enumerate() {
        out.check(&format!("destinationSubnets[{index}]"), check::ip_or_cidr(subnet));
    }
    if matches.port != 0 {
        out.check("port", check::port(matches.port));
    }
    check::labels(out, "sourceLabels", &matches.source_labels);
    check::gateway_names(out, "gateways", &matches.gateways);
}

fn tcp_route(out: &mut Findings, route: &TcpRoute) {
    for (index, matches) in route.matches.iter().enumerate() {
        out.item("match", index, |out| l4_match(out, matches));
    }
    destinations(out, &route.route, "TCP");
}

fn l4_match(out: &mut Findings, matches: &L4MatchAttributes) {
    for (index, subnet) in matches.destination_subnets.iter().enumerate() {
        out.check(&format!("destinationSubnets[{index}]"), check::ip_or_cidr(subnet));
    }
    if matches.port != 0 {
        out.check("port", check::port(matches.port));
    }
    check::labels(out, "sourceLabels", &matches.source_labels);
    check::gateway_names(out, "gateways", &matches.gateways);
}

fn destinations(out: &mut Findings, routes: &[RouteDestination], kind: &str) {
    if routes.is_empty() {
        out.error("route", format!("a {kind} route needs a destination"));
    }
    for (index, route) in routes.iter().enumerate() {
        out.item("route", index, |out| {
            required_destination(out, route.destination.as_ref());
            weight(out, route.weight);
        });
    }
    total_weight(out, routes.iter().map(|route| route.weight));
}

fn required_destination(out: &mut Findings, to: Option<&Destination>) {
    match to {
        None => out.error("destination", "is required"),
        Some(to) => out.within("destination", |out| destination(out, to)),
    }
}

/// A destination, whose path is the current one.
pub(in crate::istio) fn destination(out: &mut Findings, to: &Destination) {
    if to.host == "*" {
        out.error("host", "\"*\" is not a destination");
    } else {
        out.check("host", check::wildcard_domain(&to.host));
    }
    if !to.subset.is_empty() {
        out.check("subset", check::dns1123_label(&to.subset));
    }
    if let Some(port) = &to.port {
        out.check("port.number", check::port(port.number));
    }
}

fn weight(out: &mut Findings, weight: i32) {
    if weight < 0 {
        out.error("weight", format!("weight {weight} must not be negative"));
    }
}

/// With more than one destination, somebody must get something (VS-R02).
fn total_weight(out: &mut Findings, weights: impl ExactSizeIterator<Item = i32>) {
    if weights.len() > 1 && weights.map(i64::from).sum::<i64>() == 0 {
        out.error("route", "the weights are 0 in sum");
    }
}
