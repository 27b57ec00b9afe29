//! The server: worker threads, listeners on all of them, and their drain.
//!
//! [`Server`] is for the proxies. It starts one thread per worker, binds each listener once per worker,
//! and lets a factory build the listener's stack on every worker, so that what a stack owns
//! (pools, balancer cursors, series caches) belongs to that worker. Listeners come and go at run time by
//! [`Server::reconcile`]; those that stay keep their sockets.
//!
//! [`serve_here`] is for everything else: the same edge for one listener on the runtime that calls it, such as an
//! admin server beside the workers.
//!
//! ```no_run
//! use std::convert::Infallible;
//! use http::{Request, Response};
//! use mesh_core::{Body, Direction};
//! use mesh_core::server::{DrainTimes, ListenerSpec, Server};
//!
//! # async fn run(sigterm: impl Future<Output = ()>, again: impl Future<Output = ()>)
//! #     -> Result<(), Box<dyn std::error::Error>> {
//! async fn hello(_: Request<Body>) -> Result<Response<Body>, Infallible> {
//!     Ok(Response::new(Body::full("hello\n")))
//! }
//!
//! let server = Server::builder().workers(2).start()?;
//! let spec = ListenerSpec::new("outbound", "127.0.0.1:0".parse()?, Direction::Outbound);
//! let address = server.listen(spec, |_worker| tower::service_fn(hello))?;
//! println!("listening outbound={address}");
//! sigterm.await;
//! server.drain().run(DrainTimes::default(), again).await;
//! # Ok(())
//! # }
//! ```

pub(crate) mod accept;
pub(crate) mod connection;
mod edge;
mod l4;
mod limits;
mod serve;
mod tls;
mod trust;
mod worker;

use std::future::{Future, pending};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::TcpListener;
use tokio::sync::mpsc::unbounded_channel;

pub use self::accept::{Accepted, ConnHandler, OpenConn, PlainHttp, TcpConn};
pub use self::edge::HttpStack;
pub use self::l4::{Expect, L4, L4Conn, SecuredConn, WithL4};
pub use self::limits::ServerLimits;
pub use self::serve::Protocol;
pub use self::tls::{DownstreamTls, Nothing, Terminate, Terminated, WithTls, Within};
pub use self::trust::{Judge, OpenConnections};
pub use self::worker::Worker;
pub use crate::drain::{Drain, DrainTimes, Drained, Phase, Token};
pub use crate::listener::{BindError, ListenerProtocol, ListenerSpec, ListenerStatus, OwnAddresses};

use self::accept::{Acceptor, Shared, follow};
use self::connection::Loads;
use self::edge::Edge;
use self::worker::Thread;
use crate::listener::{Stats, bind};
use crate::panic::Panics;
use crate::snapshot::{Pinned, Snapshots};

/// Makes a [`Server`].
#[derive(Clone, Debug)]
pub struct ServerBuilder {
    workers: usize,
    limits: ServerLimits,
    snapshots: Option<Snapshots>,
    drain: Drain,
    times: DrainTimes,
    own: OwnAddresses,
    panics: Panics,
}

impl ServerBuilder {
    /// How many worker threads. Default 1; 0 counts as 1.
    #[must_use]
    pub const fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    /// The limits of every listener.
    #[must_use]
    pub fn limits(mut self, limits: ServerLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Where requests take their snapshot from. Default: none, and every slot must be fixed.
    #[must_use]
    pub fn snapshots(mut self, snapshots: Snapshots) -> Self {
        self.snapshots = Some(snapshots);
        self
    }

    /// How long a listener that is removed drains. It stops accepting at once.
    #[must_use]
    pub const fn removal_times(mut self, times: DrainTimes) -> Self {
        self.times = times;
        self
    }

    /// Adds the addresses of the listeners to `own`, where others look them up. Default: a set of the server's.
    #[must_use]
    pub fn own_addresses(mut self, own: OwnAddresses) -> Self {
        self.own = own;
        self
    }

    /// Counts panics that no layer caught in `panics`. Default: a count of the server's.
    #[must_use]
    pub fn panics(mut self, panics: Panics) -> Self {
        self.panics = panics;
        self
    }

    /// Starts the workers.
    ///
    /// # Errors
    /// When the system gives no thread, no epoll instance or no event descriptor.
    pub fn start(self) -> io::Result<Server> {
        let count = self.workers.max(1);
        let workers =
            (0..count).map(|index| Thread::start(Worker { index, count })).collect::<io::Result<_>>()?;
        Ok(Server {
            workers,
            loads: (count > 1).then(|| Arc::new(Loads::new(count))),
            options: Self { workers: count, ..self },
            listeners: Mutex::default(),
        })
    }
}

/// Worker threads and the listeners on them. Dropping it cuts everything and joins the threads.
#[derive(Debug)]
pub struct Server {
    workers: Vec<Thread>,
    loads: Option<Arc<Loads>>,
    options: ServerBuilder,
    listeners: Mutex<Vec<Arc<Shared>>>,
}

/// What [`Server::reconcile`] did.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Reconciled {
    /// Listeners that were added, with the addresses they are bound to.
    pub added: Vec<(Arc<str>, SocketAddr)>,
    /// Listeners that stayed as they were.
    pub kept: Vec<Arc<str>>,
    /// Listeners that no longer accept and drain.
    pub removed: Vec<Arc<str>>,
    /// Listeners that could not be bound.
    pub failed: Vec<BindError>,
}

