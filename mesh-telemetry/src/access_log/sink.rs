//! Where the lines go.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

/// Lines that may wait for the writer; one more is dropped and counted.
const QUEUE: usize = 16_384;

/// The sending end: cheap to clone, never blocks.
#[derive(Clone, Debug)]
pub struct AccessLogSink {
    lines: mpsc::Sender<String>,
    dropped: DroppedLines,
}

/// How many lines a log has dropped. It does not keep the log open, as a sink does.
#[derive(Clone, Debug, Default)]
pub struct DroppedLines(Arc<AtomicU64>);

impl DroppedLines {
    /// The count so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The writing end. Run it on a thread or runtime of its own, never on a worker.
#[derive(Debug)]
pub struct Writer {
    lines: mpsc::Receiver<String>,
}

impl AccessLogSink {
    /// A sink and the writer that empties it.
    #[must_use]
    pub fn new() -> (Self, Writer) {
        Self::with_capacity(QUEUE)
    }

    /// A sink that holds up to `lines` lines, at least one.
    #[must_use]
    pub fn with_capacity(lines: usize) -> (Self, Writer) {
        let (sender, receiver) = mpsc::channel(lines.max(1));
        (Self { lines: sender, dropped: DroppedLines::default() }, Writer { lines: receiver })
    }

    /// How many lines were dropped because the writer could not keep up or had gone.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.count()
    }

    /// The same count, for whoever shows it and writes nothing.
    #[must_use]
    pub fn dropped_lines(&self) -> DroppedLines {
        self.dropped.clone()
    }

    pub(crate) fn write(&self, line: String) {
        if self.lines.try_send(line).is_err() {
            self.dropped.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Writer {
    /// Writes lines to `out` until every sink is gone. Blocks; what is queued is written with one flush.
    ///
    /// # Errors
    /// The first error of `out`. Lines after it are dropped and counted by the sinks.
    pub fn run(mut self, mut out: impl Write) -> io::Result<()> {
        while let Some(line) = self.lines.blocking_recv() {
            out.write_all(line.as_bytes())?;
            while let Ok(line) = self.lines.try_recv() {
                out.write_all(line.as_bytes())?;
            }
            out.flush()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_drops_and_counts() {
        let (sink, writer) = AccessLogSink::with_capacity(2);
        for index in 0..5 {
            sink.write(format!("{index}\n"));
        }
        assert_eq!(sink.dropped(), 3);
        drop(sink);
        let mut out = Vec::new();
        writer.run(&mut out).unwrap();
        assert_eq!(out, b"0\n1\n");
    }

    #[test]
    fn who_counts_does_not_keep_the_log_open() {
        let (sink, writer) = AccessLogSink::with_capacity(1);
        let dropped = sink.dropped_lines();
        sink.write("first\n".to_owned());
        sink.write("second\n".to_owned());
        drop(sink);
        let mut out = Vec::new();
        writer.run(&mut out).unwrap();
        assert_eq!((out.as_slice(), dropped.count()), (&b"first\n"[..], 1));
    }

    #[test]
    fn a_broken_writer_counts_every_later_line() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (sink, writer) = AccessLogSink::with_capacity(8);
        sink.write("first\n".to_owned());
        assert_eq!(writer.run(Full).unwrap_err().kind(), io::ErrorKind::StorageFull);
        sink.write("second\n".to_owned());
        assert_eq!(sink.dropped(), 1);
    }
}
