//! Logs: to stderr, never to stdout, which scripts read.

use tracing_subscriber::EnvFilter;

/// Installs the logger of a binary. `filter` is a level or tracing's filter syntax.
///
/// # Errors
/// When `filter` cannot be parsed, in words for the user.
pub(crate) fn init(filter: &str) -> Result<(), String> {
    let parsed = EnvFilter::try_new(filter).map_err(|error| format!("--log {filter}: {error}"))?;
    tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .try_init()
        .map_err(|error| error.to_string())
}
