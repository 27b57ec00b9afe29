//! Compiling a configuration into one generation of models.
//!
//! Resource types are plain data; their meaning lives in the crate that has the behaviour, as an implementation of
//! [`Compile`]. The front end (`S`) may be Istio resources or the specification of a Rust builder; both end in the
//! same model. A [`Compiler`] holds the registered implementations and turns one source into one [`Snapshot`],
//! published with one swap.
//!
//! What happens when a model does not compile is decided per model, in one place:
//!
//! | [`OnReject`] | for | the slot then holds |
//! |---|---|---|
//! | `KeepLast` | routes, telemetry | the last good model, or the empty one at start |
//! | `FailClosed` | authorization, identity | [`Compile::closed`], which refuses |
//!
//! A configuration with an error is not published at all: the whole last good generation stays. `FailClosed` matters
//! at start, when there is no last good one.

use std::any::{Any, type_name};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::compat::Compat;
use crate::conn::Direction;
use crate::diagnostics::Diagnostics;
use crate::snapshot::{Model, Slot, Snapshot, Snapshots};

/// A model that can be compiled from `S`. Pure: no IO and no clock.
pub trait Compile<S: ?Sized>: Sized + Send + Sync + 'static {
    /// What the slot holds when this model does not compile and there is no last good one.
    const ON_REJECT: OnReject = OnReject::KeepLast;

    /// Compiles the model. Every field that it gives meaning to is marked with [`Diagnostics::honour`]; every error
    /// is in `diags` when it returns [`Rejected`].
    ///
    /// # Errors
    /// [`Rejected`] when no model can be made; the reasons are in `diags`.
    fn compile(source: &S, cx: &CompileContext, diags: &mut Diagnostics) -> Result<Self, Rejected>;

    /// The model before there is any configuration: it routes nothing, allows nothing, reports nothing.
    fn closed(cx: &CompileContext) -> Self;
}

/// The model was not made; the diagnostics say why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the configuration was rejected; the diagnostics say why")]
pub struct Rejected;

/// What a slot holds when its model does not compile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OnReject {
    /// The last good model.
    KeepLast,
    /// The model that refuses everything.
    FailClosed,
}

/// Whom a configuration is compiled for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompileContext {
    /// The workload that the layers belong to.
    pub workload: Workload,
    /// Outbound and inbound of a sidecar, or a gateway.
    pub role: Role,
    /// Which Istio is meant.
    pub compat: Compat,
    /// The DNS suffix of the cluster's services. Default `cluster.local`.
    pub cluster_domain: String,
    /// The trust domain of this workload. Default `cluster.local`.
    pub trust_domain: String,
    /// The namespace whose selector-less policies hold for the whole mesh. Default `istio-system`.
    pub root_namespace: String,
    /// What the stack can do about the security of transports. Default nothing.
    pub transport: Transport,
}

/// What a stack can do about the security of transports, so that what it cannot is reported and not pretended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transport {
    /// Whether it can originate TLS.
    pub originates: bool,
    /// Whether it can terminate the mesh's mutual TLS on inbound ports.
    pub terminates: bool,
    /// Whether it can terminate TLS for the servers of a gateway, which bring certificates of their own.
    pub terminates_servers: bool,
    /// Whether the workload has an identity of the mesh.
    pub has_identity: bool,
}

/// The workload that a proxy or an embedded stack stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its name; empty when it has none.
    pub name: String,
    /// Its namespace. Default `default`.
    pub namespace: String,
    /// Its service account. Default `default`.
    pub service_account: String,
    /// Its labels, which selectors look at.
    pub labels: BTreeMap<String, String>,
}

/// What kind of proxy a configuration is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Beside an application, or inside it: gateway name `mesh`.
    Sidecar,
    /// At the edge: only what `Gateway` resources that select it expose.
    Gateway,
}

impl Role {
    /// The direction of the requests that this role routes by virtual services.
    #[must_use]
    pub const fn direction(self) -> Direction {
        match self {
            Self::Sidecar => Direction::Outbound,
            Self::Gateway => Direction::Gateway,
        }
    }
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            name: String::new(),
            namespace: "default".to_owned(),
            service_account: "default".to_owned(),
            labels: BTreeMap::new(),
        }
    }
}

impl CompileContext {
    /// A context with the defaults of every field.
    #[must_use]
    pub fn new(role: Role) -> Self {
        Self {
            workload: Workload::default(),
            role,
            compat: Compat::default(),
            cluster_domain: "cluster.local".to_owned(),
            trust_domain: "cluster.local".to_owned(),
            root_namespace: "istio-system".to_owned(),
            transport: Transport::default(),
        }
    }
}

