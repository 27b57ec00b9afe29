//! The command line of both binaries: a contract that scripts rely on.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser};
use mesh_core::Compat;
use mesh_core::config::{CompileContext, Role, Workload};
use mesh_core::vendor::Prefix;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Where the outbound listener binds when it is not told.
pub const OUTBOUND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15001);
/// Where an inbound listener binds when only its application is told.
pub const INBOUND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15006);
/// Where the application listens when only the inbound listener is told.
pub const APP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

/// A service mesh sidecar: enforces Istio's YAML on the requests of one workload.
///
/// Without --config it runs a demo: an in-process Bookinfo whose reviews are split 90/10 between v1 and v3.
#[derive(Clone, Debug, Parser)]
#[command(name = "sidecar", version, max_term_width = 110, after_help = SCENARIO)]
pub struct Sidecar {
    /// Client side: where the workload sends its requests
    #[arg(long, value_name = "ADDR", default_value_t = OUTBOUND)]
    pub outbound: SocketAddr,

    /// Server side: where requests for the workload arrive; repeatable, in pairs with --app [default: 127.0.0.1:15006
    /// when --app is given]
    #[arg(long, value_name = "ADDR")]
    pub inbound: Vec<SocketAddr>,

    /// Server side: where the application listens; repeatable, in pairs with --inbound [default: 127.0.0.1:8080 when
    /// --inbound is given]
    #[arg(long, value_name = "ADDR")]
    pub app: Vec<SocketAddr>,

    /// Run the embedded demo (what happens without any --config)
    #[arg(long)]
    pub demo: bool,

    /// Instead of serving, send the requests that /mirror_diff?captured wrote to --against, print where the answers differ
    /// from the captured ones, and exit 1 if they do
    #[arg(long, value_name = "FILE", requires = "against")]
    pub replay: Option<PathBuf>,

    /// The version that --replay asks
    #[arg(long, value_name = "URL", requires = "replay")]
    pub against: Option<http::Uri>,

    /// Compare not with the captured answers, but with those of this version; it is asked twice, to learn what is noise
    #[arg(long, value_name = "URL", requires = "replay")]
    pub baseline: Option<http::Uri>,

    /// What both binaries take.
    #[command(flatten)]
    pub common: Common,
}

/// A service mesh gateway: serves the Gateway resources that select it.
#[derive(Clone, Debug, Parser)]
#[command(name = "gateway", version, max_term_width = 110, after_help = SCENARIO)]
pub struct Gateway {
    /// The address that every server binds
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    pub bind: IpAddr,

    /// Bind another port than the one that the Gateway names; repeatable
    #[arg(long, value_name = "80=8080", value_parser = parse_port_mapping)]
    pub map_port: Vec<(u16, u16)>,

    /// What both binaries take.
    #[command(flatten)]
    pub common: Common,
}

