//! A proxy at work, and its end: configuration that changes, signals, the drain.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::server::{DrainTimes, Drained, Phase};
use mesh_core::watch::VANISHED;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Failure;
use super::proxy::Proxy;

/// The signals that a proxy hears. Listened for before anyone is told that it listens: a signal that comes sooner would
/// end it without a drain.
pub(super) struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(super) fn listen() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(Failure::other);
        Ok(Self {
            hangup: listen(SignalKind::hangup())?,
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }
}

impl Proxy {
    /// Serves until a signal ends it, applying changed configuration on the way.
    pub(super) async fn serve(
        mut self,
        mut signals: Signals,
        mut applied: impl FnMut(&mut Self),
    ) -> Result<(), Failure> {
        let mut watcher = self.control.watcher(&self.files);
        // Until when a configuration waits for the rest of it.
        let mut waits: Option<Instant> = None;
        let controls = self.controls.clone();
        let mut joins = false;
        loop {
            let mut at_once = false;
            let files = tokio::select! {
                () = either(&mut signals.terminate, &mut signals.interrupt) => break,
                () = controls.quit.notified() => {
                    joins = true;
                    break;
                }
                () = controls.drain.notified() => {
                    self.drain_and_stay()?;
                    continue;
                }
                Some(()) = signals.hangup.recv() => {
                    at_once = true;
                    match &mut watcher {
                        None => Vec::new(),
                        Some(watcher) => match watcher.now().await {
                            Ok(files) => files,
                            Err(error) => {
                                tracing::error!(%error, "nothing is loaded; what is in force stays");
                                continue;
                            }
                        },
                    }
                },
                () = until(waits) => {
                    at_once = true;
                    std::mem::take(&mut self.files)
                },
                files = async {
                    match &mut watcher {
                        Some(watcher) => watcher.next().await,
                        None => std::future::pending().await,
                    }
                } => files,
            };
            self.files = files;
            // Compiling many routes takes a while; the admin endpoints answer meanwhile.
            let outcome = tokio::task::block_in_place(|| {
                if at_once {
                    Ok(self.control.apply(&self.files))
                } else {
                    self.control.apply_if_complete(&self.files)
                }
            });
            let outcome = match outcome {
                Ok(outcome) => outcome,
                Err(missing) => {
                    for diagnostic in missing {
                        tracing::warn!(
                            "waiting for up to {VANISHED:?}, what is in force stays: {diagnostic}"
                        );
                    }
                    waits.get_or_insert_with(|| mesh_core::clock::now() + VANISHED);
                    continue;
                }
            };
            waits = None;
            self.say(&outcome);
            // What drains opens no listener.
            if outcome.accepted && self.server()?.drain().phase() == Phase::Serving {
                applied(&mut self);
            }
        }
        let again = async {
            // The kubelet's signal is the first one, whoever asked for the end before it.
            if joins {
                either(&mut signals.terminate, &mut signals.interrupt).await;
                tracing::info!("a signal joins the drain; another one ends it at once");
            }
            either(&mut signals.terminate, &mut signals.interrupt).await;
        };
        self.drain(again).await
    }

    fn drain_times(&self) -> DrainTimes {
        DrainTimes { drain_time: self.common.drain_time, deadline: self.common.drain_deadline }
    }

    /// Drains beside everything else; the end of the process joins it where it stands.
    fn drain_and_stay(&self) -> Result<(), Failure> {
        let (drain, times) = (self.server()?.drain().clone(), self.drain_times());
        if drain.phase() == Phase::Serving {
            tracing::info!("draining, and staying");
            tokio::spawn(async move {
                let drained = drain.run(times, std::future::pending()).await;
                tracing::info!(?drained, "the listeners are drained");
            });
        }
        Ok(())
    }

    async fn drain(mut self, again: impl Future<Output = ()>) -> Result<(), Failure> {
        tracing::info!("draining");
        let times = self.drain_times();
        let server = Arc::clone(self.server()?);
        match server.drain().run(times, again).await {
            Drained::Finished => tracing::info!("drained, nothing was in flight"),
            Drained::Cut(connections) => tracing::warn!(connections, "cut at the drain deadline"),
            Drained::AtOnce(connections) => tracing::warn!(connections, "cut by a second signal"),
        }
        // The writer ends with the last sink, and with it the last line is on disk.
        let writer = self.log_writer.take();
        self.server = None;
        drop((self, server));
        if let Some(writer) = writer {
            let flushed = tokio::task::spawn_blocking(move || writer.join());
            // Where the log goes may be blocked; it does not keep the process alive.
            if tokio::time::timeout(Duration::from_secs(1), flushed).await.is_err() {
                tracing::warn!("the access log was not written to its end");
            }
        }
        Ok(())
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