/// Compiles sources of type `S` into snapshots.
pub struct Compiler<S: ?Sized> {
    context: CompileContext,
    models: Vec<Box<dyn ErasedModel<S>>>,
    before_publish: Vec<Reconcile>,
    snapshots: Snapshots,
    generation: u64,
    accepted: u64,
    rejected: u64,
}

type Reconcile = Box<dyn FnMut(&Snapshot) + Send>;

/// What became of one source.
#[derive(Debug)]
pub struct Outcome {
    /// Whether the source is in force now.
    pub accepted: bool,
    /// The generation that is in force now.
    pub generation: u64,
    /// Everything that loading and compiling had to say.
    pub diagnostics: Diagnostics,
}

impl<S: ?Sized + 'static> Compiler<S> {
    /// A compiler without models.
    #[must_use]
    pub fn new(context: CompileContext) -> Self {
        Self {
            context,
            models: Vec::new(),
            before_publish: Vec::new(),
            snapshots: Snapshots::new(),
            generation: 0,
            accepted: 0,
            rejected: 0,
        }
    }

    /// Registers a model and returns the slot through which layers read it. Register every model before the first
    /// [`Compiler::apply`]; a slot registered later is empty until the next.
    pub fn register<T: Compile<S>>(&mut self) -> Slot<T> {
        self.models.push(Box::new(Registered::<T>(std::marker::PhantomData)));
        Slot::index(self.models.len().saturating_sub(1))
    }

    /// Runs `reconcile` with each accepted snapshot before it is published, so that the runtime state which the new
    /// models name exists before any request can ask for it (make before break).
    pub fn before_publish(&mut self, reconcile: impl FnMut(&Snapshot) + Send + 'static) {
        self.before_publish.push(Box::new(reconcile));
    }

    /// Where the snapshots are published.
    #[must_use]
    pub fn snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// Whom this compiler compiles for.
    #[must_use]
    pub fn context(&self) -> &CompileContext {
        &self.context
    }

    /// How many sources were accepted and how many rejected.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.accepted, self.rejected)
    }

    /// Counts a source that could not even be loaded as rejected; nothing else changes.
    pub fn reject(&mut self, diagnostics: Diagnostics) -> Outcome {
        self.rejected = self.rejected.saturating_add(1);
        Outcome { accepted: false, generation: self.generation, diagnostics }
    }

    /// Compiles every model and says what became of it, but publishes nothing.
    pub fn check(
        &self,
        source: &S,
        mut diagnostics: Diagnostics,
    ) -> (Option<Vec<Arc<dyn Any + Send + Sync>>>, Diagnostics) {
        let compiled: Vec<_> =
            self.models.iter().map(|model| model.compile(source, &self.context, &mut diagnostics)).collect();
        let models = compiled.into_iter().collect::<Result<Vec<Model>, Rejected>>().ok();
        (models.filter(|_| !diagnostics.has_errors()), diagnostics)
    }

    /// Compiles `source` and, if nothing in it is an error, publishes it as the next generation. `diagnostics` are
    /// those of loading it. With an error, the last good generation stays in force; if there is none, every model
    /// is published in its closed form.
    pub fn apply(&mut self, source: &S, diagnostics: Diagnostics) -> Outcome {
        let (models, diagnostics) = self.check(source, diagnostics);
        self.apply_checked(models, diagnostics)
    }

    /// [`apply`](Self::apply) of what [`check`](Self::check) came to, for whoever looks at it in between.
    pub fn apply_checked(
        &mut self,
        models: Option<Vec<Arc<dyn Any + Send + Sync>>>,
        diagnostics: Diagnostics,
    ) -> Outcome {
        let accepted = models.is_some();
        match models {
            Some(models) => {
                self.accepted = self.accepted.saturating_add(1);
                self.generation = self.generation.saturating_add(1);
                self.publish(Snapshot::new(self.generation, models));
            }
            None => {
                self.rejected = self.rejected.saturating_add(1);
                self.publish_closed_if_first();
            }
        }
        Outcome { accepted, generation: self.generation, diagnostics }
    }

    /// Publishes every model in its closed form, as generation 0, unless a generation is in force.
    pub fn publish_closed_if_first(&mut self) {
        if self.generation == 0 && self.snapshots.load().models().is_empty() {
            let models = self.models.iter().map(|model| model.closed(&self.context)).collect();
            self.publish(Snapshot::new(0, models));
        }
    }

    fn publish(&mut self, snapshot: Snapshot) {
        let snapshot = self.snapshots.prepare(snapshot);
        for reconcile in &mut self.before_publish {
            reconcile(&snapshot);
        }
        self.snapshots.publish(snapshot);
    }
}

impl<S: ?Sized> fmt::Debug for Compiler<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiler")
            .field("context", &self.context)
            .field("models", &self.models.iter().map(|model| model.name()).collect::<Vec<_>>())
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