/// What both binaries take.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// YAML file or directory (recursive, in name order), '-' is stdin; repeatable; watched for changes
    #[arg(long, value_name = "PATH")]
    pub config: Vec<PathBuf>,

    /// MeshConfig as istiod takes it [default: key "mesh" of a ConfigMap "istio" among --config, else Istio's defaults]
    #[arg(long, value_name = "PATH")]
    pub mesh_config: Option<PathBuf>,

    /// Admin endpoints: /ready /config_dump /clusters /listeners /certs /server_info /explain /canary /mirror_diff
    /// /stats/prometheus
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15000")]
    pub admin: SocketAddr,

    /// Also serve /stats/prometheus here (Istio's 15090)
    #[arg(long, value_name = "ADDR")]
    pub prometheus: Option<SocketAddr>,

    /// Also serve /healthz/ready, /stats/prometheus and /metrics (with the application's, as ISTIO_PROMETHEUS_ANNOTATIONS
    /// says), /app-health/ (as ISTIO_KUBE_APP_PROBERS says), and POST /drain and /quitquitquit here (Istio's 15020)
    #[arg(long, value_name = "ADDR")]
    pub status: Option<SocketAddr>,

    /// Also serve /healthz/ready here (Istio's 15021)
    #[arg(long, value_name = "ADDR")]
    pub health: Option<SocketAddr>,

    /// Compile the configuration, print every diagnostic, exit 1 on any error
    #[arg(long)]
    pub check: bool,

    /// Run a scenario against the configuration in virtual time, print what came of it, exit 1 when an expectation of
    /// it is not met
    #[arg(long, value_name = "SCENARIO.yaml", conflicts_with = "check")]
    pub simulate: Option<PathBuf>,

    /// How --simulate prints: text, or json with everything
    #[arg(long, value_name = "FORMAT", default_value = "text", requires = "simulate", value_parser = parse_format)]
    pub simulate_format: SimulateFormat,

    /// Unknown fields are warnings, not errors
    #[arg(long)]
    pub lenient: bool,

    /// Which Istio's semantics, where they changed: current or 1.1
    #[arg(long, value_name = "VERSION", default_value_t)]
    pub compat: Compat,

    /// What the headers of the proxies begin with in the place of x-envoy, as Envoy's bootstrap says it; the same for all
    /// proxies of a mesh
    #[arg(long, value_name = "PREFIX", default_value_t)]
    pub header_prefix: Prefix,

    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub workers: Option<u16>,

    /// How long listeners still accept after SIGTERM, while readiness fails; not longer than something is in flight
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    pub drain_time: Duration,

    /// When after SIGTERM whatever is still open is cut
    #[arg(long, value_name = "TIME", default_value = "45s", value_parser = humantime::parse_duration)]
    pub drain_deadline: Duration,

    /// One line per request in Istio's default text format; '-' is stdout [default: MeshConfig accessLogFile, else off]
    #[arg(long, value_name = "PATH|-")]
    pub access_log: Option<PathBuf>,

    /// What is logged to stderr: error, warn, info, debug, trace, or tracing's filter syntax
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = parse_log)]
    pub log: String,

    /// The namespace of this workload, and of documents that name none
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub namespace: String,

    /// The name of this workload
    #[arg(long, value_name = "NAME", default_value = "")]
    pub workload: String,

    /// The service account of this workload
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub service_account: String,

    /// The labels of this workload, which selectors look at [gateway default: istio=ingressgateway]
    #[arg(long, value_name = "K=V,...", value_parser = parse_labels)]
    pub labels: Option<Labels>,

    /// The identity of this workload: cert-chain.pem, key.pem and root-cert.pem, or tls.crt, tls.key and ca.crt; watched
    /// for renewal [default: no identity, and no mutual TLS]
    #[arg(long, value_name = "DIR")]
    pub identity_dir: Option<PathBuf>,

    /// The authority that signs the identity of this workload, with Istio's certificate service: mesh-ca, or istiod. Renewed
    /// in time; until the first certificate comes, whatever needs an identity is refused [default: no authority]
    #[arg(
        long,
        value_name = "https://HOST:PORT",
        conflicts_with = "identity_dir",
        requires = "bootstrap_token"
    )]
    pub ca: Option<String>,

    /// The token that proves to --ca who this workload is: of `mesh-ca token`, or Kubernetes' projected one; read anew for
    /// each certificate
    #[arg(long, value_name = "FILE", requires = "ca")]
    pub bootstrap_token: Option<PathBuf>,

    /// Whom to believe that it is --ca: its root-cert.pem; read anew for each certificate. Successors that it names are
    /// believed too, and a root that is taken out of the file is not [default: the authorities of the system]
    #[arg(long, value_name = "FILE", requires = "ca")]
    pub ca_root: Option<PathBuf>,

    /// The agent that gives this workload its identity, by the SPIFFE Workload API, as SPIRE's; without a value
    /// SPIFFE_ENDPOINT_SOCKET says where it is. --trust-domain is the one that is taken, else that of the first identity;
    /// until it comes, whatever needs an identity is refused [default: no agent]
    #[arg(
        long,
        value_name = "unix:///PATH",
        num_args = 0..=1,
        default_missing_value = "",
        conflicts_with_all = ["identity_dir", "ca"]
    )]
    pub spiffe_endpoint: Option<String>,

    /// Which of several identities of --spiffe-endpoint, by its SPIFFE ID or by the operator's hint [default: the first]
    #[arg(long, value_name = "spiffe://ID|HINT", requires = "spiffe_endpoint")]
    pub spiffe_svid: Option<String>,

    /// The name of this cluster, which istiod asks for (ISTIO_META_CLUSTER_ID)
    #[arg(long, value_name = "NAME", default_value = "Kubernetes")]
    pub cluster_id: String,

    /// Kubernetes secrets that credentialName may name beside those among --config, as DIR/NAME/tls.crt, tls.key, ca.crt;
    /// watched for renewal
    #[arg(long, value_name = "DIR")]
    pub secret_dir: Option<PathBuf>,

    /// The trust domain of this workload [default: MeshConfig trustDomain, else cluster.local]
    #[arg(long, value_name = "NAME")]
    pub trust_domain: Option<String>,

    /// The DNS suffix of the cluster's services
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub cluster_domain: String,
}

/// How a simulation prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimulateFormat {
    /// A table.
    Text,
    /// Everything, for programs.
    Json,
}

