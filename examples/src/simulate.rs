//! `--simulate`: a scenario from its file to its report.

use std::fmt::Write as _;
use std::io::{self, Read as _};
use std::path::Path;

use mesh_core::config::Role;
use mesh_core::istio::{LoadOptions, SourceFile, UnknownFields};
use mesh_core::watch;
use mesh_route::simulate::{Input, Report, Simulation};

use crate::cli::{Common, SimulateFormat};
use crate::control::Sources;

/// Runs a scenario; its report, and what of its expectations was not met.
///
/// # Errors
/// What is wrong with the scenario or its configuration, a line for each finding.
pub(crate) fn run(common: &Common, role: Role, scenario: &Path) -> Result<(String, String), String> {
    let is_stdin = scenario.as_os_str() == "-";
    if is_stdin && common.config.iter().any(|path| path.as_os_str() == "-") {
        return Err("standard input is either the scenario or configuration".to_owned());
    }
    let folder = if is_stdin { None } else { scenario.parent() }.unwrap_or(Path::new(""));
    let read = |path: &Path| read(path).map_err(|error| error.to_string());
    let sources = Sources::of(&common.config, None).map_err(|error| format!("<stdin>: {error}"))?;
    let mut config = sources.fixed;
    for path in &sources.paths {
        config.extend(read(path)?);
    }
    let mesh_config = match &common.mesh_config {
        Some(path) => read(path)?.pop(),
        None => None,
    };
    let scenario = if is_stdin {
        let mut text = Vec::new();
        io::stdin().read_to_end(&mut text).map_err(|error| format!("<stdin>: {error}"))?;
        SourceFile::new("<stdin>", text)
    } else {
        let text = std::fs::read(scenario).map_err(|error| format!("{}: {error}", scenario.display()))?;
        SourceFile::new(scenario.to_string_lossy(), text)
    };
    let unknown = if common.lenient { UnknownFields::Lenient } else { UnknownFields::Strict };
    let input = Input {
        scenario,
        config,
        mesh_config,
        context: common.compile_context(role),
        options: LoadOptions::default()
            .with_default_namespace(common.namespace.as_str())
            .with_unknown_fields(unknown),
        read: &|path| self::read(&folder.join(path)),
    };
    let (simulation, found) = Simulation::load(input);
    let found: String = found.iter().map(|found| format!("{found}\n")).collect();
    let Some(simulation) = simulation else {
        return Err(format!("{found}nothing was simulated"));
    };
    eprint!("{found}");
    let report = simulation.run().map_err(|error| error.to_string())?;
    let printed = match common.simulate_format {
        SimulateFormat::Text => report.to_string(),
        SimulateFormat::Json => format!("{:#}\n", report.to_json()),
    };
    Ok((printed, unmet(&report)))
}

fn read(path: &Path) -> io::Result<Vec<SourceFile>> {
    watch::read(std::slice::from_ref(&path.to_owned()))
}

fn unmet(report: &Report) -> String {
    let mut lines = String::new();
    for unmet in report.unmet() {
        let was = unmet.was.as_deref().unwrap_or("there was nothing to judge");
        let name = if unmet.name.is_empty() { String::new() } else { format!(" ({})", unmet.name) };
        // Writing to a String cannot fail.
        let _ = writeln!(
            lines,
            "error: {}: {}{name}: expected {}, was {was}",
            unmet.position, unmet.path, unmet.condition
        );
    }
    lines
}
