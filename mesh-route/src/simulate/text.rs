//! A report as a table, in a hundred columns.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use super::report::{Interval, Report};

/// As wide as a line may be.
const WIDTH: usize = 100;
/// Endpoints in the table; all of them are in the JSON form.
const ENDPOINTS: usize = 24;
/// Events at the end; all of them are in the JSON form.
const EVENTS: usize = 100;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let workers =
            if self.workers == 1 { "1 worker".to_owned() } else { format!("{} workers", self.workers) };
        writeln!(f, "scenario {}, seed {}, {workers}, {}", self.scenario, self.seed, time(self.end))?;
        f.write_char('\n')?;
        self.requests(f)?;
        self.endpoints(f)?;
        self.events(f)?;
        self.expected(f)
    }
}

impl Report {
    fn requests(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let canaries = !self.total.canaries.is_empty();
        let mut table = Table::default();
        let mut head =
            vec!["from", "requests", "ok", "failed", "tries/req", "p50", "p90", "p99", "refused", "out"];
        if canaries {
            head.push("canary");
        }
        table.row(head.iter().map(ToString::to_string), "why");
        let row = |first: String, interval: &Interval| {
            let [p50, p90, p99] = interval.latency.map_or_else(Default::default, |latency| latency.map(time));
            let mut cells = vec![
                first,
                interval.requests.to_string(),
                interval.succeeded.to_string(),
                (interval.failures() + interval.unfinished).to_string(),
                interval.amplification().map_or_else(String::new, |tries| format!("{tries:.2}")),
                p50,
                p90,
                p99,
                (interval.overflows + interval.retry_overflows).to_string(),
                format!("{}{}", interval.ejected.len(), if interval.panic.is_empty() { "" } else { "!" }),
            ];
            if canaries {
                let shares: Vec<_> = interval.canaries.values().map(|share| format!("{share}%")).collect();
                cells.push(shares.join(" "));
            }
            cells
        };
        for interval in &self.intervals {
            table.row(row(time(interval.from), interval), &why(interval));
        }
        table.row(row("all".to_owned(), &self.total), &why(&self.total));
        table.print(f)?;
        writeln!(
            f,
            "\nok: a whole answer that is no 5xx and no gRPC error. failed: with the flags or the status, and *"
        )?;
        writeln!(
            f,
            "unfinished. tries/req: tries per request. refused: by limits and budgets. out: ejected at the end"
        )?;
        writeln!(f, "of the row (! in panic: all are used).")
    }

    fn endpoints(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.endpoints[..self.endpoints.len().min(ENDPOINTS)];
        if shown.is_empty() {
            return Ok(());
        }
        writeln!(f, "\ntries that each endpoint saw (- ejected at the end of the row)")?;
        let widest = shown.iter().map(|addr| addr.to_string().len()).max().unwrap_or(0).max(8);
        for block in shown.chunks(((WIDTH - 10) / (widest + 2)).max(1)) {
            f.write_char('\n')?;
            let mut table = Table::default();
            table.row(std::iter::once("from".to_owned()).chain(block.iter().map(ToString::to_string)), "");
            let row = |first: String, interval: &Interval| {
                let cell = |addr: &SocketAddr| {
                    let tries = interval.tries_by_endpoint.get(addr).copied().unwrap_or(0);
                    let ejected = if interval.ejected.contains(addr) { "-" } else { " " };
                    format!("{tries}{ejected}")
                };
                std::iter::once(first).chain(block.iter().map(cell)).collect::<Vec<_>>()
            };
            for interval in &self.intervals {
                table.row(row(time(interval.from), interval), "");
            }
            table.row(row("all".to_owned(), &self.total), "");
            table.print(f)?;
        }
        match self.endpoints.len() - shown.len() {
            0 => Ok(()),
            more => writeln!(f, "and {more} more endpoints"),
        }
    }

