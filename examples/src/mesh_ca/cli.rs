//! The command line of `mesh-ca`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use mesh_core::identity::TrustDomain;

use crate::cli::parse_log;

/// A certificate authority for the mesh: signs short-lived certificates of workloads that prove who they are, by a
/// bootstrap token or by the certificate that they have.
///
/// It serves Istio's certificate service (istio.v1.auth.IstioCertificateService) over TLS, with a certificate that it
/// signs itself. Everything it has is in one directory: state.json with its keys, root-cert.pem for those who are to
/// believe it, and bootstrap-tokens.
#[derive(Clone, Debug, Parser)]
#[command(name = "mesh-ca", version, max_term_width = 110, after_help = EXAMPLE)]
pub struct MeshCa {
    /// What to do in the place of serving.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Where its keys are; made, and closed to others, where there is none
    #[arg(long, value_name = "DIR", default_value = "mesh-ca.state", global = true)]
    pub dir: PathBuf,

    /// Where it listens
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15012")]
    pub listen: SocketAddr,

    /// A DNS name or address by which workloads reach it, and which its certificate has beside localhost, 127.0.0.1, ::1 and
    /// the address it listens on; repeatable
    #[arg(long, value_name = "NAME")]
    pub name: Vec<String>,

    /// The trust domain that it signs for; stays what it was when the directory was made
    #[arg(long, value_name = "NAME", default_value = "cluster.local", value_parser = parse_trust_domain)]
    pub trust_domain: TrustDomain,

    /// How long certificates of workloads live at most; they are renewed at half of it
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_ttl)]
    pub leaf_ttl: Duration,

    /// How long the first root lives; replace it with `mesh-ca rotate` in time
    #[arg(long, value_name = "TIME", default_value = "3650d", value_parser = parse_ttl)]
    pub root_ttl: Duration,

    /// Who may ask with a token, a line each: SHA256-OF-TOKEN NAMESPACE SERVICE-ACCOUNT END; read anew when it changes, and
    /// a line that is gone is refused at once; while the list cannot be read, tokens prove nothing [default: bootstrap-tokens in --dir]
    #[arg(long, value_name = "FILE", global = true)]
    pub bootstrap_tokens: Option<PathBuf>,

    /// What is logged to stderr: error, warn, info, debug, trace, or tracing's filter syntax
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = parse_log)]
    pub log: String,
}

/// What to do in the place of serving.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Make a bootstrap token for a workload, and print it; a running mesh-ca knows it at once
    Token(Token),
    /// Replace the root: the new one is handed out, then signs, then the old one is forgotten; no workload notices
    Rotate(Rotate),
}

/// What `mesh-ca token` takes.
#[derive(Clone, Debug, Args)]
pub struct Token {
    /// The namespace of the workload
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub namespace: String,

    /// The service account of the workload
    #[arg(long, value_name = "NAME")]
    pub service_account: String,

    /// How long the token may be used. A workload that runs renews by its certificate and needs it no more; one that
    /// restarts does
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_ttl)]
    pub ttl: Duration,

    /// Write it here, readable by this user alone [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// What `mesh-ca rotate` takes.
#[derive(Clone, Debug, Args)]
pub struct Rotate {
    /// How long the new root lives: more than twice the longest --leaf-ttl
    #[arg(long, value_name = "TIME", default_value = "3650d", value_parser = parse_ttl)]
    pub root_ttl: Duration,
}

const EXAMPLE: &str = "\
Two workloads that speak mutual TLS (the service account of a token is that of the workload):

  mesh-ca --dir ca &
  mesh-ca --dir ca token --service-account reviews --out reviews.token
  sidecar --config mesh.yaml --app 127.0.0.1:8080 --service-account reviews \\
    --ca https://127.0.0.1:15012 --ca-root ca/root-cert.pem --bootstrap-token reviews.token

SIGHUP reads the directory and the tokens at once, SIGTERM ends it. A signal or a crash loses nothing: what is promised is on disk
before anybody hears of it.
";

impl MeshCa {
    /// Where the list of tokens is.
    #[must_use]
    pub fn tokens_file(&self) -> PathBuf {
        self.bootstrap_tokens.clone().unwrap_or_else(|| self.dir.join("bootstrap-tokens"))
    }
}

fn parse_trust_domain(text: &str) -> Result<TrustDomain, String> {
    text.parse().map_err(|error: mesh_core::identity::InvalidSpiffeId| error.to_string())
}

/// Certificates count in whole seconds, and years have four digits.
fn parse_ttl(text: &str) -> Result<Duration, String> {
    let ttl = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let century = Duration::from_secs(100 * 365 * 24 * 3600);
    if (Duration::from_secs(1)..=century).contains(&ttl) {
        Ok(ttl)
    } else {
        Err("from 1s to 36500d".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(args: &[&str]) -> Result<MeshCa, clap::Error> {
        MeshCa::try_parse_from(std::iter::once(&"mesh-ca").chain(args))
    }

    #[test]
    fn the_command_line_is_sound() {
        MeshCa::command().debug_assert();
        let args = parse(&[]).unwrap();
        assert_eq!(args.listen.to_string(), "127.0.0.1:15012");
        assert_eq!(args.tokens_file(), PathBuf::from("mesh-ca.state/bootstrap-tokens"));
        for args in [
            ["--dir", "ca", "token", "--service-account", "a"],
            ["token", "--dir", "ca", "--service-account", "a"],
        ] {
            let args = parse(&args).unwrap();
            assert!(matches!(&args.command, Some(Command::Token(token)) if token.namespace == "default"));
            assert_eq!(args.dir, PathBuf::from("ca"));
        }
        assert!(parse(&["token"]).is_err() && parse(&["--leaf-ttl", "0s"]).is_err());
        assert!(parse(&["--trust-domain", "Cluster"]).is_err());
    }
}