trait ErasedModel<S: ?Sized>: Send {
    fn name(&self) -> &'static str;
    fn compile(&self, source: &S, cx: &CompileContext, diags: &mut Diagnostics) -> Result<Model, Rejected>;
    fn closed(&self, cx: &CompileContext) -> Model;
}

struct Registered<T>(std::marker::PhantomData<fn() -> T>);

impl<S: ?Sized, T: Compile<S>> ErasedModel<S> for Registered<T> {
    fn name(&self) -> &'static str {
        type_name::<T>()
    }

    fn compile(&self, source: &S, cx: &CompileContext, diags: &mut Diagnostics) -> Result<Model, Rejected> {
        Ok(Arc::new(T::compile(source, cx, diags)?))
    }

    fn closed(&self, cx: &CompileContext) -> Model {
        Arc::new(T::closed(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Double(u32);

    impl Compile<u32> for Double {
        fn compile(source: &u32, _: &CompileContext, diags: &mut Diagnostics) -> Result<Self, Rejected> {
            if *source == 13 {
                diags.error("spec", "13 is refused");
                return Err(Rejected);
            }
            Ok(Self(source * 2))
        }

        fn closed(_: &CompileContext) -> Self {
            Self(0)
        }
    }

    fn compiler() -> (Compiler<u32>, Slot<Double>) {
        let mut compiler = Compiler::new(CompileContext::new(Role::Sidecar));
        let slot = compiler.register::<Double>();
        (compiler, slot)
    }

    #[test]
    fn one_source_gives_one_generation() {
        let (mut compiler, slot) = compiler();
        let outcome = compiler.apply(&21, Diagnostics::default());
        assert!(outcome.accepted);
        let snapshot = compiler.snapshots().load();
        assert_eq!((snapshot.generation(), snapshot.get(&slot).unwrap().0), (1, 42));
    }

    #[test]
    fn an_error_keeps_the_last_good_generation() {
        let (mut compiler, slot) = compiler();
        compiler.apply(&1, Diagnostics::default());
        let outcome = compiler.apply(&13, Diagnostics::default());
        assert!(!outcome.accepted);
        assert_eq!(outcome.generation, 1);
        assert_eq!(compiler.counts(), (1, 1));
        assert_eq!(compiler.snapshots().load().get(&slot).unwrap().0, 2);
    }

    #[test]
    fn an_error_at_start_publishes_the_closed_models() {
        let (mut compiler, slot) = compiler();
        assert!(!compiler.apply(&13, Diagnostics::default()).accepted);
        let snapshot = compiler.snapshots().load();
        assert_eq!((snapshot.generation(), snapshot.get(&slot).unwrap().0), (0, 0));
    }

    #[test]
    fn c5_a_replaced_generation_is_not_freed_by_its_last_holder() {
        struct Heavy(std::sync::mpsc::Sender<std::thread::ThreadId>);
        impl Drop for Heavy {
            fn drop(&mut self) {
                // The test may be over.
                let _ = self.0.send(std::thread::current().id());
            }
        }
        type Told = std::sync::mpsc::Sender<std::thread::ThreadId>;
        impl Compile<Told> for Heavy {
            fn compile(source: &Told, _: &CompileContext, _: &mut Diagnostics) -> Result<Self, Rejected> {
                Ok(Self(source.clone()))
            }

            fn closed(_: &CompileContext) -> Self {
                Self(std::sync::mpsc::channel().0)
            }
        }
        let mut compiler = Compiler::<Told>::new(CompileContext::new(Role::Sidecar));
        compiler.register::<Heavy>();
        let (sender, freed) = std::sync::mpsc::channel();
        compiler.apply(&sender, Diagnostics::default());
        let pinned = compiler.snapshots().load();
        compiler.apply(&sender, Diagnostics::default());
        drop(pinned);
        assert_ne!(freed.recv().unwrap(), std::thread::current().id());
        let mut compiler = Compiler::<Told>::new(CompileContext::new(Role::Sidecar));
        compiler.register::<Heavy>();
        compiler.snapshots().free_in_place();
        compiler.apply(&sender, Diagnostics::default());
        compiler.apply(&sender, Diagnostics::default());
        assert_eq!(freed.recv().unwrap(), std::thread::current().id(), "unless it is told so");
    }

    #[test]
    fn reconciling_comes_before_publishing() {
        let (mut compiler, slot) = compiler();
        let snapshots = compiler.snapshots().clone();
        compiler.before_publish(move |next| {
            assert!(snapshots.load().generation() < next.generation());
            assert_eq!(next.get(&slot).unwrap().0, 10);
        });
        assert!(compiler.apply(&5, Diagnostics::default()).accepted);
    }
}