    fn events(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.events.is_empty() {
            return Ok(());
        }
        writeln!(f, "\nevents")?;
        for event in self.events.iter().take(EVENTS) {
            let mut what = String::new();
            if let Some(endpoint) = event.endpoint {
                write!(what, "{endpoint} ")?;
            }
            what.push_str(&event.what);
            if event.times > 1 {
                write!(what, " ({} times)", event.times)?;
            }
            if let Some(cluster) = &event.cluster {
                write!(what, " [{cluster}]")?;
            }
            item(f, &time(event.at), &what)?;
        }
        match self.events.len().saturating_sub(EVENTS) {
            0 => Ok(()),
            more => writeln!(f, "and {more} more events"),
        }
    }

    fn expected(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.expected.is_empty() {
            return Ok(());
        }
        writeln!(f, "\nexpected")?;
        for checked in &self.expected {
            let verdict = if checked.met { "met" } else { "NOT MET" };
            let was = checked.was.as_deref().unwrap_or("nothing to judge");
            let name = if checked.name.is_empty() { String::new() } else { format!(" ({})", checked.name) };
            item(f, verdict, &format!("{}{name}: {}, was {was}", checked.path, checked.condition))?;
        }
        Ok(())
    }
}

/// A line of a list; what does not fit goes on below.
fn item(f: &mut fmt::Formatter<'_>, first: &str, text: &str) -> fmt::Result {
    const INDENT: usize = 11;
    let mut line = format!("{first:>9} ");
    for word in text.split(' ') {
        if line.chars().count() + 1 + word.chars().count() > WIDTH && line.len() > INDENT {
            writeln!(f, "{line}")?;
            line = " ".repeat(INDENT - 1);
        }
        write!(line, " {word}")?;
    }
    writeln!(f, "{line}")
}

/// The failures of a row, the most frequent first.
fn why(interval: &Interval) -> String {
    let mut causes: Vec<_> = interval.failed.iter().map(|(cause, count)| (cause.as_str(), *count)).collect();
    if interval.unfinished > 0 {
        causes.push(("*", interval.unfinished));
    }
    causes.sort_by_key(|(cause, count)| (std::cmp::Reverse(*count), *cause));
    let causes: Vec<_> = causes.iter().map(|(cause, count)| format!("{cause}:{count}")).collect();
    causes.join(" ")
}

/// A time, exact to the millisecond.
fn time(time: Duration) -> String {
    let millis = time.as_millis();
    if millis >= 1000 && millis.is_multiple_of(1000) {
        format!("{}s", millis / 1000)
    } else if millis >= 1000 {
        format!("{}.{:03}s", millis / 1000, millis % 1000)
    } else {
        format!("{millis}ms")
    }
}

/// Cells to the right of columns that are as wide as they must be, and a text to the left after them.
#[derive(Default)]
struct Table {
    rows: Vec<(Vec<String>, String)>,
    widths: BTreeMap<usize, usize>,
}

impl Table {
    fn row(&mut self, cells: impl IntoIterator<Item = String>, rest: &str) {
        let cells: Vec<_> = cells.into_iter().collect();
        for (column, cell) in cells.iter().enumerate() {
            let width = self.widths.entry(column).or_default();
            *width = (*width).max(cell.chars().count());
        }
        self.rows.push((cells, rest.to_owned()));
    }

    fn print(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (cells, rest) in &self.rows {
            let mut line = String::new();
            for (column, cell) in cells.iter().enumerate() {
                let width = self.widths.get(&column).copied().unwrap_or(0);
                let gap = if column == 0 { "" } else { "  " };
                write!(line, "{gap}{cell:>width$}")?;
            }
            let room = WIDTH.saturating_sub(line.chars().count() + 2);
            if rest.chars().count() <= room {
                write!(line, "  {rest}")?;
            } else {
                let kept: String = rest.chars().take(room.saturating_sub(1)).collect();
                write!(line, "  {kept}…")?;
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}