/// What `--help` says of scenarios.
const SCENARIO: &str = "\
A scenario for --simulate, with every field; but for duration, load[].rate and load[].host all may be left out.
Requests, endpoints and time are made up, the proxy is this one; the same seed gives the same report.

  apiVersion: mesh.rs/v1alpha1
  kind: Scenario
  metadata: {name: two-of-five-fail}
  spec:
    seed: 1
    duration: 120s             # requests are made for so long
    interval: 10s              # one row of the report
    drain: 15s                 # how long requests may take after that
    workers: 2
    config: [reviews.yaml]     # relative to this file; beside --config and other documents of this file
    load:                      # open loop
    - {name: a, rate: 100, arrivals: POISSON, host: reviews:9080, path: '/{user}', method: GET, http2: false,
       users: 10, headers: {x-user: '{user}'}, body: '', from: 0s, to: 60s, port: 80}   # EVEN; port of a gateway
    endpoints:                 # selected by addresses, host (in full), subset and labels; what comes later wins
    - latency: {exponential: {mean: 20ms}}               # or fixed: 20ms, or uniform: {min: 5ms, max: 15ms}
    - addresses: [10.0.0.1, '10.0.0.2:9080']
      script:
      - {from: 20s, to: 60s, latency: {fixed: 2s}, answers: [{percent: 30, status: 503}, {percent: 5, hang: true},
         {percent: 5, reset: BODY}, {grpcStatus: 14}]}   # reset: HEAD or BODY; without percent what is left
      - {from: 60s, to: 70s, connect: REFUSE}            # or HANG
    dns:
    - {name: reviews.example, from: 0s, addresses: [10.0.1.1]}
    reload:
    - {at: 60s, config: [reviews-v2.yaml]}               # in the place of spec.config
    expect:                    # any of success, failed, amplification, retries, p50, p90, p99, refused, ejections
    - {name: fine, load: a, from: 0s, to: 20s, success: '>= 99.5%', amplification: '<= 1.3', p99: '< 200ms'}
";

/// Labels as `k=v,...` gives them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels(pub BTreeMap<String, String>);

impl Sidecar {
    /// Whether the demo runs: asked for, or nothing else was.
    #[must_use]
    pub fn runs_demo(&self) -> bool {
        self.demo || (self.common.config.is_empty() && self.inbound.is_empty() && self.app.is_empty())
    }

    /// The inbound listeners with their applications.
    ///
    /// # Errors
    /// When there are several of one and not as many of the other.
    pub fn inbound_pairs(&self) -> Result<Vec<(SocketAddr, SocketAddr)>, String> {
        match (&self.inbound[..], &self.app[..]) {
            ([], []) => Ok(Vec::new()),
            ([inbound], []) => Ok(vec![(*inbound, APP)]),
            ([], [app]) => Ok(vec![(INBOUND, *app)]),
            (inbound, app) if inbound.len() == app.len() => {
                Ok(inbound.iter().copied().zip(app.iter().copied()).collect())
            }
            (inbound, app) => Err(format!(
                "--inbound and --app go in pairs: {} --inbound and {} --app were given",
                inbound.len(),
                app.len()
            )),
        }
    }
}

impl Common {
    /// Whom the configuration is compiled for.
    #[must_use]
    pub fn compile_context(&self, role: Role) -> CompileContext {
        let mut cx = CompileContext::new(role);
        let mut workload = Workload::default();
        workload.name.clone_from(&self.workload);
        workload.namespace.clone_from(&self.namespace);
        workload.service_account.clone_from(&self.service_account);
        workload.labels = match (&self.labels, role) {
            (Some(labels), _) => labels.0.clone(),
            (None, Role::Gateway) => BTreeMap::from([("istio".to_owned(), "ingressgateway".to_owned())]),
            (None, Role::Sidecar) => BTreeMap::new(),
        };
        cx.workload = workload;
        cx.compat = self.compat;
        cx.cluster_domain.clone_from(&self.cluster_domain);
        if let Some(trust_domain) = &self.trust_domain {
            cx.trust_domain.clone_from(trust_domain);
        }
        cx
    }

    /// How many workers to run.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        self.workers.map_or_else(
            || std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            usize::from,
        )
    }
}

fn parse_port_mapping(text: &str) -> Result<(u16, u16), String> {
    let (from, to) = text.split_once('=').ok_or("expected GATEWAY_PORT=BIND_PORT, as 80=8080")?;
    let port = |text: &str| text.parse::<u16>().map_err(|_| format!("`{text}` is not a port"));
    match port(from)? {
        0 => Err("a Gateway has no port 0".to_owned()),
        from => Ok((from, port(to)?)),
    }
}