impl Server {
    /// One worker, default limits, no snapshots.
    #[must_use]
    pub fn builder() -> ServerBuilder {
        ServerBuilder {
            workers: 1,
            limits: ServerLimits::default(),
            snapshots: None,
            drain: Drain::new(),
            times: DrainTimes::default(),
            own: OwnAddresses::default(),
            panics: Panics::default(),
        }
    }

    /// Binds a listener that serves plain HTTP, and returns the address it is bound to. `factory` builds its stack
    /// once per worker, on that worker's thread.
    ///
    /// # Errors
    /// When the address cannot be bound; the error names it.
    pub fn listen<S, F>(&self, spec: ListenerSpec, factory: F) -> Result<SocketAddr, BindError>
    where
        S: HttpStack,
        F: Fn(Worker) -> S + Send + Sync + 'static,
    {
        self.listen_with(spec, |_| PlainHttp, factory)
    }

    /// [`listen`](Self::listen), with an [`L4`] beside the stack that takes the connections which are not HTTP. Both
    /// are made once per worker, on that worker's thread.
    ///
    /// # Errors
    /// When the address cannot be bound; the error names it.
    pub fn listen_l4<S, F, L, G>(
        &self,
        spec: ListenerSpec,
        l4: G,
        factory: F,
    ) -> Result<SocketAddr, BindError>
    where
        S: HttpStack,
        F: Fn(Worker) -> S + Send + Sync + 'static,
        L: L4,
        G: Fn(Worker) -> L + Send + Sync + 'static,
    {
        self.listen_with(spec, move |worker| WithL4::new(l4(worker)), factory)
    }

    /// [`listen`](Self::listen), with another handler of connections, made once per worker.
    ///
    /// # Errors
    /// When the address cannot be bound; the error names it.
    pub fn listen_with<S, F, H, G>(
        &self,
        spec: ListenerSpec,
        handler: G,
        factory: F,
    ) -> Result<SocketAddr, BindError>
    where
        S: HttpStack,
        F: Fn(Worker) -> S + Send + Sync + 'static,
        H: ConnHandler<S>,
        G: Fn(Worker) -> H + Send + Sync + 'static,
    {
        let sockets = bind(&spec, self.workers.len())?;
        let failed = |source| BindError { name: spec.name().to_owned(), address: spec.address(), source };
        let address = match sockets.first() {
            Some(socket) => socket.local_addr().map_err(failed)?,
            None => return Err(failed(io::ErrorKind::NotFound.into())),
        };
        let shared = Arc::new(Shared {
            address,
            stats: Arc::default(),
            max_connections: self.options.limits.max_connections,
            own: self.options.own.clone(),
            drain: Drain::new(),
            process: Some(self.options.drain.clone()),
            spec,
        });
        self.options.own.add(address);
        self.listeners().push(Arc::clone(&shared));

        let (peers, passed): (Vec<_>, Vec<_>) = self.workers.iter().map(|_| unbounded_channel()).unzip();
        let peers: Arc<[_]> = peers.into();
        let handler = Arc::new(handler);
        let factory = Arc::new(factory);
        for ((thread, socket), passed) in self.workers.iter().zip(sockets).zip(passed) {
            let shared = Arc::clone(&shared);
            let (peers, handler, factory) = (Arc::clone(&peers), Arc::clone(&handler), Arc::clone(&factory));
            let options = self.options.clone();
            let loads = self.loads.clone();
            // From here on the listener counts as accepting, though its worker may take a moment to begin.
            let accepting = vec![shared.drain.accepting(), options.drain.accepting()];
            thread.run(Box::new(move |worker| {
                let listener = match TcpListener::from_std(socket) {
                    Ok(listener) => listener,
                    Err(error) => {
                        tracing::error!(%error, listener = shared.spec.name(), "cannot watch the listener");
                        return;
                    }
                };
                let stack = factory(worker);
                let edge = make_edge(stack, options.snapshots.clone(), options.limits, options.panics);
                let handler = Arc::new(handler(worker));
                let (worker, snapshots) = (worker.index, options.snapshots);
                let acceptor = Acceptor { shared, edge, handler, worker, loads, snapshots, peers };
                tokio::spawn(acceptor.run(listener, passed, accepting));
            }));
        }
        Ok(address)
    }

    /// Removes a listener: it stops accepting now and drains by itself. False when there is none of this name.
    pub fn remove(&self, name: &str) -> bool {
        let mut listeners = self.listeners();
        let Some(at) = listeners.iter().position(|listener| listener.spec.name() == name) else {
            return false;
        };
        let removed = listeners.swap_remove(at);
        drop(listeners);
        self.retire(removed);
        true
    }

