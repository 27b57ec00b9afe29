//! One generation of compiled configuration, and the slots through which layers read it.
//!
//! A reload compiles every model from one set of resources and publishes them together, with one swap: no request
//! sees new routes with old policies. A request pins the snapshot that was current when it arrived; a layer reads
//! its model through a typed [`Slot`], an index into the snapshot that was taken when the stack was built. A
//! program that embeds one layer with a fixed model has [`Slot::fixed`] and no snapshot at all.
//!
//! A generation that is replaced is freed on a thread of its own: thousands of routes take milliseconds to free, and the
//! last to let go of them is most often a worker.
//!
//! Reading costs an index and a type check. The atomic swap is read once per request at the edge, from a copy that
//! belongs to the worker ([`Pinned`]), so that workers do not share a reference count.

use std::any::Any;
use std::fmt;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::context::RequestContext;

pub(crate) type Model = Arc<dyn Any + Send + Sync>;

/// Every model of one generation.
pub struct Snapshot {
    generation: u64,
    models: Box<[Model]>,
    /// Where the models are freed; `None` frees them where the last holder is.
    grave: Option<Sender<Box<[Model]>>>,
}

impl Snapshot {
    pub(crate) fn new(generation: u64, models: Vec<Model>) -> Self {
        Self { generation, models: models.into_boxed_slice(), grave: None }
    }

    /// Counts up from 1 with each accepted configuration; 0 is the empty snapshot before the first.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The model behind `slot`; `None` when the slot belongs to another compiler.
    #[must_use]
    pub fn get<'a, T: Any>(&'a self, slot: &'a Slot<T>) -> Option<&'a T> {
        match &slot.0 {
            Kind::Fixed(model) => Some(model),
            Kind::Index(index) => self.models.get(*index)?.downcast_ref(),
        }
    }

    /// The model behind `slot`, shared.
    #[must_use]
    pub fn get_shared<T: Any + Send + Sync>(&self, slot: &Slot<T>) -> Option<Arc<T>> {
        match &slot.0 {
            Kind::Fixed(model) => Some(Arc::clone(model)),
            Kind::Index(index) => Arc::clone(self.models.get(*index)?).downcast().ok(),
        }
    }

    pub(crate) fn models(&self) -> &[Model] {
        &self.models
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        if let Some(grave) = self.grave.take() {
            // What cannot be sent comes back in the error, and is freed here.
            let _ = grave.send(std::mem::take(&mut self.models));
        }
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("generation", &self.generation)
            .field("models", &self.models.len())
            .finish()
    }
}

/// Where a layer finds its model.
pub struct Slot<T>(Kind<T>);

enum Kind<T> {
    Fixed(Arc<T>),
    Index(usize),
}

impl<T: Any + Send + Sync> Slot<T> {
    /// A model that never changes, for a layer that is embedded without a compiler.
    #[must_use]
    pub fn fixed(model: T) -> Self {
        Self::fixed_shared(Arc::new(model))
    }

    /// A shared model that never changes.
    #[must_use]
    pub fn fixed_shared(model: Arc<T>) -> Self {
        Self(Kind::Fixed(model))
    }

    /// The model for this request: the fixed one, or that of the snapshot which the request pinned. `None` when
    /// the slot needs a snapshot and the request has none; a layer then fails in its own safe direction.
    #[must_use]
    pub fn get<'a>(&'a self, cx: &'a RequestContext) -> Option<&'a T> {
        match &self.0 {
            Kind::Fixed(model) => Some(model),
            Kind::Index(_) => cx.snapshot()?.get(self),
        }
    }

    /// [`get`](Self::get), for what has no request: a connection that pinned `snapshot`.
    #[must_use]
    pub fn get_in<'a>(&'a self, snapshot: Option<&'a Pinned>) -> Option<&'a T> {
        match &self.0 {
            Kind::Fixed(model) => Some(model),
            Kind::Index(_) => snapshot?.get(self),
        }
    }

    pub(crate) fn index(index: usize) -> Self {
        Self(Kind::Index(index))
    }
}

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self(match &self.0 {
            Kind::Fixed(model) => Kind::Fixed(Arc::clone(model)),
            Kind::Index(index) => Kind::Index(*index),
        })
    }
}

impl<T> fmt::Debug for Slot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Fixed(_) => f.write_str("Slot::fixed"),
            Kind::Index(index) => write!(f, "Slot({index})"),
        }
    }
}

/// A snapshot behind a reference count of the worker's own, so that pinning it touches no line of another core.
pub type Pinned = Arc<Arc<Snapshot>>;

/// The current snapshot of the process: one swap per reload.
#[derive(Clone)]
pub struct Snapshots {
    shared: Arc<Shared>,
}

struct Shared {
    current: ArcSwap<Snapshot>,
    generation: watch::Sender<u64>,
    grave: OnceLock<Option<Sender<Box<[Model]>>>>,
}

impl Snapshots {
    /// Holds the empty snapshot, generation 0.
    #[must_use]
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                current: ArcSwap::from_pointee(Snapshot::new(0, Vec::new())),
                generation: watch::Sender::new(0),
                grave: OnceLock::new(),
            }),
        }
    }

    /// The current snapshot. About 20 ns; workers keep a copy of their own instead.
    #[must_use]
    pub fn load(&self) -> Arc<Snapshot> {
        self.shared.current.load_full()
    }

    /// Hears of every new generation.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.generation.subscribe()
    }

    /// Frees generations where their last holder is, and not on a thread of their own, whose pace nobody knows: for a
    /// simulation. To be called before the first is published.
    pub fn free_in_place(&self) {
        // Whoever published before has a thread already.
        let _ = self.shared.grave.set(None);
    }

    /// The snapshot, set to be freed off the workers.
    pub(crate) fn prepare(&self, mut snapshot: Snapshot) -> Arc<Snapshot> {
        snapshot.grave = self.shared.grave.get_or_init(dig).clone();
        Arc::new(snapshot)
    }

    pub(crate) fn publish(&self, snapshot: Arc<Snapshot>) {
        let generation = snapshot.generation();
        self.shared.current.store(snapshot);
        self.shared.generation.send_replace(generation);
    }
}

/// A thread that frees what it is sent, and ends with the last sender.
fn dig() -> Option<Sender<Box<[Model]>>> {
    let (grave, dead) = channel();
    let thread = std::thread::Builder::new().name("mesh-retired".to_owned());
    thread.spawn(move || dead.into_iter().for_each(drop)).ok().map(|_| grave)
}

impl Default for Snapshots {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Snapshots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Snapshots").field(&self.shared.current.load()).finish()
    }
}
