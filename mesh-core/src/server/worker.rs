//! Worker threads: one `current_thread` runtime each.
//!
//! A request stays on the thread that accepted its connection, so that nothing on its path is shared with another
//! core: not the stack, not the snapshot's reference count, not the timer wheel. The control plane, admin and
//! exporters run on a runtime of their own, so that a slow scrape or a reload of 10,000 routes stalls no request.
//!
//! A worker takes closures from the server and runs them on its thread; a closure builds a stack there and spawns
//! its listener. So worker and server need not know the type of any stack.

use std::io;
use std::thread::JoinHandle;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// On which worker a stack is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Worker {
    /// Counts from 0.
    pub index: usize,
    /// How many there are.
    pub count: usize,
}

pub(crate) type Task = Box<dyn FnOnce(Worker) + Send>;

/// A worker thread. Dropping it ends the thread and everything that runs on it.
#[derive(Debug)]
pub(crate) struct Thread {
    tasks: Option<UnboundedSender<Task>>,
    thread: Option<JoinHandle<()>>,
}

impl Thread {
    pub(crate) fn start(worker: Worker) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (tasks, received) = unbounded_channel();
        let thread = std::thread::Builder::new()
            .name(format!("mesh-worker-{}", worker.index))
            .spawn(move || runtime.block_on(run(worker, received)))?;
        Ok(Self { tasks: Some(tasks), thread: Some(thread) })
    }

    /// Runs `task` on the worker's thread, inside its runtime.
    pub(crate) fn run(&self, task: Task) {
        if let Some(tasks) = &self.tasks
            && tasks.send(task).is_err()
        {
            tracing::error!("a worker thread has ended");
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("a worker thread panicked");
        }
    }
}

async fn run(worker: Worker, mut tasks: UnboundedReceiver<Task>) {
    while let Some(task) = tasks.recv().await {
        task(worker);
    }
}