    fn retire(&self, removed: Arc<Shared>) {
        self.options.own.remove(removed.address);
        let times = self.options.times;
        if let Some(worker) = self.workers.first() {
            worker.run(Box::new(move |_| {
                tokio::spawn(async move {
                    let name = removed.spec.name();
                    let drained = removed.drain.run(times, pending()).await;
                    tracing::info!(listener = name, ?drained, "a removed listener is gone");
                });
            }));
        }
    }

    /// Makes the listeners be those that are `wanted`. One whose specification is the same stays untouched, with
    /// its socket and its connections. The others are removed first, so that their addresses are free, and what is
    /// missing is added by `start`, which calls [`listen`](Self::listen) with the stack of its choice.
    pub async fn reconcile(
        &self,
        wanted: Vec<ListenerSpec>,
        mut start: impl FnMut(&Self, ListenerSpec) -> Result<SocketAddr, BindError>,
    ) -> Reconciled {
        let mut done = Reconciled::default();
        let mut missing = wanted;
        let mut removed = Vec::new();
        self.listeners().retain(|listener| {
            if let Some(at) = missing.iter().position(|wanted| *wanted == listener.spec) {
                missing.swap_remove(at);
                done.kept.push(listener.spec.shared_name());
                true
            } else {
                removed.push(Arc::clone(listener));
                false
            }
        });
        for listener in removed {
            done.removed.push(listener.spec.shared_name());
            let drain = listener.drain.clone();
            self.retire(listener);
            drain.accepts_no_more().await;
        }
        for spec in missing {
            let name = spec.shared_name();
            match start(self, spec) {
                Ok(address) => done.added.push((name, address)),
                Err(error) => done.failed.push(error),
            }
        }
        done
    }

    /// The listeners, as `/listeners` shows them.
    #[must_use]
    pub fn status(&self) -> Vec<ListenerStatus> {
        let phase = self.options.drain.phase();
        self.listeners()
            .iter()
            .map(|listener| {
                let phase = phase.max(listener.drain.phase());
                ListenerStatus::new(&listener.spec, listener.address, phase, &listener.stats)
            })
            .collect()
    }

    /// How many connections each worker has. With one worker nobody counts, and the answer is empty.
    #[must_use]
    pub fn loads(&self) -> Vec<usize> {
        let count = |loads: &Arc<Loads>| (0..self.workers.len()).map(|worker| loads.of(worker)).collect();
        self.loads.as_ref().map_or_else(Vec::new, count)
    }

    /// The drain of the whole process; see [`Drain::run`].
    #[must_use]
    pub const fn drain(&self) -> &Drain {
        &self.options.drain
    }

    /// The addresses of the listeners.
    #[must_use]
    pub const fn own_addresses(&self) -> &OwnAddresses {
        &self.options.own
    }

    /// Panics that no layer caught.
    #[must_use]
    pub const fn panics(&self) -> &Panics {
        &self.options.panics
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<Arc<Shared>>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn make_edge<S>(stack: S, snapshots: Option<Snapshots>, limits: ServerLimits, panics: Panics) -> Arc<Edge<S>>
where
    S: HttpStack,
{
    let pinned: Option<Pinned> = snapshots.as_ref().map(|snapshots| Arc::new(snapshots.load()));
    let edge = Arc::new(Edge::new(stack, pinned, limits, panics));
    if let Some(snapshots) = snapshots {
        tokio::spawn(follow(Arc::downgrade(&edge), snapshots));
    }
    edge
}

/// Binds one listener on the current runtime and serves it until the returned future is dropped, or the `drain` has
/// run. It is always ready to be asked, so give an admin server none: `/ready` has to answer during a drain.
///
/// # Errors
/// When the address cannot be bound; the error names it.
pub fn serve_here<S: HttpStack>(
    spec: ListenerSpec,
    stack: S,
    limits: ServerLimits,
    drain: Option<Drain>,
) -> Result<(SocketAddr, impl Future<Output = ()> + Send + 'static), BindError> {
    let name = spec.name().to_owned();
    let wanted = spec.address();
    let failed = |source| BindError { name, address: wanted, source };
    let (address, listener) = match bind(&spec, 1)?.pop() {
        Some(socket) => socket
            .local_addr()
            .and_then(|address| Ok((address, TcpListener::from_std(socket)?)))
            .map_err(failed)?,
        None => return Err(failed(io::ErrorKind::NotFound.into())),
    };
    let (peer, passed) = unbounded_channel();
    let accepting = drain.as_ref().map(Drain::accepting).into_iter().collect();
    let acceptor = Acceptor {
        shared: Arc::new(Shared {
            spec,
            address,
            stats: Arc::new(Stats::default()),
            max_connections: limits.max_connections,
            own: OwnAddresses::default(),
            drain: Drain::new(),
            process: drain,
        }),
        edge: make_edge(stack, None, limits, Panics::default()),
        handler: Arc::new(PlainHttp),
        worker: 0,
        loads: None,
        snapshots: None,
        peers: Arc::new([peer]),
    };
    Ok((address, acceptor.run(listener, passed, accepting)))
}
