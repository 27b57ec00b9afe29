//! What mirroring counts, and how much of it there may be at a time.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use mesh_core::mirrored::MirrorId;

use crate::diff::Diffs;

/// The most copies that a process has in flight unless it is told otherwise. Each holds at most 64 KiB that its mirror
/// has not read, where a piece counts for 512 bytes at least, so mirrors that hang hold about 64 MiB.
pub const MOST_IN_FLIGHT: u32 = 1024;

/// What all copies of a process share: who made them, and how many are in flight. Cloning shares it.
#[derive(Clone)]
pub struct Mirroring(Arc<Shared>);

struct Shared {
    id: MirrorId,
    most: AtomicU32,
    in_flight: AtomicU32,
    diffs: Diffs,
}

impl Mirroring {
    /// Its own, with at most [`MOST_IN_FLIGHT`] copies in flight.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            id: MirrorId::new(rand::random()),
            most: AtomicU32::new(MOST_IN_FLIGHT),
            in_flight: AtomicU32::new(0),
            diffs: Diffs::default(),
        }))
    }

    /// Changes how many copies may be in flight; those that are stay.
    pub fn set_most_in_flight(&self, most: u32) {
        self.0.most.store(most, Ordering::Relaxed);
    }

    /// Copies whose answer has not ended.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.0.in_flight.load(Ordering::Relaxed)
    }

    /// What came of comparing answers (VS-P05).
    #[must_use]
    pub fn diffs(&self) -> &Diffs {
        &self.0.diffs
    }

    pub(crate) fn id(&self) -> MirrorId {
        self.0.id
    }

    /// A place for one more copy.
    pub(crate) fn admit(&self) -> Option<InFlight> {
        let most = self.0.most.load(Ordering::Relaxed);
        let admitted = self
            .0
            .in_flight
            .try_update(Ordering::AcqRel, Ordering::Relaxed, |count| (count < most).then(|| count + 1));
        admitted.is_ok().then(|| InFlight(self.clone()))
    }
}

impl Default for Mirroring {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Mirroring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirroring").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

/// A copy in flight; the place is given back when it is dropped.
#[derive(Debug)]
pub(crate) struct InFlight(Mirroring);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What became of the copies for one mirror. Each is counted once, when it is over.
#[derive(Debug, Default)]
pub struct MirrorCounters([AtomicU64; 5]);

/// What became of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MirrorOutcome {
    /// The mirror answered, whatever its status.
    Answered,
    /// There was no answer: no endpoint, a limit of the cluster, no connection, a reset, a timeout.
    Failed,
    /// It was not made: too many were in flight.
    Dropped,
    /// The mirror read its body too slowly.
    Overflowed,
    /// The body of the primary broke off, and so did that of the copy.
    Cancelled,
}

impl MirrorOutcome {
    /// Every one.
    pub const ALL: [Self; 5] =
        [Self::Answered, Self::Failed, Self::Dropped, Self::Overflowed, Self::Cancelled];

    /// As metrics name it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Failed => "failed",
            Self::Dropped => "dropped",
            Self::Overflowed => "overflowed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl MirrorCounters {
    /// How many came to this.
    #[must_use]
    pub fn get(&self, outcome: MirrorOutcome) -> u64 {
        self.0[outcome as usize].load(Ordering::Relaxed)
    }

    /// Whether nothing was counted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        MirrorOutcome::ALL.iter().all(|outcome| self.get(*outcome) == 0)
    }

    pub(crate) fn count(&self, outcome: MirrorOutcome) {
        self.0[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }
}
