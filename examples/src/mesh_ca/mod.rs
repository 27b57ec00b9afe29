//! `mesh-ca`: a certificate authority in one process and one directory, as thin as it can be on [`mesh_tls::ca`].
//!
//! It serves Istio's certificate service, so that a proxy has one client for it and for istiod. [`cli`] is its command
//! line, `state` what it has on disk, `decide` who gets what, `serve` the process.

pub mod cli;
mod decide;
mod serve;
mod state;
mod tokens_file;

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_tls::ca::{Authority, BootstrapToken, CannotRotate, Rotation};
use rustls::crypto::CryptoProvider;

use self::cli::{Command, MeshCa, Rotate, Token};
use self::state::{State, write_file};
use crate::logging;

/// Runs `mesh-ca` to its end.
#[must_use]
pub fn run(args: MeshCa) -> ExitCode {
    let done = match &args.command {
        None => logging::init(&args.log).and_then(|()| serve::run(&args)),
        Some(Command::Token(token)) => make_token(&args, token),
        Some(Command::Rotate(rotate)) => begin_rotation(&args, rotate),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn make_token(args: &MeshCa, token: &Token) -> Result<(), String> {
    let state = State::open(&args.dir)?;
    let provider = provider();
    let secret = BootstrapToken::new(&provider).ok_or("the system gives no randomness")?;
    let until = SystemTime::now().checked_add(token.ttl).ok_or("--ttl: that is no time")?;
    let line = secret.line(&token.namespace, &token.service_account, until, &provider).ok_or(
        "--namespace and --service-account: letters, digits, dots, dashes and underscores are allowed",
    )?;
    state.add_token(&args.tokens_file(), &line)?;
    let text = format!("{}\n", secret.expose());
    match &token.out {
        Some(path) => write_file(path, text.as_bytes()),
        None => {
            let mut out = std::io::stdout().lock();
            out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| error.to_string())
        }
    }
}

fn begin_rotation(args: &MeshCa, rotate: &Rotate) -> Result<(), String> {
    if !args.dir.exists() {
        return Err(format!("{}: there is no authority here; run mesh-ca on it first", args.dir.display()));
    }
    let state = State::open(&args.dir)?;
    let now = SystemTime::now();
    let (authorities, _) = state.update(|authorities| {
        let domain = authorities.old().trust_domain().clone();
        let next = Authority::new(domain, now, rotate.root_ttl).map_err(|error| error.to_string())?;
        let rotation = authorities.rotation(now);
        let begun = authorities.rotate(next, now);
        begun.map(|()| true).map_err(|error| match (error, rotation) {
            (CannotRotate::TooShort(_), _) => format!("--root-ttl: {error}"),
            (_, Rotation::Announced(at) | Rotation::Overlap(at)) if now < at => {
                format!("{error}: its next step is at {}", humantime::format_rfc3339_seconds(at))
            }
            (_, Rotation::Overlap(_)) => {
                format!(
                    "{error}: a running mesh-ca ends it once its clock has been sure of it for ten minutes"
                )
            }
            _ => format!("{error}: it begins when mesh-ca runs on this directory"),
        })
    })?;
    println!(
        "A new root is made. A running mesh-ca hands it out within a second; it signs {leaf} later, when every workload has \
         heard of it, and {leaf} after that the old one is forgotten. Give {} to whoever has the old one by then.",
        state.roots_file().display(),
        leaf = humantime::format_duration(authorities.longest_leaf()),
    );
    Ok(())
}