/// What tracing's own reader takes for a target that logs everything, or for no level, is mostly a level misspelt: then
/// nothing at all would be logged, and nobody told.
pub(crate) fn parse_log(text: &str) -> Result<String, String> {
    for directive in text.split(',').map(str::trim) {
        // What names spans or fields has a grammar of its own.
        if text.contains(['[', ']', '{', '}']) {
            break;
        }
        let level = directive.split_once('=').map_or(directive, |(_, level)| level);
        if level.is_empty() || level.parse::<LevelFilter>().is_err() {
            return Err(format!(
                "`{level}` is no level: expected error, warn, info, debug, trace or off, or TARGET=LEVEL"
            ));
        }
    }
    EnvFilter::try_new(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

fn parse_format(text: &str) -> Result<SimulateFormat, String> {
    match text {
        "text" => Ok(SimulateFormat::Text),
        "json" => Ok(SimulateFormat::Json),
        _ => Err("known are text and json".to_owned()),
    }
}

fn parse_labels(text: &str) -> Result<Labels, String> {
    text.split(',')
        .filter(|pair| !pair.is_empty())
        .map(|pair| match pair.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(format!("`{pair}` is not KEY=VALUE")),
        })
        .collect::<Result<_, _>>()
        .map(Labels)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn sidecar(args: &[&str]) -> Sidecar {
        Sidecar::try_parse_from(std::iter::once(&"sidecar").chain(args)).unwrap()
    }

    #[test]
    fn the_command_lines_are_sound() {
        Sidecar::command().debug_assert();
        Gateway::command().debug_assert();
    }

    #[test]
    fn the_scenario_of_the_help_is_one() {
        let yaml: String = SCENARIO.lines().skip(2).map(|line| format!("{line}\n")).collect();
        let file = mesh_core::istio::SourceFile::new("help", yaml);
        let (set, found) =
            mesh_core::istio::ResourceSet::load(&[file], &mesh_core::istio::LoadOptions::default());
        assert!(found.is_empty() && set.scenarios().len() == 1, "{found}");
    }

    #[test]
    fn what_is_logged_is_a_level_or_tracings_filter_syntax() {
        for filter in
            ["warn", "INFO", "off", "info,mesh_route=debug", "warn,hyper=off", "[request{status=500}]=trace"]
        {
            assert_eq!(parse_log(filter).unwrap(), filter);
        }
        for filter in
            ["", "nonsense=", "nonsense", "warning", "info,", "info,hyper", "hyper=loud", "[request"]
        {
            assert!(parse_log(filter).is_err(), "{filter:?}");
        }
    }

    #[test]
    fn pt_01_the_ports_are_istios() {
        let args = sidecar(&[]);
        assert_eq!(args.outbound.to_string(), "127.0.0.1:15001");
        assert_eq!(args.common.admin.to_string(), "127.0.0.1:15000");
        assert_eq!(INBOUND.to_string(), "127.0.0.1:15006");
        // 15090, 15020 and 15021 are bound only when somebody asks for them.
        assert_eq!((args.common.prometheus, args.common.status, args.common.health), (None, None, None));
    }

    #[test]
    fn nothing_asked_for_is_the_demo() {
        assert!(sidecar(&[]).runs_demo());
        assert!(sidecar(&["--demo", "--config", "a.yaml"]).runs_demo());
        assert!(!sidecar(&["--config", "a.yaml"]).runs_demo());
        assert!(!sidecar(&["--app", "127.0.0.1:80"]).runs_demo());
    }

    #[test]
    fn inbound_and_app_go_in_pairs() {
        let pairs = |args: &[&str]| sidecar(args).inbound_pairs();
        assert_eq!(pairs(&[]), Ok(vec![]));
        assert_eq!(pairs(&["--inbound", "127.0.0.1:1"]), Ok(vec![("127.0.0.1:1".parse().unwrap(), APP)]));
        assert_eq!(pairs(&["--app", "127.0.0.1:2"]), Ok(vec![(INBOUND, "127.0.0.1:2".parse().unwrap())]));
        assert!(
            pairs(&["--inbound", "127.0.0.1:1", "--inbound", "127.0.0.1:2", "--app", "127.0.0.1:3"]).is_err()
        );
    }

    #[test]
    fn a_gateway_is_the_ingress_gateway_unless_told() {
        let gateway = Gateway::try_parse_from(["gateway", "--map-port", "80=8080"]).unwrap();
        assert_eq!(gateway.map_port, [(80, 8080)]);
        let cx = gateway.common.compile_context(Role::Gateway);
        assert_eq!(cx.workload.labels["istio"], "ingressgateway");
        let labelled = Gateway::try_parse_from(["gateway", "--labels", "a=b,c="]).unwrap();
        let labels = labelled.common.compile_context(Role::Gateway).workload.labels;
        assert_eq!(
            labels.into_iter().collect::<Vec<_>>(),
            [("a".into(), "b".into()), ("c".into(), String::new())]
        );
        assert!(Gateway::try_parse_from(["gateway", "--map-port", "80"]).is_err());
        assert!(Gateway::try_parse_from(["gateway", "--labels", "=x"]).is_err());
    }
}
